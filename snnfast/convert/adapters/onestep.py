"""One time step of a fused neuron at the least cost, for a user's own loop over time.

Below some ten thousand elements such a loop costs what its Python costs. :func:`snnfast.functional.multi_step` serves
every layout, transform and backend, and spends more on finding out than a small kernel runs; this module serves the
common case, eager calls on dense tensors with the native kernels, and sends everything else there. The kernels, and so
the results, are the same. Outputs are no views, so that a library may detach its states in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import backends, dynamics, functional, ops
from ...backends import native
from ...dynamics import Constants, Inputs
from .base import Plan


class _Call:
    """What the kernels need beside tensors, for one plan and one number that the potential starts from."""

    __slots__ = ("constants", "has_current")

    def __init__(self, plan: Plan, v_init: float) -> None:
        k = plan.keywords
        flags = (
            (dynamics.DECAY_INPUT if k.get("decay_input", True) else 0)
            | (dynamics.DETACH_RESET if k.get("detach_reset") else 0)
            | (dynamics.STRICT if k.get("strict") else 0)
            | (dynamics.MULTI_SPIKE if k.get("multi_spike") else 0)
            | (0 if k.get("resets", True) else dynamics.NO_RESET)
        )
        kind = k["surrogate_function"]
        self.constants: Constants = functional._constants(
            plan.neuron.id, kind.id, kind.alpha, kind.gain, flags, k.get("v_threshold", 1.0), k.get("v_reset", 0.0),
            k.get("tau", 2.0), k.get("v_leak", 0.0), v_init,
        )  # fmt: skip
        self.has_current = len(plan.neuron.states) > 1


def _forward(call: _Call, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    x = tensors[0]
    s, v = torch.empty_like(x), torch.empty_like(x)  # type: ignore[arg-type]
    i = torch.empty_like(v) if call.has_current else None
    native.forward(call.constants, Inputs(x.unsqueeze(0), *tensors[1:]), s, v, i, None)  # type: ignore[union-attr]
    return s, v, i


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.save_for_backward(*tensors)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return _forward(call, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if grads[0] is None and grads[1] is None and grads[2] is None:
            return (None,) * 8
        own_gradients = any(ctx.needs_input_grad[5:])
        x = saved[0]
        if torch.is_grad_enabled():  # create_graph: a backward that can be differentiated again
            grad_s = None if grads[0] is None else grads[0].unsqueeze(0)
            given = Inputs(x.unsqueeze(0), *saved[1:])
            found = ops._MultiStepBackward.apply(
                grad_s, *grads[1:], None, *given, *ctx.call.constants, backends.NATIVE, own_gradients
            )
            found = ops._wanted(found, given, own_gradients)
            return None, found[0].squeeze(0), *found[1:]
        grad_s, grad_v, grad_i = (g if g is None or g.is_contiguous() else g.contiguous() for g in grads)
        grad_x = torch.empty_like(x)
        state = [None if t is None else torch.empty_like(x) for t in saved[1:3]]
        grad_decay = None if saved[3] is None else torch.zeros_like(saved[3])
        own = [torch.empty_like(x) if own_gradients and t is not None else None for t in saved[4:]]
        native.backward(
            ctx.call.constants,
            (grad_s, grad_v, grad_i, None),
            Inputs(x.unsqueeze(0), *saved[1:]),
            grad_x,
            *state,
            grad_decay,
            *own,
        )
        if own_gradients:
            own = [None if g is None else g.sum_to_size(t.shape) for g, t in zip(own, saved[4:], strict=True)]
        return None, grad_x, *state, grad_decay, *own


def _dense(t: Any, x: Tensor) -> bool:
    return not isinstance(t, Tensor) or (t.dtype is x.dtype and t.is_contiguous())


def one_step(
    plan: Plan, x: Tensor, state: Any, own: tuple[Tensor, ...] = (), decay: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Spikes ``[*]`` and state after one step of input ``x`` ``[*]``; the state in the form in which it came.

    ``state`` holds numbers, or tensors of ``x``'s shape; ``own`` and ``decay`` are those of ``functional.multi_step``.
    """
    v, i = state if type(state) is tuple else (state, None)
    if (
        not x.is_contiguous()
        or not _dense(v, x)
        or not _dense(i, x)
        or (decay is not None and decay.dtype is not x.dtype)
        or not x.numel()
        or backends.choose("auto", x.device) != backends.NATIVE
        or not ops._is_plain(x)
    ):
        return _general(plan, x, state, own, decay)
    threshold = beta = current_decay = None
    if own:
        shape = x.shape
        each = []
        for t in own:
            if t.dtype is not x.dtype:
                t = t.to(x.dtype)
            # A parameter of its own for each neuron: laid out as the step is. Autograd sums its gradient again.
            each.append(
                t if t.numel() == 1 or (t.shape == shape and t.is_contiguous()) else t.expand(shape).contiguous()
            )
        threshold, beta = each[0], each[1]
        if len(each) > 2:
            current_decay = each[2]
    v_init = 0.0
    if not isinstance(v, Tensor):
        v_init, v = v, None
    call = plan.calls.get(v_init)
    if call is None:
        call = plan.calls[v_init] = _Call(plan, v_init)
    tensors = (x, v, i if isinstance(i, Tensor) else None, decay, threshold, beta, current_decay)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        s, v, i = _Step.apply(call, *tensors)
    else:
        s, v, i = _forward(call, tensors)
    return s, (v, i) if call.has_current else v


def _general(plan: Plan, x: Tensor, state: Any, own: tuple[Tensor, ...], decay: Tensor | None) -> tuple[Tensor, Any]:
    keywords = {**plan.keywords, "store_v_seq": False}
    s, state, _ = functional.multi_step(plan.neuron, x.unsqueeze(0), state, decay, own, **keywords)
    return s.squeeze(0), state
