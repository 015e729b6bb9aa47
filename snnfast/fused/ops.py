"""Batch norm and neuron as one differentiable function, and the same in plain PyTorch.

``x`` is ``[T, B, C, *]``; statistics are ``[G, C]`` in float64, ``G`` being 1, or ``T`` where each time step has
its own. The normalised input is ``x * scale + shift``, each operation rounded once in the state's dtype (float32,
float64 for float64 input; never bfloat16), and it is the same in every pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dynamics, ops
from ..backends.native_batch_norm import Running
from ..dynamics import Constants, Inputs
from ..tensors import saveable, time_major
from . import kernels
from .kernels import Connect

__all__ = ["Connect", "batch_norm_multi_step", "reference"]


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
def _statistics(
    x: Tensor, mean: Tensor | None, var: Tensor | None, per_step: bool, running: Running | None = None
) -> tuple[Tensor, Tensor]:
    """Those given, or those of ``x``, as ``[G, C]``."""
    if mean is None or var is None:
        return kernels.statistics(x, per_step, running)
    return mean.double().reshape(-1, x.shape[2]), var.double().reshape(-1, x.shape[2])


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
        running: Running | None,
        constants: Constants,
        batch_statistics: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.call = connect, eps, batch_statistics, constants
        mean, var = _statistics(x, mean, var, per_step, running)
        s, v = kernels.multi_step(x, mean, var, weight, bias, v0, decay, skip, connect, eps, *constants)
        kept = None if connect == Connect.ADD else skip
        ctx.save_for_backward(x, mean, var, weight, bias, v0, decay, kept)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return s, v, mean, var

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor | None, grad_v: Tensor | None, *_: Any) -> tuple[Any, ...]:
        saved = ops._saved(ctx)
        x, mean, var, weight, bias, v0, decay, skip = saved
        connect, eps, batch_statistics, constants = ctx.call
        if grad_s is None and grad_v is None:
            return (None,) * 14
        if torch.is_grad_enabled():  # create_graph: the backward must itself be differentiable
            # By aliases: where x or v0 itself comes from the weight, its own graph is walked by whoever called.
            given = tuple(None if t is None else t.view_as(t) for t in (x, weight, bias, v0, decay, skip))
            x, weight, bias, v0, decay, skip = given
            added, connect = connect == Connect.ADD, Connect.NONE if connect == Connect.ADD else connect
            used: tuple[Tensor | None, Tensor | None] = (None, None) if batch_statistics else (mean, var)
            per_step = mean.shape[0] > 1
            s, v = reference(x, used[0], used[1], weight, bias, v0, decay, skip, connect, eps, constants, per_step)
            outputs = [(y, g.to(y.dtype)) for y, g in ((s, grad_s), (v, grad_v)) if g is not None]
            wanted = [t for t in given if t is not None and t.requires_grad]
            found = torch.autograd.grad(
                [y for y, _ in outputs], wanted, [g for _, g in outputs], create_graph=True, allow_unused=True
            )
            by_input = dict(zip(map(id, wanted), found, strict=True))
            grads = [by_input.get(id(t)) for t in given]
            grad_skip = grad_s if added else grads[5]
            return grads[0], None, None, *grads[1:5], grad_skip, *(None,) * 6
        grad_x, grad_weight, grad_bias, grad_v0, grad_decay, grad_skip = kernels.multi_step_backward(
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
            *(None,) * 6,
        )


def _differentiable(*args: Any) -> tuple[Tensor, ...]:
    """``bn_multi_step`` called by itself, as in a program that torch.export made: with the same backward."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
        *tensors_and_numbers, batch_statistics = (*args, False)[: kernels.GIVEN + 1]
        given, constants = tensors_and_numbers[:10], Constants._make(tensors_and_numbers[10:])
        return _BatchNormMultiStep.apply(*given, False, None, constants, batch_statistics)[:2]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.snnfast.bn_multi_step.default(*args)


def _without_gradient(*args: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.snnfast.bn_statistics.default(*args)


_library = torch.library.Library("snnfast", "FRAGMENT")
_library.impl("bn_multi_step", _differentiable, "Autograd")
_library.impl("bn_statistics", _without_gradient, "Autograd")


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
    running: Running | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch norm of a checked ``x`` ``[T, B, C, *]`` and a neuron: what comes out, final potential, mean and variance.

    What comes out are spikes, or what ``connect`` makes of them and ``skip``, which has the shape and dtype of ``x``.

    ``mean`` and ``var`` ``[C]`` are those to normalise by, ``None`` for those of ``x`` itself; the ones used come back
    as ``[G, C]`` in float64, without a gradient, the variance biased. Eager calls move ``running`` towards them.
    """
    x, batch_statistics = time_major(x), mean is None or var is None
    if torch.compiler.is_compiling():  # the op's own autograd is what an exported program keeps
        mean, var = _statistics(x, mean, var, per_step)
        rest = weight, bias, v0, decay, skip, int(connect), eps, *constants, batch_statistics
        return *kernels.multi_step(x, mean, var, *rest), mean, var
    given: Any = (x, mean, var, weight, bias, v0, decay, skip)
    if torch.is_grad_enabled():
        given = saveable(given)
    return _BatchNormMultiStep.apply(*given, connect, eps, per_step, running, constants, batch_statistics)
