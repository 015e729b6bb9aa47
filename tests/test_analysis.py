"""Synaptic operations by brute force, corruptions and robustness, firing rates, sizes, plots."""

from __future__ import annotations

import itertools
import json
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import snnfast
from snnfast import analysis, functional
from snnfast.analysis import corruptions
from snnfast.surrogate import ATan

T, B = 3, 2


# ---- synaptic operations ----
def brute_force(layer, x):
    """Operations of one call, connection by connection: every weight that is not zero, at every place it is used."""
    used = layer.weight.detach() != 0
    if isinstance(layer, nn.Linear):
        return sum(int((used & row[None]).sum()) for row in (x != 0).reshape(-1, layer.in_features))
    space = used.dim() - 2
    x = (x != 0).reshape(-1, *x.shape[-space - 1 :])
    size, stride, dilation = used.shape[2:], layer.stride, layer.dilation
    total, groups = 0, layer.groups
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        out = layer(torch.zeros(1, *x.shape[1:])).shape[2:]
        for spot in itertools.product(*(range(n) for n in x.shape[2:])):
            for k in itertools.product(*(range(n) for n in size)):
                to = [
                    p * s - pad + i * d
                    for p, s, pad, i, d in zip(spot, stride, layer.padding, k, dilation, strict=True)
                ]
                if all(0 <= t < n for t, n in zip(to, out, strict=True)):
                    active = x[(slice(None), slice(None), *spot)]  # [N, C_in]
                    total += int((active[:, :, None] & used[(slice(None), slice(None), *k)][None]).sum())
        return total
    padding = [(layer.kernel_size[0] - 1) * dilation[0] // 2] * space if layer.padding == "same" else layer.padding
    if layer.padding_mode == "zeros":
        x = F.pad(x.float(), [p for p in reversed(padding) for _ in range(2)])
    else:
        x = F.pad(x.float(), [p for p in reversed(padding) for _ in range(2)], mode=layer.padding_mode)
    x = x != 0
    counts = [(n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(x.shape[2:], dilation, size, stride, strict=True)]
    c_out, c_in = used.shape[0] // groups, used.shape[1]
    for spot in itertools.product(*(range(n) for n in counts)):
        for k in itertools.product(*(range(n) for n in size)):
            place = [p * s + i * d for p, s, i, d in zip(spot, stride, k, dilation, strict=True)]
            active = x[(slice(None), slice(None), *place)]
            for g in range(groups):
                a = active[:, g * c_in : (g + 1) * c_in]
                w = used[(slice(g * c_out, (g + 1) * c_out), slice(None), *k)]
                total += int((a[:, None] & w[None]).sum())
    return total


def record(net, run):
    """Inputs of every connection, in the order of calls, by hooks of our own."""
    inputs = []
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    hooks = [
        m.register_forward_pre_hook(lambda m, args, name=name: inputs.append((name, args[0].detach().clone())))
        for name, m in net.named_modules()
        if isinstance(m, kinds)
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    functional.reset_net(net)
    return inputs


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    space=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from((0, 1, "same")),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(("zeros", "zeros", "reflect", "circular")),
    rate=st.floats(0.0, 1.0),
    binary=st.booleans(),
    extra_time=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_convolutions_against_brute_force(
    space, transposed, groups, kernel, stride, padding, dilation, mode, rate, binary, extra_time, seed
):
    torch.manual_seed(seed)
    if transposed:
        padding, mode = (0 if padding == "same" else min(padding, dilation * (kernel - 1))), "zeros"
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[space - 1]
    else:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[space - 1]
    if padding == "same":
        stride, kernel = 1, kernel | 1
    layer = kind(2 * groups, 3 * groups, kernel, stride, padding, groups=groups, dilation=dilation, padding_mode=mode)
    with torch.no_grad():
        layer.weight[torch.rand(layer.weight.shape) < 0.3] = 0.0
    x = (torch.rand(4, 2 * groups, *(6, 5, 5)[:space]) < rate).float()
    x = x if binary else x * torch.rand(x.shape)
    expected = brute_force(layer, x)
    spiking = bool(((x == 0) | (x == 1)).all())
    if extra_time:  # [T, B, C, *], as SpikingJelly's layers take it

        class Folding(kind):
            def forward(self, x):
                return super().forward(x.flatten(0, 1))

        layer.__class__ = Folding
        x = x.unflatten(0, (2, 2))
    (found,) = analysis.count_synops(layer, x).layers
    assert (found.acs if spiking else found.macs) == expected
    assert (found.macs if spiking else found.acs) == 0
    with torch.no_grad():
        layer.weight.fill_(1.0)
    layer.__class__ = kind
    assert found.dense == brute_force(layer, torch.ones_like(x).reshape(4, 2 * groups, *x.shape[-space:]))
    assert found.rate == pytest.approx((x != 0).float().mean().item())


class Block(nn.Module):
    def __init__(self, neuron):
        super().__init__()
        self.conv1, self.sn1 = nn.Conv2d(3, 3, 3, padding=1), neuron()
        self.conv2, self.sn2 = nn.Conv2d(3, 3, 3, padding=1), neuron()

    def forward(self, x):
        return self.sn2(self.conv2(self.sn1(self.conv1(x)))) + x


def residual(neuron):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        neuron(),
        Block(neuron),
        Block(neuron),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4),
        neuron(),
    )
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(m.weight, 1.5 / m.weight[0].numel(), 2 / m.weight[0].numel() ** 0.5)
    return net


def test_residual_network_folded_and_single_step_against_brute_force():
    x = torch.rand(T, B, 1, 6, 6)
    single, folded = residual(snnfast.IFNode), residual(lambda: snnfast.IFNode(timesteps=T))
    for net, fed, run in (
        (single, x, lambda: [single(x_t) for x_t in x]),
        (folded, x.flatten(0, 1), lambda: folded(x.flatten(0, 1))),
    ):
        expected = {}
        for name, value in record(net, run):
            spiking = bool(((value == 0) | (value == 1)).all())
            macs, acs = expected.get(name, (0, 0))
            n = brute_force(net.get_submodule(name), value)
            expected[name] = (macs, acs + n) if spiking else (macs + n, acs)
        report = analysis.count_synops(net, fed)
        assert {layer.name: (layer.macs, layer.acs) for layer in report.layers} == expected
        assert (report.samples, report.timesteps) == (B, T)
        assert report.synops == sum(map(sum, expected.values())) / B
        energy = sum(4.6 * macs + 0.9 * acs for macs, acs in expected.values()) / B
        assert report.energy == pytest.approx(energy)
        assert report.acs > 0
        assert report.macs > 0
    assert report.layers[0].macs == report.layers[0].dense  # the first layer multiplies


def test_multi_step_networks_and_loaders():
    net = nn.Sequential(nn.Linear(5, 6), snnfast.LIFNode(step_mode="m"), nn.Linear(6, 2))
    x = torch.rand(T, 4, 5) * 3
    whole = analysis.count_synops(net, x)
    parts = analysis.count_synops(net, [(x[:, :3], None), (x[:, 3:], None)])
    assert whole.to_dict() == {**parts.to_dict(), "samples": 4}
    assert (parts.samples, parts.timesteps) == (4, T)


def test_spikingjelly_models():
    pytest.importorskip("spikingjelly.activation_based", reason="spikingjelly is not installed")
    from spikingjelly.activation_based import functional as sj_functional
    from spikingjelly.activation_based import layer, neuron

    def build(layers, neurons):
        torch.manual_seed(0)
        return nn.Sequential(
            layers.Conv2d(1, 3, 3), neurons.LIFNode(tau=1.5), layers.Flatten(), layers.Linear(48, 4), neurons.IFNode()
        )

    single = build(nn, snnfast)
    multi = build(layer, neuron)
    sj_functional.set_step_mode(multi, "m")
    x = torch.rand(T, B, 1, 6, 6) * 4
    a, b = analysis.count_synops(single, x), analysis.count_synops(multi, x)
    assert a.to_dict() == b.to_dict()
    assert a.acs > 0
    assert multi[1].v == 0.0


def test_the_network_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), snnfast.LIFNode(), nn.Dropout(), nn.Linear(6, 2))
    net[1].eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    analysis.count_synops(net, torch.rand(T, B, 5))
    assert [m.training for m in net] == [True, False, True, True, True]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert net[2].v == 0.0
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        analysis.count_synops(net, torch.rand(T, B, 4))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    assert [m.training for m in net] == [True, False, True, True, True]


def test_a_forward_of_ones_own():
    lstm_like = nn.Linear(4, 4)

    def run(model, x):
        h = torch.zeros(B, 4)
        for x_t in x:
            h = (model(x_t + h) > 0).float()

    report = analysis.count_synops(lstm_like, torch.rand(T, B, 4), forward=run, samples=B)
    assert report.layers[0].calls == T
    assert report.dense == T * 16


def test_report_reads_well():
    report = analysis.count_synops(residual(lambda: snnfast.IFNode(timesteps=T)), torch.rand(T * B, 1, 6, 6))
    text = str(report)
    assert "estimate" in text
    assert "Horowitz" in text
    assert len({len(line) for line in text.splitlines()[1:4]}) == 1
    for layer in report.layers:
        assert layer.name in text
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["kind"] == "Conv2d"


def test_count_synops_refuses():
    with pytest.raises(TypeError, match=r"model must be .*got list"):
        analysis.count_synops([], torch.rand(1))
    with pytest.raises(TypeError, match=r"x must be .*str"):
        analysis.count_synops(nn.Linear(1, 1), ["x"])
    with pytest.raises(ValueError, match=r"at least one Linear"):
        analysis.count_synops(nn.ReLU(), torch.rand(1))
    with pytest.raises(TypeError, match=r"forward must be"):
        analysis.count_synops(nn.Linear(1, 1), torch.rand(1), forward=3)


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
def classifier(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(2), nn.Linear(16, 8), snnfast.LIFNode(step_mode="m", tau=1.5), nn.Linear(8, 3))
    for layer in (net[1], net[3]):  # strong enough for its answers to depend on the image
        nn.init.normal_(layer.weight, 0.05)
        nn.init.zeros_(layer.bias)
    return net


def predict(model, x):
    return model(x.expand(T, *x.shape)).mean(0)


DATA = (torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3)


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


def test_intervals():
    scipy = pytest.importorskip("scipy.stats")
    for k, n in ((0, 10), (9, 10), (10, 10), (437, 1000)):
        expected = scipy.binomtest(k, n).proportion_ci(0.9, method="wilson")
        assert analysis.wilson_interval(k / n, n, 0.9) == pytest.approx((expected.low, expected.high), abs=1e-12)
    correct = torch.zeros(1, 400)
    correct[0, :100] = 1.0
    report = analysis.RobustnessReport(
        ["a", "b"], {"c": [0.0]}, {"a": {"c": correct}, "b": {"c": torch.zeros(1, 400)}}, 0.95, (0,)
    )
    ((mean, low, high),) = report.difference("a", "b", "c")
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
    "labels": ({"data": (DATA[0], DATA[1][:3])}, r"as many labels as images, got 3 and 40"),
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


# ---- firing rates ----
def spiking_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16),
        snnfast.LIFNode(step_mode="m", surrogate_function=ATan()),
        nn.Linear(16, 16),
        snnfast.IFNode(step_mode="m"),
    )


def test_firing_rate_monitor():
    net = spiking_net()
    x = torch.rand(2, T, B, 6) * 4
    with analysis.FiringRateMonitor(net) as monitor:
        spikes = []
        for x_call in x:
            functional.reset_net(net)
            h = net[1](net[0](x_call))
            spikes.append((h, net[3](net[2](h))))
            h.sum().backward()  # in training
        expected = [torch.stack([s[i] for s in spikes]).mean().item() for i in range(2)]
        assert monitor.rates() == pytest.approx(dict(zip("13", expected, strict=True)))
        assert monitor.mean() == pytest.approx(sum(expected) / 2)
        assert min(expected) > 0
        monitor.clear()
        assert monitor.rates() == {}
    net(x[0])
    assert monitor.rates() == {}
    assert not any(m._forward_hooks for m in net.modules())
    with pytest.raises(ValueError, match=r"spiking neurons.*types="):
        analysis.FiringRateMonitor(nn.Linear(1, 1))


def test_peers_neurons_are_found():
    found = []
    snn = pytest.importorskip("snntorch", reason="snntorch is not installed")
    norse = pytest.importorskip("norse.torch", reason="norse is not installed")
    sinabs = pytest.importorskip("sinabs.layers", reason="sinabs is not installed")
    sj = pytest.importorskip("spikingjelly.activation_based.neuron", reason="spikingjelly is not installed")
    for neuron in (snn.Leaky(0.9), norse.LIFCell(), norse.LIFBoxCell(), sinabs.IAF(), sj.LIFNode()):
        with analysis.FiringRateMonitor(nn.Sequential(nn.Linear(3, 3), neuron)) as monitor, torch.no_grad():
            x = torch.full((2, 4, 3), 2.0)
            neuron(x)
            found.append(monitor.rates())
    assert all(list(rates) == ["1"] and 0 <= rates["1"] <= 2 for rates in found)
    assert found[-1] == {"1": 1.0}


@pytest.mark.parametrize("target", [0.05, 0.4])
def test_firing_rate_regulariser_reaches_its_target(target):
    net, x = spiking_net(), torch.rand(8, 16, 6) * 2
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    with analysis.FiringRateRegulariser(net, target, weight=2.0) as regulariser:
        for step in range(80):
            functional.reset_net(net)
            h = net[1](net[0](x))
            out = net[3](net[2](h))
            loss = regulariser.loss()
            expected = 2.0 * ((h.mean() - target) ** 2 + (out.mean() - target) ** 2) / 2
            assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
            if step == 0:
                grads = torch.autograd.grad(expected, net.parameters(), retain_graph=True)
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                for p, g in zip(net.parameters(), grads, strict=True):
                    assert torch.allclose(p.grad, g, atol=1e-7)
            optimizer.step()
        with torch.no_grad():
            net(x)  # an evaluation in between does not count
        with pytest.raises(RuntimeError, match="must run with gradients"):
            regulariser.loss()
    assert abs(h.mean().item() - target) < 0.03
    assert abs(out.mean().item() - target) < 0.03
    double = spiking_net().double()
    with analysis.FiringRateRegulariser(double, 0.1) as regulariser:
        double(x.double())
        assert regulariser.loss().dtype == torch.float64
    for wrong in ({"target": 1.5}, {"target": 0.1, "weight": -1.0}):
        with pytest.raises(ValueError, match="must be"):
            analysis.FiringRateRegulariser(net, **wrong)


# ---- sizes ----
def test_parameter_table():
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.BatchNorm1d(3), snnfast.ParametricLIFNode(), shared, nn.Linear(3, 2, bias=False))
    net[4].weight.requires_grad_(False)
    report = analysis.parameter_table(net)
    assert report.parameters == sum(p.numel() for p in net.parameters()) == 12 + 6 + 1 + 6
    assert report.trainable == 19
    assert report.bytes == 4 * (25 + 6) + 8
    assert [layer[0] for layer in report.layers] == ["0", "1", "2", "4"]
    assert "ParametricLIFNode" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["parameters"] == 25


def test_saved_bytes():
    x = torch.randn(8, 4, 100)
    lif = snnfast.LIFNode(step_mode="m", backend="native")
    if reason := snnfast.neuron.backends.KERNELS[0].missing(torch.device("cpu")):
        pytest.skip(reason)
    given = (x * 1).requires_grad_()
    assert analysis.saved_bytes(lif, given) == x.numel() * 4  # the input, and nothing else
    lif.reset()
    lif.backend = "reference"
    assert analysis.saved_bytes(lif, given) >= 3 * x.numel() * 4
    net = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    rows = x.flatten(0, 1)
    assert analysis.saved_bytes(net, rows) == 32 * (100 + 50) * 4  # the input, and ReLU's output, once; no weights
    view = torch.randn(10, 10, requires_grad=True)
    assert analysis.saved_bytes(lambda t: t[:2].sin() + t[5:7].cos(), view) == 400  # one storage, counted whole
    with torch.no_grad():
        assert analysis.saved_bytes(torch.sin, view) == 400
    discarded = lambda t: [None for _ in range(3) if (t * 1).sin() is None]  # noqa: E731 (memory that is used again)
    assert analysis.saved_bytes(discarded, view) == 3 * 400
    with pytest.raises(TypeError, match="function must be"):
        analysis.saved_bytes(3)


# ---- plots ----
def png_is_drawn(path):
    from matplotlib.image import imread

    image = imread(path)
    return image.shape[0] > 200 and image.shape[1] > 300 and image[..., :3].std() > 0.02


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    models = {"plain": classifier(0), "distilled": classifier(1)}
    levels = {"gaussian": [0.5], "salt_and_pepper": [0.1, 0.3]}
    report = analysis.robustness(models, DATA, predict=predict, corruptions=list(levels), levels=levels)
    figures = {
        "accuracy": lambda p: analysis.plot_accuracy({"plain": [0.5, 0.7], "distilled": [0.6, 0.75]}, p),
        "rates": lambda p: analysis.plot_firing_rates({"1": 0.1, "3": 0.2}, p),
        "two": lambda p: analysis.plot_firing_rates({"plain": {"1": 0.1}, "distilled": {"1": 0.2, "3": 0.1}}, p),
        "raster": lambda p: analysis.plot_raster(torch.rand(8, 16, 8, 8) < 0.1, p, title="layer 3"),
        "robustness": lambda p: analysis.plot_robustness(report, p),
    }
    for name, draw in figures.items():
        figure = draw(tmp_path / f"{name}.png")
        assert type(figure).__name__ == "Figure"
        assert png_is_drawn(tmp_path / f"{name}.png")
    axes = figures["robustness"](None).axes
    assert [a.get_title() for a in axes][:2] == ["gaussian", "salt and pepper"]
    assert axes[0].lines[1].get_ydata()[0] == pytest.approx(100 * report.accuracy("distilled", "gaussian")[0])
    raster = torch.zeros(5, 4)
    raster[2, 3] = 1.0
    (dash,) = analysis.plot_raster(raster).axes[0].collections[0].get_segments()
    assert dash.mean(0).tolist() == [2.0, 3.0]
    for wrong in (
        lambda: analysis.plot_accuracy({}),
        lambda: analysis.plot_firing_rates({}),
        lambda: analysis.plot_raster(torch.rand(5)),
    ):
        with pytest.raises(ValueError, match="must"):
            wrong()


def test_legends_of_many_long_names_leave_room_for_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    names = ["teacher", "plain", *(f"distilled-{n}" for n in ("logit", "per-step-confidence", "temporal-spatial"))]
    one = analysis.RobustnessReport(names, {"c": [0.0, 1.0]}, {n: {"c": torch.eye(2)} for n in names}, 0.95, (0,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where a layout cannot be made
        for figure in (
            analysis.plot_accuracy({n: [0.5, 0.7] for n in names}, tmp_path / "accuracy.png"),
            analysis.plot_firing_rates({n: {"layer1": 0.2} for n in names}, tmp_path / "rates.png"),
            analysis.plot_robustness(one, tmp_path / "robustness.png"),
        ):
            (legend,) = figure.legends
            assert [text.get_text() for text in legend.get_texts()] == names
            box = legend.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert figure.axes[0].get_window_extent().width > 0.6 * figure.bbox.width
            assert not box.overlaps(figure.axes[0].get_window_extent())


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install snnfast\[train\]"):
        analysis.plot_accuracy({"plain": [1.0]})
