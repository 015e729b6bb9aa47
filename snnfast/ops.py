"""The two torch ops behind every fused neuron, their fake implementations, and the autograd functions around them.

``torch.ops.snnfast.multi_step`` and ``torch.ops.snnfast.multi_step_backward`` take tensors and numbers only, so
``torch.compile`` sees them as two nodes of its graph. :func:`multi_step` is what the rest of the package calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, dynamics
from .dynamics import NEURONS, STORE_V_SEQ, Constants, Inputs
from .surrogate import SURROGATES, Scaled, apply
from .tensors import (
    apply_unwatched,
    empty_sequence,
    empty_state,
    is_plain,
    is_time_major,
    is_wrapped,
    laid_out_as,
    nothing,
    saveable,
    time_major,
)

_INPUTS = (
    "Tensor x, Tensor? v0, Tensor? i0, Tensor? decay, Tensor? threshold, Tensor? beta, Tensor? current_decay, "
    "int neuron, int surrogate, int flags, float v_threshold, float v_reset, float tau, float alpha, float gain, "
    "float v_leak, float v_init, int backend"
)
_library = torch.library.Library("snnfast", "DEF")
_library.define(f"multi_step({_INPUTS}) -> (Tensor s, Tensor v, Tensor i, Tensor v_seq)")
_library.define(
    f"multi_step_backward(Tensor? grad_s, Tensor? grad_v, Tensor? grad_i, Tensor? grad_v_seq, {_INPUTS}, "
    "bool own_gradients) -> (Tensor grad_x, Tensor grad_v0, Tensor grad_i0, Tensor grad_decay, "
    "Tensor grad_threshold, Tensor grad_beta, Tensor grad_current_decay)",
)
_OUTPUTS, _GIVEN = 4, len(Inputs._fields)
_FIRST_OWN = 4  # index in Inputs: before it x, v0, i0, decay


# ---- the ops ----
Outputs = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]


def _fits(t: Tensor | None, stride: tuple[int, ...], dtype: torch.dtype) -> bool:
    return t is None or (t.dtype is dtype and t.stride() == stride)


def _prepared(inputs: Inputs) -> Inputs:
    """The inputs as kernels walk through them: everything in the layout of ``x`` and the state's dtype."""
    x, v0, i0, decay, *own = inputs
    if not is_time_major(x):
        x = x.contiguous()
        inputs = inputs._replace(x=x)
    stride, dtype = x.stride()[1:], dynamics.state_dtype(x.dtype)
    if _fits(v0, stride, dtype) and own[0] is None:
        return inputs  # what nearly every call looks like, so it shall cost nothing
    step = x[0]
    # In a backward pass the module that has them may be of another dtype than it was in the forward.
    own = [
        t if t is None or (t.numel() == 1 and t.dtype is dtype) else laid_out_as(t.expand_as(step), step, dtype)
        for t in own
    ]
    return Inputs(x, laid_out_as(v0, step, dtype), laid_out_as(i0, step, dtype), decay, *own)


def _run_forward(inputs: Inputs, constants: Constants, backend: int) -> Outputs:
    inputs = _prepared(inputs)
    x = inputs.x
    s, v = torch.empty_like(x), empty_state(x)
    i = empty_state(x) if len(NEURONS[constants.neuron].states) > 1 else None
    v_seq = empty_sequence(x) if constants.flags & STORE_V_SEQ else None
    if x.numel():
        backends.KERNELS[backend].forward(constants, inputs, s, v, i, v_seq)
    return s, v, i, v_seq


def summed(grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a parameter of ``shape`` from one for each neuron."""
    return grad.sum().reshape(shape) if shape.numel() == 1 else grad.sum_to_size(shape)


def _run_backward(
    grads: Sequence[Tensor | None], given: Inputs, constants: Constants, backend: int, own_gradients: bool
) -> tuple[Tensor | None, ...]:
    inputs = _prepared(given)
    x = inputs.x
    states = tuple(None if t is None else empty_state(x) for t in inputs[1:3])
    grad_x = torch.empty_like(x)
    grad_decay = None if inputs.decay is None else torch.zeros_like(inputs.decay)
    own = tuple(empty_state(x) if own_gradients and t is not None else None for t in inputs[_FIRST_OWN:])
    if x.numel():
        dtype = dynamics.state_dtype(x.dtype)
        grad_s, grad_v, grad_i, grad_v_seq = grads
        grads = (
            laid_out_as(grad_s, x, x.dtype),
            None if grad_v is None else laid_out_as(grad_v, x[0], dtype),
            None if grad_i is None else laid_out_as(grad_i, x[0], dtype),
            laid_out_as(grad_v_seq, x, dtype),
        )
        backends.KERNELS[backend].backward(constants, grads, inputs, grad_x, *states, grad_decay, *own)
    own_sums = (
        None if g is None or t is None else summed(g, t.shape) for g, t in zip(own, given[_FIRST_OWN:], strict=True)
    )
    return grad_x, *states, grad_decay, *own_sums


def _or_nothing(x: Tensor, *results: Tensor | None) -> tuple[Tensor, ...]:
    """An op has a fixed number of outputs; empty ones stand for those that there are not."""
    return tuple(nothing(x) if r is None else r for r in results)


def _split(args: Sequence[Any]) -> tuple[Inputs, Constants, int]:
    return Inputs(*args[:_GIVEN]), Constants._make(args[_GIVEN:-1]), args[-1]


def _multi_step(*args: Any) -> tuple[Tensor, ...]:
    return _or_nothing(args[0], *_run_forward(*_split(args)))


def _multi_step_backward(*args: Any) -> tuple[Tensor, ...]:
    grads, rest, own_gradients = args[:_OUTPUTS], args[_OUTPUTS:-1], args[-1]
    return _or_nothing(rest[0], *_run_backward(grads, *_split(rest), own_gradients))


_library.impl("multi_step", _multi_step, "CompositeExplicitAutograd")
_library.impl("multi_step_backward", _multi_step_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("snnfast::multi_step")
def _multi_step_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, constants, _ = _split(args)
    x = time_major(inputs.x)
    i = empty_state(x) if len(NEURONS[constants.neuron].states) > 1 else nothing(x)
    v_seq = empty_sequence(x) if constants.flags & STORE_V_SEQ else nothing(x)
    return torch.empty_like(x), empty_state(x), i, v_seq


@torch.library.register_fake("snnfast::multi_step_backward")
def _multi_step_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, own_gradients = Inputs(*args[_OUTPUTS : _OUTPUTS + _GIVEN]), args[-1]
    x = time_major(inputs.x)
    return (
        torch.empty_like(x),
        *(nothing(x) if t is None else empty_state(x) for t in inputs[1:3]),
        nothing(x) if inputs.decay is None else torch.empty_like(inputs.decay),
        *(
            summed(empty_state(x), t.shape) if own_gradients and t is not None else nothing(x)
            for t in inputs[_FIRST_OWN:]
        ),
    )


_forward_op = torch.ops.snnfast.multi_step.default
_backward_op = torch.ops.snnfast.multi_step_backward.default


# ---- autograd ----
FORGOTTEN_RESET = (
    "the membrane potential of a snnfast neuron still belongs to a graph whose backward has already run. Call "
    "snnfast.functional.reset_net(model) before each new sequence, or snnfast.functional.detach_net(model) to keep the "
    "state without its history (truncated BPTT); or pass retain_graph=True to the earlier backward."
)
LEFT_BY_VMAP = (
    "the membrane potential of a snnfast neuron is one that torch.func.vmap left, which cannot be read outside of it. "
    "Call snnfast.functional.reset_net(model) first; snnfast.functional.lif_multi_step and its like return the state."
)
_is_batched = torch._C._functorch.is_batchedtensor


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
    parts = tuple(zip(*results, strict=True))
    return tuple(None if p[0] is None else torch.stack(p) for p in parts), tuple(
        None if p[0] is None else 0 for p in parts
    )


class _MultiStep(torch.autograd.Function):
    """Saves its input tensors and nothing else. The arguments are the forward op's."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _forward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:_GIVEN])
        ctx.numbers = inputs[_GIVEN:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = _saved(ctx)
        numbers = ctx.numbers
        grad_s, grad_v, grad_i, grad_v_seq = grads
        if len(NEURONS[numbers[0]].states) == 1:
            grad_i = None
        if not numbers[2] & STORE_V_SEQ:
            grad_v_seq = None
        nones = (None,) * len(numbers)
        if grad_s is None and grad_v is None and grad_i is None and grad_v_seq is None:
            return (None,) * _GIVEN + nones
        own_gradients = any(ctx.needs_input_grad[_FIRST_OWN:_GIVEN])
        args = (grad_s, grad_v, grad_i, grad_v_seq, *saved, *numbers, own_gradients)
        found = _MultiStepBackward.apply(*args) if torch.is_grad_enabled() else _backward_op(*args)
        return *_wanted(found, saved, own_gradients), *nones

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if any(t is not None for t in args[_FIRST_OWN:_GIVEN]) or in_dims[3] is not None:
            return _loop_over_batch(_MultiStep, info, in_dims, *args)
        x = _batch_at(args[0], in_dims[0], info.batch_size, 1)
        states = (_batch_at(args[k], in_dims[k], info.batch_size, 0) for k in (1, 2))
        outputs = _MultiStep.apply(x, *states, *args[3:])
        has_i = len(NEURONS[args[_GIVEN]].states) > 1
        return outputs, (1, 0, 0 if has_i else None, 1 if args[_GIVEN + 2] & STORE_V_SEQ else None)


def _differentiable(*args: Any) -> tuple[Tensor, ...]:
    """The forward op called by itself, as in a program that torch.export made: with the same backward."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:_GIVEN]):
        return apply(_MultiStep, *args)
    if is_plain(args[0]):
        return _multi_step(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(*args)


_library.impl("multi_step", _differentiable, "Autograd")


def _wanted(found: Sequence[Any], given: Sequence[Tensor | None], own_gradients: bool) -> tuple[Any, ...]:
    """Of the backward op's results those that there are."""
    return tuple(
        None if t is None or (k >= _FIRST_OWN and not own_gradients) else g
        for k, (g, t) in enumerate(zip(found, given, strict=True))
    )


class _EagerMultiStep(torch.autograd.Function):
    """The same for eager calls, past the dispatcher and with the context filled in forward: torch inspects the
    signature of a Function with setup_context on every call, which alone takes 10 us."""

    @staticmethod
    def forward(ctx: Any, constants: Constants, backend: int, *tensors: Tensor | None) -> Outputs:
        ctx.save_for_backward(*tensors)
        ctx.call = constants, backend
        ctx.set_materialize_grads(False)
        return _run_forward(Inputs(*tensors), constants, backend)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = _saved(ctx)
        constants, backend = ctx.call
        if all(g is None for g in grads):
            return (None,) * (2 + len(saved))
        own_gradients = any(ctx.needs_input_grad[2 + _FIRST_OWN :])
        given = Inputs(*saved)
        if torch.is_grad_enabled():  # create_graph: the backward must itself be differentiable
            found = _MultiStepBackward.apply(*grads, *given, *constants, backend, own_gradients)
            found = _wanted(found, given, own_gradients)
        else:
            found = _run_backward(grads, given, constants, backend, own_gradients)
        return None, None, *found[: len(saved)]


@contextlib.contextmanager
def _without_saved_tensor_hooks() -> Iterator[None]:
    """torch.func refuses to run within hooks such as those of :class:`snnfast.packed_spikes`."""
    hooks = torch._C._autograd
    taken = []
    while hasattr(hooks, "_top_saved_tensors_default_hooks"):
        top = hooks._top_saved_tensors_default_hooks(True)
        if top is None:
            break
        taken.append(top)
        hooks._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for top in reversed(taken):
            hooks._push_saved_tensors_default_hooks(*top)


class _MultiStepBackward(torch.autograd.Function):
    """The backward as a function of its own, so that it can be differentiated again, through the reference loop. The
    arguments are the backward op's."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _backward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: _OUTPUTS + _GIVEN])
        ctx.numbers = inputs[_OUTPUTS + _GIVEN :]
        ctx.set_materialize_grads(False)

    @staticmethod
    @_without_saved_tensor_hooks()
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Any, ...]:
        saved = _saved(ctx)
        constants, own_gradients = Constants._make(ctx.numbers[:-2]), ctx.numbers[-1]
        given = [k for k, t in enumerate(saved) if t is not None]
        outputs, inputs = [k for k in given if k < _OUTPUTS], [k for k in given if k >= _OUTPUTS]

        def backward(*tensors: Tensor) -> tuple[Tensor, ...]:
            """The gradients of the inputs by differentiating the reference loop."""
            full = dict(zip(given, tensors, strict=True))

            def forward(*values: Tensor) -> tuple[Tensor, ...]:
                by_index = dict(zip(inputs, values, strict=True))
                arguments = Inputs(*(by_index.get(_OUTPUTS + k) for k in range(_GIVEN)))  # type: ignore[arg-type]
                results = _reference(arguments, constants)
                return tuple(r for k, r in enumerate(results) if k in outputs and r is not None)

            results, pull, *_ = torch.func.vjp(forward, *(full[k] for k in inputs))
            return pull(tuple(full[k].to(r.dtype) for k, r in zip(outputs, results, strict=True)))

        first, pull, *_ = torch.func.vjp(backward, *(saved[k] for k in given))
        by_input = _wanted(grad_grads, saved[_OUTPUTS:], own_gradients)
        wanted = [by_input[k - _OUTPUTS] for k in inputs]
        wanted = [torch.zeros_like(f) if g is None else g.to(f.dtype) for f, g in zip(first, wanted, strict=True)]
        found = dict(zip(given, pull(tuple(wanted)), strict=True))
        return *(found.get(k) for k in range(_OUTPUTS + _GIVEN)), *(None for _ in ctx.numbers)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if any(t is not None for t in args[_OUTPUTS + 3 : _OUTPUTS + _GIVEN]):  # their gradients are sums over a sample
            return _loop_over_batch(_MultiStepBackward, info, in_dims, *args)
        at = (1, 0, 0, 1, 1, 0, 0)
        tensors = [_batch_at(a, d, info.batch_size, to) for a, d, to in zip(args[:7], in_dims[:7], at, strict=True)]
        grads = _MultiStepBackward.apply(*tensors, *args[7:])
        return grads, (1, *(None if t is None else 0 for t in args[5:7]), *(None,) * 4)


def _reference(inputs: Inputs, c: Constants) -> Outputs:
    """The reference loop for the kernels' constants."""
    neuron = NEURONS[c.neuron]
    parameters = dynamics.Parameters(
        threshold=c.threshold if inputs.threshold is None else inputs.threshold,
        v_reset=None if c.flags & dynamics.SOFT_RESET else c.v_reset,
        surrogate=Scaled(SURROGATES[c.surrogate](c.alpha), c.gain),
        tau=c.tau,
        decay=inputs.decay,
        decay_input=bool(c.flags & dynamics.DECAY_INPUT),
        detach_reset=bool(c.flags & dynamics.DETACH_RESET),
        beta=1.0 if inputs.beta is None else inputs.beta,
        current_decay=0.0 if inputs.current_decay is None else inputs.current_decay,
        v_leak=c.v_leak,
        strict=bool(c.flags & dynamics.STRICT),
        multi_spike=bool(c.flags & dynamics.MULTI_SPIKE),
        resets=not c.flags & dynamics.NO_RESET,
        v_min=c.v_leak if c.flags & dynamics.CLIPPED else None,
    )
    v: Any = c.v_init if inputs.v0 is None else inputs.v0
    if len(neuron.states) > 1:
        v = v, 0.0 if inputs.i0 is None else inputs.i0
    s, state, v_seq = dynamics.multi_step(neuron, inputs.x, v, parameters, bool(c.flags & STORE_V_SEQ))
    return (s, *state, v_seq) if isinstance(state, tuple) else (s, state, None, v_seq)


def multi_step(inputs: Inputs, constants: Constants, backend: int) -> Outputs:
    """Run a fused neuron over time: ``(s, v, i, v_seq)``, with ``i`` and ``v_seq`` ``None`` where there is none.

    The arguments are as the kernels need them (:mod:`snnfast.functional` checks a user's); ``backend`` is an index of
    :data:`snnfast.backends.KERNELS`.
    """
    v0, i0 = inputs.v0, inputs.i0
    if is_plain(inputs.x) and (v0 is None or not is_wrapped(v0)) and (i0 is None or not is_wrapped(i0)):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            return apply_unwatched(_EagerMultiStep, constants, backend, *saveable(inputs))
        return _run_forward(inputs, constants, backend)
    args = *inputs, *constants, backend
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        s, v, i, v_seq = apply(_MultiStep, *args)
    else:
        if not torch.compiler.is_compiling() and any(t is not None and _is_batched(t) for t in (v0, i0)):
            raise RuntimeError(LEFT_BY_VMAP)
        s, v, i, v_seq = _forward_op(*args)
    has_i = len(NEURONS[constants.neuron].states) > 1
    return s, v, i if has_i else None, v_seq if constants.flags & STORE_V_SEQ else None


class _Guard(torch.autograd.Function):
    """Passes a reference path's outputs through as one node of the graph, which notices when the graph is gone.

    Its outputs may be written in place, as a kernel's may, so they are no views: the sequences, which were stacked just
    now and are saved nowhere, are declared as written; the states, which the graph may hold, are copied.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, v_seq: Tensor | None, *states: Tensor) -> tuple[Tensor | None, ...]:
        ctx.mark_dirty(*(t for t in (s, v_seq) if t is not None))
        if not s.requires_grad:  # of a surrogate without a derivative: a backward from such spikes fails, as the loop's
            ctx.mark_non_differentiable(s)
        copies = tuple(t.clone() for t in states)
        ctx.save_for_backward(s.new_empty(0))
        ctx.set_materialize_grads(False)
        return s, v_seq, *copies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _saved(ctx)
        return grads


def guard(s: Tensor, state: Any, v_seq: Tensor | None) -> tuple[Tensor, Any, Tensor | None]:
    """``(s, state, v_seq)`` of a reference path, whose backward after a forgotten reset names ``reset_net``."""
    states = state if isinstance(state, tuple) else (state,)
    if states[0].requires_grad and is_plain(states[0]):
        s, v_seq, *states = _Guard.apply(s, v_seq, *states)
        return s, tuple(states) if isinstance(state, tuple) else states[0], v_seq
    return s, state, v_seq
