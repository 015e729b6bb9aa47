"""Containers that call single-step modules on a sequence; public through :mod:`snnfast.layer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import MemoryModule, StepModule
from .network import multi_step_forward, seq_to_ann_forward

__all__ = [
    "ElementWiseRecurrentContainer",
    "LinearRecurrentContainer",
    "MultiStepContainer",
    "SeqToANNContainer",
    "StepModeContainer",
]


class MultiStepContainer(nn.Sequential):
    """Single-step modules called on each time step in turn: ``[T, *]`` -> ``[T, *]``.

    Raises:
        ValueError: a module in step mode ``'m'``.
    """

    holds_single_steps = True

    def __init__(self, *modules: Any) -> None:
        super().__init__(*modules)
        _check_single_step(self)

    def forward(self, x_seq: Tensor) -> Tensor:
        return multi_step_forward(x_seq, super().forward)


class SeqToANNContainer(nn.Sequential):
    """Stateless modules called once on all time steps, folded into the batch: ``[T, B, *]`` -> ``[T, B, *]``.

    Raises:
        ValueError: a module in step mode ``'m'``.

    Example:
        >>> net = SeqToANNContainer(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> net(torch.randn(4, 2, 3, 6, 6)).shape
        torch.Size([4, 2, 8, 4, 4])
    """

    holds_single_steps = True

    def __init__(self, *modules: Any) -> None:
        super().__init__(*modules)
        _check_single_step(self)

    def forward(self, x_seq: Tensor) -> Tensor:
        return seq_to_ann_forward(x_seq, super().forward)


class StepModeContainer(nn.Sequential, StepModule):
    """Single-step modules with a step mode of their own, which their network's changes with the others'.

    Args:
        stateful: in ``'m'``, call the modules on each time step in turn; else once, time folded into the batch.
        step_mode: ``'s'`` or ``'m'``.
        modules: as for :class:`torch.nn.Sequential`.

    Raises:
        ValueError: a module in step mode ``'m'``.
    """

    holds_single_steps = True

    def __init__(self, stateful: bool, step_mode: str = "s", *modules: Any) -> None:
        super().__init__(*modules)
        self.stateful = bool(stateful)
        _check_single_step(self)
        self.step_mode = step_mode

    def __getitem__(self, idx: Any) -> Any:
        # Sequential's own would pass the modules of a slice as `stateful`.
        if isinstance(idx, slice):
            return type(self)(self.stateful, self.step_mode, *list(self)[idx])
        return super().__getitem__(idx)

    def forward(self, x: Tensor) -> Tensor:
        if self._step_mode == "s":
            return super().forward(x)
        return (multi_step_forward if self.stateful else seq_to_ann_forward)(x, super().forward)


def _check_single_step(container: nn.Sequential) -> None:
    for name, module in container.named_children():
        if getattr(module, "step_mode", "s") != "s":
            raise ValueError(
                f"modules in a {type(container).__name__} must be in step mode 's', got 'm' for {name!r}, a "
                f"{type(module).__name__}"
            )


class _RecurrentContainer(MemoryModule):
    """A single-step module that gets its own last output ``y`` with the next input."""

    holds_single_steps = True
    y: Tensor | None

    def __init__(self, sub_module: nn.Module, step_mode: str) -> None:
        super().__init__()
        self.step_mode = step_mode
        if getattr(sub_module, "step_mode", "s") != "s":
            raise ValueError(f"sub_module must be in step mode 's', got 'm', of {type(sub_module).__name__}")
        self.register_memory("y", None)

    def _last(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The last output, zero at first and when the batch has another shape."""
        return x.new_zeros(shape) if self.y is None or self.y.shape != shape else self.y


class ElementWiseRecurrentContainer(_RecurrentContainer):
    """``y = sub_module(element_wise_function(y, x))``, step by step: ``[B, *]`` (``[T, B, *]`` in ``'m'``).

    Raises:
        ValueError: ``sub_module`` in step mode ``'m'``.
    """

    def __init__(self, sub_module: nn.Module, element_wise_function: Any, step_mode: str = "s") -> None:
        super().__init__(sub_module, step_mode)
        self.sub_module = sub_module
        self.element_wise_function = element_wise_function

    def single_step_forward(self, x: Tensor) -> Tensor:
        y = self.y = self.sub_module(self.element_wise_function(self._last(x, x.shape), x))
        return y


class LinearRecurrentContainer(_RecurrentContainer):
    """``y = sub_module(rc(cat(x, y)))`` with a linear layer ``rc``, step by step: ``[B, in_features]`` (or with time).

    Raises:
        ValueError: ``sub_module`` in step mode ``'m'``.
    """

    def __init__(
        self, sub_module: nn.Module, in_features: int, out_features: int, bias: bool = True, step_mode: str = "s"
    ) -> None:
        super().__init__(sub_module, step_mode)
        self.sub_module_out_features = out_features
        self.rc = nn.Linear(in_features + out_features, in_features, bias)
        self.sub_module = sub_module

    def single_step_forward(self, x: Tensor) -> Tensor:
        last = self._last(x, (*x.shape[:-1], self.sub_module_out_features))
        y = self.y = self.sub_module(self.rc(torch.cat((x, last), dim=-1)))
        return y
