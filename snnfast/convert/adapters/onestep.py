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

from ... import backends, functional, ops
from ...backends import native
from ...dynamics import Constants, Inputs
from ...tensors import apply_unwatched, is_plain, is_wrapped, saveable
from .base import Plan


class _Call:
    """What the kernels need beside tensors, for one plan and one number that the potential starts from."""

    __slots__ = ("config", "constants", "has_current")

    def __init__(self, plan: Plan, v_init: float) -> None:
        keywords = {"strict": plan.neuron.strict, **plan.keywords}
        kind = keywords.pop("surrogate_function")
        self.constants: Constants = functional.constants_of(plan.neuron, kind, v_init, **keywords)
        self.config = native._config(self.constants)
        self.has_current = len(plan.neuron.states) > 1


def _forward(call: _Call, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    x = tensors[0]
    s, v = torch.empty_like(x), torch.empty_like(x)
    i = torch.empty_like(x) if call.has_current else None
    native.launch_forward(call.config, 1, tensors, s, v, i, None)
    return (s, v) if i is None else (s, v, i)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, own_gradients: bool, *tensors: Tensor | None) -> tuple[Any, ...]:
        ctx.save_for_backward(*tensors)
        ctx.call = call, own_gradients
        ctx.set_materialize_grads(False)
        return _forward(call, tensors)

    @staticmethod
    def backward(ctx: Any, grad_s: Any, grad_v: Any, grad_i: Any = None) -> tuple[Tensor | None, ...]:
        saved: Any = ops._saved(ctx)
        if grad_s is None and grad_v is None and grad_i is None:
            return (None,) * 9
        call, own_gradients = ctx.call
        if torch.is_grad_enabled():  # create_graph: a backward that can be differentiated again
            return None, None, *_differentiable_backward(call, saved, (grad_s, grad_v, grad_i), own_gradients)
        x, v, i, decay, threshold = saved[:5]
        if threshold is not None and threshold.dtype is not x.dtype:  # the module was converted since
            saved = (*saved[:4], *_prepared(tuple(t for t in saved[4:] if t is not None), x))
        if grad_s is not None and not grad_s.is_contiguous():
            grad_s = grad_s.contiguous()
        if grad_v is not None and not grad_v.is_contiguous():
            grad_v = grad_v.contiguous()
        if grad_i is not None and not grad_i.is_contiguous():
            grad_i = grad_i.contiguous()
        grad_x = torch.empty_like(x)
        grad_v0: Any = None if v is None else torch.empty_like(x)
        grad_i0: Any = None if i is None else torch.empty_like(x)
        own: Any = (None, None, None)
        if own_gradients:
            own = tuple(None if t is None else torch.empty_like(x) for t in saved[4:])
        grad_decay = None if decay is None else torch.empty_like(decay)
        grads = (grad_s, grad_v, grad_i, None)
        native.launch_backward(call.config, 1, grads, saved, grad_x, grad_v0, grad_i0, grad_decay, *own)
        if own_gradients:
            own = (None if g is None else ops.summed(g, t.shape) for g, t in zip(own, saved[4:], strict=True))
        return None, None, grad_x, grad_v0, grad_i0, grad_decay, *own


def _differentiable_backward(call: _Call, saved: Any, grads: Any, own_gradients: bool) -> tuple[Any, ...]:
    grad_s, grad_v, grad_i = grads
    given = Inputs(saved[0].unsqueeze(0), *saved[1:])
    grads = (None if grad_s is None else grad_s.unsqueeze(0), grad_v, grad_i, None)
    found = ops._MultiStepBackward.apply(*grads, *given, *call.constants, backends.NATIVE, own_gradients)
    grad_x, *others = ops._wanted(found, given, own_gradients)
    return grad_x.squeeze(0), *others


def _dense(t: Any, x: Tensor) -> bool:
    return not isinstance(t, Tensor) or (t.dtype is x.dtype and t.is_contiguous() and not is_wrapped(t))


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
        or not x.is_cpu
        or backends.choose("auto", x.device) != backends.NATIVE
        or not is_plain(x)
    ):
        return _general(plan, x, state, own, decay)
    prepared = plan.prepared  # of the last call: own tensors that cannot change come as the same tuple
    if prepared is None or prepared[0] is not own or prepared[1] != x.shape:
        prepared = own, x.shape, tuple(saveable(_prepared(own, x)))
        if not torch.is_inference_mode_enabled():  # whose tensors no later training step could use
            plan.prepared = prepared
    v_init = 0.0
    if not isinstance(v, Tensor):
        v_init, v = v, None
    call = plan.calls.get(v_init)
    if call is None:
        call = plan.calls[v_init] = _Call(plan, v_init)
    threshold, beta, current_decay = prepared[2]
    i = i if isinstance(i, Tensor) else None
    tensors: Any = x, v, i, decay, threshold, beta, current_decay
    if not torch.is_grad_enabled():
        found = _forward(call, tensors)
    else:
        # Spelled out: any() over a generator costs as much as a kernel on a small tensor.
        own_gradients = (
            (threshold is not None and threshold.requires_grad)
            or (beta is not None and beta.requires_grad)
            or (current_decay is not None and current_decay.requires_grad)
        )
        if (
            own_gradients
            or x.requires_grad
            or (v is not None and v.requires_grad)
            or (i is not None and i.requires_grad)
            or (decay is not None and decay.requires_grad)
        ):
            if any(t is not None and t.is_inference() for t in (x, v, i, decay)):
                tensors = saveable(tensors)
            found = apply_unwatched(_Step, call, own_gradients, *tensors)
        else:
            found = _forward(call, tensors)
    return found[0], found[1:] if call.has_current else found[1]


def _prepared(own: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor | None, ...]:
    """The neurons' own parameters as the kernels take them: one number, or one for each neuron laid out as the step
    is, where autograd sums the gradient again."""
    found: list[Tensor | None] = []
    for t in own:
        if t.dtype is not x.dtype:
            t = t.to(x.dtype)
        found.append(
            t if t.numel() == 1 or (t.shape == x.shape and t.is_contiguous()) else t.expand(x.shape).contiguous()
        )
    return (*found, *(None,) * (3 - len(found)))


def _general(plan: Plan, x: Tensor, state: Any, own: tuple[Tensor, ...], decay: Tensor | None) -> tuple[Tensor, Any]:
    keywords = {**plan.keywords, "store_v_seq": False}
    s, state, _ = functional.multi_step(plan.neuron, x.unsqueeze(0), state, decay, own, **keywords)
    return s.squeeze(0), state
