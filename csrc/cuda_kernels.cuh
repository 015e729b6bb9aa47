// The time loop on the GPU, per thread: a thread owns W neighbouring neurons, keeps their state in registers, and walks
// through time. Nothing but memory traffic limits it, so every row that can be in flight is asked for before the first
// step needs it, in accesses of up to 16 bytes.
//
// A kernel exists per neuron, dtype and bucket of T. The exact buckets (T = kSteps known to the compiler) are straight
// lines; the open one takes any T in segments of kSteps, each step replacing the row that it has just used by the one
// kSteps away. The backward recomputes the tape of a segment in registers.
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
constexpr int kSegment = 16;   // steps of the open bucket

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
  for (int i = 0; i < pack.kAccesses; ++i)
    reinterpret_cast<typename Pack<T, W>::Access*>(to)[i] = pack.words[i];
}

// States lie as [N] each; a thread holds them as [W][states].
template <class R, int W, int states>
SNNFAST_DEVICE void load_states(const void* const (&from)[kMaxStates], int64_t n, double initial,
                                R (&state)[W][states]) {
  SNNFAST_UNROLL
  for (int k = 0; k < states; ++k) {
    R lanes[W];
    SNNFAST_UNROLL
    for (int w = 0; w < W; ++w) lanes[w] = R(initial);
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

// ---- dynamics of a thread's neurons ----
template <class Neuron, class R>
SNNFAST_DEVICE Params<R> with_decay(Params<R> p, const Call& c) {
  if constexpr (Neuron::kLearnable) p.decay = *static_cast<const R*>(c.decay);
  return p;
}

// Calls f with the way of dividing known to the compiler: one branch per thread, not one per neuron and step. There is
// no gain here in kCorrected, which is kDivide to the last bit.
template <class Neuron, class R, class F>
SNNFAST_DEVICE void with_known_division(Params<R> p, F f) {
  if (Neuron::kDivides && p.division == kMultiply) {
    p.division = kMultiply;
    f(p);
  } else {
    p.division = kDivide;
    f(p);
  }
}

// Walks the state from step 0 to step T, calling after_step(t, spikes, state) on the way.
template <class Neuron, int kSteps, bool kExact, class T, class R, int W, class F>
SNNFAST_DEVICE void walk(const T* x, int64_t N, int64_t runtime_T, R (&state)[W][Neuron::kStates],
                         const Params<R>& known, F after_step) {
  const int64_t T_ = kExact ? kSteps : runtime_T;
  Pack<T, W> ahead[kSteps];
  SNNFAST_UNROLL
  for (int j = 0; j < kSteps; ++j)
    if (kExact || j < T_) ahead[j] = load<W>(x + j * N);
  with_known_division<Neuron>(known, [&](const Params<R> p) {
    for (int64_t first = 0; first < T_; first += kSteps) {
      SNNFAST_UNROLL
      for (int j = 0; j < kSteps; ++j) {
        const int64_t t = first + j;
        if (!kExact && t >= T_) break;
        R in[W], s[W], tape[Neuron::kTape];
        unpack(ahead[j], in);
        if (!kExact && t + kSteps < T_) ahead[j] = load<W>(x + (t + kSteps) * N);
        SNNFAST_UNROLL
        for (int w = 0; w < W; ++w) s[w] = Neuron::step(in[w], state[w], tape, p);
        after_step(t, s, state);
      }
    }
  });
}

// The switch stands outside the loop over the thread's neurons, or its code would be there W times.
template <class R, int W, int entries>
SNNFAST_DEVICE void surrogate_derivatives(const R (&tape)[W][entries], R (&derivative)[W], const Params<R>& p) {
  switch (p.surrogate) {
#define SNNFAST_CASE(id, Surrogate)                                               \
  case id:                                                                        \
    SNNFAST_UNROLL                                                                \
    for (int w = 0; w < W; ++w)                                                   \
      derivative[w] = Surrogate::derivative(tape[w][0] - p.threshold, p.alpha);   \
    return;
    SNNFAST_SURROGATES(SNNFAST_CASE)
#undef SNNFAST_CASE
  }
  SNNFAST_UNROLL
  for (int w = 0; w < W; ++w) derivative[w] = R(0);
}

// ---- forward ----
template <class Neuron, class T, int kSteps, bool kExact, int W>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const Call c, const Params<typename StateOf<T>::type> params) {
  using R = typename StateOf<T>::type;
  const Params<R> p = with_decay<Neuron>(params, c);
  const int64_t stride = int64_t(gridDim.x) * kThreads * W;
  for (int64_t n = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * W; n < c.N; n += stride) {
    R state[W][Neuron::kStates];
    load_states(c.state, n, c.v_init, state);
    T* const s_out = static_cast<T*>(c.s) + n;
    R* const v_seq = static_cast<R*>(c.v_seq);
    walk<Neuron, kSteps, kExact>(static_cast<const T*>(c.x) + n, c.N, c.T, state, p,
                                 [&](int64_t t, const R(&s)[W], const R(&v)[W][Neuron::kStates]) {
                                   store(s_out + t * c.N, s);
                                   if (v_seq) store_state(v_seq + t * c.N + n, 0, v);
                                 });
    SNNFAST_UNROLL
    for (int k = 0; k < Neuron::kStates; ++k) store_state(static_cast<R*>(c.final_state[k]) + n, k, state);
  }
}

// ---- backward ----
// The state after `segment` whole segments, kept by the first sweep for the second: [segments - 1, states, N].
template <class Neuron, class R>
SNNFAST_DEVICE R* checkpoint(const Call& c, int64_t segment, int k) {
  return static_cast<R*>(c.workspace) + ((segment - 1) * Neuron::kStates + k) * c.N;
}

// All of a thread's backward for the neurons from n on; returns their part of the decay's gradient.
template <class Neuron, class T, int kSteps, bool kExact, int W, class R>
SNNFAST_DEVICE double backward_neurons(const Call& c, const Params<R>& p, int64_t n) {
  constexpr int kStates = Neuron::kStates, kTape = Neuron::kTape;
  const int64_t N = c.N, T_ = kExact ? kSteps : c.T;
  const T* const x = static_cast<const T*>(c.x) + n;
  const T* const grad_s = static_cast<const T*>(c.grad_s);
  const R* const grad_v_seq = static_cast<const R*>(c.grad_v_seq);
  T* const grad_x = static_cast<T*>(c.grad_x) + n;
  const int64_t last = kExact ? 0 : (T_ + kSteps - 1) / kSteps - 1;  // segment

  if (!kExact && last > 0) {
    R state[W][kStates];
    load_states(c.state, n, c.v_init, state);
    walk<Neuron, kSteps, false>(x, N, last * kSteps, state, p,
                                [&](int64_t t, const R(&)[W], const R(&v)[W][kStates]) {
                                  if ((t + 1) % kSteps != 0) return;
                                  SNNFAST_UNROLL
                                  for (int k = 0; k < kStates; ++k)
                                    store_state(checkpoint<Neuron, R>(c, (t + 1) / kSteps, k) + n, k, v);
                                });
  }

  Pack<T, W> x_ahead[kSteps], grad_s_ahead[kSteps];
  SNNFAST_UNROLL
  for (int j = 0; j < kSteps; ++j)
    if (kExact || last * kSteps + j < T_) x_ahead[j] = load<W>(x + (last * kSteps + j) * N);
  SNNFAST_UNROLL
  for (int j = kSteps - 1; j >= 0; --j)
    if (grad_s && (kExact || last * kSteps + j < T_))
      grad_s_ahead[j] = load<W>(grad_s + (last * kSteps + j) * N + n);
  R grad_state[W][kStates];
  load_states(c.grad_final_state, n, 0.0, grad_state);

  double grad_decay_sum = 0;
  for (int64_t segment = last; segment >= 0; --segment) {
    const int64_t first = segment * kSteps;
    R start[W][kStates], tape[kSteps][W][kTape];
    const void* from[kMaxStates];
    SNNFAST_UNROLL
    for (int k = 0; k < kStates; ++k) from[k] = segment > 0 ? checkpoint<Neuron, R>(c, segment, k) : c.state[k];
    load_states(from, n, c.v_init, start);

    with_known_division<Neuron>(p, [&](const Params<R> known) {
      R state[W][kStates];
      memcpy(state, start, sizeof(state));
      SNNFAST_UNROLL
      for (int j = 0; j < kSteps; ++j) {
        if (!kExact && first + j >= T_) break;
        R in[W];
        unpack(x_ahead[j], in);
        SNNFAST_UNROLL
        for (int w = 0; w < W; ++w) Neuron::step(in[w], state[w], tape[j][w], known);
      }
    });

    R grad_decay = 0;
    SNNFAST_UNROLL
    for (int j = kSteps - 1; j >= 0; --j) {
      const int64_t t = first + j;
      if (kExact || t < T_) {
        R grad_s_in[W] = {}, grad_x_out[W], derivative[W];
        if (grad_s) unpack(grad_s_ahead[j], grad_s_in);
        if (grad_v_seq) {
          R grad_v[W];
          unpack(load<W>(grad_v_seq + t * N + n), grad_v);
          SNNFAST_UNROLL
          for (int w = 0; w < W; ++w) grad_state[w][0] += grad_v[w];
        }
        surrogate_derivatives(tape[j], derivative, p);
        SNNFAST_UNROLL
        for (int w = 0; w < W; ++w) {
          R before[kStates] = {};
          if constexpr (Neuron::kLearnable) {
            if (j > 0)
              Neuron::after(tape[j > 0 ? j - 1 : 0][w], before, p);
            else
              memcpy(before, start[w], sizeof(before));
          }
          grad_x_out[w] =
              Neuron::step_backward(grad_s_in[w], grad_state[w], tape[j][w], before, derivative[w], p, grad_decay);
        }
        store(grad_x + t * N, grad_x_out);
      }
      if (!kExact && segment > 0) {
        x_ahead[j] = load<W>(x + (t - kSteps) * N);
        if (grad_s) grad_s_ahead[j] = load<W>(grad_s + (t - kSteps) * N + n);
      }
    }
    grad_decay_sum += grad_decay;
  }
  SNNFAST_UNROLL
  for (int k = 0; k < kStates; ++k)
    if (c.grad_state[k]) store_state(static_cast<R*>(c.grad_state[k]) + n, k, grad_state);
  return grad_decay_sum;
}

// The block's sum, in an order that depends on nothing but the block; valid in thread 0.
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

template <class Neuron, class T, int kSteps, bool kExact, int W>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const Call c, const Params<typename StateOf<T>::type> params) {
  using R = typename StateOf<T>::type;
  const Params<R> p = with_decay<Neuron>(params, c);
  const int64_t stride = int64_t(gridDim.x) * kThreads * W;
  double grad_decay = 0;
  for (int64_t n = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * W; n < c.N; n += stride)
    grad_decay += backward_neurons<Neuron, T, kSteps, kExact, W>(c, p, n);
  if constexpr (Neuron::kLearnable) {
    grad_decay = block_sum(grad_decay);
    if (threadIdx.x == 0) static_cast<double*>(c.grad_decay_partial)[blockIdx.x] = grad_decay;
  }
}

}  // namespace
}  // namespace snnfast
