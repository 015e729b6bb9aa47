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
    if x.dtype is torch.float32:  # the usual call, in less time
        return x.new_empty_strided(x.shape[1:], x.stride()[1:])
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
    own = [t if t is None or t.numel() == 1 else _laid_out_as(t.expand_as(step), step, dtype) for t in own]
    return Inputs(x, _laid_out_as(v0, step, dtype), _laid_out_as(i0, step, dtype), decay, *own)


def _run_forward(inputs: Inputs, constants: Constants, backend: int) -> Outputs:
    inputs = _prepared(inputs)
    x = inputs.x
    s, v = torch.empty_like(x), _empty_state(x)
    i = _empty_state(x) if len(NEURONS[constants.neuron].states) > 1 else None
    v_seq = _empty_sequence(x) if constants.flags & STORE_V_SEQ else None
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
    states = tuple(None if t is None else _empty_state(x) for t in inputs[1:3])
    grad_x = torch.empty_like(x)
    grad_decay = None if inputs.decay is None else torch.zeros_like(inputs.decay)
    own = tuple(_empty_state(x) if own_gradients and t is not None else None for t in inputs[_FIRST_OWN:])
    if x.numel():
        dtype = dynamics.state_dtype(x.dtype)
        grad_s, grad_v, grad_i, grad_v_seq = grads
        grads = (
            _laid_out_as(grad_s, x, x.dtype),
            None if grad_v is None else _laid_out_as(grad_v, x[0], dtype),
            None if grad_i is None else _laid_out_as(grad_i, x[0], dtype),
            _laid_out_as(grad_v_seq, x, dtype),
        )
        backends.KERNELS[backend].backward(constants, grads, inputs, grad_x, *states, grad_decay, *own)
    own_sums = (
        None if g is None or t is None else summed(g, t.shape) for g, t in zip(own, given[_FIRST_OWN:], strict=True)
    )
    return grad_x, *states, grad_decay, *own_sums


def _or_nothing(x: Tensor, *results: Tensor | None) -> tuple[Tensor, ...]:
    """An op has a fixed number of outputs; empty ones stand for those that there are not."""
    return tuple(_nothing(x) if r is None else r for r in results)


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
    i = _empty_state(x) if len(NEURONS[constants.neuron].states) > 1 else _nothing(x)
    v_seq = _empty_sequence(x) if constants.flags & STORE_V_SEQ else _nothing(x)
    return torch.empty_like(x), _empty_state(x), i, v_seq


@torch.library.register_fake("snnfast::multi_step_backward")
def _multi_step_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, own_gradients = Inputs(*args[_OUTPUTS : _OUTPUTS + _GIVEN]), args[-1]
    x = time_major(inputs.x)
    return (
        torch.empty_like(x),
        *(_nothing(x) if t is None else _empty_state(x) for t in inputs[1:3]),
        _nothing(x) if inputs.decay is None else torch.empty_like(inputs.decay),
        *(
            summed(_empty_state(x), t.shape) if own_gradients and t is not None else _nothing(x)
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
    )
    v: Any = c.v_init if inputs.v0 is None else inputs.v0
    if len(neuron.states) > 1:
        v = v, 0.0 if inputs.i0 is None else inputs.i0
    s, state, v_seq = dynamics.multi_step(neuron, inputs.x, v, parameters, bool(c.flags & STORE_V_SEQ))
    return (s, *state, v_seq) if isinstance(state, tuple) else (s, state, None, v_seq)


def is_unwatched() -> bool:
    """Whether nobody looks at calls now: no compilation or trace, no torch.func transform or tangents, no mode."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def _is_plain(x: Tensor) -> bool:
    """Whether nobody looks at a call with this tensor, which is no subclass and has its own values in memory."""
    return type(x) is Tensor and is_unwatched() and not x.is_neg() and (x.is_cpu or x.device.type != "meta")


def saveable(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Copies of those that inference mode made, a state say, for autograd saves no such tensor."""
    for t in tensors:
        if t is not None and t.is_inference():
            return [None if t is None else t.clone() if t.is_inference() else t for t in tensors]
    return tensors


def multi_step(inputs: Inputs, constants: Constants, backend: int) -> Outputs:
    """Run a fused neuron over time: ``(s, v, i, v_seq)``, with ``i`` and ``v_seq`` ``None`` where there is none.

    The arguments are as the kernels need them (:mod:`snnfast.functional` checks a user's); ``backend`` is an index of
    :data:`snnfast.backends.KERNELS`.
    """
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if _is_plain(inputs.x):
        if needs_grad:
            return _EagerMultiStep.apply(constants, backend, *saveable(inputs))
        return _run_forward(inputs, constants, backend)
    args = *inputs, *constants, backend
    if needs_grad or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        s, v, i, v_seq = apply(_MultiStep, *args)
    else:
        s, v, i, v_seq = _forward_op(*args)
    has_i = len(NEURONS[constants.neuron].states) > 1
    return s, v, i if has_i else None, v_seq if constants.flags & STORE_V_SEQ else None


# ---- an input that is the same at every step ----
CONSTANT_STEPS = 16  # the most that the kernels take


def _constant_call(
    x: Tensor, T: int, v0: Tensor | None, decay: Tensor | None, constants: Constants
) -> tuple[Constants, Inputs]:
    flags = constants.flags | dynamics.CONSTANT_INPUT
    inputs = Inputs(x.expand(T, *x.shape), _laid_out_as(v0, x, x.dtype), None, decay)
    return constants._replace(flags=flags), inputs


def _run_constant(
    x: Tensor, T: int, v0: Tensor | None, decay: Tensor | None, constants: Constants
) -> tuple[Tensor, Tensor]:
    s, v = x.new_empty_strided((T, *x.shape), (x.numel(), *x.stride())), torch.empty_like(x)
    backends.KERNELS[backends.NATIVE].forward(*_constant_call(x, T, v0, decay, constants), s, v, None, None)
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
        return _run_constant(x, T, v0, decay, constants)

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor | None, grad_v: Tensor | None) -> tuple[Any, ...]:
        x, v0, decay = _saved(ctx)
        constants, T = ctx.call
        if grad_s is None and grad_v is None:
            return (None,) * 5
        if torch.is_grad_enabled():  # create_graph: by the ordinary function, on a repeated input
            given = Inputs(x.expand(T, *x.shape).contiguous(), v0, None, decay)
            found = _MultiStepBackward.apply(grad_s, grad_v, None, None, *given, *constants, backends.NATIVE, False)
            grad_x, grad_v0, _, grad_decay, *_ = _wanted(found, given, False)
            return grad_x.sum(0), None, grad_v0, grad_decay, None
        grad_x, grad_v0 = torch.empty_like(x), None if v0 is None else torch.empty_like(x)
        grad_decay = None if decay is None else torch.zeros_like(decay)
        strides = (x.numel(), *x.stride())
        if grad_s is not None and grad_s.stride() != strides:
            grad_s = x.new_empty_strided((T, *x.shape), strides).copy_(grad_s)
        grads = grad_s, _laid_out_as(grad_v, x, x.dtype), None, None
        constants, inputs = _constant_call(x, T, v0, decay, constants)
        outputs = grad_x, grad_v0, None, grad_decay, None, None, None
        backends.KERNELS[backends.NATIVE].backward(constants, grads, inputs, *outputs)
        return grad_x, None, grad_v0, grad_decay, None


def takes_constant_input(x: Tensor, T: int) -> bool:
    """Whether :func:`constant_input` serves ``x``; else it is to be repeated."""
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return (
        x.is_cpu
        and x.dtype is torch.float32
        and 1 < T <= CONSTANT_STEPS
        and x.dim() > 0
        and x.numel() > 0
        and dense
        and _is_plain(x)
        and backends.choose("auto", x.device) == backends.NATIVE
    )


def constant_input(
    x: Tensor, T: int, v0: Tensor | None, decay: Tensor | None, constants: Constants
) -> tuple[Tensor, Tensor]:
    """Spikes ``[T, *]`` and final potential of a neuron with one state that gets ``x`` ``[*]`` at each of ``T`` steps.

    For neurons without parameters of their own; states and decay in float32.

    Raises:
        ValueError: the kernels cannot take ``x`` (:func:`takes_constant_input`), which is then to be repeated.
    """
    if not takes_constant_input(x, T):
        raise ValueError(
            f"x must be a dense float32 tensor on the CPU, and T from 2 to {CONSTANT_STEPS}, got {x.dtype} of shape "
            f"{tuple(x.shape)} with strides {x.stride()} on {x.device}, T = {T}; repeat it for multi_step"
        )
    tensors = x, v0, decay
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        x, v0, decay = saveable(tensors)  # type: ignore[assignment]
        return _ConstantInput.apply(x, T, v0, decay, constants)
    return _run_constant(x, T, v0, decay, constants)


class _Guard(torch.autograd.Function):
    """Passes a reference path's outputs through as one node of the graph, which notices when the graph is gone.

    Its outputs may be written in place, as a kernel's may, so they are no views: the sequences, which were stacked just
    now and are saved nowhere, are declared as written; the states, which the graph may hold, are copied.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, v_seq: Tensor | None, *states: Tensor) -> tuple[Tensor | None, ...]:
        ctx.mark_dirty(*(t for t in (s, v_seq) if t is not None))
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
    if states[0].requires_grad and _is_plain(states[0]):
        s, v_seq, *states = _Guard.apply(s, v_seq, *states)
        return s, tuple(states) if isinstance(state, tuple) else states[0], v_seq
    return s, state, v_seq
