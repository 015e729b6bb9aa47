// The time loop on the CPU. Neurons are cut into blocks whose state stays in the first-level cache while the loop runs
// over time, so x is read once and s written once, in long runs, whatever T is. The backward keeps a tape of one block
// in the caches and walks it backwards; beyond kMaxSegment steps it re-runs segments from saved states, so its memory
// does not grow with T.
//
// Compiled once per instruction set with SNNFAST_CPU_SET naming it. Everything has internal linkage but the one table
// at the end, and nothing from the standard library is instantiated here (see portable.h).
#include <stdlib.h>

#include "vector.h"  // first: the templates of the other headers must see the vectors' functions

#include "cpu.h"

namespace snnfast {
namespace {

constexpr int64_t kForwardBlock = 2048;
constexpr int64_t kPrefetchBytes = 4096;  // how far ahead of the backward's short rows
constexpr int64_t kFewSteps = 8;          // so few rows fit the first-level cache side by side, in tiles
constexpr int64_t kTile = 256;
constexpr int64_t kSerialBelow = 32768;  // elements; a thread team costs more than it brings, and forks stay safe

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
template <class R, class F>
SNNFAST_FN void with_known_reset(Params<R> p, F f) {
  if (p.soft_reset) {
    p.soft_reset = true;
    f(p);
  } else {
    p.soft_reset = false;
    f(p);
  }
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

template <class Neuron, class T, class R>
struct ForwardRow {
  const T* x;
  const T* ahead;  // where to prefetch from: what will be read a block later
  T* ahead_s;      // what will be written a block later
  T* s;            // null while only the tape or the state is wanted
  R* state[Neuron::kStates];
  R* tape[Neuron::kTape];  // null entries outside the backward
  R* v_seq;                // may be null

  template <bool stream, bool with_tape>
  void run(int64_t n, const Params<R> known) const {
    with_known_reset(known, [&](const Params<R> p) __attribute__((always_inline)) {
      if constexpr (Neuron::kDivides)
        with_known_division(p,
                            [&](const Params<R> q) __attribute__((always_inline)) { loop<stream, with_tape>(n, q); });
      else
        loop<stream, with_tape>(n, p);
    });
  }

 private:
  template <bool stream, bool with_tape>
  SNNFAST_FN void loop(int64_t n, const Params<R> p) const {
    const ForwardRow row = *this;
    for_each_in_row<R, stream>(row.s, n, [&](auto tag, int64_t i) __attribute__((always_inline)) {
      using V = decltype(tag);
      V state[Neuron::kStates], tape[Neuron::kTape];
      for (int k = 0; k < Neuron::kStates; ++k) state[k] = load(row.state[k] + i, &state[k]);
      __builtin_prefetch(row.ahead + i);
      if constexpr (!stream && !with_tape) __builtin_prefetch(row.ahead_s + i, 1);
      const V s = Neuron::step(load(row.x + i, (V*)nullptr), state, tape, p);
      for (int k = 0; k < Neuron::kStates; ++k) store<false>(row.state[k] + i, state[k]);
      if constexpr (with_tape) {
        for (int k = 0; k < Neuron::kTape; ++k) store<false>(row.tape[k] + i, tape[k]);
      } else {
        store<stream>(row.s + i, s);
        if (row.v_seq) store<false>(row.v_seq + i, state[0]);
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

template <class Neuron, class T, bool stream>
void forward_block(const Call& c, int64_t begin, int64_t end) {
  using R = typename StateOf<T>::type;
  const Params<R> p = params_of<R>(c);
  const T* x = static_cast<const T*>(c.x);
  ForwardRow<Neuron, T, R> row{};
  R running[stream ? Neuron::kStates : 1][stream ? kForwardBlock : 1];  // streamed states go to memory once, at the end
  for (int k = 0; k < Neuron::kStates; ++k) {
    row.state[k] = stream ? running[k] : static_cast<R*>(c.final_state[k]) + begin;
    fill_state(row.state[k], c.state[k], begin, end - begin, c.v_init);
  }
  for (int64_t t = 0; t < c.T; ++t) {
    row.x = x + t * c.N + begin;
    row.ahead = t + 1 < c.T ? row.x + c.N : x + end;
    row.s = static_cast<T*>(c.s) + t * c.N + begin;
    row.ahead_s = t + 1 < c.T ? row.s + c.N : static_cast<T*>(c.s) + end;
    row.v_seq = c.v_seq ? static_cast<R*>(c.v_seq) + t * c.N + begin : nullptr;
    row.template run<stream, false>(end - begin, p);
  }
  if constexpr (stream) {
    for (int k = 0; k < Neuron::kStates; ++k) {
      R* to = static_cast<R*>(c.final_state[k]) + begin;
      for_each_in_row<R, true>(to, end - begin, [&](auto tag, int64_t i) __attribute__((always_inline)) {
        store<true>(to + i, load(running[k] + i, (decltype(tag)*)nullptr));
      });
    }
    store_fence();
  }
}

// The memory one thread needs for the backward of one block.
template <class Neuron, class R>
class BackwardScratch {
 public:
  BackwardScratch(int64_t T, int64_t block) : block_(block), segment_(smaller(T, kMaxSegment)) {
    const int64_t segments = (T + segment_ - 1) / segment_;
    const int64_t rows = 1 + Neuron::kStates * (2 + segments) + Neuron::kTape * segment_;
    memory_ = static_cast<R*>(malloc(rows * block * sizeof(R) + 64));
    base_ = reinterpret_cast<R*>((uintptr_t(memory_) + 63) / 64 * 64);
  }
  ~BackwardScratch() { free(memory_); }
  BackwardScratch(const BackwardScratch&) = delete;
  BackwardScratch& operator=(const BackwardScratch&) = delete;

  bool allocated() const { return memory_; }
  int64_t segment() const { return segment_; }
  R* derivative() const { return base_; }
  R* state(int k) const { return base_ + (1 + k) * block_; }
  R* grad_state(int k) const { return base_ + (1 + Neuron::kStates + k) * block_; }
  R* tape(int64_t step, int k) const { return base_ + (1 + 2 * Neuron::kStates + step * Neuron::kTape + k) * block_; }
  R* checkpoint(int64_t segment, int k) const { return tape(segment_, 0) + (segment * Neuron::kStates + k) * block_; }

 private:
  R* memory_;
  R* base_;
  int64_t block_, segment_;
};

// The surrogate's derivative for a row, in a loop of its own: eight surrogates beside every neuron and dtype would
// multiply the code, and a branch inside the loop would hold the arithmetic back.
template <class R>
void derivative_row(R* derivative, const R* h, int64_t n, const Params<R> p) {
  switch (p.surrogate) {
#define SNNFAST_CASE(id, Surrogate)                                                                     \
  case id:                                                                                              \
    for_each_in_row<R, false>(derivative, n, [&](auto tag, int64_t i) __attribute__((always_inline)) {  \
      using V = decltype(tag);                                                                          \
      store<false>(derivative + i,                                                                      \
                   Surrogate::template derivative<V>(load(h + i, (V*)nullptr) - p.threshold, p.alpha)); \
    });                                                                                                 \
    break;
    SNNFAST_SURROGATES(SNNFAST_CASE)
#undef SNNFAST_CASE
  }
}

template <class Neuron, class T, class R>
struct BackwardRow {
  const T* grad_s;      // may be null
  const T* ahead;       // where to prefetch from
  const R* grad_v_seq;  // may be null
  const R* derivative;
  const R* tape[Neuron::kTape];
  const R* tape_before[Neuron::kTape];     // of the step before; null at the start of a segment
  const R* state_before[Neuron::kStates];  // the state at the start of the segment
  R* grad_state[Neuron::kStates];
  T* grad_x;
  T* ahead_grad_x;

  template <bool stream>
  double run(int64_t n, const Params<R> known) const {
    double grad_decay = 0;
    with_known_reset(known, [&](Params<R> p) __attribute__((always_inline)) {
      if (p.detach_reset) {
        p.detach_reset = true;
        grad_decay = loop<stream>(n, p);
      } else {
        p.detach_reset = false;
        grad_decay = loop<stream>(n, p);
      }
    });
    return grad_decay;
  }

 private:
  template <bool stream>
  SNNFAST_FN double loop(int64_t n, const Params<R> p) const {
    using Vector = typename VectorOf<R>::type;
    const BackwardRow row = *this;
    Vector decay_lanes{};
    R decay_rest{};
    for_each_in_row<R, stream>(row.grad_x, n, [&](auto tag, int64_t i) __attribute__((always_inline)) {
      using V = decltype(tag);
      V grad_state[Neuron::kStates], tape[Neuron::kTape], before[Neuron::kStates], grad_decay{};
      for (int k = 0; k < Neuron::kStates; ++k) grad_state[k] = load(row.grad_state[k] + i, &grad_state[k]);
      for (int k = 0; k < Neuron::kTape; ++k) tape[k] = load(row.tape[k] + i, &tape[k]);
      if constexpr (Neuron::kLearnable) {
        if (row.tape_before[0]) {
          V tape_before[Neuron::kTape];
          for (int k = 0; k < Neuron::kTape; ++k) tape_before[k] = load(row.tape_before[k] + i, &tape_before[k]);
          Neuron::after(tape_before, before, p);
        } else {
          for (int k = 0; k < Neuron::kStates; ++k) before[k] = load(row.state_before[k] + i, &before[k]);
        }
      } else {
        for (int k = 0; k < Neuron::kStates; ++k) before[k] = V{};
      }
      __builtin_prefetch(row.ahead + i);
      if constexpr (!stream) __builtin_prefetch(row.ahead_grad_x + i, 1);
      if (row.grad_v_seq) grad_state[0] += load(row.grad_v_seq + i, (V*)nullptr);
      const V grad_s = row.grad_s ? load(row.grad_s + i, (V*)nullptr) : V{};
      const V grad_x =
          Neuron::step_backward(grad_s, grad_state, tape, before, load(row.derivative + i, (V*)nullptr), p, grad_decay);
      for (int k = 0; k < Neuron::kStates; ++k) store<false>(row.grad_state[k] + i, grad_state[k]);
      store<stream>(row.grad_x + i, grad_x);
      if constexpr (Neuron::kLearnable) {
        if constexpr (sizeof(V) == sizeof(R))
          decay_rest += grad_decay;
        else
          decay_lanes += grad_decay;
      }
    });
    double sum = decay_rest;
    for (int i = 0; i < int(sizeof(Vector) / sizeof(R)); ++i) sum += decay_lanes[i];
    return sum;
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

  auto record = [&](int64_t segment, bool with_tape) {
    const int64_t first = segment * K, last = smaller(first + K, c.T);
    ForwardRow<Neuron, T, R> row{};
    for (int k = 0; k < Neuron::kStates; ++k) row.state[k] = memory.state(k);
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
      row.template run<false, true>(n, p);
    }
  };
  auto copy_states = [&](auto to, auto from) {
    for (int k = 0; k < Neuron::kStates; ++k) memcpy(to(k), from(k), n * sizeof(R));
  };

  for (int k = 0; k < Neuron::kStates; ++k) {
    fill_state(memory.state(k), c.state[k], begin, n, c.v_init);
    fill_state(memory.grad_state(k), c.grad_final_state[k], begin, n, 0.0);
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
      row.grad_x = static_cast<T*>(c.grad_x) + offset;
      row.ahead_grad_x = along_row ? row.grad_x + further : t >= ahead ? row.grad_x - ahead * c.N : row.grad_x;
      derivative_row(memory.derivative(), row.tape[0], n, p);
      row.derivative = memory.derivative();
      grad_decay += row.template run<stream>(n, p);
    }
  }
  for (int k = 0; k < Neuron::kStates; ++k)
    if (c.grad_state[k]) memcpy(static_cast<R*>(c.grad_state[k]) + begin, memory.grad_state(k), n * sizeof(R));
  return grad_decay;
}

template <class Neuron, class T, bool stream, class R>
void backward_block(const Call& c, int64_t index, int64_t begin, int64_t end,
                    const BackwardScratch<Neuron, R>& memory) {
  double grad_decay = 0;
  const int64_t tile = c.T <= kFewSteps ? kTile : end - begin;
  for (int64_t b = begin; b < end; b += tile)
    grad_decay += backward_tile<Neuron, T, stream>(c, b, smaller(b + tile, end), memory);
  if (Neuron::kLearnable) static_cast<double*>(c.grad_decay_partial)[index] = grad_decay;
  if (stream) store_fence();
}

int threads_for(const Call& c, int64_t blocks) {
  if (c.T * c.N < kSerialBelow) return 1;
  return int(smaller(c.threads, blocks));
}

template <class Neuron, class T, bool stream>
void forward_all(const Call& c) {
  const int64_t blocks = (c.N + kForwardBlock - 1) / kForwardBlock;
  [[maybe_unused]] const int threads = threads_for(c, blocks);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const FlushDenormals flush;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b)
      forward_block<Neuron, T, stream>(c, b * kForwardBlock, smaller((b + 1) * kForwardBlock, c.N));
  }
}

// False where memory ran out, and then nothing that was written counts.
template <class Neuron, class T, bool stream>
bool backward_all(const Call& c) {
  using R = typename StateOf<T>::type;
  const int64_t block = backward_block_size(c.T), blocks = backward_blocks(c.T, c.N);
  [[maybe_unused]] const int threads = threads_for(c, blocks);
  int allocated = 1;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(min : allocated)
  {
    const FlushDenormals flush;
    const BackwardScratch<Neuron, R> memory(c.T, block);
    allocated = memory.allocated();
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b)
      if (memory.allocated()) backward_block<Neuron, T, stream>(c, b, b * block, smaller((b + 1) * block, c.N), memory);
  }
  return allocated;
}

template <class Neuron, class T>
bool run(const Call& c, bool backward) {
  if (backward) return c.stream_stores ? backward_all<Neuron, T, true>(c) : backward_all<Neuron, T, false>(c);
  c.stream_stores ? forward_all<Neuron, T, true>(c) : forward_all<Neuron, T, false>(c);
  return true;
}

template <class Neuron>
bool run_dtype(const Call& c, bool backward) {
  switch (c.dtype) {
    case kFloat32:
      return run<Neuron, float>(c, backward);
    case kFloat64:
      return run<Neuron, double>(c, backward);
    case kBFloat16:
      return run<Neuron, BFloat16>(c, backward);
    case kFloat16:
      return run<Neuron, Float16>(c, backward);
  }
  return true;
}

bool run_neuron(const Call& c, bool backward) {
  switch (c.neuron) {
#define SNNFAST_CASE(id, Neuron) \
  case id:                       \
    return run_dtype<Neuron>(c, backward);
    SNNFAST_NEURONS(SNNFAST_CASE)
#undef SNNFAST_CASE
  }
  return true;
}

// tau and a scale separately, so one binade of a, over all mantissas, stands for all of the usable range.
bool corrected_division_is_exact(float tau) {
  if (!kHasFusedMultiplyAdd || !(tau >= 1.0f && tau <= 1048576.0f)) return false;
  using V = VectorOf<float>::type;
  constexpr int lanes = sizeof(V) / sizeof(float);
  Params<float> p{};
  p.tau = tau;
  p.inv_tau = 1.0f / tau;
  Int32Vector lane;
  for (int i = 0; i < lanes; ++i) lane[i] = i;
  for (int32_t mantissa = 0; mantissa < (1 << 23); mantissa += lanes) {
    const V a = (V)(0x3f800000 + mantissa + lane);
    const V difference = divide_corrected(a, p) - a / tau;
    for (int i = 0; i < lanes; ++i)
      if (difference[i] != 0.0f) return false;
  }
  return true;
}

}  // namespace

#define SNNFAST_NAME(set) SNNFAST_NAME_(set)
#define SNNFAST_NAME_(set) cpu_kernels_##set
#define SNNFAST_STRING(set) SNNFAST_STRING_(set)
#define SNNFAST_STRING_(set) #set
extern const CpuKernels SNNFAST_NAME(SNNFAST_CPU_SET) = {
    SNNFAST_STRING(SNNFAST_CPU_SET),
    [](const Call& c) { run_neuron(c, false); },
    [](const Call& c) { return run_neuron(c, true); },
    corrected_division_is_exact,
};

}  // namespace snnfast
