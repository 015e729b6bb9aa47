"""Distillation: each loss against its formula written out in NumPy, and nothing left behind in the models."""

from __future__ import annotations

import copy
import importlib
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnfast
from snnfast import functional, surrogate
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

T, B, CLASSES = 4, 6, 5


def lif(**kwargs) -> snnfast.LIFNode:
    return snnfast.LIFNode(decay_input=False, v_reset=None, surrogate_function=surrogate.Rect(), **kwargs)


class Repeat(nn.Module):
    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(self.timesteps, *[1] * (x.dim() - 1))


def folded(channels: int = 8, timesteps: int = T) -> nn.Sequential:
    """[B, 1, 8, 8] -> [T * B, C], as a network whose ReLUs were replaced."""
    net = nn.Sequential(
        *(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), Repeat(timesteps), lif(timesteps=timesteps)),
        *(nn.Conv2d(channels, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), lif(timesteps=timesteps)),
        nn.Flatten(),
        nn.Linear(8 * 16, CLASSES),
    )
    nn.init.normal_(net[-1].weight, std=0.5)  # divergences well above rounding
    return net


class Stepped(nn.Module):
    """The same layers, called once per time step, [B, ...] each; gives [T, B, C]."""

    def __init__(self, net: nn.Sequential, timesteps: int = T) -> None:
        super().__init__()
        self.net, self.T = copy.deepcopy(net), timesteps
        for module in self.net.modules():
            if isinstance(module, BaseNode):
                module.timesteps, module.step_mode = None, "s"
            if isinstance(module, Repeat):
                module.timesteps = 1

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.net(x) for _ in range(self.T)])


class TimeFirst(nn.Module):
    """[T, B, 6] -> [T, B, C], with no module that knows T."""

    def __init__(self, hidden: int = 7) -> None:
        super().__init__()
        self.fc, self.neuron, self.out = nn.Linear(6, hidden), lif(step_mode="m"), nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.neuron(self.fc(x)))


def teacher(channels: int = 12, classes: int = CLASSES, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, channels, 3, padding=1, stride=stride), nn.BatchNorm2d(channels), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    )


def batch(n: int = B) -> tuple[Tensor, Tensor]:
    return 2 * torch.randn(n, 1, 8, 8), torch.randint(CLASSES, (n,))


# ---- formulas, in float64 and without torch ----
def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(student, target, tau):
    """tau^2 * sum_c p log(p / q), mean over everything else."""
    q, p = (softmax(z.detach().numpy().astype(np.float64) / tau) for z in (student, target))
    p = np.broadcast_to(p, q.shape)
    return tau**2 * (p * np.log(p / q)).sum(-1).mean()


def cross_entropy(z, labels):
    p = softmax(z.detach().numpy().astype(np.float64))
    return -np.log(p[np.arange(len(p)), labels.numpy()]).mean()


def close(a: Tensor, b: float) -> bool:
    return abs(a.item() - b) <= 1e-5 * (0.1 + abs(b))  # of float32 logits


@pytest.mark.parametrize("per_step", [False, True])
def test_logit_kd_is_the_formula(per_step):
    student, ann, (x, y) = folded(), teacher(), batch()
    distiller = Distiller(student, ann, [LogitKD(3.0, 0.7, per_step)], task_weight=0.3, example_inputs=x)
    result = distiller(x, y)
    output = result.output
    assert output.shape == (T, B, CLASSES)
    target = ann(x)  # in eval mode, as the Distiller left it
    wanted = kl(output, target[None], 3.0) if per_step else kl(output.mean(0), target, 3.0)
    task = cross_entropy(output.mean(0), y)
    assert list(result.terms) == list(result.weighted) == ["task", "logit_kd"]
    assert close(result.terms["logit_kd"], wanted)
    assert close(result.weighted["logit_kd"], 0.7 * wanted)
    assert close(result.terms["task"], task)
    assert close(result.loss, 0.3 * task + 0.7 * wanted)


def test_the_output_is_that_of_the_student_alone_and_gradients_stay_out_of_the_teacher():
    student, ann, (x, y) = folded(), teacher(), batch()
    alone = copy.deepcopy(student)
    losses = [LogitKD(), FeatureKD({"6": "2"}), SpatialSelfKD({"3": CLASSES})]
    distiller = Distiller(student, ann, losses, example_inputs=x)
    result = distiller(x, y)
    assert torch.equal(result.output, alone(x).unflatten(0, (T, B)))
    result.loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in ann.parameters())
    assert not ann.training
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student[:4].parameters() if p.dim() > 1)
    learned = [p for name, p in distiller.named_parameters() if name.startswith("losses.")]
    assert len(learned) == 4  # a convolution and a classifier, with biases
    assert all(p.grad.abs().sum() > 0 for p in learned)
    owned = {id(p) for p in distiller.parameters()}
    assert owned == {id(p) for p in (*student.parameters(), *learned)}


def test_feature_kd_is_the_formula_with_channels_space_and_several_pairs():
    student, ann, (x, y) = folded(), teacher(channels=8, stride=1), batch()
    # (8 at 8 x 8 against 8 at 8 x 8: nothing between), (8 at 4 x 4 against 8 at 8 x 8: pooling of the teacher)
    distiller = Distiller(student, ann, [FeatureKD({"3": "2", "6": "0"}, weight=0.5)], example_inputs=x)
    assert not list(distiller.losses.parameters())
    result = distiller(x, y)
    functional.reset_net(student)
    features = {}
    for name in ("3", "6"):
        student.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: features.update({name: o}))
    student(x)
    first, second = (
        features[k].detach().numpy().reshape(T, B, 8, *s).mean(0) for k, s in (("3", (8, 8)), ("6", (4, 4)))
    )
    deep = ann[0](x).detach().numpy()
    shallow = np.maximum(ann[1](torch.from_numpy(deep)).detach().numpy(), 0)
    pooled = deep.reshape(B, 8, 4, 2, 4, 2).mean((3, 5))
    assert close(result.terms["feature_kd.3"], ((first - shallow) ** 2).mean())
    assert close(result.terms["feature_kd.6"], ((second - pooled) ** 2).mean())
    assert close(
        result.loss, result.terms["task"].item() + sum(result.weighted[f"feature_kd.{k}"].item() for k in "36")
    )

    distiller = Distiller(student, teacher(12, stride=2), [FeatureKD({"3": "2"})], example_inputs=x)
    (adapter,) = distiller.losses["feature_kd"].adapters
    assert [tuple(p.shape) for p in adapter.parameters()] == [(12, 8, 1, 1), (12,)]
    result = distiller(x, y)
    small = first.reshape(B, 8, 4, 2, 4, 2).mean((3, 5))
    weight, bias = (p.detach().numpy() for p in adapter.bridge.parameters())
    bridged = np.einsum("bchw,oc->bohw", small, weight[:, :, 0, 0]) + bias[:, None, None]
    target = distiller.teacher[:3](x).numpy()
    assert close(result.terms["feature_kd.3"], ((bridged - target) ** 2).mean())


def test_features_per_step_folded_and_time_first_are_the_same():
    net, ann, (x, y) = folded().eval(), teacher(), batch()  # eval: batch norm over steps apart or together is the same
    losses = [FeatureKD({"6": "2"}), SpatialSelfKD({"6": CLASSES}), LogitKD(per_step=True)]
    stepped = Stepped(net)
    torch.manual_seed(1)
    one = Distiller(net, ann, losses, example_inputs=x)
    torch.manual_seed(1)
    named = [FeatureKD({"net.6": "2"}), SpatialSelfKD({"net.6": CLASSES}), LogitKD(per_step=True)]
    two = Distiller(stepped, ann, named, example_inputs=x)
    for distiller in (one, two):
        for module in distiller.student.modules():
            module.training = False
    results = [one(x, y), two(x, y)]
    assert one._layouts["student", "6"] == "folded"
    assert two._layouts["student", "net.6"] == "steps"
    for a, b in zip(*(r.terms.values() for r in results), strict=True):
        torch.testing.assert_close(a, b)
    for result in results:
        result.loss.backward()
    for a, b in zip(net.parameters(), stepped.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_vectors_get_a_linear_and_time_first_inputs_reach_the_teacher_as_their_mean():
    student, x, y = TimeFirst(), torch.randn(T, B, 6), torch.randint(CLASSES, (B,))
    ann = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, CLASSES))
    seen = []
    ann.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    distiller = Distiller(student, ann, [FeatureKD({"neuron": "1"}), LogitKD()], example_inputs=x)
    seen.clear()
    result = distiller(x, y)
    assert len(seen) == 1  # once per batch
    torch.testing.assert_close(seen[0], x.mean(0))
    functional.reset_net(student)
    spikes = student.neuron(student.fc(x)).detach().mean(0).numpy()
    weight, bias = (p.detach().numpy() for p in distiller.losses.parameters())
    target = ann[:2](x.mean(0)).detach().numpy()
    assert weight.shape == (9, 7)
    assert close(result.terms["feature_kd.neuron"], ((spikes @ weight.T + bias - target) ** 2).mean())


def test_spatial_self_kd_is_the_formula():
    student, (x, y) = folded(), batch()
    distiller = Distiller(student, losses=[SpatialSelfKD({"3": CLASSES, "6": CLASSES}, 2.5, 0.4)], example_inputs=x)
    result = distiller(x, y)
    features = []
    student[3].register_forward_hook(lambda m, i, o: features.append(o))
    functional.reset_net(student)
    student(x)
    linear = distiller.losses["spatial_self_kd"].classifiers[0][-1]
    pooled = features[0].detach().reshape(T, B, 8, 2, 4, 2, 4).mean((0, 4, 6)).flatten(1)
    weak = pooled @ linear.weight.T + linear.bias
    assert close(result.terms["spatial_self_kd.3"], kl(weak, result.logits, 2.5))
    assert list(result.terms) == ["task", "spatial_self_kd.3", "spatial_self_kd.6"]
    # The target is fixed: without the task the layers after the classifier learn nothing.
    distiller.task_weight = 0.0
    distiller.zero_grad()
    distiller(x, y).loss.backward()
    assert student[8].weight.grad.abs().max() == 0
    assert student[0].weight.grad.abs().max() > 0


def test_per_step_kd_is_the_formula():
    student, ann, (x, y) = folded(), teacher(), batch()
    distiller = Distiller(student, ann, [PerStepKD(3.0, 0.2, 0.5)], task_weight=0.0, example_inputs=x)
    result = distiller(x, y)
    z, target = result.output, ann(x)
    wanted = {
        "per_step.task": np.mean([cross_entropy(z[t], y) for t in range(T)]),
        "per_step.teacher": np.mean([kl(z[t], target, 3.0) for t in range(T)]),
        "per_step.self": np.mean([kl(z[t], z.mean(0), 3.0) for t in range(T)]),
    }
    for name, value in wanted.items():
        assert close(result.terms[name], value)
    assert close(result.loss, np.dot([1.0, 0.2, 0.5], list(wanted.values())))
    assert "per_step.teacher" not in Distiller(student, None, [PerStepKD(weight=0.0)])(x, y).terms


def test_confidence_kd_takes_the_weakest_and_the_strongest_step_of_each_sample():
    logits = nn.Parameter(3 * torch.randn(T, B, CLASSES))

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = logits

        def forward(self, x: Tensor) -> Tensor:
            return self.logits + 0

    distiller = Distiller(Fixed(), losses=[ConfidenceKD(2.0, 1.5)], task_weight=0.0)
    result = distiller(torch.randn(B, 3), torch.zeros(B, dtype=torch.long))
    p = softmax(logits.detach().numpy()).max(-1)
    weak, strong = p.argmin(0), p.argmax(0)
    wanted = np.mean(
        [kl(logits[w, [b]], logits[s, [b]], 2.0) for b, (w, s) in enumerate(zip(weak, strong, strict=True))]
    )
    assert close(result.terms["confidence_kd"], wanted)
    assert close(result.loss, 1.5 * wanted)
    result.loss.backward()
    changed = logits.grad.abs().sum(-1) > 0
    assert changed.sum() == B
    assert all(changed[w, b] for b, w in enumerate(weak))  # only the weak ones learn


# ---- more time steps ----
def test_temporal_self_kd_runs_longer_in_training_only_and_puts_timesteps_back():
    student, (x, y) = folded(timesteps=2), batch()
    longer = folded(timesteps=5)
    longer.load_state_dict(student.state_dict())
    bare_keys = list(student.state_dict())
    distiller = Distiller(student, losses=[TemporalSelfKD(5, 2, 3.0, 0.6)], example_inputs=x)
    result = distiller(x, y)
    z = longer(x).unflatten(0, (5, B))
    assert torch.equal(result.output, z[:2])
    assert close(result.terms["temporal_self_kd"], kl(z[:2].mean(0), z.mean(0), 3.0))
    assert close(result.terms["task"], cross_entropy(z[:2].mean(0), y))
    assert [m.timesteps for m in student.modules() if hasattr(m, "timesteps")] == [2, 2, 2]
    assert list(student.state_dict()) == bare_keys
    for a, b in zip(student.buffers(), longer.buffers(), strict=True):
        assert torch.equal(a, b)
    distiller.eval()
    result = distiller(x, y)
    functional.reset_net(student)
    assert torch.equal(result.output, student(x).unflatten(0, (2, B)))
    assert list(result.terms) == ["task"]
    # The target is fixed: the loss moves what the first steps say, not what all say.
    distiller.train()
    distiller.task_weight = 0.0
    result = distiller(x, y)
    (grad,) = torch.autograd.grad(result.loss, student[8].bias)
    assert grad.abs().max() > 0


def test_timesteps_are_put_back_after_an_error():
    student, (x, _) = folded(timesteps=2), batch()
    distiller = Distiller(student, losses=[TemporalSelfKD(5, 2, batch_norm="per_step")], example_inputs=x)
    with pytest.raises(RuntimeError):
        distiller(x[:, :, :3], torch.zeros(B, dtype=torch.long))
    assert student[2].timesteps == 2
    assert "forward" not in vars(student[1])
    assert not student[3]._forward_hooks


def test_other_students_are_given_the_longer_input_and_cut_it_in_eval():
    student, x, y = TimeFirst(), torch.randn(5, B, 6), torch.randint(CLASSES, (B,))
    distiller = Distiller(student, losses=[TemporalSelfKD(5, 2)], example_inputs=x)
    z = TimeFirst.forward(student, x)
    functional.reset_net(student)
    result = distiller(x, y)
    assert torch.equal(result.output, z[:2])
    assert close(result.terms["temporal_self_kd"], kl(z[:2].mean(0), z.mean(0), 2.0))
    with pytest.raises(ValueError, match=r"inputs must have timesteps_teacher = 5 steps.*2"):
        distiller(x[:2], y)
    distiller.eval()
    for inputs in (x, x[:2]):
        torch.testing.assert_close(distiller(inputs, y).output, z[:2])


def test_batch_norm_of_the_student_steps_trains_as_without_the_longer_run():
    x, y = batch()
    plain, student = folded(timesteps=2), folded(timesteps=2)
    student.load_state_dict(plain.state_dict())
    one = Distiller(plain)(x, y)
    two = Distiller(student, losses=[TemporalSelfKD(5, 2, batch_norm="student")])(x, y)
    # Before Repeat nothing depends on the number of steps; after it only this mode agrees.
    assert torch.equal(one.output, two.output)
    for a, b in zip(plain.buffers(), student.buffers(), strict=True):
        assert torch.equal(a, b)
    student.load_state_dict(plain.state_dict())
    together = Distiller(student, losses=[TemporalSelfKD(5, 2)])(x, y)
    assert not torch.equal(one.output, together.output)


@pytest.mark.parametrize("time_first", [False, True])
def test_batch_norm_per_step_has_its_own_statistics_for_each_step(time_first):
    sj_layer = pytest.importorskip("spikingjelly.activation_based.layer", reason="spikingjelly is not installed")
    from snnfast.distill.extend import batch_norm_by_steps

    norm = sj_layer.BatchNorm2d(3, step_mode="m") if time_first else nn.BatchNorm2d(3)
    nn.init.uniform_(norm.weight)
    keys = list(norm.state_dict())
    x = torch.randn(5, B, 3, 4, 4) * torch.arange(1, 6).view(5, 1, 1, 1, 1) + torch.arange(5).view(5, 1, 1, 1, 1)
    with batch_norm_by_steps(norm, "per_step", 5, 2, B):
        y = norm(x if time_first else x.flatten(0, 1)).reshape(x.shape)
    mean, var = x.mean((1, 3, 4)), x.var((1, 3, 4), unbiased=False)
    wanted = (x - mean[:, None, :, None, None]) / (var[:, None, :, None, None] + norm.eps).sqrt()
    torch.testing.assert_close(y, wanted * norm.weight.view(3, 1, 1) + norm.bias.view(3, 1, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean[:2].mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var((1, 3, 4))[:2].mean(0))
    assert norm.num_batches_tracked == 1
    assert list(norm.state_dict()) == keys
    assert "forward" not in vars(norm)


# ---- nothing left behind ----
class Counting(nn.Module):
    """Changes a buffer and an attribute in every call, whatever its mode, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = (x + torch.rand(())).detach()
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


# ---- bad input ----
class Averaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = folded()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).unflatten(0, (T, -1)).mean(0)


class InPlace(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*teacher())
        self[2] = nn.ReLU(inplace=True)


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
    "batch norm by steps": (
        lambda: Distiller(
            nn.Sequential(snnfast.layer.ThresholdDependentBatchNorm2d(1.0, 1.0, 1)),
            losses=[TemporalSelfKD(4, 2, batch_norm="per_step")],
        ),
        r"batch_norm='per_step' does not work with ThresholdDependentBatchNorm2d in student \(at '0'\)",
    ),
    "batch norm": (lambda: TemporalSelfKD(4, 2, batch_norm="none"), r"batch_norm must be one of 'all'.* got 'none'"),
    "labels": (lambda: Distiller(folded())(X, Y + 5), r"labels must be from 0 to 4, got 5 to 5"),
    "labels below": (lambda: Distiller(folded())(X, Y - 1), r"labels must be from 0 to 4, got -1 to -1"),
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
