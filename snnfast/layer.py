"""PyTorch's layers with a step mode, drop-in for SpikingJelly's ``layer``.

In step mode ``'s'`` a layer is PyTorch's own. In ``'m'`` it takes ``[T, B, *]`` and folds time into the batch, so that
one call does all time steps; channels-last input stays channels last. Constructor arguments are PyTorch's, then
``step_mode``; the names in a state_dict are PyTorch's too.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import pooling
from ._arguments import without
from .base import MemoryModule, StepModule
from .container import (
    ElementWiseRecurrentContainer,
    LinearRecurrentContainer,
    MultiStepContainer,
    SeqToANNContainer,
    StepModeContainer,
)
from .network import fold_time, seq_to_ann_forward, unfold_time

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
    "ElementWiseRecurrentContainer",
    "Flatten",
    "GroupNorm",
    "Linear",
    "LinearRecurrentContainer",
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
    "TemporalEffectiveBatchNorm1d",
    "TemporalEffectiveBatchNorm2d",
    "TemporalEffectiveBatchNorm3d",
    "ThresholdDependentBatchNorm1d",
    "ThresholdDependentBatchNorm2d",
    "ThresholdDependentBatchNorm3d",
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
    _dimensions: ClassVar[frozenset[int]] = frozenset()  # of an input in 'm'; empty for any
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
        if not any("*" in layout for layout in takes):
            cls._dimensions = frozenset(layout.count(",") + 1 for layout in takes)
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
        x = inputs[0] if inputs else kwargs["input"]
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor for {type(self).__name__}, got {type(x).__name__}")
        if self._dimensions and x.dim() not in self._dimensions:
            raise ValueError(
                f"x must be {' or '.join(self._layouts)} for {type(self).__name__} in step mode 'm', got a tensor of "
                f"shape {tuple(x.shape)}; in step mode 's' it takes one time step, without T"
            )
        # Tensors beside x, such as the indices of max unpooling, have the time dimension too.
        folded = [fold_time(argument) if isinstance(argument, Tensor) else argument for argument in inputs]
        if kwargs:
            kwargs = {name: fold_time(v) if isinstance(v, Tensor) else v for name, v in kwargs.items()}
        return unfold_time(forward(*folded, **kwargs), x.shape[0], x.shape[1])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, step_mode={self.step_mode}"  # type: ignore[misc]


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
class MaxPool2d(StepLayer, pooling.MaxPool2d, takes=[_2D]): ...
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
# fmt: on


class Flatten(StepLayer, nn.Flatten, takes=["[T, B, *]"]):
    """:class:`torch.nn.Flatten` with a step mode, ``[T, B, *]`` in ``'m'``; see :class:`StepLayer`."""

    def forward(self, input: Tensor) -> Tensor:
        if self._step_mode == "s" or self.start_dim < 1 or not isinstance(input, Tensor):
            return super().forward(input)
        # Not by way of [T * B, *], which torch.export can flatten for some sizes only.
        return input.flatten(self.start_dim + 1, self.end_dim + (self.end_dim >= 0))


class Linear(StepLayer, nn.Linear, takes=["[T, B, *, F]"]):
    """:class:`torch.nn.Linear` with a step mode; it maps the last dimension in both."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x)

    def extra_repr(self) -> str:
        return nn.Linear.extra_repr(self)


class _MultiStepBatchNorm(_BatchNorm, StepModule):
    """Batch norm over batch and time, in multi-step mode only."""

    _step_mode = "m"
    _dimensions: ClassVar[tuple[int, ...]] = ()

    def __init_subclass__(cls, dimensions: tuple[int, ...] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if dimensions:
            cls._dimensions, cls.__doc__ = dimensions, cls.__bases__[0].__doc__

    def supported_step_mode(self) -> tuple[str, ...]:
        return ("m",)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() + 1 not in self._dimensions:
            raise ValueError(
                f"x_seq must have {' or '.join(map(str, self._dimensions))} dimensions for {type(self).__name__}, "
                f"[T, B, C, *], got {input.dim() + 1}"
            )

    def forward(self, x_seq: Tensor) -> Tensor:
        return seq_to_ann_forward(x_seq, super().forward)


class _ThresholdDependent(_MultiStepBatchNorm):
    """Batch norm whose scale starts at ``alpha * v_th`` (tdBN), so that its output fits the threshold.

    From Zheng et al., "Going Deeper With Directly-Trained Larger Spiking Neural Networks", AAAI 2021. The arguments
    after ``v_th`` are those of :class:`torch.nn.BatchNorm2d`; input ``[T, B, C, *]``.
    """

    def __init__(self, alpha: float, v_th: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.affine:
            raise ValueError(f"affine must be True for {type(self).__name__}, whose scale is alpha * v_th, got False")
        self.alpha, self.v_th = alpha, v_th
        nn.init.constant_(self.weight, alpha * v_th)


class _TemporalEffective(_MultiStepBatchNorm):
    """Batch norm and after it a learnable scale for each of ``T`` time steps (TEBN).

    From Duan et al., "Temporal Effective Batch Normalization in Spiking Neural Networks", NeurIPS 2022. The arguments
    after ``T`` are those of :class:`torch.nn.BatchNorm2d`; input ``[T, B, C, *]``.
    """

    def __init__(self, T: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.ones(T))

    def forward(self, x_seq: Tensor) -> Tensor:
        return super().forward(x_seq) * self.scale.view(-1, *[1] * (x_seq.dim() - 1))


# fmt: off
class ThresholdDependentBatchNorm1d(_ThresholdDependent, dimensions=(3, 4)): ...
class ThresholdDependentBatchNorm2d(_ThresholdDependent, dimensions=(5,)): ...
class ThresholdDependentBatchNorm3d(_ThresholdDependent, dimensions=(6,)): ...
class TemporalEffectiveBatchNorm1d(_TemporalEffective, dimensions=(3, 4)): ...
class TemporalEffectiveBatchNorm2d(_TemporalEffective, dimensions=(5,)): ...
class TemporalEffectiveBatchNorm3d(_TemporalEffective, dimensions=(6,)): ...
# fmt: on


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


if not TYPE_CHECKING:  # to a type checker, what is not there is an error
    __getattr__ = without(__name__)
