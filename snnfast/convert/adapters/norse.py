"""Norse's LIF, LIFBox and IAF (1.1.0), as cells and over time: explicit state, Euler steps of dt.

The state before the first step starts from numbers here, not from Norse's leaf that requires a gradient: the returned
state is the same. Potentials are float32; any other input runs Norse's own code.
"""

# mypy: disable-error-code="import-untyped, import-not-found"
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from norse.torch.functional.iaf import IAFFeedForwardState, iaf_feed_forward_step
from norse.torch.functional.lif import LIFFeedForwardState, lif_feed_forward_step
from norse.torch.functional.lif_box import LIFBoxFeedForwardState, lif_box_feed_forward_step
from norse.torch.functional.reset import reset_subtract, reset_value
from norse.torch.module import iaf, lif, lif_box, lift, snn
from norse.torch.module.regularization import RegularizationCell
from norse.torch.module.sequential import RecurrentSequential, SequentialState
from torch import Tensor, nn

from ... import dynamics, functional, surrogate
from .base import FinalState, Fused, Plan, broadcasts, is_version, number, of_this_step, served
from .onestep import one_step

# method: the fused surrogate for its alpha. SuperSpike ignores alpha in the installed version.
METHODS: dict[str, Callable[[float], surrogate.SurrogateFunction]] = {
    "super": lambda alpha: surrogate.SuperSpike(1.0),
    "tanh": lambda alpha: surrogate.Scaled(surrogate.Sigmoid(2 * alpha), 2 / alpha),
    "triangle": lambda alpha: surrogate.Scaled(surrogate.PiecewiseQuadratic(1.0), alpha),
    "heavi_erfc": lambda alpha: surrogate.Scaled(surrogate.Erf(alpha), 2 / alpha),
}


_CONTAINERS = (SequentialState, RecurrentSequential, lift.Lift, RegularizationCell)


def is_neuron(module: nn.Module) -> bool:
    return isinstance(module, (snn.SNNCell, snn.SNN, snn.SNNRecurrentCell, snn.SNNRecurrent))


def is_stateful(module: nn.Module) -> bool:
    return (
        type(module).__module__.startswith(snn.__name__.rpartition(".")[0])
        and "state" in inspect.signature(module.forward).parameters
        and not isinstance(module, _CONTAINERS)
    ) or is_neuron(module)


def is_multi_step(module: nn.Module) -> bool:
    return isinstance(module, (snn.SNN, snn.SNNRecurrent))


class NorsePlan(Plan):
    """Also keeps where the potential starts, and the neurons' own parameters that are no single numbers."""

    shaped: tuple[Tensor, ...] = ()

    def __init__(self, neuron: dynamics.Neuron, v_start: float, watched: tuple[Tensor, ...], **keywords: Any) -> None:
        super().__init__(neuron, watched, **keywords)
        self.v_start = v_start


class FusedCell(Fused):
    """One step a call. The tensors in ``p`` that may have gradients are read on every call."""

    methods = ("forward", "initial_state")
    step: Any  # the function of norse.torch.functional that the neuron must run
    State: Any  # the tuple that it returns
    neuron = dynamics.CURRENT_LIF
    own_names: tuple[str, ...] = ("v_th", "tau_mem_inv", "tau_syn_inv")  # the rates are multiplied by dt
    numbers: tuple[str, ...] = ("v_leak", "v_reset")  # fields of p that the kernels take as numbers

    @classmethod
    def plan(cls, module: Any) -> NorsePlan | str:
        p = module.p
        if module.activation is not cls.step:
            return f"it runs {getattr(module.activation, '__name__', module.activation)}, which has no fused form"
        if getattr(module, "record_states", False):
            return "record_states=True keeps the state of every step"
        if getattr(module.state_fallback, "__func__", None) is not cls.peer.initial_state:  # type: ignore[attr-defined]
            return "its state_fallback is not the neuron's own initial_state"
        alpha = number(p.alpha)
        if p.method not in METHODS or alpha is None or alpha <= 0:
            return f"the threshold method {p.method!r} with alpha {p.alpha!r} has no fused surrogate"
        fields = {name: getattr(p, name) for name in (*cls.own_names, *cls.numbers)}
        if not all(isinstance(t, Tensor) for t in fields.values()):
            return "p holds numbers where Norse needs tensors"
        if any(t.dim() and t.dtype is not torch.float32 for t in fields.values()):
            return "p holds other numbers than float32, which would widen the state"
        for name in cls.numbers:
            if fields[name].numel() != 1 or fields[name].dim() > 1 or cls.is_learnt(name, fields[name]):
                return f"p.{name} is learnable or differs from neuron to neuron"
        found = cls.planned(p, v_reset=cls.v_reset(p), strict=True, surrogate_function=METHODS[p.method](alpha))
        if not isinstance(found, str):
            found.shaped = tuple(fields[name] for name in cls.own_names if fields[name].dim())
        return found

    @staticmethod
    def is_learnt(name: str, t: Tensor) -> bool:
        return t.requires_grad

    @staticmethod
    def v_reset(p: Any) -> Any:
        return float(p.v_reset.detach())

    @classmethod
    def planned(cls, p: Any, **keywords: Any) -> NorsePlan | str:
        v_leak = float(p.v_leak)
        return NorsePlan(cls.neuron, v_leak, (p.v_leak, p.v_reset), v_leak=v_leak, **keywords)

    def _own(self: Any, plan: NorsePlan, device: torch.device) -> tuple[Tensor, ...]:
        """Threshold and rates; the same tuple again while none of them is learnt or written."""
        if plan.own is not None:
            (versions, at), own = plan.own
            if at == device and all(map(is_version, versions)):
                return own
        given = [getattr(self.p, name) for name in self.own_names]
        own = tuple(t.to(device) for t in (given[0], *(self.dt * t for t in given[1:])))
        if not torch.is_inference_mode_enabled() and not any(t.requires_grad for t in given):
            plan.own = ([(t, t._version) for t in given], device), own
        return own

    def _start(self: Any, plan: NorsePlan, state: Any, x: Tensor, shape: torch.Size) -> Any:
        """The state before a first step of ``shape``, of ``x``'s device, as the kernels take it; ``None`` if they
        cannot."""
        if plan.shaped and not broadcasts(plan.shaped, shape):
            return None
        if state is None:
            return plan.v_start if len(self.neuron.states) == 1 else (plan.v_start, 0.0)
        if type(state) is self.State and all(of_this_step(t, x, shape) for t in state):
            return state[0] if len(state) == 1 else tuple(state)
        found = []
        for t in state:
            if not isinstance(t, Tensor) or (t.device != x.device and t.dim()):
                return None
            if t.shape != shape:
                if t.dim():
                    return None
                t = t.to(x).expand(shape)
            found.append(t)
        if any(t.dtype is not torch.float32 for t in found) or len(found) != len(self.neuron.states):
            return None
        return found[0] if len(found) == 1 else tuple(found)

    def _over_time(self: Any, x_seq: Tensor, start: Any, plan: NorsePlan) -> tuple[Tensor, Any]:
        """``[T, *]`` -> spikes ``[T, *]`` and Norse's state after the last step."""
        s, state, _ = functional.multi_step(
            plan.neuron, x_seq, start, None, self._own(plan, x_seq.device), **plan.keywords
        )
        return s, self.State(*state) if isinstance(state, tuple) else self.State(state)

    def _unrolled(self: Any, x_seq: Tensor, args: Any, kwargs: Any, used: set[int] | None) -> Any:
        """One call over time for :func:`snnfast.unroll`, with time folded into the batch of what it returns."""
        plan, state = self._plan(), args[0] if args else kwargs.get("state")
        if type(plan) is str or x_seq.dim() < 2 or not served(x_seq):
            return NotImplemented
        start = self._start(plan, state, x_seq, x_seq.shape[1:])
        if start is None:
            return NotImplemented
        s, state = self._over_time(x_seq, start, plan)
        return s.flatten(0, 1), FinalState(state)

    def forward(self: Any, input_tensor: Any, state: Any = None) -> Any:
        plan = self._plan()
        if type(plan) is not str and served(input_tensor):
            start = self._start(plan, state, input_tensor, input_tensor.shape)
            if start is not None:
                s, state = one_step(plan, input_tensor, start, self._own(plan, input_tensor.device))
                return s, self.State(*state) if type(state) is tuple else self.State(state)
        return super().forward(input_tensor, state)  # type: ignore[misc]


class FusedOverTime(FusedCell):
    """All steps in one call: ``[T, *]``."""

    def forward(self: Any, input_tensor: Any, state: Any = None) -> Any:
        plan = self._plan()
        if type(plan) is not str and served(input_tensor) and input_tensor.dim() > 1 and input_tensor.shape[0]:
            start = self._start(plan, state, input_tensor, input_tensor.shape[1:])
            if start is not None:
                return self._over_time(input_tensor, start, plan)
        return super(FusedCell, self).forward(input_tensor, state)  # type: ignore[misc]


class FusedLIFCell(FusedCell):
    peer = lif.LIFCell
    step = staticmethod(lif_feed_forward_step)
    State = LIFFeedForwardState


class FusedLIF(FusedOverTime):
    peer = lif.LIF
    step = staticmethod(lif_feed_forward_step)
    State = LIFFeedForwardState


class FusedLIFBoxCell(FusedCell):
    peer = lif_box.LIFBoxCell
    step = staticmethod(lif_box_feed_forward_step)
    State = LIFBoxFeedForwardState
    neuron = dynamics.BOX_LIF
    own_names = ("v_th", "tau_mem_inv")

    @classmethod
    def planned(cls, p: Any, **keywords: Any) -> NorsePlan | str:
        if p.reset_method not in (reset_value, reset_subtract):
            return "p.reset_method is neither reset_value nor reset_subtract"
        return super().planned(p, **keywords)

    @staticmethod
    def v_reset(p: Any) -> Any:
        return None if p.reset_method is reset_subtract else float(p.v_reset)


class _IAF(FusedCell):
    step = staticmethod(iaf_feed_forward_step)
    State = IAFFeedForwardState
    neuron = dynamics.IF
    own_names = ()
    numbers = ("v_th", "v_reset")

    @staticmethod
    def is_learnt(name: str, t: Tensor) -> bool:
        # Norse starts from p.v_reset itself and marks it as requiring a gradient on the first call.
        return t.requires_grad if name != "v_reset" else isinstance(t, nn.Parameter) or not t.is_leaf

    @classmethod
    def planned(cls, p: Any, **keywords: Any) -> NorsePlan | str:
        return NorsePlan(cls.neuron, cls.v_reset(p), (p.v_th, p.v_reset), v_threshold=float(p.v_th), **keywords)

    def _own(self: Any, plan: NorsePlan, device: torch.device) -> tuple[Tensor, ...]:
        return ()


class FusedIAFCell(_IAF):
    peer = iaf.IAFCell


class FusedIAF(_IAF, FusedOverTime):
    peer = iaf.IAF


FUSED = {m.peer: m for m in (FusedLIFCell, FusedLIF, FusedLIFBoxCell, FusedIAFCell, FusedIAF)}
