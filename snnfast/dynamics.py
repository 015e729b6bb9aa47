"""The registry of neurons, each with its reference step: the ground truth of every backend, and the plain loop that
the benchmarks compare against.

The arithmetic is written so that each operation rounds once, in the state's dtype (float32, or float64 for float64
input), with Python scalars rounded once to it. Kernels repeat it operation for operation.

To add a neuron: an entry here, its struct in ``csrc/neurons.h``, its step in ``backends/triton_dynamics.py``, its
module in ``neuron.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .surrogate import SurrogateLike

DECAY_INPUT, SOFT_RESET, DETACH_RESET, STORE_V_SEQ = 1, 2, 4, 8
STRICT, MULTI_SPIKE, NO_RESET = 16, 32, 64
CONSTANT_INPUT = 128  # of the CPU kernels alone
CLIPPED = 256


class Constants(NamedTuple):
    """What is the same for all neurons and steps of a call, as numbers: the kernels' view of it."""

    neuron: int
    surrogate: int
    flags: int
    threshold: float
    v_reset: float  # 0 for soft reset
    tau: float
    alpha: float
    gain: float  # a factor on the surrogate's derivative
    v_leak: float  # where the potential of a neuron with a leak of its own goes without input; with CLIPPED, its lowest
    v_init: float  # the potential before the first step where no tensor gives it; a current starts at 0


class Inputs(NamedTuple):
    """The tensors that a call reads, in the order of the ops' signatures; ``None`` where there is none.

    ``decay`` is 0-d. ``threshold``, ``beta`` and ``current_decay``, for the neurons whose ``own`` names them, have one
    element for all neurons, or one for each neuron in the shape of one time step.
    """

    x: Tensor
    v0: Tensor | None = None
    i0: Tensor | None = None
    decay: Tensor | None = None
    threshold: Tensor | None = None
    beta: Tensor | None = None
    current_decay: Tensor | None = None


@dataclass(frozen=True)
class Parameters:
    """What a reference step needs besides input and state."""

    threshold: float | Tensor
    v_reset: float | None
    surrogate: SurrogateLike
    tau: float | Tensor = 1.0
    decay: Tensor | None = None
    decay_input: bool = True
    detach_reset: bool = False
    beta: float | Tensor = 1.0
    current_decay: float | Tensor = 0.0
    v_leak: float = 0.0
    strict: bool = False
    multi_spike: bool = False
    resets: bool = True
    v_min: float | None = None

    @property
    def v_rest(self) -> float:
        return 0.0 if self.v_reset is None else self.v_reset


State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Neuron:
    """One entry of the registry.

    ``step(x, state, p) -> (spike, state)`` advances one time step; ``states`` names the state variables, the potential
    first; ``learnable`` tells whether the neuron takes ``decay``, a 0-d tensor with a gradient; ``own`` names the
    parameters that may differ from neuron to neuron and have gradients; ``strict`` tells that a spike always needs more
    than the threshold.
    """

    name: str
    id: int
    step: Callable[[Tensor, State, Parameters], tuple[Tensor, State]]
    states: tuple[str, ...] = ("v",)
    learnable: bool = False
    own: tuple[str, ...] = ()
    strict: bool = False


def fire(h: Tensor, p: Parameters) -> Tensor:
    """Spikes: 1 where ``h`` reaches the threshold, or exceeds it (``strict``); or as often as it fits into ``h``."""
    u = h - p.threshold
    s = p.surrogate(u)
    if p.strict:
        return s + ((u > 0).to(s) - s).detach()
    if p.multi_spike:
        return s + ((h > 0) * torch.trunc(h / p.threshold) - s).detach()
    return s


def fire_and_reset(h: Tensor, p: Parameters) -> tuple[Tensor, Tensor]:
    """Spike, then reset: hard to ``v_reset``, or soft by the threshold; then no potential is lower than ``v_min``."""
    s = fire(h, p)
    r = s.detach() if p.detach_reset else s
    v = h - r * p.threshold if p.v_reset is None else r * p.v_reset + (1.0 - r) * h
    if p.v_min is not None:
        v = torch.relu(v - p.v_min) + p.v_min
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


def charge_exponential_lif(x: Tensor, v: Tensor, p: Parameters) -> Tensor:
    return p.beta * v + ((1.0 - p.beta) * x if p.decay_input else x)


def charge_box_lif(x: Tensor, v: Tensor, p: Parameters) -> Tensor:
    return v + p.beta * ((x + p.v_leak) - v)


def _charge_fire_reset(
    charge: Callable[[Tensor, Tensor, Parameters], Tensor],
) -> Callable[[Tensor, State, Parameters], tuple[Tensor, State]]:
    def step(x: Tensor, state: State, p: Parameters) -> tuple[Tensor, State]:
        s, v = fire_and_reset(charge(x, state[0], p), p)
        return s, (v,)

    return step


def step_current_lif(x: Tensor, state: State, p: Parameters) -> tuple[Tensor, State]:
    """Norse's LIF: the input jumps the current, which charges the potential and then decays."""
    v, i = state
    i = i + x
    s, v = fire_and_reset(v + p.beta * ((p.v_leak - v) + i), p)
    return s, (v, i - p.current_decay * i)


def _delayed_reset(current: bool, at_once: bool) -> Callable[[Tensor, State, Parameters], tuple[Tensor, State]]:
    """snnTorch's neurons: the reset comes a step after the spike, from the potential that the last step left, without
    a gradient; ``at_once`` (its ``reset_delay=False``) adds what a reset in the same step would have changed."""

    def step(x: Tensor, state: State, p: Parameters) -> tuple[Tensor, State]:
        v = state[0]
        r = (v - p.threshold > 0).to(v)
        soft = p.v_reset is None
        if current:
            x = p.current_decay * state[1] + x
            h = p.beta * v + x
            if p.resets and not soft:
                h = h - h * r
        else:
            h = p.beta * ((1.0 - r) * v if p.resets and not soft else v) + x
        if p.resets and soft:
            h = h - r * p.threshold
        s = fire(h, p)
        v = h
        if at_once and p.resets:
            v = h - (s - r) * (p.threshold if soft else h)
        return s, (v, x) if current else (v,)

    return step


_OWN = ("threshold", "beta")
_OWN_WITH_CURRENT = (*_OWN, "current_decay")
NEURONS: tuple[Neuron, ...] = (
    Neuron("IF", 0, _charge_fire_reset(charge_if)),
    Neuron("LIF", 1, _charge_fire_reset(charge_lif)),
    Neuron("ParametricLIF", 2, _charge_fire_reset(charge_parametric_lif), learnable=True),
    Neuron("ExponentialLIF", 3, _charge_fire_reset(charge_exponential_lif), own=_OWN),
    Neuron("BoxLIF", 4, _charge_fire_reset(charge_box_lif), own=_OWN, strict=True),
    Neuron("CurrentLIF", 5, step_current_lif, states=("v", "i"), own=_OWN_WITH_CURRENT, strict=True),
    Neuron("Leaky", 6, _delayed_reset(current=False, at_once=False), own=_OWN, strict=True),
    Neuron("LeakyAtOnce", 7, _delayed_reset(current=False, at_once=True), own=_OWN, strict=True),
    Neuron(
        "Synaptic",
        8,
        _delayed_reset(current=True, at_once=False),
        states=("v", "i"),
        own=_OWN_WITH_CURRENT,
        strict=True,
    ),
    Neuron(
        "SynapticAtOnce",
        9,
        _delayed_reset(current=True, at_once=True),
        states=("v", "i"),
        own=_OWN_WITH_CURRENT,
        strict=True,
    ),
)
IF, LIF, PARAMETRIC_LIF, EXPONENTIAL_LIF, BOX_LIF, CURRENT_LIF, LEAKY, LEAKY_AT_ONCE, SYNAPTIC, SYNAPTIC_AT_ONCE = (
    NEURONS
)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state and arithmetic for an input dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def multi_step(
    neuron: Neuron,
    x: Tensor,
    state: float | Tensor | tuple[float | Tensor, ...],
    p: Parameters,
    store_v_seq: bool = False,
) -> tuple[Tensor, Any, Tensor | None]:
    """The plain PyTorch loop over time, differentiable by autograd in everything.

    Args:
        neuron: entry of :data:`NEURONS`.
        x: input ``[T, *]``.
        state: before the first step, a number or ``[*]``; a tuple of as many as the neuron has, where it has several.
        p: the neuron's parameters.
        store_v_seq: also return the potential after each step.

    Returns:
        spikes ``[T, *]`` in ``x``'s dtype, final state ``[*]`` or a tuple of them, potentials ``[T, *]`` or ``None``.
    """
    dtype = state_dtype(x.dtype)

    def tensor(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(dtype)
        return torch.full_like(x[0], value, dtype=dtype, requires_grad=False)

    if x.is_cuda and not isinstance(p.tau, Tensor):
        # CUDA computes x / python_number as x * (1 / number), which is not the CPU's quotient; a tensor is divided by.
        p = replace(p, tau=torch.full((), p.tau, dtype=dtype, device=x.device))
    now: State = tuple(map(tensor, state)) if isinstance(state, tuple) else (tensor(state),)
    spikes, potentials = [], []
    for x_t in x.to(dtype):
        s, now = neuron.step(x_t, now, p)
        spikes.append(s)
        potentials.append(now[0])
    v_seq = torch.stack(potentials) if store_v_seq else None
    return torch.stack(spikes).to(x.dtype), now if isinstance(state, tuple) else now[0], v_seq
