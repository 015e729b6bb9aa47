// One call as the kernels see it, and the table of neuron x dtype that cpu.cpp and cuda.cu turn into kernels.
// Surrogate, reset, detach_reset and decay_input stay values at run time (see surrogates.h for why).
#pragma once

#include <stdint.h>

#include "neurons.h"

namespace snnfast {

constexpr int kMaxStates = 2;

enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Shapes: x and everything per time step is [T, N]; states are [N] in float32 (float64 for float64 input). All dense.
struct Call {
  int64_t T, N;
  int neuron, surrogate, flags, dtype, division;
  double threshold, v_reset, tau, alpha, v_init;

  const void* x;
  const void* state[kMaxStates];  // before the first step; null: v_init
  const void* decay;              // 0-d, the state's type; null for neurons without one

  // outputs of the forward
  void* s;
  void* final_state[kMaxStates];
  void* v_seq;  // may be null

  // inputs of the backward; each may be null
  const void* grad_s;
  const void* grad_final_state[kMaxStates];
  const void* grad_v_seq;

  // outputs of the backward
  void* grad_x;
  void* grad_state[kMaxStates];  // may be null
  void* grad_decay_partial;      // [decay_partials()] float64, summed in order by the caller; null without a decay

  void* workspace;    // backward_workspace() bytes, CUDA only
  int threads;        // CPU only
  int stream_stores;  // CPU only: 1 writes past the caches, 0 does not
};

namespace {

template <class R>
SNNFAST_FN Params<R> params_of(const Call& c) {
  Params<R> p;
  p.threshold = R(c.threshold);
  p.v_reset = R(c.v_reset);
  p.tau = R(c.tau);
  p.inv_tau = R(1) / R(c.tau);
  p.decay = c.decay ? *static_cast<const R*>(c.decay) : R(0);
  p.alpha = R(c.alpha);
  p.surrogate = c.surrogate;
  p.division = c.division;
  p.decay_input = c.flags & kDecayInput;
  p.soft_reset = c.flags & kSoftReset;
  p.detach_reset = c.flags & kDetachReset;
  return p;
}

// The state's type for a dtype of the input.
template <class T>
struct StateOf {
  using type = float;
};
template <>
struct StateOf<double> {
  using type = double;
};

}  // namespace
}  // namespace snnfast
