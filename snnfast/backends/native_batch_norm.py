"""Batch norm and neuron in one by the compiled kernels (csrc/bn_channels.h, csrc/cuda_bn_launch.h).

Everything of a pass happens in one call, vectors per channel included; on a GPU the host launches two to four kernels
and waits for none. Tensors are laid out as :mod:`snnfast.fused.kernels` makes them: ``x`` ``[T, B, C, *]`` dense and
time-major, everything of its shape like it, states like one step of it; outputs are allocated by the caller and fully
written, and ``None`` where they are not wanted. :mod:`snnfast.backends.triton_batch_norm` has the same functions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dynamics import Constants
from . import native

_STATISTICS, _FORWARD, _BACKWARD = range(3)  # BatchNormPass in csrc/dispatch.h
_OUTPUTS = (
    *("s", "v", "grad_s", "grad_v"),
    *("grad_x", "grad_weight", "grad_bias", "grad_v0", "grad_decay", "grad_skip"),
)
_NO_NEURON = Constants(0, 0, 0, 1.0, 0.0, 2.0, 1.0, 1.0, 0.0, 0.0)


class NormCall(NamedTuple):
    """What forward and backward read: ``mean`` and ``var`` are ``[G, C]`` in float64, ``G`` 1 or ``T``; ``weight`` and
    ``bias`` ``[C]``; ``connect`` is a number of :class:`snnfast.fused.kernels.Connect`."""

    x: Tensor
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    v0: Tensor | None
    decay: Tensor | None
    skip: Tensor | None
    connect: int
    eps: float
    constants: Constants


class Running(NamedTuple):
    """Statistics ``[C]`` that move by ``momentum`` towards those of each group; contiguous, and of one dtype."""

    mean: Tensor
    var: Tensor
    momentum: float


def move(running: Running, mean: Tensor, var: Tensor, count: int) -> None:
    """What the kernels do to ``running``, by torch; ``count`` elements are behind each mean."""
    for group in range(mean.shape[0]):
        running.mean.lerp_(mean[group].to(running.mean.dtype), running.momentum)
        unbiased = var[group] * (count / (count - 1))
        running.var.lerp_(unbiased.to(running.var.dtype), running.momentum)


def _inner(x: Tensor) -> int:
    """How many neighbours in memory share a channel of ``x``."""
    return x.stride(2) if x.shape[2] > 1 else x.numel() // x.shape[0]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _dtype(t: Tensor | None) -> int:
    return 0 if t is None else native._DTYPE[t.dtype]


def _running(running: Running) -> tuple[int, int, int, float]:
    mean, var, momentum = running
    return mean.data_ptr(), var.data_ptr(), native._DTYPE[mean.dtype], momentum


def _run(
    run: int, c: NormCall, batch_statistics: bool = True, running: Running | None = None, **given: Tensor | None
) -> None:
    x = c.x
    T = x.shape[0]
    if native._C is None:  # of a user's own call of the op: the modules run apart there
        raise RuntimeError(f"batch norm and neuron in one have no kernel for {x.device}: {native.missing(x.device)}")
    arguments = (
        native._config(c.constants),
        run,
        native._DTYPE[x.dtype],
        T,
        x.numel() // T,
        x.data_ptr(),
        _address(c.v0),
        _address(c.decay),
        x.shape[2],
        _inner(x),
        c.mean.shape[0],
        batch_statistics,
        c.mean.data_ptr(),
        c.var.data_ptr(),
        *((0, 0, 0, 0.0) if running is None else _running(running)),
        _address(c.weight),
        _dtype(c.weight),
        _address(c.bias),
        _dtype(c.bias),
        c.eps,
        c.connect,
        _address(c.skip),
        *(_address(given.get(name)) for name in _OUTPUTS),
    )
    C: Any = native._C
    if x.device.type == "cpu":
        C.cpu_batch_norm(torch.get_num_threads(), *arguments)
        return
    workspace = torch.empty(C.cuda_batch_norm_workspace(*arguments), dtype=torch.uint8, device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    C.cuda_batch_norm(x.device.index, stream, workspace.data_ptr(), *arguments)


def statistics(
    x: Tensor,
    # outputs
    mean: Tensor,
    var: Tensor,
    running: Running | None = None,
) -> None:
    """``mean`` and biased ``var`` ``[G, C]`` in float64 of the channels of ``x``, ``G`` being 1 or ``T``."""
    _run(_STATISTICS, NormCall(x, mean, var, *(None,) * 5, 0, 0.0, _NO_NEURON), running=running)


def forward(
    call: NormCall,
    # outputs
    s: Tensor,
    v: Tensor,
) -> None:
    """What comes out, ``s``, and the final potentials."""
    _run(_FORWARD, call, s=s, v=v)


def backward(
    call: NormCall,
    batch_statistics: bool,
    grad_s: Tensor | None,
    grad_v: Tensor | None,
    # outputs
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_v0: Tensor | None,
    grad_decay: Tensor | None,
    grad_skip: Tensor | None,
) -> None:
    """All gradients; ``batch_statistics`` tells whether they go through mean and variance too."""
    _run(
        _BACKWARD,
        call,
        batch_statistics,
        grad_s=grad_s,
        grad_v=grad_v,
        grad_x=grad_x,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        grad_v0=grad_v0,
        grad_decay=grad_decay,
        grad_skip=grad_skip,
    )
