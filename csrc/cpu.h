// What cpu.cpp, compiled once per instruction set, offers to bindings.cpp.
#pragma once

#include "dispatch.h"

namespace snnfast {

struct CpuKernels {
  const char* name;
  void (*forward)(const Call&);
  bool (*backward)(const Call&);                        // false: out of memory
  bool (*batch_norm)(const BatchNorm&, BatchNormPass);  // likewise
  // Whether multiplying by 1 / tau, kept as two floats, gives the bits of a / tau for every float a in its range.
  bool (*corrected_division_is_exact)(float tau);
  bool (*pack_bits)(const BitsCall&, uint64_t* one);  // false where there are other values too
  void (*unpack_bits)(const BitsCall&);
  bool (*feature_loss)(const FeatureCall&);  // false: out of memory
  void (*max_pool)(const PoolCall&, bool backward);
  int64_t (*count_events)(const float* x, int64_t n, int threads);
  void (*pack_event_weights)(const EventCall&, const float* weight, const float* bias, float* packed);
  bool (*event_convolve)(const EventCall&);         // false: out of memory
  bool (*event_weight_gradient)(const EventCall&);  // likewise
};

// One per instruction set of this build, declared by SNNFAST_CPU_SETS = X(avx512) X(avx2) X(baseline).
#define SNNFAST_DECLARE(set) extern const CpuKernels cpu_kernels_##set;
SNNFAST_CPU_SETS(SNNFAST_DECLARE)
#undef SNNFAST_DECLARE

// Neurons per block of the backward, chosen so that the tape of a block stays in the caches. It depends on the shape
// alone, so a sum over blocks has the same bits for any number of threads.
constexpr int64_t kMaxSegment = 512;
inline int64_t backward_block_size(int64_t T) {
  const int64_t steps = T < kMaxSegment ? T : kMaxSegment;
  const int64_t block = 8192 / steps / 64 * 64;
  return block < 256 ? 256 : block;
}
inline int64_t backward_blocks(int64_t T, int64_t N) {
  return (N + backward_block_size(T) - 1) / backward_block_size(T);
}

// Partial sums of a learnable decay that the backward with batch norm leaves, one per chunk.
constexpr int64_t kMostChunks = 128;

}  // namespace snnfast
