"""Convolutions that compute with the spikes that there are: on a CPU, where few neurons fire, a fraction of the work.

A spiking convolution's input is 0 nearly everywhere, 95 % of it in an untrained ResNet-18, and a dense kernel spends as
much on each 0 as on a spike. An event-driven one lists the inputs that are not 0 and adds up the weights they meet;
so does the gradient of these weights. The gradient of the input is dense, and PyTorch's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from . import layer
from .backends import native
from .convert.adapters.base import adapters
from .tensors import apply_unwatched, in_cpu_memory

__all__ = ["EventConv2d", "EventReport", "event_driven"]

_MOST_EVENTS, _MOST_EVENTS_RARE = 0.2, 0.1  # of the input; beyond, the dense kernel is as fast
_MOST_FILLING = 1.25  # output channels, filled up to a multiple of 64, of those that there are, for the gradient
_FEWEST_CHANNELS = 16
_MOST_PLACES = 80  # of a window; the kernel's lists hold no more
_MOST_LISTS = 2**16  # places in the rows that one row of outputs reads, of which there is a list each
_MOST_COPIED, _FEW_COPIED = 4, 2**22  # numbers in the gradient's copy with a border: of those that there are, or at all


class EventConv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` that skips the inputs that are 0.

    Served are float32 inputs ``[B, C, H, W]`` on the CPU of which at most a fifth is not 0 (a tenth with strides, or
    fewer than 32 output channels), with windows of 2 to 80 places, 16 channels or more on both sides, one group, and
    padding with zeros. Every other call is :class:`torch.nn.Conv2d`'s; which it is depends on the input alone, the
    whole batch. Both add up the same products in another order, so they agree to rounding, but a 0 meets no weight
    here, not even an infinite one. The gradient of the weight skips them too, where the stride is 1 and the output
    channels fill most of a multiple of 64; an infinite input makes it NaN. Second derivatives are PyTorch's.

    Arguments and errors are those of :class:`torch.nn.Conv2d`.

    Example:
        >>> spikes = (torch.rand(8, 32, 10, 10) < 0.05).float()
        >>> EventConv2d(32, 64, 3, padding=1)(spikes).shape
        torch.Size([8, 64, 10, 10])
    """

    keeps_weights = False  # whether nobody trains them: what the kernel makes of them then serves later calls
    _kept: tuple[list[tuple[Tensor, int]], Tensor] | None = None  # aliases of them, versions, and what was made

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._is_served(input, weight, bias):
            return super()._conv_forward(input, weight, bias)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias)):
            return apply_unwatched(_EventConvolution, self, input, weight, bias)
        return self._convolve(input, weight, bias)

    def _is_served(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        fits = (
            _why_not(self) is None
            and in_cpu_memory(x)
            and x.dim() == 4
            and x.shape[1] == self.in_channels
            and x.numel() > 0
            and x.dtype is torch.float32
            and _is_plain(weight, self.out_channels, self.in_channels, *self.kernel_size)
            and (bias is None or _is_plain(bias, self.out_channels))
            and not torch.is_autocast_enabled("cpu")
            and native.missing(x.device) is None
        )
        if not fits or min(self._output_size(x)) < 1:
            return False
        rows = (self.kernel_size[0] - 1) * self.dilation[0] + 1
        if rows * (x.shape[3] + 2 * _padding(self)[1]) > _MOST_LISTS:
            return False
        rarely = self.stride != (1, 1) or self.out_channels < 32
        most = _MOST_EVENTS_RARE if rarely else _MOST_EVENTS
        return native.count_events(_dense(x)) <= most * x.numel()

    def _output_size(self, x: Tensor) -> tuple[int, ...]:
        geometry: Any = zip(x.shape[2:], self.kernel_size, self.stride, _padding(self), self.dilation, strict=True)
        return tuple((size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
                     for size, kernel, stride, pad, dilation in geometry)  # fmt: skip

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, sizes = _dense(x), self._sizes(x)
        shape, last = (x.shape[0], *sizes[4:7]), _is_channels_last(x) or _is_channels_last(weight)
        # One place an image is both, but what comes after shall not take it for channels last.
        order = torch.channels_last if last or shape[2] * shape[3] > 1 else torch.contiguous_format
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)
        native.event_convolve(sizes, x, self._packed(sizes, weight, bias), y)
        return y if last else y.contiguous()

    def _sizes(self, x: Tensor) -> Any:
        """As the kernels take them."""
        geometry = *self.kernel_size, *self.stride, *_padding(self), *self.dilation
        return *x.shape, self.out_channels, *self._output_size(x), *geometry

    def _packed(self, sizes: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        given = [t for t in (weight, bias) if t is not None]
        if self._kept is not None:
            made_of, packed = self._kept
            if len(made_of) == len(given) and all(_is_same(*was, t) for was, t in zip(made_of, given, strict=True)):
                return packed
        packed = native.pack_event_weights(sizes, _dense(weight), None if bias is None else bias.contiguous())
        # Inference tensors have no version, and optimisers may write without raising it.
        if self.keeps_weights and not any(t.is_inference() or t.requires_grad for t in given):
            self._kept = [(t.detach(), t._version) for t in given], packed
        return packed

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop("_kept", None)  # it holds the memory of the old weights
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}


class StepEventConv2d(EventConv2d, layer.Conv2d):
    """:class:`snnfast.layer.Conv2d` as :class:`EventConv2d`."""


_EVENT_DRIVEN: dict[type[nn.Conv2d], type[EventConv2d]] = {nn.Conv2d: EventConv2d, layer.Conv2d: StepEventConv2d}


@dataclass
class EventReport:
    """What :func:`event_driven` did.

    Attributes:
        event_driven: names of the convolutions that are event-driven now; the model's own is ``""``.
        left_alone: names of the others, with the reason.
    """

    event_driven: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"event-driven: {len(self.event_driven)}, left alone: {len(self.left_alone)}"]
        lines += [f"  {name or '(model)'}" for name in self.event_driven]
        lines += [f"  {name or '(model)'} left alone: {reason}" for name, reason in self.left_alone.items()]
        return "\n".join(lines)


def event_driven(model: nn.Module) -> EventReport:
    """Make the convolutions of ``model`` event-driven (:class:`EventConv2d`), in place; for training and inference.

    On a CPU a network whose neurons fire rarely runs in a fraction of the time: each call of a convolution counts the
    inputs that are not 0 and runs dense where there are too many. Parameters, ``state_dict`` and hooks stay; outputs
    and gradients change by rounding, so a spike may differ where the charge is within rounding of the threshold. On a
    GPU, under :func:`torch.compile`, and for other dtypes, the layers are what they were. There is no way back: call it
    on a copy where both are wanted.

    Args:
        model: any module, and every :class:`torch.nn.Conv2d`, :class:`snnfast.layer.Conv2d` or ``layer.Conv2d`` of
            SpikingJelly in it that can be event-driven: no other subclass, one group, padding with zeros, windows of 2
            to 80 places, 16 channels or more on both sides.

    Returns:
        An :class:`EventReport`, which prints.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> from snnfast import IFNode
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), IFNode(timesteps=4), nn.Conv2d(16, 32, 3))
        >>> print(event_driven(net))
        event-driven: 1, left alone: 1
          2
          0 left alone: it maps 3 channels to 16; both must be 16 or more
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = EventReport()
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.conv._ConvNd):
            continue
        cls = _class_for(type(module))
        reason = (
            f"{type(module).__name__} is no Conv2d of torch, snnfast or SpikingJelly"
            if cls is None
            else _why_not(module)
        )
        if cls is None or reason is not None:
            report.left_alone[name] = str(reason)
            continue
        module.__class__ = cls
        report.event_driven.append(name)
    return report


def _class_for(cls: type) -> type[EventConv2d] | None:
    if issubclass(cls, EventConv2d):
        return cls
    known: dict[Any, type[EventConv2d]] = {**_EVENT_DRIVEN}
    for adapter in adapters():
        known |= getattr(adapter, "EVENT_DRIVEN", {})
    return known.get(cls)


def _is_same(alias: Tensor, version: int, t: Tensor) -> bool:
    """Whether ``t`` has the memory of ``alias``, which keeps it from being used again, and was not written since."""
    unmoved = t.data_ptr() == alias.data_ptr() and t.stride() == alias.stride()  # weight.data may be given a view of it
    return unmoved and t._version == version and not t.requires_grad


def _padding(conv: Any) -> Any:
    """In numbers, where both sides have as many zeros; else what the convolution says."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        both = [dilation * (size - 1) for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True)]
        return conv.padding if any(n % 2 for n in both) else tuple(n // 2 for n in both)
    return conv.padding


def _why_not(conv: Any) -> str | None:
    """Why the kernel does not serve a convolution of these numbers."""
    if conv.groups != 1:
        return f"it has {conv.groups} groups"
    padding = _padding(conv)
    if conv.padding_mode != "zeros":
        return f"it pads by {conv.padding_mode}, not with zeros"
    if isinstance(padding, str):
        return f"padding={padding!r} pads its two sides unequally here"
    geometry = (conv.kernel_size, conv.stride, padding, conv.dilation)
    if not all(type(g) is tuple and len(g) == 2 and all(type(n) is int for n in g) for g in geometry):
        return f"its geometry is {geometry}: not four pairs of numbers"
    if min(*conv.kernel_size, *conv.stride, *conv.dilation) < 1 or min(padding) < 0:
        return f"its geometry is {geometry}: sizes, strides and dilations are 1 or more, padding 0 or more"
    if not 1 < conv.kernel_size[0] * conv.kernel_size[1] <= _MOST_PLACES:
        return f"its window is {conv.kernel_size}: not of 2 to {_MOST_PLACES} places"
    if min(conv.in_channels, conv.out_channels) < _FEWEST_CHANNELS:
        return f"it maps {conv.in_channels} channels to {conv.out_channels}; both must be {_FEWEST_CHANNELS} or more"
    return None


def _is_channels_last(t: Tensor) -> bool:
    """Whether PyTorch's convolution takes ``t`` for channels last, and then gives its output so."""
    return not t.is_contiguous() and suggest_memory_format(t) is torch.channels_last


def _dense(x: Tensor) -> Tensor:
    """``x`` itself where it fills its memory, channels first or last; else a copy in the order that PyTorch takes."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=suggest_memory_format(x))


def _is_plain(t: Tensor, *shape: int) -> bool:
    """Whether a parameter has the shape that the layer's numbers give it, and memory of its own kind."""
    is_float32 = type(t) in (nn.Parameter, Tensor) and t.dtype is torch.float32
    return is_float32 and t.shape == shape and in_cpu_memory(t.detach())


class _EventConvolution(torch.autograd.Function):
    """Keeps input and weight, as PyTorch's does; the gradient of the input is dense, and PyTorch's."""

    @staticmethod
    def forward(ctx: Any, conv: EventConv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.shapes = bias is not None, (x.shape, weight.shape)
        # As they are now: a convolution may be called with one dilation after the other.
        ctx.sizes, ctx.geometry = conv._sizes(x), (conv.stride, _padding(conv), conv.dilation)
        return conv._convolve(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        of_x, of_weight, of_bias = ctx.needs_input_grad[1:]
        # Not where the gradients are to be differentiated again, or where hooks gave back something else.
        by_events = (
            of_weight
            and stride == (1, 1)
            and not torch.is_grad_enabled()
            and (x.shape, weight.shape) == ctx.shapes
            and grad.dtype is x.dtype is weight.dtype is torch.float32
            and in_cpu_memory(grad)
            and in_cpu_memory(x.detach())
            and in_cpu_memory(weight.detach())
            and -(-len(weight) // 64) * 64 <= _MOST_FILLING * len(weight)
            and native.event_workspace(ctx.sizes) <= max(_MOST_COPIED * grad.numel(), _FEW_COPIED)
        )
        found = torch.ops.aten.convolution_backward(
            *(grad, x, weight, [len(weight)] if ctx.has_bias else None, stride, padding, dilation),
            *(False, (0, 0), 1, (of_x, of_weight and not by_events, of_bias)),
        )
        if not by_events:
            return None, *found
        grad_weight = torch.empty_like(_dense(weight))
        grad = grad.contiguous(memory_format=torch.channels_last)
        native.event_weight_gradient(ctx.sizes, _dense(x), grad, grad_weight)
        return None, found[0], grad_weight, found[2]
