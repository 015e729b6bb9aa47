"""Batch norm and neuron in one by Triton: for GPUs that have no native build.

``statistics``, ``forward`` and ``backward`` are those of :mod:`snnfast.backends.native_batch_norm`. What is computed
per channel is computed by torch, between the launches of the kernels in ``triton_batch_norm_kernels.py``. Sums are made
of one float64 partial sum per chunk of rows, added by torch in an order that the shape decides.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dynamics import Constants, state_dtype
from . import triton as backend
from .native_batch_norm import NormCall, Running, move

_MOST_CHUNKS = 1024
_LONGEST_UNROLLED, _CHUNK = 16, 8  # steps; shorter than the neuron's alone, for there is more to hold
_LARGEST = 2**31 - 1


@functools.cache
def kernels() -> Any:
    """The module of the kernels; as the neurons' own, not imported before it is needed."""
    from . import triton_batch_norm_kernels

    return triton_batch_norm_kernels


class _Shape(NamedTuple):
    """``x`` ``[T, B, C, *]`` as ``[T, rows, period]`` in memory, and blocks of ``BR`` rows and ``BC`` columns.

    ``FOLD`` tells that a block's columns are one channel's.
    """

    T: int
    rows: int
    channels: int
    inner: int
    BR: int
    BC: int
    FOLD: bool

    @property
    def period(self) -> int:
        return self.channels * self.inner

    @property
    def tiles(self) -> int:
        return -(-self.period // self.BC)

    def each(self, rows: int, groups: int = 1) -> int:
        """Rows of a chunk, whole blocks of them, so that there are enough chunks and not too many."""
        blocks = -(-rows // self.BR)
        return -(-blocks * self.tiles * groups // _MOST_CHUNKS) * self.BR

    def add_up(self, partial: Tensor) -> Tensor:
        """``[..., C, 2]`` from ``[..., chunks, pieces, 2]``."""
        return partial.unflatten(-2, (self.channels, -1)).sum((-4, -2))

    @property
    def pieces(self) -> int:
        """Partial sums of a chunk."""
        return self.tiles if self.FOLD else self.period


def _shape(x: Tensor, block: int) -> _Shape:
    T, channels = x.shape[0], x.shape[2]
    N = x.numel() // T
    inner = x.stride(2) if channels > 1 else N
    if channels == 1 and inner > _LARGEST:  # any division into rows will do
        inner = math.gcd(N, 1 << 20)
    return _Shape(T, N // (channels * inner), channels, inner, *_block(channels * inner, inner, block))


@functools.lru_cache(maxsize=4096)
def _block(period: int, inner: int, block: int) -> tuple[int, int, bool]:
    columns = math.gcd(inner, min(256, block))
    if columns >= 32:
        return block // columns, columns, True
    columns = min(128, block, 1 << (period - 1).bit_length())
    return block // columns, columns, columns == 1


def _block_size(T: int, dtype: torch.dtype) -> int:
    """Neurons per block: what the backward holds of each in registers must not spill."""
    block = 512 if T <= 4 else 256 if T <= 8 else 128
    return block // 2 if state_dtype(dtype) == torch.float64 else block


# ---- vectors per channel ----
def statistics(
    x: Tensor,
    # outputs
    mean: Tensor,
    var: Tensor,
    running: Running | None = None,
) -> None:
    """``mean`` and biased ``var`` ``[G, C]`` in float64."""
    first = x[: mean.shape[0], 0]
    while first.dim() > 2:
        first = first[..., 0]
    first = first.double().contiguous()
    sums = torch.empty((*mean.shape, 2), dtype=torch.float64, device=x.device)
    batch_norm_statistics(x, first, sums)
    away, square = (sums / (x.numel() // max(mean.numel(), 1))).unbind(-1)
    mean.copy_(first + away)
    var.copy_((square - away * away).clamp_(min=0))
    if running is not None:
        move(running, mean, var, x.numel() // mean.numel())


def _scale_and_shift(call: NormCall) -> tuple[Tensor, Tensor]:
    """``[G, C]`` each in float64, ``scale`` with a value of the state's dtype.

    ``shift`` is made from the rounded scale, so that a large mean does not magnify that rounding.
    """
    scale = (call.var + call.eps).rsqrt()
    if call.weight is not None:
        scale = scale * call.weight
    scale = scale.to(state_dtype(call.x.dtype)).double()
    shift = call.mean * scale
    return scale, shift.neg() if call.bias is None else call.bias - shift


def forward(
    call: NormCall,
    # outputs
    s: Tensor,
    v: Tensor,
) -> None:
    """What comes out, ``s``, and the final potentials."""
    scale, shift = (t.to(v.dtype) for t in _scale_and_shift(call))
    batch_norm_forward(call.constants, call.x, call.v0, call.decay, scale, shift, call.skip, call.connect, s, v)


def backward(
    call: NormCall,
    batch_statistics: bool,
    grad_s: Tensor | None,
    grad_v: Tensor | None,
    # outputs
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_v0: Tensor | None,
    grad_decay: Tensor | None,
    grad_skip: Tensor | None,
) -> None:
    """All gradients; ``batch_statistics`` tells whether they go through mean and variance too."""
    x, mean, dtype = call.x, call.mean, state_dtype(call.x.dtype)
    scale, shift = _scale_and_shift(call)
    scales, shifts, centres = (t.to(dtype) for t in (scale, shift, mean))
    sums = torch.empty((*mean.shape, 2), dtype=torch.float64, device=x.device)
    whole = batch_statistics or len(mean) > 1  # grad_x takes more than a factor, or each step a factor of its own
    found = batch_norm_backward(
        call.constants, grad_s, grad_v, x, call.v0, call.decay, scales, shifts, centres, not whole, call.skip,
        call.connect, grad_x, grad_v0, sums, grad_skip,
    )  # fmt: skip
    if grad_decay is not None:
        grad_decay.copy_(torch.as_tensor(found))
    rstd = (call.var + call.eps).rsqrt()
    sum_g, sum_gx = sums.unbind(-1)
    offcentre = mean - centres  # what rounding the mean left
    sum_gx = sum_gx - offcentre * sum_g
    grad_weight.copy_((sum_gx * rstd).sum(0))
    grad_bias.copy_(sum_g.sum(0))
    if whole:
        count = x.numel() // max(mean.numel(), 1) if batch_statistics else math.inf
        slope = scale * rstd * rstd * sum_gx / -count
        offset = scale * sum_g / -count - slope * offcentre
        batch_norm_backward_input(x, scales, centres, slope.to(dtype), offset.to(dtype), grad_x)


# ---- passes ----
def batch_norm_statistics(x: Tensor, first: Tensor, sums: Tensor) -> None:
    """``sums`` ``[G, C, 2]`` of ``x - first`` and its square over each channel, ``G`` being 1 or ``T``."""
    _sums(x, first, None, sums)


def _sums(x: Tensor, minus: Tensor, grad: Tensor | None, sums: Tensor) -> None:
    """``sums`` ``[G, C, 2]`` of ``x - minus`` and its square, or of ``grad`` and ``grad * (x - minus)``."""
    shape, groups = _shape(x, 1024), minus.shape[0]
    rows = shape.T // groups * shape.rows
    each = shape.each(rows, groups)
    chunks = -(-rows // each)
    partial = torch.empty((groups, chunks, shape.pieces, 2), dtype=torch.float64, device=x.device)
    with backend._on(x.device):
        kernels().sums_kernel[(groups * chunks * shape.tiles,)](
            *(x, minus, grad, partial, rows, shape.period, shape.inner, shape.channels, shape.tiles, chunks, each),
            FOLD=shape.FOLD,
            BR=shape.BR,
            BC=shape.BC,
            **backend._OPTIONS,
        )
    sums.copy_(shape.add_up(partial))


def _plan(
    c: Constants, x: Tensor, shape: _Shape, groups: int, connect: int
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any], int]:
    """As that of the neuron alone, with what else these kernels are compiled for."""
    numbers, *both, _ = backend._plan(c, shape.T, x.dtype, 0)
    chunks = 0 if shape.T <= _LONGEST_UNROLLED else (shape.T - 1) // _CHUNK
    own = {"CHUNK": _CHUNK if chunks else 0, "REST": shape.T - chunks * _CHUNK}
    own |= {"CONNECT": int(connect), "GROUPS": groups > 1, "BR": shape.BR, "BC": shape.BC}
    forward, backward = ({k: v for k, v in (given | own).items() if k not in ("EACH", "BLOCK")} for given in both)
    return numbers, forward, backward, chunks


def batch_norm_forward(
    constants: Constants,
    x: Tensor,
    v0: Tensor | None,
    decay: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    skip: Tensor | None,
    connect: int,
    # outputs
    s: Tensor,
    v: Tensor,
) -> None:
    """Spikes ``s`` and final potentials of the normalised ``x * scale + shift``, and of ``skip`` (Connect)."""
    shape = _shape(x, _block_size(x.shape[0], x.dtype))
    numbers, compile_time, _, chunks = _plan(constants, x, shape, scale.shape[0], connect)
    with backend._on(x.device):
        kernels().forward_kernel[(-(-shape.rows // shape.BR) * shape.tiles,)](
            *(x, scale, shift, v0, decay, skip, s, v),
            *(shape.rows, shape.period, shape.inner, shape.channels, shape.tiles, chunks),
            *numbers[:6],
            **compile_time,
        )


def batch_norm_backward(
    constants: Constants,
    grad_s: Tensor | None,
    grad_v: Tensor | None,
    x: Tensor,
    v0: Tensor | None,
    decay: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    centre: Tensor,
    scaled: bool,
    skip: Tensor | None,
    connect: int,
    # outputs
    grad_x: Tensor,
    grad_v0: Tensor | None,
    sums: Tensor,
    grad_skip: Tensor | None,
) -> Tensor | float:
    """The gradient ``g`` of the normalised input and its ``sums`` ``[G, C, 2]``, of ``g`` and of ``g * (x - centre)``.

    ``grad_x`` becomes ``g`` for :func:`batch_norm_backward_input`, or ``scaled`` (with one group only) the gradient of
    ``x``.
    Returns the gradient of ``decay``.
    """
    groups = scale.shape[0]
    shape = _shape(x, _block_size(x.shape[0], x.dtype))
    numbers, _, compile_time, chunks = _plan(constants, x, shape, groups, connect)
    each = shape.each(shape.rows)
    down = -(-shape.rows // each)
    partial = None
    if groups == 1:
        partial = torch.empty((1, down, shape.pieces, 2), dtype=torch.float64, device=x.device)
    decays = None if decay is None else torch.empty(down * shape.tiles, dtype=torch.float64, device=x.device)
    state = state_dtype(x.dtype)
    states = torch.empty((chunks, shape.rows * shape.period), dtype=state, device=x.device) if chunks else None
    with backend._on(x.device):
        kernels().backward_kernel[(down * shape.tiles,)](
            *(grad_s, grad_v, x, scale, shift, centre, v0, decay, skip),
            *(grad_x, grad_v0, grad_skip, partial, decays, states),
            *(shape.rows, shape.period, shape.inner, shape.channels, shape.tiles, each, chunks),
            *numbers,
            SCALED=scaled,
            FOLD=shape.FOLD,
            **compile_time,
        )
    if partial is None:  # each step has sums of its own
        _sums(x, centre, grad_x, sums)
    else:
        sums.copy_(shape.add_up(partial))
    return 0.0 if decays is None else decays.sum()


def batch_norm_backward_input(
    x: Tensor, scale: Tensor, centre: Tensor, slope: Tensor, offset: Tensor, grad_x: Tensor
) -> None:
    """Turn ``g`` in ``grad_x`` into ``g * scale + (x - centre) * slope + offset``."""
    shape = _shape(x, 1024)
    steps_down = -(-shape.rows // shape.BR)
    with backend._on(x.device):
        kernels().backward_input_kernel[(shape.T * steps_down * shape.tiles,)](
            *(x, scale, centre, slope, offset, grad_x),
            *(shape.rows, shape.period, shape.inner, shape.channels, shape.tiles, steps_down),
            GROUPS=scale.shape[0] > 1,
            BR=shape.BR,
            BC=shape.BC,
            **backend._OPTIONS,
        )
