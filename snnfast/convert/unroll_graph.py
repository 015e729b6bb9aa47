"""The graph of a model's step for :func:`snnfast.unroll`, and how each of its values depends on time."""

from __future__ import annotations

import collections
import inspect
import itertools
import operator
import random
import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..tensors import has_hooks
from .stepping import is_stateful, states_of, takes_state

__all__ = ["CONSTANT", "FINAL", "PARAMETER", "TIMED", "Program", "program_of"]

PARAMETER, CONSTANT, TIMED, FINAL = "parameter", "constant", "timed", "final"  # how a value depends on time

_REWRITE = """{why}. unroll takes a model whose forward is one time step:

    def forward(self, x, {states}):          # [B, ...], not [T, B, ...]
        cur = self.fc(x)
        spk, mem = self.lif(cur, mem)        # or a neuron that keeps its own state
        return spk, mem                      # no loop over time, nothing collected in lists

    spk, mem = snnfast.unroll(model, x, timesteps=T, state=({example},))   # [T, B, ...] each"""


def _loop_error(why: str) -> ValueError:
    return ValueError(_REWRITE.format(why=why, states="mem", example="torch.zeros(0)"))


_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


# Functions and methods that draw random numbers, by name.
_RANDOM = frozenset((
    "alpha_dropout", "bernoulli", "bernoulli_", "dropout", "dropout1d", "dropout2d", "dropout3d", "dropout_",
    "exponential_", "feature_alpha_dropout", "feature_dropout", "gumbel_softmax", "multinomial", "normal", "normal_",
    "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random_", "rrelu", "rrelu_",
    "uniform_",
))  # fmt: skip


class _Tracer(fx.Tracer):
    """Torch's layers and every neuron are one node each; everything else is looked into, and so is a layer's subclass
    with a neuron inside. A node keeps the modes, such as ``torch.no_grad()``, that forward sets for it.

    While it traces, the states of the neurons are nodes, for what forward does with them it does at every step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outside = _modes()
        self.states: list[tuple[str, dict[str, Any], str, Any, fx.Proxy]] = []

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["modes"] = [mode for mode in _modes() if mode not in self.outside]
        return node

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        made = super().create_args_for_root(*args, **kwargs)
        for path, module in self.root.named_modules():
            for holder, name in states_of(module) if is_stateful(module) else ():
                proxy = self.create_proxy("get_attr", f"{path}.{name}", (), {})
                self.states.append((f"{path}.{name}", holder, name, holder[name], proxy))
                holder[name] = proxy
        return made

    def put_states_back(self) -> list[str]:
        """The states that forward read or set."""
        used = []
        for path, holder, name, value, proxy in self.states:
            if proxy.node.users or holder[name] is not proxy:
                used.append(path)
            else:
                self.graph.erase_node(proxy.node)
            holder[name] = value
        return used

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        if is_stateful(m):
            return True
        if any(is_stateful(child) for child in m.modules()):
            return False
        return any(c.__module__.startswith("torch.nn.") and c not in _CONTAINERS for c in type(m).__mro__)


def _modes() -> list[Any]:
    """The modes that count for a node: whether gradients are recorded, and how each kind of device casts."""
    casts = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in ("cpu", "cuda")]
    return [torch.is_grad_enabled(), *casts]


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
        before = {m: dict(m.__dict__) for m in model.modules() if not is_stateful(m)}
        holders = [v for held in before.values() for name, v in held.items() if name not in _MODULES_OWN]
        contents = [(v, v.copy()) for v in holders if isinstance(v, _COLLECTIONS)]
        randomness = random.getstate(), torch.get_rng_state()
        buffers = [(m, name, b, _version(b), b.detach().clone()) for m in before for name, b in _buffers_of(m)]
        states: list[str] = []
        try:
            with torch.enable_grad():
                tracer = _Tracer()
                self.graph = tracer.trace(model, concrete_args=concrete)
        except (fx.proxy.TraceError, TypeError) as error:
            _refuse_norms_with_neurons(model, error)
            raise _loop_error(
                f"{type(model).__name__}.forward depends on the values or the length of its input ({error}), as a "
                "forward with its own loop over time does"
            ) from error
        finally:
            states = tracer.put_states_back()
            kept = [m for m in before if any(_holds_proxy(v) for k, v in m.__dict__.items() if k not in _MODULES_OWN)]
            counted = [(m, name) for m, held in before.items() for name, v in held.items() if _is_changed(m, name, v)]
            for m in (*kept, *(m for m, _ in counted)):
                m.__dict__.clear()
                m.__dict__.update(before[m])
            for v, items in contents:
                if _holds_proxy(v):
                    v.clear()
                    (v.update if hasattr(v, "update") else v.extend)(items)
            written = [
                (m, name)
                for m, name, b, version, value in buffers
                if m._buffers[name] is not b
                or (not torch.equal(b, value) if version is None else b._version != version)
            ]
            for m, name, b, _, value in buffers:
                if (m, name) in written:
                    m._buffers[name] = b
                    with torch.no_grad():
                        b.copy_(value)
        if written or counted:
            m, name = (written or counted)[0]
            _refuse_norms_with_neurons(m, None)
            raise ValueError(
                f"{type(m).__name__} writes its {'buffer' if written else 'attribute'} {name} in forward, which unroll "
                "would do once and the loop does at every step"
            )
        if kept:
            raise ValueError(
                f"{type(kept[0]).__name__} keeps a result of its forward as an attribute: unroll cannot tell state "
                "from a record. Return it instead, or make the module one of the neurons that unroll knows"
            )
        if random.getstate() != randomness[0] or not torch.equal(torch.get_rng_state(), randomness[1]):
            raise ValueError(
                f"{type(model).__name__}.forward draws random numbers that do not depend on its input, which unroll "
                "would draw once and the loop draws at every step: make them from the input, as torch.rand_like(x) does"
            )
        # What fx keeps of tensors made in forward goes into this object, not into the model.
        made = [name for name in model.__dict__ if name.startswith("_tensor_constant") and name not in before[model]]
        self.constants = {name: model.__dict__.pop(name) for name in made}
        self.placeholders = self._placeholders(1 + given)
        modules = dict(model.named_modules())
        self.stateful = [n for n in self.graph.nodes if n.op == "call_module" and is_stateful(modules[n.target])]
        self._check_neurons()
        if states:
            raise ValueError(
                f"forward reads or sets {states[0]}, the state of a neuron: unroll runs the neuron over all steps in "
                "one call, and there is no state of one step. Use what the neuron returns, or keep the loop"
            )
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
            raise _loop_error(
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

    def _check_changed_states(self) -> None:
        """A loop goes on from the state that forward returns, or that it wrote to."""
        for node in self.stateful:
            for part in node.users:
                for user in part.users if part.target is operator.getitem and part.args[1] != 0 else ():
                    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
                    if name.endswith("_") and not name.endswith("__") and user.args[:1] == (part,):
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


def _refuse_norms_with_neurons(model: nn.Module, error: Exception | None) -> None:
    for name, m in model.named_modules():
        if isinstance(m, _BatchNorm) and any(map(is_stateful, m.modules())):
            raise ValueError(
                f"{name or 'the model'} ({type(m).__name__}) is a batch norm with a neuron inside, which unroll cannot "
                "take apart: make the neuron a module of its own after it"
            ) from error


def _buffers_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, b) for name, b in module._buffers.items() if b is not None]


_COLLECTIONS = (list, dict, set, collections.deque)


def _holds_proxy(value: Any, depth: int = 3) -> bool:
    if isinstance(value, fx.Proxy):
        return True
    inside = value.values() if isinstance(value, dict) else value
    return depth > 0 and isinstance(value, (tuple, *_COLLECTIONS)) and any(_holds_proxy(v, depth - 1) for v in inside)


def _is_changed(module: nn.Module, name: str, before: Any) -> bool:
    """Whether a number or a flag of a module is another one now."""
    if name == "training" or not isinstance(before, (bool, int, float, str)):
        return False
    now = module.__dict__.get(name)
    return now is not before and not isinstance(now, fx.Proxy) and not (type(now) is type(before) and now == before)


_programs: weakref.WeakKeyDictionary[nn.Module, dict[Any, Program]] = weakref.WeakKeyDictionary()
_MODULES_OWN = frozenset(vars(nn.Module())) - {"training", "_buffers"}


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
    return [(name, _taken(value)) for name, value in vars(module).items() if name not in _MODULES_OWN]


def program_of(model: nn.Module, given: int) -> Program:
    """The traced model, once for each number of states; again when a submodule was exchanged or what ``forward`` reads
    of a module that is looked into was changed: its mode, a number, a flag, a buffer."""
    known = _programs.setdefault(model, {})
    modules = list(model.modules())
    key = (given, tuple(map(id, modules)), tuple(_modes()[1:]))
    program = known.get(key)
    if program is None or program.attributes != [_attributes_of(modules[k]) for k in program.followed]:
        known.clear()
        followed = [k for k, m in enumerate(modules) if not k or not _Tracer().is_leaf_module(m, "")]
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
