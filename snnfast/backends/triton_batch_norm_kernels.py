"""Batch norm and neuron in one in Triton's language; :mod:`snnfast.backends.triton_batch_norm` launches them.

A step of ``x`` is ``[rows, period]`` in memory, ``period`` being ``channels * inner``, and a program owns a block of BR
rows and BC columns of it; where sums are taken it goes down several such blocks. The neuron's step is that of
``triton_dynamics.py`` on blocks in place of lanes, so what this module adds is what comes before and after: the
normalised input ``x * scale + shift``, a residual connection, and sums over channels in float64.
"""

# Triton's language: its values have no Python types.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .triton_dynamics import (
    after,
    finish_grad_decay,
    fire_again,
    no_gradients,
    step,
    step_backward,
    surrogate_derivative,
)
from .triton_kernels import AHEAD, number

# Where a residual connection joins: Connect of csrc/dispatch.h.
CHARGE, ADD, AND, IAND = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)


# ---- memory ----
@triton.jit
def columns_of(tile, period, inner, BC: tl.constexpr):
    """The program's columns, which of them there are, and their channels."""
    column = tile * BC + tl.arange(0, BC)
    return column, column < period, column // inner


@triton.jit
def block_of(row, rows, column, column_mask, period, BR: tl.constexpr):
    """Where the neurons of BR rows lie in a step, and which of them there are."""
    row = row + tl.arange(0, BR)
    return row.to(tl.int64)[:, None] * period + column[None, :], (row < rows)[:, None] & column_mask[None, :]


@triton.jit
def load_block(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0)


@triton.jit
def store_block(pointer, at, mask, values):
    tl.store(pointer + at, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_or(pointer, value, at, mask, BR: tl.constexpr, BC: tl.constexpr, DTYPE: tl.constexpr):
    if pointer is None:
        return tl.full((BR, BC), value, DTYPE)
    else:
        return tl.load(pointer + at, mask=mask, other=0.0)


@triton.jit
def constant(pointer, t, channels, channel, column_mask, GROUPS: tl.constexpr):
    """A constant of each column at step ``t``; without GROUPS all steps have the same."""
    if GROUPS:
        pointer += t * channels
    return tl.load(pointer + channel, mask=column_mask, other=0.0)[None, :]


@triton.jit
def store_partial(pointer, chunk, tile, tiles, column, column_mask, period, first, second, FOLD: tl.constexpr):
    """A chunk's two sums: of each column, or of all of them where they are one channel's."""
    if FOLD:
        pointer += (chunk.to(tl.int64) * tiles + tile) * 2
        tl.store(pointer, tl.sum(first, axis=0))
        tl.store(pointer + 1, tl.sum(second, axis=0))
    else:
        pointer += (chunk.to(tl.int64) * period + column) * 2
        tl.store(pointer, first, mask=column_mask)
        tl.store(pointer + 1, second, mask=column_mask)


# ---- statistics ----
@triton.jit
def sums_kernel(
    x_ptr,
    from_ptr,
    grad_ptr,
    # outputs
    partial_ptr,
    # sizes
    rows,
    period,
    inner,
    channels,
    tiles,
    chunks,
    rows_each,
    FOLD: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Two sums for each chunk of ``x`` ``[groups, rows, period]``: of ``x - from`` and of its square, or of a gradient
    and of its product with ``x - from``."""
    tile, down = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    chunk, group = down % chunks, down // chunks
    column, column_mask, channel = columns_of(tile, period, inner, BC)
    minus = tl.load(from_ptr + group * channels + channel, mask=column_mask, other=0.0)[None, :]
    start = group.to(tl.int64) * rows * period
    first, second = tl.zeros((BC,), tl.float64), tl.zeros((BC,), tl.float64)
    for row in range(chunk * rows_each, min(chunk * rows_each + rows_each, rows), BR):
        at, mask = block_of(row, rows, column, column_mask, period, BR)
        away = tl.where(mask, load_block(x_ptr, start + at, mask).to(tl.float64) - minus, 0.0)
        value = away
        if grad_ptr is not None:
            value = load_block(grad_ptr, start + at, mask).to(tl.float64)
        first += tl.sum(value, axis=0)
        second += tl.sum(value * away, axis=0)
    store_partial(partial_ptr, down, tile, tiles, column, column_mask, period, first, second, FOLD)


# ---- forward ----
@triton.jit
def charging(x, skip, scale, shift, CONNECT: tl.constexpr):
    """The normalised input, each operation rounded once, and what a residual connection adds to it."""
    y = x.to(scale.dtype) * scale + shift
    if CONNECT == CHARGE:
        y += skip.to(scale.dtype)
    return y


@triton.jit
def connect(s, skip, CONNECT: tl.constexpr):
    """What comes out of the spikes."""
    if CONNECT == ADD:
        return s + skip.to(s.dtype)
    elif CONNECT == AND:
        return s * skip.to(s.dtype)
    elif CONNECT == IAND:
        return (1.0 - s) * skip.to(s.dtype)
    else:
        return s


@triton.jit
def load_steps(pointer, instead, t0, at, mask, N, STEPS: tl.constexpr):
    """The rows of STEPS steps, or something else to hand on where there is no pointer, which nobody reads."""
    if pointer is None:
        return instead
    else:
        rows = ()  # as they are: conversion can wait, and half-precision numbers take less room
        for t in tl.static_range(STEPS):
            rows = rows + (load_block(pointer + (t0 + t) * N, at, mask),)
        return rows


@triton.jit
def forward_chunk(
    x_ptr,
    skip_ptr,
    s_ptr,
    state,
    t0,
    at,
    mask,
    N,
    scale_ptr,
    shift_ptr,
    channels,
    channel,
    column_mask,
    own,
    numbers,
    NEURON: tl.constexpr,
    FLAGS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    CONNECT: tl.constexpr,
    GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """STEPS steps from step ``t0`` and ``state``; returns the state after them. Without ``s_ptr`` nothing is stored."""
    xs = load_steps(x_ptr, None, t0, at, mask, N, STEPS)
    skips = load_steps(skip_ptr, xs, t0, at, mask, N, STEPS)
    scale = constant(scale_ptr, t0, channels, channel, column_mask, GROUPS)
    shift = constant(shift_ptr, t0, channels, channel, column_mask, GROUPS)
    for t in tl.static_range(STEPS):
        if GROUPS and t > 0:
            scale = constant(scale_ptr, t0 + t, channels, channel, column_mask, GROUPS)
            shift = constant(shift_ptr, t0 + t, channels, channel, column_mask, GROUPS)
        y = charging(xs[t], skips[t], scale, shift, CONNECT)
        s, state, _ = step(y, state, own, numbers, NEURON, FLAGS, MULTIPLY)
        if s_ptr is not None:
            store_block(s_ptr + (t0 + t) * N, at, mask, connect(s, skips[t], CONNECT))
    return state


@triton.jit(do_not_specialize=["chunks", "threshold", "v_reset", "v_leak", "tau", "rate", "v_init"])
def forward_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    v0_ptr,
    decay_ptr,
    skip_ptr,
    # outputs
    s_ptr,
    v_ptr,
    # sizes and constants
    rows,
    period,
    inner,
    channels,
    tiles,
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
    CONNECT: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    REST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """T = chunks * CHUNK + REST steps of a block of neurons."""
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    N = tl.cast(rows, tl.int64) * period
    column, column_mask, channel = columns_of(tl.program_id(0) % tiles, period, inner, BC)
    at, mask = block_of(tl.program_id(0) // tiles * BR, rows, column, column_mask, period, BR)
    rate = number(rate, DTYPE) if decay_ptr is None else tl.load(decay_ptr)
    numbers = (number(v_reset, DTYPE), number(v_leak, DTYPE), number(tau, DTYPE), rate)
    own = (number(threshold, DTYPE),)
    state = (load_or(v0_ptr, number(v_init, DTYPE), at, mask, BR, BC, DTYPE),)
    t = tl.full((), 0, tl.int64)
    if CHUNK:
        for _ in range(chunks):
            state = forward_chunk(
                x_ptr, skip_ptr, s_ptr, state, t, at, mask, N, scale_ptr, shift_ptr, channels, channel, column_mask,
                own, numbers, NEURON, FLAGS, MULTIPLY, CONNECT, GROUPS, CHUNK,
            )  # fmt: skip
            t += CHUNK
    state = forward_chunk(
        x_ptr, skip_ptr, s_ptr, state, t, at, mask, N, scale_ptr, shift_ptr, channels, channel, column_mask,
        own, numbers, NEURON, FLAGS, MULTIPLY, CONNECT, GROUPS, REST,
    )  # fmt: skip
    store_block(v_ptr, at, mask, state[0])


# ---- backward ----
@triton.jit
def connect_backward(grad, s, skip, CONNECT: tl.constexpr):
    """From the gradient of what comes out: that of the spikes, and that of the skip."""
    through = grad * skip.to(grad.dtype)
    if CONNECT == IAND:
        return -through, grad * (1.0 - s)
    else:
        return through, grad * s


@triton.jit
def backward_chunk(
    grad_s_ptr,
    x_ptr,
    skip_ptr,
    grad_x_ptr,
    grad_skip_ptr,
    state,
    grad_state,
    total,
    sums,
    t0,
    at,
    mask,
    N,
    scale_ptr,
    shift_ptr,
    centre_ptr,
    channels,
    channel,
    column_mask,
    own,
    numbers,
    shape,
    NEURON: tl.constexpr,
    SURROGATE: tl.constexpr,
    FLAGS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    CONNECT: tl.constexpr,
    GROUPS: tl.constexpr,
    SCALED: tl.constexpr,
    STEPS: tl.constexpr,
):
    """STEPS steps back to step ``t0`` and ``state``; returns the gradient of ``state``, ``total`` and ``sums``."""
    MEETS: tl.constexpr = CONNECT >= AND
    alpha, half_width, gain = shape
    xs = load_steps(x_ptr, None, t0, at, mask, N, STEPS)
    skips = load_steps(skip_ptr if CONNECT == CHARGE else None, xs, t0, at, mask, N, STEPS)
    grads_s = ()  # the last step's first
    if grad_s_ptr is not None:
        for k in tl.static_range(STEPS if STEPS < AHEAD else AHEAD):
            grads_s = grads_s + (load_block(grad_s_ptr + (t0 + STEPS - 1 - k) * N, at, mask),)
    scale = constant(scale_ptr, t0, channels, channel, column_mask, GROUPS)
    shift = constant(shift_ptr, t0, channels, channel, column_mask, GROUPS)
    ys = ()
    tapes = ()
    now = state
    for t in tl.static_range(STEPS):
        if GROUPS and t > 0:
            scale = constant(scale_ptr, t0 + t, channels, channel, column_mask, GROUPS)
            shift = constant(shift_ptr, t0 + t, channels, channel, column_mask, GROUPS)
        y = charging(xs[t], skips[t], scale, shift, CONNECT)
        ys = ys + (y,)
        _, now, tape = step(y, now, own, numbers, NEURON, FLAGS, MULTIPLY)
        tapes = tapes + (tape,)
    centre = constant(centre_ptr, t0, channels, channel, column_mask, GROUPS)
    for t in tl.static_range(STEPS - 1, -1, -1):
        tape = tapes[t]
        before = state
        if t > 0:
            before = after(tapes[t - 1], own, numbers, NEURON, FLAGS)
        grad_s = tl.zeros_like(tape[0])
        if grad_s_ptr is not None:
            if t >= AHEAD:
                grads_s = grads_s + (load_block(grad_s_ptr + (t0 + t - AHEAD) * N, at, mask),)
            grad_s = grads_s[STEPS - 1 - t].to(tape[0].dtype)
            if MEETS:
                s = fire_again(tape[0], own[0], FLAGS)
                skip = load_block(skip_ptr + (t0 + t) * N, at, mask)
                grad_s, grad_skip = connect_backward(grad_s, s, skip, CONNECT)
                store_block(grad_skip_ptr + (t0 + t) * N, at, mask, grad_skip)
        derivative = gain * surrogate_derivative(tape[0] - own[0], alpha, half_width, SURROGATE)
        g, grad_state, total = step_backward(
            grad_s, grad_state, ys[t], tape, before, own, numbers, derivative, total, NEURON, FLAGS
        )
        if CONNECT == CHARGE:
            store_block(grad_skip_ptr + (t0 + t) * N, at, mask, g)
        store_block(grad_x_ptr + (t0 + t) * N, at, mask, g * scale if SCALED else g)
        if not GROUPS:
            g = tl.where(mask, g, 0.0)
            x = xs[t]
            if STEPS > AHEAD:  # near by still; registers are for the tape
                x = load_block(x_ptr + (t0 + t) * N, at, mask)
            product = tl.where(mask, g * (x.to(g.dtype) - centre), 0.0)
            sums = (sums[0] + g, sums[1] + product)
    return grad_state, total, sums


@triton.jit(
    do_not_specialize=[
        "chunks", "threshold", "v_reset", "v_leak", "tau", "rate", "v_init", "alpha", "half_width", "gain",
    ]
)  # fmt: skip
def backward_kernel(
    grad_s_ptr,
    grad_v_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    centre_ptr,
    v0_ptr,
    decay_ptr,
    skip_ptr,
    # outputs
    grad_x_ptr,
    grad_v0_ptr,
    grad_skip_ptr,
    partial_ptr,
    decay_partial_ptr,
    states_ptr,  # workspace: the state at the start of each chunk
    # sizes and constants
    rows,
    period,
    inner,
    channels,
    tiles,
    rows_each,
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
    CONNECT: tl.constexpr,
    GROUPS: tl.constexpr,
    SCALED: tl.constexpr,
    FOLD: tl.constexpr,
    CHUNK: tl.constexpr,
    REST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """The gradient ``g`` of the normalised input in ``grad_x`` (times ``scale`` if SCALED), and for each chunk of rows
    the sums of ``g`` and of ``g * (x - centre)``; with GROUPS, which is never SCALED, none."""
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    N = tl.cast(rows, tl.int64) * period
    tile, down = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    column, column_mask, channel = columns_of(tile, period, inner, BC)
    rate = number(rate, DTYPE) if decay_ptr is None else tl.load(decay_ptr)
    numbers = (number(v_reset, DTYPE), number(v_leak, DTYPE), number(tau, DTYPE), rate)
    shape = (number(alpha, DTYPE), number(half_width, DTYPE), number(gain, DTYPE))
    own = (number(threshold, DTYPE),)
    start = number(v_init, DTYPE)
    first, second = tl.zeros((BC,), tl.float64), tl.zeros((BC,), tl.float64)
    sum_decay = tl.full((), 0.0, tl.float64)
    for row in range(down * rows_each, min(down * rows_each + rows_each, rows), BR):
        at, mask = block_of(row, rows, column, column_mask, period, BR)
        state = (load_or(v0_ptr, start, at, mask, BR, BC, DTYPE),)
        t = tl.full((), 0, tl.int64)
        if CHUNK:
            for c in range(chunks):
                store_block(states_ptr + c * N, at, mask, state[0])
                state = forward_chunk(
                    x_ptr, skip_ptr, None, state, t, at, mask, N, scale_ptr, shift_ptr, channels, channel, column_mask,
                    own, numbers, NEURON, FLAGS, MULTIPLY, CONNECT, GROUPS, CHUNK,
                )  # fmt: skip
                t += CHUNK
            tl.debug_barrier()  # a state may be loaded in another layout, so by another thread, than it was stored in
        zero = tl.zeros((BR, BC), DTYPE)
        total = no_gradients(zero, NEURON)
        sums = (zero, zero)
        grad_state = (load_or(grad_v_ptr, 0.0, at, mask, BR, BC, DTYPE),)
        grad_state, total, sums = backward_chunk(
            grad_s_ptr, x_ptr, skip_ptr, grad_x_ptr, grad_skip_ptr, state, grad_state, total, sums, t, at, mask, N,
            scale_ptr, shift_ptr, centre_ptr, channels, channel, column_mask, own, numbers, shape, NEURON,
            SURROGATE, FLAGS, MULTIPLY, CONNECT, GROUPS, SCALED, REST,
        )  # fmt: skip
        if CHUNK:
            for c in range(chunks):
                t -= CHUNK
                state = (load_block(states_ptr + (chunks - 1 - c) * N, at, mask),)
                grad_state, total, sums = backward_chunk(
                    grad_s_ptr, x_ptr, skip_ptr, grad_x_ptr, grad_skip_ptr, state, grad_state, total, sums, t, at,
                    mask, N, scale_ptr, shift_ptr, centre_ptr, channels, channel, column_mask, own, numbers,
                    shape, NEURON, SURROGATE, FLAGS, MULTIPLY, CONNECT, GROUPS, SCALED, CHUNK,
                )  # fmt: skip
        if grad_v0_ptr is not None:
            store_block(grad_v0_ptr, at, mask, grad_state[0])
        first += tl.sum(sums[0].to(tl.float64), axis=0)
        second += tl.sum(sums[1].to(tl.float64), axis=0)
        if decay_partial_ptr is not None:  # only ParametricLIF has one
            sum_decay += tl.sum(tl.sum(tl.where(mask, total[0], 0.0).to(tl.float64), axis=0), axis=0)
    if not GROUPS:
        store_partial(partial_ptr, down, tile, tiles, column, column_mask, period, first, second, FOLD)
    if decay_partial_ptr is not None:
        tl.store(decay_partial_ptr + tl.program_id(0), finish_grad_decay(sum_decay, rate.to(tl.float64), FLAGS))


@triton.jit
def backward_input_kernel(
    x_ptr,
    scale_ptr,
    centre_ptr,
    slope_ptr,
    offset_ptr,
    # output, and input
    grad_x_ptr,
    # sizes
    rows,
    period,
    inner,
    channels,
    tiles,
    steps_down,
    GROUPS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """``g`` in ``grad_x`` becomes ``g * scale + (x - centre) * slope + offset``; ``steps_down`` programs a step."""
    tile, down = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    t = (down // steps_down).to(tl.int64)
    column, column_mask, channel = columns_of(tile, period, inner, BC)
    at, mask = block_of(down % steps_down * BR, rows, column, column_mask, period, BR)
    at += t * rows * period
    scale = constant(scale_ptr, t, channels, channel, column_mask, GROUPS)
    centre = constant(centre_ptr, t, channels, channel, column_mask, GROUPS)
    away = load_block(x_ptr, at, mask).to(scale.dtype) - centre
    through = away * constant(slope_ptr, t, channels, channel, column_mask, GROUPS)
    through += constant(offset_ptr, t, channels, channel, column_mask, GROUPS)
    g = load_block(grad_x_ptr, at, mask).to(scale.dtype)
    store_block(grad_x_ptr, at, mask, g * scale + through)
