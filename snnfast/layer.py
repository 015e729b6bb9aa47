"""PyTorch's layers with a step mode, drop-in for SpikingJelly's ``layer``.

In step mode ``'s'`` a layer is PyTorch's own. In ``'m'`` it takes ``[T, B, *]`` and folds time into the batch, so that
one call does all time steps; channels-last input stays channels last. Constructor arguments are PyTorch's, then
``step_mode``; the names in a state_dict are PyTorch's too.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import MemoryModule, StepModule
from .network import fold_time, multi_step_forward, seq_to_ann_forward

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Dropout",
    "Dropout2d",
    "Flatten",
    "GroupNorm",
    "Linear",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
    "MultiStepContainer",
    "SeqToANNContainer",
    "StepLayer",
    "StepModeContainer",
    "Upsample",
    "VotingLayer",
]

_1D, _2D, _3D = "[T, B, C, L]", "[T, B, C, H, W]", "[T, B, C, D, H, W]"


class StepLayer(StepModule):
    """Gives the PyTorch layer that follows it in a class's bases a step mode.

    The constructor takes the layer's arguments up to ``device``, then ``step_mode``, by position or name; ``device``
    and what PyTorch has after it by name.

    Raises:
        ValueError: another step mode; in ``'m'``, an input of other dimensions than the layer takes.

    Example:
        >>> class PReLU(StepLayer, nn.PReLU, takes=["[T, B, C, *]"]): ...
        >>> PReLU(8, step_mode="m")(torch.randn(5, 2, 8, 4)).shape
        torch.Size([5, 2, 8, 4])
    """

    _layouts: ClassVar[tuple[str, ...]] = ()
    _positional: ClassVar[int] = 0

    def __init_subclass__(cls, takes: tuple[str, ...] | list[str] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if StepLayer not in cls.__bases__:  # a user's subclass of one of these layers
            if "__init__" in cls.__dict__:
                cls.__signature__ = None  # type: ignore[attr-defined]  # its own constructor's
            return
        wrapped = cls.__bases__[cls.__bases__.index(StepLayer) + 1]
        parameters = list(inspect.signature(wrapped).parameters.values())
        names = [p.name for p in parameters]
        cls._layouts = tuple(takes)
        cls._positional = names.index("device") if "device" in names else len(names)
        step_mode = inspect.Parameter("step_mode", inspect.Parameter.POSITIONAL_OR_KEYWORD, default="s", annotation=str)
        by_name = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters[cls._positional :]]
        cls.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*parameters[: cls._positional], step_mode, *by_name]
        )
        if cls.__doc__ is None:
            shape = f", ``{'`` or ``'.join(takes)}`` in ``'m'``" if takes else ""
            cls.__doc__ = f":class:`torch.nn.{wrapped.__name__}` with a step mode{shape}; see :class:`StepLayer`."

    def __init__(self, *args: Any, step_mode: str = "s", **kwargs: Any) -> None:
        if len(args) == self._positional + 1:
            *args, step_mode = args  # type: ignore[assignment]
        elif len(args) > self._positional:
            raise TypeError(
                f"{type(self).__name__} takes at most {self._positional + 1} positional arguments, got {len(args)}"
            )
        super().__init__(*args, **kwargs)
        self.step_mode = step_mode

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        forward = super().forward  # type: ignore[misc]
        if self._step_mode == "s":
            return forward(*inputs, **kwargs)
        x, *others = inputs
        if not any("*" in layout or x.dim() == layout.count(",") + 1 for layout in self._layouts):
            raise ValueError(
                f"x must be {' or '.join(self._layouts)} for {type(self).__name__} in step mode 'm', got a tensor of "
                f"shape {tuple(x.shape)}; in step mode 's' it takes one time step, without T"
            )
        # Tensors beside x, such as the indices of max unpooling, have the time dimension too.
        others = [_fold(argument) for argument in others]
        kwargs = {name: _fold(argument) for name, argument in kwargs.items()}
        return seq_to_ann_forward(x, lambda folded: forward(folded, *others, **kwargs))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, step_mode={self.step_mode}"  # type: ignore[misc]


def _fold(argument: Any) -> Any:
    return fold_time(argument) if isinstance(argument, Tensor) else argument


# fmt: off
class Conv1d(StepLayer, nn.Conv1d, takes=[_1D]): ...
class Conv2d(StepLayer, nn.Conv2d, takes=[_2D]): ...
class Conv3d(StepLayer, nn.Conv3d, takes=[_3D]): ...
class ConvTranspose1d(StepLayer, nn.ConvTranspose1d, takes=[_1D]): ...
class ConvTranspose2d(StepLayer, nn.ConvTranspose2d, takes=[_2D]): ...
class ConvTranspose3d(StepLayer, nn.ConvTranspose3d, takes=[_3D]): ...
class BatchNorm1d(StepLayer, nn.BatchNorm1d, takes=["[T, B, C]", _1D]): ...
class BatchNorm2d(StepLayer, nn.BatchNorm2d, takes=[_2D]): ...
class BatchNorm3d(StepLayer, nn.BatchNorm3d, takes=[_3D]): ...
class GroupNorm(StepLayer, nn.GroupNorm, takes=["[T, B, C, *]"]): ...
class MaxPool1d(StepLayer, nn.MaxPool1d, takes=[_1D]): ...
class MaxPool2d(StepLayer, nn.MaxPool2d, takes=[_2D]): ...
class MaxPool3d(StepLayer, nn.MaxPool3d, takes=[_3D]): ...
class AvgPool1d(StepLayer, nn.AvgPool1d, takes=[_1D]): ...
class AvgPool2d(StepLayer, nn.AvgPool2d, takes=[_2D]): ...
class AvgPool3d(StepLayer, nn.AvgPool3d, takes=[_3D]): ...
class AdaptiveAvgPool1d(StepLayer, nn.AdaptiveAvgPool1d, takes=[_1D]): ...
class AdaptiveAvgPool2d(StepLayer, nn.AdaptiveAvgPool2d, takes=[_2D]): ...
class AdaptiveAvgPool3d(StepLayer, nn.AdaptiveAvgPool3d, takes=[_3D]): ...
class MaxUnpool1d(StepLayer, nn.MaxUnpool1d, takes=[_1D]): ...
class MaxUnpool2d(StepLayer, nn.MaxUnpool2d, takes=[_2D]): ...
class MaxUnpool3d(StepLayer, nn.MaxUnpool3d, takes=[_3D]): ...
class Upsample(StepLayer, nn.Upsample, takes=["[T, B, C, *]"]): ...
class Flatten(StepLayer, nn.Flatten, takes=["[T, B, *]"]): ...
# fmt: on


class Linear(StepLayer, nn.Linear, takes=["[T, B, *, F]"]):
    """:class:`torch.nn.Linear` with a step mode; it maps the last dimension in both."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x)

    def extra_repr(self) -> str:
        return nn.Linear.extra_repr(self)


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


class Dropout(MemoryModule):
    """Dropout with one mask for all time steps, drawn at the first step in training and kept until :meth:`reset`.

    Args:
        p: probability that an element is zeroed, from 0 and below 1; the others are scaled by ``1 / (1 - p)``.
        step_mode: ``'s'`` or ``'m'``.

    Raises:
        ValueError: ``p`` out of its range.

    Example:
        >>> y = Dropout(0.5, step_mode="m")(torch.ones(3, 100))
        >>> torch.equal(y[0], y[2])
        True
    """

    mask: Tensor | None

    def __init__(self, p: float = 0.5, step_mode: str = "s") -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must be a probability from 0 and below 1, got {p!r}")
        self.p = p
        self.step_mode = step_mode
        self.register_memory("mask", None)

    def create_mask(self, x: Tensor) -> Tensor:
        """A new mask for one time step ``x`` ``[*]``."""
        return F.dropout(torch.ones_like(x), self.p, training=True)

    def _mask_for(self, x: Tensor) -> Tensor:
        mask = self.mask
        if mask is None or mask.shape != x.shape:
            mask = self.mask = self.create_mask(x.detach())
        return mask if mask.dtype == x.dtype and mask.device == x.device else mask.to(x)

    def single_step_forward(self, x: Tensor) -> Tensor:
        return x * self._mask_for(x) if self.training else x

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        return x_seq * self._mask_for(x_seq[0]) if self.training else x_seq

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Dropout2d(Dropout):
    """:class:`Dropout` of whole channels of ``[B, C, H, W]`` (``[T, B, C, H, W]`` in ``'m'``)."""

    def __init__(self, p: float = 0.2, step_mode: str = "s") -> None:
        super().__init__(p, step_mode)

    def create_mask(self, x: Tensor) -> Tensor:
        return F.dropout2d(torch.ones_like(x), self.p, training=True)


class VotingLayer(nn.Module, StepModule):
    """Averages groups of ``voting_size`` neurons: ``[B, C * voting_size]`` -> ``[B, C]`` at each time step.

    Raises:
        ValueError: another step mode.
    """

    def __init__(self, voting_size: int = 10, step_mode: str = "s") -> None:
        super().__init__()
        self.voting_size = voting_size
        self.step_mode = step_mode

    def _vote(self, x: Tensor) -> Tensor:
        return F.avg_pool1d(x.unsqueeze(1), self.voting_size, self.voting_size).squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        return self._vote(x) if self._step_mode == "s" else seq_to_ann_forward(x, self._vote)

    def extra_repr(self) -> str:
        return f"voting_size={self.voting_size}, step_mode={self.step_mode}"
