"""The dynamics of every neuron and surrogate in Triton's language: what ``triton_kernels.py`` calls at each time step.

The twin of ``csrc/neurons.h`` and ``csrc/surrogates.h``. A state is a tuple, the potential first; ``own`` is a tuple of
the threshold and of what else may differ from neuron to neuron; ``numbers`` are ``v_reset, v_leak, tau`` and ``rate``,
which is 1 / tau or the learnable decay. A step leaves a tape, a tuple that begins with the potential that is compared
with the threshold, from which the backward pass can tell the state after the step.

The forward is the plain PyTorch loop's arithmetic, operation for operation. Two things of Triton would change its bits:
``/`` on float32, which is an approximate division, and contraction into fused multiply-adds, so kernels are launched
with ``enable_fp_fusion=False``. Neither shows in Triton's interpreter; ``tests/test_triton_compile.py`` reads the PTX.

To add a neuron with a reset in the same step: a branch in ``charge`` and in ``charge_backward``; another kind needs its
own in ``step``, ``after`` and ``step_backward``. To add a surrogate: a branch in ``surrogate_derivative``. The numbers
are the ``id`` of the registries in ``dynamics.py`` and ``surrogate.py``.
"""

# Triton's language: its values have no Python types.
from __future__ import annotations

import triton
import triton.language as tl

from .. import dynamics

# Kernels read globals only if they are constexpr.
DECAY_INPUT = tl.constexpr(dynamics.DECAY_INPUT)
SOFT_RESET = tl.constexpr(dynamics.SOFT_RESET)
DETACH_RESET = tl.constexpr(dynamics.DETACH_RESET)
STRICT = tl.constexpr(dynamics.STRICT)
MULTI_SPIKE = tl.constexpr(dynamics.MULTI_SPIKE)
NO_RESET = tl.constexpr(dynamics.NO_RESET)
CLIPPED = tl.constexpr(dynamics.CLIPPED)
IF = tl.constexpr(dynamics.IF.id)
LIF = tl.constexpr(dynamics.LIF.id)
PARAMETRIC_LIF = tl.constexpr(dynamics.PARAMETRIC_LIF.id)
EXPONENTIAL_LIF = tl.constexpr(dynamics.EXPONENTIAL_LIF.id)
BOX_LIF = tl.constexpr(dynamics.BOX_LIF.id)
CURRENT_LIF = tl.constexpr(dynamics.CURRENT_LIF.id)


def _ids(neurons) -> tl.constexpr:
    """A set of neurons as bits by their ids."""
    return tl.constexpr(sum(1 << n.id for n in neurons))


DECAYS_BY_RATE = _ids((dynamics.LIF, dynamics.PARAMETRIC_LIF))
OWN = _ids(n for n in dynamics.NEURONS if n.own)
WITH_CURRENT = _ids(n for n in dynamics.NEURONS if len(n.states) > 1)
AT_ONCE = _ids((dynamics.LEAKY_AT_ONCE, dynamics.SYNAPTIC_AT_ONCE))
DELAYED = _ids((dynamics.LEAKY, dynamics.LEAKY_AT_ONCE, dynamics.SYNAPTIC, dynamics.SYNAPTIC_AT_ONCE))


# ---- charge ----
@triton.jit
def divide(a, b):
    """a / b, correctly rounded; Triton's ``/`` is that for float64 only."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def over_tau(a, tau, rate, MULTIPLY: tl.constexpr):
    """a / tau; MULTIPLY where tau is a power of two, so that multiplying by ``rate`` = 1 / tau gives the same bits."""
    if MULTIPLY:
        return a * rate
    else:
        return divide(a, tau)


@triton.jit
def charge_lif(x, v, v_reset, tau, rate, FLAGS: tl.constexpr, MULTIPLY: tl.constexpr):
    if DECAY_INPUT & FLAGS:
        return v + over_tau(x - (v - v_reset), tau, rate, MULTIPLY)
    else:
        return v - over_tau(v - v_reset, tau, rate, MULTIPLY) + x


@triton.jit
def charge_exponential_lif(x, v, beta, FLAGS: tl.constexpr):
    if DECAY_INPUT & FLAGS:
        return beta * v + (1.0 - beta) * x
    else:
        return beta * v + x


@triton.jit
def charge(x, v, own, numbers, NEURON: tl.constexpr, FLAGS: tl.constexpr, MULTIPLY: tl.constexpr):
    """The potential before the spike; ``x`` is the input, or the current of the neuron that has one."""
    v_reset, v_leak, tau, rate = numbers
    if NEURON == IF:
        h = v + x
    elif NEURON == LIF:
        h = charge_lif(x, v, v_reset, tau, rate, FLAGS, MULTIPLY)
    elif NEURON == PARAMETRIC_LIF:
        h = charge_lif(x, v, v_reset, tau, rate, FLAGS, True)
    elif NEURON == EXPONENTIAL_LIF:
        h = charge_exponential_lif(x, v, own[1], FLAGS)
    elif NEURON == BOX_LIF:
        h = v + own[1] * ((x + v_leak) - v)
    else:
        tl.static_assert(NEURON == CURRENT_LIF, "this neuron has no Triton kernel")
        h = v + own[1] * ((v_leak - v) + x)
    return h


@triton.jit
def charge_backward(grad_h, h, v, x, own, numbers, total, NEURON: tl.constexpr, FLAGS: tl.constexpr):
    """The gradients of ``x`` and of the state ``v`` before the step, and ``total``, those of the parameters."""
    v_reset, v_leak, _, rate = numbers
    grad_v, grad_x = grad_h, grad_h
    if (DECAYS_BY_RATE >> NEURON) & 1:
        grad_v = grad_h - grad_h * rate
        if DECAY_INPUT & FLAGS:
            grad_x = grad_h * rate
    if NEURON == PARAMETRIC_LIF:
        if DECAY_INPUT & FLAGS:
            # x - (v - v_reset) is (h - v) / decay, and x is gone; ``finish_grad_decay`` divides the sum.
            total = (total[0] + grad_h * (h - v),)
        else:
            total = (total[0] - grad_h * (v - v_reset),)
    elif NEURON == EXPONENTIAL_LIF:
        grad_v = grad_h * own[1]
        if DECAY_INPUT & FLAGS:
            grad_x = grad_h - grad_v
            total = (total[0], total[1] + grad_h * (v - x))
        else:
            total = (total[0], total[1] + grad_h * v)
    elif NEURON == BOX_LIF:
        grad_x = grad_h * own[1]
        grad_v = grad_h - grad_x
        total = (total[0], total[1] + grad_h * ((x + v_leak) - v))
    elif NEURON == CURRENT_LIF:
        grad_x = grad_h * own[1]
        grad_v = grad_h - grad_x
        total = (total[0], total[1] + grad_h * ((v_leak - v) + x), total[2])
    return grad_x, grad_v, total


@triton.jit
def finish_grad_decay(total, decay, FLAGS: tl.constexpr):
    if DECAY_INPUT & FLAGS:
        # A decay of 0 has no gradient through the sigmoid that it comes from.
        return tl.where(decay == 0.0, 0.0, total / decay)
    else:
        return total


# ---- fire and reset ----
@triton.jit
def often(h, threshold):
    """How often the threshold fits into ``h``."""
    times = divide(h, threshold)  # and without its fraction, for which Triton has no function on every target
    times = tl.where(times < 0.0, tl.ceil(times), tl.floor(times))
    return (h > 0.0).to(h.dtype) * times + 0.0  # without -0


@triton.jit
def fire(h, threshold, FLAGS: tl.constexpr):
    if STRICT & FLAGS:
        return (h > threshold).to(h.dtype)
    elif MULTI_SPIKE & FLAGS:
        return often(h, threshold)
    else:
        return (h >= threshold).to(h.dtype)


@triton.jit
def fire_again(h, threshold, FLAGS: tl.constexpr):
    """``fire`` for the backward pass: the same (a difference is 0 only of equals), but the compiler must not know, or
    it keeps spikes and states next to the tape and runs out of registers."""
    if STRICT & FLAGS:
        return (h - threshold > 0.0).to(h.dtype)
    elif MULTI_SPIKE & FLAGS:
        return often(h, threshold)
    else:
        return (h - threshold >= 0.0).to(h.dtype)


@triton.jit
def reset(h, s, threshold, v_reset, FLAGS: tl.constexpr):
    """The reset as it is written, not as a select: 0 * Inf must give the loop's NaN."""
    if SOFT_RESET & FLAGS:
        return h - s * threshold
    else:
        return s * v_reset + (1.0 - s) * h


@triton.jit
def settled(v, numbers, FLAGS: tl.constexpr):
    """The potential after the reset, no lower than ``v_leak`` where that is asked for."""
    if CLIPPED & FLAGS:
        height = v - numbers[1]
        return tl.where(height <= 0.0, 0.0, height) + numbers[1]
    else:
        return v


@triton.jit
def fire_and_reset_backward(grad_s, grad_v, h, s, derivative, threshold, v_reset, FLAGS: tl.constexpr):
    """The gradients of h and of the threshold from those of the spike and of the state after the reset."""
    if SOFT_RESET & FLAGS:
        if not (DETACH_RESET & FLAGS):
            grad_s = grad_s - grad_v * threshold
        through_fire = grad_s * derivative
        return through_fire + grad_v, -(through_fire + grad_v * s)
    else:
        if not (DETACH_RESET & FLAGS):
            grad_s = grad_s + grad_v * (v_reset - h)
        through_fire = grad_s * derivative
        return through_fire + grad_v * (1.0 - s), -through_fire


# ---- snnTorch's neurons: the reset comes a step after the spike, from the potential that the last step left ----
@triton.jit
def delayed_step(x, state, own, NEURON: tl.constexpr, FLAGS: tl.constexpr):
    SUBTRACTS: tl.constexpr = ((NO_RESET | SOFT_RESET) & FLAGS) == SOFT_RESET
    ZEROES: tl.constexpr = ((NO_RESET | SOFT_RESET) & FLAGS) == 0
    v, threshold = state[0], own[0]
    r = (v > threshold).to(v.dtype)
    if (WITH_CURRENT >> NEURON) & 1:
        x = own[2] * state[1] + x
        h = own[1] * v + x
        if ZEROES:
            h = h - h * r
    else:
        if ZEROES:
            v = (1.0 - r) * v
        h = own[1] * v + x
    if SUBTRACTS:
        h = h - r * threshold
    s = fire(h, threshold, FLAGS)
    tape = (h,)
    if (WITH_CURRENT >> NEURON) & 1:
        tape = (h, x)
    if (AT_ONCE >> NEURON) & 1:
        after = h
        if SUBTRACTS:
            after = h - (s - r) * threshold
        elif ZEROES:
            after = h - (s - r) * h
        tape = tape + (after,)
    return s, tape


@triton.jit
def delayed_after(tape, NEURON: tl.constexpr):
    if (WITH_CURRENT >> NEURON) & 1:
        if (AT_ONCE >> NEURON) & 1:
            return (tape[2], tape[1])
        else:
            return (tape[0], tape[1])
    elif (AT_ONCE >> NEURON) & 1:
        return (tape[1],)
    else:
        return (tape[0],)


@triton.jit
def delayed_step_backward(
    grad_s, grad_state, h, before, own, derivative, total, NEURON: tl.constexpr, FLAGS: tl.constexpr
):
    SUBTRACTS: tl.constexpr = ((NO_RESET | SOFT_RESET) & FLAGS) == SOFT_RESET
    ZEROES: tl.constexpr = ((NO_RESET | SOFT_RESET) & FLAGS) == 0
    threshold = own[0]
    r = (before[0] - threshold > 0.0).to(h.dtype)
    grad_h, grad_threshold = grad_state[0], total[0]
    if (AT_ONCE >> NEURON) & 1:
        late = fire_again(h, threshold, FLAGS) - r
        if SUBTRACTS:
            grad_s = grad_s - grad_h * threshold
            grad_threshold -= grad_h * late
        elif ZEROES:
            grad_s = grad_s - grad_h * h
            grad_h = grad_h - grad_h * late
    through_fire = grad_s * derivative
    grad_threshold -= through_fire
    grad_h += through_fire
    if SUBTRACTS:
        grad_threshold -= grad_h * r
    if (WITH_CURRENT >> NEURON) & 1:
        if ZEROES:
            grad_h -= grad_h * r
        grad_x = grad_h + grad_state[1]
        total = (grad_threshold, total[1] + grad_h * before[0], total[2] + grad_x * before[1])
        return grad_x, (grad_h * own[1], grad_x * own[2]), total
    else:
        grad_v = grad_h
        if ZEROES:
            grad_v -= grad_h * r
        total = (grad_threshold, total[1] + grad_v * before[0])
        return grad_h, (grad_v * own[1],), total


# ---- any neuron ----
@triton.jit
def step(x, state, own, numbers, NEURON: tl.constexpr, FLAGS: tl.constexpr, MULTIPLY: tl.constexpr):
    """The spike, the state after the step, and its tape."""
    if (DELAYED >> NEURON) & 1:
        s, tape = delayed_step(x, state, own, NEURON, FLAGS)
        return s, delayed_after(tape, NEURON), tape
    else:
        if NEURON == CURRENT_LIF:
            x = state[1] + x
        h = charge(x, state[0], own, numbers, NEURON, FLAGS, MULTIPLY)
        s = fire(h, own[0], FLAGS)
        v = settled(reset(h, s, own[0], numbers[0], FLAGS), numbers, FLAGS)
        if NEURON == CURRENT_LIF:
            return s, (v, x - own[2] * x), (h, x)
        else:
            return s, (v,), (h,)


@triton.jit
def after(tape, own, numbers, NEURON: tl.constexpr, FLAGS: tl.constexpr):
    """The state after a step, from its tape."""
    if (DELAYED >> NEURON) & 1:
        return delayed_after(tape, NEURON)
    else:
        v = reset(tape[0], fire_again(tape[0], own[0], FLAGS), own[0], numbers[0], FLAGS)
        v = settled(v, numbers, FLAGS)
        if NEURON == CURRENT_LIF:
            return (v, tape[1] - own[2] * tape[1])
        else:
            return (v,)


@triton.jit
def step_backward(
    grad_s, grad_state, x, tape, before, own, numbers, derivative, total, NEURON: tl.constexpr, FLAGS: tl.constexpr
):
    """The gradients of ``x`` and of the state before the step; ``total``, those of the parameters, with this step's.

    ``grad_state`` is that of the state after the step.
    """
    if (DELAYED >> NEURON) & 1:
        return delayed_step_backward(grad_s, grad_state, tape[0], before, own, derivative, total, NEURON, FLAGS)
    else:
        h, threshold, v_reset = tape[0], own[0], numbers[0]
        s = fire_again(h, threshold, FLAGS)
        grad_after = grad_state[0]
        if CLIPPED & FLAGS:
            v = reset(h, s, threshold, v_reset, FLAGS)
            grad_after = tl.where(v - numbers[1] <= 0.0, 0.0, grad_after)
        grad_h, grad_threshold = fire_and_reset_backward(
            grad_s, grad_after, h, s, derivative, threshold, v_reset, FLAGS
        )
        if NEURON == CURRENT_LIF:
            grad_i = grad_state[1]
            total = (total[0] + grad_threshold, total[1], total[2] - grad_i * tape[1])
            grad_x, grad_v, total = charge_backward(grad_h, h, before[0], tape[1], own, numbers, total, NEURON, FLAGS)
            grad_x += grad_i - grad_i * own[2]
            return grad_x, (grad_v, grad_x), total
        else:
            if (OWN >> NEURON) & 1:
                total = (total[0] + grad_threshold, total[1])
            grad_x, grad_v, total = charge_backward(grad_h, h, before[0], x, own, numbers, total, NEURON, FLAGS)
            return grad_x, (grad_v,), total


@triton.jit
def no_gradients(zero, NEURON: tl.constexpr):
    """The gradients of a neuron's parameters before anything is added: as many as it has."""
    if NEURON == PARAMETRIC_LIF:
        return (zero,)
    elif (WITH_CURRENT >> NEURON) & 1:
        return (zero, zero, zero)
    elif (OWN >> NEURON) & 1:
        return (zero, zero)
    else:
        return ()


# ---- surrogates ----
@triton.jit
def literal(value: tl.constexpr, DTYPE: tl.constexpr):
    """A number of the source in full precision: Triton up to 3.3 makes it a float32."""
    return tl.full((), value, DTYPE)


@triton.jit
def surrogate_derivative(u, alpha, half_width, SURROGATE: tl.constexpr):
    """The derivative of a spike by u = h - threshold; half_width is 0.5 / alpha. No exponential can overflow."""
    if SURROGATE == 0:  # Sigmoid
        e = tl.exp(-tl.abs(u * alpha))
        g = e * alpha / ((e + 1.0) * (e + 1.0))
    elif SURROGATE == 1:  # ATan
        scaled = u * (literal(1.57079632679489661923, u.dtype) * alpha)
        g = 0.5 * alpha / (scaled * scaled + 1.0)
    elif SURROGATE == 2:  # PiecewiseQuadratic
        slope = alpha - tl.abs(u) * (alpha * alpha)
        g = tl.where(slope < 0.0, 0.0, slope)
    elif SURROGATE == 3:  # PiecewiseExp
        g = tl.exp(-tl.abs(u * alpha)) * (0.5 * alpha)
    elif SURROGATE == 4:  # SoftSign
        d = tl.abs(u) + 2.0 * half_width
        g = half_width / (d * d)
    elif SURROGATE == 5:  # SuperSpike
        d = tl.abs(u) + 1.0
        g = alpha / (d * d)
    elif SURROGATE == 6:  # Erf
        scaled = u * alpha
        g = tl.exp(-(scaled * scaled)) * (literal(0.56418958354775628695, u.dtype) * alpha)
    else:
        tl.static_assert(SURROGATE == 7, "this surrogate has no Triton kernel")  # Rect
        g = tl.where(tl.abs(u) < half_width, alpha, 0.0)
    return g.to(u.dtype)
