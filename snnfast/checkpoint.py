"""Gradient checkpointing of modules with state: :func:`checkpoint`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.utils.checkpoint
from torch import nn

from .base import MemoryModule

__all__ = ["checkpoint"]


def checkpoint(module: nn.Module, *args: Any) -> Any:
    """``module(*args)`` that keeps no activations for backward but computes them again, from the same state.

    What ``torch.utils.checkpoint`` lacks for a spiking network: in the second run, neurons start from the potentials
    that they had before the first one and afterwards have those that they had after it, and batch norms do not update
    their running statistics again.

    Args:
        module: a part of a network, such as one of its stages; inputs and outputs are those of its forward. States
            of snnfast's and SpikingJelly's modules are kept.

    Raises:
        TypeError: ``module`` is not a module: a plain function would hide whose state to keep.

    Example:
        >>> import snnfast
        >>> stage = nn.Sequential(nn.Linear(3, 4), snnfast.LIFNode(step_mode="m"))
        >>> x = torch.randn(5, 2, 3, requires_grad=True)
        >>> checkpoint(stage, x).sum().backward()
        >>> x.grad.shape
        torch.Size([5, 2, 3])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    before = _state(module)
    return torch.utils.checkpoint.checkpoint(
        module,
        *args,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _Anew(lambda: _again(module, before))),
    )


class _Anew:
    """A context made anew each time that it is entered: a graph that is kept may be run through several times."""

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._make = make
        self._entered: list[contextlib.AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = self._make()
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)


_State = list[tuple[nn.Module, str, Any]]
_SETTINGS = ("timesteps", "_timesteps", "forward")  # a Distiller's longer run has its own, for one call
_ABSENT = object()


def _state(module: nn.Module) -> _State:
    found: _State = []
    for m in module.modules():
        # SpikingJelly's modules keep their states' names in `_memories`.
        names = m._memory_reset_values if isinstance(m, MemoryModule) else getattr(m, "_memories", None)
        if isinstance(names, dict):
            found += [(m, name, getattr(m, name)) for name in (*names, "v_seq") if hasattr(m, name)]
        found += [(m, name, m.__dict__.get(name, _ABSENT)) for name in _SETTINGS]
    return found


def _restore(state: _State) -> None:
    for module, name, value in state:
        if name not in _SETTINGS:
            setattr(module, name, value)
        elif value is _ABSENT:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = value


@contextlib.contextmanager
def _again(module: nn.Module, before: _State) -> Iterator[None]:
    """A second run of ``module``, which leaves no trace."""
    after = _state(module)
    norms = [m for m in module.modules() if m.training and getattr(m, "track_running_stats", False)]
    statistics = [(b, b.detach().clone()) for m in norms for b in m.buffers(recurse=False)]
    stateful = [m for m in module.modules() if getattr(m, "auto_reset", True) is False]
    _restore(before)
    for m in stateful:
        m.restored = True  # type: ignore[assignment]
    try:
        yield
    finally:
        _restore(after)
        with torch.no_grad():
            for buffer, value in statistics:
                buffer.data.copy_(value)  # past the version counter, as batch norm itself writes it
        for m in stateful:
            m.restored = False  # type: ignore[assignment]
