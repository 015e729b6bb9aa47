"""to_spiking on networks written as torchvision and timm write theirs."""

from __future__ import annotations

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import zoo_models as zoo
from spiking_loops import B, Loop, T, check_equal, trained_norms
from torch import nn
from torch.nn import functional as F

import snnfast
from snnfast.convert.to_spiking_trace import place

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
    "ClassifierHead": lambda: nn.Sequential(zoo.Conv2dNormActivation(3, 8), zoo.ClassifierHead(8, 5)),
    "DLA": lambda: zoo.with_head(nn.Conv2d(3, 8, 3), zoo.DlaTree(8, 1), zoo.DlaTree(8, 2)),
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


def test_reset_that_needs_arguments_is_not_a_states():
    net = snnfast.to_spiking(nn.Sequential(zoo.Conv2dNormActivation(3, 8), zoo.ClassifierHead(8, 5)), T)
    classifier = net[1].fc
    net(torch.randn(B, 3, 8, 8)).sum().backward()
    snnfast.functional.reset_net(net)
    assert net[1].fc is classifier
    assert all(m.v == 0.0 for m in net.modules() if isinstance(m, snnfast.LIFNode))


def test_two_graphs_call_a_module_once():
    """A call in the graph of training and one in that of evaluation are not two calls in a forward."""
    net = snnfast.to_spiking(made(zoo.GoogLeNet), T)
    x = torch.randn(B, 3, 8, 8).double()
    y = net(x)
    net.auto_reset = False
    snnfast.functional.reset_net(net)
    assert torch.equal(net(x), y)
    assert not torch.equal(net(x), y)
    assert [t.shape for t in net.train()(x)] == [(T, B, 5)] * 2


class Optional(nn.Module):
    """A functional activation in a block that takes a scale, or none."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, scale=None, /, shift=0.0, *, gain=1.0):
        x = self.fc(x) if scale is None else self.fc(x) * scale
        return F.relu(gain * x + shift)


class Caller(nn.Module):
    """Calls an Optional by ``call(block, x)``, once or twice."""

    def __init__(self, *calls):
        super().__init__()
        self.block, self.calls = Optional(), calls

    def forward(self, x):
        for call in self.calls:
            x = call(self.block, x)
        return x


@pytest.mark.parametrize(
    "call",
    [
        lambda block, x: block(x, None),
        lambda block, x: block(x, 2.0, gain=3.0),
        lambda block, x: block(x, x.mean(1, keepdim=True), 0.5),
        lambda block, x: block(x, gain=x.abs(), shift=1.0),
    ],
    ids=["none", "numbers", "tensor and number", "by keyword"],
)
def test_optional_arguments_are_those_of_the_call(call):
    torch.manual_seed(0)
    ann = Caller(call).double()
    check_equal(snnfast.to_spiking(ann, T, tau=2.0), ann, 3 * torch.randn(B, 4).double() + 1, by_calls)


def test_a_block_with_an_activation_must_be_called_the_same_way():
    ann = Caller(lambda block, x: block(x), lambda block, x: block(x, 2.0))
    message = r"'block' .*the same arguments each time, got the input alone and scale=2.0; make it two modules"
    with pytest.raises(ValueError, match=message):
        snnfast.to_spiking(ann, T)


class Root(nn.Module):
    def forward(self, x, others):
        for other in others:
            x = x + other
        return x


class Branches(nn.Module):
    """A block gets a list of what was computed before any neuron."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.root = Root()

        def forward(self, x, others):
            return self.root(F.relu(x), others)

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.block = nn.Linear(4, 4), nn.Linear(4, 4), self.Block()

    def forward(self, x):
        y = self.fc1(x)
        return self.block(y, [self.fc2(x), y])


def test_a_list_of_branches_is_repeated():
    ann = Branches().double()
    check_equal(snnfast.to_spiking(ann, T, tau=2.0), ann, 3 * torch.randn(B, 4).double() + 1, by_calls)


def test_what_is_only_kept_leaves_no_neuron():
    message = "besides what other_activations='keep' keeps, found none in MobileNetV2, but ReLU6 at 'features.0.2'"
    with pytest.raises(ValueError, match=message):
        snnfast.to_spiking(zoo.MobileNetV2(), T, other_activations="keep")


def test_a_place_in_torchvision_is_shown():
    """Its files are not torch's, though its folder's name begins with torch's."""
    folder = os.path.dirname(torch.__file__)
    frames = [(os.path.join(folder + "vision", "ops", "misc.py"), 7), (os.path.join(folder, "fx", "proxy.py"), 9)]
    node = SimpleNamespace(meta={"stack_trace": "".join(f'  File "{f}", line {n}, in g\n    x\n' for f, n in frames)})
    assert place("se", nn.Sigmoid(), node) == f"'se' (Sigmoid), File \"{frames[0][0]}\", line 7"


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
