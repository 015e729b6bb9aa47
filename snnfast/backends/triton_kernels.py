"""The Triton kernels: all T steps of any registered neuron, forward and backward, one kernel each.

Each program owns ``BLOCK`` neurons and walks through time in chunks whose length is known at compile time: all loads of
a chunk are issued before its first step, and the backward pass keeps the tape of a chunk in registers, as a tuple.
Up to ``T = 32`` there is a single chunk; beyond, ``chunks`` of ``CHUNK`` steps and one of ``REST``, and the backward
pass first stores the state at the start of each chunk.

What happens within a step is in ``triton_dynamics.py``, which also says what ``own`` and ``numbers`` are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_dynamics import (
    OWN,
    WITH_CURRENT,
    after,
    finish_grad_decay,
    no_gradients,
    step,
    step_backward,
    surrogate_derivative,
)

# How many steps ahead of its use grad_s is loaded: enough bytes in flight, and few registers.
AHEAD = tl.constexpr(4)


# ---- memory ----
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
def load_or(pointer, value, lane, mask, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """One number per neuron, or ``value`` for all where there is no pointer."""
    if pointer is None:
        return tl.full((BLOCK,), value, DTYPE)
    else:
        return tl.load(pointer + lane, mask=mask, other=0.0)


@triton.jit
def load_state(v_ptr, i_ptr, v_init, lane, mask, NEURON: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    v = load_or(v_ptr, v_init, lane, mask, BLOCK, DTYPE)
    if (WITH_CURRENT >> NEURON) & 1:
        return (v, load_or(i_ptr, 0.0, lane, mask, BLOCK, DTYPE))
    else:
        return (v,)


@triton.jit
def load_one_or_each(pointer, lane, mask, EACH: tl.constexpr):
    """A parameter: one number for all neurons, or one for each."""
    if EACH:
        return tl.load(pointer + lane, mask=mask, other=0.0)
    else:
        return tl.load(pointer)


@triton.jit
def load_own(
    threshold, threshold_ptr, beta_ptr, current_decay_ptr, lane, mask, NEURON: tl.constexpr, EACH: tl.constexpr
):
    """What may differ from neuron to neuron; EACH has a bit for each that does."""
    if (OWN >> NEURON) & 1:
        own = (
            load_one_or_each(threshold_ptr, lane, mask, EACH & 1),
            load_one_or_each(beta_ptr, lane, mask, EACH & 2),
        )
        if (WITH_CURRENT >> NEURON) & 1:
            own = own + (load_one_or_each(current_decay_ptr, lane, mask, EACH & 4),)
        return own
    else:
        return (threshold,)


@triton.jit
def store_wanted(pointer, lane, mask, values):
    if pointer is not None:
        tl.store(pointer + lane, values, mask=mask)


@triton.jit
def store_state(v_ptr, i_ptr, lane, mask, state, NEURON: tl.constexpr):
    store_wanted(v_ptr, lane, mask, state[0])
    if (WITH_CURRENT >> NEURON) & 1:
        store_wanted(i_ptr, lane, mask, state[1])


# ---- time ----
@triton.jit
def forward_chunk(
    x_ptr,
    s_ptr,
    v_seq_ptr,
    state,
    row,
    lane,
    mask,
    N,
    own,
    numbers,
    NEURON: tl.constexpr,
    FLAGS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    STEPS: tl.constexpr,
):
    """STEPS steps from ``state``; returns the state after them. Without ``s_ptr`` nothing is stored."""
    xs = ()  # as they are: conversion can wait, and half-precision numbers take less room
    for t in tl.static_range(STEPS):
        xs = xs + (load_row(x_ptr, row + t * N, lane, mask),)
    for t in tl.static_range(STEPS):
        s, state, _ = step(xs[t].to(state[0].dtype), state, own, numbers, NEURON, FLAGS, MULTIPLY)
        if s_ptr is not None:
            store_row(s_ptr, row + t * N, lane, mask, s)
        if v_seq_ptr is not None:
            store_row(v_seq_ptr, row + t * N, lane, mask, state[0])
    return state


@triton.jit(do_not_specialize=["chunks", "threshold", "v_reset", "v_leak", "tau", "rate", "v_init"])
def forward_kernel(
    x_ptr,
    v0_ptr,
    i0_ptr,
    decay_ptr,
    threshold_ptr,
    beta_ptr,
    current_decay_ptr,
    # outputs
    s_ptr,
    v_ptr,
    i_ptr,
    v_seq_ptr,
    # sizes and constants
    N,
    chunks,
    threshold,
    v_reset,
    v_leak,
    tau,
    rate,
    v_init,
    NEURON: tl.constexpr,
    FLAGS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    EACH: tl.constexpr,
    CHUNK: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """T = chunks * CHUNK + REST steps of BLOCK neurons; pointers that are None are not wanted."""
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    N = tl.cast(N, tl.int64)  # T * N may pass 2^31
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < N
    row = tl.full((), 0, tl.int64)
    rate = number(rate, DTYPE) if decay_ptr is None else tl.load(decay_ptr)
    numbers = (number(v_reset, DTYPE), number(v_leak, DTYPE), number(tau, DTYPE), rate)
    own = load_own(number(threshold, DTYPE), threshold_ptr, beta_ptr, current_decay_ptr, lane, mask, NEURON, EACH)
    state = load_state(v0_ptr, i0_ptr, number(v_init, DTYPE), lane, mask, NEURON, BLOCK, DTYPE)
    if CHUNK:
        for _ in range(chunks):
            state = forward_chunk(
                x_ptr, s_ptr, v_seq_ptr, state, row, lane, mask, N, own, numbers, NEURON, FLAGS, MULTIPLY, CHUNK
            )
            row += CHUNK * N
    state = forward_chunk(
        x_ptr, s_ptr, v_seq_ptr, state, row, lane, mask, N, own, numbers, NEURON, FLAGS, MULTIPLY, REST
    )
    store_state(v_ptr, i_ptr, lane, mask, state, NEURON)


@triton.jit
def backward_chunk(
    grad_s_ptr,
    grad_v_seq_ptr,
    x_ptr,
    grad_x_ptr,
    state,
    grad_state,
    total,
    row,
    lane,
    mask,
    N,
    own,
    numbers,
    shape,
    NEURON: tl.constexpr,
    SURROGATE: tl.constexpr,
    FLAGS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    STEPS: tl.constexpr,
):
    """STEPS steps back to ``state``; returns the gradient of ``state`` and ``total``, those of the parameters."""
    alpha, half_width, gain = shape
    xs = ()  # as they are: conversion can wait, and half-precision numbers take less room
    for t in tl.static_range(STEPS):
        xs = xs + (load_row(x_ptr, row + t * N, lane, mask),)
    grads_s = ()  # the last step's first
    if grad_s_ptr is not None:
        for k in tl.static_range(STEPS if STEPS < AHEAD else AHEAD):
            grads_s = grads_s + (load_row(grad_s_ptr, row + (STEPS - 1 - k) * N, lane, mask),)
    tapes = ()
    now = state
    for t in tl.static_range(STEPS):
        _, now, tape = step(xs[t].to(state[0].dtype), now, own, numbers, NEURON, FLAGS, MULTIPLY)
        tapes = tapes + (tape,)
    for k in tl.static_range(STEPS):
        tape = tapes[STEPS - 1 - k]
        before = state
        if k < STEPS - 1:
            before = after(tapes[STEPS - 2 - k], own, numbers, NEURON, FLAGS)
        here = row + (STEPS - 1 - k) * N
        grad_s = tl.zeros_like(tape[0])
        if grad_s_ptr is not None:
            if k + AHEAD < STEPS:
                grads_s = grads_s + (load_row(grad_s_ptr, here - AHEAD * N, lane, mask),)
            grad_s = grads_s[k].to(tape[0].dtype)
        if grad_v_seq_ptr is not None:
            grad_state = (grad_state[0] + load_row(grad_v_seq_ptr, here, lane, mask),) + grad_state[1:]
        derivative = gain * surrogate_derivative(tape[0] - own[0], alpha, half_width, SURROGATE)
        x = xs[STEPS - 1 - k].to(tape[0].dtype)
        grad_x, grad_state, total = step_backward(
            grad_s, grad_state, x, tape, before, own, numbers, derivative, total, NEURON, FLAGS
        )
        store_row(grad_x_ptr, here, lane, mask, grad_x)
    return grad_state, total


@triton.jit(
    do_not_specialize=[
        "chunks", "threshold", "v_reset", "v_leak", "tau", "rate", "v_init", "alpha", "half_width", "gain",
    ]
)  # fmt: skip
def backward_kernel(
    grad_s_ptr,
    grad_v_ptr,
    grad_i_ptr,
    grad_v_seq_ptr,
    x_ptr,
    v0_ptr,
    i0_ptr,
    decay_ptr,
    threshold_ptr,
    beta_ptr,
    current_decay_ptr,
    # outputs
    grad_x_ptr,
    grad_v0_ptr,
    grad_i0_ptr,
    partial_ptr,
    grad_threshold_ptr,
    grad_beta_ptr,
    grad_current_decay_ptr,
    states_ptr,  # workspace: the state at the start of each chunk
    # sizes and constants
    N,
    chunks,
    threshold,
    v_reset,
    v_leak,
    tau,
    rate,
    v_init,
    alpha,
    half_width,
    gain,
    NEURON: tl.constexpr,
    SURROGATE: tl.constexpr,
    FLAGS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    EACH: tl.constexpr,
    CHUNK: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the inputs: the decay's as one partial sum per program, other parameters' for each neuron."""
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    N = tl.cast(N, tl.int64)  # T * N may pass 2^31
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < N
    row = tl.full((), 0, tl.int64)
    rate = number(rate, DTYPE) if decay_ptr is None else tl.load(decay_ptr)
    numbers = (number(v_reset, DTYPE), number(v_leak, DTYPE), number(tau, DTYPE), rate)
    shape = (number(alpha, DTYPE), number(half_width, DTYPE), number(gain, DTYPE))
    own = load_own(number(threshold, DTYPE), threshold_ptr, beta_ptr, current_decay_ptr, lane, mask, NEURON, EACH)
    state = load_state(v0_ptr, i0_ptr, number(v_init, DTYPE), lane, mask, NEURON, BLOCK, DTYPE)
    currents = chunks.to(tl.int64) * N  # where in the workspace the second state begins
    if CHUNK:
        for c in range(chunks):
            store_state(states_ptr + c * N, states_ptr + currents + c * N, lane, mask, state, NEURON)
            state = forward_chunk(
                x_ptr, None, None, state, row, lane, mask, N, own, numbers, NEURON, FLAGS, MULTIPLY, CHUNK
            )
            row += CHUNK * N
        tl.debug_barrier()  # a state may be loaded in another layout, so by another thread, than it was stored in
    total = no_gradients(tl.zeros((BLOCK,), DTYPE), NEURON)
    grad_state = load_state(grad_v_ptr, grad_i_ptr, 0.0, lane, mask, NEURON, BLOCK, DTYPE)
    grad_state, total = backward_chunk(
        grad_s_ptr, grad_v_seq_ptr, x_ptr, grad_x_ptr, state, grad_state, total, row, lane, mask, N,
        own, numbers, shape, NEURON, SURROGATE, FLAGS, MULTIPLY, REST,
    )  # fmt: skip
    if CHUNK:
        for c in range(chunks):
            row -= CHUNK * N
            here = states_ptr + (chunks - 1 - c) * N
            state = load_state(here, here + currents, 0.0, lane, mask, NEURON, BLOCK, DTYPE)
            grad_state, total = backward_chunk(
                grad_s_ptr, grad_v_seq_ptr, x_ptr, grad_x_ptr, state, grad_state, total, row, lane, mask, N,
                own, numbers, shape, NEURON, SURROGATE, FLAGS, MULTIPLY, CHUNK,
            )  # fmt: skip
    store_state(grad_v0_ptr, grad_i0_ptr, lane, mask, grad_state, NEURON)
    if (OWN >> NEURON) & 1:
        store_wanted(grad_threshold_ptr, lane, mask, total[0])
        store_wanted(grad_beta_ptr, lane, mask, total[1])
        if (WITH_CURRENT >> NEURON) & 1:
            store_wanted(grad_current_decay_ptr, lane, mask, total[2])
    if partial_ptr is not None:  # only ParametricLIF has one
        sum_decay = tl.sum(tl.where(mask, total[0], 0.0).to(tl.float64), axis=0)
        tl.store(partial_ptr + tl.program_id(0), finish_grad_decay(sum_decay, rate.to(tl.float64), FLAGS))
