"""snnTorch's Leaky and Synaptic (1.0.0): a reset that comes a step late, from the stored potential, without gradient.

Potentials and spikes are float32, as snnTorch's spikes always are; any other input runs its own ``forward``.
"""

# mypy: disable-error-code="import-untyped, import-not-found"
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import snntorch
import torch
from snntorch import surrogate as their_surrogate
from torch import Tensor, nn

from ... import dynamics, functional, surrogate
from .base import Fused, Plan, broadcasts, of_this_step, served
from .onestep import one_step

# The function that made a surrogate: how the numbers in its closure give a fused one.
_MAKERS: dict[str, Callable[..., surrogate.SurrogateFunction]] = {
    "atan": lambda alpha: surrogate.ATan(float(alpha)),
    "fast_sigmoid": lambda slope: surrogate.Scaled(surrogate.SoftSign(float(slope)), 2 / slope),
    "sigmoid": lambda slope: surrogate.Sigmoid(float(slope)),
}


_MULTI_STEP = tuple(
    getattr(snntorch, n) for n in ("StateLeaky", "LinearLeaky", "AssociativeLeaky") if hasattr(snntorch, n)
)


def is_neuron(module: nn.Module) -> bool:
    return isinstance(module, snntorch.SpikingNeuron)


def is_stateful(module: nn.Module) -> bool:
    return isinstance(module, snntorch.SpikingNeuron)


def is_multi_step(module: nn.Module) -> bool:
    return isinstance(module, _MULTI_STEP)


def fused_surrogate(spike_grad: Any) -> surrogate.SurrogateFunction | str:
    """The fused surrogate that computes a ``spike_grad`` of ``snntorch.surrogate``, or why there is none."""
    name, _, inner = getattr(spike_grad, "__qualname__", "").partition(".<locals>.")
    if getattr(spike_grad, "__module__", "") != their_surrogate.__name__ or inner != "inner" or name not in _MAKERS:
        return f"spike_grad {name or type(spike_grad).__name__} is not a fused surrogate"
    values = dict(zip(spike_grad.__code__.co_freevars, (c.cell_contents for c in spike_grad.__closure__), strict=True))
    if not all(isinstance(v, (int, float)) and v > 0 for v in values.values()):
        return f"spike_grad {name} has {values}, and the fused one needs numbers above 0"
    return _MAKERS[name](**values)


class LeakyPlan(Plan):
    def __init__(
        self, module: Any, neuron: dynamics.Neuron, graded: bool, watched: tuple[Tensor, ...], **kw: Any
    ) -> None:
        super().__init__(neuron, watched, ("graded_spikes_factor", "reset_mechanism_val"), **kw)
        self.graded = graded
        self.returns_states = module.output or not module.init_hidden


class FusedLeaky(Fused):
    peer = snntorch.Leaky
    state_names = frozenset({"mem", "reset"})
    methods: ClassVar[tuple[str, ...]] = (
        "forward",
        "fire",
        "mem_reset",
        "_base_state_function",
        "_base_sub",
        "_base_zero",
        "_base_int",
    )
    neurons = (dynamics.LEAKY_AT_ONCE, dynamics.LEAKY)
    own_names: tuple[str, ...] = ("threshold", "beta")

    @classmethod
    def plan(cls, module: Any) -> LeakyPlan | str:
        if module.surrogate_disable:
            return "surrogate_disable=True: its spikes have no gradient"
        if module.inhibition:
            return "inhibition couples the neurons of a layer"
        if module.state_quant:
            return "state_quant rounds the state at every step"
        kind = fused_surrogate(module.spike_grad)
        if isinstance(kind, str):
            return kind
        functions = {cls.peer._base_sub: 0, cls.peer._base_zero: 1, cls.peer._base_int: 2}
        mechanism = functions.get(getattr(module.state_function, "__func__", None))
        if mechanism is None or (not module.reset_delay and mechanism != int(module.reset_mechanism_val)):
            return "reset_mechanism was changed after the neuron was made, which snnTorch follows only in part"
        graded = module.graded_spikes_factor
        if graded.numel() != 1 or graded.dim() > 1 or (float(graded.detach()) == 0 and not module.reset_delay):
            return f"graded_spikes_factor is {graded.tolist()}; one number other than 0 is needed"
        if any(getattr(module, name).dim() and getattr(module, name).dtype != torch.float32 for name in cls.own_names):
            return f"{' or '.join(cls.own_names)} holds other numbers than float32, which would widen the state"
        return LeakyPlan(
            module,
            cls.neurons[bool(module.reset_delay)],
            graded.requires_grad or float(graded.detach()) != 1,
            (graded, module.reset_mechanism_val),
            v_reset=0.0 if mechanism == 1 else None,
            resets=mechanism != 2,
            strict=True,
            surrogate_function=kind,
        )

    def _own(self: Any, plan: LeakyPlan) -> tuple[Tensor, ...]:
        """Threshold and clamped decays; the same tuple again while none is learnt (the plan sees changes)."""
        if plan.own is not None:
            given, own = plan.own
            for t in given:
                if t.requires_grad:
                    break
            else:
                return own
        given = [getattr(self, name) for name in self.own_names]
        own = (given[0], *(t.clamp(0, 1) for t in given[1:]))
        if not torch.is_inference_mode_enabled() and not any(t.requires_grad for t in given):
            if plan.own is None:
                plan.watch(self.own_names, given)
            plan.own = given, own
        return own

    def _over_time(self: Any, x_seq: Tensor, state: Any, plan: LeakyPlan, store_v_seq: bool = False) -> Any:
        """``[T, *]`` -> spikes ``[T, *]``, state after the last step, potentials ``[T, *]`` or ``None``."""
        s, state, v_seq = functional.multi_step(
            plan.neuron, x_seq, state, None, self._own(plan), store_v_seq=store_v_seq, **plan.keywords
        )
        return s * self.graded_spikes_factor if plan.graded else s, state, v_seq

    def _unrolled(self: Any, x_seq: Tensor, args: Any, kwargs: Any, used: set[int] | None) -> Any:
        """One call over time for :func:`snnfast.unroll`, with time folded into the batch of what it returns."""
        plan, step = self._plan(), x_seq[0]
        names = tuple(inspect.signature(self.forward).parameters)[1:]
        given = {**dict(zip(names, args)), **kwargs}  # noqa: B905 (fewer arguments than names)
        if type(plan) is str or not served(step) or (self.init_hidden and any(v is not None for v in given.values())):
            return NotImplemented
        buffers = self._buffers
        state = [buffers[name] if given.get(name) is None else given[name] for name in reversed(names)]  # mem first
        fits = broadcasts(self._own(plan), step.shape)
        for k, (value, name) in enumerate(zip(state, reversed(names), strict=True)):
            if value.shape != step.shape:
                state[k] = _zero(step, given.get(name) is None)
            elif not of_this_step(value, step, step.shape):
                fits = False
        if not fits:
            return NotImplemented
        mem = len(names)  # its place in what is returned
        wanted = plan.returns_states and (used is None or mem in used)
        s, after, v_seq = self._over_time(x_seq, tuple(state) if mem > 1 else state[0], plan, wanted)
        for name, value in zip(reversed(names), after if mem > 1 else (after,), strict=True):
            buffers[name] = value
        s = s.flatten(0, 1)
        if not plan.returns_states:
            return s
        potentials = None if v_seq is None else v_seq.flatten(0, 1)
        if mem == 1:
            return s, potentials
        currents = self._currents(x_seq, state[1]) if used is None or 1 in used else None
        return s, currents, potentials

    def forward(self: Any, input_: Any, mem: Any = None) -> Any:
        plan = self._plan()
        if type(plan) is str or not served(input_) or (mem is not None and self.init_hidden):
            return super().forward(input_, mem)  # type: ignore[misc]
        buffers = self._buffers
        v, own = buffers["mem"] if mem is None else mem, self._own(plan)
        fits = broadcasts(own, input_.shape)
        if v.shape != input_.shape:
            v = _zero(input_, mem is None)
        elif not of_this_step(v, input_, input_.shape):
            fits = False
        if not fits:
            return super().forward(input_, mem)  # type: ignore[misc]
        s, v = one_step(plan, input_, v, own)
        buffers["mem"] = v
        if plan.graded:
            s = s * self.graded_spikes_factor
        return (s, v) if plan.returns_states else s


def _zero(step: Tensor, kept: bool) -> Any:
    """A state that starts afresh. One that the module keeps is a tensor, as after snnTorch's reset: the two calls that
    gradient checkpointing compares then save the same, the first call of all included."""
    return torch.zeros_like(step, requires_grad=False) if kept else 0.0


class FusedSynaptic(FusedLeaky):
    peer = snntorch.Synaptic
    state_names = frozenset({"mem", "syn", "reset"})
    methods = (*FusedLeaky.methods, "_base_state_reset_zero")
    neurons = (dynamics.SYNAPTIC_AT_ONCE, dynamics.SYNAPTIC)
    own_names = ("threshold", "beta", "alpha")

    def _currents(self: Any, x_seq: Tensor, syn: Any) -> Tensor:
        """The current after each step, which is the potential of a leaky neuron that never resets."""
        own = self.threshold.detach(), self.alpha.clamp(0, 1)
        return functional.multi_step(
            dynamics.LEAKY, x_seq, syn, None, own, v_reset=None, resets=False, strict=True, store_v_seq=True
        )[2].flatten(0, 1)  # type: ignore[union-attr]

    def forward(self: Any, input_: Any, syn: Any = None, mem: Any = None) -> Any:  # type: ignore[override]
        plan = self._plan()
        given = syn is not None or mem is not None
        if type(plan) is str or not served(input_) or (given and self.init_hidden):
            return super(FusedLeaky, self).forward(input_, syn, mem)  # type: ignore[misc]
        buffers = self._buffers
        state = [buffers["mem"] if mem is None else mem, buffers["syn"] if syn is None else syn]
        own = self._own(plan)
        fits = broadcasts(own, input_.shape)
        for k, (value, passed) in enumerate(zip(state, (mem, syn), strict=True)):
            if value.shape != input_.shape:
                state[k] = _zero(input_, passed is None)
            elif not of_this_step(value, input_, input_.shape):
                fits = False
        if not fits:
            return super(FusedLeaky, self).forward(input_, syn, mem)  # type: ignore[misc]
        s, (v, i) = one_step(plan, input_, tuple(state), own)
        buffers["mem"], buffers["syn"] = v, i
        if plan.graded:
            s = s * self.graded_spikes_factor
        return (s, i, v) if plan.returns_states else s


FUSED = {mixin.peer: mixin for mixin in (FusedLeaky, FusedSynaptic)}
