"""A neuron whose input is the same at every step, as direct coding makes it of an image: the CPU kernels repeat it.

``x`` is read, kept for backward and differentiated once in place of ``T`` times (csrc/cpu_constant_input.h).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, dynamics, ops
from .dynamics import Constants, Inputs
from .tensors import apply_unwatched, is_plain, laid_out_as, saveable

__all__ = ["CONSTANT_STEPS", "multi_step", "serves"]

CONSTANT_STEPS = 16  # the most that the kernels take


def _call(x: Tensor, T: int, v0: Tensor | None, decay: Tensor | None, constants: Constants) -> tuple[Constants, Inputs]:
    flags = constants.flags | dynamics.CONSTANT_INPUT
    inputs = Inputs(x.expand(T, *x.shape), laid_out_as(v0, x, x.dtype), None, decay)
    return constants._replace(flags=flags), inputs


def _run(x: Tensor, T: int, v0: Tensor | None, decay: Tensor | None, constants: Constants) -> tuple[Tensor, Tensor]:
    s, v = x.new_empty_strided((T, *x.shape), (x.numel(), *x.stride())), torch.empty_like(x)
    backends.KERNELS[backends.NATIVE].forward(*_call(x, T, v0, decay, constants), s, v, None, None)
    return s, v


class _ConstantInput(torch.autograd.Function):
    """``x`` ``[*]`` stands for ``T`` steps of itself: it is kept, and its gradient made, once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, T: int, v0: Tensor | None, decay: Tensor | None, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, v0, decay)
        ctx.call = constants, T
        ctx.set_materialize_grads(False)
        return _run(x, T, v0, decay, constants)

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor | None, grad_v: Tensor | None) -> tuple[Any, ...]:
        x, v0, decay = ops._saved(ctx)
        constants, T = ctx.call
        if grad_s is None and grad_v is None:
            return (None,) * 5
        if torch.is_grad_enabled():  # create_graph: by the ordinary function, on a repeated input
            given = Inputs(x.expand(T, *x.shape).contiguous(), v0, None, decay)
            found = ops._MultiStepBackward.apply(grad_s, grad_v, None, None, *given, *constants, backends.NATIVE, False)
            grad_x, grad_v0, _, grad_decay, *_ = ops._wanted(found, given, False)
            return grad_x.sum(0), None, grad_v0, grad_decay, None
        grad_x, grad_v0 = torch.empty_like(x), None if v0 is None else torch.empty_like(x)
        grad_decay = None if decay is None else torch.zeros_like(decay)
        strides = (x.numel(), *x.stride())
        if grad_s is not None and grad_s.stride() != strides:
            grad_s = x.new_empty_strided((T, *x.shape), strides).copy_(grad_s)
        grads = grad_s, laid_out_as(grad_v, x, x.dtype), None, None
        constants, inputs = _call(x, T, v0, decay, constants)
        outputs = grad_x, grad_v0, None, grad_decay, None, None, None
        backends.KERNELS[backends.NATIVE].backward(constants, grads, inputs, *outputs)
        return grad_x, None, grad_v0, grad_decay, None


def serves(x: Tensor, T: int) -> bool:
    """Whether :func:`multi_step` serves ``x``; else it is to be repeated."""
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return (
        x.is_cpu
        and x.dtype is torch.float32
        and 1 < T <= CONSTANT_STEPS
        and x.dim() > 0
        and x.numel() > 0
        and dense
        and is_plain(x)
        and backends.choose("auto", x.device) == backends.NATIVE
    )


def multi_step(
    x: Tensor, T: int, v0: Tensor | None, decay: Tensor | None, constants: Constants
) -> tuple[Tensor, Tensor]:
    """Spikes ``[T, *]`` and final potential of a neuron with one state that gets ``x`` ``[*]`` at each of ``T`` steps.

    For neurons without parameters of their own; states and decay in float32.

    Raises:
        ValueError: the kernels cannot take ``x`` (:func:`serves`), which is then to be repeated.
    """
    if not serves(x, T):
        raise ValueError(
            f"x must be a dense float32 tensor on the CPU, and T from 2 to {CONSTANT_STEPS}, got {x.dtype} of shape "
            f"{tuple(x.shape)} with strides {x.stride()} on {x.device}, T = {T}; repeat it for ops.multi_step"
        )
    tensors = x, v0, decay
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        x, v0, decay = saveable(tensors)  # type: ignore[assignment]
        return apply_unwatched(_ConstantInput, x, T, v0, decay, constants)
    return _run(x, T, v0, decay, constants)
