// One time step of a row of neurons on the CPU: the vector loop, and the forward's arithmetic in it.
#pragma once

// First: the templates of the other headers must see the vectors' functions.
#include "vector.h"

#include "cpu.h"

namespace snnfast {
namespace {

constexpr int64_t kPrefetchBytes = 4096;  // how far ahead short rows are asked for
constexpr int64_t kSerialBelow = 32768;   // elements; a thread team costs more than it brings, and forks stay safe

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

// The same for rows of T whose scratch memory is in the order of its parts: element<V>(i) takes kParts<T, V> vectors.
// Nothing is peeled off, so that all rows of a tile are cut alike.
template <class T, class R, bool stream, class Element>
SNNFAST_FN void for_each_parts_in_row(const T* stored, int64_t n, Element element) {
  using V = typename VectorOf<R>::type;
  constexpr int64_t lanes = kParts<T, V> * sizeof(V) / sizeof(R);
  if constexpr (kParts<T, V> == 1) return for_each_in_row<R, stream>(stored, n, element);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) element(V(), i);
  for (; i < n; ++i) element(R(), i);
}
template <class T>
constexpr bool kSplits = kParts<T, typename VectorOf<typename StateOf<T>::type>::type> > 1;

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
    for_each_parts_in_row<T, R, stream>(row.s, n, [&](auto tag, int64_t i) __attribute__((always_inline)) {
      using V = decltype(tag);
      constexpr int parts = kParts<T, V>, lanes = sizeof(V) / sizeof(R);
      V x[parts], s[parts], v[parts];
      __builtin_prefetch(row.ahead + i);
      if constexpr (!stream && kind != kTapeRow) __builtin_prefetch(row.ahead_s + i, 1);
      load_parts(row.x + i, x);
      for (int part = 0; part < parts; ++part) {
        const int64_t at = i + part * lanes;
        V state[Neuron::kStates], tape[Neuron::kTape], own[kMaxOwn] = {};
        for (int k = 0; k < Neuron::kOwn; ++k) own[k] = load(row.own[k] + at, &own[k]);
        for (int k = 0; k < Neuron::kStates; ++k) state[k] = load(row.state[k] + at, &state[k]);
        s[part] = Neuron::step(x[part], state, tape, own, p);
        for (int k = 0; k < Neuron::kStates; ++k) store<false>(row.state[k] + at, state[k]);
        if constexpr (kind == kTapeRow)
          for (int k = 0; k < Neuron::kTape; ++k) store<false>(row.tape[k] + at, tape[k]);
        v[part] = state[0];
      }
      if constexpr (kind != kTapeRow) {
        if constexpr (Neuron::kOwn > 0)  // may be several at once
          store_parts<stream>(row.s + i, s);
        else
          store_spike_parts<stream>(row.s + i, s);
        if constexpr (kind == kPotentialRow) store_joined<false>(row.v_seq + i, v);
      }
    });
  }
};

// Between memory in the usual order and scratch memory for rows of T.
template <class T, class R>
void copy_split(R* to, const R* from, int64_t n) {
  if constexpr (!kSplits<T>) {
    memcpy(to, from, n * sizeof(R));
  } else {
    for_each_parts_in_row<T, R, false>((const T*)nullptr, n, [&](auto tag, int64_t i) __attribute__((always_inline)) {
      decltype(tag) parts[kParts<T, decltype(tag)>];
      load_split(from + i, parts);
      memcpy(to + i, parts, sizeof(parts));
    });
  }
}
template <class T, bool stream, class R>
void copy_joined(R* to, const R* from, int64_t n) {
  if constexpr (!kSplits<T> && !stream) {
    memcpy(to, from, n * sizeof(R));
  } else {
    const auto element = [&](auto tag, int64_t i) __attribute__((always_inline)) {
      decltype(tag) parts[kParts<T, decltype(tag)>];
      memcpy(parts, from + i, sizeof(parts));
      store_joined<stream>(to + i, parts);
    };
    if constexpr (kSplits<T>)
      for_each_parts_in_row<T, R, stream>((const T*)nullptr, n, element);
    else
      for_each_in_row<R, stream>(to, n, element);
  }
}

template <class T, class R>
void fill_state(R* to, const void* from, int64_t begin, int64_t n, double initial) {
  if (from)
    copy_split<T>(to, static_cast<const R*>(from) + begin, n);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = R(initial);
}

// Where a row of a parameter of neurons `begin` on lies: in the caller's memory, or in `filled`, if all have the same
// or rows of T want it in another order.
template <class T, class R>
const R* own_row(const Call& c, int k, R* filled, int64_t begin, int64_t n) {
  const R* own = static_cast<const R*>(c.own[k]);
  const bool each = c.own_each >> k & 1;
  if (each && !kSplits<T>) return own + begin;
  fill_state<T>(filled, each ? own : nullptr, begin, n, *own);
  return filled;
}

}  // namespace
}  // namespace snnfast
