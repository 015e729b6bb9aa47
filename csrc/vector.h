// Vectors of lanes for the CPU, in the compiler's vector extension: the same source becomes SSE2, AVX2, AVX-512 or
// NEON code. Intrinsics appear only where the extension has no word for it: fused multiply-add, float16, streaming
// stores.
#pragma once

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "portable.h"

namespace snnfast {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
constexpr bool kHasFusedMultiplyAdd = true;
#else
constexpr bool kHasFusedMultiplyAdd = false;
#endif

typedef float Float32Vector __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32Vector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UInt32Vector __attribute__((vector_size(kVectorBytes)));
typedef double Float64Vector __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64Vector __attribute__((vector_size(kVectorBytes)));
typedef uint64_t UInt64Vector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t UInt16Vector __attribute__((vector_size(kVectorBytes / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <>
struct Lanes<Float32Vector> {
  using Real = float;
  using Int = Int32Vector;
  using Unsigned = UInt32Vector;
};
template <>
struct Lanes<Float64Vector> {
  using Real = double;
  using Int = Int64Vector;
  using Unsigned = UInt64Vector;
};
template <class R>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = Float32Vector;
};
template <>
struct VectorOf<double> {
  using type = Float64Vector;
};

SNNFAST_FN bool any_lane(Int32Vector mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  for (int i = 0; i < kVectorBytes / 4; ++i)
    if (mask[i]) return true;
  return false;
#endif
}
SNNFAST_FN bool any_lane_zero_or_infinite(Float32Vector a) {  // denormal numbers count as zeros
#if defined(__AVX512F__)
  return _mm512_fpclass_ps_mask((__m512)a, 0x3e) != 0;  // zeros, Inf and denormal numbers of either sign
#else
  return any_lane(((UInt32Vector)a & 0x7fffffffu) - 0x00800000u >= 0x7f000000u);
#endif
}

SNNFAST_FN Float32Vector fused_multiply_add(Float32Vector a, Float32Vector b, Float32Vector c) {
#if defined(__AVX512F__)
  return (Float32Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Float32Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < kVectorBytes / 4; ++i) a[i] = fmaf(a[i], b[i], c[i]);
  return a;
#endif
}

SNNFAST_FN Float32Vector multiply_add(Float32Vector a, Float32Vector b, Float32Vector c) {
  if constexpr (kHasFusedMultiplyAdd) return fused_multiply_add(a, b, c);
  return a * b + c;
}
SNNFAST_FN Float64Vector multiply_add(Float64Vector a, Float64Vector b, Float64Vector c) {
#if defined(__AVX512F__)
  return (Float64Vector)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Float64Vector)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// a / b for gradients, by the processor's estimate of a reciprocal and one Newton step: the relative error is below
// 2e-7. An infinite b, whose step would be Inf * 0, counts as the largest number; NaN stays.
SNNFAST_FN Float32Vector quotient(Float32Vector a, Float32Vector b) {
#if defined(__AVX512F__)
  b = (Float32Vector)_mm512_min_ps(_mm512_set1_ps(3e38f), (__m512)b);
  const auto r = (Float32Vector)_mm512_rcp14_ps((__m512)b);
#elif defined(__AVX2__)
  b = (Float32Vector)_mm256_min_ps(_mm256_set1_ps(3e38f), (__m256)b);
  const auto r = (Float32Vector)_mm256_rcp_ps((__m256)b);
#elif defined(__SSE2__)
  b = (Float32Vector)_mm_min_ps(_mm_set1_ps(3e38f), (__m128)b);
  const auto r = (Float32Vector)_mm_rcp_ps((__m128)b);
#else
  return a / b;
#endif
#if defined(__SSE2__)
  const Float32Vector residual = multiply_add(-b, r, broadcast<Float32Vector>(1.0f));
  return a * multiply_add(r, residual, r);
#endif
}

// What is large is whole already, and Inf and NaN stay.
SNNFAST_FN Float32Vector truncate(Float32Vector a) {
  const auto whole = __builtin_convertvector(__builtin_convertvector(a, Int32Vector), Float32Vector);
  return select(absolute(a) < 8388608.0f, whole, a);
}
SNNFAST_FN Float64Vector truncate(Float64Vector a) {
  const auto whole = __builtin_convertvector(__builtin_convertvector(a, Int64Vector), Float64Vector);
  return select(absolute(a) < 4503599627370496.0, whole, a);
}

SNNFAST_FN Float32Vector scale_by_exponent(Float32Vector p, Float32Vector n, Float32Vector shifted) {
  const auto power = (Float32Vector)(((UInt32Vector)shifted + 127u) << 23);
  return select(n < -126.0f, Float32Vector{}, p * power);
}
SNNFAST_FN Float64Vector scale_by_exponent(Float64Vector p, Float64Vector n, Float64Vector shifted) {
  const auto power = (Float64Vector)(((UInt64Vector)shifted + 1023u) << 52);
  return select(n < -1022.0, Float64Vector{}, p * power);
}

#if defined(__AVX512F__)
// e^a = 2^t by the fraction of t, a minimax polynomial, and an instruction that takes the floor of t as the exponent,
// -Inf included. The rounding of t adds 6e-8 |a| to the relative error.
template <>
SNNFAST_FN Float32Vector exp_nonpositive<Float32Vector>(Float32Vector a) {
  const Float32Vector t = a * 1.44269504088896340736f;
  const auto fraction = (Float32Vector)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Float32Vector p = broadcast<Float32Vector>(1.877576695e-3f);
  p = multiply_add(p, fraction, broadcast<Float32Vector>(8.989339694e-3f));
  p = multiply_add(p, fraction, broadcast<Float32Vector>(5.582631752e-2f));
  p = multiply_add(p, fraction, broadcast<Float32Vector>(2.401536107e-1f));
  p = multiply_add(p, fraction, broadcast<Float32Vector>(6.931530833e-1f));
  p = multiply_add(p, fraction, broadcast<Float32Vector>(9.999999404e-1f));
  return (Float32Vector)_mm512_scalef_ps((__m512)p, (__m512)t);
}
#endif

// ---- loads ----
template <class V, class T>
SNNFAST_FN V load_bits(const T* from) {
  V v;
  memcpy(&v, from, sizeof(V));
  return v;
}
SNNFAST_FN float to_float(BFloat16 a) { return bits_as<float>(uint32_t(a.bits) << 16); }
SNNFAST_FN float to_float(Float16 a) {
#if defined(__F16C__)
  return _cvtsh_ss(a.bits);
#else
  return float(bits_as<_Float16>(a.bits));
#endif
}
SNNFAST_FN Float32Vector load(const float* from, Float32Vector*) { return load_bits<Float32Vector>(from); }
SNNFAST_FN Float64Vector load(const double* from, Float64Vector*) { return load_bits<Float64Vector>(from); }
// GCC 12 makes up to five instructions of __builtin_convertvector between 16 and 32 bits where there is one.
SNNFAST_FN UInt32Vector widen(const BFloat16* from) {
#if defined(__AVX512F__)
  return (UInt32Vector)_mm512_cvtepu16_epi32(load_bits<__m256i>(from));
#elif defined(__AVX2__)
  return (UInt32Vector)_mm256_cvtepu16_epi32(load_bits<__m128i>(from));
#else
  return __builtin_convertvector(load_bits<UInt16Vector>(from), UInt32Vector);
#endif
}
SNNFAST_FN UInt16Vector narrow(UInt32Vector v) {  // of values below 2^16
#if defined(__AVX512F__)
  return (UInt16Vector)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  const __m256i halves = _mm256_packus_epi32((__m256i)v, (__m256i)v);  // within 128 bits each
  return (UInt16Vector)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
#else
  return __builtin_convertvector(v, UInt16Vector);
#endif
}
SNNFAST_FN Float32Vector load(const BFloat16* from, Float32Vector*) { return (Float32Vector)(widen(from) << 16); }
SNNFAST_FN Float32Vector load(const Float16* from, Float32Vector*) {
#if defined(__AVX512F__)
  return (Float32Vector)_mm512_cvtph_ps(load_bits<__m256i>(from));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Float32Vector)_mm256_cvtph_ps(load_bits<__m128i>(from));
#else
  Float32Vector v;
  for (int i = 0; i < kVectorBytes / 4; ++i) v[i] = to_float(from[i]);
  return v;
#endif
}
SNNFAST_FN float load(const float* from, float*) { return *from; }
SNNFAST_FN double load(const double* from, double*) { return *from; }
SNNFAST_FN float load(const BFloat16* from, float*) { return to_float(*from); }
SNNFAST_FN float load(const Float16* from, float*) { return to_float(*from); }

// ---- stores ----
template <class V>
SNNFAST_FN void stream_bits(void* to, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i*)to, bits_as<__m512i>(v));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)to, bits_as<__m256i>(v));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128((__m128i*)to, bits_as<__m128i>(v));
#endif
  memcpy(to, &v, sizeof(V));
}
template <bool stream, class V>
SNNFAST_FN void store_bits(void* to, V v) {
  if constexpr (stream)
    stream_bits(to, v);
  else
    memcpy(to, &v, sizeof(V));
}
// To the nearest, ties to even, as torch rounds; NaN becomes a quiet NaN.
template <class I>
SNNFAST_FN I bfloat16_bits(I bits) {
  const I rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const I magnitude = bits & 0x7fffffff;
  return select(magnitude > 0x7f800000, I{} + 0x7fc0, rounded);
}
template <bool stream>
SNNFAST_FN void store(float* to, Float32Vector v) {
  store_bits<stream>(to, v);
}
template <bool stream>
SNNFAST_FN void store(double* to, Float64Vector v) {
  store_bits<stream>(to, v);
}
template <bool stream>
SNNFAST_FN void store(BFloat16* to, Float32Vector v) {
  store_bits<stream>(to, narrow(bfloat16_bits((UInt32Vector)v)));
}
template <bool stream>
SNNFAST_FN void store_halves(BFloat16* to, Float32Vector v) {
  store_bits<stream>(to, narrow((UInt32Vector)v >> 16));
}
SNNFAST_FN uint16_t float16_bits(float v) {
#if defined(__F16C__)
  return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return bits_as<uint16_t>(_Float16(v));
#endif
}
template <bool stream>
SNNFAST_FN void store(Float16* to, Float32Vector v) {
#if defined(__AVX512F__)
  store_bits<stream>(to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__) && defined(__F16C__)
  store_bits<stream>(to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kVectorBytes / 4; ++i) to[i].bits = float16_bits(v[i]);
#endif
}
template <bool stream>
SNNFAST_FN void store_halves(Float16* to, Float32Vector v) {
  store<stream>(to, v);
}
template <bool>
SNNFAST_FN void store(float* to, float v) {
  *to = v;
}
template <bool>
SNNFAST_FN void store(double* to, double v) {
  *to = v;
}
template <bool>
SNNFAST_FN void store(BFloat16* to, float v) {
  to->bits = uint16_t(bfloat16_bits(bits_as<uint32_t>(v)));
}
template <bool>
SNNFAST_FN void store(Float16* to, float v) {
  to->bits = float16_bits(v);
}

// Spikes that are 0 or 1, of which the upper half of a float32 is all of a bfloat16.
template <bool stream, class T, class V>
SNNFAST_FN void store_spikes(T* to, V s) {
  if constexpr (sizeof(T) == 2 && sizeof(V) > sizeof(float))
    store_halves<stream>(to, s);
  else
    store<stream>(to, s);
}

// ---- neighbours ----
// Lanes of a, and behind them of b, by number. Vectors of unsigned integers, for these number lanes too.
template <class V>
SNNFAST_FN V pick(V a, V b, const V& from) {
#if defined(__clang__)  // which has no __builtin_shuffle, and finds the instruction by itself
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  V found;
  for (int i = 0; i < lanes; ++i) found[i] = from[i] < lanes ? a[from[i]] : b[from[i] - lanes];
  return found;
#else
  return __builtin_shuffle(a, b, from);
#endif
}
// Runs of `run` lanes of a, and behind them of b, to even and odd ones, and back.
template <int run, class V>
SNNFAST_FN void split_runs(V a, V b, V& even, V& odd) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  V first, second;
  for (int i = 0; i < lanes; ++i) first[i] = i / run * 2 * run + i % run, second[i] = first[i] + run;
  even = pick(a, b, first);
  odd = pick(a, b, second);
}
template <int run, class V>
SNNFAST_FN void join_runs(V even, V odd, V& a, V& b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  V low, high;
  for (int i = 0; i < lanes; ++i) {
    low[i] = i / (2 * run) * run + i % run + (i / run % 2) * lanes;
    high[i] = (i + lanes) / (2 * run) * run + i % run + ((i + lanes) / run % 2) * lanes;
  }
  a = pick(even, odd, low);
  b = pick(even, odd, high);
}

// ---- bfloat16, two vectors at a time ----
// 32 bits of memory are two neighbours, so a shift and a mask make two vectors of float32: the even elements and the
// odd ones. Rows of bfloat16 keep what they leave in scratch memory in that order, and put into the usual one ("join")
// what leaves the kernel; of every other type a row takes one vector at a time.
template <class T, class V>
constexpr int kParts = 1;
template <>
constexpr int kParts<BFloat16, Float32Vector> = 2;

template <class T, class V>
SNNFAST_FN void load_parts(const T* from, V (&to)[1]) {
  to[0] = load(from, (V*)nullptr);
}
SNNFAST_FN void load_parts(const BFloat16* from, Float32Vector (&to)[2]) {
  const auto both = load_bits<UInt32Vector>(from);
  to[0] = (Float32Vector)(both << 16);
  to[1] = (Float32Vector)(both & 0xffff0000u);
}
template <bool stream, class T, class V>
SNNFAST_FN void store_parts(T* to, const V (&from)[1]) {
  store<stream>(to, from[0]);
}
template <bool stream>
SNNFAST_FN void store_parts(BFloat16* to, const Float32Vector (&from)[2]) {
  const auto even = bfloat16_bits((UInt32Vector)from[0]), odd = bfloat16_bits((UInt32Vector)from[1]);
  store_bits<stream>(to, even | odd << 16);
}
template <bool stream, class T, class V>
SNNFAST_FN void store_spike_parts(T* to, const V (&from)[1]) {
  store_spikes<stream>(to, from[0]);
}
template <bool stream>
SNNFAST_FN void store_spike_parts(BFloat16* to, const Float32Vector (&from)[2]) {
  store_bits<stream>(to, (UInt32Vector)from[0] >> 16 | (UInt32Vector)from[1]);
}

SNNFAST_FN void split(Float32Vector& first, Float32Vector& second) {
  UInt32Vector even, odd;
  split_runs<1>((UInt32Vector)first, (UInt32Vector)second, even, odd);
  first = (Float32Vector)even;
  second = (Float32Vector)odd;
}
SNNFAST_FN void join(Float32Vector& even, Float32Vector& odd) {
  UInt32Vector first, second;
  join_runs<1>((UInt32Vector)even, (UInt32Vector)odd, first, second);
  even = (Float32Vector)first;
  odd = (Float32Vector)second;
}
// Between memory in the usual order and the parts of a row.
template <class R, class V>
SNNFAST_FN void load_split(const R* from, V (&to)[1]) {
  to[0] = load(from, (V*)nullptr);
}
SNNFAST_FN void load_split(const float* from, Float32Vector (&to)[2]) {
  to[0] = load(from, (Float32Vector*)nullptr);
  to[1] = load(from + sizeof(Float32Vector) / sizeof(float), (Float32Vector*)nullptr);
  split(to[0], to[1]);
}
template <bool stream, class R, class V>
SNNFAST_FN void store_joined(R* to, const V (&from)[1]) {
  store<stream>(to, from[0]);
}
template <bool stream>
SNNFAST_FN void store_joined(float* to, const Float32Vector (&from)[2]) {
  Float32Vector first = from[0], second = from[1];
  join(first, second);
  store<stream>(to, first);
  store<stream>(to + sizeof(Float32Vector) / sizeof(float), second);
}

// Denormal numbers cost hundreds of cycles each, and a silent leaky neuron decays into them: flush them to zero while
// a kernel runs, and leave the caller's setting as it was.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t(1) << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

SNNFAST_FN void store_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace snnfast
