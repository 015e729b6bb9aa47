"""What the analyses need to know about a network: which modules spike, and how to run it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..network import holds_single_steps

_Classes = dict[str, tuple[str, ...]]

# Base classes of other libraries' spiking neurons, by name, so that none of them is imported.
_PEER_NEURONS: _Classes = {
    "spikingjelly.activation_based": ("BaseNode",),
    "snntorch": ("SpikingNeuron",),
    "norse.torch.module": ("SNN", "SNNCell", "SNNRecurrent", "SNNRecurrentCell"),
    "sinabs": ("StatefulLayer",),
}
# Of those, the ones that give their potential.
_PEER_INTEGRATORS: _Classes = {"norse.torch.module": ("LI", "LICell", "LIBoxCell"), "sinabs": ("ExpLeak",)}
_TIME_FIRST: _Classes = {"norse.torch.module": ("SNN", "SNNRecurrent")}
_BATCH_FIRST: _Classes = {"sinabs": ("StatefulLayer",)}


def _is_of(module: nn.Module, classes: _Classes) -> bool:
    return any(
        base.__name__ in names and base.__module__.startswith(package)
        for base in type(module).__mro__
        for package, names in classes.items()
    )


def is_spiking(module: nn.Module) -> bool:
    """Whether ``module`` is a spiking neuron of snnfast, SpikingJelly, snnTorch, Norse or sinabs."""
    if hasattr(module, "v_threshold") and callable(getattr(module, "reset", None)):
        return True
    return _is_of(module, _PEER_NEURONS) and not _is_of(module, _PEER_INTEGRATORS)


def steps_and_samples(neuron: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """How many time steps of how many samples a spiking neuron sees in an input of ``shape``."""
    first, second = (*shape, 1, 1)[:2]
    timesteps: Any = getattr(neuron, "timesteps", None)
    if timesteps:
        return timesteps, first // timesteps
    if getattr(neuron, "step_mode", "s") == "m" or _is_of(neuron, _TIME_FIRST):
        return first, second
    if not _is_of(neuron, _BATCH_FIRST):
        return 1, first
    samples: Any = getattr(neuron, "batch_size", None)
    if samples is None:
        return second, first
    if samples < 0:  # sinabs' for the one that is not given
        samples = first // neuron.num_timesteps  # type: ignore[operator]
    return first // max(samples, 1), samples


def spiking_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The spiking neurons of ``model`` by their paths."""
    return {name or "network": module for name, module in model.named_modules() if is_spiking(module)}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of ``model`` in eval mode; afterwards each is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def is_single_step(model: nn.Module) -> bool:
    """Whether ``model`` takes one time step a call: all its spiking neurons are in single-step mode.

    What is in a container that calls its children step by step is in the mode of the container.
    """
    modes = set()
    modules = [model]
    while modules:
        module = modules.pop()
        if holds_single_steps(module):
            modes.add(getattr(module, "step_mode", "m"))
            continue
        if is_spiking(module):
            modes.add(getattr(module, "step_mode", None))
        modules.extend(module.children())
    return modes == {"s"}


def runs_again() -> bool:
    """Whether a backward runs a part of the network again, as checkpoints do, what was seen the first time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def run_steps(model: nn.Module, x: Tensor, forward: Callable[[nn.Module, Tensor], Any] | None) -> None:
    """Run ``model`` on all time steps of ``x``, in as many calls as it takes."""
    if forward is not None:
        forward(model, x)
    elif is_single_step(model):
        for x_t in x:
            model(x_t)
    else:
        model(x)
