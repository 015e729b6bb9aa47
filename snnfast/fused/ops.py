"""Batch norm and neuron as one differentiable function, and the torch ops under it.

``torch.ops.snnfast.bn_statistics``, ``bn_multi_step`` and ``bn_multi_step_backward`` take tensors and numbers only;
``x`` is ``[T, B, C, *]``; statistics are ``[G, C]`` in float64, ``G`` being 1, or ``T`` where each time step has
its own. The normalised input is ``x * scale + shift``, each operation rounded once in the state's dtype (float32,
float64 for float64 input; never bfloat16), and it is the same in every pass.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

from .. import dynamics, ops
from ..backends import native, triton_batch_norm
from ..dynamics import Constants, Inputs
from ..ops import time_major

__all__ = ["Connect", "batch_norm_multi_step", "reference"]

_INPUTS = (
    "Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? v0, Tensor? decay, Tensor? skip, "
    "int connect, float eps, int neuron, int surrogate, int flags, float v_threshold, float v_reset, float tau, "
    "float alpha, float gain, float v_leak, float v_init"
)
_TENSORS = 8


class Connect(enum.IntEnum):
    """Where a residual connection joins (``Connect`` of csrc/dispatch.h)."""

    NONE = 0
    CHARGE = 1
    ADD = 2
    AND = 3
    IAND = 4


_library = torch.library.Library("snnfast", "FRAGMENT")
_library.define("bn_statistics(Tensor x, bool per_step) -> (Tensor mean, Tensor var)")
_library.define(f"bn_multi_step({_INPUTS}) -> (Tensor s, Tensor v)")
_library.define(
    f"bn_multi_step_backward(Tensor? grad_s, Tensor? grad_v, {_INPUTS}, bool batch_statistics) -> "
    "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_v0, Tensor grad_decay, Tensor grad_skip)"
)


def _kernels(x: Tensor) -> Any:
    """The CPU's; and Triton's, which have the same signatures. For the CUDA kernels, gpu.py has ops of its own."""
    return native if x.device.type == "cpu" else triton_batch_norm


def _per_channel(x: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` ``[G, C]`` as the kernels read them: per channel, or per element of ``[C, inner]``."""
    each = _kernels(x).batch_norm_constants(x)
    return values.to(dtype).contiguous() if each == 1 else values.to(dtype).repeat_interleave(each, 1)


def _scale_and_shift(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``[G, C]`` each in float64, ``scale`` with a value of the state's dtype.

    ``shift`` is made from the rounded scale, so that a large mean does not magnify that rounding.
    """
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    scale = scale.to(dynamics.state_dtype(x.dtype)).double()
    shift = mean * scale
    return scale, shift.neg() if bias is None else bias - shift


def _channel_count(x: Tensor, mean: Tensor) -> int:
    """How many elements each mean is of."""
    return x.numel() // max(mean.numel(), 1)


def _statistics(x: Tensor, per_step: bool) -> tuple[Tensor, Tensor]:
    x = time_major(x)
    groups = x.shape[0] if per_step else 1
    first = x[:groups, 0]
    while first.dim() > 2:
        first = first[..., 0]
    first = first.double()
    sums = torch.empty((groups, x.shape[2], 2), dtype=torch.float64, device=x.device)
    _kernels(x).batch_norm_statistics(x, _per_channel(x, first, torch.float64), sums)
    away, square = (sums / (x.numel() // first.numel())).unbind(-1)
    return first + away, (square - away * away).clamp_(min=0)


def _split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Connect, float, Constants]:
    connect, eps, *constants = args[_TENSORS:]
    return args[:_TENSORS], Connect(connect), eps, Constants._make(constants)


def _multi_step(*args: Any) -> tuple[Tensor, Tensor]:
    (x, mean, var, weight, bias, v0, decay, skip), connect, eps, constants = _split(args)
    x = time_major(x)
    dtype = dynamics.state_dtype(x.dtype)
    scale, shift = (_per_channel(x, t, dtype) for t in _scale_and_shift(x, mean, var, weight, bias, eps))
    s, v = torch.empty_like(x), ops._empty_state(x)
    v0, skip = ops._laid_out_as(v0, x[0], dtype), ops._laid_out_as(skip, x, x.dtype)
    _kernels(x).batch_norm_forward(constants, x, v0, decay, scale, shift, skip, connect, s, v)
    return s, v


def _multi_step_backward(*args: Any) -> tuple[Tensor, ...]:
    grad_s, grad_v, *rest, batch_statistics = args
    (x, mean, var, weight, bias, v0, decay, skip), connect, eps, constants = _split(tuple(rest))
    x = time_major(x)
    dtype = dynamics.state_dtype(x.dtype)
    scale, shift = _scale_and_shift(x, mean, var, weight, bias, eps)
    centre = mean.to(dtype)
    grad_x = torch.empty_like(x)
    grad_v0 = None if v0 is None else ops._empty_state(x)
    grad_skip = None
    if connect in (Connect.AND, Connect.IAND) and grad_s is None:
        grad_skip = torch.zeros_like(x)
    elif connect in (Connect.CHARGE, Connect.AND, Connect.IAND):
        grad_skip = torch.empty_like(x)
    sums = torch.empty((*mean.shape, 2), dtype=torch.float64, device=x.device)
    scales, shifts, centres = (_per_channel(x, t, dtype) for t in (scale, shift, centre))
    grad_decay = _kernels(x).batch_norm_backward(
        constants,
        ops._laid_out_as(grad_s, x, x.dtype),
        None if grad_v is None else ops._laid_out_as(grad_v, x[0], dtype),
        x,
        ops._laid_out_as(v0, x[0], dtype),
        decay,
        scales,
        shifts,
        centres,
        batch_statistics,
        None if connect == Connect.ADD else ops._laid_out_as(skip, x, x.dtype),
        connect,
        grad_x,
        grad_v0,
        sums,
        grad_skip,
    )
    rstd = (var + eps).rsqrt()
    sum_g, sum_gx = sums.unbind(-1)
    offcentre = mean - centre  # what rounding the mean left
    sum_gx = sum_gx - offcentre * sum_g
    if batch_statistics:
        count = _channel_count(x, mean)
        slope = scale * rstd * rstd * sum_gx / -count
        offset = scale * sum_g / -count - slope * offcentre
        slopes, offsets = (_per_channel(x, t, dtype) for t in (slope, offset))
        _kernels(x).batch_norm_backward_input(x, scales, centres, slopes, offsets, grad_x)
    if decay is None:
        decay_grad = ops._nothing(x)
    else:  # a tensor on a GPU, which nobody waits for
        decay_grad = grad_decay.to(dtype) if isinstance(grad_decay, Tensor) else torch.full_like(decay, grad_decay)
    grad_weight, grad_bias = (t.sum(0).to(dtype) for t in (sum_gx * rstd, sum_g))
    grad_v0, grad_skip = (ops._nothing(x) if t is None else t for t in (grad_v0, grad_skip))
    return grad_x, grad_weight, grad_bias, grad_v0, decay_grad, grad_skip


_library.impl("bn_statistics", _statistics, "CPU")
_library.impl("bn_multi_step", _multi_step, "CPU")
_library.impl("bn_multi_step_backward", _multi_step_backward, "CPU")


@torch.library.register_fake("snnfast::bn_statistics")
def _statistics_fake(x: Tensor, per_step: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0] if per_step else 1, x.shape[2])
    return x.new_empty(shape, dtype=torch.float64), x.new_empty(shape, dtype=torch.float64)


@torch.library.register_fake("snnfast::bn_multi_step")
def _multi_step_fake(*args: Any) -> tuple[Tensor, Tensor]:
    x = time_major(args[0])
    return torch.empty_like(x), ops._empty_state(x)


@torch.library.register_fake("snnfast::bn_multi_step_backward")
def _multi_step_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    x, v0, decay, connect = time_major(args[2]), args[7], args[8], args[10]
    dtype = dynamics.state_dtype(x.dtype)
    return (
        torch.empty_like(x),
        x.new_empty(x.shape[2], dtype=dtype),
        x.new_empty(x.shape[2], dtype=dtype),
        ops._nothing(x) if v0 is None else ops._empty_state(x),
        ops._nothing(x) if decay is None else torch.empty_like(decay),
        ops._nothing(x) if connect in (Connect.NONE, Connect.ADD) else torch.empty_like(x),
    )


_statistics_op = torch.ops.snnfast.bn_statistics.default
_forward_op = torch.ops.snnfast.bn_multi_step.default
_backward_op = torch.ops.snnfast.bn_multi_step_backward.default


# ---- the same in plain PyTorch ----
def reference(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    v0: Tensor | None,
    decay: Tensor | None,
    skip: Any,
    connect: Connect,
    eps: float,
    constants: Constants,
    per_step: bool = False,
) -> tuple[Tensor, Tensor]:
    """What comes out and the final potential, by differentiable PyTorch operations, all in the state's dtype.

    Without ``mean`` and ``var`` ``[G, C]``, they are those of ``x``.
    """
    x = x.to(dynamics.state_dtype(x.dtype))
    if mean is None or var is None:
        over = [d for d in range(x.dim()) if d != 2 and not (per_step and d == 0)]
        mean, var = x.mean(over, keepdim=True), x.var(over, unbiased=False, keepdim=True)
    else:
        shape = (mean.shape[0], 1, -1) + (1,) * (x.dim() - 3)
        mean, var = mean.to(x.dtype).reshape(shape), var.to(x.dtype).reshape(shape)
    y = (x - mean) * (var + eps).rsqrt()
    channels = (-1,) + (1,) * (x.dim() - 3)
    if weight is not None:
        y = y * weight.to(x.dtype).reshape(channels)
    if bias is not None:
        y = y + bias.to(x.dtype).reshape(channels)
    if connect == Connect.CHARGE:
        y = y + skip.to(x.dtype)
    s, v, _, _ = ops._reference(Inputs(y, v0, None, decay), constants)
    return connected(s, None if skip is None else skip.to(x.dtype), connect), v


def connected(s: Tensor, skip: Any, connect: Connect) -> Tensor:
    """Spikes and a residual connection that meets them; of others, the spikes."""
    if connect == Connect.ADD:
        return s + skip
    if connect == Connect.AND:
        return s * skip
    return (1 - s) * skip if connect == Connect.IAND else s


# ---- autograd ----
class _BatchNormMultiStep(torch.autograd.Function):
    """Saves the norm's input and vectors per channel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        v0: Tensor | None,
        decay: Tensor | None,
        skip: Tensor | None,
        connect: Connect,
        eps: float,
        per_step: bool,
        constants: Constants,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.call = connect, eps, per_step, mean is None, constants
        if mean is None or var is None:
            mean, var = _statistics_op(x, per_step)
        else:
            mean, var = mean.double().reshape(1, -1), var.double().reshape(1, -1)
        s, v = _forward_op(x, mean, var, weight, bias, v0, decay, skip, connect, eps, *constants)
        kept = None if connect == Connect.ADD else skip
        ctx.save_for_backward(x, mean, var, weight, bias, v0, decay, kept)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return s, v, mean, var

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor | None, grad_v: Tensor | None, *_: Any) -> tuple[Any, ...]:
        saved = ops._saved(ctx)
        x, mean, var, weight, bias, v0, decay, skip = saved
        connect, eps, per_step, batch_statistics, constants = ctx.call
        if grad_s is None and grad_v is None:
            return (None,) * 12
        if torch.is_grad_enabled():  # create_graph: the backward must itself be differentiable
            # By aliases: where x or v0 itself comes from the weight, its own graph is walked by whoever called.
            given = tuple(None if t is None else t.view_as(t) for t in (x, weight, bias, v0, decay, skip))
            x, weight, bias, v0, decay, skip = given
            added, connect = connect == Connect.ADD, Connect.NONE if connect == Connect.ADD else connect
            used: tuple[Tensor | None, Tensor | None] = (None, None) if batch_statistics else (mean, var)
            s, v = reference(x, used[0], used[1], weight, bias, v0, decay, skip, connect, eps, constants, per_step)
            outputs = [(y, g.to(y.dtype)) for y, g in ((s, grad_s), (v, grad_v)) if g is not None]
            wanted = [t for t in given if t is not None and t.requires_grad]
            found = torch.autograd.grad(
                [y for y, _ in outputs], wanted, [g for _, g in outputs], create_graph=True, allow_unused=True
            )
            by_input = dict(zip(map(id, wanted), found, strict=True))
            grads = [by_input.get(id(t)) for t in given]
            grad_skip = grad_s if added else grads[5]
            return grads[0], None, None, *grads[1:5], grad_skip, None, None, None, None
        grad_x, grad_weight, grad_bias, grad_v0, grad_decay, grad_skip = _backward_op(
            grad_s, grad_v, *saved, connect, eps, *constants, batch_statistics
        )
        if connect in (Connect.NONE, Connect.ADD):
            grad_skip = None if connect == Connect.NONE else grad_s
        return (
            grad_x,
            None,
            None,
            None if weight is None else grad_weight.to(weight.dtype),
            None if bias is None else grad_bias.to(bias.dtype),
            None if v0 is None else grad_v0,
            None if decay is None else grad_decay,
            grad_skip,
            None,
            None,
            None,
            None,
        )


def batch_norm_multi_step(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    v0: Tensor | None,
    decay: Tensor | None,
    skip: Tensor | None = None,
    connect: Connect = Connect.NONE,
    *,
    eps: float,
    per_step: bool,
    constants: Constants,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch norm of a checked ``x`` ``[T, B, C, *]`` and a neuron: what comes out, final potential, mean and variance.

    What comes out are spikes, or what ``connect`` makes of them and ``skip``, which has the shape and dtype of ``x``.

    ``mean`` and ``var`` ``[C]`` are those to normalise by, ``None`` for those of ``x`` itself; the ones used come back
    as ``[G, C]`` in float64, without a gradient, the variance biased.
    """
    given = (time_major(x), mean, var, weight, bias, v0, decay, skip)
    return _BatchNormMultiStep.apply(*given, connect, eps, per_step, constants)
