"""Distillation: each loss against its formula written out in NumPy, also where training runs more time steps."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distill_networks import (
    CLASSES,
    B,
    Stepped,
    T,
    TimeFirst,
    batch,
    close,
    cross_entropy,
    folded,
    kl,
    softmax,
    teacher,
)
from torch import Tensor, nn

import snnfast
from snnfast import functional
from snnfast.checkpoint import checkpoint
from snnfast.distill import (
    ConfidenceKD,
    Distiller,
    FeatureKD,
    LogitKD,
    PerStepKD,
    SpatialSelfKD,
    TemporalSelfKD,
    mean_over_time,
)
from snnfast.distill.losses import Batch
from snnfast.fused import BatchNormNode

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_container_that_ends_in_a_fused_batch_norm_is_a_layer():
    (x, y), net = batch(), folded()
    plain = nn.Sequential(net[:2], net[2], net[3], net[4:6], *net[6:])
    students = [plain, copy.deepcopy(plain)]
    assert len(snnfast.fuse(students[1]).fused) == 1
    distillers = [Distiller(s, teacher(), [SpatialSelfKD({"3": CLASSES})], example_inputs=x) for s in students]
    distillers[1].losses.load_state_dict(distillers[0].losses.state_dict())
    one, two = (d(x, y).terms for d in distillers)
    for name, term in one.items():
        torch.testing.assert_close(term, two[name])


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


def test_confidence_in_half_precision_is_that_of_the_same_logits_in_float32():
    logits = 3 * torch.randn(8, 50, 10).bfloat16()
    terms = [
        ConfidenceKD()(Batch(z, z, z.mean(0), torch.zeros(50).long(), mean_over_time, F.cross_entropy))
        for z in (logits, logits.float())
    ]
    torch.testing.assert_close(*(t["confidence_kd"][1] for t in terms))


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

    class BatchFirst(TimeFirst):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1))

    turned = BatchFirst()
    turned.load_state_dict(student.state_dict())
    x = x.transpose(0, 1)
    distiller = Distiller(turned, losses=[TemporalSelfKD(5, 2)], example_inputs=x)
    for training in (True, False):
        torch.testing.assert_close(distiller.train(training)(x, y).output, z[:2])


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


@pytest.mark.parametrize("batch_norm", ["all", "student", "per_step"])
@pytest.mark.parametrize("change", ["node", "fused", "checkpointed"])
def test_the_longer_run_of_fused_and_of_checkpointed_layers(change, batch_norm):
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self[1], checkpoint(self[0], x))

    (x, y), plain = batch(), folded()
    student = copy.deepcopy(plain)
    if change == "fused":
        assert len(snnfast.fuse(student).fused) == 1
    elif change == "node":
        student[5], student[6] = BatchNormNode(student[5], student[6]), nn.Identity()
    else:
        student = Checkpointed(student[:5], student[5:])
    for net in (plain, student):
        result = Distiller(net, losses=[TemporalSelfKD(6, T, batch_norm=batch_norm)])(x, y)
        result.loss.backward()
    for a, b in zip(plain.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    for a, b in zip(plain.buffers(), student.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert {m.timesteps for m in student.modules() if hasattr(m, "timesteps")} == {T}
    if change != "fused":
        assert not any("forward" in vars(m) for m in student.modules())


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
