"""What the models share: the step from a finished ANN to its spiking network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .._arguments import check_steps
from ..convert.to_spiking import OPTIONS, check_arguments, to_spiking

Neuron = Callable[..., nn.Module]


def conv3x3(cin: int, cout: int, stride: int = 1) -> nn.Conv2d:
    """A 3×3 convolution that keeps the size, followed by a batch norm, so without bias."""
    return nn.Conv2d(cin, cout, 3, stride, padding=1, bias=False)


def conv1x1(cin: int, cout: int, stride: int = 1) -> nn.Conv2d:
    """A 1×1 convolution without bias."""
    return nn.Conv2d(cin, cout, 1, stride, bias=False)


_OWN = ["num_classes", "in_channels", "timesteps", "neuron", "width"]  # arguments of each model


def check_sizes(**sizes: Any) -> None:
    """Refuse numbers of channels and classes that are none.

    Raises:
        ValueError: not a whole number from 1; the message names the argument.
    """
    for name, value in sizes.items():
        check_steps(name, value)


def finish(ann: nn.Module, timesteps: int | None, neuron: Neuron | None, kwargs: dict[str, Any]) -> Any:
    """Initialise ``ann`` and, with ``timesteps``, make it spiking.

    Raises:
        ValueError: arguments for neurons, but no ``timesteps``.
        TypeError: an argument that nobody takes.
    """
    check_arguments("the model", neuron, kwargs, [*_OWN, *(o for o in OPTIONS if o not in _OWN)])
    for module in ann.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if timesteps is None:
        if neuron is not None or kwargs:
            given = ", ".join([*(["neuron"] if neuron is not None else []), *kwargs])
            raise ValueError(f"timesteps must be given with {given}: without it the model is an ANN and has no neurons")
        return ann
    return to_spiking(ann, timesteps, neuron, **{"share_weights": True, **kwargs})  # nobody else has the weights
