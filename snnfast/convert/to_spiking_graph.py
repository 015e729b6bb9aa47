"""The conversion itself: neurons for activations, in place where a module's own code can stay, by a generated forward
where it cannot.

Every value in a forward is ``CONSTANT`` (parameters, numbers), ``STATIC`` (``[B, *]``, computed once from an input
that does not change with time) or ``DYNAMIC`` (``[T * B, *]``). The first neuron on each path repeats its static input;
where a static tensor meets a dynamic one elsewhere, such as a shortcut around the first block, a :class:`Repeat` goes
between.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from .._before import IN_PLACE, source
from ..pooling import PYTORCHS, max_pool2d
from .to_spiking_classes import generated
from .to_spiking_layers import (
    DROPOUTS,
    POOLS,
    STOCHASTIC_DEPTHS,
    Dropout,
    DropPath,
    MaxPoolOfRates,
    Observer,
    Repeat,
    limit_of,
    stand_in,
)
from .to_spiking_trace import (
    RELU,
    VALUE,
    VALUES,
    Untraceable,
    activation_of,
    functional_activations,
    given_in,
    is_in_place,
    is_shape,
    is_torch_leaf,
    place,
    trace,
)

__all__ = ["DYNAMIC", "STATIC", "Converter", "NeedsTime"]

CONSTANT, STATIC, DYNAMIC = range(3)

_RECURRENT = ("RNN", "LSTM", "GRU", "RNNBase", "RNNCell", "LSTMCell", "GRUCell", "RNNCellBase")
# A neuron could not stand for these.
_ONLY_KEPT = (*_RECURRENT, "TransformerEncoderLayer", "TransformerDecoderLayer", "GLU", "glu")


class NeedsTime(Exception):
    """A module that would have to be static in one place and dynamic in another: time must start at the input."""


class Converter:
    """One conversion of a model, in place.

    Args:
        make_neuron: a neuron for one call of an activation; its argument says whether the input is to be repeated.
        other_activations: ``'error'``, ``'keep'`` or ``'replace'``.
        pool_rates: whether max-pooling becomes :class:`MaxPoolOfRates`.

    Attributes:
        untraced: what could not be followed, and so may call one neuron several times in a forward.
        kept: other activations that stay, with their places.
    """

    def __init__(
        self, make_neuron: Callable[[bool], nn.Module], timesteps: int, other_activations: str, pool_rates: bool
    ) -> None:
        self.make_neuron = make_neuron
        self.timesteps = timesteps
        self.other_activations = other_activations
        self.pool_rates = pool_rates
        self.untraced: list[str] = []
        self.kept: list[str] = []
        self.neurons: dict[nn.Module, bool] = {}  # and whether they repeat their input
        self.in_place: set[nn.Module] = set()  # those of the neurons that stand for a ReLU(inplace=True)
        self.overwriting: set[nn.Module] = set()  # modules with such a neuron for their input
        self._added: set[nn.Module] = set()
        self._replaced: list[nn.Module] = []  # kept alive: the visits below go by identity
        self._visits: dict[nn.Module, tuple[int, int, int, dict[str, Any]]] = {}  # status in, out, changes, arguments
        self._calls: Counter[nn.Module] = Counter()  # in one forward
        self._changes = 0

    # ---- modules ----
    def convert(self, module: nn.Module, path: str, status: int, given: dict[str, Any] | None = None) -> int:
        """Convert ``module``, called with an input of ``status``; returns the status of its output.

        ``given`` is what the call gives besides, by :func:`~snnfast.convert.to_spiking_trace.given_in`; ``None`` where
        nobody knows the call.
        """
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"model must be an ordinary ANN, but {place(path, module)} is a scripted module")
        self._calls[module] += 1
        if module in self._visits:
            before, after, changes, arguments = self._visits[module]
            if changes and self._calls[module] == 2:
                self.untraced.append(f"{place(path, module)} is called more than once in a forward")
            if hasattr(module, "_recipe") and arguments != (given or {}):
                raise ValueError(
                    f"model must call {place(path, module)} with the same arguments each time, got {_told(arguments)} "
                    f"and {_told(given or {})}; make it two modules, or let it have no functional activation"
                )
            if before == status:
                return after
            if changes:
                raise NeedsTime
            del self._visits[module]
            self._calls[module] -= 1
            started = self._changes
            after = self.convert(module, path, status, given)
            if self._changes != started:
                raise NeedsTime
            return after
        started = self._changes
        if type(module).forward is nn.Sequential.forward:
            out = status
            for i, name in enumerate(module._modules):
                out = self._slot(module, name, _join(path, name), out)
                if i == 0 and self._overwrites(module._modules[name]):
                    self.overwriting.add(module)
        elif is_torch_leaf(module):
            out = status
        else:
            try:
                graphs, kept = trace(module, given)
            except Untraceable as error:
                out = self._untraceable(module, path, status, error)
            else:
                was = [source(graph) for graph in graphs]
                out, changed = self._traced(module, path, status, graphs)
                if changed or (self._changes != started and not self._is_still(was, module, given)):
                    if kept:
                        raise ValueError(
                            f"model must not keep what it computes, as {place(path, module)} does in "
                            f"{', '.join(kept)}, where neurons take the place of calls in a forward, which is written "
                            "anew: return it, or give each call of an activation an nn.ReLU module of its own"
                        )
                    module.__class__ = generated(type(module), graphs)
        self._visits[module] = status, out, self._changes - started, given or {}
        return out

    def _slot(
        self, parent: nn.Module, name: str, path: str, status: int, call: fx.Node | None = None, known: bool = True
    ) -> int:
        """The child ``name`` of ``parent``, which is called once, by ``call``, with a tensor, or nobody knows how."""
        child = parent._modules[name]
        if child is None or child in self._added:
            return status
        if child in self.neurons:  # the same Sequential's slot, met again through another path
            if self.neurons[child] or status != DYNAMIC:
                raise NeedsTime
            self.untraced.append(f"{place(path, child)} is called more than once in a forward")
            return DYNAMIC
        name_of_activation = activation_of(child)
        if name_of_activation is not None:
            if not self._wanted(name_of_activation, place(path, child)):
                return status
            self._put(parent, name, self._neuron(status != DYNAMIC, limit_of(child, name_of_activation)))
            return DYNAMIC
        swapped = self._swapped(child, status)
        if swapped is not None:
            self._put(parent, name, swapped)
            return status
        given = given_in(call, child) if call is not None else {} if known else None
        return self.convert(child, path, status, given)

    def _overwrites(self, child: nn.Module | None) -> bool:
        return child in self.in_place or child in self.overwriting

    def _put(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        old = parent._modules.get(name)
        if old is not None:
            self._replaced.append(old)
            module.train(old.training)
            if module in self.neurons and is_in_place(old):
                self.in_place.add(module)
        else:
            module.train(parent.training)
        parent.add_module(name, module)
        self._changes += 1

    def _neuron(self, repeats: bool, limit: float) -> nn.Module:
        neuron = self.make_neuron(repeats)
        if isinstance(neuron, Observer):
            neuron.limit = limit
        self.neurons[neuron] = repeats
        return neuron

    def _add(self, module: nn.Module) -> nn.Module:
        self._added.add(module)
        return module

    def _wanted(self, activation: str, where: str) -> bool:
        """Whether an activation becomes a neuron."""
        if activation == RELU:
            return True
        if self.other_activations == "keep":
            self.kept.append(f"{activation} at {where}")
            return False
        if self.other_activations == "replace" and activation not in _ONLY_KEPT:
            return True
        if activation in _RECURRENT:
            raise ValueError(
                f"model must be a feed-forward ANN with ReLU activations, but has the recurrent layer {activation} at "
                f"{where}: no neuron stands for its gates. Put layers with ReLUs in its place (a spiking network's "
                "memory is in its neurons) and train the model again, or choose: other_activations='keep' runs it as "
                "it is, with no state from one time step to the next"
            )
        instead = "" if activation in _ONLY_KEPT else ", and 'replace' puts neurons in their place"
        raise ValueError(
            f"model must have ReLU activations, but has {activation} at {where}; replace it by a ReLU and train the "
            f"model again, or choose: other_activations='keep' leaves such activations as they are{instead}"
        )

    def _swapped(self, module: nn.Module, status: int) -> nn.Module | None:
        """What stands for a dropout or pooling where there is time."""
        if status != DYNAMIC:
            return None
        if type(module) in DROPOUTS:
            return self._add(Dropout(module.p, DROPOUTS[type(module)], self.timesteps))  # type: ignore[arg-type,index]
        if type(module).__name__ in STOCHASTIC_DEPTHS and not list(module.children()):
            return self._add(DropPath(module, self.timesteps))
        if self.pool_rates and type(module) in POOLS and not module.return_indices:
            return self._add(MaxPoolOfRates(module, self.timesteps))
        return None

    def _untraceable(self, module: nn.Module, path: str, status: int, error: Untraceable) -> int:
        """A module whose forward cannot be followed: only its ReLU modules can be exchanged."""
        called = functional_activations(module)
        if called and self.other_activations != "keep":
            raise ValueError(
                f"model calls {'; '.join(called)} of {place(path, module)}, whose forward torch.fx cannot follow "
                f"({error}), so it cannot be exchanged; use an nn.ReLU module there"
            ) from error
        started = self._changes
        for name, child in list(module._modules.items()):
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                for key in list(child._modules):
                    self._slot(child, key, _join(path, f"{name}.{key}"), DYNAMIC, known=False)
            else:
                self._slot(module, name, _join(path, name), DYNAMIC, known=False)
        if self._changes == started:
            return status
        if status != DYNAMIC:
            raise NeedsTime
        self.untraced.append(f"{place(path, module)} cannot be followed ({error})")
        return DYNAMIC

    # ---- graphs ----
    @staticmethod
    def _is_still(was: list[str], module: nn.Module, given: dict[str, Any] | None) -> bool:
        """Whether the forward does the same with the neurons: it may ask for the kinds of its layers."""
        held = set(vars(module))
        try:
            return [source(graph) for graph in trace(module, given)[0]] == was
        except Untraceable:
            return False
        finally:
            for name in set(vars(module)) - held:  # constants of this trace, under other names than before
                delattr(module, name)

    def _traced(self, module: nn.Module, path: str, status: int, graphs: list[fx.Graph]) -> tuple[int, bool]:
        """A module whose forward is known; returns whether some call in it changes, too."""
        sites: list[tuple[str, bool]] = []
        additions: dict[tuple[str, str], str] = {}
        walks = [_Walk(self, module, path, graph, sites, additions) for graph in graphs]
        outs, calls, before = [], [], self._calls
        for walk in walks:  # of which one is a forward
            self._calls = before.copy()
            outs.append(walk.run(status))
            calls.append(self._calls)
        self._calls = functools.reduce(operator.or_, calls)  # the larger count of each
        if len({walk.count for walk in walks}) > 1:
            raise ValueError(
                f"model must have the same activations in training and in evaluation, but the forward of "
                f"{place(path, module)} calls {walks[0].count} and {walks[1].count}"
            )
        if len(set(outs)) > 1:
            raise NeedsTime
        return outs[0], any(walk.changed for walk in walks)


class _Walk:
    """One pass through a module's graph, in the order of its calls."""

    def __init__(
        self,
        converter: Converter,
        module: nn.Module,
        path: str,
        graph: fx.Graph,
        sites: list[tuple[str, bool]],
        additions: dict[tuple[str, str], str],
    ) -> None:
        self.converter, self.module, self.path, self.graph = converter, module, path, graph
        self.sites = sites  # (where the neuron of each call of an activation is, whether it repeats), as found first
        self.additions = additions
        self.count = 0
        self.changed = False
        self.status: dict[fx.Node, int] = {}
        self.twins: dict[fx.Node, fx.Node] = {}

    def run(self, status: int) -> int:
        for node in list(self.graph.nodes):
            inputs = max((self.status[n] for n in node.all_input_nodes), default=CONSTANT)
            if node.op == "placeholder":
                self.status[node] = status
            elif node.op == "output":
                if inputs == DYNAMIC:
                    self._give_time(node)
                return inputs
            elif self._is_site(node):
                self._exchange(node, inputs)
            else:
                x = next(iter(node.all_input_nodes), None)
                if x is not None and not is_shape(x) and is_in_place(self._called(node)):
                    self._overwritten(x, node)
                node.target = IN_PLACE.get(node.target, node.target)  # a neuron may have kept x for its backward
                if inputs == DYNAMIC:
                    self._give_time(node)
                self.status[node] = self._call(node, inputs)
        return CONSTANT

    def _child(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(str(node.target))

    def _called(self, node: fx.Node) -> nn.Module | fx.Node:
        return self._child(node) if node.op == "call_module" else node

    def _is_site(self, node: fx.Node) -> bool:
        """Whether a neuron takes the place of this call."""
        thing = self._called(node)
        if thing in self.converter.neurons:
            return True
        activation = activation_of(thing)
        if activation is None:
            return False
        path = _join(self.path, str(node.target)) if isinstance(thing, nn.Module) else self.path
        owner = thing if isinstance(thing, nn.Module) else self.module
        return self.converter._wanted(activation, place(path, owner, node))

    def _exchange(self, node: fx.Node, inputs: int) -> None:
        """A neuron of its own for one call of an activation."""
        thing = self._called(node)
        in_place = thing in self.converter.in_place or is_in_place(thing)
        if self.count == len(self.sites):
            self.sites.append(self._new_neuron(node, inputs != DYNAMIC))
        elif self.sites[self.count][1] != (inputs != DYNAMIC):
            raise NeedsTime
        name = self.sites[self.count][0]
        self.count += 1
        x = node.args[0] if node.args else node.kwargs["input"]
        new = node
        if node.op != "call_module" or node.target != name:
            with self.graph.inserting_before(node):
                new = self.graph.call_module(name, (x,))
            node.replace_all_uses_with(new)
            self.graph.erase_node(node)
            self.changed = True
        self.status[new] = DYNAMIC
        if in_place and isinstance(x, fx.Node):
            if x.op == "placeholder":
                self.converter.overwriting.add(self.module)
            self.changed |= self._overwritten(x, new)

    def _overwritten(self, x: fx.Node, by: fx.Node) -> bool:
        """Let later users of ``x``, which the call ``by`` overwrote, take its result; whether there are any."""
        later = [u for u in x.users if u is not by and u > by]
        for user in later:
            user.replace_input_with(x, by)
        return bool(later)

    def _new_neuron(self, node: fx.Node, repeats: bool) -> tuple[str, bool]:
        converter = self.converter
        thing = self._called(node)
        limit = limit_of(thing, activation_of(thing))
        if node.op == "call_module":
            prefix, _, name = str(node.target).rpartition(".")
            owner = self.module.get_submodule(prefix)
            if owner._modules[name] in converter.neurons:  # called before: another neuron beside that one
                name = _free(owner, name)
        else:
            prefix, owner = "", self.module
            name = _free(owner, getattr(node.target, "__name__", str(node.target)).strip("_"))
        converter._put(owner, name, converter._neuron(repeats, limit))
        return _join(prefix, name), repeats

    def _call(self, node: fx.Node, status: int) -> int:
        """Any other call; returns the status of its result."""
        if node.op == "call_module":
            prefix, _, name = str(node.target).rpartition(".")
            owner = self.module.get_submodule(prefix)
            status = self.converter._slot(owner, name, _join(self.path, str(node.target)), status, node)
            if self._child(node) in self.converter.overwriting:
                self._check_unused(node.all_input_nodes[0], node)
        elif node.op == "call_function" and status == DYNAMIC:
            self._swap_function(node)
        return status

    def _check_unused(self, x: fx.Node, call: fx.Node) -> None:
        """``x`` goes into a module that overwrites it by spikes, of which nothing outside can know."""
        if x.op == "placeholder":
            self.converter.overwriting.add(self.module)
        if any(u > call and not is_shape(u) for u in x.users):
            where = place(_join(self.path, str(call.target)), self._child(call), call)
            raise ValueError(
                f"model must not use the input of {where} after that call, since a ReLU in there overwrites it; give "
                "the ReLU inplace=False, or call it before, outside that module, if its result is what is used"
            )

    def _swap_function(self, node: fx.Node) -> None:
        """A functional dropout or max-pooling, where there is time."""
        module = stand_in(node.target, node.args, node.kwargs, self.converter.timesteps, self.converter.pool_rates)
        if module is None:
            if node.target in PYTORCHS:  # the same results: no reason for a generated forward
                node.target = max_pool2d
            return
        name = self._added(node.target.__name__.strip("_"), module)  # type: ignore[union-attr]
        x = node.args[0] if node.args else node.kwargs["input"]
        node.op, node.target, node.args, node.kwargs = "call_module", name, (x,), {}
        self.changed = True

    def _added(self, name: str, module: nn.Module) -> str:
        """The name of a stateless module that the calls of a forward share: this one, or an equal one added before."""
        key = name, repr(module)
        if key not in self.additions:
            self.additions[key] = _free(self.module, name)
            self.converter._put(self.module, self.additions[key], self.converter._add(module))
        return self.additions[key]

    # ---- static values where there is time ----
    def _give_time(self, node: fx.Node) -> None:
        """Repeat the static inputs of a node that has dynamic ones too."""
        for x in node.all_input_nodes:
            if self.status[x] == STATIC:
                node.replace_input_with(x, self._twin(x, node))
                self.changed = True

    def _twin(self, x: fx.Node, user: fx.Node) -> fx.Node:
        """A static value as it is with time, where ``user`` wants it; a batch size is that of the repeated tensor."""
        if x not in self.twins:
            with self.graph.inserting_before(user):
                if is_shape(x):
                    by_input = {n: self._twin(n, user) if self.status[n] == STATIC else n for n in x.all_input_nodes}
                    twin = self.graph.node_copy(x, by_input.__getitem__)
                else:
                    twin = self.graph.call_module(self._added("repeat", Repeat(self.converter.timesteps)), (x,))
            self.status[twin] = DYNAMIC
            self.twins[x] = twin
        return self.twins[x]


def _told(given: dict[str, Any]) -> str:
    """Arguments of a call, for an error."""
    words: dict[Any, str] = {id(VALUE): "a tensor", id(VALUES): "a list"}
    told = [f"{name}={words.get(id(value), repr(value))}" for name, value in given.items()]
    return ", ".join(told) or "the input alone"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _free(module: nn.Module, name: str) -> str:
    """``name``, or ``name_2`` and so on where the module has it already."""
    candidate, i = name, 1
    while hasattr(module, candidate):
        i += 1
        candidate = f"{name}_{i}"
    return candidate
