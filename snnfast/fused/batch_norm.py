"""Batch norm and neuron run as one: :class:`BatchNormNode`, and when that is possible."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import layer
from ..backends.native_batch_norm import Running, move
from ..neuron import BaseNode, IFNode, LIFNode, ParametricLIFNode
from ..surrogate import is_fused, recognise
from ..tensors import has_hooks, is_plain
from . import kernels
from .ops import Connect, batch_norm_multi_step, connected

__all__ = ["BatchNormNode"]

FUSED_NEURONS = (IFNode, LIFNode, ParametricLIFNode)
PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # [N, C, *], time folded into N
STEP_NORMS = (layer.BatchNorm1d, layer.BatchNorm2d, layer.BatchNorm3d)  # the same, or [T, B, C, *] in step mode 'm'
TIME_NORMS = (
    layer.ThresholdDependentBatchNorm1d,
    layer.ThresholdDependentBatchNorm2d,
    layer.ThresholdDependentBatchNorm3d,
)  # [T, B, C, *]
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# ---- what can be fused ----
def misfit(norm: Any, neuron: Any) -> str | None:
    """Why these two modules, whatever their input, cannot run as one; ``None`` if they can."""
    if isinstance(norm, nn.SyncBatchNorm):
        return "SyncBatchNorm takes its statistics over several processes"
    if type(norm) not in PLAIN_NORMS + TIME_NORMS and not _has_step_mode(norm):
        return f"{type(norm).__name__} is not one of the batch norms that are known here"
    if type(neuron) not in FUSED_NEURONS:
        return f"{type(neuron).__name__} is not one of {', '.join(n.__name__ for n in FUSED_NEURONS)}"
    if _layout(norm, neuron) is None:
        return (
            f"the norm's step mode is {getattr(norm, 'step_mode', 's (time folded into the batch)')} and the neuron's "
            f"is {neuron.step_mode}, with timesteps={neuron.timesteps}; functional.set_step_mode sets both"
        )
    if neuron.store_v_seq:
        return "the neuron keeps its potentials (store_v_seq)"
    if neuron.backend == "reference":
        return f"the neuron asks for backend={neuron.backend!r}"
    if not is_fused(recognise(neuron.surrogate_function)):
        return "the neuron's surrogate has no kernel"
    for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if t is not None and t.dtype not in _DTYPES:
            return f"the norm's parameters are {t.dtype}"
    return None


def _has_step_mode(norm: Any) -> bool:
    """One of our batch norms with a step mode, or of SpikingJelly's, which do the same."""
    kind = type(norm)
    theirs = kind.__module__.startswith("spikingjelly.activation_based.layer")
    return kind in STEP_NORMS or (theirs and kind.__name__ in {k.__name__ for k in STEP_NORMS})


def _layout(norm: Any, neuron: Any) -> str | None:
    """``'folded'`` ``[T * B, C, *]``, ``'sequence'`` ``[T, B, C, *]``, ``'step'`` ``[B, C, *]``; ``None``: no match."""
    over_time = type(norm) in TIME_NORMS or (_has_step_mode(norm) and norm.step_mode == "m")
    if over_time:
        return "sequence" if neuron.step_mode == "m" and neuron.timesteps is None else None
    if neuron.step_mode == "s":
        return "step"
    return "folded" if neuron.timesteps is not None else None


def _sequence(norm: Any, neuron: Any, x: Any, per_step: bool) -> Tensor | None:
    """``x`` as ``[T, B, C, *]`` where the kernels can take it; ``None``: the modules run one after the other."""
    if not isinstance(x, Tensor) or x.device.type not in kernels.DEVICES or x.dtype not in _DTYPES or not x.numel():
        return None
    if misfit(norm, neuron) is not None or torch._C._are_functorch_transforms_active():
        return None
    if not (torch.compiler.is_compiling() or is_plain(x)):
        return None
    if x.layout is not torch.strided or not kernels.serves(neuron.backend, x.device):
        return None
    layout = _layout(norm, neuron)
    if layout == "sequence":
        x_seq = x if x.dim() > 2 and x.dim() - 1 in _dimensions(norm) else None
    elif x.dim() not in _dimensions(norm):
        return None
    elif layout == "step":
        x_seq = x.unsqueeze(0)
    else:
        x_seq = None if x.shape[0] % neuron.timesteps else x.unflatten(0, (neuron.timesteps, -1))
    if x_seq is None or x_seq.shape[2] != norm.num_features or not _has_statistics(norm):
        return None
    each = x_seq.numel() // (norm.num_features * (x_seq.shape[0] if per_step else 1))
    if each <= 1 and _takes_batch_statistics(norm):
        return None  # torch has the error for one element
    return _as_torchs(x_seq)


def _as_torchs(x_seq: Tensor) -> Tensor:
    """In one of the two layouts of torch's norms: a transposed input comes out of them contiguous."""
    if x_seq.is_contiguous():
        return x_seq
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    step, last = x_seq[0], formats.get(x_seq.dim() - 1)
    kept = step.is_contiguous() or (last is not None and step.is_contiguous(memory_format=last))
    return x_seq if kept else x_seq.contiguous()


def _has_statistics(norm: Any) -> bool:
    """Whether both running statistics are there as they should be, or none is; torch has the errors for the rest."""
    mean, var, shape = norm.running_mean, norm.running_var, (norm.num_features,)
    return mean is var is None or (mean is not None and var is not None and mean.shape == var.shape == shape)


def _matches(skip: Any, x: Tensor) -> bool:
    """Whether the kernels take this residual connection beside ``x``."""
    if not isinstance(skip, Tensor):
        return False
    if (skip.shape, skip.dtype, skip.device, skip.layout) != (x.shape, x.dtype, x.device, x.layout):
        return False
    return torch.compiler.is_compiling() or is_plain(skip)


def _dimensions(norm: nn.Module) -> tuple[int, ...]:
    """Of an input with the norm's time folded into the batch."""
    if isinstance(norm, (nn.BatchNorm2d, layer.ThresholdDependentBatchNorm2d)):
        return (4,)
    return (5,) if isinstance(norm, (nn.BatchNorm3d, layer.ThresholdDependentBatchNorm3d)) else (2, 3)


# ---- running ----
def _takes_batch_statistics(norm: Any) -> bool:
    return norm.training or norm.running_mean is None or norm.running_var is None


def _momentum(norm: Any, batches: int) -> float:
    """By how much the running statistics move at each of so many batches, which are counted here; as in torch."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(batches)
    if norm.momentum is not None:
        return norm.momentum
    return 0.0 if norm.num_batches_tracked is None else 1.0 / float(norm.num_batches_tracked)


def _running(norm: Any, x_seq: Tensor, groups: int) -> Running | None:
    """The running statistics where the kernels can move them; ``None``: :func:`_move_running` does, afterwards."""
    mean, var = norm.running_mean, norm.running_var
    if not is_plain(x_seq) or mean.dtype != var.dtype or (norm.momentum is None and groups > 1):
        return None
    for t in (mean, var):
        usable = is_plain(t) and t.device == x_seq.device and t.is_contiguous()
        if not usable or t.is_inference() or t.requires_grad:
            return None
    torch.autograd.graph.increment_version(mean)
    torch.autograd.graph.increment_version(var)
    return Running(mean, var, _momentum(norm, groups))


def _move_running(norm: Any, mean: Tensor, var: Tensor, count: int) -> None:
    """Once for each group ``[G, C]``; ``count`` elements are behind each mean."""
    with torch.no_grad():
        for group in zip(mean.split(1), var.split(1), strict=True):
            move(Running(norm.running_mean, norm.running_var, _momentum(norm, 1)), *group, count)


def run(
    norm: Any,
    neuron: Any,
    x: Tensor,
    per_step: bool = False,
    skip: Any = None,
    connect: Connect = Connect.NONE,
) -> Tensor:
    """``neuron(norm(x))`` and ``skip``, in one where possible, else by the modules' own forwards, hooks aside."""
    x_seq = _sequence(norm, neuron, x, per_step)
    if x_seq is None or not (skip is None or _matches(skip, x)):
        y = _normalised(norm, neuron, x, per_step)
        s = type(neuron).forward(neuron, y + skip if connect == Connect.CHARGE else y)
        return connected(s, skip, connect)
    batch_statistics = _takes_batch_statistics(norm)
    groups = x_seq.shape[0] if per_step and batch_statistics else 1
    moves = norm.training and norm.track_running_stats and norm.running_mean is not None
    running = _running(norm, x_seq, groups) if moves else None
    v0, v_init, decay = neuron._state_and_decay(x_seq)
    s, v, mean, var = batch_norm_multi_step(
        x_seq,
        None if batch_statistics else norm.running_mean,
        None if batch_statistics else norm.running_var,
        norm.weight,
        norm.bias,
        v0,
        decay,
        None if skip is None else skip.reshape(x_seq.shape),
        connect,
        eps=norm.eps,
        per_step=groups > 1,
        running=running,
        constants=neuron._constants(v_init),
    )
    neuron._leave(v)
    if moves and running is None:
        _move_running(norm, mean, var, x_seq.numel() // mean.numel())
    layout = _layout(norm, neuron)
    return s if layout == "sequence" else s.squeeze(0) if layout == "step" else s.flatten(0, 1)


def _normalised(norm: Any, neuron: Any, x: Tensor, per_step: bool) -> Tensor:
    forward = type(norm).forward
    layout = _layout(norm, neuron) if type(neuron) in FUSED_NEURONS else None
    if not per_step or layout == "step" or not _takes_batch_statistics(norm):
        return forward(norm, x)
    if layout == "sequence":
        return torch.cat([forward(norm, step) for step in x.split(1)])
    return torch.cat([forward(norm, step) for step in x.chunk(neuron.timesteps)])


class BatchNormNode(nn.Module):
    """A batch norm and the neuron behind it as one: the normalised input never goes to memory.

    Computes ``neuron(norm(x))``: spikes differ from the two modules' only where the charge is within rounding of the
    threshold, gradients by rounding. In training the convolution's output ``x`` is all that is kept for backward, where
    the two keep the normalised input too. Where no kernels can serve (another kind of device, a neuron with steps of
    its own, ``store_v_seq``, hooks on the two, SyncBatchNorm), the two modules run one after the other.

    Args:
        norm: :class:`torch.nn.BatchNorm2d` (``1d``, ``3d``), whose input has time folded into the batch,
            ``[T * B, C, *]``; or one of :mod:`snnfast.layer` in step mode ``'m'``, ``[T, B, C, *]``.
        neuron: a :class:`~snnfast.IFNode`, :class:`~snnfast.LIFNode` or :class:`~snnfast.ParametricLIFNode`, with
            ``timesteps`` where time is folded.
        connect: where a residual connection joins, ``node(x, skip)``, in the same pass: ``'CHARGE'`` for
            ``neuron(norm(x) + skip)``; ``'ADD'`` for ``s + skip``, ``'AND'`` for ``s * skip`` and ``'IAND'`` for
            ``(1 - s) * skip``, ``s`` being the spikes (SEW, Fang et al., NeurIPS 2021).
        per_step: in training, take the statistics of each time step by itself, and update the running ones at each.

    Raises:
        TypeError: ``norm`` or ``neuron`` is not a module of that kind; ``skip`` without ``connect``, or the reverse.
        ValueError: ``connect`` is none of these.

    Example:
        >>> from snnfast import IFNode
        >>> node = BatchNormNode(nn.BatchNorm2d(3), IFNode(timesteps=4))
        >>> node(torch.randn(4 * 2, 3, 8, 8)).shape
        torch.Size([8, 3, 8, 8])
    """

    def __init__(
        self, norm: nn.Module, neuron: nn.Module, *, connect: str | None = None, per_step: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            raise TypeError(f"norm must be a batch norm such as torch.nn.BatchNorm2d, got {type(norm).__name__}")
        if not isinstance(neuron, BaseNode):
            raise TypeError(f"neuron must be a snnfast neuron such as snnfast.LIFNode, got {type(neuron).__name__}")
        self.norm = norm
        self.neuron = neuron
        self.per_step = per_step
        self.connect = _connect(connect)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if (skip is None) != (self.connect == Connect.NONE):
            got = "no skip" if skip is None else f"a skip of {type(skip).__name__}"
            raise TypeError(f"a BatchNormNode with connect={self.connect.name!r} got {got}")
        # A Distiller's longer run gives the norm a forward for one call.
        if has_hooks(self.norm) or has_hooks(self.neuron) or "forward" in self.norm.__dict__:
            if self.per_step:
                raise RuntimeError("per_step=True does not call norm and neuron by themselves: remove their hooks")
            y = self.norm(x)
            return connected(self.neuron(y + skip if self.connect == Connect.CHARGE else y), skip, self.connect)
        return run(self.norm, self.neuron, x, self.per_step, skip, self.connect)

    def extra_repr(self) -> str:
        shown = [f"connect={self.connect.name!r}"] if self.connect else []
        return ", ".join(shown + [f"per_step={self.per_step}"] * self.per_step)


def _connect(name: str | None) -> Connect:
    names = [c.name for c in Connect if c != Connect.NONE]
    if name is None:
        return Connect.NONE
    if not isinstance(name, str) or name.upper() not in names:
        raise ValueError(f"connect must be None or one of {', '.join(map(repr, names))}, got {name!r}")
    return Connect[name.upper()]
