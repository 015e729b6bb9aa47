"""Corruptions, and robustness against a loop of its own (snnfast.analysis)."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from analysis_networks import DATA, classifier, predict
from torch import nn

from snnfast import analysis, functional
from snnfast.analysis import corruptions

# ---- corruptions ----
IMAGES = torch.rand(16, 3, 12, 10, generator=torch.Generator().manual_seed(3))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_corruptions(name):
    corrupt, levels = corruptions.CORRUPTIONS[name], corruptions.LEVELS[name]
    assert torch.allclose(corrupt(IMAGES, 0.0, generator()), IMAGES, atol=1e-5)
    before, distances = IMAGES.clone(), []
    for level in levels:
        out = corrupt(IMAGES, level, generator())
        assert out.shape == IMAGES.shape
        assert out.dtype == IMAGES.dtype
        assert out.min() >= 0
        assert out.max() <= 1
        assert torch.equal(out, corrupt(IMAGES, level, generator()))
        distances.append((out - IMAGES).abs().mean().item())
    assert torch.equal(IMAGES, before)
    assert all(b > 0.98 * a for a, b in itertools.pairwise(distances))
    assert distances[-1] > 1.3 * distances[0]
    assert distances[0] > 0.005
    if name != "contrast":
        assert not torch.equal(corrupt(IMAGES, levels[0], generator(1)), corrupt(IMAGES, levels[0], generator()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
@pytest.mark.parametrize("shape", [(2, 3, 64, 48), (1, 1, 1, 8)])
def test_corruptions_in_other_precisions(name, dtype, shape):
    x = (torch.rand(shape, generator=generator(2)) * 255).round().div(256)  # the same number in each
    level = corruptions.LEVELS[name][1]
    single = corruptions.CORRUPTIONS[name](x, level, generator())
    out = corruptions.CORRUPTIONS[name](x.to(dtype), level, generator())
    assert out.dtype == dtype
    assert (out.float() - single).abs().max() < 0.02
    assert corruptions.CORRUPTIONS[name](torch.ones_like(x, dtype=dtype), level, generator()).max() <= 1


def test_corruptions_do_what_they_say():
    flat = torch.full((4, 1, 100, 100), 0.5)
    noise = corruptions.gaussian(flat, 0.1, generator()) - 0.5
    assert noise.std().item() == pytest.approx(0.1, rel=0.02)
    sp = corruptions.salt_and_pepper(flat, 0.2, generator())
    assert [(sp == v).float().mean().item() for v in (0.0, 1.0)] == pytest.approx([0.1, 0.1], abs=0.01)
    assert (corruptions.occlusion(flat, 0.3, generator()) == 0).float().mean().item() == pytest.approx(0.09)
    assert torch.equal(corruptions.background(flat * 2, 1.0, generator()), flat * 2)  # it lies behind the picture
    assert corruptions.background(flat * 0, 0.6, generator()).amax((1, 2, 3)).tolist() == pytest.approx([0.6] * 4)
    gradient = torch.linspace(0, 1, 5).expand(1, 1, 5, 5)
    assert torch.allclose(corruptions.contrast(gradient, 0.5, generator()), 0.25 + gradient / 2)


def test_rotation_turns_and_translation_shifts():
    dot = torch.zeros(64, 1, 21, 31)
    dot[:, :, 10, 20:23] = 1.0  # centre of mass 6 to the right of the centre (10, 15)

    def centre(x):
        rows, columns = torch.arange(21.0), torch.arange(31.0)
        mass = x.sum((1, 2, 3))
        return (x.sum((1, 3)) @ rows / mass - 10, x.sum((1, 2)) @ columns / mass - 15)

    y, x = centre(corruptions.rotation(dot, 90.0, generator()))
    assert torch.allclose(y.abs(), torch.full((64,), 6.0), atol=0.1)
    assert torch.allclose(x, torch.zeros(64), atol=0.1)
    assert set(y.sign().tolist()) == {-1.0, 1.0}
    y, x = centre(corruptions.rotation(dot, 30.0, generator()))
    assert torch.allclose((y * y + x * x).sqrt(), torch.full((64,), 6.0), atol=0.15)
    middle = torch.zeros(64, 1, 21, 31)
    middle[:, :, 9:12, 14:17] = 1.0
    y, x = centre(corruptions.translation(middle, 0.2, generator()))
    assert torch.allclose((y / 21).square() + (x / 31).square(), torch.full((64,), 0.04), atol=0.004)


# ---- robustness ----
def test_robustness_against_a_loop_of_its_own():
    models = {"a": classifier(0), "b": classifier(1)}
    levels = {"gaussian": [0.2, 0.4], "rotation": [30.0]}
    report = analysis.robustness(
        models, DATA, corruptions=list(levels), levels=levels, seeds=(3, 4), predict=predict, batch_size=40
    )
    assert report.models == ["a", "b"]
    assert report.levels == {"gaussian": [0.0, 0.2, 0.4], "rotation": [0.0, 30.0]}
    for name, model in models.items():
        for corruption, severities in report.levels.items():
            for i, level in enumerate(severities):
                accuracies = []
                for seed in (3, 4):
                    g = analysis.robustness.__globals__["_generator"](seed, corruption, 0)
                    x = corruptions.CORRUPTIONS[corruption](DATA[0], level, g) if level else DATA[0]
                    functional.reset_net(model)
                    with torch.no_grad():
                        accuracies.append((predict(model, x).argmax(1) == DATA[1]).float().mean().item())
                assert report.accuracy(name, corruption)[i] == pytest.approx(sum(accuracies) / 2)
                functional.reset_net(model)


def test_robustness_of_models_and_transforms_that_work_in_place():
    images = DATA[0].clone()
    model, other = classifier(0), classifier(1)
    spoiler = nn.Sequential(nn.Threshold(0.3, 0.0, inplace=True), classifier(2))
    arguments = {"corruptions": ["gaussian"], "predict": predict}
    alone = analysis.robustness({"b": model, "c": other}, DATA, transform=lambda x: x - 0.1, **arguments)
    models = {"a": spoiler, "b": model, "c": other}
    found = analysis.robustness(models, DATA, transform=lambda x: x.sub_(0.1), **arguments)
    assert torch.equal(DATA[0], images)
    for name in ("b", "c"):
        assert torch.equal(found.correct[name]["gaussian"], alone.correct[name]["gaussian"])


def test_robustness_is_paired_deterministic_and_leaves_the_models_alone():
    seen = {"a": [], "b": []}

    def watched(name):
        model = classifier(0)
        model.register_forward_pre_hook(lambda m, args: seen[name].append(args[0].clone()))
        return model

    models = {name: watched(name) for name in seen}
    models["a"].train()
    arguments = {"corruptions": ["gaussian", "occlusion"], "predict": predict, "batch_size": 16}
    first = analysis.robustness(models, DATA, **arguments)
    assert len(seen["a"]) == 3 * (1 + 2 * 5)
    assert all(torch.equal(x, y) for x, y in zip(seen["a"], seen["b"], strict=True))
    assert models["a"].training
    assert models["a"][2].v == 0.0
    torch.manual_seed(123)  # the global generator plays no part
    second = analysis.robustness(models, DATA, **arguments)
    assert first.to_dict() == second.to_dict()
    alone = analysis.robustness(models["b"], DATA, **{**arguments, "corruptions": ["occlusion"]})
    assert alone.accuracy("model", "occlusion") == first.accuracy("b", "occlusion")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*DATA), batch_size=16)
    assert analysis.robustness(models, loader, **arguments).to_dict() == first.to_dict()
    other = analysis.robustness(models, DATA, seeds=[9], **arguments)
    assert not torch.equal(other.correct["a"]["gaussian"], first.correct["a"]["gaussian"])
    assert all(d == (0.0, 0.0, 0.0) for d in first.difference("a", "b", "gaussian"))
    assert "Wilson" in str(first)
    assert json.loads(json.dumps(first.to_dict()))["samples"] == 40


def test_robustness_under_other_defaults():
    model = classifier(0)
    want = analysis.robustness(model, DATA, predict=predict)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = analysis.robustness(model, DATA, predict=predict)
        difference = got.difference("model", "model", "gaussian", 10)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert got.to_dict() == want.to_dict()
    assert difference == want.difference("model", "model", "gaussian", 10)


def test_intervals():
    scipy = pytest.importorskip("scipy.stats")
    for share in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="share must be from 0 to 1"):
            analysis.wilson_interval(share, 10)
    for k, n in ((0, 10), (9, 10), (10, 10), (437, 1000)):
        expected = scipy.binomtest(k, n).proportion_ci(0.9, method="wilson")
        assert analysis.wilson_interval(k / n, n, 0.9) == pytest.approx((expected.low, expected.high), abs=1e-12)
    correct = torch.zeros(1, 400)
    correct[0, :100] = 1.0
    report = analysis.RobustnessReport(
        ["a", "b"], {"c": [0.0]}, {"a": {"c": correct}, "b": {"c": torch.zeros(1, 400)}}, 0.95, (0,)
    )
    ((mean, low, high),) = report.difference("a", "b", "c")
    with pytest.raises(ValueError, match="resamples must be a whole number from 1, got 0"):
        report.difference("a", "b", "c", resamples=0)
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert (mean, low, high) == pytest.approx((0.25, 0.25 - half, 0.25 + half), abs=0.006)


ROBUSTNESS = {
    "unknown corruption": ({"corruptions": ["fog"]}, r"corruptions must be among gaussian, .*'fog'"),
    "levels of none": ({"corruptions": ["contrast"], "levels": {"fog": [1]}}, r"levels has \['fog'\]"),
    "negative level": ({"levels": {"gaussian": [-1.0]}}, r"levels must be at least 0"),
    "no levels": ({"corruptions": {"mine": lambda x, level, g: x}}, r"levels must give severities for 'mine'"),
    "confidence": ({"confidence": 95}, r"confidence must be between 0 and 1, got 95"),
    "no seed": ({"seeds": []}, r"seeds must hold"),
    "range": ({"data": (DATA[0] - 0.5, DATA[1])}, r"must lie in \[0, 1\].*transform="),
    "labels": ({"data": (DATA[0], DATA[1][:3])}, r"as many labels as images.*\(40,\), got \(3,\)"),
    "a column of labels": ({"data": (DATA[0], DATA[1][:, None])}, r"classes \[N\] = \(40,\), got \(40, 1\)"),
    "one label": ({"data": (DATA[0][:1], DATA[1][0])}, r"classes \[N\] = \(1,\), got \(\)"),
    "not a number": ({"data": (DATA[0] * float("nan"), DATA[1])}, r"must lie in \[0, 1\].*nan"),
    "batch size": ({"batch_size": 0}, r"batch_size must be a whole number from 1, got 0"),
    "no corruption": ({"corruptions": []}, r"corruptions must hold at least one"),
    "a tuple of logits": ({"predict": lambda m, x: (x,)}, r"predict must give logits.*got tuple"),
    "bytes": ({"data": (DATA[0].byte(), DATA[1])}, r"floating point \[N, C, H, W\].*uint8"),
    "empty": ({"data": (DATA[0][:0], DATA[1][:0])}, r"at least one image"),
    "logits": ({"predict": lambda m, x: x}, r"predict must give logits \[N, classes\]"),
}


@pytest.mark.parametrize("case", ROBUSTNESS)
def test_robustness_refuses(case):
    arguments, message = ROBUSTNESS[case]
    with pytest.raises(ValueError, match=message):
        analysis.robustness(classifier(0), **{"data": DATA, "predict": predict, **arguments})


def test_robustness_refuses_other_types():
    with pytest.raises(TypeError, match="models must be a network, or a dict of networks by name, got list"):
        analysis.robustness([classifier(0)], DATA)
    for wrong in ((DATA[0], DATA[1].tolist()), [DATA[0][:2]]):
        with pytest.raises(TypeError, match="data must be a pair of tensors, images and labels, or an iterable"):
            analysis.robustness(classifier(0), wrong)
    for argument, value in (
        ("seeds", 3),
        ("seeds", [0.5]),
        ("levels", [0.2]),
        ("levels", {"gaussian": 0.2}),
        ("corruptions", "gaussian"),
        ("data", 5),
    ):
        with pytest.raises(TypeError, match=f"{argument} must be"):
            analysis.robustness(classifier(0), **{"data": DATA, argument: value})


def test_seeds_of_numpy_go_to_json():
    numpy = pytest.importorskip("numpy")
    report = analysis.robustness(classifier(0), DATA, corruptions=["contrast"], seeds=numpy.arange(2), predict=predict)
    assert json.loads(json.dumps(report.to_dict()))["seeds"] == [0, 1]


def test_an_error_leaves_no_state_behind():
    def fails(model, x):
        raise KeyError(predict(model, x))

    net = classifier(0)
    with pytest.raises(KeyError):
        analysis.robustness(net, DATA, predict=fails)
    assert net[2].v == 0.0
    assert net.training


def test_empty_batches_are_passed_over():
    x, y = DATA
    options = {"corruptions": ["gaussian"], "predict": predict}
    report = analysis.robustness(classifier(0), [(x[:0], y[:0]), (x, y), (x[:0], y[:0])], **options)
    assert report.accuracy("model", "gaussian") == analysis.robustness(classifier(0), DATA, **options).accuracy(
        "model", "gaussian"
    )


def test_an_accuracy_over_many_seeds_is_at_most_1():
    def right(model, x):
        return torch.eye(3)[DATA[1][: len(x)]]

    report = analysis.robustness(
        nn.Identity(), DATA, corruptions=["contrast"], levels={"contrast": [0.1]}, seeds=range(10), predict=right
    )
    assert report.accuracy("model", "contrast") == [1.0, 1.0]
