"""The Distiller: a student, perhaps a teacher, and the losses between them, in one call per batch."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import functional
from ..tensors import saveable
from . import checks, extend, layers
from .losses import Batch, DistillationLoss, TemporalSelfKD, Terms, check_weight

__all__ = ["Distilled", "Distiller", "mean_over_time"]


def mean_over_time(output: Tensor) -> Tensor:
    """Logits ``[T, B, C]`` -> ``[B, C]``: the default readout."""
    return output.mean(0)


@dataclass
class Distilled:
    """What a Distiller gives for one batch.

    Attributes:
        output: the student's logits in each step of inference, ``[T, B, C]``.
        logits: their readout, ``[B, C]``.
        loss: the sum of the weighted terms; call ``backward()`` on it.
        terms: each term by name, unweighted: ``'task'`` and those of the losses.
        weighted: the same, weighted.
    """

    output: Tensor
    logits: Tensor
    loss: Tensor
    terms: dict[str, Tensor]
    weighted: dict[str, Tensor]


class Distiller(nn.Module):
    """Trains ``student`` with the help of losses between its layers, time steps and a teacher.

    Call it with a batch, call ``backward()`` on the result's ``loss``, and give its ``parameters()`` to the optimiser:
    they are the student's and those of the adapters and weak classifiers. The student is neither edited nor wrapped; it
    stays the bare model, with its own ``state_dict``. The states of its neurons are reset before each batch. The
    teacher is frozen, runs once per batch in eval mode without gradients and is no part of ``parameters()`` or
    ``state_dict()``.

    In eval mode the student runs alone, and only the task's loss is computed.

    Args:
        student: gives logits ``[T, B, C]``, or ``[T * B, C]`` if it has modules with ``timesteps``.
        teacher: gives logits ``[B, C]`` (or ``[T, B, C]``), and features for :class:`FeatureKD`. ``None`` for
            self-distillation, or if its logits come with each batch.
        losses: any of :mod:`snnfast.distill`'s; none gives the plain training that others are compared with.
        task_weight: of the task's loss; KDSNN takes ``1 - alpha`` beside a :class:`LogitKD` of weight ``alpha``.
        task_loss: ``(logits [B, C], labels) -> scalar``.
        readout: ``[T, B, C] -> [B, C]``.
        teacher_input: turns the student's inputs into the teacher's; by default they are the same, or their mean over
            time where they have time steps.
        example_inputs: a batch of at least 2 samples on the models' device, for one dry run that finds out shapes; it
            leaves no trace in the models or the random generators. May be left out where no loss names a layer or has a
            ``build`` of its own: the first batch serves then.

    Raises:
        TypeError, ValueError: an argument of another kind, an unknown layer (the nearest are listed), layers that
            cannot be bridged, another number of classes; the message names the remedy.

    Example:
        >>> import snnfast
        >>> from snnfast.distill import Distiller, LogitKD
        >>> class Student(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc, self.neuron, self.out = nn.Linear(8, 16), snnfast.IFNode(step_mode="m"), nn.Linear(16, 3)
        ...     def forward(self, x):  # [B, 8] -> [T, B, 3]
        ...         return self.out(self.neuron(self.fc(x).expand(4, -1, -1)))
        >>> x, y = torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1])
        >>> distiller = Distiller(Student(), nn.Linear(8, 3), [LogitKD(4.0, 0.5)], task_weight=0.5, example_inputs=x)
        >>> result = distiller(x, y)
        >>> result.loss.backward(); list(result.terms), result.output.shape
        (['task', 'logit_kd'], torch.Size([4, 5, 3]))
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        losses: Sequence[DistillationLoss] = (),
        *,
        task_weight: float = 1.0,
        task_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        readout: Callable[[Tensor], Tensor] = mean_over_time,
        teacher_input: Callable[[Tensor], Tensor] | None = None,
        example_inputs: Tensor | None = None,
    ) -> None:
        super().__init__()
        checks.models(student, teacher, losses)
        for name, value in (("task_loss", task_loss), ("readout", readout), ("teacher_input", teacher_input)):
            if not callable(value) and (name, value) != ("teacher_input", None):
                raise TypeError(f"{name} must be callable, got {value!r}")
        self.student = student
        self._teacher = (teacher,)  # in a tuple: not a submodule, so DDP, optimisers and checkpoints pass it by
        self.losses = nn.ModuleDict()
        for loss in losses:
            key, number = loss.name, 1
            while key in self.losses or key == "task":  # another's name, be it of the same class or not
                number += 1
                key = f"{loss.name}_{number}"
            self.losses[key] = copy.deepcopy(loss)
        self.task_weight = check_weight("task_weight", task_weight)
        self.task_loss, self.readout, self.teacher_input = task_loss, readout, teacher_input
        self._student_paths = tuple(dict.fromkeys(path for loss in losses for path in loss.student_layers))
        self._teacher_paths = tuple(dict.fromkeys(path for loss in losses for path in loss.teacher_layers))
        self._needs_teacher_logits = any(loss.needs_teacher_logits for loss in losses)
        self._check_layers()
        self._timed = tuple(extend.timed_modules(student))
        if teacher is not None:
            for p in teacher.parameters():  # scripted modules have no requires_grad_
                p.requires_grad_(False)
            teacher.eval()
        self._layouts: dict[tuple[str, str], str] | None = None
        self._classes = self._T = 0  # as the dry run finds them
        self._labels_checked = False
        # What is built at the first batch only would be unknown to an optimiser made before.
        builds = any(type(loss).build is not DistillationLoss.build for loss in losses)
        if example_inputs is not None:
            self._dry_run(example_inputs)
        elif builds or self._student_paths or self._teacher_paths:
            raise ValueError(
                "example_inputs must be a batch of inputs where a loss names layers or builds something to learn with: "
                "a dry run finds the shapes"
            )

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher, frozen."""
        return self._teacher[0]

    @property
    def _temporal(self) -> TemporalSelfKD | None:
        return next((loss for loss in self.losses.values() if isinstance(loss, TemporalSelfKD)), None)

    # ---- checks before training ----
    def _check_layers(self) -> None:
        layers.check_paths("student", self.student, self._student_paths)
        if self._teacher_paths and self.teacher is None:
            raise ValueError("teacher must be a model where a loss names layers of it, got None")
        if self.teacher is not None:
            layers.check_paths("teacher", self.teacher, self._teacher_paths)
        if self._temporal is None:
            return
        T = self._temporal.timesteps_student
        other = {type(m).__name__: m.timesteps for m in extend.timed_modules(self.student) if m.timesteps != T}
        if other:
            raise ValueError(
                f"timesteps_student must be the timesteps of the student's modules, got {T} where there are {other}"
            )
        if self._temporal.batch_norm != "all":
            extend.check_batch_norms(self.student, self._temporal.batch_norm)

    def _dry_run(self, inputs: Tensor) -> None:
        """Run both models once on ``inputs``: check what they give and build what the losses learn with."""
        if not isinstance(inputs, Tensor) or inputs.dim() < 2:
            raise TypeError(f"example_inputs must be a tensor [B, *] or [T, B, *], got {inputs!r:.80}")
        if any(is_lazy(p) for m in self._models() for p in (*m.parameters(), *m.buffers())):
            raise ValueError(
                "student and teacher must have all their parameters (one has lazy ones): run each once before"
            )
        with layers.untouched(*self._models()):
            calls, raw = self._run_student(inputs, None, long=True, paths=self._student_paths)
            B = self._batch_size(raw, inputs)
            self._T = T = len(self._time_first(raw, B, self._temporal))
            if self._temporal is not None:
                checks.steps(T, self._temporal.timesteps_teacher, bool(self._timed))
                T_student = self._temporal.timesteps_student
                if len(inputs) not in (T, B, T * B) and raw.shape[0] == T_student * len(inputs):  # folded, in its own T
                    checks.steps(T_student, T, True)
            self._classes = raw.shape[-1]
            layouts = {("", "inputs"): layers.time_layout("example_inputs", [inputs], T, B)}
            for path, outputs in calls.items():
                layouts["student", path] = layers.time_layout(f"the output of student layer {path!r}", outputs, T, B)
            shapes = {path: self._feature_shape(layouts["student", path], x[0]) for path, x in calls.items()}
            teacher_shapes = {}
            self._layouts = layouts
            try:
                if self.teacher is not None:
                    logits, teacher_calls = self._run_teacher(inputs, B, T)
                    checks.teacher_logits(logits, B, self._classes if self._needs_teacher_logits else None)
                    T_teacher = logits.shape[0] if logits.dim() == 3 else 1
                    for path, outputs in teacher_calls.items():
                        name = f"the output of teacher layer {path!r}"
                        layouts["teacher", path] = layers.time_layout(name, outputs, T_teacher, B)
                        teacher_shapes[path] = self._feature_shape(layouts["teacher", path], outputs[0])
                # Learning modules start from the current seed, which afterwards is where it was.
                for loss in self.losses.values():
                    loss.build(shapes, teacher_shapes, self._classes)  # type: ignore[operator]
            except BaseException:
                self._layouts = None
                raise
        like = next((p for p in self.student.parameters() if p.is_floating_point()), raw)
        self.losses.to(device=raw.device, dtype=like.dtype)

    def _batch_size(self, raw: Tensor, inputs: Tensor) -> int:
        """How many samples the student's output has, told without labels."""
        B = raw.shape[1] if raw.dim() == 3 else inputs.shape[0]
        if raw.dim() == 2 and self._timed:
            B = max(1, raw.shape[0] // self._timesteps(self._temporal))
        if B < 2 and (self._student_paths or self._teacher_paths):
            raise ValueError(f"example_inputs must have at least 2 samples where a loss names layers, got {B}")
        return B

    def _timesteps(self, temporal: TemporalSelfKD | None) -> int:
        """The steps that a student with ``timesteps`` runs."""
        if temporal is not None:
            return temporal.timesteps_teacher
        values = {module.timesteps for module in self._timed}
        if len(values) > 1:
            raise ValueError(f"student must have one number of timesteps in all its modules, got {sorted(values)}")
        return values.pop()

    @staticmethod
    def _feature_shape(layout: str, x: Tensor) -> torch.Size:
        return x.shape[2:] if layout == "time" else x.shape[1:]

    # ---- one batch ----
    def _models(self) -> tuple[nn.Module, ...]:
        return (self.student,) if self.teacher is None else (self.student, self.teacher)

    def _run_student(
        self, inputs: Tensor, B: int | None, long: bool, paths: tuple[str, ...]
    ) -> tuple[layers.Calls, Tensor]:
        """The student's raw output and what its layers at ``paths`` put out; ``long`` for the steps of training."""
        functional.reset_net(self.student)
        temporal = self._temporal if long else None
        with contextlib.ExitStack() as stack:
            if temporal is not None:
                T = temporal.timesteps_teacher
                stack.enter_context(extend.timesteps_set(self._timed, T))
                if B is not None:
                    mode, T_student = temporal.batch_norm, temporal.timesteps_student
                    stack.enter_context(extend.batch_norm_by_steps(self.student, mode, T, T_student, B))
            calls = stack.enter_context(layers.recorded(self.student, paths))
            raw = self.student(inputs)
        if not isinstance(raw, Tensor):
            raise TypeError(f"student must return one tensor of logits [T, B, C], got {type(raw).__name__}")
        return calls, raw

    def _time_first(self, raw: Tensor, B: int, temporal: TemporalSelfKD | None) -> Tensor:
        """The student's output as ``[T, B, C]``; ``temporal`` if it ran the steps of training."""
        if raw.dim() == 3 and raw.shape[1] == B:
            return raw
        if raw.dim() == 2 and self._timed and raw.shape[0] == self._timesteps(temporal) * B:
            return raw.unflatten(0, (-1, B))
        T = self._timesteps(temporal) if raw.dim() == 2 and self._timed else 0
        if raw.dim() == 3 or (T and not raw.shape[0] % T):
            samples = raw.shape[1] if raw.dim() == 3 else raw.shape[0] // T
            if samples and B not in raw.shape[:2] and raw.shape[-1] == self._classes:
                raise ValueError(f"labels must be one for each sample, got {B} where the student gives {samples}")
        raise ValueError(
            f"student must return logits of every time step, [T, B, C] with B = {B}, as there are labels (or "
            f"[T * B, C] if it has modules with timesteps), got {tuple(raw.shape)}; leave the mean over time to readout"
        )

    @torch.no_grad()
    def _run_teacher(self, inputs: Tensor, B: int, T: int) -> tuple[Tensor, layers.Calls]:
        teacher = self.teacher
        assert teacher is not None
        if any(module.training for module in teacher.modules()):  # whoever trains a model that has a part of it
            teacher.eval()
        functional.reset_net(teacher)
        with layers.recorded(teacher, self._teacher_paths) as calls:
            logits = teacher(self._teacher_inputs(inputs, B, T))
        if isinstance(logits, Tensor) and logits.dim() == 2 and logits.shape[0] != B and logits.shape[0] % B == 0:
            logits = logits.unflatten(0, (-1, B))
        return logits, calls

    def _teacher_inputs(self, inputs: Tensor, B: int, T: int) -> Tensor:
        if self.teacher_input is not None:
            return self.teacher_input(inputs)
        assert self._layouts is not None
        layout = self._layouts["", "inputs"]
        if layout == "static":
            return inputs
        dtype = None if inputs.is_floating_point() else torch.get_default_dtype()  # counts of events
        return layers.unfold("inputs", [inputs], layout, T, B).mean(0, dtype=dtype)

    def _features(self, side: str, calls: layers.Calls, T: int, B: int) -> dict[str, Tensor]:
        assert self._layouts is not None
        features = [
            layers.unfold(f"the output of {side} layer {path!r}", outputs, self._layouts[side, path], T, B)
            for path, outputs in calls.items()
        ]
        return dict(zip(calls, saveable(features), strict=True))  # type: ignore[arg-type]

    def forward(self, inputs: Tensor, labels: Tensor, *, teacher_logits: Tensor | None = None) -> Distilled:
        """One batch: the student's output, every term and their sum.

        Args:
            inputs: what the student takes.
            labels: ``[B]``, class indices (-100 for a sample without), or probabilities ``[B, C]``.
            teacher_logits: the teacher's logits for these inputs, ``[B, C]`` or ``[T, B, C]``, if they were computed
                before; the teacher then runs only where a loss names its layers.

        Raises:
            TypeError, ValueError: a tensor of another shape, labels out of range, no teacher where a loss needs one.
        """
        if self._layouts is None:
            self._dry_run(inputs)
        checks.labels(labels, self._classes, again=self._labels_checked)
        self._labels_checked = True
        B, temporal = len(labels), self._temporal
        if not self.training:
            return self._evaluate(inputs, labels, B)
        calls, raw = self._run_student(inputs, B, long=True, paths=self._student_paths)
        long_output = self._time_first(raw, B, temporal)
        T = len(long_output)
        if temporal is not None:
            checks.steps(T, temporal.timesteps_teacher, bool(self._timed))
        output = long_output if temporal is None else long_output[: temporal.timesteps_student]
        logits = self._read_out(output)
        batch = Batch(output, long_output, logits, labels, self.readout, self.task_loss)
        for path, x in self._features("student", calls, T, B).items():
            batch.student[path] = x if temporal is None else x[: temporal.timesteps_student]
        if self._teacher_paths or (self._needs_teacher_logits and teacher_logits is None):
            if self.teacher is None:
                raise ValueError(
                    "teacher is None and a loss needs its logits: give a teacher, or teacher_logits with each batch"
                )
            batch.teacher_logits, teacher_calls = self._run_teacher(inputs, B, T)
            T_teacher = len(batch.teacher_logits) if batch.teacher_logits.dim() == 3 else 1
            batch.teacher = self._features("teacher", teacher_calls, T_teacher, B)
        if teacher_logits is not None:
            checks.teacher_logits(teacher_logits, B, self._classes)
            batch.teacher_logits = teacher_logits
        terms: Terms = {"task": (self.task_weight, self.task_loss(logits, labels))}
        for key, loss in self.losses.items():
            for name, term in loss(batch).items():
                own = str(loss.name)
                rest = name[len(own) :] if name == own or name.startswith(f"{own}.") else f".{name}"
                terms[key + rest] = term
        return _distilled(output, logits, terms)

    def _read_out(self, output: Tensor) -> Tensor:
        logits = self.readout(output)
        if not isinstance(logits, Tensor) or logits.shape != output.shape[1:]:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"readout must turn [T, B, C] into [B, C] = {tuple(output.shape[1:])}, got {got}")
        return logits

    def _evaluate(self, inputs: Tensor, labels: Tensor, B: int) -> Distilled:
        """The student alone, for the steps of inference."""
        temporal = self._temporal
        assert self._layouts is not None
        if temporal is not None and self._layouts["", "inputs"] == "time":
            inputs = inputs[: temporal.timesteps_student]
        _, raw = self._run_student(inputs, B, long=False, paths=())
        output = self._time_first(raw, B, None)
        if temporal is not None:  # where inputs or student have the steps of training in a way that is not known here
            output = output[: temporal.timesteps_student]
        logits = self._read_out(output)
        return _distilled(output, logits, {"task": (self.task_weight, self.task_loss(logits, labels))})

    def teacher_logits(self, inputs: Tensor) -> Tensor:
        """The teacher's logits for ``inputs``, to be stored and given back with the same batch later.

        Raises:
            ValueError: there is no teacher.
        """
        if self.teacher is None:
            raise ValueError("teacher is None: there are no logits to compute")
        if self._layouts is None:
            self._dry_run(inputs)
        assert self._layouts is not None
        layout, T = self._layouts["", "inputs"], 1
        if layout != "static":
            T = len(inputs) if layout == "time" else self._timesteps(self._temporal) if self._timed else self._T
        B = inputs.shape[1] if layout == "time" else len(inputs) // T
        return self._run_teacher(inputs, B, T)[0]

    # ---- the teacher follows without being a submodule ----
    def _apply(self, fn: Any, recurse: bool = True) -> Distiller:
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # States start afresh with every batch; some libraries' cannot be copied with their autograd history.
        for model in self._models():
            functional.reset_net(model)
        return dict(self.__dict__)


def _distilled(output: Tensor, logits: Tensor, terms: Terms) -> Distilled:
    # A weight of 0 leaves out what is not finite too, such as the mean over a batch without a label.
    weighted = {
        name: value if weight == 1.0 else weight * (value if weight else value.nan_to_num())
        for name, (weight, value) in terms.items()
    }
    loss = functools.reduce(torch.add, weighted.values())
    return Distilled(output, logits, loss, {name: value for name, (_, value) in terms.items()}, weighted)
