"""A NIR graph as a torch network."""

from __future__ import annotations

import graphlib
import importlib
import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..base import MemoryModule
from ..functional import reset_net
from ..neuron import IFNode, LIFNode
from ..surrogate import SurrogateLike
from .nir_conventions import Conventions, load_nir, threshold_to_read


# ---- the network ----
class Elementwise(nn.Module):
    """``x * scale + offset``, each of a sample's shape or a number; input ``[N, *]``."""

    scale: Tensor
    offset: Tensor | None

    def __init__(self, scale: Tensor, offset: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return x if self.offset is None else x + self.offset


class NIRNetwork(nn.Module):
    """The layers of a NIR graph in a possible order: ``[T, B, *]`` -> ``[T, B, *]``.

    Attributes:
        nodes: modules by the names of the graph's nodes (dots become underscores). Neurons take all time steps at
            once, other layers have time folded into the batch.
    """

    def __init__(self, nodes: dict[str, nn.Module], plan: list[tuple[str, tuple[str, ...]]]) -> None:
        super().__init__()
        self.nodes = nn.ModuleDict(nodes)
        self._plan = plan  # (name, the names of the nodes whose sum is its input); the output comes last

    def forward(self, x_seq: Tensor) -> Tensor:
        values = {"": x_seq}
        last_use = {source: name for name, sources in self._plan for source in sources}
        x = x_seq
        for name, sources in self._plan:
            x = values[sources[0]]
            for source in sources[1:]:
                x = x + values[source]
            for source in {s for s in sources if last_use[s] == name}:
                del values[source]
            if name:
                values[name] = x = self.apply_node(name, x)
        return x

    def apply_node(self, name: str, x: Tensor) -> Tensor:
        """One node on ``[T, B, *]``."""
        module = self.nodes[name]
        if isinstance(module, (MemoryModule, NIRNetwork, ScaledNeuron)):
            return module(x)
        return module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class ScaledNeuron(nn.Sequential):
    """A neuron whose input is scaled and shifted first, for parameters that the neuron itself does not have."""


# ---- reading ----
def read(graph: Any) -> Any:
    """A graph as it is, or from a file.

    Raises:
        FileNotFoundError: no such file.
        TypeError, ValueError: neither a graph nor a NIR file.
    """
    nir = load_nir()

    if isinstance(graph, nir.NIRGraph):
        return graph
    if not isinstance(graph, (str, os.PathLike)):
        raise TypeError(f"graph must be a nir.NIRGraph or the path of a file, got {type(graph).__name__}")
    path = os.fspath(graph)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"graph must be a nir.NIRGraph or the path of a file, but there is no file {path!r}")
    try:
        # The package's own type check is wrong for grouped convolutions and oblong kernels; build() checks shapes.
        loaded = nir.read(path, type_check=False)
    except Exception as error:
        unknown = _unknown_types(path)
        if unknown:
            raise ValueError(f"graph in {path!r} has nodes of unknown type: {', '.join(unknown)}") from error
        raise ValueError(
            f"graph cannot be read from {path!r} ({type(error).__name__}: {error}); the file is truncated or of "
            "another kind"
        ) from error
    if not isinstance(loaded, nir.NIRGraph):
        raise ValueError(f"graph in {path!r} must be a whole NIRGraph, got a single {type(loaded).__name__}")
    return loaded


def _unknown_types(path: str) -> list[str]:
    h5py, nir = importlib.import_module("h5py"), load_nir()

    found: list[str] = []

    def visit(group: Any) -> None:
        for name, node in group["nodes"].items():
            kind = node["type"][()].decode()
            if kind == "NIRGraph":
                visit(node)
            elif not hasattr(nir, kind):
                found.append(f"{name} ({kind})")

    try:
        with h5py.File(path, "r") as f:
            visit(f["node"])
    except Exception:
        return []  # not even that far: the file itself is broken
    return found


# ---- building ----
def _order(graph: Any) -> list[tuple[str, tuple[str, ...]]]:
    """The graph's nodes in an order in which they can be computed, each with the nodes that feed it."""
    nir = load_nir()

    inputs = [name for name, node in graph.nodes.items() if isinstance(node, nir.Input)]
    outputs = [name for name, node in graph.nodes.items() if isinstance(node, nir.Output)]
    if len(inputs) != 1 or len(outputs) != 1:
        raise ValueError(f"graph must have one input and one output node, got inputs {inputs} and outputs {outputs}")
    sources: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        for end in (source, target):
            if end not in sources:
                raise ValueError(f"graph has an edge {source!r} -> {target!r}, but no node {end!r}")
        sources[target].append(source)
    try:
        order = list(graphlib.TopologicalSorter(sources).static_order())
    except graphlib.CycleError as error:
        cycle = " -> ".join(reversed(error.args[1]))
        raise ValueError(
            f"graph has a cycle, {cycle}: recurrence is not supported, for snnfast runs each layer over all time steps "
            "at once; use Norse or SpikingJelly's step_mode='s' for such a graph"
        ) from error
    for name in order:
        if not sources[name] and name != inputs[0]:
            raise ValueError(f"graph must lead to every node from its input, but no edge ends in {name!r}")
    if sources[inputs[0]]:
        raise ValueError(f"graph must have no edge into its input node {inputs[0]!r}")
    needed, waiting = set(), [outputs[0]]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += sources[name]
    return [(name, tuple(sources[name])) for name in order if name in needed]


def _integers(value: Any, n: int) -> Any:
    """A size as torch takes it: ``'same'``, or ``n`` integers."""
    if isinstance(value, (str, bytes)):
        return value.decode() if isinstance(value, bytes) else value
    numbers = np.broadcast_to(np.asarray(value).reshape(-1), (n,))
    return tuple(int(v) for v in numbers)


class _Builder:
    def __init__(self, conventions: Conventions, surrogate: SurrogateLike, dtype: torch.dtype) -> None:
        self.nir, self.conventions, self.surrogate, self.dtype = load_nir(), conventions, surrogate, dtype

    def graph(self, graph: Any) -> NIRNetwork:
        names = _names(graph)
        plan, nodes = [], {}
        for name, sources in _order(graph):
            node = graph.nodes[name]
            if isinstance(node, self.nir.Input):
                continue
            plan.append((names[name], tuple(names[s] for s in sources)))
            if not isinstance(node, self.nir.Output):
                nodes[names[name]] = self.node(name, node)
        return NIRNetwork(nodes, plan)

    def node(self, name: str, node: Any) -> nn.Module:
        n = self.nir
        converters: dict[type, Callable[[str, Any], nn.Module]] = {
            n.Affine: self.linear,
            n.Linear: self.linear,
            n.Conv1d: self.convolution,
            n.Conv2d: self.convolution,
            n.AvgPool2d: self.pool,
            n.SumPool2d: self.pool,
            n.Flatten: self.flatten,
            n.Scale: lambda name, node: Elementwise(self.tensor(name, "scale", node.scale)),
            n.IF: self.neuron,
            n.LIF: self.neuron,
            n.LI: self.neuron,
            n.NIRGraph: lambda name, node: self.graph(node),
        }
        if type(node) not in converters:
            known = ", ".join(kind.__name__ for kind in converters)
            raise ValueError(
                f"graph has node {name!r} of type {type(node).__name__}, which snnfast has not; it has {known}"
            )
        return converters[type(node)](name, node)

    def tensor(self, name: str, what: str, array: Any) -> Tensor:
        array = np.asarray(array)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"graph's node {name!r} must have numbers as {what}, got dtype {array.dtype}")
        if not np.isfinite(array).all():
            raise ValueError(f"graph's node {name!r} must have finite {what}, got NaN or infinity")
        return torch.from_numpy(np.array(array)).to(self.dtype)

    # ---- layers ----
    def linear(self, name: str, node: Any) -> nn.Module:
        weight = self.tensor(name, "weight", node.weight)
        if weight.dim() != 2:
            raise ValueError(f"graph's node {name!r} must have weight [out, in], got shape {tuple(weight.shape)}")
        has_bias = isinstance(node, self.nir.Affine)
        module = nn.Linear(weight.shape[1], weight.shape[0], has_bias, dtype=self.dtype)
        return self.fill(name, module, weight, node.bias if has_bias else None)

    def convolution(self, name: str, node: Any) -> nn.Module:
        space = 2 if isinstance(node, self.nir.Conv2d) else 1
        weight = self.tensor(name, "weight", node.weight)
        if weight.dim() != space + 2:
            raise ValueError(
                f"graph's node {name!r} must have a weight of {space + 2} dimensions, got {tuple(weight.shape)}"
            )
        groups = int(node.groups)
        kind: Any = nn.Conv2d if space == 2 else nn.Conv1d
        module = kind(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            _integers(node.stride, space),
            _integers(node.padding, space),
            _integers(node.dilation, space),
            groups,
            dtype=self.dtype,
        )
        return self.fill(name, module, weight, node.bias)

    def fill(self, name: str, module: Any, weight: Tensor, bias: Any) -> nn.Module:
        with torch.no_grad():
            module.weight.copy_(weight)
            if module.bias is not None:
                value = self.tensor(name, "bias", bias)
                if value.shape != module.bias.shape:
                    raise ValueError(
                        f"graph's node {name!r} must have a bias of {len(weight)}, got {tuple(value.shape)}"
                    )
                module.bias.copy_(value)
        return module

    def pool(self, name: str, node: Any) -> nn.Module:
        sizes = [_integers(value, 2) for value in (node.kernel_size, node.stride, node.padding)]
        return nn.AvgPool2d(
            sizes[0], sizes[1], sizes[2], divisor_override=1 if isinstance(node, self.nir.SumPool2d) else None
        )

    def flatten(self, name: str, node: Any) -> nn.Module:
        # NIR counts a sample's dimensions, torch the batch too.
        start, end = int(node.start_dim), int(node.end_dim)
        return nn.Flatten(start + 1 if start >= 0 else start, end + 1 if end >= 0 else end)

    # ---- neurons ----
    def neuron(self, name: str, node: Any) -> nn.Module:
        """A neuron of scalar parameters; what varies between its neurons is put into a scale of its input.

        ``v`` and ``scale * v + offset`` spike alike if input, threshold and reset are changed with them.
        """
        spiking = not isinstance(node, self.nir.LI)
        dt, leaky = self.conventions.dt, not isinstance(node, self.nir.IF)
        get = {
            what: np.asarray(getattr(node, what), np.float64)
            for what in ("r", "tau", "v_leak", "v_threshold", "v_reset")
            if hasattr(node, what)
        }
        for what, value in get.items():
            if not np.isfinite(value).all():
                raise ValueError(f"graph's node {name!r} must have finite {what}, got NaN or infinity")
        tau, gain = 2.0, get["r"]
        decay_input = True
        if leaky:
            tau = self.time_constant(name, node, get["tau"])
            decay_input = not np.allclose(gain, tau, rtol=1e-9, atol=0)
            gain = gain if decay_input else np.ones_like(gain)
        elif self.conventions.if_r == "1/dt":
            gain = np.ones_like(gain) if np.allclose(gain * dt, 1, rtol=1e-9, atol=0) else gain * dt
        reset = get["v_reset"] if spiking else get["v_leak"]
        offset = get["v_leak"] - reset if leaky else np.zeros_like(reset)
        if leaky and not decay_input:
            offset = offset / tau  # the shift is divided by tau with the leak, the input is not
        scalars = {"v_reset": reset}
        if spiking:
            scalars["v_threshold"] = get["v_threshold"]
            if (get["v_threshold"] <= reset).any():
                raise ValueError(f"graph's node {name!r} must have v_threshold above v_reset")
            if any(np.unique(value).size > 1 for value in scalars.values()):
                distance = get["v_threshold"] - reset
                gain, offset = gain / distance, offset / distance
                scalars = {"v_reset": np.zeros(1), "v_threshold": np.ones(1)}
        elif np.unique(reset).size > 1:
            raise ValueError(f"graph's node {name!r} must have the same v_leak for all its integrators")
        module = self.module(name, leaky, spiking, tau, decay_input, {k: float(v.flat[0]) for k, v in scalars.items()})
        if (gain == 1).all() and (offset == 0).all():
            return module
        uniform = np.unique(gain).size == 1 and np.unique(offset).size == 1
        scale, shift = (torch.from_numpy(np.array(a.flat[0] if uniform else a)).to(self.dtype) for a in (gain, offset))
        return ScaledNeuron(Elementwise(scale, shift if bool((shift != 0).any()) else None), module)

    def time_constant(self, name: str, node: Any, tau: Any) -> float:
        """In time steps."""
        if np.unique(tau).size != 1:
            raise ValueError(
                f"graph's node {name!r} must have one tau for all its neurons, got {tau.min():g} to {tau.max():g} s: "
                "snnfast's LIFNode has one time constant; split the node"
            )
        steps = float(tau.flat[0]) / self.conventions.dt
        exact = float(node.metadata.get("tau_steps", math.nan)) if isinstance(node.metadata, dict) else math.nan
        steps = exact if math.isclose(exact, steps, rel_tol=1e-9) else steps
        if not steps > 1.0:
            raise ValueError(
                f"graph's node {name!r} must have tau above dt, got tau = {tau.flat[0]:g} s and dt = "
                f"{self.conventions.dt:g} s; take a smaller dt"
            )
        return steps

    def module(
        self, name: str, leaky: bool, spiking: bool, tau: float, decay_input: bool, scalars: dict[str, float]
    ) -> nn.Module:
        if not spiking:
            from ..readout import LI

            return LI(tau, decay_input, scalars["v_reset"], step_mode="m")
        threshold = threshold_to_read(scalars["v_threshold"], self.conventions.comparison, self.dtype)
        arguments: dict[str, Any] = {"surrogate_function": self.surrogate, "step_mode": "m"}
        if leaky:
            return LIFNode(tau, decay_input, threshold, scalars["v_reset"], **arguments)
        return IFNode(threshold, scalars["v_reset"], **arguments)


def _names(graph: Any) -> dict[str, str]:
    """Names that torch allows for modules; the input has none."""
    nir = load_nir()

    names: dict[str, str] = {}
    used: Counter[str] = Counter()
    for name, node in graph.nodes.items():
        if isinstance(node, (nir.Input, nir.Output)):
            names[name] = ""
            continue
        legal = name.replace(".", "_") or "node"
        while hasattr(nn.ModuleDict(), legal) or used[legal]:
            legal += "_"
        used[legal] += 1
        names[name] = legal
    return names


def build(graph: Any, conventions: Conventions, surrogate: SurrogateLike, dtype: torch.dtype) -> NIRNetwork:
    """The network of a graph, tried on one sample of zeros where the graph tells its shape."""
    nir = load_nir()

    network = _Builder(conventions, surrogate, dtype).graph(graph)
    shape = next(node for node in graph.nodes.values() if isinstance(node, nir.Input)).input_type["input"]
    if shape is not None:
        _try(network, tuple(int(n) for n in np.asarray(shape).reshape(-1)), dtype)
    return network


def _try(network: NIRNetwork, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = {"": torch.zeros((1, 1, *shape), dtype=dtype)}
    with torch.no_grad():
        for name, sources in network._plan:
            try:
                x = torch.stack([values[s] for s in sources]).sum(0)
                if name:
                    values[name] = network.apply_node(name, x)
            except (RuntimeError, ValueError, IndexError) as error:
                got = " + ".join(str(tuple(values[s].shape[2:])) for s in sources)
                raise ValueError(
                    f"graph's node {name or 'output'!r} does not fit its input of shape {got}: {error}"
                ) from error
    reset_net(network)
