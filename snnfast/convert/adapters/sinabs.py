"""sinabs' LIF and IAF, and their Squeeze forms: batch first, one or several spikes a step, a lowest potential.

The potential is float32 as sinabs' spikes are; any other input runs its own code.
"""

# mypy: disable-error-code="import-untyped, import-not-found"
from __future__ import annotations

from typing import Any

import torch
from sinabs import activation, layers
from sinabs.layers.reshape import SqueezeMixin
from sinabs.layers.stateful_layer import StatefulLayer
from torch import Tensor, nn

from ... import dynamics, functional, surrogate
from .base import Fused, Plan, broadcasts


def is_neuron(module: nn.Module) -> bool:
    return isinstance(module, StatefulLayer)


def is_stateful(module: nn.Module) -> bool:
    return isinstance(module, StatefulLayer)


def is_multi_step(module: nn.Module) -> bool:
    return True


def fused_surrogate(kind: Any, threshold: Tensor) -> surrogate.SurrogateFunction | str:
    """The fused surrogate that computes a ``surrogate_grad_fn``, or why there is none."""
    if any(isinstance(value, Tensor) for value in getattr(kind, "__dict__", {}).values()):
        return f"surrogate {kind!r} has a tensor for a number"
    if type(kind) is activation.SingleExponential:
        if threshold.numel() != 1:
            return "SingleExponential is as wide as the threshold, which differs from neuron to neuron"
        width = float(threshold.detach() * kind.grad_width)
        if width > 0:
            return surrogate.Scaled(surrogate.PiecewiseExp(1 / width), 2 * kind.grad_scale)
    if type(kind) is activation.Gaussian and kind.mu == 0 and kind.sigma > 0:
        return surrogate.Scaled(surrogate.Erf(1 / (kind.sigma * 2**0.5)), kind.grad_scale)
    return f"surrogate {kind!r} is not a fused one"


class LayerPlan(Plan):
    """Also keeps the numbers of the surrogate and of the reset, which may be changed on these objects."""

    def __init__(self, objects: tuple[Any, ...], *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.numbers = [(vars(kind), dict(vars(kind))) for kind in objects]

    def stale(self, module: Any) -> bool:
        for now, before in self.numbers:
            if now != before:
                return True
        return super().stale(module)


class FusedLIF(Fused):
    peer = layers.LIF
    state_names = frozenset({"v_mem", "i_syn", "recordings", "firing_rate"})
    methods = ("forward", "init_state_with_shape", "handle_state_batch_size_mismatch", "state_has_shape",
               "is_state_initialised", "has_trailing_dimension", "alpha_mem_calculated")  # fmt: skip

    @classmethod
    def plan(cls, module: Any) -> Plan | str:
        if module.alpha_syn_calculated is not None:
            return "tau_syn adds a current of its own kind"
        if module.spike_fn not in (activation.MultiSpike, activation.SingleSpike):
            return f"spike_fn {module.spike_fn!r} is neither MultiSpike nor SingleSpike"
        many = module.spike_fn is activation.MultiSpike
        reset, threshold, lowest = module.reset_fn, module.spike_threshold, module.min_v_mem
        zeroes = type(reset) is activation.MembraneReset and reset.reset_value == 0 and not many
        if not zeroes and (type(reset) is not activation.MembraneSubtract or reset.subtract_value is not None):
            return f"reset_fn {reset!r} neither subtracts the threshold nor resets to 0 after a SingleSpike"
        if threshold is None or threshold.is_meta:
            return "spike_threshold has no value yet"
        if lowest is not None and (lowest.requires_grad or lowest.dim() or not lowest.isfinite()):
            return "min_v_mem is learnable, infinite, or differs from neuron to neuron"
        if threshold.requires_grad:
            return "spike_threshold is learnable, and sinabs lets only a part of its gradient through"
        if threshold.dim() and threshold.dtype is not torch.float32:
            return "spike_threshold is not float32, which would widen the state"
        kind = fused_surrogate(module.surrogate_grad_fn, threshold)
        if isinstance(kind, str):
            return kind
        return LayerPlan(
            (module.surrogate_grad_fn, reset),
            dynamics.EXPONENTIAL_LIF,
            (threshold,) if lowest is None else (threshold, lowest),
            ("spike_threshold",) if lowest is None else ("spike_threshold", "min_v_mem"),
            decay_input=bool(module.norm_input),
            v_reset=0.0 if zeroes else None,
            detach_reset=zeroes,
            multi_spike=many,
            v_min=None if lowest is None else float(lowest),
            store_v_seq=bool(module.record_states),
            surrogate_function=kind,
        )

    def _plan(self) -> Any:
        if type(self.__dict__.get("_snnfast_plan")) is str:  # the reason may have gone, without an attribute being set
            del self.__dict__["_snnfast_plan"]
        return super()._plan()

    def _fused(self: Any, x: Any) -> Tensor:
        """``[B, T, *]`` -> spikes ``[B, T, *]``; the peer's own code where the kernels cannot serve."""
        plan = self._plan()
        own_code = type(plan) is str or type(x) is not Tensor or x.dtype is not torch.float32 or x.dim() < 3
        if own_code or not x.shape[1] or self.spike_threshold.requires_grad:
            return self._own_forward(x)
        if plan.keywords["v_min"] is not None and self.min_v_mem.requires_grad:
            return self._own_forward(x)
        batch, _, *trailing = x.shape
        beta = self.alpha_mem_calculated
        if beta.dtype is not torch.float32:  # 1 - alpha is of its dtype, and so may be the state
            return self._own_forward(x)
        own = self.spike_threshold, beta if beta.device == x.device else beta.to(x.device)
        if not broadcasts(own, torch.Size((batch, *trailing))):
            return self._own_forward(x)
        if not self.is_state_initialised():
            self.init_state_with_shape((batch, *trailing))
        if not self.state_has_shape((batch, *trailing)):
            if not self.has_trailing_dimension(trailing):
                self.init_state_with_shape((batch, *trailing))
            else:
                self.handle_state_batch_size_mismatch(batch)
        v = self._buffers["v_mem"]
        if v.dtype is not torch.float32:
            return self._own_forward(x)
        s, v, v_seq = functional.multi_step(plan.neuron, x.transpose(0, 1), v, None, own, **plan.keywords)
        self._buffers["v_mem"] = v
        s = s.transpose(0, 1).contiguous()
        self.i_syn, self.firing_rate = None, s.mean()
        self.recordings = {} if v_seq is None else {"v_mem": v_seq.transpose(0, 1).contiguous()}
        return s

    def _own_forward(self: Any, x: Any) -> Any:
        return self.peer.forward(self, x)

    def forward(self: Any, input_data: Any) -> Any:
        if isinstance(self, SqueezeMixin):
            return self.squeeze_forward(input_data, self._fused)
        return self._fused(input_data)


class FusedIAF(FusedLIF):
    peer = layers.IAF


class FusedLIFSqueeze(FusedLIF):
    peer = layers.LIFSqueeze

    def _own_forward(self: Any, x: Any) -> Any:
        return layers.LIF.forward(self, x)


class FusedIAFSqueeze(FusedLIFSqueeze):
    peer = layers.IAFSqueeze


FUSED = {mixin.peer: mixin for mixin in (FusedLIF, FusedIAF, FusedLIFSqueeze, FusedIAFSqueeze)}
