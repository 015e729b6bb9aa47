"""The torch ops under batch norm and neuron in one.

``torch.ops.snnfast.bn_statistics``, ``bn_multi_step`` and ``bn_multi_step_backward`` take tensors and numbers only, so
``torch.compile`` sees them as nodes of its graph; ``x`` is ``[T, B, C, *]``, statistics are ``[G, C]`` in float64,
and ``batch_statistics`` tells whether they are those of ``x``, so that its gradient goes through them too.
:func:`statistics`, :func:`multi_step` and :func:`multi_step_backward` are what the package calls: eager calls go past
the dispatcher.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends, dynamics
from ..backends import native_batch_norm, triton_batch_norm
from ..backends.native_batch_norm import NormCall, Running
from ..dynamics import NEURONS, Constants
from ..tensors import empty_state, is_plain, laid_out_as, nothing, time_major

__all__ = ["DEVICES", "Connect", "multi_step", "multi_step_backward", "serves", "statistics"]

_INPUTS = (
    "Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? v0, Tensor? decay, Tensor? skip, "
    "int connect, float eps, int neuron, int surrogate, int flags, float v_threshold, float v_reset, float tau, "
    "float alpha, float gain, float v_leak, float v_init"
)
GIVEN = _INPUTS.count(",") + 1


class Connect(enum.IntEnum):
    """Where a residual connection joins (``Connect`` of csrc/dispatch.h)."""

    NONE = 0
    CHARGE = 1
    ADD = 2
    AND = 3
    IAND = 4


_library = torch.library.Library("snnfast", "FRAGMENT")
_library.define("bn_statistics(Tensor x, bool per_step) -> (Tensor mean, Tensor var)")
_library.define(f"bn_multi_step({_INPUTS}, bool batch_statistics=False) -> (Tensor s, Tensor v)")
_library.define(
    f"bn_multi_step_backward(Tensor? grad_s, Tensor? grad_v, {_INPUTS}, bool batch_statistics) -> "
    "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_v0, Tensor grad_decay, Tensor grad_skip)"
)


# ---- which kernels ----
DEVICES = ("cpu", "cuda", "xpu")  # that have kernels for batch norm and neuron in one


def serves(backend: str, device: torch.device) -> bool:
    """Whether there are kernels for both as one, and they are the backend that the neuron would take."""
    chosen = backends.choose(backend, device)
    if device.type == "cpu":
        return chosen == backends.NATIVE
    return chosen != backends.REFERENCE and chosen == backends.choose("auto", device)


def _kernels(x: Tensor) -> Any:
    if x.device.type == "cpu" or backends.choose("auto", x.device) == backends.NATIVE:
        return native_batch_norm
    return triton_batch_norm


# ---- the ops ----
def _statistics(x: Tensor, per_step: bool, running: Running | None = None) -> tuple[Tensor, Tensor]:
    x = time_major(x)
    _check(x)
    shape = x.shape[0] if per_step else 1, x.shape[2]
    mean, var = (torch.empty(shape, dtype=torch.float64, device=x.device) for _ in range(2))
    _kernels(x).statistics(x, mean, var, running)
    return mean, var


def _check(x: Tensor, **given: Tensor | None) -> None:
    """Raise where a kernel would read what is not there."""
    groups, channels = {(1, x.shape[2]), (x.shape[0], x.shape[2])}, {(x.shape[2],)}
    shapes: dict[str, set[Any]] = {"mean": groups, "var": groups, "weight": channels, "bias": channels}
    shapes |= {"v0": {x.shape[1:]}, "decay": {()}, "skip": {x.shape}}
    for name, t in given.items():
        if t is None:
            continue
        if t.device != x.device:
            raise RuntimeError(f"{name} must be on {x.device} like x, got a tensor on {t.device}")
        if tuple(t.shape) not in shapes[name]:
            wanted = " or ".join(str(tuple(s)) for s in shapes[name])
            raise ValueError(f"{name} must have the shape {wanted}, got {tuple(t.shape)}")
    if not x.numel():
        raise ValueError(f"x must have elements, got the shape {tuple(x.shape)}")


def _call(args: Any) -> NormCall:
    x, mean, var, weight, bias, v0, decay, skip, connect, eps, *constants = args
    x = time_major(x)
    state = dynamics.state_dtype(x.dtype)
    _check(x, mean=mean, var=var, weight=weight, bias=bias, v0=v0, decay=decay, skip=skip)
    neuron = NEURONS[constants[0]]
    if (decay is None) == neuron.learnable:
        raise ValueError(f"decay must be {'a tensor' if neuron.learnable else 'None'} for the neuron {neuron.name}")
    if skip is None and connect not in (Connect.NONE, Connect.ADD):
        raise ValueError(f"skip must be a tensor for connect={Connect(connect).name!r}")
    return NormCall(
        x,
        mean.double().contiguous(),
        var.double().contiguous(),
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        laid_out_as(v0, x[0], state),
        None if decay is None else decay.to(state),
        laid_out_as(skip, x, x.dtype),
        int(connect),
        eps,
        Constants._make(constants),
    )


def _multi_step(*args: Any) -> tuple[Tensor, Tensor]:
    call = _call(args[:GIVEN])
    s, v = torch.empty_like(call.x), empty_state(call.x)
    _kernels(call.x).forward(call, s, v)
    return s, v


def _multi_step_backward(*args: Any) -> tuple[Tensor, ...]:
    grad_s, grad_v, *rest, batch_statistics = args
    call = _call(rest)
    x, state = call.x, dynamics.state_dtype(call.x.dtype)
    if call.connect == Connect.ADD:  # whose gradient is that of the spikes
        call = call._replace(skip=None)
    grad_x = torch.empty_like(x)
    grad_weight, grad_bias = (torch.empty(x.shape[2], dtype=state, device=x.device) for _ in range(2))
    grad_v0 = None if call.v0 is None else empty_state(x)
    grad_decay = None if call.decay is None else torch.empty_like(call.decay)
    grad_skip = None
    if call.connect not in (Connect.NONE, Connect.ADD):
        grad_skip = torch.zeros_like(x) if call.connect != Connect.CHARGE and grad_s is None else torch.empty_like(x)
    _kernels(x).backward(
        call,
        batch_statistics,
        laid_out_as(grad_s, x, x.dtype),
        laid_out_as(grad_v, x[0], state),
        grad_x,
        grad_weight,
        grad_bias,
        grad_v0,
        grad_decay,
        grad_skip,
    )
    grad_v0, grad_decay, grad_skip = (nothing(x) if t is None else t for t in (grad_v0, grad_decay, grad_skip))
    return grad_x, grad_weight, grad_bias, grad_v0, grad_decay, grad_skip


for _key in ("CPU", "CUDA", "XPU"):
    _library.impl("bn_statistics", _statistics, _key)
    _library.impl("bn_multi_step", _multi_step, _key)
    _library.impl("bn_multi_step_backward", _multi_step_backward, _key)


@torch.library.register_fake("snnfast::bn_statistics")
def _statistics_fake(x: Tensor, per_step: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0] if per_step else 1, x.shape[2])
    return x.new_empty(shape, dtype=torch.float64), x.new_empty(shape, dtype=torch.float64)


@torch.library.register_fake("snnfast::bn_multi_step")
def _multi_step_fake(*args: Any) -> tuple[Tensor, Tensor]:
    x = time_major(args[0])
    return torch.empty_like(x), empty_state(x)


@torch.library.register_fake("snnfast::bn_multi_step_backward")
def _multi_step_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    x, v0, decay, connect = time_major(args[2]), args[7], args[8], args[10]
    dtype = dynamics.state_dtype(x.dtype)
    return (
        torch.empty_like(x),
        x.new_empty(x.shape[2], dtype=dtype),
        x.new_empty(x.shape[2], dtype=dtype),
        nothing(x) if v0 is None else empty_state(x),
        nothing(x) if decay is None else torch.empty_like(decay),
        nothing(x) if connect in (Connect.NONE, Connect.ADD) else torch.empty_like(x),
    )


# ---- calls ----
def statistics(x: Tensor, per_step: bool, running: Running | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[G, C]`` of each channel, over all time steps or for each; eager calls move
    ``running``."""
    return _statistics(x, per_step, running) if is_plain(x) else torch.ops.snnfast.bn_statistics(x, per_step)


def multi_step(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """What comes out, and the final potentials; the arguments are those of ``bn_multi_step``."""
    run: Callable[..., Any] = _multi_step if is_plain(x) else torch.ops.snnfast.bn_multi_step.default
    return run(x, *args)


def multi_step_backward(grad_s: Tensor | None, grad_v: Tensor | None, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """All gradients; the arguments are those of ``bn_multi_step_backward``."""
    op = torch.ops.snnfast.bn_multi_step_backward.default
    run: Callable[..., Any] = _multi_step_backward if is_plain(x) else op
    return run(grad_s, grad_v, x, *args)
