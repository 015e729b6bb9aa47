"""The trace of a model's step for :func:`snnfast.unroll`: a graph of what ``forward`` does at every step."""

from __future__ import annotations

import operator
import random
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import _before
from .._before import Before, is_same
from .stepping import is_stateful, states_of

__all__ = ["Tracer", "loop_error", "modes", "traced"]

_REWRITE = """{why}. unroll takes a model whose forward is one time step:

    def forward(self, x, {states}):          # [B, ...], not [T, B, ...]
        cur = self.fc(x)
        spk, mem = self.lif(cur, mem)        # or a neuron that keeps its own state
        return spk, mem                      # no loop over time, nothing collected in lists

    spk, mem = snnfast.unroll(model, x, timesteps=T, state=({example},))   # [T, B, ...] each"""


def loop_error(why: str) -> ValueError:
    return ValueError(_REWRITE.format(why=why, states="mem", example="torch.zeros(0)"))


_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Proxy(_before.TensorProxy):
    """What forward does to tensors in place happens in place, and it does not write their attributes."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise ValueError(
                f"forward sets {name} of {self.node}, which unroll would do once and the loop does at every step"
            )
        super().__setattr__(name, value)


class Tracer(_before.Tracer):
    """Torch's layers and every neuron are one node each; everything else is looked into, and so is a layer's subclass
    with a neuron inside. A node keeps the modes, such as ``torch.no_grad()``, that forward sets for it.

    While it traces, the states of the neurons are nodes, for what forward does with them it does at every step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outside = modes()
        self.states: list[tuple[str, dict[str, Any], str, Any, fx.Proxy]] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        try:
            return super().trace(root, concrete_args)
        finally:
            self.used = self._put_states_back()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["modes"] = [mode for mode in modes() if mode not in self.outside]
        return node

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        made = super().create_args_for_root(*args, **kwargs)
        for path, module in self.root.named_modules():
            for holder, name in states_of(module) if is_stateful(module) else ():
                proxy = self.create_proxy("get_attr", f"{path}.{name}", (), {})
                self.states.append((f"{path}.{name}", holder, name, holder[name], proxy))
                holder[name] = proxy
        return made

    def _put_states_back(self) -> list[str]:
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


def modes() -> list[Any]:
    """The modes that count for a node: whether gradients are recorded, and how each kind of device casts."""
    casts = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in ("cpu", "cuda")]
    return [torch.is_grad_enabled(), *casts]


def traced(model: nn.Module, concrete: dict[str, Any]) -> tuple[fx.Graph, dict[str, Tensor], list[str]]:
    """The graph, the tensors that forward made for it, and the states of neurons that forward read or set.

    Forward is traced twice: what is another thing the second time, a count or a random number, is another at every
    step. The model stays as it was, but for what the first call of its forward adds to it.
    """
    before = Before(m for m in model.modules() if not is_stateful(m))
    try:
        steps = []
        for _ in range(2):
            graph, constants, states = _trace(model, concrete, before)
            steps.append(_steps(graph, constants, model))
        changed = [node.name for node, *pair in zip(graph.nodes, *steps, strict=False) if not is_same(*pair)]
        if changed or len(steps[0]) != len(steps[1]):
            raise ValueError(
                f"{type(model).__name__}.forward does another thing at each call ({(*changed, 'its length')[0]} "
                "changes), as one that counts or draws does: unroll would take it once and the loop takes it at every "
                "step. Make it from the input, or keep the loop"
            )
    except BaseException:
        before.put_back()
        raise
    return graph, constants, states


def _trace(model: nn.Module, concrete: dict[str, Any], before: Before) -> tuple[fx.Graph, dict[str, Tensor], list[str]]:
    randomness = random.getstate(), torch.get_rng_state()
    try:
        with torch.enable_grad():  # whichever way it is called: the program serves both
            tracer = Tracer()
            graph = tracer.trace(model, concrete)
    except (fx.proxy.TraceError, TypeError) as error:
        _refuse_norms_with_neurons(model, error)
        raise loop_error(
            f"{type(model).__name__}.forward depends on the values or the length of its input ({error}), as a "
            "forward with its own loop over time does"
        ) from error
    for m, *_ in before.kept():
        raise ValueError(
            f"{type(m).__name__} keeps a result of its forward as an attribute: unroll cannot tell state from a "
            "record. Return it instead, or make the module one of the neurons that unroll knows"
        )
    written = before.written()
    if written is not None:
        m, kind, name = written
        _refuse_norms_with_neurons(m, None)
        raise ValueError(
            f"{type(m).__name__} writes its {kind} {name} in forward, which unroll would do once and the loop does at "
            "every step"
        )
    if random.getstate() != randomness[0] or not torch.equal(torch.get_rng_state(), randomness[1]):
        raise ValueError(
            f"{type(model).__name__}.forward draws random numbers that do not depend on its input, which unroll "
            "would draw once and the loop draws at every step: make them from the input, as torch.rand_like(x) does"
        )
    # What fx keeps of tensors made in forward goes into the program, not into the model.
    made = [k for k in model.__dict__ if k.startswith("_tensor_constant") and k not in before.attributes[model]]
    return graph, {name: model.__dict__.pop(name) for name in made}, tracer.used


def _steps(graph: fx.Graph, constants: dict[str, Tensor], model: nn.Module) -> list[Any]:
    """What each node does, as it is now."""
    place = {node: f"%{k}" for k, node in enumerate(graph.nodes)}

    def step(node: fx.Node) -> Any:
        if node.op != "get_attr":
            return node.op, node.target, repr(fx.map_arg((node.args, node.kwargs), place.__getitem__))
        name = str(node.target)
        t = constants[name] if name in constants else operator.attrgetter(name)(model)
        # Parameters are nodes, to which nothing is done in a trace.
        return t.detach().clone() if isinstance(t, Tensor) and not isinstance(t, nn.Parameter) else t

    return [step(node) for node in graph.nodes]


def _refuse_norms_with_neurons(model: nn.Module, error: Exception | None) -> None:
    for name, m in model.named_modules():
        if isinstance(m, _BatchNorm) and any(map(is_stateful, m.modules())):
            raise ValueError(
                f"{name or 'the model'} ({type(m).__name__}) is a batch norm with a neuron inside, which unroll cannot "
                "take apart: make the neuron a module of its own after it"
            ) from error
