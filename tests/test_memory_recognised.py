"""Which tensors are taken for spikes, by their values and by the graph alone, and which are kept as they are."""

from __future__ import annotations

import pytest
import torch
from memory_checks import T, assert_equal, gradients, network, spikes_like
from torch import nn

import snnfast
from snnfast import functional, memory, packed_spikes

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what is kept as it is ----
def test_what_has_other_values_is_kept():
    for t in (
        spikes_like((64, 64)) + spikes_like((64, 64)),  # sums of spikes, as SEW blocks make
        torch.randn(64, 64),
        spikes_like((64, 64)).expand(3, 64, 64),
        spikes_like((64, 64)).requires_grad_(),  # a parameter: it is there anyway
        spikes_like((8, 8)),  # too small to matter
        torch.zeros(64, 64).index_fill_(0, torch.tensor([3]), 2.0) + torch.eye(64),
    ):
        assert memory.made_smaller(t) is None


def test_neurons_that_spike_several_times_at_once_are_kept():
    from snnfast import dynamics

    x = (torch.randn(T, 64, 64) * 4).requires_grad_()
    own = (torch.tensor(1.0), torch.tensor(0.9))
    s, _, _ = functional.multi_step(dynamics.EXPONENTIAL_LIF, x, 0.0, None, own, multi_spike=True)
    assert s.max() > 1
    assert not memory.is_spikes(s)
    assert memory.made_smaller(s) is None


# ---- spikes by the graph alone, as on a GPU ----
def test_spikes_that_the_graph_shows():
    conv = nn.Conv2d(3, 8, 3)
    x = torch.randn(T * 2, 3, 12, 12)
    fused = snnfast.fused.BatchNormNode(nn.BatchNorm2d(8), snnfast.LIFNode(timesteps=T))
    for neuron in (snnfast.LIFNode(timesteps=T), fused):
        s = neuron(conv(x))
        if s._version:  # conftest fills fresh memory
            s = s.clone()
        p = nn.MaxPool2d(2)(s)
        changed = s.clone()
        with torch.no_grad():
            changed.mul_(0.5)  # the graph does not know
        assert not memory.is_spikes(changed)
        for t in (
            *(s, s.flatten(1), s.unflatten(0, (T, 2)), s[:3], s.transpose(0, 1), s.contiguous(), s.bfloat16()),
            *(p, p.flatten(1).to(torch.float64), torch.cat([s, s]), torch.stack([s, s])),
            *(s.repeat(2, 1, 1, 1), s.to(memory_format=torch.channels_last), s.chunk(2)[1], nn.MaxPool2d(3, 2, 1)(s)),
        ):
            assert memory.is_spikes(t), t.grad_fn
            assert bool(((t == 0) | (t == 1)).all())
        for t in (
            *(s + s, s * 1.0, nn.AvgPool2d(2)(s), s.mean(0), conv(x), torch.cat([s, conv(x)]), s.detach()),
            *(nn.functional.dropout(s), s.cumsum(0), nn.functional.pad(s, (1, 1), value=2.0), s.sum()),
            *(getattr(neuron, "neuron", neuron).v, s.clone().mul_(2.0), torch.cat([s, torch.randn_like(s)])),
        ):
            assert not memory.is_spikes(t), t.grad_fn


@pytest.mark.parametrize(("connect", "spikes"), [("CHARGE", True), ("ADD", False), ("AND", False), ("IAND", False)])
def test_spikes_that_met_a_residual_connection_are_none_by_the_graph(connect, spikes):
    node = snnfast.fused.BatchNormNode(nn.BatchNorm2d(8), snnfast.LIFNode(timesteps=T), connect=connect)
    x = torch.randn(T * 2, 8, 12, 12, requires_grad=True)
    y = node(x, torch.randn_like(x) + 0.5)
    assert memory._gives_spikes(y.grad_fn, y.output_nr, 16) == spikes
    assert bool(((y == 0) | (y == 1)).all()) == spikes


def test_the_graph_alone_gives_the_same_gradients(monkeypatch):
    """The way of a GPU, on the CPU: what is not shown to be spikes is not packed."""
    net = network()
    x = torch.randn(T * 2, 3, 16, 16) * 2
    want = gradients(net, x, torch.enable_grad())
    pack, seen = memory._as_bits, []

    def by_graph(t):
        # The fixture that poisons fresh memory counts as a change.
        seen.append(t.grad_fn is not None and memory._gives_spikes(t.grad_fn, t.output_nr, 16))
        return pack(t) if seen[-1] else None

    monkeypatch.setattr(memory, "_as_bits", by_graph)
    assert_equal(gradients(net, x, packed_spikes()), want)
    assert sum(seen) == 4


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1, ceil_mode=True, dilation=2)]
)
@pytest.mark.parametrize("side", [7, 16, 200])
def test_indices_of_a_pooling_are_narrowed_without_a_look(pool, side, monkeypatch):
    """The way of a GPU, on the CPU."""
    x = torch.randn(2, 3, side, side, requires_grad=True)
    want = torch.autograd.grad(pool(x).sin().sum(), x)[0]
    monkeypatch.setattr(memory, "_narrowed", lambda t: None)
    kept = []
    monkeypatch.setattr(memory, "_Kept", lambda t, make=memory._Kept: kept.append(make(t)) or kept[-1])
    with packed_spikes():
        y = pool(x)
        before = {k.tensor.dtype for k in kept}
        memory._narrow_pooling(y.flatten(1).grad_fn, 16)
        y = y.sin().sum()
    after = {k.tensor.dtype for k in kept}
    assert before == {torch.float32, torch.int64}
    assert after == {torch.float32, torch.int64 if side == 200 else torch.int16}
    assert torch.equal(torch.autograd.grad(y, x)[0], want)
