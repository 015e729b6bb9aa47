"""Batch norms and the neurons behind them, found in a network and fused in place: :func:`fuse`."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .._before import Before, Tracer
from ..base import StepModule
from ..convert.stepping import is_stateful
from ..convert.to_spiking_layers import DrawnOnce, MaxPoolOfRates, Repeat, _repeat_input, _start_afresh
from ..network import holds_single_steps
from ..neuron import BaseNode
from ..tensors import has_hooks
from . import batch_norm
from .ops import Connect
from .pair import Defer, NormAndNeuron, is_fused

__all__ = ["FuseReport", "fuse", "unfuse"]

_NORM = nn.modules.batchnorm._BatchNorm
_LEAVES = (StepModule, Repeat, MaxPoolOfRates, DrawnOnce)


@dataclass
class FuseReport:
    """What :func:`fuse` did: the names of ``(norm, neuron)`` pairs, and of the norms left alone, with the reason.

    ``connected`` has the norms whose pair takes a residual connection too, and where it joins
    (:class:`BatchNormNode`).
    """

    fused: list[tuple[str, str]] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    connected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        norms = "batch norm" if len(self.fused) == 1 else "batch norms"
        lines = [f"{len(self.fused)} {norms} fused with the neuron behind, {len(self.left_alone)} left alone"]
        for norm, neuron in self.fused:
            skip = self.connected.get(norm)
            lines.append(f"  {norm} + {neuron}" + (f", residual {skip}" if skip else ""))
        lines += [f"  {norm} left alone: {reason}" for norm, reason in self.left_alone.items()]
        return "\n".join(lines)


# ---- finding pairs ----
class _Tracer(Tracer):
    """Into containers and users' modules, not into layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _LEAVES) or holds_single_steps(m) or isinstance(m, batch_norm.BatchNormNode):
            return True
        return super().is_leaf_module(m, module_qualified_name) or not any(True for _ in m.children())

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        # timm's blocks have these where an option is not used: what goes in is what comes out.
        if type(m) is nn.Identity and len(args) == 1 and not kwargs and not has_hooks(m):
            return args[0]
        return super().call_module(m, forward, args, kwargs)


@dataclass
class _Found:
    """Where each norm's output goes, over all traces: the neuron's module, or why there is none."""

    neurons: dict[nn.Module, nn.Module] = field(default_factory=dict)
    connections: dict[nn.Module, Connect] = field(default_factory=dict)
    reasons: dict[nn.Module, str] = field(default_factory=dict)
    calls: Counter[nn.Module] = field(default_factory=Counter)

    def refuse(self, norm: nn.Module, reason: str) -> None:
        self.neurons.pop(norm, None)
        self.reasons.setdefault(norm, reason)


def traced(tracer: fx.Tracer, module: nn.Module, stateless: bool = False) -> fx.Graph | None:
    """The module's calls, or ``None``; what its forward does to modules and random numbers on the way is undone.

    What the forward keeps as an attribute has a user more, of that name. ``stateless``: not of a forward that writes a
    number or tensor of a module other than a neuron, by which it may do something else next time.
    """
    before = Before(module.modules())
    try:
        with torch.random.fork_rng(devices=[]):
            graph = tracer.trace(module)
        if stateless and before.written(but=is_stateful):
            return None
        with graph.inserting_before(next(iter(reversed(graph.nodes)))):
            for _, name, proxy in before.kept():
                graph.create_node("call_function", setattr, (proxy.node,), name=name)
        return graph
    except Exception:  # whatever a user's forward raises on a stand-in for its input
        return None
    finally:
        before.put_back()


def _graph(module: nn.Module, given: Collection[str] | None) -> fx.Graph | None:
    """The module's calls, or ``None`` where they depend on values that a trace does not have."""
    if isinstance(module, _LEAVES) or not any(True for _ in module.children()):
        return None
    tracer = _Tracer()
    tracer.given = given
    return traced(tracer, module, stateless=True)


def _search(module: nn.Module, found: _Found, given: Collection[str] | None) -> None:
    """Look through the largest parts of ``module`` that can be traced, called with these optional arguments."""
    graph = _graph(module, given)
    if graph is not None:
        _read(module, graph, found)
        return
    for child in module.children():
        _search(child, found, given)


def _read(module: nn.Module, graph: fx.Graph, found: _Found) -> None:
    def called(node: fx.Node) -> nn.Module | None:
        return module.get_submodule(str(node.target)) if node.op == "call_module" else None

    taken: set[fx.Node] = set()  # where one side of a residual connection stands in already
    for node in graph.nodes:
        norm = called(node)
        if norm is None:
            continue
        found.calls[norm] += 1
        if not isinstance(norm, _NORM):
            continue
        users = list(node.users)
        if not users:
            found.refuse(norm, "its output is not used")
            continue
        if len(users) > 1:
            found.refuse(norm, f"its output is used {len(users)} times: by {', '.join(str(u) for u in users)}")
            continue
        joins, user = _meeting(node, _ADD) if users[0] not in taken else None, users[0]
        if joins is not None and len(joins.users) == 1:
            node, user = joins, next(iter(joins.users))
        if not isinstance(neuron := called(user), BaseNode):
            what = str(users[0]) if neuron is None else f"a {_kind(neuron)}"
            found.refuse(norm, f"its output goes to {what}, not to a neuron of snnfast")
        elif user.args != (node,) or user.kwargs:
            found.refuse(norm, "the neuron is called with more than the norm's output")
        elif found.neurons.get(norm, neuron) is not neuron:
            found.refuse(norm, "its output goes to different neurons")
        else:
            found.neurons[norm] = neuron
            connect, at = (Connect.CHARGE, joins) if node is joins else _connection(user)
            if at is not None and at not in taken:
                taken.add(at)
                found.connections[norm] = connect


_PEERS = ("spikingjelly.activation_based.neuron", "snntorch", "norse", "sinabs")


def _is_of_a_peer(module: nn.Module) -> bool:
    return type(module).__module__.startswith(_PEERS)


def _kind(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{name} of {type(module).__module__.partition('.')[0]}" if _is_of_a_peer(module) else name


_ADD = (operator.add, torch.add, "add")
_MULTIPLY = (operator.mul, torch.mul, "mul")
_IN_PLACE: dict[Any, Any] = {operator.iadd: operator.add, operator.imul: operator.mul}


def _meeting(node: fx.Node, functions: tuple[Any, ...]) -> fx.Node | None:
    """Where ``node`` goes to one of these functions, with another tensor and nowhere else."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    target = user.target
    if user.args and user.args[0] is node:  # as an operand on the right, what is changed in place is the other tensor
        target = _IN_PLACE.get(target, target)
    if target not in functions or user.op not in ("call_function", "call_method") or user.kwargs:
        return None
    others = [a for a in user.args if a is not node]
    return user if len(user.args) == 2 and len(others) == 1 and isinstance(others[0], fx.Node) else None


def _connection(spikes: fx.Node) -> tuple[Connect, fx.Node | None]:
    """How a residual connection meets these spikes and nothing else does, and where."""
    if (at := _meeting(spikes, _ADD)) is not None:
        return Connect.ADD, at
    if (at := _meeting(spikes, _MULTIPLY)) is not None:
        return Connect.AND, at
    if len(spikes.users) == 1:
        inverse = next(iter(spikes.users))
        if inverse.target is operator.sub and inverse.args[0] == 1 and inverse.args[1] is spikes:
            return Connect.IAND, _meeting(inverse, _MULTIPLY)
    return Connect.NONE, None


def _both_modes(model: nn.Module) -> Iterator[None]:
    """Once as ``model`` is and once with training and evaluation exchanged, since a forward may depend on it."""
    yield
    for module in model.modules():
        module.training = not module.training
    try:
        yield
    finally:
        for module in model.modules():
            module.training = not module.training


_ELSEWHERE = "its output goes elsewhere in training and in evaluation, or with other arguments"
_NOT_ALWAYS = "it is not called in both training and evaluation, or not with other arguments"


def _find(model: nn.Module) -> _Found:
    passes = []
    for _ in _both_modes(model):
        for given in (None, ()):  # all optional arguments, and none
            passes.append(_Found())
            _search(model, passes[-1], given)
    first, *others = passes
    for norm in {norm for found in passes for norm in found.connections}:
        connects = {f.connections.get(norm, Connect.NONE) for f in passes}
        if len(connects) > 1:
            first.connections.pop(norm, None)
            if Connect.CHARGE in connects:
                first.refuse(norm, "its output meets a residual connection in training or in evaluation only")
    for second in others:
        for norm, neuron in second.neurons.items():
            if first.neurons.get(norm) is not neuron:
                first.refuse(norm, second.reasons.get(norm, _ELSEWHERE))
        for norm in list(first.neurons):
            if norm not in second.neurons:
                first.refuse(norm, second.reasons.get(norm, _NOT_ALWAYS))
        for module, count in second.calls.items():
            first.calls[module] = max(first.calls[module], count)
    return first


# ---- whether a pair may be fused ----
def _shared_parameters(model: nn.Module) -> set[int]:
    """Parameters and buffers that more than one module has."""
    count = Counter(
        id(t)
        for module in model.modules()
        for t in (*module._parameters.values(), *module._buffers.values())
        if t is not None
    )
    return {key for key, number in count.items() if number > 1}


def _why_not(norm: nn.Module, neuron: Any, found: _Found, shared: set[int]) -> str | None:
    if found.calls[neuron] > 1:
        return f"the neuron is called {found.calls[neuron]} times in a forward"
    for module, word in ((norm, "the norm"), (neuron, "the neuron")):
        if any(id(t) in shared for t in (*module._parameters.values(), *module._buffers.values()) if t is not None):
            return f"{word} shares a parameter with another module"
        if "forward" in module.__dict__:
            return f"{word} has a forward of its own"
        if _repeat_input in module._forward_pre_hooks.values():
            return f"{word} repeats its input over time (it is the first one of to_spiking)"
        if has_hooks(module, allowed=(_start_afresh,)):
            return f"{word} has hooks"
    if norm.training != neuron.training:
        mode = {True: "training", False: "evaluation"}
        return f"the norm is in {mode[norm.training]} mode and the neuron in {mode[neuron.training]} mode"
    return batch_norm.misfit(norm, neuron)


def fuse(model: nn.Module) -> FuseReport:
    """Fuse each batch norm of ``model`` with the neuron behind it, in place.

    A residual connection that joins between the two, or that meets the spikes as in SEW networks, is taken in too.
    Modules, their names, parameters, buffers and ``state_dict`` keys stay as they are; a fused norm hands its input on
    and its neuron does the work of both (see :class:`BatchNormNode`). Pairs are found by tracing the model's forward
    with :mod:`torch.fx`, or those of its parts where it cannot be traced. What might come out different is left alone,
    and the report says why. Copies and pickles of a fused model are fused; :func:`unfuse` goes back. A model that was
    fused before is searched anew.

    Args:
        model: any module; :class:`torch.nn.BatchNorm2d` before a neuron with ``timesteps``, and the norms of
            :mod:`snnfast.layer` before a multi-step neuron.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> from snnfast import LIFNode
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), LIFNode(timesteps=4))
        >>> print(fuse(net))
        1 batch norm fused with the neuron behind, 0 left alone
          1 + 2
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    names = {module: name for name, module in model.named_modules()}
    unfuse(model)  # pairs of a model that was fused before may have been torn apart since
    found, shared, report = _find(model), _shared_parameters(model), FuseReport()
    for norm, name in names.items():
        if not isinstance(norm, _NORM) or _is_part_of_node(name, model):
            continue
        neuron = found.neurons.get(norm)
        if found.calls[norm] > 1:
            report.left_alone[name] = f"the norm is called {found.calls[norm]} times in a forward"
        elif neuron is None:
            untraced = unseen(norm)
            if any(map(_is_of_a_peer, model.modules())):
                untraced = (
                    "fuse takes snnfast's neurons, not those of other libraries, accelerated or not (docs/migration.md "
                    f"shows how to exchange them); or {untraced}"
                )
            report.left_alone[name] = found.reasons.get(norm, untraced)
        elif (reason := _why_not(norm, neuron, found, shared)) is not None:
            report.left_alone[name] = reason
        else:
            norm.forward = Defer(norm, neuron)  # type: ignore[method-assign]
            connect = found.connections.get(norm, Connect.NONE)
            neuron.forward = NormAndNeuron(neuron, connect)
            report.fused.append((name, names[neuron]))
            if connect:
                report.connected[name] = connect.name
    return report


def unseen(norm: nn.Module) -> str:
    """Why no trace shows a call of ``norm``."""
    if any(True for _ in norm.children()):  # timm's BatchNormAct2d: the trace goes inside
        return f"{type(norm).__name__} is not one of the batch norms that are known here"
    return "the forward around it cannot be traced, or does not call it"


def _is_part_of_node(name: str, model: nn.Module) -> bool:
    return "." in name and isinstance(model.get_submodule(name.rpartition(".")[0]), batch_norm.BatchNormNode)


def unfuse(model: nn.Module) -> int:
    """Undo :func:`fuse`, in place; returns the number of pairs.

    Example:
        >>> from snnfast import LIFNode
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), LIFNode(timesteps=4))
        >>> _ = fuse(net); unfuse(net)
        1
    """
    fused = [module for module in model.modules() if is_fused(module)]
    for module in fused:
        del module.__dict__["forward"]
    return sum(isinstance(module, _NORM) for module in fused)
