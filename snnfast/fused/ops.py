"""Batch norm and neuron as one differentiable function, and the torch ops under it.

``torch.ops.snnfast.bn_statistics``, ``bn_multi_step`` and ``bn_multi_step_backward`` take tensors and numbers only;
``x`` is ``[T, B, C, *]``; statistics are ``[G, C]`` in float64, ``G`` being 1, or ``T`` where each time step has
its own. The normalised input is ``x * scale + shift``, each operation rounded once in the state's dtype (float32,
float64 for float64 input; never bfloat16), and it is the same in every pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dynamics, ops
from ..backends import native
from ..dynamics import Constants, Inputs
from ..ops import time_major

__all__ = ["batch_norm_multi_step", "reference"]

_INPUTS = (
    "Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? v0, Tensor? decay, float eps, "
    "int neuron, int surrogate, int flags, float v_threshold, float v_reset, float tau, float alpha, float gain, "
    "float v_leak, float v_init"
)
_TENSORS = 7
_library = torch.library.Library("snnfast", "FRAGMENT")
_library.define("bn_statistics(Tensor x, bool per_step) -> (Tensor mean, Tensor var)")
_library.define(f"bn_multi_step({_INPUTS}) -> (Tensor s, Tensor v)")
_library.define(
    f"bn_multi_step_backward(Tensor? grad_s, Tensor? grad_v, {_INPUTS}, bool batch_statistics) -> "
    "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_v0, Tensor grad_decay)"
)


def _per_channel(x: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` ``[G, C]`` as the kernels read them: per channel, or per element of ``[C, inner]``."""
    each = native.batch_norm_constants(x)
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
    native.batch_norm_statistics(x, _per_channel(x, first, torch.float64), sums)
    away, square = (sums / (x.numel() // first.numel())).unbind(-1)
    return first + away, (square - away * away).clamp_(min=0)


def _split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], float, Constants]:
    return args[:_TENSORS], args[_TENSORS], Constants._make(args[_TENSORS + 1 :])


def _multi_step(*args: Any) -> tuple[Tensor, Tensor]:
    (x, mean, var, weight, bias, v0, decay), eps, constants = _split(args)
    x = time_major(x)
    dtype = dynamics.state_dtype(x.dtype)
    scale, shift = (_per_channel(x, t, dtype) for t in _scale_and_shift(x, mean, var, weight, bias, eps))
    s, v = torch.empty_like(x), ops._empty_state(x)
    native.batch_norm_forward(constants, x, ops._laid_out_as(v0, x[0], dtype), decay, scale, shift, s, v)
    return s, v


def _multi_step_backward(*args: Any) -> tuple[Tensor, ...]:
    grad_s, grad_v, *rest, batch_statistics = args
    (x, mean, var, weight, bias, v0, decay), eps, constants = _split(tuple(rest))
    x = time_major(x)
    dtype = dynamics.state_dtype(x.dtype)
    scale, shift = _scale_and_shift(x, mean, var, weight, bias, eps)
    centre = mean.to(dtype)
    grad_x = torch.empty_like(x)
    grad_v0 = None if v0 is None else ops._empty_state(x)
    sums = torch.empty((*mean.shape, 2), dtype=torch.float64, device=x.device)
    scales, shifts, centres = (_per_channel(x, t, dtype) for t in (scale, shift, centre))
    grad_decay = native.batch_norm_backward(
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
        grad_x,
        grad_v0,
        sums,
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
        native.batch_norm_backward_input(x, scales, centres, slopes, offsets, grad_x)
    decay_grad = ops._nothing(x) if decay is None else torch.full_like(decay, grad_decay)
    grad_weight, grad_bias = (t.sum(0).to(dtype) for t in (sum_gx * rstd, sum_g))
    return grad_x, grad_weight, grad_bias, ops._nothing(x) if grad_v0 is None else grad_v0, decay_grad


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
    x, v0, decay = time_major(args[2]), args[7], args[8]
    dtype = dynamics.state_dtype(x.dtype)
    return (
        torch.empty_like(x),
        x.new_empty(x.shape[2], dtype=dtype),
        x.new_empty(x.shape[2], dtype=dtype),
        ops._nothing(x) if v0 is None else ops._empty_state(x),
        ops._nothing(x) if decay is None else torch.empty_like(decay),
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
    eps: float,
    constants: Constants,
    per_step: bool = False,
) -> tuple[Tensor, Tensor]:
    """Spikes in the state's dtype and final potential, by differentiable PyTorch operations in the state's dtype.

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
    s, v, _, _ = ops._reference(Inputs(y, v0, None, decay), constants)
    return s, v


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
        eps: float,
        per_step: bool,
        constants: Constants,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.call = eps, per_step, mean is None, constants
        if mean is None or var is None:
            mean, var = _statistics_op(x, per_step)
        else:
            mean, var = mean.double().reshape(1, -1), var.double().reshape(1, -1)
        s, v = _forward_op(x, mean, var, weight, bias, v0, decay, eps, *constants)
        ctx.save_for_backward(x, mean, var, weight, bias, v0, decay)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return s, v, mean, var

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor | None, grad_v: Tensor | None, *_: Any) -> tuple[Any, ...]:
        saved = ops._saved(ctx)
        x, mean, var, weight, bias, v0, decay = saved
        eps, per_step, batch_statistics, constants = ctx.call
        if grad_s is None and grad_v is None:
            return (None,) * 10
        if torch.is_grad_enabled():  # create_graph: the backward must itself be differentiable
            # By aliases: where x or v0 itself comes from the weight, its own graph is walked by whoever called.
            given = tuple(None if t is None else t.view_as(t) for t in (x, weight, bias, v0, decay))
            x, weight, bias, v0, decay = given
            used: tuple[Tensor | None, Tensor | None] = (None, None) if batch_statistics else (mean, var)
            s, v = reference(x, used[0], used[1], weight, bias, v0, decay, eps, constants, per_step)
            outputs = [(y, g.to(y.dtype)) for y, g in ((s, grad_s), (v, grad_v)) if g is not None]
            wanted = [t for t in given if t is not None and t.requires_grad]
            found = torch.autograd.grad(
                [y for y, _ in outputs], wanted, [g for _, g in outputs], create_graph=True, allow_unused=True
            )
            by_input = dict(zip(map(id, wanted), found, strict=True))
            grads = [by_input.get(id(t)) for t in given]
            return grads[0], None, None, *grads[1:], None, None, None
        grad_x, grad_weight, grad_bias, grad_v0, grad_decay = _backward_op(
            grad_s, grad_v, *saved, eps, *constants, batch_statistics
        )
        return (
            grad_x,
            None,
            None,
            None if weight is None else grad_weight.to(weight.dtype),
            None if bias is None else grad_bias.to(bias.dtype),
            None if v0 is None else grad_v0,
            None if decay is None else grad_decay,
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
    *,
    eps: float,
    per_step: bool,
    constants: Constants,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch norm of a checked ``x`` ``[T, B, C, *]`` and a neuron: spikes, final potential, mean and variance.

    ``mean`` and ``var`` ``[C]`` are those to normalise by, ``None`` for those of ``x`` itself; the ones used come back
    as ``[G, C]`` in float64, without a gradient, the variance biased.
    """
    given = (time_major(x), mean, var, weight, bias, v0, decay)
    return _BatchNormMultiStep.apply(*given, eps, per_step, constants)
