"""What the analyses need to know about a network: which modules spike, and how to run it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..network import holds_single_steps

# Base classes of other libraries' spiking neurons, by name, so that none of them is imported.
_PEER_NEURONS = {
    "spikingjelly.activation_based": ("BaseNode",),
    "snntorch": ("SpikingNeuron",),
    "norse.torch.module": ("SNN", "SNNCell"),
    "sinabs": ("StatefulLayer",),
}


def is_spiking(module: nn.Module) -> bool:
    """Whether ``module`` is a spiking neuron of snnfast, SpikingJelly, snnTorch, Norse or sinabs."""
    if hasattr(module, "v_threshold") and callable(getattr(module, "reset", None)):
        return True
    return any(
        base.__name__ in names and base.__module__.startswith(package)
        for base in type(module).__mro__
        for package, names in _PEER_NEURONS.items()
    )


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
