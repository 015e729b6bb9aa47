// Spikes as one bit an element on the GPU, in the CPU's order (see cpu_bits.h): a thread turns 8 neighbours into a byte
// and a byte into 8 neighbours, so that all of a warp's accesses lie side by side.
//
// Nobody waits for the GPU to look at the values. Where there are others than 0 and `one` after all, what is unpacked
// is NaN, and so the gradient is, instead of wrong.
#pragma once

#include "cuda_kernels.cuh"

namespace snnfast {
namespace {

constexpr int kBitsThreads = 256;

template <class U>
struct Eight {
  U values[8];
};

// `whole`: `elements` lies on a 16-byte boundary.
template <class U, bool whole>
__global__ void __launch_bounds__(kBitsThreads) pack_bits_kernel(BitsCall c, int64_t bytes) {
  const int64_t byte = int64_t(blockIdx.x) * kBitsThreads + threadIdx.x;
  if (byte >= bytes) return;
  const U* from = static_cast<const U*>(c.elements) + byte * 8;
  const int64_t left = c.n - byte * 8;
  Eight<U> e{};
  if (whole && left >= 8) {
    uint4 words[sizeof(e) / 16];
    SNNFAST_UNROLL
    for (int k = 0; k < int(sizeof(e) / 16); ++k) words[k] = reinterpret_cast<const uint4*>(from)[k];
    memcpy(&e, words, sizeof(e));
  } else {
    SNNFAST_UNROLL
    for (int k = 0; k < 8; ++k)
      if (k < left) e.values[k] = from[k];
  }
  const U one = U(c.one);
  unsigned bits = 0;
  bool other = false;
  SNNFAST_UNROLL
  for (int k = 0; k < 8; ++k) {
    bits |= unsigned(e.values[k] == one) << k;
    other = other || (e.values[k] != one && e.values[k] != 0);
  }
  static_cast<uint8_t*>(c.bits)[byte] = uint8_t(bits);
  if (other) *static_cast<uint8_t*>(c.other) = 1;
}

template <class U, bool whole>
__global__ void __launch_bounds__(kBitsThreads) unpack_bits_kernel(BitsCall c, int64_t bytes) {
  const int64_t byte = int64_t(blockIdx.x) * kBitsThreads + threadIdx.x;
  const int64_t left = c.n - byte * 8;
  if (byte >= bytes || left <= 0) return;
  const unsigned bits = static_cast<const uint8_t*>(c.bits)[byte];
  const U one = U(c.one), spoilt = *static_cast<const uint8_t*>(c.other) ? U(~U(0)) : U(0);
  Eight<U> e;
  SNNFAST_UNROLL
  for (int k = 0; k < 8; ++k) e.values[k] = U((bits >> k & 1 ? one : U(0)) | spoilt);
  U* to = static_cast<U*>(c.elements) + byte * 8;
  if (whole && left >= 8) {
    uint4 words[sizeof(e) / 16];
    memcpy(words, &e, sizeof(e));
    SNNFAST_UNROLL
    for (int k = 0; k < int(sizeof(e) / 16); ++k) __stwb(reinterpret_cast<uint4*>(to) + k, words[k]);
  } else {
    SNNFAST_UNROLL
    for (int k = 0; k < 8; ++k)
      if (k < left) to[k] = e.values[k];
  }
}

using BitsKernel = void (*)(BitsCall, int64_t);

template <class U>
BitsKernel bits_kernel(bool pack, bool whole) {
  if (pack) return whole ? pack_bits_kernel<U, true> : pack_bits_kernel<U, false>;
  return whole ? unpack_bits_kernel<U, true> : unpack_bits_kernel<U, false>;
}

inline cudaError_t launch_bits(BitsCall c, bool pack, void* stream) {
  int64_t bytes = (c.n + 63) / 64 * 8;
  if (bytes == 0) return cudaSuccess;
  const int64_t blocks = (bytes + kBitsThreads - 1) / kBitsThreads;
  const bool whole = uintptr_t(c.elements) % 16 == 0;
  const BitsKernel kernel = c.element_bytes == 2   ? bits_kernel<uint16_t>(pack, whole)
                            : c.element_bytes == 4 ? bits_kernel<uint32_t>(pack, whole)
                                                   : bits_kernel<uint64_t>(pack, whole);
  return launch_blocks(kernel, blocks, kBitsThreads, c, bytes, stream);
}

}  // namespace
}  // namespace snnfast
