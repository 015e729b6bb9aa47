"""Static inputs as sequences: ``[B, *]`` -> ``[T, B, *]``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._arguments import check_steps, without
from .base import MemoryModule, StepModule

__all__ = ["LatencyEncoder", "PoissonEncoder", "direct", "latency", "poisson"]


def _check(x: Tensor, timesteps: int) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {got}")
    check_steps("timesteps", timesteps)


def direct(x: Tensor, timesteps: int) -> Tensor:
    """The same input at every time step, a constant current; the first layer learns the coding.

    From Rueckauer et al., "Conversion of Continuous-Valued Deep Networks to Efficient Event-Driven Networks for Image
    Classification", Frontiers in Neuroscience 2017.

    Args:
        x: input ``[B, *]``, floating point.
        timesteps: ``T``.

    Returns:
        ``[T, B, *]``, a view of ``x`` that takes no memory; write to its ``.clone()``, not to it.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``timesteps`` is not a whole number from 1.

    Example:
        >>> direct(torch.tensor([0.2, 0.7]), 3).shape
        torch.Size([3, 2])
    """
    _check(x, timesteps)
    return x.expand(timesteps, *x.shape)


def poisson(x: Tensor, timesteps: int, generator: torch.Generator | None = None) -> Tensor:
    """At each time step a spike with probability ``x``, independently: rate coding.

    Args:
        x: probabilities ``[B, *]``, floating point; 0 and below never spikes, 1 and above always.
        timesteps: ``T``.
        generator: source of the randomness on ``x``'s device, for a reproducible draw; default PyTorch's own.

    Returns:
        Spikes ``[T, B, *]`` in ``x``'s dtype; without a gradient to ``x``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``timesteps`` is not a whole number from 1.

    Example:
        >>> x = torch.full((1000,), 0.25)
        >>> s = poisson(x, 8, torch.Generator().manual_seed(0))
        >>> s.shape, round(s.mean().item(), 1)
        (torch.Size([8, 1000]), 0.2)
    """
    _check(x, timesteps)
    # Drawn in float32 at least: bfloat16 has 256 values below 1.
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # With the argument generator, even None, torch.rand takes no symbolic sizes.
    source: Any = {} if generator is None else {"generator": generator}
    draw = torch.rand((timesteps, *x.shape), device=x.device, dtype=dtype, **source)
    return (draw < x).to(x.dtype)


def latency(x: Tensor, timesteps: int, encoding: str = "linear") -> Tensor:
    """One spike per element, the earlier the larger ``x``: time-to-first-spike coding.

    The spike comes at step ``(T - 1) (1 - x)`` (``'linear'``), or ``T - 1 - ln(1 + (e^(T-1) - 1) x)`` (``'log'``),
    rounded, with the first step 0.

    Args:
        x: intensities ``[B, *]`` from 0 to 1, floating point; beyond, as the nearer of both.
        timesteps: ``T``.
        encoding: ``'linear'`` or ``'log'``.

    Returns:
        Spikes ``[T, B, *]`` in ``x``'s dtype; without a gradient to ``x``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``timesteps`` is not a whole number from 1, or another encoding.

    Example:
        >>> latency(torch.tensor([1.0, 0.5, 0.0]), 3)
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """
    _check(x, timesteps)
    if encoding not in ("linear", "log"):
        raise ValueError(f"encoding must be 'linear' or 'log', got {encoding!r}")
    # 16-bit numbers neither count the steps of a long sequence nor hold e^(T-1) of a short one.
    value = x.detach().to(torch.promote_types(x.dtype, torch.float32)).clamp(0, 1)
    last = timesteps - 1.0
    if encoding == "linear":
        time = last * (1.0 - value)
    elif last < 80:
        time = last - torch.log(math.expm1(last) * value + 1.0)
    else:  # e^last overflows float32; this is the same without it
        time = last - torch.logaddexp(torch.log1p(-value), last + value.log())
    steps = torch.arange(timesteps, device=x.device).view(-1, *[1] * x.dim())
    return (steps == time.round()).to(x.dtype)


class PoissonEncoder(nn.Module, StepModule):
    """SpikingJelly's encoder: a spike with probability ``x``, element by element, with PyTorch's own randomness.

    In both step modes the shape stays: repeat ``x`` over time for multi-step mode, or call :func:`poisson`.
    """

    def __init__(self, step_mode: str = "s") -> None:
        super().__init__()
        self.step_mode = step_mode

    def forward(self, x: Tensor) -> Tensor:
        # Drawn in float32 at least: one of 256 draws in bfloat16 is 0, a spike of an x of 0.
        return torch.rand_like(x, dtype=torch.promote_types(x.dtype, torch.float32)).le(x).to(x)


class LatencyEncoder(MemoryModule):
    """SpikingJelly's stateful form of :func:`latency`: call after call the next time step, and round again after ``T``.

    The first call's ``x`` is encoded; later ones may leave it out until :meth:`reset`. An ``x`` of another shape starts
    afresh.

    Args:
        T: time steps.
        enc_function: ``'linear'`` or ``'log'``.
        step_mode: ``'s'`` or ``'m'``; ``[T, B, *]`` in ``'m'``, of which the first step is encoded.
    """

    spike: Tensor | None
    t: int

    def __init__(self, T: int, enc_function: str = "linear", step_mode: str = "s") -> None:
        super().__init__()
        latency(torch.zeros(1), T, enc_function)  # raises on wrong arguments
        self.T = T
        self.enc_function = enc_function
        self.step_mode = step_mode
        self.register_memory("spike", None)
        self.register_memory("t", 0)

    def single_step_forward(self, x: Tensor | None = None) -> Tensor:
        """The spikes ``[B, *]`` of the next time step."""
        if self.spike is None and x is None:
            raise ValueError("x must be given at the first call after a reset, got None")
        if x is not None and (self.spike is None or self.spike.shape[1:] != x.shape):
            self.spike, self.t = latency(x, self.T, self.enc_function), 0
        assert self.spike is not None
        s = self.spike[self.t]
        self.t = (self.t + 1) % self.T
        return s

    def extra_repr(self) -> str:
        return f"T={self.T}"


if not TYPE_CHECKING:  # to a type checker, what is not there is an error
    __getattr__ = without(__name__)
