"""The two torch ops behind every fused neuron, their fake implementations, and the autograd functions around them.

``torch.ops.snnfast.multi_step`` and ``torch.ops.snnfast.multi_step_backward`` take tensors and numbers only, so
``torch.compile`` sees them as two nodes of its graph. :func:`multi_step` is what the rest of the package calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, dynamics
from .dynamics import NEURONS, STORE_V_SEQ, Constants
from .surrogate import SURROGATES

_CONSTANTS = (
    "int neuron, int surrogate, int flags, float threshold, float v_reset, float tau, float alpha, float v_init, "
    "int backend"
)
_library = torch.library.Library("snnfast", "DEF")
_library.define(
    f"multi_step(Tensor x, Tensor? v0, Tensor? decay, {_CONSTANTS}) -> (Tensor s, Tensor v, Tensor v_seq)",
)
_library.define(
    "multi_step_backward(Tensor? grad_s, Tensor? grad_v, Tensor? grad_v_seq, Tensor x, Tensor? v0, Tensor? decay, "
    f"{_CONSTANTS}) -> (Tensor grad_x, Tensor grad_v0, Tensor grad_decay)",
)


# ---- layout ----
def is_time_major(x: Tensor) -> bool:
    """Whether ``x`` fills its memory without gaps and time is its outermost stride (channels_last is fine)."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return x.shape[0] == 1 or x.stride(0) == expected


def time_major(x: Tensor) -> Tensor:
    """``x`` itself where kernels can walk through it, else a contiguous copy."""
    return x if is_time_major(x) else x.contiguous()


def _empty_state(x: Tensor) -> Tensor:
    """One state per neuron, laid out as one time step of ``x``."""
    return torch.empty_strided(x.shape[1:], x.stride()[1:], dtype=dynamics.state_dtype(x.dtype), device=x.device)


def _empty_sequence(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=dynamics.state_dtype(x.dtype), device=x.device)


def _nothing(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=dynamics.state_dtype(x.dtype), device=x.device)


def _laid_out_as(t: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``t`` in the memory layout and dtype of ``like``: gradients and states may come in any."""
    if t is None or (t.dtype == dtype and t.stride() == like.stride()):
        return t
    return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=like.device).copy_(t)


# ---- the ops ----
def _run_forward(
    x: Tensor, v0: Tensor | None, decay: Tensor | None, constants: Constants, backend: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = time_major(x)
    s = torch.empty_like(x)
    v = _empty_state(x)
    v_seq = _empty_sequence(x) if constants.flags & STORE_V_SEQ else None
    if x.numel():
        if v0 is not None:
            v0 = _laid_out_as(v0, v, v.dtype)
        backends.KERNELS[backend].forward(constants, x, v0, decay, s, v, v_seq)
    return s, v, v_seq


def _run_backward(
    grads: Sequence[Tensor | None], saved: Sequence[Tensor | None], constants: Constants, backend: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    grad_s, grad_v, grad_v_seq = grads
    x, v0, decay = saved
    assert x is not None
    x = time_major(x)
    grad_x = torch.empty_like(x)
    grad_v0 = None if v0 is None else _empty_state(x)
    grad_decay = None if decay is None else torch.zeros_like(decay)
    if x.numel():
        dtype = dynamics.state_dtype(x.dtype)
        grad_s = _laid_out_as(grad_s, x, x.dtype)
        if grad_v is not None:
            grad_v = _laid_out_as(grad_v, x[0], dtype)
        if v0 is not None:
            v0 = _laid_out_as(v0, x[0], dtype)
        grad_v_seq = _laid_out_as(grad_v_seq, x, dtype)
        kernels = backends.KERNELS[backend]
        kernels.backward(constants, grad_s, grad_v, grad_v_seq, x, v0, decay, grad_x, grad_v0, grad_decay)
    return grad_x, grad_v0, grad_decay


def _or_nothing(x: Tensor, *results: Tensor | None) -> tuple[Tensor, ...]:
    """An op has a fixed number of outputs; empty ones stand for those that there are not."""
    return tuple(_nothing(x) if r is None else r for r in results)


def _multi_step(x: Tensor, v0: Tensor | None, decay: Tensor | None, *numbers: Any) -> tuple[Tensor, ...]:
    return _or_nothing(x, *_run_forward(x, v0, decay, Constants._make(numbers[:-1]), numbers[-1]))


def _multi_step_backward(*args: Any) -> tuple[Tensor, ...]:
    return _or_nothing(args[3], *_run_backward(args[:3], args[3:6], Constants._make(args[6:-1]), args[-1]))


_library.impl("multi_step", _multi_step, "CompositeExplicitAutograd")
_library.impl("multi_step_backward", _multi_step_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("snnfast::multi_step")
def _multi_step_fake(
    x: Tensor, v0: Tensor | None, decay: Tensor | None, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    x = time_major(x)
    v_seq = _empty_sequence(x) if numbers[2] & STORE_V_SEQ else _nothing(x)
    return torch.empty_like(x), _empty_state(x), v_seq


@torch.library.register_fake("snnfast::multi_step_backward")
def _multi_step_backward_fake(
    grad_s: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    x: Tensor,
    v0: Tensor | None,
    decay: Tensor | None,
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    x = time_major(x)
    return (
        torch.empty_like(x),
        _nothing(x) if v0 is None else _empty_state(x),
        _nothing(x) if decay is None else torch.empty_like(decay),
    )


_forward_op = torch.ops.snnfast.multi_step.default
_backward_op = torch.ops.snnfast.multi_step_backward.default


# ---- autograd ----
FORGOTTEN_RESET = (
    "the membrane potential of a snnfast neuron still belongs to a graph whose backward has already run. Call "
    "snnfast.functional.reset_net(model) before each new sequence, or snnfast.functional.detach_net(model) to keep the "
    "state without its history (truncated BPTT); or pass retain_graph=True to the earlier backward."
)


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "second time" in str(error):
            raise RuntimeError(FORGOTTEN_RESET) from None
        raise


def _batch_at(t: Tensor | None, dim: int | None, batch_size: int, to: int) -> Tensor | None:
    """``t`` with its vmapped dimension (or an expanded one) at position ``to``."""
    if t is None:
        return None
    if dim is None:
        return t.unsqueeze(to).expand(*t.shape[:to], batch_size, *t.shape[to:])
    return t.movedim(dim, to)


def _loop_over_batch(function: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """For a per-sample learnable value, which one kernel call cannot take or reduce: one call per sample."""
    results = []
    for i in range(info.batch_size):
        sample = [a if d is None or a is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
        results.append(function.apply(*sample))
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0, 0, 0)


class _MultiStep(torch.autograd.Function):
    """Saves x, and v0 and decay where they are tensors; nothing else."""

    @staticmethod
    def forward(x: Tensor, v0: Tensor | None, decay: Tensor | None, *numbers: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _forward_op(x, v0, decay, *numbers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.numbers = inputs[3:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor | None, grad_v: Tensor | None, grad_v_seq: Tensor | None) -> tuple[Any, ...]:
        x, v0, decay = _saved(ctx)
        numbers = ctx.numbers
        if not numbers[2] & STORE_V_SEQ:
            grad_v_seq = None
        nones = (None,) * len(numbers)
        if grad_s is None and grad_v is None and grad_v_seq is None:
            return None, None, None, *nones
        args = (grad_s, grad_v, grad_v_seq, x, v0, decay, *numbers)
        grads = _MultiStepBackward.apply(*args) if torch.is_grad_enabled() else _backward_op(*args)
        return *(None if t is None else g for g, t in zip(grads, (x, v0, decay), strict=True)), *nones

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if in_dims[2] is not None:
            return _loop_over_batch(_MultiStep, info, in_dims, *args)
        x = _batch_at(args[0], in_dims[0], info.batch_size, 1)
        v0 = _batch_at(args[1], in_dims[1], info.batch_size, 0)
        outputs = _MultiStep.apply(x, v0, *args[2:])
        return outputs, (1, 0, 1 if args[5] & STORE_V_SEQ else None)


class _EagerMultiStep(torch.autograd.Function):
    """The same for eager calls, past the dispatcher and with the context filled in forward: torch inspects the
    signature of a Function with setup_context on every call, which alone takes 10 us."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v0: Tensor | None, decay: Tensor | None, constants: Constants, backend: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.save_for_backward(x, v0, decay)
        ctx.call = constants, backend
        ctx.set_materialize_grads(False)
        return _run_forward(x, v0, decay, constants, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = _saved(ctx)
        constants, backend = ctx.call
        if all(g is None for g in grads):
            return None, None, None, None, None
        if torch.is_grad_enabled():  # create_graph: the backward must itself be differentiable
            found = _MultiStepBackward.apply(*grads, *saved, *constants, backend)
            found = tuple(None if t is None else g for g, t in zip(found, saved, strict=True))
        else:
            found = _run_backward(grads, saved, constants, backend)
        return *found, None, None


class _MultiStepBackward(torch.autograd.Function):
    """The backward as a function of its own, so that it can be differentiated again, through the reference loop."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _backward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.numbers = inputs[6:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Any, ...]:
        saved = _saved(ctx)
        given = [i for i, t in enumerate(saved) if t is not None]

        outputs, inputs = [i for i in given if i < 3], [i for i in given if i >= 3]

        def backward(*tensors: Tensor) -> tuple[Tensor, ...]:
            """grad_x (and those of v0 and decay, where given) by differentiating the reference loop."""
            full = dict(zip(given, tensors, strict=True))

            def forward(*values: Tensor) -> tuple[Tensor, ...]:
                by_index = dict(zip(inputs, values, strict=True))
                results = _reference(by_index[3], by_index.get(4), by_index.get(5), Constants._make(ctx.numbers[:-1]))
                return tuple(r for i, r in enumerate(results) if i in outputs and r is not None)

            results, pull, *_ = torch.func.vjp(forward, *(full[i] for i in inputs))
            return pull(tuple(full[i].to(r.dtype) for i, r in zip(outputs, results, strict=True)))

        first, pull, *_ = torch.func.vjp(backward, *(saved[i] for i in given))
        wanted = [g for g, i in zip(grad_grads, (3, 4, 5), strict=True) if saved[i] is not None]
        wanted = [torch.zeros_like(f) if g is None else g.to(f.dtype) for f, g in zip(first, wanted, strict=True)]
        found = dict(zip(given, pull(tuple(wanted)), strict=True))
        return *(found.get(i) for i in range(6)), *(None for _ in ctx.numbers)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if args[5] is not None:  # the gradient of decay is a sum over each sample alone
            return _loop_over_batch(_MultiStepBackward, info, in_dims, *args)
        at = (1, 0, 1, 1, 0)
        tensors = [_batch_at(a, d, info.batch_size, to) for a, d, to in zip(args[:5], in_dims[:5], at, strict=True)]
        grads = _MultiStepBackward.apply(*tensors, *args[5:])
        return grads, (1, None if args[4] is None else 0, None)


def _reference(
    x: Tensor, v0: Tensor | None, decay: Tensor | None, c: Constants
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The reference loop for the kernels' constants."""
    parameters = dynamics.Parameters(
        threshold=c.threshold,
        v_reset=None if c.flags & dynamics.SOFT_RESET else c.v_reset,
        surrogate=SURROGATES[c.surrogate](c.alpha),
        tau=c.tau,
        decay=decay,
        decay_input=bool(c.flags & dynamics.DECAY_INPUT),
        detach_reset=bool(c.flags & dynamics.DETACH_RESET),
    )
    v = c.v_init if v0 is None else v0
    return dynamics.multi_step(NEURONS[c.neuron], x, v, parameters, bool(c.flags & STORE_V_SEQ))


def _is_plain(x: Tensor) -> bool:
    """Whether nobody looks at this call: no compilation, no torch.func transform, no dispatch mode, no subclass."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and x.device.type != "meta"
    )


def multi_step(
    x: Tensor, v0: Tensor | None, decay: Tensor | None, constants: Constants, backend: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a fused neuron over time: ``(s, v, v_seq)``, with ``v_seq`` ``None`` unless the flags ask for it.

    The arguments are as the kernels need them (:mod:`snnfast.functional` checks a user's): ``x`` ``[T, *]``, ``v0``
    ``[*]`` or ``None`` for ``constants.v_init``, ``decay`` 0-d in the state's dtype or ``None``, ``backend`` an index
    of :data:`snnfast.backends.KERNELS`.
    """
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or (v0 is not None and v0.requires_grad) or (decay is not None and decay.requires_grad)
    )
    if _is_plain(x):
        if needs_grad:
            return _EagerMultiStep.apply(x, v0, decay, constants, backend)
        return _run_forward(x, v0, decay, constants, backend)
    function = _MultiStep.apply if needs_grad or torch._C._are_functorch_transforms_active() else _forward_op
    s, v, v_seq = function(x, v0, decay, *constants, backend)
    return s, v, v_seq if constants.flags & STORE_V_SEQ else None


class _Guard(torch.autograd.Function):
    """Passes a reference path's outputs through as one node of the graph, which notices when the graph is gone."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(outputs[0])
        ctx.set_materialize_grads(False)
        return tuple(None if t is None else t.view_as(t) for t in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _saved(ctx)
        return grads


Outputs = tuple[Tensor, Tensor, "Tensor | None"]


def guard(outputs: Outputs) -> Outputs:
    """``(s, v, v_seq)`` of a reference path, whose backward after a forgotten reset names ``reset_net``."""
    if outputs[1].requires_grad and _is_plain(outputs[1]):
        return _Guard.apply(*outputs)
    return outputs
