"""What a Distiller refuses, each with its remedy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .losses import DistillationLoss, TemporalSelfKD

_IGNORED = -100  # the label that cross-entropy skips


def models(student: Any, teacher: Any, losses: Any) -> None:
    """A student, perhaps a teacher that can be frozen, and a list of losses."""
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be a torch.nn.Module, got {type(student).__name__}")
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a torch.nn.Module or None, got {type(teacher).__name__}")
    if teacher is not None and not {id(p) for p in student.parameters()}.isdisjoint(map(id, teacher.parameters())):
        raise ValueError("teacher must share no parameters with student, for it is frozen; copy.deepcopy it")
    if not isinstance(losses, (list, tuple)):
        raise TypeError(f"losses must be a list of losses, such as [LogitKD()], got {type(losses).__name__}")
    for loss in losses:
        if not isinstance(loss, DistillationLoss):
            raise TypeError(f"losses must hold instances such as LogitKD(), got {loss!r}")
    if sum(isinstance(loss, TemporalSelfKD) for loss in losses) > 1:
        raise ValueError("losses must hold at most one TemporalSelfKD: the student runs once")


def steps(T: int, wanted: int, timed: bool) -> None:
    """The student ran the ``wanted`` steps of training; ``timed`` if it has modules with ``timesteps``."""
    if wanted == T:
        return
    if timed:
        raise ValueError(
            f"timesteps_teacher is {wanted}, but the student gives {T} steps when its modules' timesteps are set to "
            "that; what repeats its input must read a whole number `timesteps` of its module"
        )
    raise ValueError(
        f"inputs must have timesteps_teacher = {wanted} steps in training, because the student has no module with "
        f"timesteps to set; its output has {T}"
    )


def teacher_logits(logits: Any, B: int, classes: int | None) -> None:
    """Logits ``[B, C]`` or ``[T, B, C]``, with the student's ``classes`` if a loss compares them."""
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3) or logits.shape[-2] != B:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the teacher's logits must be [B, C] or [T, B, C] with B = {B}, got {got}")
    if classes is not None and logits.shape[-1] != classes:
        raise ValueError(
            f"teacher must have the student's {classes} classes, got {logits.shape[-1]}; use a teacher with the same "
            "classes, or FeatureKD, which compares layers only"
        )


def labels(given: Any, classes: int, again: bool) -> None:
    """Class indices ``[B]`` or probabilities ``[B, C]``; ``again`` where some were checked before."""
    if not isinstance(given, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(given).__name__}")
    if not given.numel():
        raise ValueError(f"labels must be at least one, got shape {tuple(given.shape)}: leave empty batches out")
    if given.is_floating_point():  # as mixup gives them
        if given.dim() != 2 or given.shape[1] != classes:
            raise ValueError(f"labels as probabilities must be [B, {classes}], got {tuple(given.shape)}")
        return
    if given.dtype not in (torch.int64, torch.uint8):  # what torch's cross-entropy takes
        raise TypeError(f"labels must be int64, got {str(given.dtype).removeprefix('torch.')}; use labels.long()")
    if given.dim() != 1:
        raise ValueError(f"labels must be [B], got {tuple(given.shape)}")
    # On a device reading the labels waits for it, so there it is done once.
    if (again and given.is_cuda) or all(0 <= int(end) < classes for end in given.aminmax()):
        return
    given = given.long()  # as uint8, class 156 equals -100
    if not bool(((given >= 0) & (given < classes) | (given == _IGNORED)).all()):
        raise ValueError(f"labels must be from 0 to {classes - 1}, got {given.min().item()} to {given.max().item()}")
