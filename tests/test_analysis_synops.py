"""Synaptic operations against brute force, connection by connection (snnfast.analysis)."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import snnfast
from snnfast import analysis, functional
from snnfast.layer import ElementWiseRecurrentContainer, MultiStepContainer, SeqToANNContainer, StepModeContainer

T, B = 3, 2


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


@settings(max_examples=30)
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


@pytest.mark.parametrize(
    "contain",
    [
        lambda lin, node, last: MultiStepContainer(lin, node, last),
        lambda lin, node, last: StepModeContainer(True, "m", lin, node, last),
        lambda lin, node, last: StepModeContainer(True, "s", lin, node, last),
        lambda lin, node, last: nn.Sequential(
            SeqToANNContainer(lin), ElementWiseRecurrentContainer(node, lambda y, x: x, "m"), last
        ),
    ],
    ids=["multi-step", "step mode m", "step mode s", "recurrent"],
)
def test_containers_of_single_step_modules_take_all_steps_as_their_own_mode_says(contain):
    lin, last, x = nn.Linear(5, 6), nn.Linear(6, 2), torch.rand(T, 4, 5) * 3
    plain = analysis.count_synops(nn.Sequential(lin, snnfast.LIFNode(step_mode="m"), last), x)
    report = analysis.count_synops(contain(lin, snnfast.LIFNode(), last), x)
    assert (report.samples, report.timesteps, report.macs, report.acs) == (4, T, plain.macs, plain.acs)


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


def peers_networks():
    norse = pytest.importorskip("norse.torch", reason="norse is not installed")
    sinabs = pytest.importorskip("sinabs.layers", reason="sinabs is not installed")
    return {
        "norse": (norse.SequentialState(nn.Linear(5, 6), norse.LIF(), nn.Linear(6, 2)), (T, 4, 5)),
        "sinabs": (nn.Sequential(nn.Linear(5, 6), sinabs.IAF(), nn.Linear(6, 2)), (4, T, 5)),
        "squeezed": (nn.Sequential(nn.Linear(5, 6), sinabs.IAFSqueeze(batch_size=4), nn.Linear(6, 2)), (4 * T, 5)),
        "by steps": (nn.Sequential(nn.Linear(5, 6), sinabs.IAFSqueeze(num_timesteps=T), nn.Linear(6, 2)), (4 * T, 5)),
    }


@pytest.mark.parametrize("name", ["norse", "sinabs", "squeezed", "by steps"])
def test_peers_time_is_not_taken_for_samples(name):
    net, shape = peers_networks()[name]
    report = analysis.count_synops(net, torch.rand(shape))
    assert (report.samples, report.timesteps, report.dense) == (4, T, T * (5 * 6 + 6 * 2))


def test_a_loop_over_time_in_the_forward_is_not_called_step_by_step():
    class Loops(nn.Sequential):
        def forward(self, x):
            return sum(super(Loops, self).forward(x) for _ in range(T))

    net = Loops(nn.Linear(5, 6), snnfast.IFNode(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"called 12 times in 4 steps.*forward=lambda"):
        analysis.count_synops(net, torch.rand(4, 5))
    report = analysis.count_synops(net, torch.rand(4, 5), forward=lambda model, x: model(x))
    assert (report.samples, report.timesteps, report.dense) == (4, T, T * (5 * 6 + 6 * 2))


@pytest.mark.parametrize("call", [lambda f, x: f(x, [8, 8]), lambda f, x: f(output_size=[8, 8], input=x)])
def test_the_size_that_a_transposed_convolution_is_asked_for(call):
    asked, padded = (nn.ConvTranspose2d(2, 3, 3, 2, padding=1, output_padding=p) for p in (0, 1))
    padded.load_state_dict(asked.state_dict())
    x = torch.rand(B, 2, 4, 4)
    report = analysis.count_synops(asked, x, forward=call)
    assert report.to_dict() == analysis.count_synops(padded, x).to_dict()


def test_calls_by_keyword():
    class Named(nn.Sequential):
        def forward(self, x):
            return self[2](input=self[1](x_seq=self[0](input=x)))

    layers, x = (nn.Linear(5, 6), snnfast.LIFNode(step_mode="m"), nn.Linear(6, 2)), torch.rand(T, 4, 5)
    report = analysis.count_synops(Named(*layers), x)
    assert report.to_dict() == analysis.count_synops(nn.Sequential(*layers), x).to_dict()


def test_numbers_of_numpy_go_to_json():
    numpy = pytest.importorskip("numpy")
    report = analysis.count_synops(nn.Linear(5, 6), torch.rand(4, 5), samples=numpy.int64(4))
    assert json.loads(json.dumps(report.to_dict()))["samples"] == 4


def test_empty_batches_and_layers():
    net = nn.Sequential(nn.Linear(5, 6), snnfast.LIFNode(step_mode="m"), nn.Linear(6, 2))
    x = torch.rand(T, 4, 5)
    assert analysis.count_synops(net, [x, x[:, :0]]).samples == 4
    with pytest.warns(UserWarning, match="zero-element"):
        nothing = nn.Linear(0, 2)
    assert analysis.count_synops(nothing, torch.rand(B, 0)).dense == 0


def test_count_synops_refuses():
    with pytest.raises(TypeError, match=r"model must be .*got list"):
        analysis.count_synops([], torch.rand(1))
    with pytest.raises(TypeError, match=r"x must be .*str"):
        analysis.count_synops(nn.Linear(1, 1), ["x"])
    with pytest.raises(ValueError, match=r"at least one Linear"):
        analysis.count_synops(nn.ReLU(), torch.rand(1))
    with pytest.raises(TypeError, match=r"forward must be"):
        analysis.count_synops(nn.Linear(1, 1), torch.rand(1), forward=3)
    with pytest.raises(TypeError, match=r"x must be .*int"):
        analysis.count_synops(nn.Linear(1, 1), 3)
    with pytest.raises(ValueError, match=r"x must hold at least one input"):
        analysis.count_synops(nn.Linear(1, 1), iter([]))
    with pytest.raises(ValueError, match=r"samples must be .*got 0"):
        analysis.count_synops(nn.Linear(1, 1), torch.rand(1, 1), samples=0)
