"""The losses of distillation: each turns what one batch gave into named terms, and owns the layers that it learns with.

Every Kullback-Leibler divergence here is summed over the classes, averaged over the batch (and over time, where it is
taken per step) and multiplied by the squared temperature, so that its gradient keeps its size as the temperature grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from .._arguments import check_steps
from ..functional import check_number
from .extend import BATCH_NORM
from .features import convolved_mse, time_mean

__all__ = [
    "ConfidenceKD",
    "DistillationLoss",
    "FeatureKD",
    "LogitKD",
    "PerStepKD",
    "SpatialSelfKD",
    "TemporalSelfKD",
    "divergence",
]


@dataclass
class Batch:
    """What one batch gave: the material of every loss."""

    output: Tensor  # the student's logits of the steps that inference runs, [T, B, C]
    long_output: Tensor  # those of all steps that were run, [T_teacher, B, C]; the same where there are no more
    logits: Tensor  # readout of output, [B, C]
    labels: Tensor
    readout: Callable[[Tensor], Tensor]
    task_loss: Callable[[Tensor, Tensor], Tensor]
    teacher_logits: Tensor | None = None  # [B, C], or [T, B, C] of a teacher with time steps
    student: dict[str, Tensor] = field(default_factory=dict)  # features [T, B, *], or [1, B, *] if constant over time
    teacher: dict[str, Tensor] = field(default_factory=dict)


Terms = dict[str, tuple[float, Tensor]]  # name -> weight and unweighted value


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``temperature^2 * KL(teacher || student)`` of logits ``[*, C]`` softened at ``temperature``, mean over ``*``.

    No gradient flows into ``teacher``, which is ``[*, C]`` or broadcasts to it. The softmax runs in float32 at least.

    Example:
        >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), 2.0)
        tensor(0.)
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_q = F.log_softmax(student.to(dtype) / temperature, -1)
    log_p = F.log_softmax(teacher.detach().to(dtype) / temperature, -1).expand_as(log_q)
    total = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return total * (temperature**2 * log_q.shape[-1] / log_q.numel())


def check_weight(name: str, value: Any) -> float:
    """A weight of a loss, from 0."""
    weight = check_number(name, value)
    if not 0.0 <= weight < math.inf:
        raise ValueError(f"{name} must be a finite number from 0, got {value!r}")
    return weight


def _check_temperature(value: Any) -> float:
    temperature = check_number("temperature", value)
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0 (usual: 2 to 6), got {value!r}")
    return temperature


def _check_mapping(name: str, value: Any, kind: type, example: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        raise TypeError(f"{name} must be a dict with at least one entry, such as {example}, got {value!r}")
    for key, item in value.items():
        if not isinstance(key, str) or not isinstance(item, kind) or isinstance(item, bool):
            raise TypeError(f"{name} must be such as {example}, got {key!r}: {item!r} in it")
    return dict(value)


class DistillationLoss(nn.Module):
    """Base of the losses, and of your own: :meth:`forward` turns a batch into terms.

    A Distiller copies the losses that it is given, lets each :meth:`build` what it learns with, and calls it on every
    batch. ``student_layers`` and ``teacher_layers`` are the dotted paths whose outputs it wants. Terms are named
    ``name`` or ``name.something``; other names get ``name.`` before them.
    """

    name: ClassVar[str]
    needs_teacher_logits: bool = False
    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()

    def build(self, student: dict[str, Size], teacher: dict[str, Size], classes: int) -> None:
        """Make the modules that learn, from the shapes of features (without time and batch)."""

    def forward(self, batch: Batch) -> Terms:
        """Terms by name: the weight and the unweighted value (a scalar) of each."""
        raise NotImplementedError(f"{type(self).__name__} must implement forward(batch)")


class LogitKD(DistillationLoss):
    """Response-based distillation: the student learns the teacher's softened answer.

    The loss of KDSNN (Xu et al., CVPR 2023) is this with weight ``alpha`` and ``Distiller(task_weight=1 - alpha)``.
    The paper does not state its temperature and weight; the defaults here are common ones.

    Args:
        temperature: divides the logits of both; above 0.
        weight: of this term in the sum.
        per_step: compare the teacher with each of the student's steps, not with their readout.

    Raises:
        TypeError, ValueError: an argument of another kind; the message names it.
    """

    name = "logit_kd"
    needs_teacher_logits = True

    def __init__(self, temperature: float = 3.0, weight: float = 0.5, per_step: bool = False) -> None:
        super().__init__()
        self.temperature = _check_temperature(temperature)
        self.weight = check_weight("weight", weight)
        self.per_step = bool(per_step)

    def forward(self, batch: Batch) -> Terms:
        student = batch.output if self.per_step else batch.logits
        return {self.name: (self.weight, divergence(student, _teacher_for(student, batch), self.temperature))}


def _teacher_for(student: Tensor, batch: Batch) -> Tensor:
    """The teacher's logits as they fit ``student``: step by step if both have the same steps, else their mean."""
    teacher = batch.teacher_logits
    assert teacher is not None  # the Distiller has seen to it
    return teacher.mean(0) if teacher.dim() == 3 and teacher.shape != student.shape else teacher


class PerStepKD(DistillationLoss):
    """Cross-entropy and distillation in every step: the cheapest strong default with a teacher.

    Three terms, each averaged over time: the task's loss of every step (in place of that of the readout: use it with
    ``Distiller(task_weight=0)``), the divergence of every step from the teacher, and that from the mean over time of
    the student's own logits (Yu et al., "Efficient Logit-based Knowledge Distillation of Deep Spiking Neural Networks
    for Full-Range Timestep Deployment", ICML 2025).

    Args:
        temperature: divides the logits; above 0.
        weight: of the divergence from the teacher; 0 for none, which needs no teacher.
        self_weight: of the divergence from the student's own mean.
        task_weight: of the task's loss per step.

    Raises:
        TypeError, ValueError: an argument of another kind; the message names it.
    """

    name = "per_step"

    def __init__(
        self, temperature: float = 3.0, weight: float = 0.2, self_weight: float = 0.5, task_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.temperature = _check_temperature(temperature)
        self.weight = check_weight("weight", weight)
        self.self_weight = check_weight("self_weight", self_weight)
        self.task_weight = check_weight("task_weight", task_weight)
        self.needs_teacher_logits = self.weight > 0

    def forward(self, batch: Batch) -> Terms:
        z = batch.output
        T = z.shape[0]
        labels = batch.labels.repeat(T, *[1] * (batch.labels.dim() - 1))
        terms: Terms = {f"{self.name}.task": (self.task_weight, batch.task_loss(z.flatten(0, 1), labels))}
        if self.needs_teacher_logits:
            terms[f"{self.name}.teacher"] = (self.weight, divergence(z, _teacher_for(z, batch), self.temperature))
        terms[f"{self.name}.self"] = (self.self_weight, divergence(z, z.mean(0), self.temperature))
        return terms


class ConfidenceKD(DistillationLoss):
    """The least confident time step learns from the most confident one; no teacher, no extra steps.

    For every sample apart, a step is as confident as its largest class probability (after Ding et al., "Synergy Between
    the Strong and the Weak", NeurIPS 2025, the direction strong to weak).

    Args:
        temperature: divides the logits; above 0.
        weight: of this term in the sum.

    Raises:
        TypeError, ValueError: an argument of another kind; the message names it.
    """

    name = "confidence_kd"

    def __init__(self, temperature: float = 2.0, weight: float = 1.0) -> None:
        super().__init__()
        self.temperature = _check_temperature(temperature)
        self.weight = check_weight("weight", weight)

    def forward(self, batch: Batch) -> Terms:
        z = batch.output
        # The log of the largest probability, in float32 at least: in half precision steps of near confidence are one.
        known = z.detach().to(torch.promote_types(z.dtype, torch.float32))
        confidence = known.amax(-1) - known.logsumexp(-1)  # [T, B]
        samples = torch.arange(z.shape[1], device=z.device)
        weak, strong = z[confidence.argmin(0), samples], z[confidence.argmax(0), samples]
        return {self.name: (self.weight, divergence(weak, strong, self.temperature))}


class TemporalSelfKD(DistillationLoss):
    """More time steps in training teach those of inference: the temporal half of TSSD (Zuo et al., arXiv 2406.07862).

    In training the student runs ``timesteps_teacher`` steps. The readout of all is the fixed target of the readout of
    the first ``timesteps_student``, and only those give the returned output, the task's loss and the other losses.
    Inference runs ``timesteps_student``. The modules of the student with a whole number ``timesteps`` are set to the
    longer run and put back; a student without is given inputs of ``timesteps_teacher`` steps.

    Args:
        timesteps_teacher: steps in training.
        timesteps_student: steps in inference, fewer.
        temperature: divides the logits; above 0.
        weight: of this term in the sum.
        batch_norm: which steps give one batch norm its statistics in training: ``'all'`` together; ``'student'``, the
            first ``timesteps_student`` and the rest apart, so that the first see what they see in a plain training;
            ``'per_step'``, every step by itself. The running statistics come from all steps, or (the latter two) from
            the first ``timesteps_student``. Parameters, buffers and keys stay those of the bare model.

    Raises:
        TypeError, ValueError: an argument of another kind; the message names it.
    """

    name = "temporal_self_kd"

    def __init__(
        self,
        timesteps_teacher: int,
        timesteps_student: int,
        temperature: float = 2.0,
        weight: float = 1.0,
        batch_norm: str = "all",
    ) -> None:
        super().__init__()
        self.timesteps_teacher = check_steps("timesteps_teacher", timesteps_teacher)
        self.timesteps_student = check_steps("timesteps_student", timesteps_student)
        if self.timesteps_student >= self.timesteps_teacher:
            raise ValueError(
                f"timesteps_student must be below timesteps_teacher, got {timesteps_student} and {timesteps_teacher}: "
                "the longer run is the teacher"
            )
        self.temperature = _check_temperature(temperature)
        self.weight = check_weight("weight", weight)
        if batch_norm not in BATCH_NORM:
            raise ValueError(f"batch_norm must be one of {', '.join(map(repr, BATCH_NORM))}, got {batch_norm!r}")
        self.batch_norm = batch_norm

    def forward(self, batch: Batch) -> Terms:
        target = batch.readout(batch.long_output.detach())
        return {self.name: (self.weight, divergence(batch.logits, target, self.temperature))}


class FeatureAdapter(nn.Module):
    """Bridges one pair of layers: a 1 x 1 convolution over channels, a Linear over vectors, pooling over space.

    Raises:
        ValueError: nothing bridges the shapes.
    """

    def __init__(self, pair: str, student: Size, teacher: Size) -> None:
        super().__init__()
        bridged = len(student) == len(teacher) and len(student) in (1, 2, 3)
        if not bridged or (len(student) == 2 and student[0] != teacher[0]):
            raise ValueError(
                f"layers gives the pair {pair}, whose features {tuple(student)} and {tuple(teacher)} (without time and "
                "batch) no adapter can bridge: it takes two images [C, H, W], two vectors [C] or two sequences [L, C] "
                "of one length; name layers of the same kind"
            )
        self.space: tuple[int, int] | None = None
        self.bridge: nn.Module = nn.Identity()
        if len(student) == 3:
            if student[1:] != teacher[1:]:
                self.space = (min(student[1], teacher[1]), min(student[2], teacher[2]))
            if student[0] != teacher[0]:
                self.bridge = nn.Conv2d(student[0], teacher[0], 1)
        elif student[-1] != teacher[-1]:
            self.bridge = nn.Linear(student[-1], teacher[-1])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean squared difference of ``student``'s mean over time, ``[T, B, *]``, and ``teacher`` ``[B, *]``."""
        if self.space is not None:  # the larger is pooled to the smaller, before the convolution: cheaper, and the same
            student = F.adaptive_avg_pool2d(time_mean(student), self.space).unsqueeze(0)
            teacher = F.adaptive_avg_pool2d(teacher, self.space)
        teacher = teacher.to(student.dtype)
        if isinstance(self.bridge, nn.Conv2d):
            return convolved_mse(student, teacher, self.bridge)
        return F.mse_loss(self.bridge(time_mean(student)), teacher)


class FeatureKD(DistillationLoss):
    """Feature-based distillation: student features, averaged over time, approach the teacher's (KDSNN, CVPR 2023).

    Where the shapes differ, a 1 x 1 convolution on the student's side bridges channels (a Linear for vectors) and the
    larger of the two images is pooled to the smaller. Each pair is a term: the mean squared difference, whose scale
    does not depend on the size of the layer. The paper does not state its weight; the default is a plain 1.

    Args:
        layers: the dotted path of a student's layer to that of a teacher's, for each pair.
        weight: of each pair's term in the sum.

    Raises:
        TypeError, ValueError: an argument of another kind; the message names it.
    """

    name = "feature_kd"

    def __init__(self, layers: Mapping[str, str], weight: float = 1.0) -> None:
        super().__init__()
        self.layers = _check_mapping("layers", layers, str, "{'layer3': 'layer3'}")
        self.weight = check_weight("weight", weight)
        self.student_layers = tuple(self.layers)
        self.teacher_layers = tuple(dict.fromkeys(self.layers.values()))

    def build(self, student: dict[str, Size], teacher: dict[str, Size], classes: int) -> None:
        pairs = self.layers.items()
        self.adapters = nn.ModuleList(FeatureAdapter(f"{s!r}: {t!r}", student[s], teacher[t]) for s, t in pairs)

    def forward(self, batch: Batch) -> Terms:
        terms: Terms = {}
        for (s, t), adapter in zip(self.layers.items(), self.adapters, strict=True):
            terms[f"{self.name}.{s}"] = (self.weight, adapter(batch.student[s], time_mean(batch.teacher[t])))
        return terms


class SpatialSelfKD(DistillationLoss):
    """Classifiers on inner layers learn the final answer: the spatial half of TSSD (Zuo et al., arXiv 2406.07862).

    Each weak classifier pools its layer's mean over time to at most 2 x 2 and ends in a Linear; its target is the
    student's own readout, fixed. It belongs to the Distiller, and inference knows nothing of it.

    Args:
        layers: the dotted path of a layer to the number of classes.
        temperature: divides the logits; above 0.
        weight: of each classifier's term in the sum.

    Raises:
        TypeError, ValueError: an argument of another kind; the message names it.
    """

    name = "spatial_self_kd"

    def __init__(self, layers: Mapping[str, int], temperature: float = 2.0, weight: float = 0.1) -> None:
        super().__init__()
        self.layers = _check_mapping("layers", layers, int, "{'layer2': 10}")
        self.temperature = _check_temperature(temperature)
        self.weight = check_weight("weight", weight)
        self.student_layers = tuple(self.layers)

    def build(self, student: dict[str, Size], teacher: dict[str, Size], classes: int) -> None:
        classifiers: list[nn.Module] = []
        for path, wanted in self.layers.items():
            shape = student[path]
            if wanted != classes:
                raise ValueError(f"layers must give {path!r} the student's {classes} classes, got {wanted}")
            if len(shape) == 3:
                space = (min(2, shape[1]), min(2, shape[2]))
                features = shape[0] * space[0] * space[1]
                classifiers.append(
                    nn.Sequential(nn.AdaptiveAvgPool2d(space), nn.Flatten(), nn.Linear(features, classes))
                )
            elif len(shape) == 1:
                classifiers.append(nn.Linear(shape[0], classes))
            else:
                raise ValueError(
                    f"layers names {path!r}, whose features {tuple(shape)} (without time and batch) no classifier "
                    "takes: it must be an image [C, H, W] or a vector [C]"
                )
        self.classifiers = nn.ModuleList(classifiers)

    def forward(self, batch: Batch) -> Terms:
        terms: Terms = {}
        for path, classifier in zip(self.layers, self.classifiers, strict=True):
            # Pooling and Linear commute with the mean over time, so once is enough.
            weak = classifier(time_mean(batch.student[path]))
            terms[f"{self.name}.{path}"] = (self.weight, divergence(weak, batch.logits, self.temperature))
        return terms
