"""What modules held before a forward of theirs was traced, which counts its calls and keeps the proxies it runs on."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["COLLECTIONS", "MODULES_OWN", "Before", "is_same"]

COLLECTIONS = (list, dict, set, collections.deque)
MODULES_OWN = frozenset(vars(nn.Module())) - {"training", "_buffers"}


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

    def written(self) -> tuple[nn.Module, str, str] | None:
        """The first number, flag or tensor of a module that is another one now: module, kind and name.

        Nobody knows what other attributes mean.
        """
        attributes = [
            (m, name, v, m.__dict__.get(name)) for m, held in self.attributes.items() for name, v in held.items()
        ]
        inside = [
            (m, name, v, held.get(k))
            for m, name, held, items in self.contents
            if isinstance(items, dict)
            for k, v in items.items()
        ]
        for m, name, was, now in (*attributes, *inside):
            if isinstance(was, (bool, int, float, str)) and name != "training" and not is_same(now, was):
                return m, "attribute", name
        for m, kind, held, name, _, value in self.tensors:
            if not is_same(held.get(name), value):
                return m, kind, name
        return None

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


def is_same(a: Any, b: Any) -> bool:
    """Whether two tensors have the same values, NaN included, or two other things are equal."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b or (type(a) is type(b) and a == b)
    if (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, b.layout):
        return False
    if a is b or type(a) is not Tensor or a.is_meta or a.is_quantized or a.layout is not torch.strided:
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all())
