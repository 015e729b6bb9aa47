"""Less memory for a training step: :class:`packed_spikes` keeps spikes as one bit each for the backward pass, and
:func:`chunked` (in ``chunks.py``) runs a long sequence some time steps at a time. :func:`keep_freed_memory` is for
speed: a CPU's steps use the memory of the last one again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import threading
from typing import Any

import torch
from torch import Tensor

from . import dynamics, ops
from .backends import native
from .chunks import chunked
from .fused import ops as fused_ops

__all__ = ["chunked", "keep_freed_memory", "packed_spikes"]

_LEAST = 1024  # elements: below, the bookkeeping is as large as what it saves
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element
_ONES = {t: int(torch.ones((), dtype=t, device="cpu").view(_INTS[t.itemsize])) for t in _FLOATS}  # 1.0 as its bits


class packed_spikes(contextlib.ContextDecorator):
    """Within this context autograd keeps spikes in 1 bit each, and gives the backward the very same tensors.

    A convolution or linear layer keeps its input for its weight's gradient: behind a neuron that is a tensor of zeros
    and ones in 16 to 64 bits each. Here it becomes bits when it is saved and a tensor again, of the same dtype, strides
    and values, when the backward asks for it. Gradients have the same bits as without.

    On the CPU each saved tensor is looked at: what holds 0 and one other value is packed, whatever made it (so are
    pooled, cast, concatenated or scaled spikes), and the indices of a max-pooling take as few bytes as hold them. On
    a GPU, where looking would mean waiting, spikes are those that the graph shows to come from a neuron of snnfast
    through layers that leave zeros and ones (views, casts, copies, concatenation, max-pooling), and not modified since;
    should they be something else after all, through code that autograd does not see, their layer's gradient is NaN.
    A tensor that ``repeat`` made over its first dimension, as the constant input of a converted network's first neuron,
    is kept once. Everything else is kept as it is. Only the forward needs the context, the backward may run without.

    Attributes:
        tensors: how many saved tensors were made smaller so far.
        bytes_before: their size as they were saved.
        bytes_after: their size as they are kept.

    Example:
        >>> import snnfast
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), snnfast.IFNode(step_mode="m"), torch.nn.Linear(64, 8))
        >>> with packed_spikes() as packed:
        ...     y = net(torch.randn(4, 32, 64))
        >>> y.sum().backward()
        >>> packed.bytes_before // packed.bytes_after
        32
    """

    def __init__(self) -> None:
        self.tensors = self.bytes_before = self.bytes_after = 0
        self._entered: list[Any] = []

    def __enter__(self) -> packed_spikes:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        hooks.__enter__()
        self._entered.append(hooks)
        _local.depth += 1
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)
        _local.depth -= 1

    def _pack(self, t: Tensor) -> Any:
        packed = made_smaller(t)
        if packed is None:
            return _Kept(t)
        self.tensors += 1
        self.bytes_before += t.numel() * t.element_size()
        self.bytes_after += packed.nbytes
        return packed

    def __repr__(self) -> str:
        before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
        return f"packed_spikes: {self.tensors} tensors of {before:.1f} MiB kept in {after:.1f} MiB"


class _Local(threading.local):
    """Of each thread."""

    depth = 0  # in how many of these contexts it is
    unpacked: list[_Kept] | None = None  # where `_Kept.unpack` notes itself, if anyone wants to know


_local = _Local()


def is_packing() -> bool:
    """Whether this thread is within :class:`packed_spikes`."""
    return _local.depth > 0


# ---- what is kept of a saved tensor ----
class _Kept:
    """The tensor itself. Autograd does not look for in-place changes under hooks, so this does."""

    __slots__ = ("dtype", "tensor", "version")

    def __init__(self, t: Tensor) -> None:
        self.tensor = t.detach()  # t may be an output of the node that saves it: a cycle
        self.version, self.dtype = t._version, t.dtype

    def unpack(self) -> Tensor:
        if _local.unpacked is not None:
            _local.unpacked.append(self)
        t = self.tensor
        if t._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{t.type()} {list(t.shape)} is at version {t._version}; expected version {self.version} instead "
                "(saved within snnfast.packed_spikes)"
            )
        return t.to(self.dtype)

    def narrow(self, dtype: torch.dtype) -> None:
        """Keep it as ``dtype``, which must hold its values."""
        self.tensor = self.unpack().to(dtype)
        self.version = self.tensor._version


class _Bits:
    """A tensor of 0 and one other value, as bits in the order of its memory."""

    __slots__ = ("bits", "dtype", "one", "other", "shape", "stride")

    def __init__(self, t: Tensor, bits: Tensor, one: int, other: Tensor | None) -> None:
        self.bits, self.one, self.other = bits, one, other
        self.shape, self.stride, self.dtype = t.shape, t.stride(), t.dtype

    @property
    def nbytes(self) -> int:
        return self.bits.numel()

    def unpack(self) -> Tensor:
        t = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.bits.device)
        dense = t if _layout(t) == "dense" else torch.empty(self.shape, dtype=self.dtype, device=t.device)
        if self.other is not None:
            _unpack_in_torch(self, dense)
        elif t.is_cuda:
            native.cuda_unpack_bits(self.bits, self.one, dense)
        else:
            native.unpack_bits(self.bits, self.one, dense)
        return t if dense is t else t.copy_(dense)


class _Repeated:
    """A tensor that is several times the same in memory, as a constant image that was repeated over time."""

    __slots__ = ("once", "shape", "stride", "times")

    def __init__(self, t: Tensor, times: int) -> None:
        self.once = _in_memory_order(t.detach(), t.dtype)[: t.numel() // times].clone()
        self.times, self.shape, self.stride = times, t.shape, t.stride()

    @property
    def nbytes(self) -> int:
        return self.once.numel() * self.once.element_size()

    def unpack(self) -> Tensor:
        t = torch.empty_strided(self.shape, self.stride, dtype=self.once.dtype, device=self.once.device)
        _in_memory_order(t, t.dtype).view(self.times, -1).copy_(self.once)
        return t


class _Narrowed:
    """Whole numbers in fewer bytes."""

    __slots__ = ("dtype", "tensor")

    def __init__(self, t: Tensor, dtype: torch.dtype) -> None:
        self.dtype, self.tensor = t.dtype, t.detach().to(dtype)

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def unpack(self) -> Tensor:
        return self.tensor.to(self.dtype)


def made_smaller(t: Tensor) -> Any:
    """An object with ``unpack()`` and ``nbytes`` for a tensor of spikes or of small indices, ``None`` for another."""
    if type(t) is not Tensor or t.numel() < _LEAST or t.layout is not torch.strided or (t.is_leaf and t.requires_grad):
        return None
    if t.dtype in _FLOATS and not t.is_neg() and not t._is_zerotensor():
        if t.device.type != "cpu" and t.grad_fn is not None:
            _narrow_pooling(t.grad_fn, _DEPTH)
        packed = _as_bits(t)
        return packed if packed is not None or (times := _times_repeated(t)) == 1 else _Repeated(t, times)
    return _narrowed(t) if t.dtype is torch.int64 and t.device.type == "cpu" else None


def _unpack(kept: Any) -> Tensor:
    return kept.unpack()


# ---- bits ----
def _layout(t: Tensor) -> str:
    """``'dense'``: ``t`` fills its memory, in any order of dimensions; ``'gaps'``: not all of it; or ``'overlaps'``."""
    if t.is_contiguous():
        return "dense"
    layout, end = "dense", 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 1:
            continue
        if stride < end:
            return "overlaps"
        if stride > end:
            layout = "gaps"
        end = stride * size
    return layout


def _as_bits(t: Tensor) -> _Bits | None:
    on_cpu = t.device.type == "cpu"
    if not on_cpu and not is_spikes(t):
        return None
    layout, whole = _layout(t), t.detach()
    if layout == "overlaps":  # such as an expanded tensor, which is small already
        return None
    if layout == "gaps":
        whole = whole.contiguous()
    size = (t.numel() + 63) // 64 * 8
    if native.missing(t.device) is not None:
        return _pack_in_torch(t, whole, size)
    if on_cpu:
        bits = torch.empty(size, dtype=torch.uint8, device=t.device)
        one = native.pack_bits(whole, bits)
        return None if one is None else _Bits(t, bits, one, None)
    bits = torch.zeros(size + 8, dtype=torch.uint8, device=t.device)
    native.cuda_pack_bits(whole, bits, _ONES[t.dtype])
    return _Bits(t, bits, _ONES[t.dtype], None)


def _in_memory_order(t: Tensor, dtype: torch.dtype) -> Tensor:
    """All elements of a dense tensor one after the other, as ``dtype`` of the same size."""
    order = sorted(range(t.dim()), key=lambda d: (t.stride(d), t.shape[d] == 1), reverse=True)
    return t.permute(order).view(-1).view(dtype)


def _pack_in_torch(t: Tensor, whole: Tensor, size: int) -> _Bits | None:
    """Where there are no kernels; ``other`` tells whether there are values other than 0 and 1."""
    flat = _in_memory_order(whole, _INTS[t.element_size()])
    ones = flat == _ONES[t.dtype]
    other = (~ones & (flat != 0)).any()
    if t.device.type == "cpu" and other:
        return None
    ones = torch.nn.functional.pad(ones.to(torch.uint8), (0, size * 8 - t.numel())).view(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=t.device)
    return _Bits(t, (ones << places).sum(1, dtype=torch.uint8), _ONES[t.dtype], other)


def _unpack_in_torch(kept: _Bits, to: Tensor) -> None:
    places = torch.arange(8, dtype=torch.uint8, device=to.device)
    ones = ((kept.bits.unsqueeze(1) >> places) & 1).flatten()[: to.numel()].to(kept.dtype)
    assert kept.other is not None
    _in_memory_order(to, kept.dtype).copy_(torch.where(kept.other, torch.nan, ones))


# ---- spikes, as the graph shows them ----
def _constants_of_fused(node: Any) -> Any:
    connect, *_, constants = node.call
    return (
        constants if connect in (fused_ops.Connect.NONE, fused_ops.Connect.CHARGE) else None
    )  # else spikes met something


_SPIKING: dict[Any, Any] = {  # nodes whose first output may be spikes, and the constants of their call
    ops._EagerMultiStep._backward_cls: lambda node: node.call[0],
    ops._MultiStep._backward_cls: lambda node: ops.Constants._make(node.numbers[:-1]),
    fused_ops._BatchNormMultiStep._backward_cls: _constants_of_fused,
}


def _nodes(names: str) -> frozenset[str]:
    return frozenset(f"{name}Backward{k}" for name in names.split() for k in range(2))


_COPIES = _nodes("Clone ToCopy")
_VIEWS = _COPIES | _nodes("View UnsafeView ReshapeAlias Permute Transpose T Squeeze Unsqueeze Alias")
_FAITHFUL = _VIEWS | _nodes(
    "Expand Repeat Slice Select Split SplitWithSizes Unbind Unfold Cat Stack "
    "MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D AdaptiveMaxPool3D"
)
_DEPTH = 16


def is_spikes(t: Tensor) -> bool:
    """Whether the graph shows that ``t`` holds zeros and ones: a neuron's spikes, moved about but not computed with.

    What was modified in place is none of these.
    """
    return t._version == 0 and t.grad_fn is not None and _gives_spikes(t.grad_fn, t.output_nr, _DEPTH)


def _gives_spikes(node: Any, output: int, depth: int) -> bool:
    if type(node) in _SPIKING:
        constants = _SPIKING[type(node)](node)
        return output == 0 and constants is not None and not constants.flags & dynamics.MULTI_SPIKE
    if depth == 0 or node.name() not in _FAITHFUL:
        return False
    return all(n is not None and _gives_spikes(n, k, depth - 1) for n, k in node.next_functions)


def _times_repeated(t: Tensor) -> int:
    """How many equal parts ``t`` has in memory, as the graph shows it: 1 where it shows nothing."""
    if t._version != 0 or t.storage_offset() != 0 or t.untyped_storage().nbytes() != t.numel() * t.element_size():
        return 1
    node: Any = t.grad_fn
    for _ in range(_DEPTH):
        if node is None or node.name() not in _VIEWS - _COPIES:
            break
        node = node.next_functions[0][0]
    if node is None or node.name() != "RepeatBackward0" or any(n != 1 for n in node._saved_repeats[1:]):
        return 1
    return node._saved_repeats[0] if _layout(t) == "dense" else 1


# ---- whole numbers ----
def _narrowed(t: Tensor) -> _Narrowed | None:
    least, most = (int(v) for v in torch.aminmax(t.detach()))
    if least < 0:
        return None
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if most <= torch.iinfo(dtype).max:
            return _Narrowed(t, dtype)
    return None


def _narrow_pooling(node: Any, depth: int) -> None:
    """The indices of a max-pooling in 2 bytes, where that holds any index of its input; without looking at them.

    They are seen for the first time when autograd saves them, which does not tell what they are; so this is done when
    the pooled tensor is saved by the next layer.
    """
    while depth and node is not None and node.name() in _VIEWS:
        node, depth = node.next_functions[0][0], depth - 1
    if node is None or node.name() not in ("MaxPool2DWithIndicesBackward0", "MaxPool3DWithIndicesBackward0"):
        return
    _local.unpacked = []
    try:
        indices = node._saved_result1
        found = _local.unpacked
    except RuntimeError:  # the graph is gone already
        return
    finally:
        _local.unpacked = None
    kernel, dilation = node._saved_kernel_size, node._saved_dilation
    stride = node._saved_stride or kernel
    size = 1  # the most elements that the pooled planes of the input can have
    for out, k, s, d in zip(indices.shape[-len(kernel) :], kernel, stride, dilation, strict=True):
        size *= out * s + d * (k - 1)
    if len(found) == 1 and found[0].tensor.dtype is torch.int64 and size <= torch.iinfo(torch.int16).max:
        found[0].narrow(torch.int16)


# ---- the allocator ----
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST = 2**31 - 1, 32 << 20  # bytes; older versions of glibc take no more than the latter


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed CPU tensors for the next ones, as PyTorch does on a GPU.

    A training step frees at its end what the next one needs. glibc's malloc, PyTorch's allocator on Linux, returns
    much of it to the system, which hands it out again page by page, each filled with zeros: that is a tenth and more of
    a step of a spiking ResNet-18 on a CPU (docs/memory.md). After this call the process keeps it: it does not shrink
    between steps, and where the sizes of tensors vary from step to step its peak may grow. The call holds for the whole
    process and cannot be taken back; calling it again does nothing. ``snnfast-train`` makes it when it trains on a CPU.

    Returns:
        Whether it took effect: ``False`` where malloc is not glibc's. jemalloc and tcmalloc keep memory by themselves.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    others = ("jemalloc", "tcmalloc", "mimalloc")
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ.get("LD_PRELOAD", "") for name in others):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MOST)
    return bool(mallopt(_M_TRIM_THRESHOLD, _MOST[0])) and kept
