"""What passes through named layers: hooks for the time of one call, and the ways in which time may lie in a tensor."""

from __future__ import annotations

import contextlib
import difflib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..fused.pair import StandIn

Calls = dict[str, list[Tensor]]  # what a layer put out, one tensor for each call of it


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of ``model`` by its dotted path; those of a compiled model by the paths of the model inside."""
    inside = getattr(model, "_orig_mod", model)
    return {name: module for name, module in inside.named_modules(remove_duplicate=False) if name}


def check_paths(argument: str, model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse a path that ``model`` does not have.

    Raises:
        ValueError: the message lists the nearest paths that exist.
    """
    names = list(named_layers(model))
    for path in paths:
        if path not in names:
            near = difflib.get_close_matches(str(path), names, n=5, cutoff=0.3) or names[:5]
            listed = ", ".join(map(repr, near)) or "none: it has no layers"
            raise ValueError(f"{argument} has no layer {path!r}; the nearest are {listed}")


@contextlib.contextmanager
def recorded(model: nn.Module, paths: Iterable[str]) -> Iterator[Calls]:
    """Collect what the layers at ``paths`` put out while the block runs; no hook outlives it.

    Raises:
        TypeError: a layer gives something else than one tensor.
        ValueError: a later module overwrote a layer's output, or a layer was not called.
    """
    calls: Calls = {path: [] for path in paths}
    versions: list[tuple[str, Tensor, int]] = []
    handles = []

    def hook(path: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, StandIn):  # of a fused batch norm that ends a container
                output = output.tensor()
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"layer {path!r} must put out one tensor to be distilled, got {type(output).__name__}; name one "
                    "inside it"
                )
            calls[path].append(output)
            if not output.is_inference():  # which counts no changes
                versions.append((path, output, output._version))

        return record

    layers = named_layers(model) if calls else {}
    try:
        for path in calls:
            handles.append(layers[path].register_forward_hook(hook(path)))
        yield calls
    finally:
        for handle in handles:
            handle.remove()
    for path, output, version in versions:
        if output._version != version:
            raise ValueError(
                f"the output of layer {path!r} is changed in place by a later module (such as ReLU(inplace=True)); "
                "name that module instead"
            )
    for path, outputs in calls.items():
        if not outputs:
            raise ValueError(
                f"layer {path!r} was not called in the forward pass; name one that is (a model that went through "
                "torch.compile does not run hooks that come later: give the Distiller the model before it)"
            )


# ---- where time lies ----
def time_layout(what: str, calls: list[Tensor], T: int, B: int) -> str:
    """How ``T`` steps of ``B`` samples lie in what a layer put out.

    Returns:
        ``'time'`` for ``[T, B, *]``, ``'folded'`` for ``[T * B, *]``, ``'steps'`` for ``T`` calls with ``[B, *]`` each,
        ``'static'`` for ``[B, *]`` once, which stands for every step.

    Raises:
        ValueError: none fits, or more than one.
    """
    shape = tuple(calls[0].shape)
    if len(calls) > 1:
        if len(calls) == T and shape[:1] == (B,) and all(x.shape == shape for x in calls):
            return "steps"
        raise ValueError(
            f"{what} was called {len(calls)} times in one forward pass of T = {T} steps, with {shape} first; name a "
            "layer that runs once, or once in every step"
        )
    fitting = {"time": shape[:2] == (T, B), "static": shape[:1] == (B,), "folded": T > 1 and shape[:1] == (T * B,)}
    fits = [name for name, fit in fitting.items() if fit]
    if len(fits) == 1:
        return fits[0]
    expected = f"[T, B, *], [T * B, *] or [B, *] with T = {T} and B = {B}"
    if fits:
        raise ValueError(
            f"{what} of shape {shape} can be read in two ways of {expected}; give example_inputs of another number of "
            "samples"
        )
    raise ValueError(f"{what} must have the shape {expected}, got {shape}")


def unfold(what: str, calls: list[Tensor], layout: str, T: int, B: int) -> Tensor:
    """What a layer put out, as ``[T, B, *]`` (``[1, B, *]`` where it is the same in every step)."""
    x = calls[0]
    expected = {"time": (T, B), "static": (B,), "folded": (T * B,), "steps": (B,)}[layout]
    if tuple(x.shape[: len(expected)]) != expected or len(calls) != (T if layout == "steps" else 1):
        raise ValueError(
            f"{what} must come as it did for example_inputs ({layout}: {len(calls)} x {expected} + ...), "
            f"got {len(calls)} x {tuple(x.shape)} for T = {T} and B = {B}"
        )
    if layout == "steps":
        return torch.stack(calls)
    return {"time": lambda: x, "static": lambda: x.unsqueeze(0), "folded": lambda: x.unflatten(0, (T, B))}[layout]()


# ---- a run that nobody notices ----
@contextlib.contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Run ``models`` in eval mode; afterwards their states, buffers, modes and the random generators are as before."""
    modules = [module for model in models for module in model.modules()]
    buffers = [(b, b.clone()) for model in models for b in model.buffers()]
    attributes = []
    for module in modules:
        own = dict(module.__dict__)
        contents = [(v, v.copy()) for v in own.values() if isinstance(v, (dict, set, list, deque))]
        generators = [(v, v.get_state()) for v in own.values() if isinstance(v, torch.Generator)]
        attributes.append((module, own, contents, generators))
    devices = {t.device.index or 0 for m in models for t in (*m.parameters(), *m.buffers()) if t.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
        try:
            for model in models:
                model.eval()
            yield
        finally:
            for module, own, contents, generators in attributes:
                module.__dict__.clear()
                module.__dict__.update(own)
                for container, content in contents:
                    container.clear()
                    container.extend(content) if isinstance(container, (list, deque)) else container.update(content)
                for generator, state in generators:
                    generator.set_state(state)
            torch.clear_autocast_cache()  # before 2.11 PyTorch keeps weights cast without gradients for what follows
            for buffer, value in buffers:
                buffer.copy_(value)
