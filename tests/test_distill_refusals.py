"""What distillation refuses, each with the remedy in the message."""

from __future__ import annotations

import pytest
import torch
from distill_networks import B, T, TimeFirst, folded, teacher
from torch import Tensor, nn

import snnfast
from snnfast.distill import ConfidenceKD, DistillationLoss, Distiller, FeatureKD, LogitKD, SpatialSelfKD, TemporalSelfKD

pytestmark = pytest.mark.usefixtures("one_thread")


class Averaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = folded()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).unflatten(0, (T, -1)).mean(0)


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), snnfast.IFNode(timesteps=4), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.repeat(4, 1, 1, 1))


class InPlace(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*teacher())
        self[2] = nn.ReLU(inplace=True)


class Twice(nn.Module):
    """As many calls of one layer as there are time steps, but not one for each."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 7), nn.Linear(7, 8), nn.Linear(8, 5)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.relu(self.two(self.relu(self.one(x))))).expand(2, -1, -1)


class Learning(DistillationLoss):
    name = "learning"

    def build(self, student, teacher, classes):
        self.weights = nn.Linear(classes, classes)


X, Y = torch.randn(B, 1, 8, 8), torch.zeros(B, dtype=torch.long)
BAD = {
    "student path": (
        lambda: Distiller(folded(), teacher(), [FeatureKD({"66": "2"})], example_inputs=X),
        r"student has no layer '66'; the nearest are '6'",
    ),
    "teacher path": (
        lambda: Distiller(folded(), teacher(), [FeatureKD({"6": "conv"})], example_inputs=X),
        r"teacher has no layer 'conv'; the nearest are '0', '1'",
    ),
    "spatial path": (
        lambda: Distiller(folded(), losses=[SpatialSelfKD({"six": 5})], example_inputs=X),
        r"student has no layer 'six'",
    ),
    "no teacher": (lambda: Distiller(folded(), losses=[FeatureKD({"6": "2"})], example_inputs=X), r"teacher must be a"),
    "no example": (lambda: Distiller(folded(), teacher(), [FeatureKD({"6": "2"})]), r"example_inputs must be"),
    "no example to build from": (lambda: Distiller(folded(), losses=[Learning()]), r"example_inputs must be .* builds"),
    "one example": (
        lambda: Distiller(folded(), teacher(), [FeatureKD({"6": "2"})], example_inputs=X[:1]),
        r"at least 2 samples .* got 1",
    ),
    "no bridge": (
        lambda: Distiller(folded(), teacher(), [FeatureKD({"6": "4"})], example_inputs=X),
        r"'6': '4'.*\(8, 4, 4\) and \(12,\).*no adapter can bridge",
    ),
    "other classes": (
        lambda: Distiller(folded(), teacher(classes=7), [LogitKD()], example_inputs=X),
        r"teacher must have the student's 5 classes, got 7",
    ),
    "weak classes": (
        lambda: Distiller(folded(), losses=[SpatialSelfKD({"6": 9})], example_inputs=X),
        r"layers must give '6' the student's 5 classes, got 9",
    ),
    "in place": (
        lambda: Distiller(folded(), InPlace(), [FeatureKD({"6": "1"})], example_inputs=X),
        r"'1' is changed in place.*name that module",
    ),
    "two calls": (
        lambda: Distiller(Twice(), losses=[SpatialSelfKD({"relu": 5})], example_inputs=torch.randn(3, 6)),
        r"'relu' was called 2 times .* \(3, 7\) first; name a layer that runs once",
    ),
    "no time": (lambda: Distiller(Averaged())(X, Y), r"student must return logits of every time step.*\(6, 5\)"),
    "no time, linear": (
        lambda: Distiller(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), losses=[ConfidenceKD()], example_inputs=X),
        r"student must return logits of every time step",
    ),
    "temperature 0": (lambda: LogitKD(0.0), r"temperature must be .* above 0.*0.0"),
    "temperature -1": (lambda: TemporalSelfKD(4, 2, -1.0), r"temperature must be .* -1.0"),
    "temperature inf": (lambda: SpatialSelfKD({"6": 5}, float("inf")), r"temperature must be"),
    "weight": (lambda: ConfidenceKD(weight=-0.1), r"weight must be a finite number from 0, got -0.1"),
    "task weight": (lambda: Distiller(folded(), task_weight=-1.0), r"task_weight must be"),
    "T_s = T_t": (lambda: TemporalSelfKD(4, 4), r"timesteps_student must be below timesteps_teacher, got 4 and 4"),
    "T_s": (lambda: TemporalSelfKD(4, 0), r"timesteps_student must be a whole number from 1, got 0"),
    "T_s of the modules": (
        lambda: Distiller(folded(), losses=[TemporalSelfKD(6, 3)], example_inputs=X),
        r"timesteps_student must be the timesteps of the student's modules, got 3 where there are .*4",
    ),
    "short input": (
        lambda: Distiller(TimeFirst(), losses=[TemporalSelfKD(6, 4)], example_inputs=torch.randn(4, B, 6)),
        r"inputs must have timesteps_teacher = 6 steps .* its output has 4",
    ),
    "a number of steps of its own": (
        lambda: Distiller(Repeated(), losses=[TemporalSelfKD(8, 4)], example_inputs=X),
        r"timesteps_teacher is 8, but the student gives 4 steps .* must read a whole number `timesteps`",
    ),
    "batch norm by steps": (
        lambda: Distiller(
            nn.Sequential(snnfast.layer.ThresholdDependentBatchNorm2d(1.0, 1.0, 1)),
            losses=[TemporalSelfKD(4, 2, batch_norm="per_step")],
        ),
        r"batch_norm='per_step' does not work with ThresholdDependentBatchNorm2d in student \(at '0'\)",
    ),
    "node of each step": (
        lambda: Distiller(
            nn.Sequential(snnfast.fused.BatchNormNode(nn.BatchNorm2d(1), snnfast.IFNode(timesteps=2), per_step=True)),
            losses=[TemporalSelfKD(4, 2, batch_norm="student")],
        ),
        r"batch_norm='student' does not work with BatchNormNode\(per_step=True\) in student \(at '0'\)",
    ),
    "batch norm": (lambda: TemporalSelfKD(4, 2, batch_norm="none"), r"batch_norm must be one of 'all'.* got 'none'"),
    "labels": (lambda: Distiller(folded())(X, Y + 5), r"labels must be from 0 to 4, got 5 to 5"),
    "labels below": (lambda: Distiller(folded())(X, Y - 1), r"labels must be from 0 to 4, got -1 to -1"),
    "labels above, as uint8": (  # where -100 is 156
        lambda: Distiller(folded())(X, (Y + 156).byte()),
        r"labels must be from 0 to 4, got 156 to 156",
    ),
    "no labels": (
        lambda: Distiller(folded(), example_inputs=X)(X[:0], Y[:0]),
        r"labels must be at least one, .*empty batches",
    ),
    "labels' shape": (lambda: Distiller(folded())(X, Y[:, None]), r"labels must be \[B\], got \(6, 1\)"),
    "labels' number": (lambda: Distiller(folded())(X, Y[:4]), r"labels must be one for each sample, got 4 .* gives 6"),
    "readout": (lambda: Distiller(folded(), readout=lambda z: z)(X, Y), r"readout must turn \[T, B, C\]"),
    "itself": (lambda: (lambda n: Distiller(n, n, [LogitKD()]))(folded()), r"teacher must share no parameters"),
    "two temporal": (lambda: Distiller(folded(), losses=[TemporalSelfKD(6, 4), TemporalSelfKD(8, 4)]), r"at most one"),
    "lazy": (lambda: Distiller(nn.LazyLinear(5), example_inputs=X), r"lazy"),
    "tie": (
        lambda: Distiller(TimeFirst(), nn.Linear(6, 5), [LogitKD()], example_inputs=torch.randn(4, 4, 6)),
        r"two ways.*another number",
    ),
}
BAD_TYPES = {
    "student": (lambda: Distiller("net"), r"student must be a torch.nn.Module, got str"),
    "teacher": (lambda: Distiller(folded(), teacher=3), r"teacher must be a torch.nn.Module or None"),
    "one loss": (lambda: Distiller(folded(), teacher(), LogitKD()), r"losses must be a list.*LogitKD"),
    "class": (lambda: Distiller(folded(), teacher(), [LogitKD]), r"losses must hold instances"),
    "layers": (lambda: FeatureKD([("a", "b")]), r"layers must be a dict"),
    "layers' values": (lambda: SpatialSelfKD({"6": "10"}), r"layers must be such as \{'layer2': 10\}"),
    "temperature text": (lambda: LogitKD("4"), r"temperature must be a number, got str"),
    "labels' dtype": (lambda: Distiller(folded())(X, Y.int()), r"labels must be int64, got int32"),
    "label list": (lambda: Distiller(folded())(X, [0] * B), r"labels must be a torch.Tensor"),
    "label list after labels": (
        lambda: (lambda d: [d(X, labels) for labels in (Y, [0] * B)])(Distiller(folded())),
        r"labels must be a torch.Tensor, got list",
    ),
    "teacher_input": (
        lambda: Distiller(folded(), teacher(), teacher_input=2),
        r"teacher_input must be callable, got 2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_with_the_remedy(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", BAD_TYPES)
def test_bad_types_are_refused_with_the_remedy(name):
    call, message = BAD_TYPES[name]
    with pytest.raises(TypeError, match=message):
        call()
