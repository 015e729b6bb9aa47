"""The graph of a model's step for :func:`snnfast.unroll`, and how each of its values depends on time."""

from __future__ import annotations

import inspect
import itertools
import operator
import weakref
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from .._before import IN_PLACE, MODULES_OWN
from ..tensors import has_hooks
from .stepping import is_stateful, takes_state
from .unroll_trace import Tracer, loop_error, modes, traced

__all__ = ["CONSTANT", "FINAL", "PARAMETER", "TIMED", "Program", "program_of"]

PARAMETER, CONSTANT, TIMED, FINAL = "parameter", "constant", "timed", "final"  # how a value depends on time

# Functions and methods that draw random numbers, by name.
_RANDOM = frozenset((
    "alpha_dropout", "bernoulli", "bernoulli_", "dropout", "dropout1d", "dropout2d", "dropout3d", "dropout_",
    "exponential_", "feature_alpha_dropout", "feature_dropout", "gumbel_softmax", "multinomial", "normal", "normal_",
    "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random_", "rrelu", "rrelu_",
    "uniform_",
))  # fmt: skip


class Program:
    """The graph of a model's step and what each of its nodes depends on. It holds names, no modules."""

    followed: list[int]  # of model.modules(), those that are looked into
    attributes: list[Any]  # of each of these, as they were

    def __init__(self, model: nn.Module, given: int) -> None:
        parameters = list(inspect.signature(model.forward).parameters.values())
        concrete = {p.name: p.default for p in parameters[1 + given :] if p.default is not p.empty}
        missing = [
            p.name for p in parameters[1 + given :] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        if missing:
            raise TypeError(
                f"forward also takes {', '.join(missing)}: give what the loop passes before the first step, "
                f"state=({', '.join(p.name for p in parameters[1 : 1 + given + len(missing)])},)"
            )
        taken = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters[1:])
        if given > taken and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            raise TypeError(f"state must hold {taken} at most, as many as forward takes beside x, got {given}")
        self.graph, self.constants, states = traced(model, concrete)
        self.placeholders = self._placeholders(1 + given)
        modules = dict(model.named_modules())
        self.stateful = [n for n in self.graph.nodes if n.op == "call_module" and is_stateful(modules[n.target])]
        self._check_neurons()
        if states:
            raise ValueError(
                f"forward reads or sets {states[0]}, the state of a neuron: unroll runs the neuron over all steps in "
                "one call, and there is no state of one step. Use what the neuron returns, or keep the loop"
            )
        self._check_writes()
        self._check_changed_states()
        self._check_carried_states(modules, takes_more=len(parameters) > 1)
        self.kinds = self._kinds(modules, constant=True)
        self.hoists = not any(self._mixes(n) for n in self.graph.nodes)
        self.kinds_timed = self._kinds(modules, constant=False)

    def _placeholders(self, given: int) -> list[fx.Node]:
        """The arguments that are given; those with a default leave the graph, with fx's checks of them."""

        def erase(node: fx.Node) -> None:
            for user in list(node.users):
                erase(user)
            self.graph.erase_node(node)

        found = [n for n in self.graph.nodes if n.op == "placeholder"]
        for node in found[given:]:
            erase(node)
        return found[:given]

    def _check_neurons(self) -> None:
        targets = [n.target for n in self.stateful]
        twice = [t for t in targets if targets.count(t) > 1]
        if twice:
            raise loop_error(
                f"{twice[0]} is called {targets.count(twice[0])} times in one forward, as in a loop over time"
            )
        self.state_of: dict[fx.Node, fx.Node] = {}
        for node in self.stateful:
            for argument in node.all_input_nodes[1:]:
                if argument not in self.placeholders[1:]:
                    raise ValueError(
                        f"the state given to {node.target} is computed inside forward ({argument}): it must be an "
                        "argument of forward, or be left to the neuron"
                    )
                self.state_of[argument] = node
        for placeholder in self.placeholders[1:]:
            users = set(placeholder.users)
            if not users <= {self.state_of.get(placeholder)}:
                other = next(iter(users - {self.state_of.get(placeholder)}))
                raise ValueError(
                    f"{placeholder.target} is used by {other.name}, which is no neuron's state: the step needs what a "
                    "later layer gave in the step before. Such a recurrence can only be run step by step"
                )

    def _check_writes(self) -> None:
        for node in self.graph.nodes:
            written = node
            while written.all_input_nodes and (_writes(written) or _is_view(written)):
                written = written.all_input_nodes[0]
            if _writes(node) and written.op == "get_attr" and written.target not in self.constants:
                raise ValueError(
                    f"forward writes {written.target} ({node.name}), which unroll would do once and the loop does at "
                    "every step: do it outside of forward, or keep the loop"
                )

    def _check_changed_states(self) -> None:
        """A loop goes on from the state that forward returns, or that it wrote to."""
        for node in self.stateful:
            for part in node.users:
                for user in part.users if part.target is operator.getitem and part.args[1] != 0 else ():
                    if _writes(user) and user.args[:1] == (part,):
                        raise _changed_state_error(node, user)
        returned = next(n for n in self.graph.nodes if n.op == "output").args[0]
        if isinstance(returned, (tuple, list)) and len(returned) == len(self.placeholders):
            for placeholder, part in zip(self.placeholders[1:], returned[1:], strict=True):
                neuron = self.state_of.get(placeholder)
                if neuron is None:
                    continue
                taken = isinstance(part, fx.Node) and part.target is operator.getitem and part.args[0] is neuron
                places = [k for k, a in enumerate(neuron.args) if a is placeholder]
                if not taken or (places and part.args[1] >= 0 and part.args[1] not in places):
                    raise _changed_state_error(neuron, part)

    def _check_carried_states(self, modules: dict[str, nn.Module], takes_more: bool) -> None:
        """A neuron without a state of its own starts afresh at each step of a loop that cannot hand its state on."""
        for node in self.stateful:
            returned = any(user.users or user.op == "output" for user in node.users if user.args[1:] != (0,))
            if takes_state(modules[str(node.target)]) and not (takes_more and returned):
                raise ValueError(
                    f"forward {'takes no state for' if returned else 'drops the state of'} {node.target}, which keeps "
                    "none itself, so a loop starts it afresh at each step: let forward take the state and return it, "
                    "def forward(self, x, state=None)"
                )

    def _kinds(self, modules: dict[str, nn.Module], constant: bool) -> dict[fx.Node, str]:
        kinds: dict[fx.Node, str] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                first = node is self.placeholders[0]
                kinds[node] = (CONSTANT if constant else TIMED) if first else FINAL
            elif node.op == "get_attr":
                kinds[node] = PARAMETER
            elif node in self.stateful:
                kinds[node] = TIMED
            elif _is_random(node, modules):
                kinds[node] = TIMED  # drawn for each step
            else:
                found = {kinds[n] for n in node.all_input_nodes}
                kinds[node] = next((k for k in (TIMED, CONSTANT) if k in found), PARAMETER)
        return kinds

    def _mixes(self, node: fx.Node) -> bool:
        """Whether a timed function takes a number that was read from the constant input: its batch size, say."""
        return (
            self.kinds[node] == TIMED
            and node not in self.stateful
            and any(self.kinds[n] == CONSTANT and _reads_shape(n) for n in node.all_input_nodes)
        )


def _writes(node: fx.Node) -> bool:
    """Whether a call writes its first argument in place."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_method", "call_function") or name == "requires_grad_":
        return False
    return node.target in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _is_view(node: fx.Node) -> bool:
    """Whether a call gives its first argument, or a part of it, in another form."""
    return node.target in (getattr, operator.getitem, "detach", "view", "view_as", "reshape", "t", "requires_grad_")


def _changed_state_error(neuron: fx.Node, what: Any) -> ValueError:
    return ValueError(
        f"forward returns {what} where the loop takes the state that {neuron.target} goes on from, or writes to it: "
        "unroll runs the neuron over all steps in one call. Return the states as the neurons return them, in the order "
        "of forward's arguments"
    )


def _is_random(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        layers = modules[str(node.target)].modules()
        return any(isinstance(m, (_DropoutNd, nn.RReLU)) or getattr(m, "dropout", False) for m in layers)
    return (node.target if node.op == "call_method" else getattr(node.target, "__name__", "")) in _RANDOM


def _reads_shape(node: fx.Node) -> bool:
    if node.op == "call_method" and node.target in ("size", "dim", "numel"):
        return True
    if node.op == "call_function" and node.target in (getattr, len):
        return True
    inputs = node.all_input_nodes
    return node.op == "call_function" and node.target is operator.getitem and any(_reads_shape(n) for n in inputs)


_programs: weakref.WeakKeyDictionary[nn.Module, dict[Any, Program]] = weakref.WeakKeyDictionary()


def _version(t: Tensor) -> int | None:
    """``None`` for a tensor that inference mode made, which counts no writes."""
    return None if t.is_inference() else t._version


def _taken(value: Any, depth: int = 2) -> Any:
    """What tracing may have made a constant of, in a form in which any later change of it shows."""
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return type(value), value
    if isinstance(value, Tensor):
        return id(value), _version(value)
    inside: Any = ()
    if depth and isinstance(value, (list, tuple)):
        inside = value
    elif depth and not callable(value):
        held = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        inside = [*held.keys(), *held.values()]
    return id(value), len(inside), tuple(_taken(v, depth - 1) for v in itertools.islice(inside, 64))


def _attributes_of(module: nn.Module) -> list[Any]:
    return [(name, _taken(value)) for name, value in vars(module).items() if name not in MODULES_OWN]


def program_of(model: nn.Module, given: int) -> Program:
    """The traced model, once for each number of states; again when a submodule was exchanged or what ``forward`` reads
    of a module that is looked into was changed: its mode, a number, a flag, a buffer."""
    known = _programs.setdefault(model, {})
    modules = list(model.modules())
    key = (given, tuple(map(id, modules)), tuple(modes()[1:]))
    program = known.get(key)
    if program is None or program.attributes != [_attributes_of(modules[k]) for k in program.followed]:
        known.clear()
        followed = [k for k, m in enumerate(modules) if not k or not Tracer().is_leaf_module(m, "")]
        _refuse_hooks(modules, followed)
        program = known[key] = Program(model, given)
        program.followed = followed
        program.attributes = [_attributes_of(modules[k]) for k in followed]
    else:
        _refuse_hooks(modules, program.followed)
    return program


def _refuse_hooks(modules: list[nn.Module], followed: list[int]) -> None:
    for k in followed:
        if has_hooks(modules[k]):
            raise ValueError(
                f"{type(modules[k]).__name__} has hooks, but unroll does not call it: it calls the layers and neurons "
                "inside it. Hook into these"
            )
