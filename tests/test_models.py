"""The model zoo: sizes, shapes, keys, and that the spiking networks are what the papers draw."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import snnfast
from snnfast import models

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = [getattr(models, name) for name in models.__all__]
T, B = 2, 2


def narrow(model, **kwargs):
    return model(width=4 if model in (models.wrn16_2, models.wrn28_4) else 8, **kwargs)


# ---- parameter counts, from the papers' tables and not from the code ----
def conv(cin, cout, k=3):
    return cin * cout * k * k


def norm(c):
    return 2 * c


def linear(cin, cout):
    return cin * cout + cout


def residual(widths, blocks, stem_in=3):
    """Stem and stages of basic blocks with projection where the width changes."""
    total, cin = conv(stem_in, widths[0]) + norm(widths[0]), widths[0]
    for width, number in zip(widths, blocks, strict=True):
        for _ in range(number):
            total += conv(cin, width) + conv(width, width) + 2 * norm(width)
            total += conv(cin, width, 1) + norm(width) if cin != width else 0
            cin = width
    return total


def wide(depth, k, classes=10):
    total, cin = conv(3, 16), 16
    for width in (16 * k, 32 * k, 64 * k):
        for _ in range((depth - 4) // 6):
            total += norm(cin) + conv(cin, width) + norm(width) + conv(width, width)
            total += conv(cin, width, 1) if cin != width else 0
            cin = width
    return total + norm(cin) + linear(cin, classes)


def pyramid():
    total, cin = conv(3, 64) + norm(64), 64
    for width in range(64 + 56, 64 + 8 * 56 + 1, 56):
        total += norm(cin) + conv(cin, width) + norm(width) + conv(width, width) + norm(width)
        cin = width
    return total + norm(cin) + linear(cin, 10)


def plain(widths):
    pairs = zip((3, *widths), widths, strict=False)
    return sum(conv(a, b) + norm(b) for a, b in pairs)


COUNTS = {
    "vgg9": plain((64, 64, 128, 128, 256, 256, 256)) + linear(256 * 16, 1024) + linear(1024, 10),
    "vgg11": plain((64, 128, 256, 256, 512, 512, 512, 512)) + linear(512, 10),
    "resnet18": residual((64, 128, 256, 512), (2, 2, 2, 2)) + linear(512, 10),
    "resnet19": residual((128, 256, 512), (3, 3, 2)) + linear(512, 256) + linear(256, 10),
    "sew_resnet18": residual((64, 128, 256, 512), (2, 2, 2, 2)) + linear(512, 10),
    "wrn16_2": wide(16, 2),
    "wrn28_4": wide(28, 4),
    "pyramidnet18": pyramid(),
}
PUBLISHED = {"wrn16_2": 0.69, "wrn28_4": 5.85, "resnet18": 11.17}  # millions


@pytest.mark.parametrize("name", models.__all__)
def test_parameter_counts(name):
    with torch.device("meta"):
        count = sum(p.numel() for p in getattr(models, name)().parameters())
    assert count == COUNTS[name]
    if name in PUBLISHED:
        assert round(count / 1e6, 2) == PUBLISHED[name]


@pytest.mark.parametrize("model", ALL, ids=lambda m: m.__name__)
def test_shapes_keys_and_gradients(model):
    torch.manual_seed(0)
    ann = narrow(model, num_classes=7, in_channels=1)
    torch.manual_seed(0)
    net = narrow(model, num_classes=7, in_channels=1, timesteps=T, neuron=snnfast.LIFNode, tau=1.5)
    a, b = ann.state_dict(), net.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)
    ann.load_state_dict(b)
    assert not any(isinstance(m, nn.ReLU) for m in net.modules())
    neurons = [m for m in net.modules() if isinstance(m, snnfast.LIFNode)]
    assert len(neurons) == sum(isinstance(m, nn.ReLU) for m in ann.modules())
    assert all(m.tau == 1.5 for m in neurons)
    calls = []
    for m in neurons:
        m.register_forward_hook(lambda m, i, o: calls.append((m, len(o), set(o.unique().tolist()) <= {0.0, 1.0})))
    for side in (16, 28, 32, 33):
        calls.clear()
        y = net(torch.randn(B, 1, side, side))
        assert y.shape == (T, B, 7)
        assert ann(torch.randn(B, 1, side, side)).shape == (B, 7)
        assert len({m for m, *_ in calls}) == len(neurons) == len(calls)  # each neuron once
        assert all(n == T * B and binary for _, n, binary in calls)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def loop_neuron():
    """A neuron stepped by hand: LIF with tau = 2 and hard reset."""
    state = {"v": 0.0}

    def step(x):
        h = state["v"] + (x - state["v"]) / 2
        s = (h >= 1).to(h.dtype)
        state["v"] = (1 - s) * h
        return s

    return step


def lively(net):
    """Batch norms with statistics that let every layer spike."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 1, 3)
            nn.init.uniform_(m.bias, 0, 0.5)
    return net.double().eval()


def sew_by_hand(net, x):
    stem, n = loop_neuron(), {}
    out = []
    for _ in range(T):
        y = stem(net.bn1(net.conv1(x)))
        for i, block in enumerate(b for layer in net.layers for b in layer):
            first, second, short = n.setdefault(i, (loop_neuron(), loop_neuron(), loop_neuron()))
            z = second(block.bn2(block.conv2(first(block.bn1(block.conv1(y))))))
            identity = y
            if not isinstance(block.downsample, nn.Identity):
                conv, norm, _ = block.downsample
                identity = short(norm(conv(y)))
            y = z + identity
        out.append(net.fc(y.mean((2, 3))))
    return torch.stack(out)


def wide_by_hand(net, x):
    last, n = loop_neuron(), {}
    out = []
    for _ in range(T):
        y = net.conv1(x)
        for i, block in enumerate(b for layer in net.layers for b in layer):
            first, second = n.setdefault(i, (loop_neuron(), loop_neuron()))
            s = first(block.bn1(y))
            y = block.conv2(second(block.bn2(block.conv1(s)))) + (y if block.shortcut is None else block.shortcut(s))
        out.append(net.fc(last(net.bn(y)).mean((2, 3))))
    return torch.stack(out)


def pyramid_by_hand(net, x):
    last, n = loop_neuron(), {}
    out = []
    for _ in range(T):
        y = net.bn1(net.conv1(x))
        for i, block in enumerate(b for layer in net.layers for b in layer):
            neuron = n.setdefault(i, loop_neuron())
            z = block.bn3(block.conv2(neuron(block.bn2(block.conv1(block.bn1(y))))))
            short = nn.functional.avg_pool2d(y, 2, ceil_mode=True) if block.conv1.stride == (2, 2) else y
            z[:, : short.shape[1]] += short
            y = z
        out.append(net.fc(last(net.bn(y)).mean((2, 3))))
    return torch.stack(out)


@pytest.mark.parametrize(
    ("model", "by_hand"),
    [(models.sew_resnet18, sew_by_hand), (models.wrn16_2, wide_by_hand), (models.pyramidnet18, pyramid_by_hand)],
    ids=["sew_resnet18", "wrn16_2", "pyramidnet18"],
)
@torch.no_grad()
def test_against_a_loop_by_hand(model, by_hand):
    net = lively(narrow(model, timesteps=T))
    x = 2 * torch.randn(B, 3, 17, 16).double()
    want = by_hand(net, x)
    assert want.std() > 0
    assert not torch.equal(want[0], want[1])
    assert torch.allclose(net(x), want, rtol=1e-9, atol=1e-12)


def test_sew_adds_spikes():
    net = lively(narrow(models.sew_resnet18, timesteps=4))
    sums = []
    for block in (b for layer in net.layers for b in layer):
        block.register_forward_hook(lambda m, i, o: sums.append(o.unique().tolist()))
    net(torch.randn(B, 3, 16, 16).double())
    assert all(v == int(v) for values in sums for v in values)
    assert max(map(max, sums)) > 1


def test_options_reach_to_spiking():
    net = narrow(models.vgg11, timesteps=T, coding="temporal", v_threshold=0.5)
    assert net(torch.randn(T, B, 3, 16, 16)).shape == (T, B, 10)
    assert net.features[2].v_threshold == 0.5
    with pytest.raises(ValueError, match="timesteps must be given with tau"):
        models.resnet18(tau=2.0)
    with pytest.raises(ValueError, match="timesteps must be given with neuron"):
        models.resnet18(neuron=snnfast.IFNode)
    assert narrow(models.vgg11, timesteps=T, share_weights=False).state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("model", ALL, ids=lambda m: m.__name__)
@pytest.mark.parametrize(("size", "value"), [("width", 16.0), ("width", 0), ("num_classes", "10"), ("in_channels", -1)])
def test_sizes_that_are_none(model, size, value):
    with pytest.raises(ValueError, match=f"{size} must be a whole number from 1, got {value!r}"):
        model(**{size: value})


def test_a_pyramid_that_gets_narrower():
    assert models.pyramidnet18(width=8, alpha=0).fc.in_features == 8
    with pytest.raises(ValueError, match="alpha must be a whole number from 0, got -10"):
        models.pyramidnet18(alpha=-10)
