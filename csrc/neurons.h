// The dynamics of every neuron, written once for C++ and CUDA: one small struct per neuron.
//
// A neuron has kStates state variables, the potential first, and leaves kTape values per step on a tape, from which the
// backward pass can tell the spike, the surrogate derivative and the state after the step. kOwn parameters may differ
// from neuron to neuron (see Own). Each struct provides
//   step(x, state, tape, own, p)                              -> spike; state is updated in place
//   after(tape, state, own, p)                                -> the state after the step, from its tape alone
//   step_backward(grad_s, grad_state, tape, before, derivative, own, p, grads)
//                                                             -> grad_x; grad_state goes from after to before
// with tape[0] the potential that is compared with the threshold, and derivative the surrogate's at tape[0] -
// threshold; V is a scalar or a vector of lanes. `before`, the state before the step, is filled in only where
// kNeedsBefore says so. The forward is the plain PyTorch loop's arithmetic, operation for operation, and is compiled
// without contraction into fused multiply-adds; see docs/numerics.md.
//
// To add a neuron: a struct and a row of SNNFAST_NEURONS here, a step helper in snnfast/backends/triton_dynamics.py, an
// entry in snnfast/dynamics.py, and its module in snnfast/neuron.py. The row's number is the entry's `id`.
#pragma once

#include "surrogates.h"

namespace snnfast {
namespace {

enum Flag : int {
  kDecayInput = 1,
  kSoftReset = 2,
  kDetachReset = 4,
  kStoreVSeq = 8,
  kStrict = 16,
  kMultiSpike = 32,
  kNoReset = 64,
  kConstantInput = 128,  // x and grad_x have one step, which stands for all: cpu_constant_input.h, and nothing else
  kClipped = 256         // v_leak is the lowest potential that a step leaves
};

// The parameters that may differ from neuron to neuron, and have gradients.
enum Own : int { kThreshold = 0, kBeta = 1, kCurrentDecay = 2 };
constexpr int kMaxOwn = 3;

// How a forward division by tau is carried out; each gives the bits of an IEEE division.
enum Division : int {
  kDivide = 0,
  kMultiply = 1,   // tau is a power of two
  kCorrected = 2,  // multiplications by 1 / tau and what its rounding left; verified for this tau (cpu.cpp)
};

// On a GPU the flags are known only when a kernel runs. nvcc would compute every case for each neuron and step and then
// choose (19 instructions for LIF's charge, spike and reset in place of 9), so arithmetic stands there that serves all
// cases. On the CPU they are constants around the loops over neurons.
#ifdef SNNFAST_GPU
constexpr bool kFlagsAtRunTime = true;
#else
constexpr bool kFlagsAtRunTime = false;
#endif

// What is the same for all neurons of a call, in the state's type.
template <class R>
struct Params {
  R threshold;
  R fire_at;  // the threshold, or the next number above it where a spike needs more than the threshold
  R v_reset;  // 0 for soft reset
  R v_leak;   // where the potential goes without input; with `clipped` its lowest value
  R tau;
  R inv_tau;
  R inv_tau_rest;  // 1 / tau - inv_tau
  R decay;         // learnable 1 / tau
  R kept;          // what a step keeps of the potential: 1 - 1 / tau or 1 - decay, for gradients
  R alpha;         // of the surrogate
  R gain;          // a factor on its derivative
  // For kFlagsAtRunTime. A neuron's potential is h + quiet, and where it fired that * fired_factor + fired_term.
  R quiet, fired_factor, fired_term;
  R clear_at;      // from this h on no gradient passes the reset; NaN where it is soft
  R input_factor;  // grad_x by grad_h
  int surrogate;
  int division;
  bool decay_input;
  bool soft_reset;
  bool zero_reset;  // a hard reset to 0 by single spikes: a term less, which shows in a zero's sign and nowhere else
  bool detach_reset;
  bool strict;
  bool multi_spike;
  bool resets;
  bool clipped;
};

// Where a backward step adds the gradients of parameters.
template <class V>
struct ParameterGradients {
  V decay;
  V own[kMaxOwn];
};

// a / tau to the last bit, for a tau that corrected_division_is_exact() has passed: a multiplication by 1 / tau, which
// is kept as the sum of two floats. Zeros and Inf are their own quotients; where the product with the smaller float
// loses bits by underflow, the whole vector goes to the divider. Those are rare, so one test comes before all of that.
template <class V>
SNNFAST_FN V divide_corrected(V a, const Params<float>& p) {
  const V rest = a * p.inv_tau_rest;
  const V quotient = fused_multiply_add(a, broadcast<V>(p.inv_tau), rest);
  if (!any_lane_zero_or_infinite(rest)) return quotient;
  using Unsigned = typename Lanes<V>::Unsigned;
  const auto magnitude = bits_as<Unsigned>(a) & 0x7fffffffu, of_rest = bits_as<Unsigned>(rest) & 0x7fffffffu;
  if (any_lane((of_rest < 0x00800000u) & (magnitude != 0u))) return a / p.tau;
  return select(magnitude - 1u < 0x7f800000u - 1u, quotient, a);
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

// The reset as it is written, not as a select: 0 * Inf must give the loop's NaN.
template <class V, class R>
SNNFAST_FN V reset(V h, V s, V threshold, const Params<R>& p) {
  if (p.soft_reset) return h - s * threshold;
  if (p.zero_reset) return (R(1) - s) * h;
  return s * p.v_reset + (R(1) - s) * h;
}

// The same for all kinds of reset; 0 * Inf is NaN here too.
template <class V, class R>
SNNFAST_FN V reset_without_branches(V h, const Params<R>& p) {
  const V v = h + p.quiet;
  return select(h >= p.fire_at, v * p.fired_factor + p.fired_term, v);
}

// What a charge can be built from. Most have the threshold of the call and keep nothing but h.
struct SimpleCharge {
  static constexpr bool kLearnable = false;
  static constexpr bool kDivides = false;
  static constexpr bool kKeepsInput = false;  // whether its backward reads x
  static constexpr bool kClips = false;       // whether a call may ask for a lowest potential
  static constexpr int kOwn = 0;
};
struct OwnCharge : SimpleCharge {
  static constexpr bool kKeepsInput = true;
  static constexpr bool kStrict = false;
  static constexpr int kOwn = 2;
};

// Charge, fire, reset at once: one state v and one tape entry h, and x for a charge that needs it.
template <class Charge>
struct ChargeFireReset {
  static constexpr int kStates = 1;
  static constexpr int kTape = Charge::kKeepsInput ? 2 : 1;
  static constexpr int kOwn = Charge::kOwn;
  static constexpr bool kLearnable = Charge::kLearnable;
  static constexpr bool kDivides = Charge::kDivides;
  static constexpr bool kNeedsBefore = kLearnable || kOwn > 0;

  template <class V, class R>
  static SNNFAST_FN V threshold(const V (&own)[kMaxOwn], const Params<R>& p) {
    if constexpr (kOwn > 0) return own[kThreshold];
    return broadcast<V>(p.threshold);
  }
  template <class V, class R>
  static SNNFAST_FN V fire(V h, const V (&own)[kMaxOwn], const Params<R>& p) {
    const V one = broadcast<V>(R(1));
    if constexpr (kOwn > 0) {
      if (Charge::kStrict || p.strict) return select(h > own[kThreshold], one, V{});
      if (p.multi_spike) return select(h > R(0), one, V{}) * truncate(h / own[kThreshold]) + V{};  // + V{}: no -0
      return select(h >= own[kThreshold], one, V{});
    }
    return select(h >= p.fire_at, one, V{});
  }
  // The potential after the reset, no lower than p.v_leak where that is asked for: relu(v - lowest) + lowest.
  template <class V, class R>
  static SNNFAST_FN V settled(V v, const Params<R>& p) {
    if constexpr (Charge::kClips)
      if (p.clipped) {
        const V height = v - p.v_leak;
        return select(height <= R(0), V{}, height) + p.v_leak;
      }
    return v;
  }
  template <class V, class R>
  static SNNFAST_FN V step(V x, V (&state)[1], V (&tape)[kTape], const V (&own)[kMaxOwn], const Params<R>& p) {
    tape[0] = Charge::charge(x, state[0], own, p);
    if constexpr (Charge::kKeepsInput) tape[1] = x;
    const V s = fire(tape[0], own, p);
    state[0] = after_spike(tape[0], s, own, p);
    return s;
  }
  template <class V, class R>
  static SNNFAST_FN V after_spike(V h, V s, const V (&own)[kMaxOwn], const Params<R>& p) {
    if constexpr (kFlagsAtRunTime && kOwn == 0) return reset_without_branches(h, p);
    return settled(reset(h, s, threshold(own, p), p), p);
  }
  template <class V, class R>
  static SNNFAST_FN void after(const V (&tape)[kTape], V (&state)[1], const V (&own)[kMaxOwn], const Params<R>& p) {
    state[0] = after_spike(tape[0], fire(tape[0], own, p), own, p);
  }
  template <class V, class R>
  static SNNFAST_FN V step_backward(V grad_s, V (&grad_state)[1], const V (&tape)[kTape], const V (&before)[1],
                                    V derivative, const V (&own)[kMaxOwn], const Params<R>& p,
                                    ParameterGradients<V>& grads) {
    V grad_v = grad_state[0];
    if constexpr (Charge::kClips)
      if (p.clipped) {
        const V v = reset(tape[0], fire(tape[0], own, p), threshold(own, p), p);
        grad_v = select(v - p.v_leak <= R(0), V{}, grad_v);
      }
    const V grad_h = fire_and_reset_backward(grad_s, grad_v, tape[0], derivative, own, p, grads);
    const V x = Charge::kKeepsInput ? tape[kTape - 1] : V{};
    return Charge::backward(grad_h, tape[0], before[0], x, own, p, grad_state[0], grads);
  }
  // The gradient of h from those of the spike and of the state after the reset, and the surrogate derivative.
  template <class V, class R>
  static SNNFAST_FN V fire_and_reset_backward(V grad_s, V grad_v, V h, V derivative, const V (&own)[kMaxOwn],
                                              const Params<R>& p, ParameterGradients<V>& grads) {
    if constexpr (kFlagsAtRunTime && kOwn == 0) {
      const V by_spike = select(p.soft_reset, broadcast<V>(-p.threshold), p.v_reset - h);
      grad_s = select(p.detach_reset, grad_s, multiply_add(grad_v, by_spike, grad_s));
      return multiply_add(grad_s, derivative, select(h >= p.clear_at, V{}, grad_v));
    }
    if (!p.detach_reset) {
      const V by_spike = p.soft_reset ? -threshold(own, p) : broadcast<V>(p.v_reset) - h;
      grad_s = multiply_add(grad_v, by_spike, grad_s);
    }
    if constexpr (kOwn > 0) {
      const V s = fire(h, own, p), through_fire = grad_s * derivative;
      grads.own[kThreshold] -= p.soft_reset ? through_fire + grad_v * s : through_fire;
      return through_fire + (p.soft_reset ? grad_v : grad_v * (R(1) - s));
    }
    return multiply_add(grad_s, derivative, p.soft_reset ? grad_v : select(h >= p.fire_at, V{}, grad_v));
  }
};

// h = v + x
struct IFCharge : SimpleCharge {
  template <class V, class R>
  static SNNFAST_FN V charge(V x, V v, const V (&)[kMaxOwn], const Params<R>&) {
    return v + x;
  }
  template <class V, class R>
  static SNNFAST_FN V backward(V grad_h, V, V, V, const V (&)[kMaxOwn], const Params<R>&, V& grad_v,
                               ParameterGradients<V>&) {
    grad_v = grad_h;
    return grad_h;
  }
};

template <class V, class R>
SNNFAST_FN V v_minus_rest(V v, const Params<R>& p) {
  return !kFlagsAtRunTime && (p.soft_reset || p.zero_reset) ? v : v - p.v_reset;
}

// decay_input: h = v + (x - (v - v_reset)) / tau; else h = v - (v - v_reset) / tau + x
struct LIFCharge : SimpleCharge {
  static constexpr bool kDivides = true;
  template <class V, class R>
  static SNNFAST_FN V charge(V x, V v, const V (&)[kMaxOwn], const Params<R>& p) {
    const V leaked = v_minus_rest(v, p);
    if (p.decay_input) return v + divide_by_tau(x - leaked, p);
    return v - divide_by_tau(leaked, p) + x;
  }
  template <class V, class R>
  static SNNFAST_FN V backward(V grad_h, V, V, V, const V (&)[kMaxOwn], const Params<R>& p, V& grad_v,
                               ParameterGradients<V>&) {
    grad_v = grad_h * p.kept;
    if constexpr (kFlagsAtRunTime) return grad_h * p.input_factor;
    return p.decay_input ? grad_h * p.inv_tau : grad_h;
  }
};

// The same with a learnable decay k = sigmoid(w) in place of 1 / tau (Fang et al., ICCV 2021).
struct ParametricLIFCharge : SimpleCharge {
  static constexpr bool kLearnable = true;
  template <class V, class R>
  static SNNFAST_FN V charge(V x, V v, const V (&)[kMaxOwn], const Params<R>& p) {
    const V leaked = v_minus_rest(v, p);
    if (p.decay_input) return v + (x - leaked) * p.decay;
    return v - leaked * p.decay + x;
  }
  template <class V, class R>
  static SNNFAST_FN V backward(V grad_h, V h, V v, V, const V (&)[kMaxOwn], const Params<R>& p, V& grad_v,
                               ParameterGradients<V>& grads) {
    grad_v = grad_h * p.kept;
    if constexpr (kFlagsAtRunTime) {
      grads.decay += grad_h * select(p.decay_input, (h - v) * p.tau, p.v_reset - v);
      return grad_h * p.input_factor;
    }
    if (!p.decay_input) {
      grads.decay -= grad_h * (v - p.v_reset);
      return grad_h;
    }
    // x - (v - v_reset) is (h - v) / decay; x itself is not read again. A decay of 0 has no gradient through sigmoid.
    if (p.decay != R(0)) grads.decay += grad_h * quotient(h - v, broadcast<V>(p.decay));
    return grad_h * p.decay;
  }
};

// sinabs' LIF: h = beta v + (1 - beta) x with decay_input, else beta v + x; its IAF with beta = 1.
struct ExponentialLIFCharge : OwnCharge {
  static constexpr bool kClips = true;
  template <class V, class R>
  static SNNFAST_FN V charge(V x, V v, const V (&own)[kMaxOwn], const Params<R>& p) {
    return own[kBeta] * v + (p.decay_input ? (R(1) - own[kBeta]) * x : x);
  }
  template <class V, class R>
  static SNNFAST_FN V backward(V grad_h, V, V v, V x, const V (&own)[kMaxOwn], const Params<R>& p, V& grad_v,
                               ParameterGradients<V>& grads) {
    grad_v = grad_h * own[kBeta];
    grads.own[kBeta] += grad_h * (p.decay_input ? v - x : v);
    return p.decay_input ? grad_h - grad_v : grad_h;
  }
};

// Norse's LIFBox: h = v + beta ((x + v_leak) - v)
struct BoxLIFCharge : OwnCharge {
  static constexpr bool kStrict = true;
  template <class V, class R>
  static SNNFAST_FN V charge(V x, V v, const V (&own)[kMaxOwn], const Params<R>& p) {
    return v + own[kBeta] * ((x + p.v_leak) - v);
  }
  template <class V, class R>
  static SNNFAST_FN V backward(V grad_h, V, V v, V x, const V (&own)[kMaxOwn], const Params<R>& p, V& grad_v,
                               ParameterGradients<V>& grads) {
    const V grad_x = grad_h * own[kBeta];
    grad_v = grad_h - grad_x;
    grads.own[kBeta] += grad_h * ((x + p.v_leak) - v);
    return grad_x;
  }
};

using IF = ChargeFireReset<IFCharge>;
using LIF = ChargeFireReset<LIFCharge>;
using ParametricLIF = ChargeFireReset<ParametricLIFCharge>;
using ExponentialLIF = ChargeFireReset<ExponentialLIFCharge>;
using BoxLIF = ChargeFireReset<BoxLIFCharge>;

// Norse's LIF: i += x; h = v + beta ((v_leak - v) + i); fire; reset; i -= current_decay i. The tape has h and the
// current before its decay.
struct CurrentLIF {
  static constexpr int kStates = 2;
  static constexpr int kTape = 2;
  static constexpr int kOwn = 3;
  static constexpr bool kLearnable = false;
  static constexpr bool kDivides = false;
  static constexpr bool kNeedsBefore = true;
  using Box = BoxLIF;  // the same firing and reset

  template <class V, class R>
  static SNNFAST_FN V step(V x, V (&state)[2], V (&tape)[2], const V (&own)[kMaxOwn], const Params<R>& p) {
    tape[1] = state[1] + x;
    tape[0] = state[0] + own[kBeta] * ((p.v_leak - state[0]) + tape[1]);
    after(tape, state, own, p);
    return Box::fire(tape[0], own, p);
  }
  template <class V, class R>
  static SNNFAST_FN void after(const V (&tape)[2], V (&state)[2], const V (&own)[kMaxOwn], const Params<R>& p) {
    state[0] = reset(tape[0], Box::fire(tape[0], own, p), own[kThreshold], p);
    state[1] = tape[1] - own[kCurrentDecay] * tape[1];
  }
  template <class V, class R>
  static SNNFAST_FN V step_backward(V grad_s, V (&grad_state)[2], const V (&tape)[2], const V (&before)[2],
                                    V derivative, const V (&own)[kMaxOwn], const Params<R>& p,
                                    ParameterGradients<V>& grads) {
    const V grad_h = Box::fire_and_reset_backward(grad_s, grad_state[0], tape[0], derivative, own, p, grads);
    grads.own[kBeta] += grad_h * ((p.v_leak - before[0]) + tape[1]);
    grads.own[kCurrentDecay] -= grad_state[1] * tape[1];
    const V into_h = grad_h * own[kBeta];
    grad_state[0] = grad_h - into_h;
    grad_state[1] = grad_state[1] - grad_state[1] * own[kCurrentDecay] + into_h;
    return grad_state[1];
  }
};

// snnTorch's neurons: r = [v > threshold] of the potential that the last step left, without a gradient;
//   soft: h = beta v + in - r threshold; hard: Leaky beta ((1 - r) v) + in, Synaptic (beta v + in) (1 - r);
// fire where h exceeds the threshold. The potential stays h, so the next step resets it; or, with kAtOnce (snnTorch's
// reset_delay=False), becomes h - (s - r) threshold or h - (s - r) h. `in` is x, or the current decay * i + x.
template <bool kCurrent, bool kAtOnce>
struct DelayedReset {
  static constexpr int kStates = kCurrent ? 2 : 1;
  static constexpr int kTape = 1 + kCurrent + kAtOnce;  // h, the current, the potential after the step
  static constexpr int kOwn = kCurrent ? 3 : 2;
  static constexpr bool kLearnable = false;
  static constexpr bool kDivides = false;
  static constexpr bool kNeedsBefore = true;

  template <class V, class R>
  static SNNFAST_FN V exceeds(V v, V threshold, const Params<R>&) {
    return select(v > threshold, broadcast<V>(R(1)), V{});
  }
  template <class V, class R>
  static SNNFAST_FN V step(V x, V (&state)[kStates], V (&tape)[kTape], const V (&own)[kMaxOwn], const Params<R>& p) {
    const V r = exceeds(state[0], own[kThreshold], p);
    V v = state[0];
    if constexpr (kCurrent) x = tape[1] = own[kCurrentDecay] * state[1] + x;
    if (!kCurrent && p.resets && !p.soft_reset) v = (R(1) - r) * v;
    V h = own[kBeta] * v + x;
    if (kCurrent && p.resets && !p.soft_reset) h = h - h * r;
    if (p.resets && p.soft_reset) h = h - r * own[kThreshold];
    const V s = exceeds(h, own[kThreshold], p);
    tape[0] = h;
    if constexpr (kAtOnce) {
      if (p.resets) h = h - (s - r) * (p.soft_reset ? own[kThreshold] : h);
      tape[kTape - 1] = h;
    }
    after(tape, state, own, p);
    return s;
  }
  template <class V, class R>
  static SNNFAST_FN void after(const V (&tape)[kTape], V (&state)[kStates], const V (&)[kMaxOwn], const Params<R>&) {
    state[0] = tape[kAtOnce ? kTape - 1 : 0];
    if constexpr (kCurrent) state[1] = tape[1];
  }
  template <class V, class R>
  static SNNFAST_FN V step_backward(V grad_s, V (&grad_state)[kStates], const V (&tape)[kTape],
                                    const V (&before)[kStates], V derivative, const V (&own)[kMaxOwn],
                                    const Params<R>& p, ParameterGradients<V>& grads) {
    const V h = tape[0], r = exceeds(before[0], own[kThreshold], p);
    V grad_h = grad_state[0];
    if (kAtOnce && p.resets) {
      const V late = exceeds(h, own[kThreshold], p) - r;
      grad_s -= grad_h * (p.soft_reset ? own[kThreshold] : h);
      if (p.soft_reset)
        grads.own[kThreshold] -= grad_h * late;
      else
        grad_h -= grad_h * late;
    }
    const V through_fire = grad_s * derivative;
    grads.own[kThreshold] -= through_fire;
    grad_h += through_fire;
    if (p.resets && p.soft_reset) grads.own[kThreshold] -= grad_h * r;
    const bool zeroes = p.resets && !p.soft_reset;
    if (kCurrent && zeroes) grad_h -= grad_h * r;
    V grad_in = grad_h, grad_v = grad_h;
    if (!kCurrent && zeroes) grad_v -= grad_v * r;
    grads.own[kBeta] += grad_v * before[0];
    grad_state[0] = grad_v * own[kBeta];
    if constexpr (kCurrent) {
      grad_in += grad_state[1];
      grads.own[kCurrentDecay] += grad_in * before[1];
      grad_state[1] = grad_in * own[kCurrentDecay];
    }
    return grad_in;
  }
};

using Leaky = DelayedReset<false, false>;
using LeakyAtOnce = DelayedReset<false, true>;
using Synaptic = DelayedReset<true, false>;
using SynapticAtOnce = DelayedReset<true, true>;

#define SNNFAST_NEURONS(X) \
  X(0, IF)                 \
  X(1, LIF)                \
  X(2, ParametricLIF)      \
  X(3, ExponentialLIF)     \
  X(4, BoxLIF)             \
  X(5, CurrentLIF)         \
  X(6, Leaky)              \
  X(7, LeakyAtOnce)        \
  X(8, Synaptic)           \
  X(9, SynapticAtOnce)

}  // namespace
}  // namespace snnfast
