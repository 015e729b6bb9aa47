"""What stands for a fused pair's modules in a network whose forward stays as it is.

The norm hands its input on; the neuron, or the residual connection that meets its spikes, runs both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import batch_norm
from .ops import Connect

__all__ = ["Defer", "Deferred", "NormAndNeuron", "is_fused"]


class _StandIn:
    """For a tensor that is made when its residual connection is there: the trace has shown that they meet, and that
    nothing else sees the stand-in. Whatever else gets it fails."""

    def met_by(self, other: Any, add: bool) -> Any:
        """The sum or the product with ``other``."""
        raise NotImplementedError

    def __add__(self, other: Any) -> Any:
        return self.met_by(other, True)

    def __mul__(self, other: Any) -> Any:
        return self.met_by(other, False)

    __radd__ = add = __add__
    __rmul__ = mul = __mul__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _SUMS + _PRODUCTS or len(args) != 2 or kwargs:
            return NotImplemented
        stand_in, other = args if isinstance(args[0], cls) else (args[1], args[0])
        return stand_in.met_by(other, func in _SUMS)


_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_OTHERWISE = (
    "the forward of a fused model runs otherwise than when it was fused: snnfast.unfuse(model) and fuse it again, or "
    "leave it so"
)


class Deferred(_StandIn):
    """What a fused norm gives its neuron: its own input, and a residual connection that joins before the charge."""

    def __init__(self, norm: nn.Module, x: Any, skip: Any = None) -> None:
        self.norm, self.x, self.skip = norm, x, skip
        self.version = _version(x)

    def met_by(self, other: Any, add: bool) -> Any:
        if not add or self.skip is not None:
            raise RuntimeError(_OTHERWISE)
        return Deferred(self.norm, self.x, other)

    def run(self, neuron: nn.Module, skip: Any, connect: Connect) -> Any:
        if self.version != _version(self.x):
            raise RuntimeError(
                "the input of a fused batch norm was changed in place before its neuron ran: change a copy, or take "
                "the fusion back with snnfast.unfuse(model)"
            )
        if (self.skip is not None) != (connect == Connect.CHARGE):
            raise RuntimeError(_OTHERWISE)
        return batch_norm.run(self.norm, neuron, self.x, skip=skip, connect=connect)


class _Spikes(_StandIn):
    """What a fused neuron gives where a residual connection meets its spikes."""

    def __init__(self, deferred: Deferred, neuron: nn.Module, connect: Connect) -> None:
        self.deferred, self.neuron, self.connect = deferred, neuron, connect
        self.inverted = self.met = False

    def met_by(self, other: Any, add: bool) -> Any:
        if add != (self.connect == Connect.ADD) or self.inverted != (self.connect == Connect.IAND) or self.met:
            raise RuntimeError(_OTHERWISE)
        self.met = True
        return self.deferred.run(self.neuron, other, self.connect)

    def __rsub__(self, one: Any) -> Any:
        self.inverted = True
        return self


def _version(x: Any) -> int | None:
    """Counts changes in place, where that is counted."""
    if not isinstance(x, Tensor) or torch.compiler.is_compiling() or x.is_inference():
        return None
    return x._version


class Defer:
    """Stands for a fused norm's forward."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, x: Any) -> Deferred:
        return Deferred(self.norm, x)


class NormAndNeuron:
    """Stands for a fused neuron's forward."""

    def __init__(self, neuron: nn.Module, connect: Connect) -> None:
        self.neuron = neuron
        self.connect = connect

    def __call__(self, x: Any) -> Any:
        if not isinstance(x, Deferred):
            return type(self.neuron).forward(self.neuron, x)
        if self.connect in (Connect.NONE, Connect.CHARGE):
            return x.run(self.neuron, x.skip, self.connect)
        return _Spikes(x, self.neuron, self.connect)


def is_fused(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), (Defer, NormAndNeuron))
