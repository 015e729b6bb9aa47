"""to_spiking on networks written as torchvision and timm write theirs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import zoo_models as zoo
from test_to_spiking import B, Loop, T, check_equal, trained_norms
from torch import nn
from torch.nn import functional as F

import snnfast

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "timm ResNet": zoo.ResNet,
    "timm ResNet, fast pooling": partial(zoo.ResNet, pool_type="fast"),
    "timm ResNet, checkpointing": partial(zoo.ResNet, grad_checkpointing=True),
    "timm ResNet, stochastic depth": partial(zoo.ResNet, drop_path_rate=0.5),
    "BatchNormAct2d": lambda: zoo.with_head(zoo.ConvNormAct(3, 8), zoo.ConvNormAct(8, 8)),
    "MobileNetV2 with ReLU": partial(zoo.MobileNetV2, nn.ReLU),
    "DenseNet": zoo.DenseNet,
    "DenseNet, dropout": partial(zoo.DenseNet, 0.5),
    "ShuffleNet": lambda: zoo.with_head(zoo.Conv2dNormActivation(3, 8), zoo.ShuffleUnit(8), zoo.ShuffleUnit(8)),
    "ShuffleNet, a static half": lambda: zoo.with_head(nn.Conv2d(3, 8, 3), zoo.ShuffleUnit(8), zoo.ShuffleUnit(8)),
}
GATED = {
    "timm ResNet, SEModule": partial(zoo.ResNet, attn_layer=zoo.SEModule),
    "timm ResNet, SEModule, maximum": partial(zoo.ResNet, attn_layer=partial(zoo.SEModule, add_maxpool=True)),
    "SqueezeExcitation": lambda: zoo.with_head(zoo.Conv2dNormActivation(3, 8), zoo.SqueezeExcitation(8, 4)),
}


def made(make):
    """In float64, as after training, and with spikes in every layer."""
    torch.manual_seed(3)
    ann = trained_norms(make().double()).eval()
    with torch.no_grad():
        for m in ann.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.mul_(3.0)
                if m.bias is not None:
                    m.bias.uniform_(0.5, 1.5)
    return ann


def by_calls(ann, x):
    """Step by step, with a neuron by hand for each call of F.relu, which nn.ReLU makes too."""
    neurons: list[Loop] = []
    relu, out = F.relu, []
    try:
        for _ in range(T):
            calls = iter(range(1000))

            def spike(x, inplace=False, calls=calls):
                k = next(calls)
                if k == len(neurons):
                    neurons.append(Loop())
                return neurons[k](x)

            F.relu = spike
            out.append(ann(x))
    finally:
        F.relu = relu
    return torch.stack(out)


@pytest.mark.parametrize("name", [*MODELS, *GATED])
def test_the_same_as_step_by_step(name):
    ann = made({**MODELS, **GATED}[name])
    keep = {"other_activations": "keep"} if name in GATED else {}
    net = snnfast.to_spiking(ann, T, tau=2.0, **keep)
    for kind in (zoo.ResNet, zoo.DenseNet, zoo.MobileNetV2):
        assert isinstance(net, kind) == isinstance(ann, kind)
    assert list(net.state_dict()) == list(ann.state_dict())
    plain = ann
    if getattr(ann, "grad_checkpointing", False):  # by hand, a recomputed step would count twice
        plain = made(zoo.ResNet)
    x = torch.randn(B, 3, 12, 12).double() * 2
    got = net(x)
    assert got.abs().sum() > 0
    check_equal(net, plain, x, by_calls)


def test_checkpointed_gradients_are_those_of_the_plain_network():
    x = torch.randn(B, 3, 12, 12).double()
    grads = []
    for on in (True, False):
        net = snnfast.to_spiking(made(partial(zoo.ResNet, grad_checkpointing=on)), T).train()
        net(x).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_batch_norm_with_an_activation_inside_trains_as_the_two_do():
    class Apart(nn.Sequential):
        def __init__(self, features):
            super().__init__(nn.BatchNorm2d(features), nn.ReLU(inplace=True))

    x = torch.randn(B, 3, 8, 8).double() * 2
    results = []
    for norm in (zoo.BatchNormAct2d, Apart):
        torch.manual_seed(0)
        ann = zoo.with_head(zoo.ConvNormAct(3, 8, norm), zoo.ConvNormAct(8, 8, norm)).double()
        net = snnfast.to_spiking(ann, T).train()
        if norm is zoo.BatchNormAct2d:
            assert isinstance(net[0].bn, zoo.BatchNormAct2d)
            assert isinstance(net[0].bn.act, snnfast.LIFNode)
        y = net(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in net.parameters()), *net.buffers()])
    assert len(results[0]) == len(results[1]) == 15
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][-1] == 1  # num_batches_tracked


@pytest.mark.parametrize(
    "layer", [zoo.DropPath(0.5), zoo.StochasticDepth(0.5, "row"), zoo.StochasticDepth(0.5, "batch")]
)
def test_stochastic_depth_draws_once_for_all_steps(layer):
    net = snnfast.to_spiking(nn.Sequential(nn.ReLU(), nn.Flatten(), layer), T, snnfast.IFNode)
    y = net(torch.ones(64, 1, 2, 2))
    assert set(y.unique().tolist()) <= {0.0, 2.0}
    assert torch.equal(y, y[:1].expand_as(y))
    assert torch.equal(y, y[..., :1].expand_as(y))
    kept = y[0, :, 0].count_nonzero().item()
    assert kept in (0, 64) if getattr(layer, "mode", "") == "batch" else 16 < kept < 48
    net.eval()
    assert (net(torch.ones(64, 1, 2, 2)) == 1).all()
    net.timesteps = 2
    assert net.train()(torch.ones(3, 1, 2, 2)).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (zoo.MobileNetV2, r"ReLU6 at 'features.0.2'"),
        (partial(zoo.MobileNetV2, nn.Hardswish), r"Hardswish at 'features.0.2'"),
        (partial(zoo.MobileNetV2, nn.SiLU), r"SiLU at 'features.0.2'"),
        (GATED["timm ResNet, SEModule"], r"Sigmoid at 'layer1.0.se.gate'"),
        (GATED["SqueezeExcitation"], r"Sigmoid at '1.scale_activation'"),
        (
            lambda: zoo.with_head(zoo.ConvNormAct(3, 8, partial(zoo.BatchNormAct2d, act_layer=nn.SiLU)), nn.ReLU()),
            r"SiLU at '0.bn.act'",
        ),
    ],
)
def test_other_activations_are_refused_with_their_place(make, message):
    with pytest.raises(ValueError, match="model must have ReLU activations, but has " + message):
        snnfast.to_spiking(make(), T)


@pytest.mark.parametrize(
    "make",
    [MODELS["timm ResNet"], MODELS["DenseNet"], MODELS["BatchNormAct2d"], zoo.MobileNetV2],
    ids=["ResNet", "DenseNet", "BatchNormAct2d", "MobileNetV2 with ReLU6"],
)
def test_calibrated_networks_tend_to_the_ann(make):
    """ReLU6 too, whose limit is the neuron's own: one spike of the threshold's size in each step."""
    ann = made(make).float()
    x = torch.randn(16, 3, 12, 12) * 3
    want = ann(x)
    if make is zoo.MobileNetV2:
        found = []
        ann.features[0][2].register_forward_hook(lambda m, i, o: found.append(o.max().item()))
        ann(x)
        assert found == [6.0]
    net = snnfast.to_spiking(ann, 8, calibration=x, percentile=100, other_activations="replace")
    errors = []
    for steps in (16, 512):
        net.timesteps = steps
        errors.append(((net(x).mean(0) - want).norm() / want.norm()).item())
    assert errors[1] < 0.05 < errors[0]
