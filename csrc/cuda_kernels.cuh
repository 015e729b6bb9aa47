// The time loop on the GPU: a thread owns W neighbouring neurons, keeps their state in registers, and walks through
// time. Memory traffic is the limit, so rows are asked for well before the step that needs them, in accesses of up to
// 16 bytes.
//
// A kernel exists per neuron, dtype and bucket of T. In the exact buckets the compiler knows T: all rows are asked for
// before the first step, and the backward recomputes its tape in registers. The open bucket takes any T: a ring of rows
// is in flight, and the backward keeps the tape of a segment of steps in shared memory, re-running one segment after
// the other from states that a first sweep has left in the workspace.
//
// Plain functions over Call, so that tests/cuda_host_shim can run the very same source on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "dispatch.h"

namespace snnfast {
namespace {

#define SNNFAST_DEVICE __device__ __forceinline__

constexpr int kThreads = 128;  // per block
constexpr int kOpen = 0;       // as the T of a kernel: any
constexpr int kSegment = 16;   // steps of the open backward between kept states

SNNFAST_FN int64_t decay_partials(int64_t N) { return (N + kThreads - 1) / kThreads; }

template <class A, class B>
cudaError_t launch_blocks(void (*kernel)(A, B), int64_t blocks, int threads, A& a, B& b, void* stream) {
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  void* arguments[] = {&a, &b};
  // CUDA 12 cannot tell the function's type from its pointer.
  return cudaLaunchKernel<void(A, B)>(kernel, dim3(unsigned(blocks)), dim3(threads), arguments, 0,
                                      static_cast<cudaStream_t>(stream));
}

// ---- memory ----
template <int bytes>
struct AccessOf;
template <>
struct AccessOf<2> {
  using type = uint16_t;
};
template <>
struct AccessOf<4> {
  using type = uint32_t;
};
template <>
struct AccessOf<8> {
  using type = uint2;
};
template <>
struct AccessOf<16> {
  using type = uint4;
};

// W neighbouring values as they lie in memory: half the registers of the widened ones for 16-bit types.
template <class T, int W>
struct Pack {
  static constexpr int kBytes = sizeof(T) * W;
  using Access = typename AccessOf<(kBytes < 16 ? kBytes : 16)>::type;
  static constexpr int kAccesses = kBytes / int(sizeof(Access));
  Access words[kAccesses];
};

SNNFAST_DEVICE float widen(float a) { return a; }
SNNFAST_DEVICE double widen(double a) { return a; }
SNNFAST_DEVICE float widen(__nv_bfloat16 a) { return __bfloat162float(a); }
SNNFAST_DEVICE float widen(__half a) { return __half2float(a); }
SNNFAST_DEVICE void narrow_pair(float a, float b, __nv_bfloat16* to) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  to[0] = pair.x, to[1] = pair.y;
}
SNNFAST_DEVICE void narrow_pair(float a, float b, __half* to) {
  const __half2 pair = __floats2half2_rn(a, b);
  to[0] = pair.x, to[1] = pair.y;
}
SNNFAST_DEVICE void narrow(float a, __nv_bfloat16* to) { *to = __float2bfloat16_rn(a); }
SNNFAST_DEVICE void narrow(float a, __half* to) { *to = __float2half_rn(a); }
SNNFAST_DEVICE void narrow(float a, float* to) { *to = a; }
SNNFAST_DEVICE void narrow(double a, double* to) { *to = a; }

template <int W, class T>
SNNFAST_DEVICE Pack<T, W> load(const T* from) {
  Pack<T, W> pack;
  SNNFAST_UNROLL
  for (int i = 0; i < pack.kAccesses; ++i)
    pack.words[i] = reinterpret_cast<const typename Pack<T, W>::Access*>(from)[i];
  return pack;
}
template <class T, class R, int W>
SNNFAST_DEVICE void unpack(const Pack<T, W>& pack, R (&to)[W]) {
  T raw[W];
  memcpy(raw, pack.words, sizeof(raw));
  SNNFAST_UNROLL
  for (int w = 0; w < W; ++w) to[w] = widen(raw[w]);
}
template <class T, class R, int W>
SNNFAST_DEVICE void store(T* to, const R (&from)[W]) {
  T raw[W];
  if constexpr (sizeof(T) == 2 && W > 1) {
    SNNFAST_UNROLL
    for (int w = 0; w < W; w += 2) narrow_pair(from[w], from[w + 1], raw + w);
  } else {
    SNNFAST_UNROLL
    for (int w = 0; w < W; ++w) narrow(from[w], raw + w);
  }
  Pack<T, W> pack;
  memcpy(pack.words, raw, sizeof(raw));
  SNNFAST_UNROLL
  for (int i = 0; i < pack.kAccesses; ++i)  // by name, because nvcc takes a plain 16-byte store apart
    __stwb(reinterpret_cast<typename Pack<T, W>::Access*>(to) + i, pack.words[i]);
}

// States lie as [N] each; a thread holds them as [W][states].
template <class R, int W, int states>
SNNFAST_DEVICE void load_states(const void* const (&from)[kMaxStates], int64_t n, double v_init,
                                R (&state)[W][states]) {
  SNNFAST_UNROLL
  for (int k = 0; k < states; ++k) {
    R lanes[W];
    SNNFAST_UNROLL
    for (int w = 0; w < W; ++w) lanes[w] = k == 0 ? R(v_init) : R(0);
    if (from[k]) unpack(load<W>(static_cast<const R*>(from[k]) + n), lanes);
    SNNFAST_UNROLL
    for (int w = 0; w < W; ++w) state[w][k] = lanes[w];
  }
}
template <class R, int W, int states>
SNNFAST_DEVICE void store_state(R* to, int k, const R (&state)[W][states]) {
  R lanes[W];
  SNNFAST_UNROLL
  for (int w = 0; w < W; ++w) lanes[w] = state[w][k];
  store(to, lanes);
}

// The parameters of a thread's own neurons.
template <class Neuron, class R, int W>
struct OwnParameters {
  R values[W][kMaxOwn];
  SNNFAST_DEVICE OwnParameters(const Call& c, int64_t n) {
    SNNFAST_UNROLL
    for (int k = 0; k < Neuron::kOwn; ++k) {
      const R* from = static_cast<const R*>(c.own[k]);
      R lanes[W];
      if (c.own_each >> k & 1) {
        unpack(load<W>(from + n), lanes);
      } else {
        SNNFAST_UNROLL
        for (int w = 0; w < W; ++w) lanes[w] = *from;
      }
      SNNFAST_UNROLL
      for (int w = 0; w < W; ++w) values[w][k] = lanes[w];
    }
  }
};

// ---- dynamics of a thread's neurons ----
template <class Neuron, class R>
SNNFAST_DEVICE Params<R> with_decay(Params<R> p, const Call& c) {
  if constexpr (Neuron::kLearnable) {
    p.decay = *static_cast<const R*>(c.decay);
    p.kept = R(1) - p.decay;
    p.tau = p.decay != R(0) ? R(1) / p.decay : R(0);  // a decay of 0 has no gradient through sigmoid
    p.input_factor = p.decay_input ? p.decay : R(1);
  }
  return p;
}

// Calls f with the way of dividing and decay_input known to the compiler, so that it branches once and not per step.
// kCorrected is kDivide to the last bit and gains nothing here; neither does the rest where the code size is not worth
// it.
template <class R, class F>
SNNFAST_DEVICE void with_known_input(Params<R> p, F f) {
  if (p.decay_input) {
    p.decay_input = true;
    return f(p);
  }
  p.decay_input = false;
  f(p);
}
template <class Neuron, bool often, class R, class F>
SNNFAST_DEVICE void with_known_charge(Params<R> p, F f) {
  if constexpr (Neuron::kDivides) {
    if constexpr (often)
      if (p.division == kMultiply) {
        p.division = kMultiply;
        return with_known_input(p, f);
      }
    p.division = kDivide;
  } else if constexpr (Neuron::kLearnable && often) {
    return with_known_input(p, f);
  }
  f(p);
}

// A row of x or grad_s and those that follow it in the direction of the walk, `stride` elements apart, of which up to
// kAhead are in flight.
template <class T, int W, int kAhead_, bool kExact_>
struct Rows {
  static constexpr int kAhead = kAhead_;
  static constexpr bool kExact = kExact_;
  static constexpr bool kConnects = false;  // whether something meets the spikes
  const T* next;                            // the first that is not yet asked for
  int64_t stride;
  int64_t left;  // how many of those there are
  Pack<T, W> ahead[kAhead];

  SNNFAST_DEVICE Rows(const T* first, int64_t stride_, int64_t count) : next(first), stride(stride_), left(count) {
    SNNFAST_UNROLL
    for (int i = 0; i < kAhead; ++i) ask(i);
  }
  SNNFAST_DEVICE void ask(int i) {
    if (!kExact && left <= 0) return;
    ahead[i] = load<W>(next);
    next += stride;
    --left;
  }
  template <class R>
  SNNFAST_DEVICE void take(int i, R (&row)[W]) {
    unpack(ahead[i], row);
    if constexpr (!kExact) ask(i);
  }
};

// Takes the state through `count` steps (kAhead of them if exact) of Rows, or of what gives its rows another way, and
// calls after_step(i, spikes, tape, state) for each, with i a constant in the exact case.
template <class Neuron, bool often, class Source, class R, int W, class F>
SNNFAST_DEVICE void walk(Source& x, int64_t count, R (&state)[W][Neuron::kStates],
                         const OwnParameters<Neuron, R, W>& own, const Params<R>& params, F after_step) {
  constexpr int kAhead = Source::kAhead;
  constexpr bool kExact = Source::kExact;
  with_known_charge<Neuron, often>(params, [&](const Params<R> p) {
    for (int64_t base = 0; kExact ? base == 0 : base < count; base += kAhead) {
      SNNFAST_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        if (!kExact && base + i >= count) break;
        R x_now[W], s[W], tape[W][Neuron::kTape];
        x.take(i, x_now);
        SNNFAST_UNROLL
        for (int w = 0; w < W; ++w) s[w] = Neuron::step(x_now[w], state[w], tape[w], own.values[w], p);
        after_step(kExact ? i : base + i, s, tape, state);
      }
    }
  });
}

// The switch stands outside the loop over the thread's neurons, or its code would be there W times.
template <class Neuron, class R, int W>
SNNFAST_DEVICE void surrogate_derivatives(const R (&tape)[W][Neuron::kTape], const OwnParameters<Neuron, R, W>& own,
                                          R (&derivative)[W], const Params<R>& p) {
  R u[W];
  SNNFAST_UNROLL
  for (int w = 0; w < W; ++w) u[w] = tape[w][0] - (Neuron::kOwn > 0 ? own.values[w][kThreshold] : p.threshold);
  switch (p.surrogate) {
#define SNNFAST_CASE(id, Surrogate)                                                           \
  case id:                                                                                    \
    SNNFAST_UNROLL                                                                            \
    for (int w = 0; w < W; ++w) derivative[w] = Surrogate::derivative(u[w], p.alpha, p.gain); \
    return;
    SNNFAST_SURROGATES(SNNFAST_CASE)
#undef SNNFAST_CASE
  }
  SNNFAST_UNROLL
  for (int w = 0; w < W; ++w) derivative[w] = R(0);
}

// ---- forward ----
// The forward of the neurons from n on.
template <class Neuron, class T, int W, class Source, class R>
SNNFAST_DEVICE void forward_neurons(const Call& c, const Params<R>& p, int64_t n, Source& x) {
  R state[W][Neuron::kStates];
  load_states(c.state, n, c.v_init, state);
  const OwnParameters<Neuron, R, W> own(c, n);
  T* s_out = static_cast<T*>(c.s) + n;
  R* v_seq = c.v_seq ? static_cast<R*>(c.v_seq) + n : nullptr;
  const auto after_step = [&](int64_t, const R(&s)[W], const R(&)[W][Neuron::kTape],
                              const R(&now)[W][Neuron::kStates]) {
    if constexpr (Source::kConnects) {
      R out[W];
      x.meet(s, out);
      store(s_out, out);
    } else {
      store(s_out, s);
    }
    s_out += c.N;
    if (v_seq) {
      store_state(v_seq, 0, now);
      v_seq += c.N;
    }
  };
  walk<Neuron, (W > 1)>(x, c.T, state, own, p, after_step);
  SNNFAST_UNROLL
  for (int k = 0; k < Neuron::kStates; ++k) store_state(static_cast<R*>(c.final_state[k]) + n, k, state);
}

template <class Neuron, class T, int kT, int kAhead, int W>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const Call c, const Params<typename StateOf<T>::type> params) {
  const int64_t n = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * W;
  if (n >= c.N) return;
  Rows<T, W, kAhead, kT != kOpen> x(static_cast<const T*>(c.x) + n, c.N, c.T);
  forward_neurons<Neuron, T, W>(c, with_decay<Neuron>(params, c), n, x);
}

// ---- backward ----
// What goes back through time with a thread's neurons; kPotentials: whether v_seq may have a gradient.
template <class Neuron, class T, int W, bool kPotentials>
struct Backward {
  using R = typename StateOf<T>::type;
  const Params<R>& p;
  const OwnParameters<Neuron, R, W> own;
  int64_t N;
  const R* grad_v_seq;  // at the step that is next; null for none
  R grad_state[W][Neuron::kStates];
  R grad_decay;
  R grad_own[W][Neuron::kOwn > 0 ? Neuron::kOwn : 1];

  SNNFAST_DEVICE void step(const R (&grad_s)[W], const R (&tape)[W][Neuron::kTape],
                           const R (&before)[W][Neuron::kStates], R (&grad_x)[W]) {
    R derivative[W];
    if (kPotentials && grad_v_seq) {
      R grad_v[W];
      unpack(load<W>(grad_v_seq), grad_v);
      SNNFAST_UNROLL
      for (int w = 0; w < W; ++w) grad_state[w][0] += grad_v[w];
      grad_v_seq -= N;
    }
    surrogate_derivatives(tape, own, derivative, p);
    SNNFAST_UNROLL
    for (int w = 0; w < W; ++w) {
      ParameterGradients<R> grads{};
      grad_x[w] =
          Neuron::step_backward(grad_s[w], grad_state[w], tape[w], before[w], derivative[w], own.values[w], p, grads);
      if constexpr (Neuron::kLearnable) grad_decay += grads.decay;
      SNNFAST_UNROLL
      for (int k = 0; k < Neuron::kOwn; ++k) grad_own[w][k] += grads.own[k];
    }
  }
};

// Where the gradients of the rows go, from the last to the first: to grad_x. Another sink may want the rows of x too.
template <class T, int W>
struct GradientRows {
  using R = typename StateOf<T>::type;
  static constexpr bool kPotentials = true;
  static constexpr bool kWantsInput = false;
  static constexpr bool kConnects = false;
  T* next;
  int64_t N;

  SNNFAST_DEVICE GradientRows(const Call& c, int64_t n)
      : next(static_cast<T*>(c.grad_x) + (c.T - 1) * c.N + n), N(c.N) {}
  SNNFAST_DEVICE const T* skip_to_meet() const { return nullptr; }
  SNNFAST_DEVICE void put(int64_t, const R (&grad)[W], const R (&)[W]) {
    store(next, grad);
    next -= N;
  }
};
template <class Neuron, class T, int W, class Sink>
SNNFAST_DEVICE Backward<Neuron, T, W, Sink::kPotentials> start_backward(const Call& c,
                                                                        const Params<typename StateOf<T>::type>& p,
                                                                        int64_t n) {
  using R = typename StateOf<T>::type;
  const int64_t last = (c.T - 1) * c.N + n;
  Backward<Neuron, T, W, Sink::kPotentials> back{p, {c, n}, c.N, static_cast<const R*>(c.grad_v_seq), {}, R(0), {}};
  if (back.grad_v_seq) back.grad_v_seq += last;
  load_states(c.grad_final_state, n, 0.0, back.grad_state);
  return back;
}
template <class Neuron, class T, int W, bool kPotentials>
SNNFAST_DEVICE void end_backward(const Call& c, const Backward<Neuron, T, W, kPotentials>& back, int64_t n) {
  SNNFAST_UNROLL
  for (int k = 0; k < Neuron::kStates; ++k)
    if (c.grad_state[k]) store_state(static_cast<typename StateOf<T>::type*>(c.grad_state[k]) + n, k, back.grad_state);
  SNNFAST_UNROLL
  for (int k = 0; k < Neuron::kOwn; ++k)
    if (c.grad_own[k]) store_state(static_cast<typename StateOf<T>::type*>(c.grad_own[k]) + n, k, back.grad_own);
}

// Lets the compiler not see where the tape comes from, or it would keep the states of all steps in registers as well
// instead of computing them again.
template <class R, int kT, int W, int kTape>
SNNFAST_DEVICE void forget([[maybe_unused]] R (&tape)[kT][W][kTape]) {
#ifdef __CUDA_ARCH__
  static_assert(sizeof(R) == sizeof(float), "the constraint below is that of a float");
  SNNFAST_UNROLL
  for (int t = 0; t < kT; ++t) {
    SNNFAST_UNROLL
    for (int w = 0; w < W; ++w) {
      SNNFAST_UNROLL
      for (int k = 0; k < kTape; ++k) asm volatile("" : "+f"(tape[t][w][k]));
    }
  }
#endif
}

// Nor that rows read before are those still packed here, or it would keep them unpacked: twice the registers.
template <class T, int W, int count>
SNNFAST_DEVICE void forget([[maybe_unused]] Pack<T, W> (&rows)[count]) {
#ifdef __CUDA_ARCH__
  SNNFAST_UNROLL
  for (int t = 0; t < count; ++t) {
    uint32_t words[sizeof(rows[t]) / 4];
    memcpy(words, &rows[t], sizeof(words));
    SNNFAST_UNROLL
    for (int i = 0; i < int(sizeof(words) / 4); ++i) asm volatile("" : "+r"(words[i]));
    memcpy(&rows[t], words, sizeof(words));
  }
#endif
}

// Calls f with count - 1 to 0 as constants: a loop this large is not unrolled by nvcc 12, whatever it is told, and its
// arrays are then in local memory.
template <int count, class F>
SNNFAST_DEVICE void backwards(F f) {
  if constexpr (count > 0) {
    f(std::integral_constant<int, count - 1>());
    backwards<count - 1>(f);
  }
}

// From the gradient of what comes out of a step's spikes and skip, those of both. Outside of the lambda that calls it:
// nvcc 11 would compile it there for all sinks.
template <class Neuron, class Source, class Sink, class R, int W>
SNNFAST_DEVICE void disconnect(const Source& x, Sink& sink, int t, const R (&tape)[W][Neuron::kTape],
                               const OwnParameters<Neuron, R, W>& own, const Params<R>& p, R (&grad_s)[W]) {
  if constexpr (Sink::kConnects) {
    R skip[W];
    unpack(x.skip.ahead[t], skip);
    sink.template connect<Neuron>(t, skip, tape, own, p, grad_s);
  }
}

// The backward of the neurons from n on, the tape in registers; returns their part of the decay's gradient.
template <class Neuron, class T, int kT, int W, class Source, class Sink, class R>
SNNFAST_DEVICE double backward_exact(const Call& c, const Params<R>& p, int64_t n, Source& x, Sink& sink) {
  constexpr int kStates = Neuron::kStates, kTape = Neuron::kTape;
  R start[W][kStates], state[W][kStates], all[kT][W][kTape];
  load_states(c.state, n, c.v_init, start);
  Pack<T, W> grad_s[kT] = {};
  if (c.grad_s) {
    const Rows<T, W, kT, true> rows(static_cast<const T*>(c.grad_s) + n, c.N, kT);
    memcpy(grad_s, rows.ahead, sizeof(grad_s));
  }
  auto back = start_backward<Neuron, T, W, Sink>(c, p, n);
  memcpy(state, start, sizeof(state));
  walk<Neuron, true>(x, kT, state, back.own, p,
                     [&](int i, const R(&)[W], const R(&tape)[W][kTape], const R(&)[W][kStates]) {
                       memcpy(all[i], tape, sizeof(tape));
                     });
  if constexpr (Neuron::kNeedsBefore) forget(all);
  if constexpr (Sink::kWantsInput && sizeof(T) < sizeof(R)) forget(x.ahead);
  backwards<kT>([&](auto step) {
    constexpr int t = decltype(step)::value;
    R grad_s_now[W], before[W][kStates] = {};
    unpack(grad_s[t], grad_s_now);
    if (c.grad_s) disconnect<Neuron>(x, sink, t, all[t], back.own, p, grad_s_now);
    if constexpr (Neuron::kNeedsBefore) {
      SNNFAST_UNROLL
      for (int w = 0; w < W; ++w)
        if constexpr (t > 0)
          Neuron::after(all[t - 1][w], before[w], back.own.values[w], p);
        else
          memcpy(before[w], start[w], sizeof(before[w]));
    }
    R grad_x[W], x_now[W] = {};
    back.step(grad_s_now, all[t], before, grad_x);
    if constexpr (Sink::kWantsInput) unpack(x.ahead[t], x_now);
    sink.put(t, grad_x, x_now);
  });
  end_backward(c, back, n);
  return back.grad_decay;
}

// A segment's tape of the block's neurons.
template <class Neuron, class R, int W>
using SharedTape = Pack<R, W>[kSegment][Neuron::kTape][kThreads];

template <class R, int W, int kTape>
SNNFAST_DEVICE void write_tape(Pack<R, W> (&to)[kTape][kThreads], const R (&tape)[W][kTape]) {
  SNNFAST_UNROLL
  for (int k = 0; k < kTape; ++k) {
    R lanes[W];
    SNNFAST_UNROLL
    for (int w = 0; w < W; ++w) lanes[w] = tape[w][k];
    memcpy(&to[k][threadIdx.x], lanes, sizeof(lanes));
  }
}
template <class R, int W, int kTape>
SNNFAST_DEVICE void read_tape(const Pack<R, W> (&from)[kTape][kThreads], R (&tape)[W][kTape]) {
  SNNFAST_UNROLL
  for (int k = 0; k < kTape; ++k) {
    R lanes[W];
    unpack(from[k][threadIdx.x], lanes);
    SNNFAST_UNROLL
    for (int w = 0; w < W; ++w) tape[w][k] = lanes[w];
  }
}

// The same for any T, from rows(t, count), the source of so many rows from step t on. The workspace, [segments - 1,
// states, N], has the states at the starts of all segments but the first; `sweep` puts them there, and without it they
// are there already.
template <class Neuron, class T, int kAhead, int W, class RowsFrom, class Sink, class R>
SNNFAST_DEVICE double backward_open(const Call& c, const Params<R>& p, int64_t n, SharedTape<Neuron, R, W>& shared,
                                    RowsFrom rows, bool sweep, Sink& sink) {
  constexpr int kStates = Neuron::kStates, kTape = Neuron::kTape;
  const T* const x_in = static_cast<const T*>(c.x) + n;
  const int64_t last = (c.T - 1) / kSegment;  // segment
  const auto kept = [&](int64_t segment, int k) {
    return static_cast<R*>(c.workspace) + ((segment - 1) * kStates + k) * c.N + n;
  };
  if (last > 0 && sweep) {
    R state[W][kStates];
    load_states(c.state, n, c.v_init, state);
    auto x = rows(0, last * kSegment);
    const auto keep = [&](int64_t t, const R(&)[W], const R(&)[W][kTape], const R(&now)[W][kStates]) {
      if ((t + 1) % kSegment != 0) return;
      SNNFAST_UNROLL
      for (int k = 0; k < kStates; ++k) store_state(kept((t + 1) / kSegment, k), k, now);
    };
    walk<Neuron, (W > 1)>(x, last * kSegment, state, OwnParameters<Neuron, R, W>(c, n), p, keep);
  }

  const T* const grad_s_in = c.grad_s ? static_cast<const T*>(c.grad_s) + n : nullptr;
  auto back = start_backward<Neuron, T, W, Sink>(c, p, n);
  double grad_decay = 0;
  for (int64_t segment = last; segment >= 0; --segment) {
    const int64_t first = segment * kSegment;
    const int steps = int(c.T - first < kSegment ? c.T - first : kSegment);
    auto x = rows(first, steps);
    // What the first walk has just read is not far away, so a few rows ahead will do.
    constexpr int kNear = kAhead < 2 ? kAhead : 2;
    Rows<T, W, kNear, false> x_again(x_in + (first + steps - 1) * c.N, -c.N, Sink::kWantsInput ? steps : 0);
    Rows<T, W, kAhead, false> grad_s(grad_s_in ? grad_s_in + (first + steps - 1) * c.N : nullptr, -c.N,
                                     grad_s_in ? steps : 0);
    const T* const skip_in = c.grad_s ? sink.skip_to_meet() : nullptr;
    Rows<T, W, kNear, false> skip_again(skip_in ? skip_in + (first + steps - 1) * c.N : nullptr, -c.N,
                                        skip_in ? steps : 0);
    const void* from[kMaxStates] = {};
    SNNFAST_UNROLL
    for (int k = 0; k < kStates; ++k) from[k] = segment > 0 ? kept(segment, k) - n : c.state[k];
    R start[W][kStates], state[W][kStates];
    load_states(from, n, c.v_init, start);
    memcpy(state, start, sizeof(state));
    walk<Neuron, (W > 1)>(x, steps, state, back.own, p,
                          [&](int64_t i, const R(&)[W], const R(&tape)[W][kTape], const R(&)[W][kStates]) {
                            write_tape(shared[i], tape);
                          });
    R tape[W][kTape], tape_before[W][kTape] = {};
    read_tape(shared[steps - 1], tape);
    back.grad_decay = 0;
    for (int base = steps - 1; base >= 0; base -= kAhead) {
      SNNFAST_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int t = base - i;
        if (t < 0) break;
        R grad_s_now[W] = {}, before[W][kStates] = {};
        if (grad_s_in) grad_s.take(i, grad_s_now);
        if constexpr (Sink::kConnects)
          if (skip_in) {
            R skip[W];
            skip_again.take(i % kNear, skip);
            sink.template connect<Neuron>(first + t, skip, tape, back.own, p, grad_s_now);
          }
        if (t > 0) read_tape(shared[t - 1], tape_before);
        if constexpr (Neuron::kNeedsBefore) {
          SNNFAST_UNROLL
          for (int w = 0; w < W; ++w)
            if (t > 0)
              Neuron::after(tape_before[w], before[w], back.own.values[w], p);
            else
              memcpy(before[w], start[w], sizeof(before[w]));
        }
        R grad_x[W], x_now[W] = {};
        if constexpr (Sink::kWantsInput) x_again.take(i % kNear, x_now);
        back.step(grad_s_now, tape, before, grad_x);
        sink.put(first + t, grad_x, x_now);
        memcpy(tape, tape_before, sizeof(tape));
      }
    }
    grad_decay += back.grad_decay;
  }
  end_backward(c, back, n);
  return grad_decay;
}

// The block's sum in thread 0, in an order that depends on nothing but the block; 0 in the others.
__device__ inline double block_sum(double value) {
  __shared__ double warp_sums[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += warp_sums[warp];
  return sum;
}

// One partial for every kThreads neurons, whatever W is: how many there are must not depend on the alignment of
// pointers, which cuda_decay_partials() does not know. A block's sum goes into the first of its W, the rest are 0.
template <int W>
SNNFAST_DEVICE void write_decay_partials(const Call& c, double sum) {
  const int64_t i = int64_t(blockIdx.x) * W + threadIdx.x;
  if (threadIdx.x < W && i < decay_partials(c.N)) static_cast<double*>(c.grad_decay_partial)[i] = sum;
}

template <class Neuron, class T, int kT, int kAhead, int W>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const Call c, const Params<typename StateOf<T>::type> params) {
  using R = typename StateOf<T>::type;
  const int64_t n = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * W;
  double grad_decay = 0;
  if (n < c.N) {
    const Params<R> p = with_decay<Neuron>(params, c);
    const auto rows = [&](int64_t t, int64_t count) {
      return Rows<T, W, kAhead, kT != kOpen>(static_cast<const T*>(c.x) + t * c.N + n, c.N, count);
    };
    GradientRows<T, W> sink(c, n);
    if constexpr (kT != kOpen) {
      auto x = rows(0, kT);
      grad_decay = backward_exact<Neuron, T, kT, W>(c, p, n, x, sink);
    } else {
      __shared__ SharedTape<Neuron, R, W> tape;
      grad_decay = backward_open<Neuron, T, kAhead, W>(c, p, n, tape, rows, true, sink);
    }
  }
  if constexpr (Neuron::kLearnable) write_decay_partials<W>(c, block_sum(grad_decay));
}

}  // namespace
}  // namespace snnfast
