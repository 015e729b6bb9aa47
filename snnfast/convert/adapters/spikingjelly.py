"""SpikingJelly's IFNode, LIFNode and ParametricLIFNode (2.0.0), which snnfast's own neurons repeat bit for bit."""

# mypy: disable-error-code="import-untyped, import-not-found"
from __future__ import annotations

from typing import Any, ClassVar

import torch
from spikingjelly.activation_based import base as their_base
from spikingjelly.activation_based import layer as their_layer
from spikingjelly.activation_based import neuron as theirs
from spikingjelly.activation_based import surrogate as their_surrogate
from torch import Tensor, nn

from ... import dynamics, events, functional, surrogate
from .base import Fused, Plan
from .onestep import one_step

SURROGATES: dict[type, type[surrogate.SurrogateFunction]] = {
    getattr(their_surrogate, ours.__name__): ours for ours in surrogate.SURROGATES
}
_DTYPES = (torch.float32, torch.float64)


def is_neuron(module: nn.Module) -> bool:
    return isinstance(module, (theirs.BaseNode, theirs.SimpleBaseNode))


def is_stateful(module: nn.Module) -> bool:
    return isinstance(module, their_base.MemoryModule)


def is_multi_step(module: nn.Module) -> bool:
    return False  # its step_mode says


class NodePlan(Plan):
    """Also keeps the surrogate object, whose sharpness and mode may be changed on it."""

    def __init__(self, neuron: dynamics.Neuron, their_surrogate: Any, **keywords: Any) -> None:
        super().__init__(neuron, **keywords)
        self.surrogate, self.alpha = their_surrogate, their_surrogate.alpha

    def stale(self, module: Any) -> bool:
        return self.surrogate.alpha != self.alpha or not self.surrogate.spiking


class FusedNode(Fused):
    """The three differ by a keyword or two of the functional call."""

    peer = theirs.BaseNode
    state_names = frozenset({"v", "v_seq"})
    methods = ("forward", "single_step_forward", "multi_step_forward", "materialize_states",
               "single_step_functional_forward", "multi_step_functional_forward", "_append_v_seq")  # fmt: skip
    neuron: ClassVar[dynamics.Neuron]

    @classmethod
    def plan(cls, module: Any) -> NodePlan | str:
        kind = module.surrogate_function
        if type(kind) not in SURROGATES:
            return f"surrogate {type(kind).__name__} is not a fused one"
        if not kind.spiking:
            return f"surrogate {type(kind).__name__} is in its smooth mode (spiking=False)"
        if not isinstance(kind.alpha, (int, float)):
            return f"the surrogate's alpha is a {type(kind.alpha).__name__}, not a number"
        if module._neuron_precision is not None:
            return "it has a neuron precision of its own"
        for name in ("v_threshold", "v_reset", "tau"):
            value = getattr(module, name, None)
            if not isinstance(value, (int, float, type(None))):
                return f"{name} is a {type(value).__name__}, not a number"
        if cls.neuron.learnable and (module.w.numel() != 1 or module.w.dim() > 1):
            return f"w has shape {tuple(module.w.shape)}; one for all neurons is needed"
        more = {name: getattr(module, name) for name in ("tau", "decay_input") if hasattr(module, name)}
        return NodePlan(
            cls.neuron,
            kind,
            v_threshold=module.v_threshold,
            v_reset=module.v_reset,
            surrogate_function=SURROGATES[type(kind)](kind.alpha),
            detach_reset=module.detach_reset,
            store_v_seq=module.store_v_seq,
            **more,
        )

    def _start(self: Any, x: Tensor, shape: torch.Size) -> Any:
        """The potential before a step of ``shape``: kept, cast to ``x``'s dtype and device, or started afresh."""
        v = self._memories["v"]
        if isinstance(v, Tensor):
            if v.shape != shape:
                return 0.0 if self.v_reset is None else self.v_reset
            if v.dtype is not x.dtype or v.device != x.device:
                return v.to(device=x.device, dtype=x.dtype)
        return v

    def single_step_forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self._plan()
        if args or kwargs or type(plan) is str or not _served(x, 1):
            return super().single_step_forward(x, *args, **kwargs)  # type: ignore[misc]
        decay = self.w.sigmoid() if plan.neuron.learnable else None
        s, v = one_step(plan, x, self._start(x, x.shape), (), decay)
        self._memories["v"] = v
        if plan.keywords["store_v_seq"]:
            self._append_v_seq(v)
        return s

    def multi_step_forward(self: Any, x_seq: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self._plan()
        if args or kwargs or type(plan) is str or not _served(x_seq, 2):
            return super().multi_step_forward(x_seq, *args, **kwargs)  # type: ignore[misc]
        v = self._start(x_seq, x_seq.shape[1:])
        decay = self.w.sigmoid() if plan.neuron.learnable else None
        s, self._memories["v"], v_seq = functional.multi_step(plan.neuron, x_seq, v, decay, **plan.keywords)
        self.__dict__["v_seq"] = v_seq
        return s


def _served(x: Any, least_dimensions: int) -> bool:
    """Half precision stays with SpikingJelly, whose state has the input's dtype."""
    return type(x) is Tensor and x.dtype in _DTYPES and x.dim() >= least_dimensions and x.shape[0] > 0


class FusedIF(FusedNode):
    peer = theirs.IFNode
    neuron = dynamics.IF


class FusedLIF(FusedNode):
    peer = theirs.LIFNode
    neuron = dynamics.LIF


class FusedParametricLIF(FusedNode):
    peer = theirs.ParametricLIFNode
    neuron = dynamics.PARAMETRIC_LIF


FUSED = {mixin.peer: mixin for mixin in (FusedIF, FusedLIF, FusedParametricLIF)}


class EventConv2d(events.EventConv2d, their_layer.Conv2d):
    """SpikingJelly's ``layer.Conv2d`` as :class:`snnfast.events.EventConv2d`."""


EVENT_DRIVEN = {their_layer.Conv2d: EventConv2d}
