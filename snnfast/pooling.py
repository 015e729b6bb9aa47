"""Max-pooling of 2x2 windows side by side on the CPU, with the results of PyTorch's in less time and memory.

A spiking network pools after every stage. PyTorch's kernel is scalar where channels come first, and keeps its input and
an int64 index for each output until the backward; this one keeps a byte for each output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import native
from .tensors import apply_unwatched, in_cpu_memory

__all__ = ["PYTORCHS", "MaxPool2d", "max_pool2d", "with_fast_pooling"]

PYTORCHS = (F.max_pool2d, torch.max_pool2d)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """:func:`torch.nn.functional.max_pool2d`, bit for bit.

    ``[B, C, H, W]`` or ``[C, H, W]`` in float32, bfloat16, float16 or float64 on the CPU with windows of 2 and a stride
    of 2, and nothing else asked for, is served by a kernel of its own, forward and backward; a second derivative, and
    any other call, by PyTorch. NaNs come out where PyTorch's do, with the bits that they had.

    Raises:
        RuntimeError: what PyTorch does not take, with its message.

    Example:
        >>> max_pool2d(torch.tensor([[[1.0, 2.0], [4.0, 3.0]]]), 2)
        tensor([[[4.]]])
    """
    if _is_served(input) and _is_halving(kernel_size, stride, padding, dilation, ceil_mode, return_indices):
        if torch.is_grad_enabled() and input.requires_grad:
            return apply_unwatched(_MaxPool2d, input)
        return _pool(input, False)[0]
    options: dict[str, Any] = {"ceil_mode": ceil_mode, "return_indices": return_indices}
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, **options)


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` by :func:`max_pool2d`."""

    def forward(self, input: Tensor) -> Any:
        return max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


def with_fast_pooling(net: nn.Module) -> None:
    """Make PyTorch's max-pooling layers within ``net`` :class:`MaxPool2d`, in place; subclasses stay what they are."""
    for module in net.modules():
        if type(module) is nn.MaxPool2d:
            module.__class__ = MaxPool2d


# ---- what is served ----
def _is_halving(
    kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, return_indices: bool
) -> bool:
    stride_fits = stride is None or _are(2, stride)
    if ceil_mode or return_indices or not stride_fits:
        return False
    return _are(2, kernel_size) and _are(0, padding) and _are(1, dilation)


def _are(number: int, sizes: Any) -> bool:
    """Whether ``sizes``, an int or one for each dimension, is ``number``."""
    if type(sizes) is int:  # the usual call, in less time
        return sizes == number
    return type(sizes) in (tuple, list) and len(sizes) == 2 and all(type(s) is int and s == number for s in sizes)


def _is_served(x: Tensor) -> bool:
    if not in_cpu_memory(x) or x.dtype not in _DTYPES or x.dim() not in (3, 4) or native.missing(x.device) is not None:
        return False
    return x.shape[-2] > 1 and x.shape[-1] > 1 and x.numel() > 0


# ---- the kernels' calls ----
def _is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch gives the result of ``x`` channels last: it reads that off strides, gaps or not."""
    if x.dim() == 3:
        return False
    (_, c, h, w), (sn, sc, sh, sw) = x.shape, x.stride()
    return sc > 0 and sw >= sc * c and sh >= sw * w and sn >= sh * h


def _dims(shape: torch.Size, channels_last: bool) -> tuple[int, int, int, int]:
    *batch, c, h, w = shape
    n = batch[0] if batch else 1
    return (n, h, w, c) if channels_last else (n * c, h, w, 1)


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _pool(x: Tensor, keeps: bool) -> tuple[Tensor, Tensor | None]:
    """The maxima, and which of a window's elements, 0 to 3 in the order of rows, each of them is."""
    last = _is_channels_last(x)
    layout = _format(last)
    x = x.contiguous(memory_format=layout)
    shape = (*x.shape[:-2], x.shape[-2] // 2, x.shape[-1] // 2)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    chosen = torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=layout) if keeps else None
    native.max_pool(_dims(x.shape, last), x, y, chosen)
    return y, chosen


def _unpool(grad: Tensor, chosen: Tensor, shape: torch.Size, last: bool) -> Tensor:
    """The gradient of an input of ``shape``."""
    layout = _format(last)
    if chosen.dtype is not torch.uint8 or chosen.shape != grad.shape or not in_cpu_memory(chosen):
        raise RuntimeError(
            "saved_tensors_hooks must give back what autograd saved, a tensor of torch.uint8 and "
            f"{tuple(grad.shape)} on cpu; got {chosen.dtype} and {tuple(chosen.shape)} on {chosen.device}"
        )
    grad, chosen = (t.contiguous(memory_format=layout) for t in (grad, chosen))
    grad_x = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    native.max_pool_backward(_dims(shape, last), grad, chosen, grad_x)
    return grad_x


def _unpool_in_torch(grad: Tensor, chosen: Tensor, shape: torch.Size, last: bool) -> Tensor:
    """The same by PyTorch's own backward, which can be differentiated."""
    h, w = shape[-2:]
    rows = torch.arange(h // 2, device=chosen.device).unsqueeze(1) * 2 + chosen // 2
    columns = torch.arange(w // 2, device=chosen.device) * 2 + chosen % 2
    x = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=_format(last))  # for its layout alone
    return torch.ops.aten.max_pool2d_with_indices_backward(
        grad, x, (2, 2), (2, 2), (0, 0), (1, 1), False, rows * w + columns
    )


class _MaxPool2d(torch.autograd.Function):
    """Keeps which elements were chosen, and neither input nor output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, chosen = _pool(x, True)
        ctx.save_for_backward(chosen)
        ctx.of = x.shape, _is_channels_last(x)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        (chosen,) = ctx.saved_tensors
        shape, last = ctx.of
        if torch.is_grad_enabled() or not in_cpu_memory(grad):  # create_graph, or vmap over gradients
            return _unpool_in_torch(grad, chosen, shape, last)
        return _unpool(grad, chosen, shape, last)
