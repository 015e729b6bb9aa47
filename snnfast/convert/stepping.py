"""One neuron of a single-step model over all time steps: fused where it can be, else step by step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import base
from ..tensors import has_hooks
from .adapters.base import FinalState, Fused, adapters

__all__ = ["is_stateful", "refuse_multi_step", "refuse_wrapper", "run_over_time", "states_of", "takes_state"]


def _library(module: nn.Module) -> Any:
    return next((a for a in adapters() if a.is_stateful(module)), None)


def is_stateful(module: nn.Module) -> bool:
    """Whether ``module`` keeps or takes a state from step to step: snnfast's modules and the known libraries'."""
    return isinstance(module, base.MemoryModule) or _library(module) is not None


def states_of(module: Any) -> list[tuple[dict[str, Any], str]]:
    """Where a neuron keeps its state from step to step: dictionaries and the names in them. Norse's keep none."""
    if isinstance(module, base.MemoryModule):
        return [(module.__dict__, name) for name in module._memory_reset_values]
    memories = module.__dict__.get("_memories", {})  # SpikingJelly's; snnTorch's are buffers
    return [(memories, n) for n in memories] + [(module._buffers, n) for n in module._non_persistent_buffers_set]


def takes_state(module: nn.Module) -> bool:
    """Whether the state goes through the calls of ``module``, as Norse's does; the others keep theirs."""
    return "state" in inspect.signature(module.forward).parameters


def refuse_wrapper(model: nn.Module) -> None:
    """Raise if ``model`` is not the network itself but a wrapper of PyTorch's around it."""
    wrappers = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
    kind = type(model)
    inside = wrappers.get(kind.__name__) if kind.__module__.startswith("torch.") else None
    if inside is not None:
        raise TypeError(
            f"model must be the network itself, got it wrapped in a {kind.__name__}: give model.{inside}, and wrap or "
            "compile what comes of it"
        )


def refuse_multi_step(name: str, module: Any) -> None:
    """Raise if ``module`` has a step mode and is not in ``'s'``."""
    if getattr(module, "step_mode", "s") != "s":
        remedy = "Call functional.set_step_mode(model, 's') first, or the model itself with [T, B, ...]"
        if getattr(module, "timesteps", None) is not None:
            remedy = f"With timesteps={module.timesteps} the model runs all of them in one call: call it itself"
        raise ValueError(f"{name} is in step mode {module.step_mode!r}: unroll takes a single-step model. {remedy}")


_CALLS = ("forward", "single_step_forward", "multi_step_forward")


@functools.lru_cache(maxsize=256)
def _is_as_stepped(cls: type) -> bool:
    """Whether a class with step modes computes over time what its calls of one step do: no subclass overrides these
    alone."""
    place = {
        name: next((k for k, c in enumerate(cls.__mro__) if name in c.__dict__), len(cls.__mro__))
        for name in (*_CALLS, "single_step_functional_forward")
    }
    steps = min(place["single_step_forward"], place["single_step_functional_forward"])
    return cls.__mro__[place["forward"]].__name__ == "MemoryModule" and place["multi_step_forward"] <= steps


def run_over_time(
    module: Any, name: str, x_seq: Tensor, args: Sequence[Any], kwargs: dict[str, Any], used: set[int] | None
) -> Any:
    """What ``module`` returns for each step of ``x_seq`` ``[T, B, *]``, with time folded into the batch.

    ``args`` and ``kwargs`` are what it gets besides the input before the first step; ``used`` are the elements of a
    returned tuple that somebody takes, ``None`` for all.
    """
    if isinstance(module, base.MemoryModule):
        library = None
    else:
        library = _library(module)
        if library.is_multi_step(module):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which takes all time steps in one call already: call the model "
                "itself, in its library's layout, or use the library's neuron for one time step"
            )
    if hasattr(module, "step_mode"):
        refuse_multi_step(name, module)
        folds = getattr(module, "timesteps", None) is not None  # x_seq is not folded
        kind: Any = type(module)
        own = not _is_as_stepped(kind) or any(name in module.__dict__ for name in _CALLS)
        if not args and not kwargs and not folds and not own and not has_hooks(module):
            return module.multi_step_forward(x_seq).flatten(0, 1)
    if isinstance(module, Fused) and "forward" not in module.__dict__ and not has_hooks(module):
        found = module._unrolled(x_seq, args, kwargs, used)
        if found is not NotImplemented:
            return found
    return _stepped(module, x_seq, args, kwargs)


def _stepped(module: Any, x_seq: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The loop itself, for a neuron without a fused form."""
    goes_round = takes_state(module)
    results = []
    for x in x_seq:
        result = module(x, *args, **kwargs)
        args, kwargs = ((result[1],), {}) if goes_round else ((), {})
        results.append(result)
    if not isinstance(results[0], tuple):
        return torch.cat(results)
    if goes_round:
        return torch.cat([r[0] for r in results]), FinalState(results[-1][1])
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))
