"""Classes made at run time: a module's own class with a generated ``forward``, or with time around it.

The converted module stays an instance of its class, with its children, hooks, methods and ``state_dict`` keys. Such
classes have no name to be imported by: copies and pickles remake them from their recipe.
"""

from __future__ import annotations

import functools
import importlib
import linecache
import types
from typing import Any, NamedTuple

from torch import fx, nn

__all__ = ["generated", "with_mixin"]


class _Module(NamedTuple):
    """A Python module among the globals of a generated forward: those are pickled by name."""

    name: str


class _Recipe(NamedTuple):
    original: type
    sources: tuple[str, ...] = ()  # of forward: none (the original's), one, or one for training and one for evaluation
    globals: tuple[tuple[str, Any], ...] = ()
    mixin: type | None = None


class _Remade:
    """What makes an instance of a made class copy and pickle."""

    _recipe: _Recipe

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _new, (tuple(self._recipe),), state


def _new(recipe: tuple[Any, ...]) -> Any:
    cls = _make(_Recipe(*recipe))
    return object.__new__(cls)


@functools.cache
def _make(recipe: _Recipe) -> type:
    if recipe.mixin is not None:  # its forward calls the generated one, which is a class further down
        base = _make(recipe._replace(mixin=None)) if recipe.sources else recipe.original
        bases = (recipe.mixin, base) if recipe.sources else (recipe.mixin, _Remade, base)
        return _class(recipe, bases, {})
    forwards = [_compile(source, recipe) for source in recipe.sources]
    body = {"forward": forwards[0]}
    if len(forwards) == 2:
        body = {
            "_forward_training": forwards[0],
            "_forward_evaluation": forwards[1],
            "forward": _forward_by_mode,
        }
    return _class(recipe, (_Remade, recipe.original), body)


def _class(recipe: _Recipe, bases: tuple[type, ...], body: dict[str, Any]) -> type:
    body = body | {"_recipe": recipe, "__module__": recipe.original.__module__}
    return type(f"Spiking{recipe.original.__name__}", bases, body)


def _forward_by_mode(self: Any, *args: Any, **kwargs: Any) -> Any:
    return (self._forward_training if self.training else self._forward_evaluation)(*args, **kwargs)


_made = 0


def _compile(source: str, recipe: _Recipe) -> Any:
    global _made
    _made += 1
    filename = f"<snnfast {recipe.original.__name__}.forward {_made}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # for tracebacks
    found = {k: importlib.import_module(v.name) if isinstance(v, _Module) else v for k, v in recipe.globals}
    exec(compile(source, filename, "exec"), found)
    forward: Any = found["forward"]
    forward.__qualname__ = f"Spiking{recipe.original.__name__}.forward"  # for a call that it does not take
    return forward


def generated(original: type, graphs: list[fx.Graph]) -> type:
    """``original`` with the forward of the traced ``graphs``: one, or one for training and one for evaluation."""
    sources, names = [], {}
    for graph in graphs:
        code = graph.python_code("self")
        sources.append(code.src)
        for name, value in code.globals.items():
            names[name] = _Module(value.__name__) if isinstance(value, types.ModuleType) else value
    return _make(_Recipe(original, tuple(sources), tuple(sorted(names.items(), key=lambda item: item[0]))))


def with_mixin(original: type[nn.Module], mixin: type) -> type:
    """``original`` with ``mixin`` before it."""
    recipe = getattr(original, "_recipe", None) or _Recipe(original)
    return _make(recipe._replace(mixin=mixin))
