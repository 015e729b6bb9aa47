"""The registry of neurons, each with its reference step: the ground truth of every backend, and the plain loop that
the benchmarks compare against.

The arithmetic is written so that each operation rounds once, in the state's dtype (float32, or float64 for float64
input), with Python scalars rounded once to it. Kernels repeat it operation for operation.

To add a neuron: an entry here, its struct in ``csrc/neurons.h``, its step in ``backends/triton_kernels.py``, its module
in ``neuron.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .surrogate import SurrogateLike

DECAY_INPUT, SOFT_RESET, DETACH_RESET, STORE_V_SEQ = 1, 2, 4, 8


class Constants(NamedTuple):
    """What is the same for all neurons and steps of a call, as numbers: the kernels' view of it."""

    neuron: int
    surrogate: int
    flags: int
    threshold: float
    v_reset: float  # 0 for soft reset
    tau: float
    alpha: float
    v_init: float  # the state before the first step where no tensor gives it


@dataclass(frozen=True)
class Parameters:
    """What a reference step needs besides input and state."""

    threshold: float
    v_reset: float | None
    surrogate: SurrogateLike
    tau: float | Tensor = 1.0
    decay: Tensor | None = None
    decay_input: bool = True
    detach_reset: bool = False

    @property
    def v_rest(self) -> float:
        return 0.0 if self.v_reset is None else self.v_reset


State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Neuron:
    """One entry of the registry.

    ``step(x, state, p) -> (spike, state)`` advances one time step; ``states`` names the state variables, ``learnable``
    tells whether the neuron takes ``decay``, a 0-d tensor with a gradient.
    """

    name: str
    id: int
    step: Callable[[Tensor, State, Parameters], tuple[Tensor, State]]
    states: tuple[str, ...] = ("v",)
    learnable: bool = False


def fire_and_reset(h: Tensor, p: Parameters) -> tuple[Tensor, Tensor]:
    """Spike where ``h`` reaches the threshold, then reset: hard to ``v_reset``, or soft by the threshold."""
    s = p.surrogate(h - p.threshold)
    r = s.detach() if p.detach_reset else s
    v = h - r * p.threshold if p.v_reset is None else r * p.v_reset + (1.0 - r) * h
    return s, v


def charge_if(x: Tensor, v: Tensor, p: Parameters) -> Tensor:
    return v + x


def charge_lif(x: Tensor, v: Tensor, p: Parameters) -> Tensor:
    if p.decay_input:
        return v + (x - (v - p.v_rest)) / p.tau
    return v - (v - p.v_rest) / p.tau + x


def charge_parametric_lif(x: Tensor, v: Tensor, p: Parameters) -> Tensor:
    assert p.decay is not None
    if p.decay_input:
        return v + (x - (v - p.v_rest)) * p.decay
    return v - (v - p.v_rest) * p.decay + x


def _charge_fire_reset(
    charge: Callable[[Tensor, Tensor, Parameters], Tensor],
) -> Callable[[Tensor, State, Parameters], tuple[Tensor, State]]:
    def step(x: Tensor, state: State, p: Parameters) -> tuple[Tensor, State]:
        s, v = fire_and_reset(charge(x, state[0], p), p)
        return s, (v,)

    return step


NEURONS: tuple[Neuron, ...] = (
    Neuron("IF", 0, _charge_fire_reset(charge_if)),
    Neuron("LIF", 1, _charge_fire_reset(charge_lif)),
    Neuron("ParametricLIF", 2, _charge_fire_reset(charge_parametric_lif), learnable=True),
)
IF, LIF, PARAMETRIC_LIF = NEURONS


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state and arithmetic for an input dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def multi_step(
    neuron: Neuron, x: Tensor, v: float | Tensor, p: Parameters, store_v_seq: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The plain PyTorch loop over time, differentiable by autograd in everything.

    Args:
        neuron: entry of :data:`NEURONS`.
        x: input ``[T, *]``.
        v: state before the first step, a number or ``[*]``.
        p: the neuron's parameters.
        store_v_seq: also return the potential after each step.

    Returns:
        spikes ``[T, *]`` in ``x``'s dtype, final state ``[*]``, potentials ``[T, *]`` or ``None``.
    """
    dtype = state_dtype(x.dtype)
    if isinstance(v, Tensor):
        v = v.to(dtype)
    else:
        v = torch.full_like(x[0], v, dtype=dtype, requires_grad=False)
    if x.is_cuda and not isinstance(p.tau, Tensor):
        # CUDA computes x / python_number as x * (1 / number), which is not the CPU's quotient; a tensor is divided by.
        p = Parameters(**{**p.__dict__, "tau": torch.full((), p.tau, dtype=dtype, device=x.device)})
    state: State = (v,)
    spikes, potentials = [], []
    for x_t in x.to(dtype):
        s, state = neuron.step(x_t, state, p)
        spikes.append(s)
        potentials.append(state[0])
    return torch.stack(spikes).to(x.dtype), state[0], torch.stack(potentials) if store_v_seq else None
