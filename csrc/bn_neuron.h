// Batch norm and neuron in one on the CPU. A row of the convolution's output is normalised into a scratch row in the
// first-level cache, x * scale + shift with one pair of constants per channel, each operation rounded once in the
// state's type, and the neuron's own row loop (cpu_rows.h, cpu_backward.h) runs on the scratch row. So the normalised
// input never goes to memory, every pass has the same bits of it, and there is no second copy of a neuron's loop.
#pragma once

#include "bn_sums.h"
#include "cpu_backward.h"

namespace snnfast {
namespace {

template <bool runs, class T, class R>
__attribute__((noinline)) void normalise_row(const BatchNormCall& b, int64_t t, int64_t begin, int64_t n,
                                             const T* ahead, R* y) {
  const T* x = static_cast<const T*>(b.call.x) + t * b.call.N + begin;
  const R *scale = of_step<R>(b, b.scale, t), *shift = of_step<R>(b, b.shift, t);
  for_each_part<runs>(b, begin, begin + n, [&](int64_t at, int64_t length, int64_t constant) {
    const Along<runs, R> by(scale + constant), plus(shift + constant);
    for_each_in_row<R, false>(y + at, length, [&](auto tag, int64_t i) __attribute__((always_inline)) {
      using V = decltype(tag);
      __builtin_prefetch(ahead + at + i);
      const V scaled = load(x + at + i, (V*)nullptr) * by.at(tag, i);
      store<false>(y + at + i, scaled + plus.at(tag, i));
    });
  });
}

// ---- residual connections ----
// The skip of a row of the call, or null where none is wanted.
template <class T>
const T* skip_row(const BatchNormCall& b, int64_t t, int64_t begin) {
  return static_cast<const T*>(b.skip) + t * b.call.N + begin;
}

template <class T, class R>
__attribute__((noinline)) void add_row(R* y, const T* skip, int64_t n) {
  for_each_in_row<R, false>(y, n, [&](auto tag, int64_t i) __attribute__((always_inline)) {
    using V = decltype(tag);
    store<false>(y + i, load(y + i, (V*)nullptr) + load(skip + i, (V*)nullptr));
  });
}

template <class T, bool stream, class R>
__attribute__((noinline)) void connect_row(T* to, const R* s, const T* skip, int64_t n, int connect) {
  for_each_in_row<R, stream>(to, n, [&](auto tag, int64_t i) __attribute__((always_inline)) {
    using V = decltype(tag);
    const V spike = load(s + i, (V*)nullptr), other = load(skip + i, (V*)nullptr);
    V out = spike + other;
    if (connect == kAnd) out = spike * other;
    if (connect == kIand) out = (R(1) - spike) * other;
    store<stream>(to + i, out);
  });
}

// From the gradient of what comes out: that of the spikes, and that of the skip.
template <class T, class R>
__attribute__((noinline)) void connect_row_backward(R* grad_s, T* grad_skip, const T* grad, const R* s, const T* skip,
                                                    int64_t n, bool and_not) {
  for_each_in_row<R, false>(grad_s, n, [&](auto tag, int64_t i) __attribute__((always_inline)) {
    using V = decltype(tag);
    const V g = load(grad + i, (V*)nullptr), spike = load(s + i, (V*)nullptr);
    const V through = g * load(skip + i, (V*)nullptr);
    store<false>(grad_s + i, and_not ? -through : through);
    store<false>(grad_skip + i, g * (and_not ? R(1) - spike : spike));
  });
}

// The normalised input of a row, and what the skip adds to it.
template <class T, class R>
void charging_row(const BatchNormCall& b, int64_t t, int64_t begin, int64_t n, const T* ahead, R* y) {
  if (b.runs())
    normalise_row<true>(b, t, begin, n, ahead, y);
  else
    normalise_row<false>(b, t, begin, n, ahead, y);
  if (b.connect == kCharge) add_row(y, skip_row<T>(b, t, begin), n);
}

// ---- forward ----
template <class T, bool stream, class R>
__attribute__((noinline)) void spikes_row(T* to, const R* s, int64_t n) {
  for_each_in_row<R, stream>(to, n, [&](auto tag, int64_t i) __attribute__((always_inline)) {
    store_spikes<stream>(to + i, load(s + i, (decltype(tag)*)nullptr));
  });
}

template <class Neuron, class T, bool stream, class R>
void batch_norm_forward_tile(const BatchNormCall& b, int64_t begin, int64_t n) {
  const Call& c = b.call;
  const Params<R> p = params_of<R>(c);
  alignas(64) R y[kBatchNormTile], s[kBatchNormTile], state[Neuron::kStates][kBatchNormTile];
  ForwardRow<Neuron, R, R> row{};
  for (int k = 0; k < Neuron::kStates; ++k) {
    row.state[k] = state[k];
    fill_state<R>(state[k], c.state[k], begin, n, initial_state(c, k));
  }
  constexpr bool same_type = sizeof(T) == sizeof(R);
  const bool connected = b.connect > kCharge;  // after the spikes
  for (int64_t t = 0; t < c.T; ++t) {
    const T* next = static_cast<const T*>(c.x) + (t + 1 < c.T ? (t + 1) * c.N + begin : begin + n);
    charging_row(b, t, begin, n, next, y);
    T* to = static_cast<T*>(c.s) + t * c.N + begin;
    row.x = row.ahead = y;
    if (same_type && !connected) {
      row.s = reinterpret_cast<R*>(to);
      row.ahead_s = t + 1 < c.T ? row.s + c.N : row.s;
      row.template run<same_type && stream, kSpikeRow>(n, p);
      continue;
    }
    row.s = row.ahead_s = s;
    row.template run<false, kSpikeRow>(n, p);
    if (connected)
      connect_row<T, stream>(to, s, skip_row<T>(b, t, begin), n, b.connect);
    else
      spikes_row<T, stream>(to, s, n);
  }
  for (int k = 0; k < Neuron::kStates; ++k) memcpy(static_cast<R*>(c.final_state[k]) + begin, state[k], n * sizeof(R));
}

template <class Neuron, class T, bool stream>
bool batch_norm_forward(const BatchNormCall& b) {
  using R = typename StateOf<T>::type;
  const int64_t tiles = (b.call.N + kBatchNormTile - 1) / kBatchNormTile;
  [[maybe_unused]] const int threads = batch_norm_threads(b);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const FlushDenormals flush;
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = tile * kBatchNormTile;
      batch_norm_forward_tile<Neuron, T, stream, R>(b, begin, smaller(kBatchNormTile, b.call.N - begin));
    }
    if (stream) store_fence();
  }
  return true;
}

// ---- backward ----
// Neurons per tile: what a tile needs for all steps stays in the caches, a few steps' in the first-level one.
constexpr int64_t kMostInTile = 896;
inline int64_t batch_norm_backward_tile(int64_t T) {
  return T <= kFewSteps ? 2 * kTile : 8192 / smaller(T, 128) / 64 * 64;
}
// Between rows of a scratch array: rows a multiple of 4 KiB apart would all fall on the same lines of the cache.
inline int64_t scratch_stride(int64_t tile) { return tile + 80; }

// The gradient of the normalised input of one tile, [T, n].
template <class Neuron, class R>
class BatchNormScratch {
 public:
  BatchNormScratch(int64_t T, int64_t tile)
      : neuron(T, smaller(tile, T <= kFewSteps ? kTile : tile)),
        size_(T * scratch_stride(tile)),
        memory_(static_cast<R*>(malloc(3 * size_ * sizeof(R) + 64))) {}
  ~BatchNormScratch() { free(memory_); }
  BatchNormScratch(const BatchNormScratch&) = delete;
  BatchNormScratch& operator=(const BatchNormScratch&) = delete;

  bool allocated() const { return memory_ && neuron.allocated(); }
  R* array(int k) const { return reinterpret_cast<R*>((uintptr_t(memory_) + 63) / 64 * 64) + k * size_; }

  BackwardScratch<Neuron, R> neuron;

 private:
  int64_t size_;
  R* memory_;
};

// Adds g and g * (x - centre) of some steps to the channels' sums and writes g, times grad_scale if there is one, to
// grad_x. The few steps' sum is made in the state's type.
template <bool runs, class T, class R>
__attribute__((noinline)) void collect_rows(const BatchNormCall& b, int64_t t, int64_t steps, int64_t begin, int64_t n,
                                            const R* g, int64_t stride, Accumulators& accumulators) {
  const int64_t N = b.call.N;
  const T* x = static_cast<const T*>(b.call.x) + t * N + begin;
  T* to = static_cast<T*>(b.call.grad_x) + t * N + begin;
  const R* centre = of_step<R>(b, b.centre, t);
  const R* factor = b.batch_statistics ? centre : of_step<R>(b, b.scale, t);
  const bool scaled = !b.batch_statistics;
  const int64_t group = centre - static_cast<const R*>(b.centre);
  for_each_part<runs>(b, begin, begin + n, [&](int64_t at, int64_t length, int64_t constant) {
    const Along<runs, R> minus(centre + constant), by(factor + constant);
    Sums<runs> sums(accumulators.sum(0) + group + constant, accumulators.sum(1) + group + constant);
    for_each_in_row<R, false>(to + at, length, [&](auto tag, int64_t i) __attribute__((always_inline)) {
      using V = decltype(tag);
      V sum{}, with_x{};
      for (int64_t step = 0; step < steps; ++step) {
        T* const grad_x = to + step * N + at + i;
        __builtin_prefetch(grad_x + n, 1);
        const V grad = load(g + step * stride + at + i, (V*)nullptr);
        sum += grad;
        with_x += grad * (load(x + step * N + at + i, (V*)nullptr) - minus.at(tag, i));
        store<false>(grad_x, scaled ? grad * by.at(tag, i) : grad);
      }
      typename InFloat64<V>::Part wide[InFloat64<V>::kCount];
      in_float64(sum, wide);
      sums.add(0, i, wide);
      in_float64(with_x, wide);
      sums.add(1, i, wide);
    });
  });
}

// The neuron's backward on the scratch rows of one tile. Returns the gradient of the decay.
template <class Neuron, class R>
double backward_of_tile(const Call& whole, int64_t begin, int64_t n, int64_t stride,
                        const BatchNormScratch<Neuron, R>& scratch) {
  Call c = whole;
  c.N = stride;  // of its rows; the neurons are the first n
  c.x = scratch.array(0);
  c.grad_s = whole.grad_s ? scratch.array(1) : nullptr;
  c.grad_x = scratch.array(2);
  for (int k = 0; k < Neuron::kStates; ++k) {
    if (whole.state[k]) c.state[k] = static_cast<const R*>(whole.state[k]) + begin;
    if (whole.grad_final_state[k]) c.grad_final_state[k] = static_cast<const R*>(whole.grad_final_state[k]) + begin;
    if (whole.grad_state[k]) c.grad_state[k] = static_cast<R*>(whole.grad_state[k]) + begin;
  }
  double grad_decay = 0;
  const int64_t step = c.T <= kFewSteps ? kTile : n;
  for (int64_t i = 0; i < n; i += step)
    grad_decay += backward_tile<Neuron, R, false, R>(c, i, smaller(i + step, n), scratch.neuron);
  return grad_decay;
}

// Of one tile where the skip meets the spikes, which are made again.
template <class Neuron, class T, class R>
void gradients_of_connection(const BatchNormCall& b, int64_t begin, int64_t n, int64_t stride,
                             const BatchNormScratch<Neuron, R>& scratch) {
  const Call& c = b.call;
  alignas(64) R s[kMostInTile], state[Neuron::kStates][kMostInTile];
  ForwardRow<Neuron, R, R> row{};
  row.s = row.ahead_s = s;
  for (int k = 0; k < Neuron::kStates; ++k) {
    row.state[k] = state[k];
    fill_state<R>(state[k], c.state[k], begin, n, initial_state(c, k));
  }
  for (int64_t t = 0; t < c.T; ++t) {
    row.x = row.ahead = scratch.array(0) + t * stride;
    row.template run<false, kSpikeRow>(n, params_of<R>(c));
    const int64_t at = t * c.N + begin;
    connect_row_backward(scratch.array(1) + t * stride, static_cast<T*>(b.grad_skip) + at,
                         static_cast<const T*>(c.grad_s) + at, s, skip_row<T>(b, t, begin), n, b.connect == kIand);
  }
}

// ---- few steps ----
// Two loops over the neurons of a tile, all steps of two vectors in registers: forward to the tape, and back to grad_x
// and the sums. Between them the surrogate's derivative, which is one function for all neurons. Whole vectors only, and
// pairs where constants lie side by side: a variant for what is left over would be as much code again.
template <class T>
bool serves_few_steps(const BatchNormCall& b) {
  using R = typename StateOf<T>::type;
  if (b.call.T > kFewSteps || b.groups > 1 || b.connect == kAnd || b.connect == kIand) return false;
  constexpr int64_t lanes = sizeof(typename VectorOf<R>::type) / sizeof(R);
  return b.runs() ? b.inner % lanes == 0 : b.constants() % (2 * lanes) == 0 && b.call.N % (2 * lanes) == 0;
}

template <int count>
struct Count {
  static constexpr int value = count;
};

template <class R>
struct FewSteps {
  static constexpr int64_t kStride = kTile + 16;  // see scratch_stride
  alignas(64) R h[kFewSteps * kStride], derivative[kFewSteps * kStride];
};

template <bool runs, class Neuron, class T, class R>
SNNFAST_FN void record_few_steps(const BatchNormCall& b, int64_t begin, int64_t n, const Params<R> p, R* tape) {
  using V = typename VectorOf<R>::type;
  constexpr int64_t lanes = sizeof(V) / sizeof(R);
  const int64_t steps = b.call.T, N = b.call.N;
  const T* const x = static_cast<const T*>(b.call.x) + begin;
  const T* const skip = b.connect == kCharge ? skip_row<T>(b, 0, begin) : nullptr;
  const R* const v0 = b.call.state[0] ? static_cast<const R*>(b.call.state[0]) + begin : nullptr;
  const R v_init = R(b.call.v_init);
  const auto part = [&](int64_t at, int64_t length, int64_t constant) __attribute__((always_inline)) {
    const Along<runs, R> by(static_cast<const R*>(b.scale) + constant), plus(static_cast<const R*>(b.shift) + constant);
    const auto vectors = [&](auto many, int64_t j) __attribute__((always_inline)) {
      constexpr int W = decltype(many)::value;
      const int64_t i = at + j;
      const V own[kMaxOwn] = {};
      V scale[W], shift[W], state[W][1];
      for (int w = 0; w < W; ++w) {
        scale[w] = by.at(V(), j + w * lanes), shift[w] = plus.at(V(), j + w * lanes);
        state[w][0] = v0 ? load(v0 + i + w * lanes, (V*)nullptr) : broadcast<V>(v_init);
      }
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t row = t * N + i;
        for (int w = 0; w < W; ++w) {
          __builtin_prefetch(x + row + w * lanes + kPrefetchBytes / 2 / int64_t(sizeof(T)));
          const V scaled = load(x + row + w * lanes, (V*)nullptr) * scale[w];
          V charge = scaled + shift[w], h[1];
          if (skip) charge = charge + load(skip + row + w * lanes, (V*)nullptr);
          Neuron::step(charge, state[w], h, own, p);
          store<false>(tape + t * FewSteps<R>::kStride + i + w * lanes, h[0]);
        }
      }
    };
    int64_t j = 0;
    for (; j + 2 * lanes <= length; j += 2 * lanes) vectors(Count<2>(), j);
    if (runs && j < length) vectors(Count<1>(), j);
  };
  for_each_part<runs>(b, begin, begin + n, part);
}

// Returns the gradient of the decay.
template <bool runs, class Neuron, class T, class R>
SNNFAST_FN double back_few_steps(const BatchNormCall& b, int64_t begin, int64_t n, const Params<R> p,
                                 const FewSteps<R>& steps, Accumulators& accumulators) {
  using V = typename VectorOf<R>::type;
  constexpr int64_t further = kPrefetchBytes / 2 / int64_t(sizeof(T)), stride = FewSteps<R>::kStride;
  constexpr int64_t lanes = sizeof(V) / sizeof(R);
  const auto from = [=](auto* rows) { return rows ? rows + begin : nullptr; };
  const int64_t last = b.call.T - 1, N = b.call.N;
  const R *const tape = steps.h, *const derivatives = steps.derivative;
  const T* const x = static_cast<const T*>(b.call.x) + begin;
  const T* const grad_s = from(static_cast<const T*>(b.call.grad_s));
  T* const grad_x = static_cast<T*>(b.call.grad_x) + begin;
  T* const grad_skip = b.connect == kCharge ? static_cast<T*>(b.grad_skip) + begin : nullptr;
  const R* const v0 = from(static_cast<const R*>(b.call.state[0]));
  const R* const grad_v = from(static_cast<const R*>(b.call.grad_final_state[0]));
  R* const grad_v0 = from(static_cast<R*>(b.call.grad_state[0]));
  const R v_init = R(b.call.v_init);
  const bool scaled = !b.batch_statistics;
  DecaySum<R> decay;
  const auto part = [&](int64_t at, int64_t length, int64_t constant) __attribute__((always_inline)) {
    const Along<runs, R> minus(static_cast<const R*>(b.centre) + constant),
        by(static_cast<const R*>(b.scale) + constant);
    Sums<runs> sums(accumulators.sum(0) + constant, accumulators.sum(1) + constant);
    const auto vectors = [&](auto many, int64_t j) __attribute__((always_inline)) {
      constexpr int W = decltype(many)::value;
      const V own[kMaxOwn] = {};
      V grad_state[W][1], sum[W] = {}, with_x[W] = {};
      ParameterGradients<V> grads{};
      for (int w = 0; w < W; ++w) grad_state[w][0] = grad_v ? load(grad_v + at + j + w * lanes, (V*)nullptr) : V{};
      for (int64_t t = last; t >= 0; --t)
        for (int w = 0; w < W; ++w) {
          const int64_t i = at + j + w * lanes;
          __builtin_prefetch(grad_s + t * N + i + further);
          __builtin_prefetch(grad_x + t * N + i + further, 1);
          const V h[1] = {load(tape + t * stride + i, (V*)nullptr)};
          V before[1] = {};
          if constexpr (Neuron::kNeedsBefore) {
            if (t > 0) {
              const V h_before[1] = {load(tape + (t - 1) * stride + i, (V*)nullptr)};
              Neuron::after(h_before, before, own, p);
            } else {
              before[0] = v0 ? load(v0 + i, (V*)nullptr) : broadcast<V>(v_init);
            }
          }
          const V through_spike = grad_s ? load(grad_s + t * N + i, (V*)nullptr) : V{};
          const V derivative = load(derivatives + t * stride + i, (V*)nullptr);
          const V grad = Neuron::step_backward(through_spike, grad_state[w], h, before, derivative, own, p, grads);
          sum[w] += grad;
          with_x[w] += grad * (load(x + t * N + i, (V*)nullptr) - minus.at(V(), j + w * lanes));
          if (grad_skip) store<false>(grad_skip + t * N + i, grad);
          store<false>(grad_x + t * N + i, scaled ? grad * by.at(V(), j + w * lanes) : grad);
        }
      if constexpr (Neuron::kLearnable) decay.add(grads.decay);
      for (int w = 0; w < W; ++w) {
        if (grad_v0) store<false>(grad_v0 + at + j + w * lanes, grad_state[w][0]);
        Float64Vector wide[InFloat64<V>::kCount];
        in_float64(sum[w], wide);
        sums.add(0, j + w * lanes, wide);
        in_float64(with_x[w], wide);
        sums.add(1, j + w * lanes, wide);
      }
    };
    int64_t j = 0;
    for (; j + 2 * lanes <= length; j += 2 * lanes) vectors(Count<2>(), j);
    if (runs && j < length) vectors(Count<1>(), j);
  };
  for_each_part<runs>(b, begin, begin + n, part);
  return decay.total();
}

template <bool runs, class Neuron, class T, class R>
__attribute__((noinline)) double backward_few_steps(const BatchNormCall& b, int64_t begin, int64_t n,
                                                    FewSteps<R>& steps, Accumulators& accumulators) {
  const Params<R> known = params_of<R>(b.call);
  with_known_reset<true>(known, [&](const Params<R> p) __attribute__((always_inline)) {
    if constexpr (Neuron::kDivides && runs)  // the other is as fast without
      with_known_division(p, [&](const Params<R> q) __attribute__((always_inline)) {
        record_few_steps<runs, Neuron, T>(b, begin, n, q, steps.h);
      });
    else
      record_few_steps<runs, Neuron, T>(b, begin, n, p, steps.h);
  });
  for (int64_t t = 0; t < b.call.T; ++t)
    derivatives<R>(steps.derivative + t * steps.kStride, steps.h + t * steps.kStride, nullptr, n, known);
  double grad_decay = 0;
  with_known_reset<false>(known, [&](Params<R> p) __attribute__((always_inline)) {
    if (p.detach_reset) {
      p.detach_reset = true;
      grad_decay = back_few_steps<runs, Neuron, T>(b, begin, n, p, steps, accumulators);
    } else {
      p.detach_reset = false;
      grad_decay = back_few_steps<runs, Neuron, T>(b, begin, n, p, steps, accumulators);
    }
  });
  return grad_decay;
}

template <class Neuron, class T>
bool batch_norm_backward_few_steps(const BatchNormCall& b) {
  using R = typename StateOf<T>::type;
  return over_chunks(
      b, batch_norm_threads(b), [] { return NoScratch(); },
      [&](int64_t chunk, int64_t begin, int64_t end, Accumulators& accumulators, NoScratch&) {
        double grad_decay = 0;
        FewSteps<R> steps;
        for (int64_t i = begin; i < end; i += kTile) {
          const int64_t n = smaller(kTile, end - i);
          grad_decay += b.runs() ? backward_few_steps<true, Neuron, T>(b, i, n, steps, accumulators)
                                 : backward_few_steps<false, Neuron, T>(b, i, n, steps, accumulators);
        }
        if (Neuron::kLearnable) static_cast<double*>(b.call.grad_decay_partial)[chunk] = grad_decay;
      });
}

// ---- any number of steps ----
template <class Neuron, class T>
bool batch_norm_backward(const BatchNormCall& b) {
  using R = typename StateOf<T>::type;
  const Call& c = b.call;
  const bool connected = b.connect == kAnd || b.connect == kIand;
  if constexpr (kUsual<T>)
    if (serves_few_steps<T>(b)) return batch_norm_backward_few_steps<Neuron, T>(b);
  const int64_t tile = batch_norm_backward_tile(c.T), stride = scratch_stride(tile);
  return over_chunks(
      b, batch_norm_threads(b), [&] { return BatchNormScratch<Neuron, R>(c.T, tile); },
      [&](int64_t chunk, int64_t begin, int64_t end, Accumulators& accumulators,
          const BatchNormScratch<Neuron, R>& scratch) {
        double grad_decay = 0;
        for (int64_t i = begin; i < end; i += tile) {
          const int64_t n = smaller(tile, end - i);
          for (int64_t t = 0; t < c.T; ++t) {
            const T* next = static_cast<const T*>(c.x) + t * c.N + i + n;
            R* y = scratch.array(0) + t * stride;
            charging_row(b, t, i, n, next, y);
            if (!c.grad_s || connected) continue;
            const T* grad_s = static_cast<const T*>(c.grad_s) + t * c.N + i;
            const T* ahead = grad_s + n;
            R* to = scratch.array(1) + t * stride;
            for_each_in_row<R, false>(to, n, [&](auto tag, int64_t j) __attribute__((always_inline)) {
              __builtin_prefetch(ahead + j);
              store<false>(to + j, load(grad_s + j, (decltype(tag)*)nullptr));
            });
          }
          if (c.grad_s && connected) gradients_of_connection<Neuron, T>(b, i, n, stride, scratch);
          grad_decay += backward_of_tile(c, i, n, stride, scratch);
          for (int64_t t = 0; t < c.T && b.connect == kCharge; ++t) {
            const R* g = scratch.array(2) + t * stride;
            T* grad_skip = static_cast<T*>(b.grad_skip) + t * c.N + i;
            for_each_in_row<R, false>(grad_skip, n, [&](auto tag, int64_t j) __attribute__((always_inline)) {
              store<false>(grad_skip + j, load(g + j, (decltype(tag)*)nullptr));
            });
          }
          for_each_steps(b, [&](int64_t t, int64_t steps) {
            const R* g = scratch.array(2) + t * stride;
            if (b.runs())
              collect_rows<true, T>(b, t, steps, i, n, g, stride, accumulators);
            else
              collect_rows<false, T>(b, t, steps, i, n, g, stride, accumulators);
          });
        }
        if (Neuron::kLearnable) static_cast<double*>(c.grad_decay_partial)[chunk] = grad_decay;
      });
}

// The second pass: grad_x, which holds the gradient g of the normalised input, becomes
// g * scale + ((x - centre) * slope + offset), in place.
template <bool runs, class T>
bool batch_norm_backward_input(const BatchNormCall& b) {
  using R = typename StateOf<T>::type;
  const Call& c = b.call;
  const int64_t tiles = (c.N + kBatchNormTile - 1) / kBatchNormTile;
  [[maybe_unused]] const int threads = batch_norm_threads(b);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t tile = 0; tile < tiles * c.T; ++tile) {
    const FlushDenormals flush;
    const int64_t t = tile / tiles, begin = tile % tiles * kBatchNormTile;
    const T* x = static_cast<const T*>(c.x) + t * c.N + begin;
    T* grad_x = static_cast<T*>(c.grad_x) + t * c.N + begin;
    for_each_part<runs>(
        b, begin, smaller(begin + kBatchNormTile, c.N), [&](int64_t at, int64_t length, int64_t constant) {
          const Along<runs, R> by(of_step<R>(b, b.scale, t) + constant), minus(of_step<R>(b, b.centre, t) + constant),
              slope(of_step<R>(b, b.slope, t) + constant), offset(of_step<R>(b, b.offset, t) + constant);
          for_each_in_row<R, false>(grad_x + at, length, [&](auto tag, int64_t i) __attribute__((always_inline)) {
            using V = decltype(tag);
            const V away = load(x + at + i, (V*)nullptr) - minus.at(tag, i);
            const V through_statistics = multiply_add(away, slope.at(tag, i), offset.at(tag, i));
            const V g = load(grad_x + at + i, (V*)nullptr);
            store<false>(grad_x + at + i, multiply_add(g, by.at(tag, i), through_statistics));
          });
        });
  }
  return true;
}

// ---- dispatch ----
template <class T>
bool run_rows_dtype(const BatchNormCall& b, BatchNormPass pass) {
  if (pass == kStatistics) return b.runs() ? statistics<true, T>(b) : statistics<false, T>(b);
  if (pass == kBackwardInput)
    return b.runs() ? batch_norm_backward_input<true, T>(b) : batch_norm_backward_input<false, T>(b);
  switch (b.call.neuron) {
#define SNNFAST_CASE(id, Neuron)                                                 \
  case id:                                                                       \
    if constexpr (Neuron::kOwn == 0) {                                           \
      if (pass == kBackward) return batch_norm_backward<Neuron, T>(b);           \
      if constexpr (kUsual<T>)                                                   \
        if (b.call.stream_stores) return batch_norm_forward<Neuron, T, true>(b); \
      return batch_norm_forward<Neuron, T, false>(b);                            \
    }                                                                            \
    break;
    SNNFAST_NEURONS(SNNFAST_CASE)
#undef SNNFAST_CASE
  }
  return true;
}

bool run_rows(const BatchNormCall& b, BatchNormPass pass) {
  switch (b.call.dtype) {
    case kFloat32:
      return run_rows_dtype<float>(b, pass);
    case kFloat64:
      return run_rows_dtype<double>(b, pass);
    case kBFloat16:
      return run_rows_dtype<BFloat16>(b, pass);
    case kFloat16:
      return run_rows_dtype<Float16>(b, pass);
  }
  return true;
}

}  // namespace
}  // namespace snnfast
