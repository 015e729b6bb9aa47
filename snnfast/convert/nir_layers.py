"""Torch's layers and snnfast's neurons as NIR nodes, one after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..base import MemoryModule
from ..neuron import IFNode, LIFNode, ParametricLIFNode
from .nir_conventions import Conventions, load_nir, threshold_to_write


class WrongTime(ValueError):
    """The sample does not have the time dimension that a module wants: the other reading of it may fit."""


@dataclass(frozen=True)
class Value:
    """A tensor of the traced network and the NIR nodes whose sum it is.

    ``lead`` is the number of its leading dimensions that are time and batch: 2 for ``[T, B, *]``, 1 for ``[T * B, *]``
    and for ``[B, *]``. ``shared`` tells that more than one operation reads it.
    """

    tensor: Tensor
    sources: tuple[str, ...]
    lead: int
    shared: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape[self.lead :])


def is_li(module: nn.Module) -> bool:
    return type(module).__name__ == "LI" and isinstance(module, MemoryModule) and hasattr(module, "tau")


def _array(t: Tensor | None) -> Any:
    return None if t is None else t.detach().cpu().numpy().copy()


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


class Builder:
    """A NIR graph that grows node by node."""

    def __init__(self, model: nn.Module, conventions: Conventions) -> None:
        self.nir, self.model, self.conventions = load_nir(), model, conventions
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.called: set[int] = set()

    # ---- the graph ----
    def name(self, path: str) -> str:
        wanted = path.removeprefix("nodes.").replace(".", "_") or type(self.model).__name__.lower()
        name, n = wanted, 1
        while name in self.nodes or name in ("input", "output"):
            name, n = f"{wanted}_{n}", n + 1
        return name

    def add(self, path: str, node: Any, x: Value, out: Tensor, lead: int | None = None) -> Value:
        """Append ``node``, which turns ``x`` into ``out``."""
        name = self.name(path)
        self.connect(x, name)
        self.nodes[name] = node
        result = Value(out, (name,), x.lead if lead is None else lead)
        # NIR's own inference is wrong for grouped convolutions and oblong kernels; the shapes are known here.
        node.input_type = {"input": np.array(x.shape)}
        node.output_type = {"output": np.array(result.shape)}
        return result

    def connect(self, x: Value, name: str) -> None:
        for i, source in enumerate(x.sources):
            if source in x.sources[:i]:  # x + x: NIR allows one edge between two nodes
                source = self.add(
                    f"{source}_again", self.nir.Scale(np.ones(x.shape)), replace(x, sources=(source,)), x.tensor
                ).sources[0]
            self.edges.append((source, name))

    def reshape(self, path: str, x: Value, out: Tensor, repeats: bool = False) -> Value:
        """Another shape: of time and batch alone, which NIR does not see, or of a sample, flattened."""
        before = x.shape
        for lead in (x.lead, 1, 2):
            after, ahead = tuple(out.shape[lead:]), tuple(out.shape[:lead])
            kept = ahead == tuple(x.tensor.shape[: x.lead])
            folded = lead != x.lead and math.prod(ahead) == math.prod(x.tensor.shape[: x.lead])
            if len(ahead) < lead or not (kept or folded or repeats):
                continue
            if after == before:
                return replace(x, tensor=out, lead=lead)
            for start in range(len(after)):  # any run of dimensions that, merged, gives the new shape
                end = start + len(before) - len(after)
                merged = (math.prod(before[start : end + 1]),)
                if end > start and after == before[:start] + merged + before[end + 1 :]:
                    last = end if end + 1 < len(before) else -1
                    node = self.nir.Flatten({"input": np.array(before)}, start, last)
                    return self.add(path, node, x, out, lead)
        raise WrongTime(
            f"model cannot be written as NIR: {path} turns a sample's shape {before} into another that is no "
            f"flattening of it (tensor {tuple(x.tensor.shape)} -> {tuple(out.shape)}); use nn.Flatten or flatten(1)"
        )

    # ---- layers ----
    @staticmethod
    def expect(module: nn.Module, path: str, x: Value, dimensions: int) -> None:
        if len(x.shape) != dimensions:
            raise WrongTime(
                f"sample must have the shape that the model takes: {path} ({type(module).__name__}) got "
                f"{tuple(x.tensor.shape)}"
            )

    def convolution(self, module: Any, path: str, x: Value) -> Value:
        space = 2 if isinstance(module, nn.Conv2d) else 1
        self.expect(module, path, x, space + 1)
        if module.padding_mode != "zeros":
            raise ValueError(
                f"model cannot be written as NIR: {path} pads with {module.padding_mode!r}, NIR with zeros"
            )
        out = module(x.tensor)
        weight, bias = _array(module.weight), _array(module.bias)
        bias = np.zeros(len(weight), weight.dtype) if bias is None else bias
        geometry: tuple[Any, ...] = (module.stride, module.padding, module.dilation)
        if space == 2:
            node = self.nir.Conv2d(x.shape[1:], weight, *geometry, module.groups, bias)
        else:
            geometry = tuple(g if isinstance(g, str) else g[0] for g in geometry)
            node = self.nir.Conv1d(x.shape[1], weight, *geometry, module.groups, bias)
        return self.add(path, node, x, out)

    def pad_channels(self, path: str, x: Value, out: Tensor) -> Value:
        """Channels of zeros after the image's own, as shortcuts have them: a convolution of 1 x 1 that copies.

        ``out`` is what becomes of ones.
        """
        if len(x.shape) != 3:
            raise WrongTime(
                f"model cannot be written as NIR: {path} pads in another way than with channels of zeros, a sample of "
                f"shape {x.shape}"
            )
        channels = x.shape[0]
        same_elsewhere = x.tensor.dim() == out.dim() and x.shape[1:] == tuple(out.shape[x.lead + 1 :])
        copied, added = out.narrow(x.lead, 0, channels), out.narrow(x.lead, channels, out.shape[x.lead] - channels)
        if not same_elsewhere or added.numel() == 0 or not (copied == 1).all() or added.any():
            raise ValueError(f"model cannot be written as NIR: {path} pads in another way than with channels of zeros")
        weight = np.eye(out.shape[x.lead], channels, dtype=_array(x.tensor[:0]).dtype)[:, :, None, None]
        bias = np.zeros(len(weight), weight.dtype)
        return self.add(path, self.nir.Conv2d(x.shape[1:], weight, 1, 0, 1, 1, bias), x, out)

    def linear(self, module: nn.Linear, path: str, x: Value) -> Value:
        self.expect(module, path, x, 1)
        out = module(x.tensor)  # first, as hooks may compute its weight
        weight, bias = _array(module.weight), _array(module.bias)
        node = self.nir.Linear(weight) if bias is None else self.nir.Affine(weight, bias)
        return self.add(path, node, x, out)

    def batch_norm(self, module: Any, path: str, x: Value) -> Value:
        """Batch norm with its running statistics, folded into the layer before it where that feeds nothing else."""
        if x.lead != (2 if getattr(module, "step_mode", "s") == "m" else 1):
            raise WrongTime(
                f"sample must have the time dimension that the model takes: {path} ({type(module).__name__}) got "
                f"{tuple(x.tensor.shape)}"
            )
        if module.running_mean is None:
            raise ValueError(f"model cannot be written as NIR: {path} has no running statistics to fold")
        variance = module.running_var.double()
        scale = (variance + module.eps).rsqrt()
        if module.weight is not None:
            scale = scale * module.weight.double()
        shift = -module.running_mean.double() * scale
        if module.bias is not None:
            shift = shift + module.bias.double()
        scale, shift = _array(scale), _array(shift)
        out = module(x.tensor)
        before = self.nodes.get(x.sources[0]) if len(x.sources) == 1 and not x.shared else None
        n = self.nir
        if isinstance(before, (n.Conv1d, n.Conv2d, n.Linear, n.Affine)) and x.shape[0] == before.weight.shape[0]:
            weight, dtype = before.weight, before.weight.dtype
            bias = getattr(before, "bias", None)
            new_weight = (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(dtype)
            new_bias = (shift if bias is None else bias * scale + shift).astype(dtype)
            if isinstance(before, n.Linear):
                affine = n.Affine(new_weight, new_bias)
                affine.input_type, affine.output_type = before.input_type, before.output_type
                self.nodes[x.sources[0]] = affine
            else:
                before.weight, before.bias = new_weight, new_bias
            return replace(x, tensor=out)
        # Nothing to fold into: NIR's own form of a scale and a shift for each channel is a convolution of 1 x 1.
        dtype = _array(x.tensor[:0]).dtype
        scale, shift, channels = scale.astype(dtype), shift.astype(dtype), len(scale)
        if len(x.shape) == 1:
            node = n.Affine(np.diag(scale), shift)
        elif len(x.shape) == 2:
            node = n.Conv1d(x.shape[1], scale[:, None, None], 1, 0, 1, channels, shift)
        else:
            node = n.Conv2d(x.shape[1:], scale[:, None, None, None], 1, 0, 1, channels, shift)
        return self.add(path, node, x, out)

    def average_pool(self, module: nn.AvgPool2d, path: str, x: Value) -> Value:
        self.expect(module, path, x, 3)
        kernel, stride, padding = _pair(module.kernel_size), _pair(module.stride), _pair(module.padding)
        divisor, area = module.divisor_override, kernel[0] * kernel[1]
        if module.ceil_mode or (any(padding) and not module.count_include_pad) or divisor not in (None, 1, area):
            raise ValueError(
                f"model cannot be written as NIR: {path} pools with ceil_mode, count_include_pad=False or a "
                "divisor of its own, which NIR's pools do not have"
            )
        kind = self.nir.SumPool2d if divisor == 1 and area != 1 else self.nir.AvgPool2d
        return self.add(path, kind(np.array(kernel), np.array(stride), np.array(padding)), x, module(x.tensor))

    def adaptive_pool(self, module: nn.AdaptiveAvgPool2d, path: str, x: Value) -> Value:
        self.expect(module, path, x, 3)
        out = module(x.tensor)
        sizes = list(zip(x.shape[1:], out.shape[-2:], strict=True))
        if any(size % parts for size, parts in sizes):
            raise ValueError(
                f"model cannot be written as NIR: {path} pools {x.shape[1:]} to {tuple(out.shape[-2:])}, which "
                "does not divide evenly"
            )
        kernel = np.array([size // parts for size, parts in sizes])
        return self.add(path, self.nir.AvgPool2d(kernel, kernel.copy(), np.zeros_like(kernel)), x, out)

    def scale(self, module: Any, path: str, x: Value) -> Value:
        """What from_nir makes of a Scale, or of a neuron's resistance."""
        if module.offset is not None:
            raise ValueError(f"model cannot be written as NIR: {path} adds an offset, and NIR's Scale has none")
        factor = np.broadcast_to(_array(module.scale), x.shape).copy()
        return self.add(path, self.nir.Scale(factor), x, module(x.tensor))

    # ---- neurons ----
    def neuron(self, module: Any, path: str, x: Value) -> Value:
        T = module.timesteps
        wanted = 2 if module.step_mode == "m" and T is None else 1
        if x.lead != wanted or not x.shape:
            raise WrongTime(
                f"sample must have the time dimension that the model takes: {path} ({type(module).__name__}, step_mode="
                f"{module.step_mode!r}, timesteps={T}) got {tuple(x.tensor.shape)}"
            )
        if id(module) in self.called:
            raise ValueError(
                f"model cannot be written as NIR: the neuron at {path} is called more than once, and its calls share a "
                "state; give each place a neuron of its own"
            )
        self.called.add(id(module))
        if module.v_reset is None:
            raise ValueError(
                f"model cannot be written as NIR: {path} has a soft reset (v_reset=None), and NIR's neurons are set to "
                "v_reset at a spike and none subtracts the threshold; train it with a hard reset (v_reset=0.0)"
            )
        dtype = x.tensor.dtype

        def full(value: float) -> Any:
            return np.full(x.shape, value, np.float64)

        def threshold() -> Any:
            return full(threshold_to_write(module.v_threshold, self.conventions.comparison, dtype))

        kind, dt = type(module), self.conventions.dt
        if kind is IFNode:
            r = 1.0 / dt if self.conventions.if_r == "1/dt" else 1.0
            node = self.nir.IF(full(r), threshold(), full(module.v_reset))
        elif kind in (LIFNode, ParametricLIFNode) or is_li(module):
            tau = 1.0 / module.w.detach().sigmoid().item() if kind is ParametricLIFNode else module.tau
            r = 1.0 if module.decay_input else tau
            if is_li(module):
                node = self.nir.LI(full(tau * dt), full(r), full(module.v_reset))
            else:
                node = self.nir.LIF(full(tau * dt), full(r), full(module.v_reset), threshold(), full(module.v_reset))
            node.metadata = {"tau_steps": tau}  # (tau * dt) / dt is not always tau
        else:
            raise ValueError(
                f"model cannot be written as NIR: {kind.__name__} at {path} has equations of its own; NIR has nodes "
                "for IFNode, LIFNode, ParametricLIFNode and LI"
            )
        return self.add(path, node, x, x.tensor)  # a neuron keeps its input's shape; it need not run
