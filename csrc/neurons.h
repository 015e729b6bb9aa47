// The dynamics of every neuron, written once for C++ and CUDA: one small struct per neuron.
//
// A neuron has kStates state variables and leaves kTape values per step on a tape, from which the backward pass can
// tell the spike, the surrogate derivative and the state after the step. Each struct provides
//   step(x, state, tape, p)                                   -> spike; state is updated in place
//   after(tape, state, p)                                     -> the state after the step, from its tape alone
//   step_backward(grad_s, grad_state, tape, before, derivative, p, grad_decay)
//                                                             -> grad_x; grad_state goes from after to before
// with tape[0] the potential that is compared with the threshold, and derivative the surrogate's at tape[0] -
// threshold; V is a scalar or a vector of lanes. The forward is the plain PyTorch loop's arithmetic, operation for
// operation, and is compiled without contraction into fused multiply-adds; see docs/numerics.md.
//
// To add a neuron: a struct and a row of SNNFAST_NEURONS here, a step helper in snnfast/backends/triton_kernels.py, an
// entry in snnfast/dynamics.py, and its module in snnfast/neuron.py. The row's number is the entry's `id`.
#pragma once

#include "surrogates.h"

namespace snnfast {
namespace {

enum Flag : int { kDecayInput = 1, kSoftReset = 2, kDetachReset = 4 };

// How a forward division by tau is carried out; each gives the bits of an IEEE division.
enum Division : int {
  kDivide = 0,
  kMultiply = 1,   // tau is a power of two
  kCorrected = 2,  // reciprocal, then one correction; verified for this tau over all mantissas (cpu.cpp)
};

// What is the same for all neurons of a call, in the state's type.
template <class R>
struct Params {
  R threshold;
  R v_reset;  // 0 for soft reset
  R tau;
  R inv_tau;
  R decay;  // learnable 1 / tau
  R alpha;  // of the surrogate
  int surrogate;
  int division;
  bool decay_input;
  bool soft_reset;
  bool detach_reset;
};

// a / tau to the last bit, tau being a float from 1 up that corrected_division_is_exact() has passed. The correction
// needs a residual in the normal range: 0, Inf and NaN are their own quotients, and a lane below 2^-79 sends the whole
// vector to the divider.
template <class V>
SNNFAST_FN V divide_corrected(V a, const Params<float>& p) {
  const V q = a * p.inv_tau;
  const V residual = fused_multiply_add(-q, broadcast<V>(p.tau), a);
  const V corrected = fused_multiply_add(residual, broadcast<V>(p.inv_tau), q);
  const auto magnitude_less_one = (bits_as<typename Lanes<V>::Unsigned>(a) & 0x7fffffffu) - 1u;  // 0 wraps to the top
  if (any_lane_below(magnitude_less_one, 0x18000000u - 1u)) return a / p.tau;
  return select(magnitude_less_one < 0x7f800000u - 1u, corrected, a);
}
template <class V>
SNNFAST_FN V divide_by_tau(V a, const Params<float>& p) {
  if (p.division == kMultiply) return a * p.inv_tau;
  if (p.division == kCorrected) return divide_corrected(a, p);
  return a / p.tau;
}
template <class V>
SNNFAST_FN V divide_by_tau(V a, const Params<double>& p) {
  return p.division == kMultiply ? a * p.inv_tau : a / p.tau;
}

template <class V, class R>
SNNFAST_FN V fire(V h, const Params<R>& p) {
  return select(h >= p.threshold, broadcast<V>(R(1)), V{});
}
// The reset as it is written, not as a select: 0 * Inf must give the loop's NaN.
template <class V, class R>
SNNFAST_FN V reset(V h, V s, const Params<R>& p) {
  if (p.soft_reset) return h - s * p.threshold;
  return s * p.v_reset + (R(1) - s) * h;
}
// The gradient of h from the gradients of the spike and of the state after the reset, and the surrogate derivative.
template <class V, class R>
SNNFAST_FN V fire_and_reset_backward(V grad_s, V grad_v, V h, V derivative, const Params<R>& p) {
  const V s = fire(h, p);
  if (!p.detach_reset) grad_s += grad_v * (p.soft_reset ? broadcast<V>(-p.threshold) : p.v_reset - h);
  const V through_reset = p.soft_reset ? grad_v : grad_v * (R(1) - s);
  return grad_s * derivative + through_reset;
}

// One state v and one tape entry h, which is all that neurons with an instantaneous reset need.
template <class Charge>
struct ChargeFireReset {
  static constexpr int kStates = 1;
  static constexpr int kTape = 1;
  static constexpr bool kLearnable = Charge::kLearnable;
  static constexpr bool kDivides = Charge::kDivides;

  template <class V, class R>
  static SNNFAST_FN V step(V x, V (&state)[1], V (&tape)[1], const Params<R>& p) {
    tape[0] = Charge::charge(x, state[0], p);
    const V s = fire(tape[0], p);
    state[0] = reset(tape[0], s, p);
    return s;
  }
  template <class V, class R>
  static SNNFAST_FN void after(const V (&tape)[1], V (&state)[1], const Params<R>& p) {
    state[0] = reset(tape[0], fire(tape[0], p), p);
  }
  template <class V, class R>
  static SNNFAST_FN V step_backward(V grad_s, V (&grad_state)[1], const V (&tape)[1], const V (&before)[1],
                                    V derivative, const Params<R>& p, V& grad_decay) {
    const V grad_h = fire_and_reset_backward(grad_s, grad_state[0], tape[0], derivative, p);
    return Charge::backward(grad_h, tape[0], before[0], p, grad_state[0], grad_decay);
  }
};

// h = v + x
struct IFCharge {
  static constexpr bool kLearnable = false;
  static constexpr bool kDivides = false;
  template <class V, class R>
  static SNNFAST_FN V charge(V x, V v, const Params<R>&) {
    return v + x;
  }
  template <class V, class R>
  static SNNFAST_FN V backward(V grad_h, V, V, const Params<R>&, V& grad_v, V&) {
    grad_v = grad_h;
    return grad_h;
  }
};

// decay_input: h = v + (x - (v - v_reset)) / tau; else h = v - (v - v_reset) / tau + x
struct LIFCharge {
  static constexpr bool kLearnable = false;
  static constexpr bool kDivides = true;
  template <class V, class R>
  static SNNFAST_FN V charge(V x, V v, const Params<R>& p) {
    if (p.decay_input) return v + divide_by_tau(x - (v - p.v_reset), p);
    return v - divide_by_tau(v - p.v_reset, p) + x;
  }
  template <class V, class R>
  static SNNFAST_FN V backward(V grad_h, V, V, const Params<R>& p, V& grad_v, V&) {
    grad_v = grad_h - grad_h * p.inv_tau;
    return p.decay_input ? grad_h * p.inv_tau : grad_h;
  }
};

// The same with a learnable decay k = sigmoid(w) in place of 1 / tau (Fang et al., ICCV 2021).
struct ParametricLIFCharge {
  static constexpr bool kLearnable = true;
  static constexpr bool kDivides = false;
  template <class V, class R>
  static SNNFAST_FN V charge(V x, V v, const Params<R>& p) {
    if (p.decay_input) return v + (x - (v - p.v_reset)) * p.decay;
    return v - (v - p.v_reset) * p.decay + x;
  }
  template <class V, class R>
  static SNNFAST_FN V backward(V grad_h, V h, V v, const Params<R>& p, V& grad_v, V& grad_decay) {
    grad_v = grad_h - grad_h * p.decay;
    if (!p.decay_input) {
      grad_decay -= grad_h * (v - p.v_reset);
      return grad_h;
    }
    // x - (v - v_reset) is (h - v) / decay; x itself is not read again. A decay of 0 has no gradient through sigmoid.
    if (p.decay != R(0)) grad_decay += grad_h * quotient(h - v, broadcast<V>(p.decay));
    return grad_h * p.decay;
  }
};

using IF = ChargeFireReset<IFCharge>;
using LIF = ChargeFireReset<LIFCharge>;
using ParametricLIF = ChargeFireReset<ParametricLIFCharge>;

#define SNNFAST_NEURONS(X) \
  X(0, IF)                 \
  X(1, LIF)                \
  X(2, ParametricLIF)

}  // namespace
}  // namespace snnfast
