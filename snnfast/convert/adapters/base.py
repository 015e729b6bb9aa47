"""What every adapter shares: the fused subclass of a peer's neuron, how it is made, copied and pickled.

A converted neuron is the same object with another class: a subclass, made here, of the class it had, with an adapter's
:class:`Fused` mixin in front. Parameters, buffers, hooks and outside references therefore stay what they were, and
whatever the mixin does not override is the peer's own code. A call that the kernels cannot serve exactly (another dtype
than the adapter names, a sparse tensor, a state of an odd shape) runs the peer's own ``forward``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# library: the module that holds its neurons; an adapter is consulted only where that is loaded already
LIBRARIES = {
    "spikingjelly": "spikingjelly.activation_based.neuron",
    "snntorch": "snntorch",
    "norse": "norse.torch",
    "sinabs": "sinabs.layers",
}


class Fused:
    """Mixin in front of a peer's neuron class.

    A plan is what a neuron's configuration means to the kernels, worked out once: :meth:`plan` makes it from the module
    or returns the reason why there is none. Setting any attribute other than ``state_names`` drops it.
    """

    peer: ClassVar[type[nn.Module]]  # the class of the library that the mixin stands for
    state_names: ClassVar[frozenset[str]] = frozenset()  # set on every call: no change of configuration
    methods: ClassVar[tuple[str, ...]] = ("forward",)  # a subclass that overrides one of these is not converted
    snnfast_replaced: ClassVar[type[nn.Module]]  # the class that the object had

    @staticmethod
    def plan(module: Any) -> Any:
        raise NotImplementedError

    def _plan(self) -> Any:
        found = self.__dict__.get("_snnfast_plan")
        if found is None or (type(found) is not str and found.stale(self)):
            patched = [m for m in self.methods if m in self.__dict__ and m != "forward"]
            found = f"{' and '.join(patched)} was set on the object" if patched else self.plan(self)
            self.__dict__["_snnfast_plan"] = found
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.state_names:
            self.__dict__.pop("_snnfast_plan", None)
        super().__setattr__(name, value)

    def _unrolled(self, x_seq: Tensor, args: Any, kwargs: Any, used: set[int] | None) -> Any:
        return NotImplemented

    def __repr__(self) -> str:
        plan = self.__dict__.get("_snnfast_plan")  # none is made here: it may need values that a meta tensor lacks
        how = f"not accelerated now: {plan}" if isinstance(plan, str) else "accelerated by snnfast"
        return f"{super().__repr__()} [{how}]"  # behind what some libraries write themselves

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop("_snnfast_plan", None)
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        if "snnfast_replaced" not in type(self).__dict__:  # a class made from the fused one, which knows how
            return reduced
        _, _, state, *rest = reduced
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name != "_snnfast_plan"}
        return _new, (self.snnfast_replaced, _mixin_of(type(self))), state, *rest


class FinalState:
    """A state after the last step, which there is no sequence of."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __getattr__(self, name: str) -> Any:
        raise ValueError(
            f"forward uses {name} of a state that Norse's neuron returned: unroll has that state after the last step "
            "only. Return the state as it is"
        )


class Plan:
    """Keyword arguments of :func:`snnfast.functional.multi_step`, and the tensors whose values went into them."""

    def __init__(
        self, neuron: Any, watched: tuple[Tensor, ...] = (), names: tuple[str, ...] = (), **keywords: Any
    ) -> None:
        """``names`` are those of ``watched`` in the module, where it holds them itself."""
        self.neuron = neuron
        self.keywords = keywords
        self.watched = [(t, t._version) for t in watched]
        self.names = list(names)
        self.calls: dict[float, Any] = {}  # onestep's, and the next one
        self.prepared: tuple[Any, Any, Any] | None = None
        self.own: tuple[Any, tuple[Tensor, ...]] | None = None  # parameters that are not learnt, and their source

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a neuron plans anew. :meth:`Fused.__reduce_ex__` is not asked where a parametrized neuron is
        copied."""

    def watch(self, names: tuple[str, ...], tensors: Iterable[Tensor]) -> None:
        """More tensors whose values are read, by their names in the module."""
        self.names += names
        self.watched += [(t, t._version) for t in tensors]

    def stale(self, module: Any) -> bool:
        """Whether a tensor whose value was read has been written or exchanged since."""
        for t, version in self.watched:  # on every call: any() takes three times as long
            if t._version != version:
                return True
        if self.names:
            # torch.func.functional_call exchanges them without setting an attribute.
            buffers, parameters = module._buffers, module._parameters
            for name, (t, _) in zip(self.names, self.watched):  # noqa: B905 (no names where the module holds none)
                found = buffers.get(name)
                if (parameters.get(name) if found is None else found) is not t:
                    return True
        return False


def _mixin_of(cls: type) -> type[Fused]:
    return cls.__mro__[1]


def replaced_by(cls: Any) -> Any:
    """The class that an object of a fused class had, or would have had: a class made from a fused one later on, as
    ``torch.nn.utils.parametrize`` does, is made again from the one below."""
    if "snnfast_replaced" in cls.__dict__:
        return cls.snnfast_replaced
    bases = tuple(replaced_by(b) if issubclass(b, Fused) else b for b in cls.__bases__)
    body = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, body)


_classes: dict[tuple[type, type], Any] = {}


def fused_class(replaced: Any, mixin: Any) -> Any:
    """The fused subclass of a peer's class, one per class."""
    if (replaced, mixin) not in _classes:
        body = {"snnfast_replaced": replaced, "__module__": replaced.__module__, "__doc__": replaced.__doc__}
        _classes[replaced, mixin] = type(replaced.__name__, (mixin, replaced), body)
    return _classes[replaced, mixin]


def _new(replaced: Any, mixin: Any) -> Any:
    """An empty neuron of the fused class: how copies and pickles are rebuilt."""
    cls = fused_class(replaced, mixin)
    return cls.__new__(cls)


def adapters() -> list[ModuleType]:
    """The adapters of the libraries that are loaded."""
    return [
        importlib.import_module(f"{__package__}.{name}") for name, holds in LIBRARIES.items() if holds in sys.modules
    ]


def find(module: nn.Module) -> tuple[type[Fused] | None, str]:
    """The mixin for ``module``; or ``None`` and why not, which is empty if it is no neuron of a known library."""
    if isinstance(module, Fused):
        return None, "converted already"
    for adapter in adapters():
        if not adapter.is_neuron(module):
            continue
        cls = type(module)
        mixin = next((adapter.FUSED[c] for c in cls.__mro__ if c in adapter.FUSED), None)
        if mixin is None:
            return None, f"no fused neuron computes {cls.__name__}"
        changed = [m for m in mixin.methods if getattr(cls, m) is not getattr(mixin.peer, m)]
        changed += [m for m in mixin.methods if m in module.__dict__ and m not in changed]
        if changed:
            return None, f"{cls.__name__} overrides {' and '.join(changed)} of {mixin.peer.__name__}"
        plan = mixin.plan(module)
        return (None, plan) if isinstance(plan, str) else (mixin, "")
    return None, ""


def number(t: Any) -> float | None:
    """The value of a number or of a tensor of one element without a gradient; ``None`` for anything else."""
    if isinstance(t, Tensor):
        return float(t) if t.numel() == 1 and not (isinstance(t, nn.Parameter) or t.requires_grad) else None
    return float(t) if isinstance(t, (int, float)) else None


def of_this_step(state: Any, x: Tensor, shape: torch.Size) -> bool:
    """Whether ``state`` has an element for each of a step of ``shape``, in ``x``'s dtype and on its device."""
    return type(state) is Tensor and state.shape == shape and state.dtype == x.dtype and state.device == x.device


def broadcasts(own: Iterable[Tensor], step: torch.Size) -> bool:
    """Whether each parameter broadcasts to a time step of shape ``step``; one that has more elements or dimensions
    makes the libraries' potentials as large as itself."""
    for t in own:
        if t.dim():
            shape = t.shape
            if len(shape) > len(step) or any(a != 1 and a != b for a, b in zip(reversed(shape), reversed(step))):  # noqa: B905
                return False
    return True


def is_version(pair: tuple[Tensor, int]) -> bool:
    """Whether a tensor was not written since its version was taken, and is still not learnt."""
    return pair[0]._version == pair[1] and not pair[0].requires_grad


def served(x: Any) -> bool:
    """Whether the kernels' arithmetic on ``x`` is the peer's: dense float32 with at least one dimension."""
    return type(x) is Tensor and x.dtype is torch.float32 and x.layout is torch.strided and x.dim() > 0
