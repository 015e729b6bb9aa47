"""The Triton kernels: all T steps of any registered neuron, forward and backward, one kernel each.

Each program owns ``BLOCK`` neurons and walks through time in chunks whose length is known at compile time: all loads of
a chunk are issued before its first step, and the backward pass keeps the charges of a chunk in registers, as a tuple.
Up to ``T = 32`` there is a single chunk; beyond, ``chunks`` of ``CHUNK`` steps and one of ``REST``, and the backward
pass first stores the state at the start of each chunk.

The forward is the plain PyTorch loop's arithmetic, operation for operation. Two things of Triton would change its bits:
``/`` on float32, which is an approximate division, and contraction into fused multiply-adds, so kernels are launched
with ``enable_fp_fusion=False``. Neither shows in Triton's interpreter; ``tests/test_triton_compile.py`` reads the PTX.

To add a neuron: its charge helpers and a branch in ``charge`` and in ``charge_backward``. To add a surrogate: a branch
in ``surrogate_derivative``. The numbers are the ``id`` of the registries in ``dynamics.py`` and ``surrogate.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import dynamics

# Kernels read globals only if they are constexpr.
DECAY_INPUT = tl.constexpr(dynamics.DECAY_INPUT)
SOFT_RESET = tl.constexpr(dynamics.SOFT_RESET)
DETACH_RESET = tl.constexpr(dynamics.DETACH_RESET)
IF = tl.constexpr(dynamics.IF.id)
LIF = tl.constexpr(dynamics.LIF.id)
PARAMETRIC_LIF = tl.constexpr(dynamics.PARAMETRIC_LIF.id)

# How many steps ahead of its use grad_s is loaded: enough bytes in flight, and few registers.
AHEAD = tl.constexpr(4)


# ---- neurons ----
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
def charge_lif_backward(grad_h, rate, FLAGS: tl.constexpr):
    grad_v = grad_h - grad_h * rate
    if DECAY_INPUT & FLAGS:
        return grad_h * rate, grad_v
    else:
        return grad_h, grad_v


@triton.jit
def parametric_lif_backward_decay(grad_h, h, v, v_reset, FLAGS: tl.constexpr):
    if DECAY_INPUT & FLAGS:
        # x - (v - v_reset) is (h - v) / decay, and x is gone; ``finish_grad_decay`` divides the sum.
        return grad_h * (h - v)
    else:
        return -(grad_h * (v - v_reset))


@triton.jit
def finish_grad_decay(total, decay, FLAGS: tl.constexpr):
    if DECAY_INPUT & FLAGS:
        # A decay of 0 has no gradient through the sigmoid that it comes from.
        return tl.where(decay == 0.0, 0.0, total / decay)
    else:
        return total


@triton.jit
def charge(x, v, v_reset, tau, rate, NEURON: tl.constexpr, FLAGS: tl.constexpr, MULTIPLY: tl.constexpr):
    """The potential before the spike. ``rate`` is 1 / tau, or the learnable decay."""
    if NEURON == IF:
        h = v + x
    elif NEURON == LIF:
        h = charge_lif(x, v, v_reset, tau, rate, FLAGS, MULTIPLY)
    else:
        tl.static_assert(NEURON == PARAMETRIC_LIF, "this neuron has no Triton kernel")
        h = charge_lif(x, v, v_reset, tau, rate, FLAGS, True)
    return h


@triton.jit
def charge_backward(grad_h, h, v, v_reset, rate, NEURON: tl.constexpr, FLAGS: tl.constexpr):
    """The gradients of x, of the state v before the step, and of the learnable decay."""
    grad_decay = tl.zeros_like(grad_h)
    if NEURON == IF:
        grad_x, grad_v = grad_h, grad_h
    else:
        grad_x, grad_v = charge_lif_backward(grad_h, rate, FLAGS)
    if NEURON == PARAMETRIC_LIF:
        grad_decay = parametric_lif_backward_decay(grad_h, h, v, v_reset, FLAGS)
    return grad_x, grad_v, grad_decay


@triton.jit
def fire(h, threshold):
    return (h >= threshold).to(h.dtype)


@triton.jit
def reset(h, s, threshold, v_reset, FLAGS: tl.constexpr):
    """The reset as it is written, not as a select: 0 * Inf must give the loop's NaN."""
    if SOFT_RESET & FLAGS:
        return h - s * threshold
    else:
        return s * v_reset + (1.0 - s) * h


@triton.jit
def fire_and_reset_backward(grad_s, grad_v, h, s, derivative, threshold, v_reset, FLAGS: tl.constexpr):
    """The gradient of h from those of the spike and of the state after the reset."""
    if SOFT_RESET & FLAGS:
        if not (DETACH_RESET & FLAGS):
            grad_s = grad_s - grad_v * threshold
        through_reset = grad_v
    else:
        if not (DETACH_RESET & FLAGS):
            grad_s = grad_s + grad_v * (v_reset - h)
        through_reset = grad_v * (1.0 - s)
    return grad_s * derivative + through_reset


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


# ---- time ----
@triton.jit
def number(value, DTYPE: tl.constexpr):
    """A constant in the state's dtype. Triton makes any Python float a float32, so float64 comes as the bits of one."""
    if tl.float64 == DTYPE:
        return tl.cast(value, tl.int64).to(tl.float64, bitcast=True)
    else:
        return value


@triton.jit
def load_row(pointer, row, lane, mask):
    return tl.load(pointer + row + lane, mask=mask, other=0.0)


@triton.jit
def store_row(pointer, row, lane, mask, values):
    tl.store(pointer + row + lane, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def initial_state(v0_ptr, v_init, lane, mask, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    if v0_ptr is None:
        return tl.full((BLOCK,), v_init, DTYPE)
    else:
        return tl.load(v0_ptr + lane, mask=mask, other=0.0)


@triton.jit
def forward_chunk(
    x_ptr,
    s_ptr,
    v_seq_ptr,
    v,
    row,
    lane,
    mask,
    N,
    threshold,
    v_reset,
    tau,
    rate,
    NEURON: tl.constexpr,
    FLAGS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    STEPS: tl.constexpr,
):
    """STEPS steps from state ``v``; returns the state after them. Without ``s_ptr`` nothing is stored."""
    xs = ()  # as they are: conversion can wait, and half-precision numbers take less room
    for t in tl.static_range(STEPS):
        xs = xs + (load_row(x_ptr, row + t * N, lane, mask),)
    for t in tl.static_range(STEPS):
        h = charge(xs[t].to(v.dtype), v, v_reset, tau, rate, NEURON, FLAGS, MULTIPLY)
        s = fire(h, threshold)
        v = reset(h, s, threshold, v_reset, FLAGS)
        if s_ptr is not None:
            store_row(s_ptr, row + t * N, lane, mask, s)
        if v_seq_ptr is not None:
            store_row(v_seq_ptr, row + t * N, lane, mask, v)
    return v


@triton.jit(do_not_specialize=["chunks", "threshold", "v_reset", "tau", "rate", "v_init"])
def forward_kernel(
    x_ptr,
    v0_ptr,
    decay_ptr,
    # outputs
    s_ptr,
    v_ptr,
    v_seq_ptr,
    # sizes and constants
    N,
    chunks,
    threshold,
    v_reset,
    tau,
    rate,
    v_init,
    NEURON: tl.constexpr,
    FLAGS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    CHUNK: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """T = chunks * CHUNK + REST steps of BLOCK neurons; pointers that are None are not wanted."""
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    threshold, v_reset, tau = number(threshold, DTYPE), number(v_reset, DTYPE), number(tau, DTYPE)
    rate = number(rate, DTYPE) if decay_ptr is None else tl.load(decay_ptr)
    N = tl.cast(N, tl.int64)  # T * N may pass 2^31
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < N
    row = tl.full((), 0, tl.int64)
    v = initial_state(v0_ptr, number(v_init, DTYPE), lane, mask, BLOCK, DTYPE)
    if CHUNK:
        for _ in range(chunks):
            v = forward_chunk(
                x_ptr, s_ptr, v_seq_ptr, v, row, lane, mask, N, threshold, v_reset, tau, rate,
                NEURON, FLAGS, MULTIPLY, CHUNK,
            )  # fmt: skip
            row += CHUNK * N
    v = forward_chunk(
        x_ptr, s_ptr, v_seq_ptr, v, row, lane, mask, N, threshold, v_reset, tau, rate, NEURON, FLAGS, MULTIPLY, REST
    )
    tl.store(v_ptr + lane, v, mask=mask)


@triton.jit
def backward_chunk(
    grad_s_ptr,
    grad_v_seq_ptr,
    x_ptr,
    grad_x_ptr,
    v,
    grad_v,
    grad_decay,
    row,
    lane,
    mask,
    N,
    threshold,
    v_reset,
    tau,
    rate,
    alpha,
    half_width,
    NEURON: tl.constexpr,
    SURROGATE: tl.constexpr,
    FLAGS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    STEPS: tl.constexpr,
):
    """STEPS steps back to state ``v``; returns the gradient of ``v`` and the sum for the decay."""
    xs = ()  # as they are: conversion can wait, and half-precision numbers take less room
    for t in tl.static_range(STEPS):
        xs = xs + (load_row(x_ptr, row + t * N, lane, mask),)
    grads_s = ()  # the last step's first
    if grad_s_ptr is not None:
        for k in tl.static_range(STEPS if STEPS < AHEAD else AHEAD):
            grads_s = grads_s + (load_row(grad_s_ptr, row + (STEPS - 1 - k) * N, lane, mask),)
    hs = ()
    state = v
    for t in tl.static_range(STEPS):
        h = charge(xs[t].to(v.dtype), state, v_reset, tau, rate, NEURON, FLAGS, MULTIPLY)
        state = reset(h, fire(h, threshold), threshold, v_reset, FLAGS)
        hs = hs + (h,)
    for k in tl.static_range(STEPS):
        # The spike is u >= 0 here and h >= threshold above: the same (a difference is 0 only of equals), but the
        # compiler must not know, or it keeps spikes and states next to the charges and runs out of registers.
        h = hs[STEPS - 1 - k]
        u = h - threshold
        before = v
        if k < STEPS - 1:
            h_before = hs[STEPS - 2 - k]
            before = reset(h_before, fire(h_before - threshold, 0.0), threshold, v_reset, FLAGS)
        here = row + (STEPS - 1 - k) * N
        grad_s = tl.zeros_like(h)
        if grad_s_ptr is not None:
            if k + AHEAD < STEPS:
                grads_s = grads_s + (load_row(grad_s_ptr, here - AHEAD * N, lane, mask),)
            grad_s = grads_s[k].to(v.dtype)
        if grad_v_seq_ptr is not None:
            grad_v += load_row(grad_v_seq_ptr, here, lane, mask)
        derivative = surrogate_derivative(u, alpha, half_width, SURROGATE)
        grad_h = fire_and_reset_backward(grad_s, grad_v, h, fire(u, 0.0), derivative, threshold, v_reset, FLAGS)
        grad_x, grad_v, step_grad_decay = charge_backward(grad_h, h, before, v_reset, rate, NEURON, FLAGS)
        grad_decay += step_grad_decay
        store_row(grad_x_ptr, here, lane, mask, grad_x)
    return grad_v, grad_decay


@triton.jit(do_not_specialize=["chunks", "threshold", "v_reset", "tau", "rate", "v_init", "alpha", "half_width"])
def backward_kernel(
    grad_s_ptr,
    grad_v_ptr,
    grad_v_seq_ptr,
    x_ptr,
    v0_ptr,
    decay_ptr,
    # outputs
    grad_x_ptr,
    grad_v0_ptr,
    partial_ptr,
    states_ptr,  # workspace: the state at the start of each chunk
    # sizes and constants
    N,
    chunks,
    threshold,
    v_reset,
    tau,
    rate,
    v_init,
    alpha,
    half_width,
    NEURON: tl.constexpr,
    SURROGATE: tl.constexpr,
    FLAGS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    CHUNK: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the inputs; one partial sum of the decay's gradient per program."""
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    threshold, v_reset, tau = number(threshold, DTYPE), number(v_reset, DTYPE), number(tau, DTYPE)
    alpha, half_width = number(alpha, DTYPE), number(half_width, DTYPE)
    rate = number(rate, DTYPE) if decay_ptr is None else tl.load(decay_ptr)
    N = tl.cast(N, tl.int64)  # T * N may pass 2^31
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < N
    row = tl.full((), 0, tl.int64)
    v = initial_state(v0_ptr, number(v_init, DTYPE), lane, mask, BLOCK, DTYPE)
    if CHUNK:
        for c in range(chunks):
            tl.store(states_ptr + c * N + lane, v, mask=mask)
            v = forward_chunk(
                x_ptr, None, None, v, row, lane, mask, N, threshold, v_reset, tau, rate, NEURON, FLAGS, MULTIPLY, CHUNK
            )
            row += CHUNK * N
        tl.debug_barrier()  # a state may be loaded in another layout, so by another thread, than it was stored in
    grad_decay = tl.zeros((BLOCK,), DTYPE)
    grad_v = grad_decay
    if grad_v_ptr is not None:
        grad_v = tl.load(grad_v_ptr + lane, mask=mask, other=0.0)
    grad_v, grad_decay = backward_chunk(
        grad_s_ptr, grad_v_seq_ptr, x_ptr, grad_x_ptr, v, grad_v, grad_decay, row, lane, mask, N,
        threshold, v_reset, tau, rate, alpha, half_width, NEURON, SURROGATE, FLAGS, MULTIPLY, REST,
    )  # fmt: skip
    if CHUNK:
        for c in range(chunks):
            row -= CHUNK * N
            v = tl.load(states_ptr + (chunks - 1 - c) * N + lane, mask=mask, other=0.0)
            grad_v, grad_decay = backward_chunk(
                grad_s_ptr, grad_v_seq_ptr, x_ptr, grad_x_ptr, v, grad_v, grad_decay, row, lane, mask, N,
                threshold, v_reset, tau, rate, alpha, half_width, NEURON, SURROGATE, FLAGS, MULTIPLY, CHUNK,
            )  # fmt: skip
    if grad_v0_ptr is not None:
        tl.store(grad_v0_ptr + lane, grad_v, mask=mask)
    if partial_ptr is not None:
        total = tl.sum(tl.where(mask, grad_decay, 0.0).to(tl.float64), axis=0)
        tl.store(partial_ptr + tl.program_id(0), finish_grad_decay(total, rate.to(tl.float64), FLAGS))
