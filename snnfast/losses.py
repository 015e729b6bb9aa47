"""Losses on the outputs of a spiking network over time: ``[T, B, C]``, spikes or potentials, and a target.

Half-precision outputs are taken to float32 first. A sample of class -100 has no part in any of them, as in PyTorch's
cross-entropy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import check_number

__all__ = ["rate_cross_entropy", "rate_mse", "tet_loss"]

_IGNORED = -100  # the class that cross-entropy skips


def _check(out_seq: Tensor, target: Tensor) -> Tensor:
    if not isinstance(out_seq, Tensor) or out_seq.dim() != 3:
        got = tuple(out_seq.shape) if isinstance(out_seq, Tensor) else type(out_seq).__name__
        raise ValueError(f"out_seq must be [T, B, C], got {got}")
    if not out_seq.shape[0]:
        raise ValueError(f"out_seq must have at least one time step, got {tuple(out_seq.shape)}")
    if not isinstance(target, Tensor) or not (target.is_floating_point() or target.dtype in (torch.int64, torch.uint8)):
        kind = str(target.dtype).removeprefix("torch.") if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target must be a tensor of int64 classes or floating-point probabilities, got {kind}")
    if target.shape not in (out_seq.shape[1:2], out_seq.shape[1:]):
        raise ValueError(
            f"target must be classes [B] = {tuple(out_seq.shape[1:2])} or probabilities [B, C] = "
            f"{tuple(out_seq.shape[1:])}, got a tensor of shape {tuple(target.shape)}"
        )
    if target.dim() == 1 and target.is_floating_point():
        kind = str(target.dtype).removeprefix("torch.")
        raise TypeError(f"target of shape {tuple(target.shape)} must be classes, int64, got {kind}")
    return out_seq if out_seq.dtype == torch.float64 else out_seq.float()


def _check_probabilities(target: Tensor) -> None:
    if target.dim() == 2 and not target.is_floating_point():
        kind = str(target.dtype).removeprefix("torch.")
        raise TypeError(f"target of shape {tuple(target.shape)} must be probabilities, got {kind}: try target.float()")


def rate_cross_entropy(
    out_seq: Tensor, target: Tensor, *, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the outputs' mean over time, which for spikes is the firing rate.

    Args:
        out_seq: outputs ``[T, B, C]``.
        target: classes ``[B]``, int64, or probabilities ``[B, C]``.
        label_smoothing: share of the target spread evenly over all classes.
        reduction: ``'mean'``, ``'sum'`` or ``'none'`` over the batch.

    Returns:
        A scalar, or ``[B]`` with ``'none'``.

    Raises:
        TypeError: ``target`` is not a tensor of that kind.
        ValueError: shapes that do not fit.

    Example:
        >>> rate_cross_entropy(torch.zeros(4, 2, 10), torch.tensor([3, 7]))
        tensor(2.3026)
    """
    out_seq = _check(out_seq, target)
    _check_probabilities(target)
    return F.cross_entropy(out_seq.mean(0), target, label_smoothing=label_smoothing, reduction=reduction)


def tet_loss(
    out_seq: Tensor,
    target: Tensor,
    v_threshold: float = 1.0,
    weight: float = 0.05,
    *,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Temporal efficient training: the cross-entropy of every time step by itself, and a pull towards the threshold.

    ``(1 - weight) * mean_t CE(out_t, target) + weight * mean_t MSE(out_t, v_threshold)``, from Deng et al., "Temporal
    Efficient Training of Spiking Neural Network via Gradient Re-weighting", ICLR 2022.

    Args:
        out_seq: outputs ``[T, B, C]``, potentials or currents of the last layer rather than spikes.
        target: classes ``[B]``, int64, or probabilities ``[B, C]``.
        v_threshold: where the regulariser pulls the outputs, the neurons' threshold.
        weight: share of the regulariser, from 0 to 1; the paper's is 0.05 for CIFAR and 0.001 for event data.
        label_smoothing: share of the target spread evenly over all classes.
        reduction: ``'mean'``, ``'sum'`` or ``'none'`` over the batch; time is always averaged, and so are a sample's
            squared distances over the classes.

    Returns:
        A scalar, or ``[B]`` with ``'none'``.

    Raises:
        TypeError: ``target`` is not a tensor of that kind.
        ValueError: shapes that do not fit, or ``weight`` out of its range.

    Example:
        >>> tet_loss(torch.zeros(4, 2, 10), torch.tensor([3, 7]), weight=0.0)
        tensor(2.3026)
    """
    if not 0 <= check_number("weight", weight) <= 1:
        raise ValueError(f"weight must be from 0 to 1, got {weight!r}")
    out_seq = _check(out_seq, target)
    _check_probabilities(target)
    T, B, _ = out_seq.shape
    targets = target.expand(T, *target.shape).flatten(0, 1)
    per_step = F.cross_entropy(out_seq.flatten(0, 1), targets, label_smoothing=label_smoothing, reduction="none")
    loss = per_step.view(T, B).mean(0)
    if weight:
        loss = (1 - weight) * loss + weight * (out_seq - v_threshold).square().mean((0, 2))
    return _reduce(loss, target, reduction)


def rate_mse(out_seq: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """Mean squared distance of the firing rates, the outputs' mean over time, from a one-hot target.

    The loss of Fang et al., "Incorporating Learnable Membrane Time Constant to Enhance Learning of Spiking Neural
    Networks", ICCV 2021.

    Args:
        out_seq: spikes ``[T, B, C]``.
        target: classes ``[B]``, int64, or rates ``[B, C]``.
        reduction: ``'mean'``, ``'sum'`` or ``'none'`` over the batch; a sample's squared distances are averaged over
            the classes.

    Returns:
        A scalar, or ``[B]`` with ``'none'``.

    Raises:
        TypeError: ``target`` is not a tensor of that kind.
        ValueError: shapes that do not fit.

    Example:
        >>> rate_mse(torch.ones(4, 1, 2), torch.tensor([1]))
        tensor(0.5000)
    """
    out_seq = _check(out_seq, target)
    rates = target
    if target.dim() == 1:
        classes = target.long()
        rates = F.one_hot(classes.masked_fill(classes == _IGNORED, 0), out_seq.shape[2])
    return _reduce((out_seq.mean(0) - rates).square().mean(1), target, reduction)


def _reduce(loss: Tensor, target: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    count: Tensor | int = len(loss)
    if target.dim() == 1:
        taken = target.long() != _IGNORED  # as uint8, class 156 equals -100
        loss, count = loss.where(taken, 0.0), taken.sum()
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / count
