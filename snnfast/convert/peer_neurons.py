"""What a neuron's spikes depend on, in each library's own terms: what :mod:`peer_weights` translates between.

Spikes stay the same when all potentials of a neuron are shifted, or scaled together with its input. What is left is
the leak, whether the reset is to rest or by subtraction, and the threshold as a distance from rest: :class:`Spiking`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import dynamics
from ..base import MemoryModule
from ..neuron import BaseNode, ParametricLIFNode

__all__ = ["PEERS", "Inexpressible", "Spiking", "own", "set_own"]


class Inexpressible(Exception):
    """One library's neuron has no equal in the other, for the reason given."""


class Spiking(NamedTuple):
    """All that a neuron's spikes depend on besides its input; the potential starts at rest."""

    leak: float | None  # the share of the distance from rest that is lost in a step, 1 / tau; None without a leak
    hard: bool  # reset to rest, not by the threshold
    threshold: float  # its distance from rest
    decays_input: bool  # whether the input is multiplied by the leak
    strict: bool  # whether the threshold must be exceeded

    def told(self, decays_input: bool, strict: bool) -> Spiking:
        """The same spikes of a neuron that takes its input, and meets its threshold, in another way."""
        threshold = self.threshold
        if self.leak is not None and decays_input != self.decays_input:
            threshold = threshold * self.leak if decays_input else threshold / self.leak
        # "Reaches θ" is "exceeds the float32 number below θ", and the other way round.
        if strict != self.strict:
            towards = torch.tensor(math.inf if self.strict else -math.inf)
            threshold = torch.nextafter(torch.tensor(threshold, dtype=torch.float32), towards).item()
        return self._replace(threshold=threshold, decays_input=decays_input, strict=strict)


def _one(name: str, value: Any) -> float:
    """The one number in a tensor."""
    t = torch.as_tensor(value).detach()
    if not t.numel() or (t.numel() > 1 and not bool((t == t.flatten()[0]).all())):
        raise Inexpressible(f"{name} differs from neuron to neuron, where snnfast's neurons have one for all")
    return float(t.flatten()[0])


# ---- snnfast ----
def own(node: nn.Module) -> Spiking:
    """What a neuron of snnfast computes."""
    if not isinstance(node, BaseNode) or node.dynamics not in (dynamics.IF, dynamics.LIF, dynamics.PARAMETRIC_LIF):
        raise Inexpressible(f"{type(node).__name__} is none of IFNode, LIFNode and ParametricLIFNode")
    if type(node).forward is not MemoryModule.forward:
        raise Inexpressible(f"{type(node).__name__} overrides forward")
    rest = 0.0 if node.v_reset is None else node.v_reset
    if node._memory_reset_values["v"] != rest:
        raise Inexpressible(f"its potential starts at {node._memory_reset_values['v']}, not at rest")
    leak = None
    if node.dynamics is not dynamics.IF:
        leak = float(node.w.detach().sigmoid()) if isinstance(node, ParametricLIFNode) else 1 / node.tau
    return Spiking(leak, node.v_reset is not None, node.v_threshold - rest, node.decay_input, False)


def set_own(node: Any, given: Spiking) -> dict[str, Any]:
    """The attributes, and the parameter ``w``, with which ``node`` has these spikes."""
    have = own(node)
    if (have.leak is None) != (given.leak is None):
        kind = "IFNode" if given.leak is None else "LIFNode or ParametricLIFNode"
        raise Inexpressible(f"make it an {kind}" if given.leak is None else f"make it a {kind}")
    if have.hard != given.hard:
        raise Inexpressible(f"make it with v_reset={0.0 if given.hard else None}")
    if given.leak is not None and not 0 < given.leak < 1:
        raise Inexpressible(f"it keeps {1 - given.leak:g} of its potential, which is no tau above 1")
    rest = 0.0 if node.v_reset is None else node.v_reset
    found: dict[str, Any] = {"v_threshold": given.told(have.decays_input, False).threshold + rest}
    if isinstance(node, ParametricLIFNode):
        assert given.leak is not None
        found["w"] = torch.tensor(math.log(given.leak / (1 - given.leak))).to(node.w)
    elif given.leak is not None:
        found["tau"] = 1 / given.leak
    return found


# ---- the libraries ----
class Peer:
    """One library. ``values`` are a neuron's entries of a ``state_dict``, without its path; ``options`` is what a
    ``state_dict`` does not tell, with the library's defaults for a neuron of which nothing else is known."""

    name: str
    defaults: Mapping[str, Any] = {}
    asked: tuple[str, ...] = ()  # those that a user of a bare state_dict may give
    assumed: Mapping[str, Any] = {}  # instead of these defaults, of a network that a state_dict is written for
    required: str | None = None  # an entry that each of its neurons has in a state_dict
    entries: frozenset[str] = frozenset()  # of a neuron that can be expressed
    strict = False

    def options(self, neuron: Any) -> dict[str, Any]:
        """The options of a live neuron."""
        return {}

    def read(self, values: Mapping[str, Tensor], options: Mapping[str, Any]) -> Spiking:
        raise NotImplementedError

    def write(self, given: Spiking, options: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a ``state_dict`` for a neuron with these spikes and options."""
        raise NotImplementedError

    def set(self, neuron: Any, given: Spiking) -> None:
        """Give a live neuron what a ``state_dict`` does not."""


def _unequal(what: str) -> Inexpressible:
    return Inexpressible(f"{what}, and no neuron of snnfast does")


class SnnTorch(Peer):
    """``Leaky``. Its reset to zero is equal to ours, early or late; its subtraction comes after the next decay."""

    name = "snntorch"
    defaults: Mapping[str, Any] = {"reset_delay": True, "reset_mechanism": None}
    asked = ("reset_delay",)
    required = "reset_mechanism_val"
    entries = frozenset({"threshold", "beta", "graded_spikes_factor", "reset_mechanism_val"})
    strict = True

    def options(self, neuron: Any) -> dict[str, Any]:
        for name in ("inhibition", "state_quant", "surrogate_disable"):
            if getattr(neuron, name):
                raise _unequal(f"{name} changes its spikes")
        made_for = getattr(neuron.state_function, "__name__", "")
        made = {"_base_sub": "subtract", "_base_zero": "zero", "_base_int": "none"}.get(made_for)
        return {"reset_delay": neuron.reset_delay, "reset_mechanism": made}

    def read(self, values: Mapping[str, Tensor], options: Mapping[str, Any]) -> Spiking:
        if _one("graded_spikes_factor", values["graded_spikes_factor"]) != 1:
            raise _unequal("its spikes count graded_spikes_factor")
        mechanism = ("subtract", "zero", "none")[int(values["reset_mechanism_val"])]
        if options["reset_mechanism"] not in (None, mechanism):
            raise Inexpressible(f"it was made with another reset_mechanism than {mechanism!r}")
        if mechanism == "none":
            raise _unequal("it does not reset (reset_mechanism='none')")
        kept = min(max(_one("beta", values["beta"]), 0.0), 1.0)
        threshold = _one("threshold", values["threshold"])
        hard = mechanism == "zero"
        self.check(hard, None if kept == 1 else 1 - kept, threshold, options)
        return Spiking(None if kept == 1 else 1 - kept, hard, threshold, False, True)

    @staticmethod
    def check(hard: bool, leak: float | None, threshold: float, options: Mapping[str, Any]) -> None:
        if threshold <= 0:
            raise _unequal(f"with the threshold at {threshold:g}, it resets before its first spike")
        if not hard and leak is not None:
            raise Inexpressible(
                "snnTorch's reset_mechanism='subtract' subtracts after the next decay, which is another neuron unless "
                "beta is 1; use reset_mechanism='zero' there and v_reset=0.0 here, or keep the neuron and call "
                "snnfast.accelerate"
            )
        if not hard and not options["reset_delay"]:
            raise Inexpressible(
                "snnTorch's reset_mechanism='subtract' with reset_delay=False takes a potential left above the "
                "threshold for a spike; use reset_delay=True"
            )

    def write(self, given: Spiking, options: Mapping[str, Any]) -> dict[str, Any]:
        given = given.told(False, True)
        self.check(given.hard, given.leak, given.threshold, options)
        if options["reset_mechanism"] not in (None, "zero" if given.hard else "subtract"):
            raise Inexpressible(f"make it with reset_mechanism={'zero' if given.hard else 'subtract'!r}")
        return {
            "threshold": given.threshold,
            "beta": 1.0 if given.leak is None else 1 - given.leak,
            "graded_spikes_factor": 1.0,
            "reset_mechanism_val": 1 if given.hard else 0,
        }


class Sinabs(Peer):
    """``LIF`` and ``IAF`` with single spikes: their soft reset is ours, their reset to zero too."""

    name = "sinabs"
    defaults: Mapping[str, Any] = {
        "spike_fn": "MultiSpike",
        "reset_fn": "MembraneSubtract",
        "norm_input": True,
        "train_alphas": False,
        "v_mem": torch.zeros(0),
    }
    asked = ("spike_fn", "reset_fn", "norm_input", "train_alphas")
    assumed: Mapping[str, Any] = {"spike_fn": "SingleSpike", "reset_fn": None}
    required = "spike_threshold"
    entries = frozenset({"spike_threshold", "tau_mem", "alpha_mem", "v_mem"})

    def options(self, neuron: Any) -> dict[str, Any]:
        if type(neuron).__name__.endswith("Recurrent"):
            raise _unequal("its spikes are its own input")
        subtracts = getattr(neuron.reset_fn, "subtract_value", None)
        resets_to = getattr(neuron.reset_fn, "reset_value", 0.0)
        if subtracts is not None or resets_to:
            raise _unequal(f"it resets by {neuron.reset_fn!r}")
        return {
            "spike_fn": neuron.spike_fn,
            "reset_fn": type(neuron.reset_fn),
            "norm_input": neuron.norm_input,
            "train_alphas": neuron.train_alphas,
            "v_mem": torch.zeros_like(neuron.v_mem),
        }

    @staticmethod
    def hard(options: Mapping[str, Any]) -> bool:
        spike, reset = (getattr(options[name], "__name__", options[name]) for name in ("spike_fn", "reset_fn"))
        if spike != "SingleSpike":
            raise Inexpressible(
                f"spike_fn={spike} lets it spike several times in a step, and no neuron of snnfast does; the neuron "
                "must be made with spike_fn=sinabs.activation.SingleSpike (which a bare state_dict does not tell: say "
                "spike_fn='SingleSpike')"
            )
        if reset not in ("MembraneSubtract", "MembraneReset"):
            raise _unequal(f"it resets by {reset}")
        return bool(reset == "MembraneReset")

    def read(self, values: Mapping[str, Tensor], options: Mapping[str, Any]) -> Spiking:
        hard = self.hard(options)
        leak = None
        if "tau_mem" in values:
            leak = -math.expm1(-1 / _one("tau_mem", values["tau_mem"]))
        elif "alpha_mem" in values:
            leak = 1 - _one("alpha_mem", values["alpha_mem"])
        return Spiking(leak, hard, _one("spike_threshold", values["spike_threshold"]), options["norm_input"], False)

    def write(self, given: Spiking, options: Mapping[str, Any]) -> dict[str, Any]:
        if options["reset_fn"] is not None and given.hard != self.hard(options):
            reset = "MembraneReset" if given.hard else "MembraneSubtract"
            raise Inexpressible(f"make it with reset_fn=sinabs.activation.{reset}()")
        found = {"spike_threshold": given.told(options["norm_input"], False).threshold, "v_mem": options["v_mem"]}
        if given.leak is None:
            return found
        if options["train_alphas"]:
            return {"alpha_mem": 1 - given.leak, **found}
        return {"tau_mem": -1 / math.log1p(-given.leak), **found}


class Norse(Peer):
    """``LIFBoxCell`` and ``IAFCell``, whose numbers are in ``p`` and in no ``state_dict``."""

    name = "norse"
    strict = True

    def options(self, neuron: Any) -> dict[str, Any]:
        step = getattr(getattr(neuron, "activation", None), "__name__", "")
        if not step.endswith("_feed_forward_step"):
            raise _unequal(f"it runs {step or 'a function of its own'}")
        return {"neuron": neuron}

    def read(self, values: Mapping[str, Tensor], options: Mapping[str, Any]) -> Spiking:
        cell = options["neuron"]
        p, kind = cell.p, _class_names(cell)
        threshold, v_reset = _one("p.v_th", p.v_th), _one("p.v_reset", p.v_reset)
        if kind & {"IAFCell", "IAF"}:
            return Spiking(None, True, threshold - v_reset, False, True)
        if "LIFBoxCell" not in kind:
            raise Inexpressible(f"{type(cell).__name__} has a synaptic current or a recurrence; LIFBoxCell has none")
        rest = _one("p.v_leak", p.v_leak)
        hard = getattr(p.reset_method, "__name__", "") == "reset_value"
        if not hard and getattr(p.reset_method, "__name__", "") != "reset_subtract":
            raise _unequal(f"it resets by {p.reset_method}")
        if rest != (v_reset if hard else 0):
            raise _unequal(f"it resets {f'to {v_reset:g}' if hard else 'by v_th'} and leaks to {rest:g}")
        return Spiking(cell.dt * _one("p.tau_mem_inv", p.tau_mem_inv), hard, threshold - rest, True, True)

    def write(self, given: Spiking, options: Mapping[str, Any]) -> dict[str, Any]:
        have = self.read({}, options)
        if (have.leak is None) != (given.leak is None):
            raise Inexpressible(f"make it {'an IAFCell' if given.leak is None else 'a LIFBoxCell'}")
        if have.hard != given.hard:
            raise Inexpressible(f"make it with reset_method={'reset_value' if given.hard else 'reset_subtract'}")
        return {}

    def set(self, neuron: Any, given: Spiking) -> None:
        p, changed = neuron.p, {}
        rest = _one("p.v_leak", p.v_leak) if given.leak is not None else _one("p.v_reset", p.v_reset)
        numbers = {"v_th": given.told(True, True).threshold + rest}
        if given.leak is not None:
            numbers["tau_mem_inv"] = given.leak / neuron.dt
        for name, value in numbers.items():
            t = getattr(p, name)
            new = torch.full_like(t, value, requires_grad=False)
            changed[name] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
        neuron.p = p._replace(**changed)


class SpikingJelly(Peer):
    """The neurons that ours are drop-ins for; a ``state_dict`` holds ``w``, the rest is in the constructors."""

    name = "spikingjelly"
    entries = frozenset({"w"})

    def options(self, neuron: Any) -> dict[str, Any]:
        return {"neuron": neuron}

    def read(self, values: Mapping[str, Tensor], options: Mapping[str, Any]) -> Spiking:
        node = options["neuron"]
        kind = _class_names(node)
        leak = None
        if "LIFNode" in kind:
            leak = 1 / node.tau
        elif "ParametricLIFNode" in kind:
            leak = float(node.w.detach().sigmoid())
        elif "IFNode" not in kind:
            raise _unequal(f"{type(node).__name__} has equations of its own")
        rest = 0.0 if node.v_reset is None else node.v_reset
        return Spiking(
            leak, node.v_reset is not None, node.v_threshold - rest, getattr(node, "decay_input", False), False
        )

    def write(self, given: Spiking, options: Mapping[str, Any]) -> dict[str, Any]:
        node, have = options["neuron"], self.read({}, options)
        if (have.leak is None) != (given.leak is None) or have.hard != given.hard:
            kind = "IFNode" if given.leak is None else "LIFNode or ParametricLIFNode"
            raise Inexpressible(f"make it {kind} with v_reset={0.0 if given.hard else None}")
        if "w" in node._parameters and given.leak is not None:
            return {"w": math.log(given.leak / (1 - given.leak))}
        return {}

    def set(self, neuron: Any, given: Spiking) -> None:
        rest = 0.0 if neuron.v_reset is None else neuron.v_reset
        neuron.v_threshold = given.told(getattr(neuron, "decay_input", False), False).threshold + rest
        if given.leak is not None and "w" not in neuron._parameters:
            neuron.tau = 1 / given.leak


def _class_names(module: Any) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


PEERS: dict[str, Peer] = {peer.name: peer for peer in (SpikingJelly(), SnnTorch(), Norse(), Sinabs())}
