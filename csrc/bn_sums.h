// Where the channels of a batch norm lie, and sums over them on the CPU, its statistics among them.
//
// Sums are made in float64, one partial sum per chunk of neurons; chunks depend on the shape alone and are added in
// order, so results have the same bits for any number of threads.
#pragma once

#include <stdlib.h>

#include "cpu_rows.h"

namespace snnfast {
namespace {

// ---- channels ----
constexpr int64_t kBatchNormTile = 2048;

// The bounds of the chunks' neurons, whole tiles each.
struct Chunks {
  explicit Chunks(int64_t N) {
    const int64_t tiles = (N + kBatchNormTile - 1) / kBatchNormTile;
    const int64_t each = (tiles + kMostChunks - 1) / kMostChunks;
    size = each * kBatchNormTile;
    count = (N + size - 1) / size;
  }
  int64_t size, count;
};

// Calls f(offset, length, constant) for the parts of neurons begin to end whose constants are one channel's (runs), or
// lie side by side from `constant` on.
template <bool runs, class F>
SNNFAST_FN void for_each_part(const BatchNormCall& b, int64_t begin, int64_t end, F f) {
  const int64_t period = runs ? b.inner : b.constants();
  for (int64_t i = begin; i < end;) {
    const int64_t next = smaller(end, (i / period + 1) * period);
    f(i - begin, next - i, runs ? i / period % b.channels : i % period);
    i = next;
  }
}

// A per-channel constant along such a part.
template <bool runs, class R>
struct Along {
  explicit Along(const R* from) : from(from), value(*from) {}
  template <class V>
  SNNFAST_FN V at(V, int64_t i) const {
    if constexpr (runs) return broadcast<V>(value);
    return load(from + i, (V*)nullptr);
  }
  const R* from;
  R value;
};

template <class R>
const R* of_step(const BatchNormCall& b, const void* constants, int64_t t) {
  return static_cast<const R*>(constants) + (b.groups > 1 ? t * b.constants() : 0);
}

// ---- sums over a channel ----
// The halves of a vector in float64. GCC makes four instructions of __builtin_convertvector where there is one.
SNNFAST_FN Float64Vector lower(Float32Vector v) {
#if defined(__AVX512F__)
  return (Float64Vector)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
#elif defined(__AVX2__)
  return (Float64Vector)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
#else
  Float64Vector half;
  for (int i = 0; i < int(sizeof(half) / sizeof(double)); ++i) half[i] = v[i];
  return half;
#endif
}
SNNFAST_FN Float64Vector upper(Float32Vector v) {
#if defined(__AVX512F__)
  return (Float64Vector)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(__AVX2__)
  return (Float64Vector)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#else
  Float64Vector half;
  constexpr int lanes = sizeof(half) / sizeof(double);
  for (int i = 0; i < lanes; ++i) half[i] = v[lanes + i];
  return half;
#endif
}

// What becomes of a scalar or of a vector in float64.
template <class V>
struct InFloat64 {
  using Part = double;
  static constexpr int kCount = 1;
};
template <>
struct InFloat64<Float64Vector> {
  using Part = Float64Vector;
  static constexpr int kCount = 1;
};
template <>
struct InFloat64<Float32Vector> {
  using Part = Float64Vector;
  static constexpr int kCount = 2;
};
SNNFAST_FN void in_float64(Float32Vector v, Float64Vector (&to)[2]) { to[0] = lower(v), to[1] = upper(v); }
SNNFAST_FN void in_float64(Float64Vector v, Float64Vector (&to)[1]) { to[0] = v; }
SNNFAST_FN void in_float64(double v, double (&to)[1]) { to[0] = v; }
constexpr int64_t kDoubles = sizeof(Float64Vector) / sizeof(double);

// Two sums of float64 over the elements of a part: lanes of their own where all elements are one channel's, else one
// sum for each element of the part. Element i of the part adds a value to sum k, or a vector's elements from i on do.
template <bool runs>
class Sums {
 public:
  Sums(double* first, double* second) : to{first, second} {}
  ~Sums() {
    if constexpr (runs)
      for (int k = 0; k < 2; ++k) {
        const Float64Vector both = lanes[k][0] + lanes[k][1];
        double sum = rest[k];
        for (int i = 0; i < int(sizeof(both) / sizeof(double)); ++i) sum += both[i];
        *to[k] += sum;
      }
  }
  template <int halves>
  SNNFAST_FN void add(int k, int64_t i, const Float64Vector (&v)[halves]) {
    for (int half = 0; half < halves; ++half) {
      double* const sum = to[k] + i + half * kDoubles;
      if constexpr (runs)
        lanes[k][half] += v[half];
      else
        store<false>(sum, load(sum, (Float64Vector*)nullptr) + v[half]);
    }
  }
  SNNFAST_FN void add(int k, int64_t i, const double (&v)[1]) {
    if constexpr (runs)
      rest[k] += v[0];
    else
      to[k][i] += v[0];
  }

 private:
  double* to[2];
  double rest[2] = {};
  Float64Vector lanes[2][2] = {};
};

// Steps that share a channel's constants, so many at once: what they have in common is loaded and stored once.
constexpr int64_t kStepsAtOnce = 4;
template <class F>
void for_each_steps(const BatchNormCall& b, F f) {
  const int64_t each = b.groups > 1 ? 1 : kStepsAtOnce;
  for (int64_t t = 0; t < b.call.T; t += each) f(t, smaller(each, b.call.T - t));
}

// The channels of neurons begin to end, as f(first, last) for the one or two runs of them.
template <class F>
void for_each_channel_run(const BatchNormCall& b, int64_t begin, int64_t end, F f) {
  const int64_t first = begin / b.inner % b.channels, last = first + (end - 1) / b.inner - begin / b.inner + 1;
  if (last - first >= b.channels) return f(0, b.channels);
  f(first, smaller(last, b.channels));
  if (last > b.channels) f(0, last - b.channels);
}

// The accumulators of one chunk: [2][groups, constants], folded to the channels of the chunk's partial sums at its end.
// A chunk touches the channels of its neurons only.
class Accumulators {
 public:
  explicit Accumulators(const BatchNormCall& b)
      : b_(b), constants_(b.constants()), row_(b.channels * b.neighbours()), plane_(b.groups * constants_) {
    memory_ = static_cast<double*>(malloc(2 * plane_ * sizeof(double)));
  }
  ~Accumulators() { free(memory_); }
  Accumulators(const Accumulators&) = delete;
  Accumulators& operator=(const Accumulators&) = delete;

  bool allocated() const { return memory_; }
  double* sum(int k) { return memory_ + k * plane_; }
  void clear(int64_t begin, int64_t end) {
    for_each_channel_run(b_, begin, end, [&](int64_t first, int64_t last) {
      const int64_t each = b_.neighbours();
      for (int64_t row = 0; row < 2 * plane_; row += row_)
        memset(memory_ + row + first * each, 0, (last - first) * each * sizeof(double));
    });
  }
  // partial is [groups][channels][2]
  void fold(int64_t begin, int64_t end, double* partial) {
    for_each_channel_run(b_, begin, end, [&](int64_t first, int64_t last) {
      const int64_t each = b_.neighbours();
      for (int64_t g = 0; g < b_.groups; ++g)
        for (int64_t c = first; c < last; ++c)
          for (int k = 0; k < 2; ++k) {
            double total = 0;
            for (int64_t row = 0; row < constants_; row += row_)
              for (int64_t i = 0; i < each; ++i) total += sum(k)[g * constants_ + row + c * each + i];
            partial[2 * (g * b_.channels + c) + k] = total;
          }
    });
  }

 private:
  const BatchNormCall& b_;
  const int64_t constants_, row_, plane_;
  double* memory_;
};

// Runs work(chunk, begin, end, accumulators, scratch) over all chunks and adds their partial sums up in order in
// b.sums. False where memory ran out.
template <class MakeScratch, class Work>
bool over_chunks(const BatchNormCall& b, int threads, MakeScratch make_scratch, Work work) {
  const Chunks chunks(b.call.N);
  const int64_t sums = 2 * b.groups * b.channels;
  double* partial = b.sums ? static_cast<double*>(malloc(chunks.count * sums * sizeof(double))) : nullptr;
  if (b.sums && !partial) return false;
  int allocated = 1;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(min : allocated)
  {
    const FlushDenormals flush;
    Accumulators accumulators(b);
    auto scratch = make_scratch();
    allocated = accumulators.allocated() && scratch.allocated();
    const bool usable = allocated;
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      if (!usable) continue;
      const int64_t begin = chunk * chunks.size, end = smaller(begin + chunks.size, b.call.N);
      accumulators.clear(begin, end);
      work(chunk, begin, end, accumulators, scratch);
      if (partial) accumulators.fold(begin, end, partial + chunk * sums);
    }
  }
  if (partial) {
    memset(b.sums, 0, sums * sizeof(double));
    for (int64_t chunk = 0; chunk < chunks.count && allocated; ++chunk)
      for_each_channel_run(b, chunk * chunks.size, smaller((chunk + 1) * chunks.size, b.call.N),
                           [&](int64_t first, int64_t last) {
                             const double* from = partial + chunk * sums;
                             for (int64_t g = 0; g < b.groups; ++g)
                               for (int64_t i = 2 * (g * b.channels + first); i < 2 * (g * b.channels + last); ++i)
                                 b.sums[i] += from[i];
                           });
    free(partial);
  }
  return allocated;
}

struct NoScratch {
  bool allocated() const { return true; }
};

int batch_norm_threads(const BatchNormCall& b) {
  return b.call.T * b.call.N < kSerialBelow ? 1 : int(smaller(b.call.threads, Chunks(b.call.N).count));
}

// ---- statistics ----
// b.sums becomes the sums of x - first and of its square, `first` [groups, constants] being each channel's first
// element: whatever the mean, nothing cancels that float64 cannot spare.
template <bool runs, class T>
bool statistics(const BatchNormCall& b) {
  using R = typename StateOf<T>::type;
  return over_chunks(
      b, batch_norm_threads(b), [] { return NoScratch(); },
      [&](int64_t, int64_t begin, int64_t end, Accumulators& accumulators, NoScratch&) {
        for (int64_t tile = begin; tile < end; tile += kBatchNormTile)
          for_each_steps(b, [&](int64_t t, int64_t steps) {
            const int64_t n = smaller(kBatchNormTile, end - tile), N = b.call.N;
            const T* x = static_cast<const T*>(b.call.x) + t * N + tile;
            const double* first = of_step<double>(b, b.first, t);
            const int64_t group = first - static_cast<const double*>(b.first);
            for_each_part<runs>(b, tile, tile + n, [&](int64_t at, int64_t length, int64_t constant) {
              const Along<runs, double> minus(first + constant);
              Sums<runs> sums(accumulators.sum(0) + group + constant, accumulators.sum(1) + group + constant);
              for_each_in_row<R, false>(x + at, length, [&](auto tag, int64_t i) __attribute__((always_inline)) {
                using V = decltype(tag);
                using D = typename InFloat64<V>::Part;
                constexpr int halves = InFloat64<V>::kCount;
                D sum[halves] = {}, square[halves] = {}, from[halves];
                for (int half = 0; half < halves; ++half) from[half] = minus.at(D(), i + half * kDoubles);
                for (int64_t step = 0; step < steps; ++step) {
                  const T* at_step = x + step * N + at + i;
                  __builtin_prefetch(at_step + kPrefetchBytes / int64_t(sizeof(T)));
                  D value[halves];
                  in_float64(load(at_step, (V*)nullptr), value);
                  for (int half = 0; half < halves; ++half) {
                    const D d = value[half] - from[half];
                    sum[half] += d;
                    square[half] = multiply_add(d, d, square[half]);
                  }
                }
                sums.add(0, i, sum);
                sums.add(1, i, square);
              });
            });
          });
      });
}

}  // namespace
}  // namespace snnfast
