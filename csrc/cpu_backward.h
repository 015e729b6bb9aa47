// The backward on the CPU: forward again through a tile of neurons with the tape kept in the caches, then back along
// it.
#pragma once

#include <stdlib.h>

#include "cpu_rows.h"

namespace snnfast {
namespace {

constexpr int64_t kFewSteps = 8;  // so few rows fit the first-level cache side by side, in tiles
constexpr int64_t kTile = 256;

// The memory one thread needs for the backward of one block.
template <class Neuron, class R>
class BackwardScratch {
 public:
  BackwardScratch(int64_t T, int64_t block) : block_(block), segment_(smaller(T, kMaxSegment)) {
    const int64_t segments = (T + segment_ - 1) / segment_;
    const int64_t rows = 1 + 2 * Neuron::kOwn + Neuron::kStates * (2 + segments) + Neuron::kTape * segment_;
    memory_ = static_cast<R*>(malloc(rows * block * sizeof(R) + 64));
    base_ = reinterpret_cast<R*>((uintptr_t(memory_) + 63) / 64 * 64);
  }
  ~BackwardScratch() { free(memory_); }
  BackwardScratch(const BackwardScratch&) = delete;
  BackwardScratch& operator=(const BackwardScratch&) = delete;

  bool allocated() const { return memory_; }
  int64_t segment() const { return segment_; }
  R* derivative() const { return base_; }
  R* own(int k) const { return base_ + (1 + k) * block_; }
  R* grad_own(int k) const { return base_ + (1 + Neuron::kOwn + k) * block_; }
  R* state(int k) const { return base_ + (1 + 2 * Neuron::kOwn + k) * block_; }
  R* grad_state(int k) const { return state(Neuron::kStates + k); }
  R* tape(int64_t step, int k) const { return state(2 * Neuron::kStates) + (step * Neuron::kTape + k) * block_; }
  R* checkpoint(int64_t segment, int k) const { return tape(segment_, 0) + (segment * Neuron::kStates + k) * block_; }

 private:
  R* memory_;
  R* base_;
  int64_t block_, segment_;
};

// The surrogate's derivative for a row, in a loop of its own: eight surrogates beside every neuron and dtype would
// multiply the code, and a branch inside the loop would hold the arithmetic back.
template <class R, class Threshold>
void derivative_row(R* derivative, const R* h, Threshold threshold, int64_t n, const Params<R> p) {
  switch (p.surrogate) {
#define SNNFAST_CASE(id, Surrogate)                                                                    \
  case id:                                                                                             \
    for_each_in_row<R, false>(derivative, n, [&](auto tag, int64_t i) __attribute__((always_inline)) { \
      using V = decltype(tag);                                                                         \
      const V u = load(h + i, (V*)nullptr) - threshold(tag, i);                                        \
      store<false>(derivative + i, Surrogate::template derivative<V>(u, p.alpha, p.gain));             \
    });                                                                                                \
    break;
    SNNFAST_SURROGATES(SNNFAST_CASE)
#undef SNNFAST_CASE
  }
}

// own_threshold: each neuron's own, or null where they have the call's.
template <class R>
__attribute__((noinline)) void derivatives(R* derivative, const R* h, const R* own_threshold, int64_t n,
                                           const Params<R> p) {
  if (own_threshold)
    derivative_row(derivative, h, [=](auto tag, int64_t i) { return load(own_threshold + i, &tag); }, n, p);
  else
    derivative_row(derivative, h, [=](auto, int64_t) { return p.threshold; }, n, p);
}

// The gradient of the decay, over vectors of neurons and those left over.
template <class R>
class DecaySum {
 public:
  SNNFAST_FN void add(typename VectorOf<R>::type grad) { lanes_ += grad; }
  SNNFAST_FN void add(R grad) { rest_ += grad; }
  double total() const {
    double sum = rest_;
    for (int i = 0; i < int(sizeof(lanes_) / sizeof(R)); ++i) sum += lanes_[i];
    return sum;
  }

 private:
  typename VectorOf<R>::type lanes_{};
  R rest_{};
};

template <class Neuron, class T, class R>
struct BackwardRow {
  const T* grad_s;      // may be null
  const T* ahead;       // where to prefetch from
  const R* grad_v_seq;  // may be null
  const R* derivative;
  const R* tape[Neuron::kTape];
  const R* tape_before[Neuron::kTape];     // of the step before; null at the start of a segment
  const R* state_before[Neuron::kStates];  // the state at the start of the segment
  const R* own[kMaxOwn];
  R* grad_state[Neuron::kStates];
  R* grad_own[kMaxOwn];
  T* grad_x;
  T* ahead_grad_x;

  // The usual call has gradients of the spikes and none of the potentials: that loop is made without branches.
  template <bool stream, bool own_gradients>
  double run(int64_t n, const Params<R> known) const {
    if (Neuron::kOwn > 0 || !grad_s || grad_v_seq) return loop<stream, own_gradients, false>(n, known);
    double grad_decay = 0;
    with_known_reset<false>(known, [&](Params<R> p) __attribute__((always_inline)) {
      if (p.detach_reset) {
        p.detach_reset = true;
        grad_decay = loop<stream, own_gradients, true>(n, p);
      } else {
        p.detach_reset = false;
        grad_decay = loop<stream, own_gradients, true>(n, p);
      }
    });
    return grad_decay;
  }

 private:
  template <bool stream, bool own_gradients, bool usual>
  SNNFAST_FN double loop(int64_t n, const Params<R> p) const {
    const BackwardRow row = *this;
    DecaySum<R> decay;
    for_each_parts_in_row<T, R, stream>(row.grad_x, n, [&](auto tag, int64_t i) __attribute__((always_inline)) {
      using V = decltype(tag);
      constexpr int parts = kParts<T, V>, lanes = sizeof(V) / sizeof(R);
      V grad_s[parts] = {}, grad_v_seq[parts] = {}, grad_x[parts];
      __builtin_prefetch(row.ahead + i);
      if constexpr (!stream) __builtin_prefetch(row.ahead_grad_x + i, 1);
      if (usual || row.grad_s) load_parts(row.grad_s + i, grad_s);
      if (!usual && row.grad_v_seq) load_split(row.grad_v_seq + i, grad_v_seq);
      for (int part = 0; part < parts; ++part) {
        const int64_t at = i + part * lanes;
        V grad_state[Neuron::kStates], tape[Neuron::kTape], before[Neuron::kStates], own[kMaxOwn] = {};
        ParameterGradients<V> grads{};
        for (int k = 0; k < Neuron::kStates; ++k) grad_state[k] = load(row.grad_state[k] + at, &grad_state[k]);
        for (int k = 0; k < Neuron::kTape; ++k) tape[k] = load(row.tape[k] + at, &tape[k]);
        for (int k = 0; k < Neuron::kOwn; ++k) own[k] = load(row.own[k] + at, &own[k]);
        if constexpr (Neuron::kNeedsBefore) {
          if (row.tape_before[0]) {
            V tape_before[Neuron::kTape];
            for (int k = 0; k < Neuron::kTape; ++k) tape_before[k] = load(row.tape_before[k] + at, &tape_before[k]);
            Neuron::after(tape_before, before, own, p);
          } else {
            for (int k = 0; k < Neuron::kStates; ++k) before[k] = load(row.state_before[k] + at, &before[k]);
          }
        } else {
          for (int k = 0; k < Neuron::kStates; ++k) before[k] = V{};
        }
        if (!usual && row.grad_v_seq) grad_state[0] += grad_v_seq[part];
        const V derivative = load(row.derivative + at, (V*)nullptr);
        grad_x[part] = Neuron::step_backward(grad_s[part], grad_state, tape, before, derivative, own, p, grads);
        for (int k = 0; k < Neuron::kStates; ++k) store<false>(row.grad_state[k] + at, grad_state[k]);
        if constexpr (own_gradients)
          for (int k = 0; k < Neuron::kOwn; ++k)
            store<false>(row.grad_own[k] + at, load(row.grad_own[k] + at, (V*)nullptr) + grads.own[k]);
        if constexpr (Neuron::kLearnable) decay.add(grads.decay);
      }
      store_parts<stream>(row.grad_x + i, grad_x);
    });
    return decay.total();
  }
};

// One tile of neurons from its first step to its last and back. Returns the gradient of the decay.
template <class Neuron, class T, bool stream, class R>
double backward_tile(const Call& c, int64_t begin, int64_t end, const BackwardScratch<Neuron, R>& memory) {
  const Params<R> p = params_of<R>(c);
  const int64_t n = end - begin, K = memory.segment(), segments = (c.T + K - 1) / K;
  const T* x = static_cast<const T*>(c.x) + begin;
  // Rows are short and far apart, which the processor does not foresee: ask for them early. Few rows: each one's
  // continuation in the next tiles. Many rows: the rows of the same tile that come so many steps later.
  const bool along_row = c.T <= kFewSteps;
  constexpr int64_t further = kPrefetchBytes / 2 / int64_t(sizeof(T));
  const int64_t ahead = smaller(c.T, kPrefetchBytes / (n * int64_t(sizeof(T))) + 1);

  const R* own[kMaxOwn] = {};
  bool own_gradients = false;
  for (int k = 0; k < Neuron::kOwn; ++k) {
    own[k] = own_row<T>(c, k, memory.own(k), begin, n);
    own_gradients = own_gradients || c.grad_own[k];
    fill_state<T>(memory.grad_own(k), nullptr, 0, n, 0.0);
  }
  auto record = [&](int64_t segment, bool with_tape) {
    const int64_t first = segment * K, last = smaller(first + K, c.T);
    ForwardRow<Neuron, T, R> row{};
    for (int k = 0; k < Neuron::kStates; ++k) row.state[k] = memory.state(k);
    for (int k = 0; k < Neuron::kOwn; ++k) row.own[k] = own[k];
    for (int64_t t = first; t < last; ++t) {
      row.x = x + t * c.N;
      const int64_t next = t + ahead;
      if (along_row)
        row.ahead = row.x + further;
      else if (next < c.T || !c.grad_s)
        row.ahead = x + next * c.N;
      else
        row.ahead = static_cast<const T*>(c.grad_s) + (2 * c.T - 1 - next) * c.N + begin;
      for (int k = 0; k < Neuron::kTape; ++k) row.tape[k] = memory.tape(with_tape ? t - first : 0, k);
      row.template run<false, kTapeRow>(n, p);
    }
  };
  auto copy_states = [&](auto to, auto from) {
    for (int k = 0; k < Neuron::kStates; ++k) memcpy(to(k), from(k), n * sizeof(R));
  };

  for (int k = 0; k < Neuron::kStates; ++k) {
    fill_state<T>(memory.state(k), c.state[k], begin, n, initial_state(c, k));
    fill_state<T>(memory.grad_state(k), c.grad_final_state[k], begin, n, 0.0);
  }
  const auto state = [&](int k) { return memory.state(k); };
  for (int64_t segment = 0; segment < segments; ++segment) {
    copy_states([&](int k) { return memory.checkpoint(segment, k); }, state);
    if (segment + 1 < segments) record(segment, false);
  }

  double grad_decay = 0;
  for (int64_t segment = segments - 1; segment >= 0; --segment) {
    const int64_t first = segment * K, last = smaller(first + K, c.T);
    copy_states(state, [&](int k) { return memory.checkpoint(segment, k); });
    record(segment, true);
    for (int64_t t = last - 1; t >= first; --t) {
      const int64_t offset = t * c.N + begin;
      BackwardRow<Neuron, T, R> row{};
      row.grad_s = c.grad_s ? static_cast<const T*>(c.grad_s) + offset : nullptr;
      if (along_row)
        row.ahead = (row.grad_s ? row.grad_s : x) + further;
      else
        row.ahead = t >= ahead && row.grad_s ? row.grad_s - ahead * c.N : x + n + (ahead - 1 - t) * c.N;
      row.grad_v_seq = c.grad_v_seq ? static_cast<const R*>(c.grad_v_seq) + offset : nullptr;
      for (int k = 0; k < Neuron::kTape; ++k) {
        row.tape[k] = memory.tape(t - first, k);
        row.tape_before[k] = t > first ? memory.tape(t - first - 1, k) : nullptr;
      }
      for (int k = 0; k < Neuron::kStates; ++k) {
        row.state_before[k] = memory.checkpoint(segment, k);
        row.grad_state[k] = memory.grad_state(k);
      }
      for (int k = 0; k < Neuron::kOwn; ++k) {
        row.own[k] = own[k];
        row.grad_own[k] = memory.grad_own(k);
      }
      row.grad_x = static_cast<T*>(c.grad_x) + offset;
      row.ahead_grad_x = along_row ? row.grad_x + further : t >= ahead ? row.grad_x - ahead * c.N : row.grad_x;
      derivatives(memory.derivative(), row.tape[0], own[kThreshold], n, p);
      row.derivative = memory.derivative();
      if constexpr (Neuron::kOwn > 0) {
        if (own_gradients)
          row.template run<stream, true>(n, p);
        else
          row.template run<stream, false>(n, p);
      } else {
        grad_decay += row.template run<stream, false>(n, p);
      }
    }
  }
  for (int k = 0; k < Neuron::kStates; ++k)
    if (c.grad_state[k]) copy_joined<T, false>(static_cast<R*>(c.grad_state[k]) + begin, memory.grad_state(k), n);
  for (int k = 0; k < Neuron::kOwn; ++k)
    if (c.grad_own[k]) copy_joined<T, false>(static_cast<R*>(c.grad_own[k]) + begin, memory.grad_own(k), n);
  return grad_decay;
}

// A large call of four steps, one loop over whole vectors of neurons with the tape in registers: the loads of the next
// neurons overlap the arithmetic of these. In the caches the rows are as fast. Returns where the loop ended.
template <class Neuron, class T, class R>
int64_t stream_four_steps_backward(const Call& c, int64_t begin, int64_t end, DecaySum<R>& decay) {
  constexpr int kT = 4;
  using V = typename VectorOf<R>::type;
  constexpr int64_t lanes = sizeof(V) / sizeof(R), further = kPrefetchBytes / 4 / int64_t(sizeof(T));
  const T *const x = static_cast<const T*>(c.x), *const grad_s = static_cast<const T*>(c.grad_s);
  T* const grad_x = static_cast<T*>(c.grad_x);
  const R* const v0 = static_cast<const R*>(c.state[0]);
  const R* const grad_v = static_cast<const R*>(c.grad_final_state[0]);
  R* const grad_v0 = static_cast<R*>(c.grad_state[0]);
  const int64_t N = c.N, last = begin + (end - begin) / lanes * lanes;
  const R v_init = R(c.v_init);
  with_known_reset<false>(params_of<R>(c), [&](const Params<R> p) __attribute__((always_inline)) {
    for (int64_t i = begin; i < last; i += lanes) {
      const V own[kMaxOwn] = {};
      V state[1], h[kT], before[kT], derivative[kT];
      state[0] = v0 ? load(v0 + i, (V*)nullptr) : broadcast<V>(v_init);
#pragma GCC unroll 4
      for (int t = 0; t < kT; ++t) {
        V tape[1];
        __builtin_prefetch(x + t * N + i + further);
        __builtin_prefetch(grad_s + t * N + i + further);
        before[t] = state[0];
        Neuron::step(load(x + t * N + i, (V*)nullptr), state, tape, own, p);
        h[t] = tape[0];
      }
      switch (p.surrogate) {
#define SNNFAST_CASE(id, Surrogate)                                             \
  case id:                                                                      \
    _Pragma("GCC unroll 4") for (int t = 0; t < kT; ++t) derivative[t] =        \
        Surrogate::template derivative<V>(h[t] - p.threshold, p.alpha, p.gain); \
    break;
        SNNFAST_SURROGATES(SNNFAST_CASE)
#undef SNNFAST_CASE
      }
      V grad_state[1] = {grad_v ? load(grad_v + i, (V*)nullptr) : V{}};
      ParameterGradients<V> grads{};
#pragma GCC unroll 4
      for (int t = kT - 1; t >= 0; --t) {
        const V tape[1] = {h[t]}, start[1] = {before[t]};
        const V out = Neuron::step_backward(load(grad_s + t * N + i, (V*)nullptr), grad_state, tape, start,
                                            derivative[t], own, p, grads);
        store<true>(grad_x + t * N + i, out);
      }
      if (grad_v0) store<false>(grad_v0 + i, grad_state[0]);
      if constexpr (Neuron::kLearnable) decay.add(grads.decay);
    }
  });
  return last;
}

// What four steps of need no more registers than there are.
template <class Neuron, class T>
constexpr bool kFitsRegisters = Neuron::kOwn == 0 && sizeof(T) == sizeof(float);

template <class Neuron, class T, bool stream, class R>
void backward_block(const Call& c, int64_t index, int64_t begin, int64_t end,
                    const BackwardScratch<Neuron, R>& memory) {
  DecaySum<R> in_vectors;
  double grad_decay = 0;
  int64_t done = begin;
  if constexpr (stream && kFitsRegisters<Neuron, T>) {
    // Stores past the caches need every row aligned.
    const bool aligned = aligned_to(static_cast<T*>(c.grad_x) + begin, kVectorBytes / sizeof(R)) &&
                         (c.N * sizeof(T)) % kVectorBytes == 0;
    if (c.T == 4 && c.grad_s && !c.grad_v_seq && aligned)
      done = stream_four_steps_backward<Neuron, T>(c, begin, end, in_vectors);
  }
  const int64_t tile = c.T <= kFewSteps ? kTile : end - begin;
  for (int64_t b = done; b < end; b += tile)
    grad_decay += backward_tile<Neuron, T, stream>(c, b, smaller(b + tile, end), memory);
  if (Neuron::kLearnable) static_cast<double*>(c.grad_decay_partial)[index] = in_vectors.total() + grad_decay;
  if (stream) store_fence();
}

}  // namespace
}  // namespace snnfast
