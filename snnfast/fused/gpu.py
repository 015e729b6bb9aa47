"""The ops of :mod:`snnfast.fused.ops` on GPUs: by the CUDA kernels, which make the vectors per channel too, or by
Triton's in the CPU's way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, dynamics, ops
from ..backends import native_batch_norm
from ..backends.native_batch_norm import NormCall
from ..dynamics import NEURONS, Constants
from ..ops import time_major
from .ops import Connect, _library, _multi_step, _multi_step_backward, _statistics

DEVICES = ("cpu", "cuda", "xpu")  # that have kernels for batch norm and neuron in one


def serves(backend: str, device: torch.device) -> bool:
    """Whether there are kernels for both as one, and they are the backend that the neuron would take."""
    chosen = backends.choose(backend, device)
    if device.type == "cpu":
        return chosen == backends.NATIVE
    return chosen != backends.REFERENCE and chosen == backends.choose("auto", device)


def _has_cuda_kernels(x: Tensor) -> bool:
    return backends.choose("auto", x.device) == backends.NATIVE


def statistics(x: Tensor, per_step: bool) -> tuple[Tensor, Tensor]:
    if not _has_cuda_kernels(x):
        return _statistics(x, per_step)
    x = time_major(x)
    _check(x)
    shape = x.shape[0] if per_step else 1, x.shape[2]
    mean, var = (torch.empty(shape, dtype=torch.float64, device=x.device) for _ in range(2))
    native_batch_norm.statistics(x, mean, var)
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
        ops._laid_out_as(v0, x[0], state),
        None if decay is None else decay.to(state),
        ops._laid_out_as(skip, x, x.dtype),
        int(connect),
        eps,
        Constants._make(constants),
    )


def multi_step(*args: Any) -> tuple[Tensor, Tensor]:
    if not _has_cuda_kernels(args[0]):
        return _multi_step(*args)
    call = _call(args)
    s, v = torch.empty_like(call.x), ops._empty_state(call.x)
    native_batch_norm.forward(call, s, v)
    return s, v


def multi_step_backward(*args: Any) -> tuple[Tensor, ...]:
    grad_s, grad_v, *rest, batch_statistics = args
    if not _has_cuda_kernels(rest[0]):
        return _multi_step_backward(*args)
    call = _call(rest)
    x, state = call.x, dynamics.state_dtype(call.x.dtype)
    if call.connect == Connect.ADD:  # whose gradient is that of the spikes
        call = call._replace(skip=None)
    grad_x = torch.empty_like(x)
    grad_weight, grad_bias = (torch.empty(x.shape[2], dtype=state, device=x.device) for _ in range(2))
    grad_v0 = None if call.v0 is None else ops._empty_state(x)
    grad_decay = None if call.decay is None else torch.empty_like(call.decay)
    grad_skip = None
    if call.connect not in (Connect.NONE, Connect.ADD):
        grad_skip = torch.zeros_like(x) if call.connect != Connect.CHARGE and grad_s is None else torch.empty_like(x)
    native_batch_norm.backward(
        call,
        batch_statistics,
        ops._laid_out_as(grad_s, x, x.dtype),
        ops._laid_out_as(grad_v, x[0], state),
        grad_x,
        grad_weight,
        grad_bias,
        grad_v0,
        grad_decay,
        grad_skip,
    )
    grad_v0, grad_decay, grad_skip = (ops._nothing(x) if t is None else t for t in (grad_v0, grad_decay, grad_skip))
    return grad_x, grad_weight, grad_bias, grad_v0, grad_decay, grad_skip


for _key in ("CUDA", "XPU"):
    _library.impl("bn_statistics", statistics, _key)
    _library.impl("bn_multi_step", multi_step, _key)
    _library.impl("bn_multi_step_backward", multi_step_backward, _key)
