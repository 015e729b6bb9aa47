"""A torch network, traced by torch.fx and walked with a sample, as a NIR graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .. import layer
from .._before import Before, Tracer, source
from ..base import StepModule
from ..neuron import BaseNode
from ..pooling import MaxPool2d
from .nir_conventions import Conventions
from .nir_import import Elementwise
from .nir_layers import Builder, Value, WrongTime, is_li
from .stepping import is_stateful
from .to_spiking_trace import is_in_place

_CONTAINERS = ("SeqToANNContainer", "MultiStepContainer", "StepModeContainer")  # of Sequential's kind, folding time


class _Tracer(Tracer):
    given = ()  # the model is called with its input alone

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        if type(m).__name__ in _CONTAINERS or _is_pair(m) or isinstance(m, (StepModule, Elementwise)):
            return True
        return super().is_leaf_module(m, qualified_name)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_pair(module: nn.Module) -> bool:
    """Whether this is a :class:`snnfast.fused.BatchNormNode`, whose package is above this one."""
    return type(module).__name__ == "BatchNormNode" and type(module).__module__.startswith("snnfast.")


def _computes_as_known(module: nn.Module) -> bool:
    """Whether no subclass computes otherwise: timm's BatchNormAct2d has an activation, others another weight."""
    for name in ("forward", "_conv_forward"):
        owner = next((c for c in type(module).__mro__ if name in vars(c)), nn.Module)
        theirs = owner.__module__.startswith("spikingjelly.") and hasattr(nn, owner.__name__)
        if not owner.__module__.startswith(("torch.nn.modules.", "snnfast.")) and not theirs:
            return False
    return True


class _Walker:
    def __init__(self, builder: Builder) -> None:
        self.build = builder

    def walk(self, module: nn.Module, prefix: str, x: Value) -> Value:
        """The value of a module that is no leaf."""
        if type(module).forward is nn.Sequential.forward:
            for child_name, child in module.named_children():
                x = self.call(child, _join(prefix, child_name), x)
            return x
        try:
            graph, again = (_Tracer().trace(module) for _ in range(2))
        except Exception as error:
            raise ValueError(
                f"model cannot be traced by torch.fx at {prefix or 'its forward'} ({type(module).__name__}): {error}; "
                "export a forward without branches on values and without a time loop"
            ) from error
        if source(graph) != source(again):
            raise ValueError(
                f"model must do the same at each call, and the forward of {prefix or 'the model'} "
                f"({type(module).__name__}) does not: it counts or keeps something"
            )
        env: dict[fx.Node, Any] = {}
        hidden = "network." if isinstance(module, _WithoutTime) else ""  # no part of the user's paths
        for node in graph.nodes:
            place = _join(prefix, str(node.target).removeprefix(hidden))
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            if node.op == "placeholder":
                if x is not None and not env:
                    result = x
                elif node.args:
                    result = node.args[0]  # its default
                else:
                    raise ValueError(
                        f"model must take one input, but {type(module).__name__} takes {node.target!r} too"
                    )
            elif node.op == "get_attr":
                owner, _, attribute = node.target.rpartition(".")
                result = getattr(module.get_submodule(owner), attribute)
            elif node.op == "call_module":
                called, given = module.get_submodule(str(node.target)), [*args, *kwargs.values()]
                wanted = 2 if _is_pair(called) and called.connect else 1
                if len(given) != wanted or not all(isinstance(v, Value) for v in given):
                    tensors = "one tensor" if wanted == 1 else "two tensors"
                    raise ValueError(f"model must call {place} with {tensors}, got {args} {kwargs}")
                result = self.call(called, place, *given)
            elif node.op == "output":
                if not isinstance(args[0], Value):
                    raise ValueError(
                        f"model must return one tensor, got {type(args[0]).__name__} from {prefix or 'it'}"
                    )
                return args[0]
            else:
                result = self.operation(node, _join(prefix, node.name), args, kwargs)
            if isinstance(result, Value) and len(node.users) > 1:
                result = replace(result, shared=True)
            env[node] = result
        raise AssertionError("a traced graph ends in an output")

    def operation(self, node: fx.Node, path: str, args: Any, kwargs: Any) -> Any:
        """A function or a method of a tensor."""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        values = [v for v in [*args, *kwargs.values()] if isinstance(v, Value)]

        def plain(of: Callable[[Tensor], Tensor] = lambda t: t) -> Any:
            """The operation on the tensors themselves, or on others of their shape."""
            a = tuple(of(v.tensor) if isinstance(v, Value) else v for v in args)
            k = {key: of(v.tensor) if isinstance(v, Value) else v for key, v in kwargs.items()}
            return getattr(a[0], name)(*a[1:], **k) if node.op == "call_method" else node.target(*a, **k)  # type: ignore[operator]

        if not values:
            return plain()
        x = values[0]
        if is_in_place(node) and any(user > node for user in node.all_input_nodes[0].users):
            raise ValueError(
                f"model cannot be written as NIR: {path} changes a tensor in place that is used again; make it another "
                "tensor, as y = y + z does"
            )
        if name in ("add", "add_", "iadd", "__add__", "__radd__", "__iadd__") and len(values) == 2:
            if kwargs.get("alpha", 1) != 1:
                raise ValueError(f"model cannot be written as NIR: {path} adds with a factor")
            return self.sum(path, *values)
        if name in ("avg_pool2d", "adaptive_avg_pool2d"):
            kind = nn.AvgPool2d if name == "avg_pool2d" else nn.AdaptiveAvgPool2d
            return self.call(kind(*args[1:], **{k: v for k, v in kwargs.items() if v is not x}), path, x)
        out = plain()
        if not isinstance(out, Tensor):
            return out  # a shape, a number of dimensions
        if name in ("contiguous", "dropout", "dropout2d", "identity", "clone", "to", "float", "double"):
            return replace(x, tensor=out)
        if name == "pad":
            return self.build.pad_channels(path, x, plain(torch.ones_like))  # a sample of zeros shows no padding
        if name in ("flatten", "reshape", "view", "unflatten", "squeeze", "unsqueeze", "expand", "repeat"):
            return self.build.reshape(path, x, out, repeats=name in ("expand", "repeat"))  # direct coding
        raise ValueError(
            f"model cannot be written as NIR: it has no node for the operation {name!r} at {path}; leave it to the "
            "reader of the graph, and export the part of the network before it"
        )

    @staticmethod
    def sum(path: str, a: Value, b: Value) -> Value:
        if a.tensor.shape != b.tensor.shape or a.lead != b.lead:
            raise ValueError(f"model cannot be written as NIR: {path} adds tensors of other shapes")
        return Value(a.tensor + b.tensor, a.sources + b.sources, a.lead, a.shared or b.shared)

    def pair(self, module: Any, path: str, x: Value, skip: Value | None) -> Value:
        """A batch norm and its neuron, and where a residual connection joins."""
        connect = module.connect.name
        if connect != "NONE" and skip is None:
            raise ValueError(f"model must call {path or 'it'} with two tensors, as it has connect={connect!r}")
        if connect in ("AND", "IAND"):
            raise ValueError(
                f"model cannot be written as NIR: {path} multiplies spikes by a residual connection "
                f"(connect={connect!r}), and NIR has no node for that"
            )
        y = self.call(module.norm, _join(path, "norm"), x)
        if skip is not None and connect == "CHARGE":
            y = self.sum(path, y, skip)
        s = self.call(module.neuron, _join(path, "neuron"), y)
        return self.sum(path, s, skip) if skip is not None and connect == "ADD" else s

    def call(self, module: nn.Module, path: str, x: Value, skip: Value | None = None) -> Value:
        if _is_pair(module):
            return self.pair(module, path, x, skip)
        if type(module).__name__ in _CONTAINERS:
            inner = x
            if x.lead == 2:
                inner = replace(x, tensor=x.tensor.flatten(0, 1), lead=1)
            for child_name, child in module.named_children():
                inner = self.call(child, _join(path, child_name), inner)
            if x.lead == 1:
                return inner
            return replace(inner, tensor=inner.tensor.unflatten(0, x.tensor.shape[:2]), lead=2)
        if isinstance(module, BaseNode) or is_li(module):
            return self.build.neuron(module, path, x)
        for kinds, convert in self.converters():
            if isinstance(module, kinds) and _computes_as_known(module):
                return convert(module, path, x)
        if type(module).__module__.startswith("torch.nn") or isinstance(module, (StepModule, MaxPool2d)):
            if type(module).forward is nn.Sequential.forward:
                return self.walk(module, path, x)
            hint = {
                "MaxPool2d": "train it with an AvgPool2d",
                "ReLU": "make it spiking first, with snnfast.to_spiking",
            }.get(type(module).__name__, "replace it, or export the part of the network before it")
            raise ValueError(
                f"model cannot be written as NIR: it has no node for {type(module).__name__} at {path}; {hint}"
            )
        if is_stateful(module):
            raise ValueError(
                f"model cannot be written as NIR: {type(module).__name__} at {path} is a neuron of "
                f"{type(module).__module__.partition('.')[0]}, not of snnfast; export it by that library, or write the "
                "network with snnfast's neurons (docs/migration.md)"
            )
        return self.walk(module, path, x)

    def converters(self) -> tuple[tuple[Any, Callable[[Any, str, Value], Value]], ...]:
        ignored = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, layer.Dropout)
        return (
            (ignored, lambda module, path, x: x),
            ((nn.Conv1d, nn.Conv2d), self.build.convolution),
            (nn.Linear, self.build.linear),
            ((nn.BatchNorm1d, nn.BatchNorm2d), self.build.batch_norm),
            (nn.AvgPool2d, self.build.average_pool),
            (nn.AdaptiveAvgPool2d, self.build.adaptive_pool),
            (Elementwise, self.build.scale),
            (nn.Flatten, lambda module, path, x: self.build.reshape(path, x, module(x.tensor))),
        )


class _WithoutTime(nn.Module):
    """The network that :func:`snnfast.to_spiking` put time around: ``[T * B, *]``, without coding and readout."""

    def __init__(self, network: Any, around: type) -> None:
        super().__init__()
        self.network, self.around = network, around

    def forward(self, x: Tensor) -> Any:
        return super(self.around, self.network).forward(x)  # type: ignore[arg-type]


def _without_time(model: nn.Module, sample: Tensor) -> tuple[nn.Module, Tensor]:
    around = next((c for c in type(model).__mro__ if c.__name__ == "SpikingNetwork"), None)
    if around is None:
        return model, sample
    if model._readout is not None:
        raise ValueError(
            "model cannot be written as NIR with its readout, which NIR has no node for; convert it with readout=None"
        )
    temporal = getattr(model._coding, "__name__", "") == "temporal"
    return _WithoutTime(model, around), sample.flatten(0, 1) if temporal else sample


def export(model: nn.Module, sample: Tensor, conventions: Conventions) -> Any:
    """The graph, without metadata."""
    model, sample = _without_time(model, sample)
    before = Before(model.modules())
    refusals = []
    try:
        for lead in (2, 1):
            if sample.dim() < lead:
                continue
            before.put_back()
            model.eval()
            builder = Builder(model, conventions)
            try:
                with torch.no_grad():
                    x = Value(sample, ("input",), lead)
                    out = _Walker(builder).call(model, "", x)
            except WrongTime as error:
                refusals.append(error)
                continue
            return _finish(builder, x, out)
    finally:
        before.put_back()
    raise ValueError(" / ".join(map(str, dict.fromkeys(map(str, refusals)))) or "sample must have a batch dimension")


def _finish(builder: Builder, x: Value, out: Value) -> Any:
    nir = builder.nir
    if len(out.sources) > 1:  # readers differ in whether an output node adds
        out = builder.add("sum", nir.Scale(np.ones(out.shape)), out, out.tensor)
    if out.sources == ("input",):
        raise ValueError("model must hold at least one layer that NIR knows, got none")
    builder.connect(out, "output")
    nodes = {"input": nir.Input(np.array(x.shape)), **builder.nodes, "output": nir.Output(np.array(out.shape))}
    return nir.NIRGraph(nodes, builder.edges, metadata={}, type_check=False)
