"""Traces of users' forwards: stand-ins that pass for tensors, and what the modules held before.

A forward that is traced counts its calls and keeps the proxies it runs on.
"""

from __future__ import annotations

import collections
import inspect
import operator
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = [
    "COLLECTIONS",
    "IN_PLACE",
    "MODULES_OWN",
    "Before",
    "Proxy",
    "TensorProxy",
    "Tracer",
    "is_same",
    "optional",
    "source",
    "tensor_to_users",
]

COLLECTIONS = (list, dict, set, collections.deque)
# With the separator: torchvision's folder begins with torch's.
_NOT_USERS = tuple(os.path.join(os.path.dirname(file), "") for file in (torch.__file__, __file__))
MODULES_OWN = frozenset(vars(nn.Module())) - {"training", "_buffers"}


IN_PLACE: dict[Any, Any] = {
    getattr(operator, f"i{name.strip('_')}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor")
}  # and what they do


class Proxy(fx.Proxy):
    """One that tells ``x += y`` from ``x = x + y``: what ``x`` was called besides is the sum as well."""


for _function in IN_PLACE:

    def _in_place(self: Proxy, other: Any, function: Any = _function) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(Proxy, f"__{_function.__name__}__", _in_place)


def tensor_to_users(stand_in: Any) -> Any:
    """The ``__class__`` of what stands for a tensor, so that ``isinstance(x, torch.Tensor)`` holds in a user's forward.

    Torch's code and ours have ways of their own for such objects.
    """
    asking = sys._getframe(1)
    if asking.f_code is torch.is_tensor.__code__ and asking.f_back is not None:
        asking = asking.f_back
    return type(stand_in) if asking.f_code.co_filename.startswith(_NOT_USERS) else Tensor


class TensorProxy(Proxy):
    """One that passes for the tensor in its place."""

    __class__ = property(tensor_to_users)


class Tracer(fx.Tracer):
    """With such stand-ins, and into modules that a forward makes.

    ``given`` has the names of the optional arguments that are stand-ins too; the others have their defaults.
    """

    refused: fx.proxy.TraceError | None = None
    given: Collection[str] | None = None  # all of them

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        forward, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        if self.given is None:
            return forward, args
        defaults = {name: default for name, default in optional(root_fn).items() if name not in self.given}
        names = inspect.unwrap(root_fn).__code__.co_varnames  # of arguments, then of other variables
        return forward, [defaults.get(name, arg) for name, arg in zip(names, args, strict=False)]

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        graph = super().trace(root, concrete_args)
        if self.refused is not None:  # a branch on a value, whose error the forward caught
            raise self.refused
        return graph

    def to_bool(self, obj: fx.Proxy) -> bool:
        try:
            return super().to_bool(obj)
        except fx.proxy.TraceError as error:
            self.refused = error
            raise

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return TensorProxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            self.path_of_module(m)
        except NameError:  # made in the forward, as nn.ReLU()(x) and a slice of a Sequential are: no place to put it
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def optional(forward: Any) -> dict[str, Any]:
    """The arguments that a call need not give, with what they are then."""
    parameters = inspect.signature(inspect.unwrap(forward)).parameters.values()
    found: dict[str, Any] = {p.name: p.default for p in parameters if p.default is not p.empty}
    found |= {p.name: () for p in parameters if p.kind is p.VAR_POSITIONAL}
    return found | {p.name: {} for p in parameters if p.kind is p.VAR_KEYWORD}


def source(graph: fx.Graph) -> str:
    """What it computes; constants that the forward made have another number at each trace."""
    return re.sub(r"\b_tensor_constant\d+", "_tensor_constant", graph.python_code("self").src)


class Before:
    """The attributes, collections and tensors of some modules; parameters aside, which a trace does not write."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.attributes = {m: dict(m.__dict__) for m in modules}
        self.contents: list[tuple[nn.Module, str, Any, Any]] = [
            (m, name, v, v.copy())
            for m, held in self.attributes.items()
            for name, v in held.items()
            if name not in MODULES_OWN and isinstance(v, COLLECTIONS)
        ]
        self.tensors = [
            (m, kind, held, name, t, t.detach().clone())
            for m in self.attributes
            for kind, held in (("attribute", m.__dict__), ("buffer", m._buffers))
            for name, t in held.items()
            if isinstance(t, Tensor)
        ]

    def written(self, but: Callable[[nn.Module], bool] = lambda m: False) -> tuple[nn.Module, str, str] | None:
        """The first number, flag or tensor of a module that is another one now: module, kind and name.

        Nobody knows what other attributes mean. ``but`` tells modules that may write.
        """
        attributes = [
            (m, name, v, m.__dict__.get(name))
            for m, held in self.attributes.items()
            if not but(m)
            for name, v in held.items()
        ]
        inside = [
            (m, name, v, held.get(k))
            for m, name, held, items in self.contents
            if isinstance(items, dict) and not but(m)
            for k, v in items.items()
        ]
        for m, name, was, now in (*attributes, *inside):
            if isinstance(was, (bool, int, float, str)) and name != "training" and not is_same(now, was):
                return m, "attribute", name
        for m, kind, held, name, _, value in self.tensors:
            if not but(m) and not is_same(held.get(name), value):
                return m, kind, name
        return None

    def kept(self) -> Iterator[tuple[nn.Module, str, fx.Proxy]]:
        """What the trace left in a module: module, name of the attribute or buffer, and the proxy."""
        for m in self.attributes:
            for name, value in (*m.__dict__.items(), *m._buffers.items()):
                if name not in MODULES_OWN and name != "_buffers":
                    yield from ((m, name, proxy) for proxy in _proxies(value))

    def put_back(self) -> None:
        """Undo what happened to them since."""
        for m, attributes in self.attributes.items():
            if _is_changed(m.__dict__, attributes):
                m.__dict__.clear()
                m.__dict__.update(attributes)
        for *_, held, items in self.contents:
            if _is_changed(held, items):
                held.clear()
                (held.update if hasattr(held, "update") else held.extend)(items)
        for *_, t, value in self.tensors:
            if not is_same(t, value):
                with torch.no_grad():
                    t.copy_(value)


def _is_changed(now: Any, before: Any) -> bool:
    a, b = ([*v, *v.values()] if isinstance(v, dict) else list(v) for v in (now, before))
    return len(a) != len(b) or any(x is not y for x, y in zip(a, b, strict=True))


def _proxies(value: Any, depth: int = 3) -> Iterator[fx.Proxy]:
    if isinstance(value, fx.Proxy):
        yield value
    elif depth > 0 and isinstance(value, (tuple, *COLLECTIONS)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from _proxies(v, depth - 1)


def is_same(a: Any, b: Any) -> bool:
    """Whether two tensors have the same values, NaN included, or two other things are equal."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b or (type(a) is type(b) and a == b)
    if (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, b.layout):
        return False
    if a is b or type(a) is not Tensor or a.is_meta or a.is_quantized or a.layout is not torch.strided:
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all())
