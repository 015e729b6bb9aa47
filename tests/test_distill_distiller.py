"""The Distiller around the losses: nothing left behind in the models, copies, cached teachers, other libraries."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from distill_networks import CLASSES, B, T, TimeFirst, batch, close, folded, kl, teacher
from torch import Tensor, nn

from snnfast import functional
from snnfast.distill import (
    ConfidenceKD,
    DistillationLoss,
    Distiller,
    FeatureKD,
    LogitKD,
    PerStepKD,
    SpatialSelfKD,
    TemporalSelfKD,
)
from snnfast.neuron import BaseNode

pytestmark = pytest.mark.usefixtures("one_thread")


class Counting(nn.Module):
    """Changes a buffer and attributes in every call, whatever its mode, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.last: Tensor | None = None
        self.shapes: list[torch.Size] = []
        self.recent: deque[torch.Size] = deque(maxlen=2)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = (x + torch.rand(()) + torch.rand((), generator=self.generator)).detach()
        self.shapes.append(x.shape)
        self.recent.append(x.shape)
        return x


def test_the_dry_run_leaves_no_trace():
    student, ann, (x, y) = folded(), teacher(), batch()
    student.append(nn.Dropout(0.5))
    student.append(Counting())
    ann.append(Counting())
    ann.train()
    student[1].eval()
    student(x)  # some state
    before = (copy.deepcopy(student), copy.deepcopy(ann))
    potentials = [m.v.clone() for m in student if isinstance(m, BaseNode)]
    rng = torch.get_rng_state()
    losses = [FeatureKD({"6": "2"}), SpatialSelfKD({"6": CLASSES}), TemporalSelfKD(6, T)]
    distiller = Distiller(student, ann, losses, example_inputs=x)
    assert torch.equal(torch.get_rng_state(), rng)
    for old, new in zip(before, (student, ann), strict=True):
        assert list(old.state_dict()) == list(new.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True))
    assert student[-1].calls == 1
    assert torch.equal(student[-1].last, before[0][-1].last)
    assert ann[-1].last is None
    for old, new in zip(before, (student, ann), strict=True):
        assert (new[-1].shapes, new[-1].recent) == (old[-1].shapes, old[-1].recent)
        assert torch.equal(new[-1].generator.get_state(), old[-1].generator.get_state())
    assert [m.training for m in before[0].modules()] == [m.training for m in student.modules()]
    assert all(
        torch.equal(v, m.v) for v, m in zip(potentials, (m for m in student if isinstance(m, BaseNode)), strict=True)
    )
    # The adapters come from the seed all the same.
    torch.set_rng_state(rng)
    again = Distiller(student, ann, losses, example_inputs=x)
    for a, b in zip(distiller.losses.parameters(), again.losses.parameters(), strict=True):
        assert torch.equal(a, b)
    assert losses[0].__dict__.get("adapters") is None  # the user's own object stays as it was
    distiller(x, y).loss.backward()
    assert not any(m._forward_hooks or m._forward_pre_hooks for model in (student, ann) for m in model.modules())
    assert list(student.state_dict()) == list(before[0].state_dict())
    assert distiller.state_dict().keys() == {f"student.{k}" for k in student.state_dict()} | {
        f"losses.{k}" for k in distiller.losses.state_dict()
    }


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))], ids=["copy", "pickle"])
def test_copies_and_pickles_train_on(duplicate):
    x, y = batch()
    losses = [LogitKD(), FeatureKD({"6": "2"}), SpatialSelfKD({"6": CLASSES}), TemporalSelfKD(6, T)]
    distiller = Distiller(folded(), teacher(), losses, example_inputs=x)
    distiller(x, y).loss.backward()
    other = duplicate(distiller)
    assert other.teacher is not distiller.teacher
    results = [d(x, y) for d in (distiller, other)]
    assert all(torch.equal(a, b) for a, b in zip(*(r.terms.values() for r in results), strict=True))
    other.losses["logit_kd"].weight = 0.0
    assert distiller.losses["logit_kd"].weight == 0.5


def test_states_are_reset_and_the_teacher_moves_along():
    x, y = batch()
    distiller = Distiller(folded(), teacher(), [LogitKD(), FeatureKD({"6": "2"})], example_inputs=x)
    for m in distiller.student.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.0
    assert torch.equal(distiller(x, y).loss, distiller(x, y).loss)
    distiller.double()
    assert distiller(x.double(), y).terms["logit_kd"].dtype == torch.float64
    assert distiller.teacher[0].weight.dtype == torch.float64


def test_cached_teacher_logits_replace_the_teacher():
    student, ann, (x, y) = folded(), teacher(), batch()
    distiller = Distiller(student, ann, [LogitKD(), PerStepKD()], example_inputs=x)
    cached = distiller.teacher_logits(x)
    with_teacher = distiller(x, y)
    ann.train()  # a user's loop may do that to every model it knows
    torch.testing.assert_close(distiller(x, y).terms["logit_kd"], with_teacher.terms["logit_kd"])
    assert not ann.training
    ann[1].train()  # or to a part of it alone
    mean = ann[1].running_mean.clone()
    torch.testing.assert_close(distiller(x, y).terms["logit_kd"], with_teacher.terms["logit_kd"])
    assert torch.equal(ann[1].running_mean, mean)
    calls = []
    ann.register_forward_hook(lambda *_: calls.append(1))
    from_cache = distiller(x, y, teacher_logits=cached)
    assert not calls
    without = Distiller(student, None, [LogitKD(), PerStepKD()], example_inputs=x)
    for result in (from_cache, without(x, y, teacher_logits=cached)):
        for name, term in with_teacher.terms.items():
            torch.testing.assert_close(result.terms[name], term)
    with pytest.raises(ValueError, match=r"teacher is None.*teacher_logits"):
        without(x, y)
    with pytest.raises(ValueError, match=r"teacher must have the student's 5 classes, got 4"):
        distiller(x, y, teacher_logits=cached[:, :4])
    with pytest.raises(ValueError, match=r"logits must be \[B, C\].*\(3, 5\)"):
        distiller(x, y, teacher_logits=cached[:3])


def test_teacher_logits_of_folded_inputs_where_no_module_knows_the_steps():
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).unflatten(0, (T, -1))

    x, y, ann = torch.randn(T * B, 6), torch.randint(CLASSES, (B,)), nn.Linear(6, CLASSES)
    distiller = Distiller(Student(), ann, [LogitKD()], example_inputs=x)
    cached = distiller.teacher_logits(x)
    torch.testing.assert_close(cached, ann(x.unflatten(0, (T, B)).mean(0)))
    assert torch.equal(distiller(x, y, teacher_logits=cached).loss, distiller(x, y).loss)


def test_a_teacher_that_runs_in_inference_mode():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = teacher()

        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    student, frozen, (x, y) = folded(), Frozen(), batch()
    pairs = {"3": "net.2", "6": "net.2"}
    losses = [LogitKD(), LogitKD(per_step=True), FeatureKD(pairs), PerStepKD()]
    one = Distiller(student, frozen, losses, example_inputs=x)
    two = Distiller(student, frozen.net, [*losses[:2], FeatureKD({"3": "2", "6": "2"}), losses[3]], example_inputs=x)
    two.losses.load_state_dict(one.losses.state_dict())
    results = [one(x, y), two(x, y)]
    for name, term in results[0].terms.items():
        assert torch.equal(term, results[1].terms[name])
    results[0].loss.backward()
    with torch.inference_mode():
        cached = one.teacher_logits(x)
    one(x, y, teacher_logits=cached).loss.backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_teacher():
    ann, (x, y) = teacher(), batch()
    student = folded()
    scripted = Distiller(student, torch.jit.script(copy.deepcopy(ann)), [LogitKD()], example_inputs=x)
    torch.testing.assert_close(scripted(x, y).loss, Distiller(student, ann, [LogitKD()], example_inputs=x)(x, y).loss)
    assert not any(p.requires_grad for p in scripted.teacher.parameters())


def test_a_dry_run_under_autocast_takes_no_gradients_from_the_first_batch():
    # PyTorch before 2.11 keeps the weights that it casts without gradients, as the dry run does, until autocast ends.
    students, ann, (x, y) = [folded()], teacher(), batch()
    students.append(copy.deepcopy(students[0]))
    for student, example in zip(students, (None, x), strict=True):
        distiller = Distiller(student, ann, [LogitKD()], example_inputs=example)
        with torch.autocast("cpu", torch.bfloat16):
            result = distiller(x, y)
        result.loss.backward()
    for a, b in zip(*(s.parameters() for s in students), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_batch_without_labels_where_the_task_has_no_weight():
    x, y = batch()
    distiller = Distiller(folded(), teacher(), [LogitKD(weight=0.5)], task_weight=0.0, example_inputs=x)
    result = distiller(x, torch.full_like(y, -100))
    assert torch.equal(result.loss, result.weighted["logit_kd"])
    result.loss.backward()
    assert all(p.grad.isfinite().all() for p in distiller.student.parameters())


def test_layers_are_known_by_each_of_their_names():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = folded()
            self.last = self.net[6]

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    x, y = batch()
    losses = [SpatialSelfKD({"last": CLASSES, "net.6": CLASSES})]
    terms = Distiller(Named(), losses=losses, example_inputs=x)(x, y).terms
    assert list(terms) == ["task", "spatial_self_kd.last", "spatial_self_kd.net.6"]


def test_spikingjelly_student_and_a_spiking_teacher():
    sj = pytest.importorskip("spikingjelly.activation_based", reason="spikingjelly is not installed")
    from spikingjelly.activation_based import functional as sj_functional
    from spikingjelly.activation_based import layer, neuron

    def network(hidden: int) -> nn.Module:
        net = nn.Sequential(
            *(layer.Conv2d(1, hidden, 3, padding=1), layer.BatchNorm2d(hidden), neuron.IFNode()),
            *(layer.Flatten(), layer.Linear(hidden * 64, CLASSES)),
        )
        sj_functional.set_step_mode(net, "m")
        return net

    assert sj is not None
    student, spiking = network(6), network(9)
    x, y = 3 * torch.randn(T, B, 1, 8, 8), torch.randint(CLASSES, (B,))
    keys = list(student.state_dict())
    reference = copy.deepcopy(student)
    losses = [LogitKD(per_step=True), FeatureKD({"2": "2"}), SpatialSelfKD({"2": CLASSES}), TemporalSelfKD(T, 2)]
    distiller = Distiller(student, spiking, losses, teacher_input=nn.Identity(), example_inputs=x)
    sj_functional.reset_net(reference)
    z = reference(x)
    for _ in range(2):  # a second batch needs the states reset
        result = distiller(x, y)
        distiller.zero_grad()
        result.loss.backward()
        assert torch.equal(result.output, z[:2])
    sj_functional.reset_net(spiking)
    assert close(result.terms["logit_kd"], kl(z[:2], spiking(x).mean(0), 4.0))
    (bridge,) = distiller.losses["feature_kd"].adapters
    sj_functional.reset_net(student)
    with torch.no_grad():
        spikes = student[:3](x)[:2].mean(0)  # of the steps of inference only
        sj_functional.reset_net(spiking)
        target = spiking[:3](x).mean(0)
        wanted = ((bridge.bridge(spikes) - target) ** 2).mean()
    assert close(result.terms["feature_kd.2"], wanted.item())
    assert student[0].weight.grad.abs().sum() > 0
    assert list(student.state_dict()) == keys
    copy.deepcopy(distiller)


@pytest.mark.parametrize("library", ["snntorch", "sinabs"])
def test_states_of_other_libraries_students_are_reset(library):
    peer = pytest.importorskip(library, reason=f"{library} is not installed")

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
            if library == "snntorch":
                self.neuron = peer.Leaky(beta=0.9, init_hidden=True)
            else:
                self.neuron = importlib.import_module("sinabs.layers").LIF(tau_mem=5.0)

        def forward(self, x):
            x = self.fc(x)
            if library == "snntorch":
                return self.out(torch.stack([self.neuron(step) for step in x]))
            return self.out(self.neuron(x.transpose(0, 1)).transpose(0, 1))

    x, y = 3 * torch.randn(5, 4, 6), torch.tensor([0, 1, 2, 0])
    distiller = Distiller(Student(), losses=[ConfidenceKD()], example_inputs=x)
    want = Student()(x)
    for samples in (4, 2, 4):
        result = distiller(x[:, :samples], y[:samples])
        assert torch.equal(result.output, want[:, :samples])
        result.loss.backward()


def test_training_goes_down_and_the_student_works_alone():
    x, y = batch(12)
    student = folded()
    losses = [LogitKD(2.0, 0.3), FeatureKD({"6": "2"}, 0.1), ConfidenceKD(weight=0.1)]
    distiller = Distiller(student, teacher(), losses, task_weight=0.7, example_inputs=x)
    optimizer = torch.optim.Adam(distiller.parameters(), 1e-2)
    first = None
    for _ in range(15):
        result = distiller(x, y)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        first = result.terms["task"].item() if first is None else first
    assert result.terms["task"].item() < first / 2
    fresh = folded()
    fresh.load_state_dict(student.state_dict())
    functional.reset_net(student)
    assert torch.equal(fresh.eval()(x), student.eval()(x))


@pytest.mark.parametrize("compiled_before", [False, True])
def test_a_compiled_student_distils_by_logits_and_layers(compiled_before):
    x, y = batch()
    student, ann = folded(), teacher()
    other = copy.deepcopy(student)
    compiled = torch.compile(student, backend="eager")
    if compiled_before:  # without hooks, in its other mode
        compiled.eval()(x)
        functional.reset_net(student)
        compiled.train()
    losses = [LogitKD(), FeatureKD({"6": "2"}), SpatialSelfKD({"3": CLASSES}), TemporalSelfKD(6, T)]
    one, two = (Distiller(s, ann, losses, example_inputs=x) for s in (compiled, other))
    two.losses.load_state_dict(one.losses.state_dict())
    for _ in range(2):
        results = [one(x, y), two(x, y)]
        for name, term in results[0].terms.items():
            torch.testing.assert_close(term, results[1].terms[name])
    assert one.eval()(x, y).output.shape == (T, B, CLASSES)


def test_two_of_a_kind_have_two_names_and_probabilities_are_labels():
    x, y = batch()
    losses = [LogitKD(2.0), LogitKD(6.0, per_step=True)]
    distiller = Distiller(folded(), teacher(), losses, example_inputs=x)
    assert list(distiller(x, y).terms) == ["task", "logit_kd", "logit_kd_2"]
    torch.testing.assert_close(distiller(x, F.one_hot(y, CLASSES).float()).loss, distiller(x, y).loss)
    y[0] = -100
    assert distiller(x, y).loss.isfinite()


def test_losses_of_one_name_are_all_kept():
    class Softer(LogitKD):
        pass

    class Task(DistillationLoss):
        name = "task"

        def forward(self, batch):
            return {"task": (1.0, batch.logits.sum())}

    class Second(Softer):
        name = "logit_kd_2"

    losses = [Second(), LogitKD(), Softer(6.0), LogitKD(), Task()]
    terms = Distiller(folded(), teacher(), losses)(*batch()).terms
    assert list(terms) == ["task", "logit_kd_2", "logit_kd", "logit_kd_3", "logit_kd_4", "task_2"]


def test_counts_of_events_reach_the_teacher_as_their_mean():
    class Counts(TimeFirst):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    x, student, ann = torch.randint(3, (T, B, 6), dtype=torch.uint8), Counts(), nn.Linear(6, CLASSES)
    distiller = Distiller(student, ann, [LogitKD()], example_inputs=x)
    torch.testing.assert_close(distiller.teacher_logits(x), ann(x.float().mean(0)))


def test_terms_of_a_loss_of_ones_own_are_all_kept_whatever_their_names():
    class Mine(DistillationLoss):
        name = "mine"

        def forward(self, batch):
            zero = batch.logits.sum() * 0
            return {"mine": (1.0, zero + 1), "mine.b": (1.0, zero + 2), "c": (1.0, zero + 4), "mined": (1.0, zero + 8)}

    distiller = Distiller(folded(), losses=[Mine(), Mine()], task_weight=0.0)
    found = {name: round(value.item()) for name, value in distiller(*batch()).weighted.items()}
    once = {"mine": 1, "mine.b": 2, "mine.c": 4, "mine.mined": 8}
    assert found == {"task": 0, **once, **{k.replace("mine", "mine_2", 1): v for k, v in once.items()}}
