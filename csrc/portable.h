// What the dynamics need from a number type, for every number type they run on: a scalar on the host, a scalar on a
// CUDA device, and a vector of lanes (see vector.h). Everything has internal linkage: cpu.cpp is compiled once per
// instruction set, and a shared inline function would let the linker pick the AVX-512 copy for an older processor.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define SNNFAST_FN __host__ __device__ __forceinline__
#define SNNFAST_UNROLL _Pragma("unroll")
#else
#define SNNFAST_FN inline __attribute__((always_inline))
#define SNNFAST_UNROLL
#endif

namespace snnfast {
namespace {

// The scalar type and the same-width integer behind a number type; vector.h adds the vectors.
template <class V>
struct Lanes;
template <>
struct Lanes<float> {
  using Real = float;
  using Int = int32_t;
  using Unsigned = uint32_t;
};
template <>
struct Lanes<double> {
  using Real = double;
  using Int = int64_t;
  using Unsigned = uint64_t;
};
template <class V>
using RealOf = typename Lanes<V>::Real;
template <class V>
using IntOf = typename Lanes<V>::Int;

// mask ? a : b, lane by lane.
template <class M, class V>
SNNFAST_FN V select(M mask, V a, V b) {
  return mask ? a : b;
}
template <class V>
SNNFAST_FN V broadcast(RealOf<V> value) {
  return V{} + value;
}
template <class To, class From>
SNNFAST_FN To bits_as(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From), "bits_as needs types of one size");
  memcpy(&to, &from, sizeof(To));
  return to;
}
template <class V>
SNNFAST_FN V absolute(V a) {
  using U = typename Lanes<V>::Unsigned;
  return bits_as<V>(bits_as<U>(a) & (~U{} >> 1));
}
template <class V>
SNNFAST_FN V minus_absolute(V a) {
  using U = typename Lanes<V>::Unsigned;
  return bits_as<V>(bits_as<U>(a) | ~(~U{} >> 1));
}
#ifdef __CUDA_ARCH__
template <>
SNNFAST_FN float absolute<float>(float a) {
  return fabsf(a);  // free in an operand
}
template <>
SNNFAST_FN float minus_absolute<float>(float a) {
  return -fabsf(a);
}
#endif
SNNFAST_FN float truncate(float a) { return truncf(a); }
SNNFAST_FN double truncate(double a) { return trunc(a); }
SNNFAST_FN bool any_lane(bool a) { return a; }
SNNFAST_FN bool any_lane_zero_or_infinite(float a) {  // denormal numbers count as zeros
  return (bits_as<uint32_t>(a) & 0x7fffffffu) - 0x00800000u >= 0x7f000000u;
}
// Rounded once. The CPU calls it only where there is an instruction for it (kHasFusedMultiplyAdd in vector.h).
SNNFAST_FN float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

// For gradients, which may be contracted: fused where that is one instruction.
SNNFAST_FN float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
SNNFAST_FN double multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

// For gradients as well: on a GPU without the code of an IEEE division, which would be most of a backward kernel.
template <class V>
SNNFAST_FN V quotient(V a, V b) {
  return a / b;
}
#ifdef __CUDA_ARCH__
template <>
SNNFAST_FN float quotient<float>(float a, float b) {
  float inverse;  // to 1 ulp, and 0 where it would be denormal: without the code for those, which is twice as much
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
}
#endif

template <class V>
SNNFAST_FN V exp_nonpositive(V a);  // in surrogates.h

// p * 2^n for a whole n <= 0, which also stands in the low bits of `shifted` (see exp_nonpositive); 0 where 2^n would
// leave the normal range, NaN where n is.
SNNFAST_FN float scale_by_exponent(float p, float n, float shifted) {
  return n < -126.0f ? 0.0f : p * bits_as<float>((bits_as<uint32_t>(shifted) + 127u) << 23);
}
SNNFAST_FN double scale_by_exponent(double p, double n, double shifted) {
  return n < -1022.0 ? 0.0 : p * bits_as<double>((bits_as<uint64_t>(shifted) + 1023u) << 52);
}

}  // namespace
}  // namespace snnfast
