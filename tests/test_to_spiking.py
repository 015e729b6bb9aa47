"""to_spiking against networks written by hand as a loop over time, one step after another."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spiking_loops import (
    NEURONS,
    B,
    Functional,
    Loop,
    Preactivated,
    T,
    TorchvisionBlock,
    TorchvisionResNet,
    check_equal,
    loops,
    strong,
    trained_norms,
)
from torch import nn
from torch.nn import functional as F

import snnfast

pytestmark = pytest.mark.usefixtures("one_thread")


def functional_by_hand(leaky):
    def run(ann, x):
        n, out = loops(5, leaky), []
        for _ in range(T):
            y = n[0](ann.conv1(x))
            y = F.max_pool2d(n[1](ann.conv2(y)), 2)
            y = n[2](ann.conv3(y)).flatten(1)
            out.append(ann.fc3(n[4](ann.fc2(n[3](ann.fc1(y))))))
        return torch.stack(out)

    return run


@pytest.mark.parametrize(("leaky", "arguments"), NEURONS)
def test_functional_calls(leaky, arguments):
    ann = strong(Functional())
    net = snnfast.to_spiking(ann, T, **arguments)
    assert [n for n, m in net.named_children() if isinstance(m, snnfast.neuron.BaseNode)] == [
        "relu", "relu_2", "relu_3", "relu_4", "clamp",
    ]  # fmt: skip
    check_equal(net, ann, 2 * torch.randn(B, 2, 12, 12).double(), functional_by_hand(leaky))


def resnet_step(ann, x, n):
    """One time step of TorchvisionResNet with the neurons ``n``."""
    n = iter(n)
    y = ann.maxpool(next(n)(ann.bn1(ann.conv1(x))))
    for block in (*ann.layer1, *ann.layer2):
        z = block.bn2(block.conv2(next(n)(block.bn1(block.conv1(y)))))
        y = next(n)(z + (y if block.downsample is None else block.downsample(y)))
    return ann.fc(y.mean((2, 3)))


@pytest.mark.parametrize(("leaky", "arguments"), NEURONS)
@pytest.mark.parametrize("coding", ["direct", "temporal"])
def test_torchvision_style_resnet(leaky, arguments, coding):
    ann = trained_norms(TorchvisionResNet().double()).eval()
    net = snnfast.to_spiking(ann, T, coding=coding, **arguments)
    assert isinstance(net, TorchvisionResNet)
    assert isinstance(net.layer1[0], TorchvisionBlock)
    assert {"relu", "relu_2"} < {n for n, _ in net.layer1[0].named_children()}
    x = torch.randn(*([T] if coding == "temporal" else []), B, 3, 12, 12).double()

    def by_hand(ann, x):
        n = loops(9, leaky)
        return torch.stack([resnet_step(ann, x[t] if coding == "temporal" else x, n) for t in range(T)])

    check_equal(net, ann, x, by_hand)


def test_batch_norm_in_training_is_over_time_and_batch():
    ann = strong(TorchvisionBlock(3, 4, 2)).train()
    net = snnfast.to_spiking(ann, T, coding="temporal")

    def by_hand(ann, x):
        def fold(layer, y):
            return layer(y.flatten(0, 1)).unflatten(0, (T, B))

        def neuron(y, n):
            return torch.stack([n(step) for step in y])

        first, second = loops(2)
        y = neuron(fold(lambda y: ann.bn1(ann.conv1(y)), x), first)
        return neuron(fold(lambda y: ann.bn2(ann.conv2(y)), y) + fold(ann.downsample, x), second)

    check_equal(net, ann, 2 * torch.randn(T, B, 3, 8, 8).double(), by_hand)
    for name, value in ann.named_buffers():
        assert torch.allclose(net.get_buffer(name), value), name


def test_a_shortcut_around_the_first_neuron():
    ann = strong(Preactivated())
    net = snnfast.to_spiking(ann, T)

    def by_hand(ann, x):
        (n,), out = loops(1), []
        for _ in range(T):
            z = ann.stem(x)
            y = ann.conv(n(z)) + z
            all_of_it = torch.cat([y, z * 2, torch.ones_like(y)], 1)
            out.append(ann.head(y.flatten(1)) + all_of_it.mean((1, 2, 3))[:, None])
        return torch.stack(out)

    seen = []
    net.stem.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    check_equal(net, ann, torch.randn(B, 2, 8, 8).double(), by_hand)
    assert seen == [B]


class InPlace(nn.Module):
    """An in-place ReLU whose input is used again: that sees the activation."""

    def __init__(self, relu):
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(6, 6), nn.Linear(6, 5), relu

    def forward(self, x):
        y = self.first(x)
        z = self.relu(y)
        return self.second(y + z) + self.second(y)


@pytest.mark.parametrize("relu", [nn.ReLU(inplace=True), nn.ReLU(), F.relu_, torch.relu_], ids=repr)
def test_in_place(relu):
    ann = strong(InPlace(relu))
    in_place = relu in (F.relu_, torch.relu_) or relu.inplace

    def by_hand(ann, x):
        (n,), out = loops(1), []
        for _ in range(T):
            y = ann.first(x)
            z = n(y)
            y = z if in_place else y
            out.append(ann.second(y + z) + ann.second(y))
        return torch.stack(out)

    check_equal(snnfast.to_spiking(ann, T), ann, 2 * torch.randn(B, 6).double(), by_hand)


class InPlaceOperations(nn.Module):
    """Tensors that are changed in place by more than activations, and used under their old names."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.side = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        before = self.first(x)
        before.mul_(2)
        out = self.side(x)
        same = out
        out += 1.0
        out.add_(self.second(F.relu(before)))
        return out + same + self.second(before)


def test_what_is_changed_in_place_before_and_after_there_is_time():
    def by_hand(ann, x):
        (n,), out = loops(1), []
        for _ in range(T):
            before = 2 * ann.first(x)
            y = ann.side(x) + 1 + ann.second(n(before))
            out.append(2 * y + ann.second(before))
        return torch.stack(out)

    ann = strong(InPlaceOperations())
    check_equal(snnfast.to_spiking(ann, T), ann, torch.randn(B, 6).double(), by_hand)


class Around(nn.Module):
    """A block whose ReLU overwrites what the block gets, as the down convolutions of pix2pix do."""

    def __init__(self, block):
        super().__init__()
        self.first, self.block = nn.Linear(6, 6), block

    def forward(self, x):
        x = self.first(x)
        return torch.cat([x, self.block(x)], 1)


class Overwriting(nn.Module):
    def forward(self, x):
        b = x.size(0)
        return F.relu_(x).view(b, -1)


@pytest.mark.parametrize("make", [lambda: nn.ReLU(True), lambda: nn.Sequential(nn.ReLU(True)), Overwriting])
def test_a_block_that_overwrites_what_is_used_after_it_is_refused(make):
    block = nn.Sequential(make(), nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"must not use the input of 'block' \(Sequential\).* inplace=False"):
        snnfast.to_spiking(Around(block), T)
    snnfast.to_spiking(nn.Sequential(nn.Linear(6, 6), block), T)


class MadeInForward(nn.Module):
    """Layers that are no submodules: made at each call, and slices of a Sequential."""

    def __init__(self):
        super().__init__()
        self.first, self.layers = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())

    def forward(self, x):
        y = self.layers[:2](nn.ReLU()(self.first(x)))
        return self.first(torch.clip(self.first(self.layers[2:](y)).clip(0), min=0))


def test_activations_that_are_no_submodules():
    def by_hand(ann, x):
        n, out = loops(5), []
        for _ in range(T):
            y = n[1](ann.layers[0](n[0](ann.first(x))))
            out.append(ann.first(n[4](n[3](ann.first(n[2](ann.layers[2](y)))))))
        return torch.stack(out)

    ann = strong(MadeInForward())
    check_equal(snnfast.to_spiking(ann, T), ann, 2 * torch.randn(B, 6).double(), by_hand)


class TwoWays(nn.Module):
    """The layers of a Sequential called one by one, and together."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.ReLU())

    def forward(self, x):
        y = x
        for layer in self.layers:
            y = layer(y)
        return y + self.layers(x + 1)


def test_a_sequential_called_in_two_ways():
    def by_hand(ann, x):
        a, b = loops(2)
        return torch.stack([a(ann.layers[0](x)) + b(ann.layers[0](x + 1)) for _ in range(T)])

    ann = strong(TwoWays())
    net = snnfast.to_spiking(ann, T)
    check_equal(net, ann, 2 * torch.randn(B, 6).double(), by_hand)
    with pytest.raises(ValueError, match=r"'layers.1' .* called more than once"):
        net.auto_reset = False


class Shared(nn.Module):
    """One block for two layers."""

    def __init__(self):
        super().__init__()
        self.block, self.head = nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.block(self.block(x)))


def test_a_block_used_twice_shares_weights_and_no_state():
    ann = strong(Shared())
    net = snnfast.to_spiking(ann, T)

    def by_hand(ann, x):
        first, second = loops(2)
        linear = ann.block[0]
        return torch.stack([ann.head(second(linear(first(linear(x))))) for _ in range(T)])

    check_equal(net, ann, 2 * torch.randn(B, 6).double(), by_hand)
    with pytest.raises(ValueError, match=r"auto_reset can be False only .* 'block' .* more than once"):
        net.auto_reset = False


# ---- networks drawn at random ----
class Residual(nn.Module):
    def __init__(self, body, relu):
        super().__init__()
        self.body, self.relu = body, relu

    def forward(self, x):
        return self.relu(self.body(x) + x) if self.relu is not None else self.body(x) + x


def layers(draw, depth):
    makers = {
        "conv": lambda: nn.Conv2d(3, 3, 3, padding=1, bias=draw(st.booleans())),
        "norm": lambda: nn.BatchNorm2d(3),
        "relu": lambda: nn.ReLU(inplace=False),
        "max": lambda: nn.MaxPool2d(3, 1, 1),
        "average": lambda: nn.AvgPool2d(3, 1, 1),
        "dropout": lambda: nn.Dropout(0.5),
        "residual": lambda: Residual(layers(draw, depth - 1), draw(st.sampled_from([nn.ReLU(), None]))),
    }
    names = sorted(makers if depth else set(makers) - {"residual"})
    return nn.Sequential(*(makers[n]() for n in draw(st.lists(st.sampled_from(names), min_size=1, max_size=5))))


@st.composite
def networks(draw):
    torch.manual_seed(draw(st.integers(0, 1000)))
    net = nn.Sequential(layers(draw, 2), nn.Conv2d(3, 3, 3), nn.ReLU(), layers(draw, 1), nn.Flatten(), nn.Linear(48, 5))
    return trained_norms(strong(net)).eval()


def by_steps(ann, leaky):
    """A copy of ``ann`` with hand-written neurons, one for each ReLU module; called once per step."""
    ann = copy.deepcopy(ann)
    for parent in list(ann.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, Loop(leaky))
    return ann


@settings(max_examples=30)
@given(networks(), st.sampled_from(NEURONS), st.sampled_from(["direct", "temporal"]), st.integers(1, 5))
def test_random_networks(ann, neuron, coding, T):
    leaky, arguments = neuron.values
    net = snnfast.to_spiking(ann, T, coding=coding, **arguments)
    assert list(net.state_dict()) == list(ann.state_dict())
    reference = by_steps(ann, leaky)
    x = torch.randn(T, 2, 3, 6, 6).double()
    x = x if coding == "temporal" else x[0]
    want = torch.stack([reference(x[t] if coding == "temporal" else x) for t in range(T)])
    got = net(x)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-10)
    weight = torch.randn_like(want)
    grads = [
        torch.autograd.grad((y * weight).sum(), list(n.parameters()), allow_unused=True)
        for y, n in ((got, net), (want, reference))
    ]
    for g, w in zip(*grads, strict=True):
        assert (g is None) == (w is None)
        assert g is None or torch.allclose(g, w, rtol=1e-6, atol=1e-9)
