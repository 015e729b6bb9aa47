"""What stands for a fused pair's modules in a network whose forward stays as it is.

The norm hands its input on; the neuron, or the residual connection that meets its spikes, runs both. Whatever else gets
to see a stand-in gets the tensor that it stands for, made as the modules make it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._before import tensor_to_users
from ..convert.to_spiking_layers import _start_afresh
from ..tensors import ALL_MODULES_HOOKS
from . import batch_norm
from .ops import Connect

__all__ = ["Defer", "Deferred", "NormAndNeuron", "StandIn", "is_fused"]

_TWICE = (
    "the forward of a fused model, or a hook, uses the output of a batch norm or of its neuron twice, which was not so "
    "when it was fused: call snnfast.unfuse(model), and snnfast.fuse(model) again if it stays so"
)
_CHANGED = (
    "the input of a fused batch norm, or the residual connection behind it, was changed in place before its neuron "
    "ran: change a copy, or take the fusion back with snnfast.unfuse(model)"
)


class StandIn:
    """For a tensor that need not be made if it goes where the trace saw it go."""

    __class__ = property(tensor_to_users)
    made: Tensor | None = None
    not_a_tensor = "the stand-in of a pair that snnfast.fuse made and that was torn apart since: call fuse(model) again"

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()

    def make(self) -> Tensor:
        """The tensor, in the grad mode in which the module was called."""
        raise NotImplementedError

    def met_by(self, other: Any, add: bool) -> Any:
        """The sum or the product with ``other``."""
        raise NotImplementedError

    def tensor(self) -> Tensor:
        if self.made is None:
            with torch.set_grad_enabled(self.grad):
                self.made = self.make()
        return self.made

    def untouched(self) -> bool:
        """Whether it can still be left out."""
        return self.made is None and self.grad == torch.is_grad_enabled()

    def __add__(self, other: Any) -> Any:
        return self.met_by(_plain(other), True)

    def __mul__(self, other: Any) -> Any:
        return self.met_by(_plain(other), False)

    __radd__, __rmul__ = __add__, __mul__

    def add(self, other: Any, **keywords: Any) -> Any:
        return self.tensor().add(other, **keywords) if keywords else self + other

    def mul(self, other: Any) -> Any:
        return self * other

    def __rsub__(self, other: Any) -> Any:
        return other - self.tensor()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SUMS + _PRODUCTS and len(args) == 2 and not kwargs:
            stand_in, other = args if isinstance(args[0], StandIn) else (args[1], args[0])
            return stand_in.met_by(_plain(other), func in _SUMS)
        return func(*(_plain(a) for a in args), **{k: _plain(a) for k, a in (kwargs or {}).items()})


_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_plain(v) for v in value])
    return value.tensor() if isinstance(value, StandIn) else value


def _operator(name: str) -> Any:
    def run(self: StandIn, *others: Any) -> Any:
        return getattr(self.tensor(), name)(*(_plain(o) for o in others))

    return run


for _name in (
    *("sub", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow", "matmul", "rmatmul", "neg"),
    *("abs", "lt", "le", "gt", "ge", "eq", "ne", "and", "rand", "or", "ror", "xor", "rxor", "invert"),
    *("getitem", "setitem", "len", "iter", "float", "int", "bool"),
):
    setattr(StandIn, f"__{_name}__", _operator(f"__{_name}__"))


class Deferred(StandIn):
    """What a fused norm gives its neuron: its own input, and a residual connection that joins before the charge."""

    def __init__(self, norm: nn.Module, x: Any) -> None:
        super().__init__()
        self.norm, self.x, self.skip = norm, x, None
        self.versions = [(x, _version(x))]
        self.ran = False

    def make(self) -> Tensor:
        self._once()
        y = type(self.norm).forward(self.norm, self.x)
        return y if self.skip is None else y + self.skip

    def met_by(self, other: Any, add: bool) -> Any:
        if not add or self.skip is not None or not self.untouched():
            return self.tensor() + other if add else self.tensor() * other
        self.skip = other
        self.versions.append((other, _version(other)))
        return self

    def run(self, neuron: nn.Module, skip: Any, connect: Connect) -> Any:
        self._once()
        return batch_norm.run(self.norm, neuron, self.x, skip=skip, connect=connect)

    def _once(self) -> None:
        if self.ran:
            raise RuntimeError(_TWICE)
        self.ran = True
        if any(_version(t) != version for t, version in self.versions):
            raise RuntimeError(_CHANGED)


class _Spikes(StandIn):
    """What a fused neuron gives where a residual connection meets its spikes; ``opposite``: 1 - s of those spikes."""

    def __init__(
        self, deferred: Deferred, neuron: nn.Module, connect: Connect, opposite: _Spikes | None = None
    ) -> None:
        super().__init__()
        self.deferred, self.neuron, self.connect, self.opposite = deferred, neuron, connect, opposite

    def make(self) -> Tensor:
        if self.opposite is not None:
            return 1 - self.opposite.tensor()
        return self.deferred.run(self.neuron, None, Connect.NONE)

    def met_by(self, other: Any, add: bool) -> Any:
        as_traced = add == (self.connect == Connect.ADD) and (self.opposite is None) == (self.connect != Connect.IAND)
        if as_traced and self.untouched() and (self.opposite is None or self.opposite.untouched()):
            return self.deferred.run(self.neuron, other, self.connect)
        return self.tensor() + other if add else self.tensor() * other

    def __rsub__(self, other: Any) -> Any:
        if self.connect == Connect.IAND and self.opposite is None and isinstance(other, (int, float)) and other == 1:
            return _Spikes(self.deferred, self.neuron, self.connect, self)
        return super().__rsub__(other)


def _version(x: Any) -> int | None:
    """Counts changes in place, where that is counted."""
    if not isinstance(x, Tensor) or torch.compiler.is_compiling() or x.is_inference():
        return None
    return x._version


def _is_seen(norm: nn.Module, neuron: nn.Module) -> bool:
    """Whether hooks look at what goes from one to the other, or at its gradient: they want tensors."""
    return (
        any(ALL_MODULES_HOOKS)
        or bool(norm._forward_hooks or norm._backward_hooks or norm._backward_pre_hooks)
        or bool(neuron._backward_hooks or neuron._backward_pre_hooks)
        or any(hook is not _start_afresh for hook in neuron._forward_pre_hooks.values())
    )


class Defer:
    """Stands for a fused norm's forward."""

    def __init__(self, norm: nn.Module, neuron: nn.Module) -> None:
        self.norm = norm
        self.neuron = neuron

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        given = *args, *keywords.values()  # torch's norms name it input, SpikingJelly's x
        if len(given) != 1:
            return type(self.norm).forward(self.norm, *args, **keywords)  # which has the error
        deferred = Deferred(self.norm, _plain(given[0]))
        return deferred.tensor() if _is_seen(self.norm, self.neuron) else deferred


class NormAndNeuron:
    """Stands for a fused neuron's forward."""

    def __init__(self, neuron: nn.Module, connect: Connect) -> None:
        self.neuron = neuron
        self.connect = connect

    def __call__(self, x: Any) -> Any:
        if not isinstance(x, Deferred) or not x.untouched():
            return type(self.neuron).forward(self.neuron, _plain(x))
        if x.skip is not None:
            return x.run(self.neuron, x.skip, Connect.CHARGE)
        if self.connect in (Connect.NONE, Connect.CHARGE) or self.neuron._forward_hooks:  # which want the spikes
            return x.run(self.neuron, None, Connect.NONE)
        return _Spikes(x, self.neuron, self.connect)


def is_fused(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), (Defer, NormAndNeuron))
