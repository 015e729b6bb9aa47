// One time step of a row of neurons on the CPU: the vector loop, and the forward's arithmetic in it.
#pragma once

// First: the templates of the other headers must see the vectors' functions.
#include "vector.h"

#include "cpu.h"

namespace snnfast {
namespace {

constexpr int64_t kPrefetchBytes = 4096;  // how far ahead short rows are asked for

// float64 and float16 are rare: they have the open loops alone, not those of four steps, nor streaming stores.
template <class T>
constexpr bool kUsual = sizeof(T) == sizeof(float);
template <>
constexpr bool kUsual<BFloat16> = true;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
bool aligned_to(const T* pointer, int64_t lanes) {
  return uintptr_t(pointer) % (lanes * sizeof(T)) == 0;
}

// Runs element<V>(i) for a row, V being a vector where a whole one fits and, for streaming stores, is aligned.
template <class R, bool stream, class T, class Element>
SNNFAST_FN void for_each_in_row(const T* stored, int64_t n, Element element) {
  using V = typename VectorOf<R>::type;
  constexpr int64_t lanes = sizeof(V) / sizeof(R);
  int64_t i = 0;
  if constexpr (stream)
    for (; i < n && !aligned_to(stored + i, lanes); ++i) element(R(), i);
  for (; i + lanes <= n; i += lanes) element(V(), i);
  for (; i < n; ++i) element(R(), i);
}

// Calls f with a copy of p in which what the dynamics branch on is known to the compiler, so that a row's loop has no
// branches.
template <bool zero_too, class R, class F>
SNNFAST_FN void with_known_reset(Params<R> p, F f) {
  if (p.soft_reset) {
    p.soft_reset = true, p.zero_reset = false;
    return f(p);
  }
  p.soft_reset = false;
  if constexpr (zero_too) {
    if (p.zero_reset) {
      p.zero_reset = true;
      return f(p);
    }
    p.zero_reset = false;
  }
  f(p);
}
template <class R, class F>
SNNFAST_FN void with_known_division(Params<R> p, F f) {
  if (p.division == kMultiply) {
    p.division = kMultiply;
    return f(p);
  }
  if constexpr (kHasFusedMultiplyAdd && sizeof(R) == sizeof(float)) {
    if (p.division == kCorrected) {
      p.division = kCorrected;
      return f(p);
    }
  }
  p.division = kDivide;
  f(p);
}

// What a forward row leaves behind: spikes; spikes and potentials; or the tape and nothing else.
enum RowKind { kSpikeRow, kPotentialRow, kTapeRow };

template <class Neuron, class T, class R>
struct ForwardRow {
  const T* x;
  const T* ahead;  // where to prefetch from: what will be read a block later
  T* ahead_s;      // what will be written a block later
  T* s;            // null while only the tape is wanted
  R* state[Neuron::kStates];
  const R* own[kMaxOwn];
  R* tape[Neuron::kTape];
  R* v_seq;

  template <bool stream, RowKind kind>
  void run(int64_t n, const Params<R> known) const {
    if constexpr (Neuron::kOwn > 0 || kind == kPotentialRow) return loop<stream, kind>(n, known);
    with_known_reset<true>(known, [&](const Params<R> p) __attribute__((always_inline)) {
      if constexpr (Neuron::kDivides)
        with_known_division(p, [&](const Params<R> q) __attribute__((always_inline)) { loop<stream, kind>(n, q); });
      else
        loop<stream, kind>(n, p);
    });
  }

 private:
  template <bool stream, RowKind kind>
  SNNFAST_FN void loop(int64_t n, const Params<R> p) const {
    const ForwardRow row = *this;
    for_each_in_row<R, stream>(row.s, n, [&](auto tag, int64_t i) __attribute__((always_inline)) {
      using V = decltype(tag);
      V state[Neuron::kStates], tape[Neuron::kTape], own[kMaxOwn] = {};
      for (int k = 0; k < Neuron::kStates; ++k) state[k] = load(row.state[k] + i, &state[k]);
      for (int k = 0; k < Neuron::kOwn; ++k) own[k] = load(row.own[k] + i, &own[k]);
      __builtin_prefetch(row.ahead + i);
      if constexpr (!stream && kind != kTapeRow) __builtin_prefetch(row.ahead_s + i, 1);
      const V s = Neuron::step(load(row.x + i, (V*)nullptr), state, tape, own, p);
      for (int k = 0; k < Neuron::kStates; ++k) store<false>(row.state[k] + i, state[k]);
      if constexpr (kind == kTapeRow) {
        for (int k = 0; k < Neuron::kTape; ++k) store<false>(row.tape[k] + i, tape[k]);
      } else {
        if constexpr (Neuron::kOwn > 0)  // may be several at once
          store<stream>(row.s + i, s);
        else
          store_spikes<stream>(row.s + i, s);
        if constexpr (kind == kPotentialRow) store<false>(row.v_seq + i, state[0]);
      }
    });
  }
};

template <class R>
void fill_state(R* to, const void* from, int64_t begin, int64_t n, double initial) {
  if (from)
    memcpy(to, static_cast<const R*>(from) + begin, n * sizeof(R));
  else
    for (int64_t i = 0; i < n; ++i) to[i] = R(initial);
}

// Where a row of a parameter of neurons `begin` on lies: in the caller's memory, or in `filled`, if all have the same.
template <class R>
const R* own_row(const Call& c, int k, R* filled, int64_t begin, int64_t n) {
  const R* own = static_cast<const R*>(c.own[k]);
  if (c.own_each >> k & 1) return own + begin;
  for (int64_t i = 0; i < n; ++i) filled[i] = *own;
  return filled;
}

}  // namespace
}  // namespace snnfast
