"""What to_spiking leaves of the original, and what its networks keep: copies, time steps, states, layouts."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from spiking_loops import B, Functional, Preactivated, T, TorchvisionBlock, TorchvisionResNet, strong
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import snnfast
from snnfast import functional

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_original_stays_and_the_keys_too():
    ann = TorchvisionResNet()
    before = copy.deepcopy(ann.state_dict())
    net = snnfast.to_spiking(ann, T, snnfast.ParametricLIFNode)
    net(torch.randn(B, 3, 12, 12)).sum().backward()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    assert type(ann) is TorchvisionResNet
    assert type(ann.layer1[0]) is TorchvisionBlock
    assert type(ann.relu) is nn.ReLU
    assert all(torch.equal(v, before[k]) for k, v in ann.state_dict().items())
    assert list(before) == [k for k in net.state_dict() if not k.endswith(".w")]
    assert sum(k.endswith(".w") for k in net.state_dict()) == 9
    ann.load_state_dict(snnfast.to_spiking(ann, T).state_dict())
    shared = snnfast.to_spiking(ann, T, share_weights=True)
    assert all(p is q for p, q in zip(shared.parameters(), ann.parameters(), strict=True))


@pytest.mark.parametrize("share_weights", [False, True])
def test_a_pruned_network(share_weights):
    ann = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 2))
    prune.l1_unstructured(ann[0], "weight", 0.5)
    net = snnfast.to_spiking(ann, T, share_weights=share_weights)
    prune.remove(ann[0], "weight")
    x = torch.rand(B, 3, 12, 12)
    torch.testing.assert_close(net(x), snnfast.to_spiking(ann, T)(x))


@pytest.mark.parametrize("make", [TorchvisionResNet, lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), Last())])
def test_copies_and_pickles(make):
    net = snnfast.to_spiking(make(), T).eval()
    x = torch.randn(B, 3, 12, 12)
    want = net(x)
    saved = io.BytesIO()
    torch.save(net, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(saved, weights_only=False)):
        assert torch.equal(copied(x), want)
        assert type(copied) is type(net)
        copied.timesteps = 2
        assert copied(x).shape[0] == 2
    assert net.timesteps == T


class Last(nn.Module):
    def forward(self, x):
        return F.relu(x).mean((2, 3))


def test_timesteps_can_be_set():
    ann = strong(Preactivated())
    ann = nn.Sequential(ann, nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 5).double())
    net, longer = snnfast.to_spiking(ann, T), snnfast.to_spiking(ann, 7)
    x = torch.randn(B, 2, 8, 8).double()
    net.eval(), longer.eval()
    want = net(x)
    net.timesteps = 7
    assert torch.equal(net(x), longer(x))
    net.timesteps = T
    assert torch.equal(net(x), want)
    with pytest.raises(ValueError, match="timesteps must be a whole number from 1, got 0"):
        net.timesteps = 0


def test_each_forward_starts_afresh_unless_asked():
    ann = strong(Functional())
    net = snnfast.to_spiking(ann, T, coding="temporal")
    x = torch.randn(2 * T, B, 2, 12, 12).double()
    first = net(x[:T])
    assert torch.equal(net(x[:T]), first)  # no reset_net in between
    functional.reset_net(net)
    assert torch.equal(net(x[:T]), first)
    whole = snnfast.to_spiking(ann, 2 * T, coding="temporal")(x)
    net.auto_reset = False
    functional.reset_net(net)
    assert torch.equal(torch.cat([net(x[:T]), net(x[T:])]), whole)
    assert not torch.equal(net(x[:T]), first)
    net.auto_reset = True
    assert torch.equal(net(x[:T]), first)


def test_channels_last_stays():
    net = snnfast.to_spiking(TorchvisionResNet(), T).to(memory_format=torch.channels_last)
    layouts = []
    net.layer1[0].conv1.register_forward_hook(
        lambda m, i, o: layouts.append(i[0].is_contiguous(memory_format=torch.channels_last))
    )
    x = torch.randn(B, 3, 12, 12)
    net.eval()
    assert torch.allclose(net(x.to(memory_format=torch.channels_last)), net(x), atol=1e-6)
    assert layouts[0]


class Normalised(nn.Module):
    """Normalises its input by buffers, and reads one more for a decision where ``decides``."""

    def __init__(self, decides):
        super().__init__()
        self.decides = decides
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.register_buffer("mean", torch.rand(3))
        self.register_buffer("std", torch.rand(3) + 0.5)

    def forward(self, x):
        if self.decides and self.mean.sum() < 0:
            return x
        x = (x - self.mean.view(1, 3, 1, 1)) / self.std.view(1, 3, 1, 1)
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


def test_what_is_computed_from_buffers_follows_them():
    ann, other = Normalised(False), Normalised(False)
    x = 9 * torch.randn(B, 3, 6, 6)
    net = snnfast.to_spiking(ann, T)
    before = net(x)
    net.load_state_dict(other.state_dict())
    assert torch.equal(net(x), snnfast.to_spiking(other, T)(x))
    net.load_state_dict({**ann.state_dict(), "mean": ann.mean + 1})
    assert not torch.equal(net(x), before)
    assert net.to("meta")(x.to("meta")).is_meta  # as on any other device
    assert snnfast.to_spiking(Normalised(True), T)(x).shape == (T, B, 2)
