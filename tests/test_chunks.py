"""Long sequences in chunks (snnfast.chunked): results, states and gradients of the whole, in the memory of a part."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo_models import DropPath

import snnfast
from snnfast import chunked, functional
from snnfast.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

T, B = 10, 3


def busy(net):
    """With weights under which neurons fire."""
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return net


def sequence_network():
    """Multi-step, [T, B, *]."""
    return busy(
        nn.Sequential(
            snnfast.layer.Linear(8, 16),
            snnfast.LIFNode(step_mode="m", store_v_seq=True),
            snnfast.layer.Dropout(0.3, step_mode="m"),
            snnfast.layer.Linear(16, 4),
            snnfast.ParametricLIFNode(step_mode="m", v_reset=None),
        )
    )


def folded_network():
    """[T * B, *]."""
    return busy(
        nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            snnfast.LIFNode(timesteps=T),
            nn.Conv2d(4, 4, 3),
            snnfast.fused.BatchNormNode(nn.BatchNorm2d(4), snnfast.IFNode(timesteps=T)),
        )
    )


def ann():
    layers = (nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Dropout(0.3), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.ReLU())
    return busy(nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 5)))


def spiking_network(**kwargs):
    return snnfast.to_spiking(ann(), T, **kwargs)


CASES = {
    "sequence": (sequence_network, (T, B, 8)),
    "folded": (folded_network, (T * B, 2, 8, 8)),
    "to_spiking": (spiking_network, (B, 2, 8, 8)),
    "temporal": (lambda: spiking_network(coding="temporal"), (T, B, 2, 8, 8)),
    "poisson": (lambda: spiking_network(coding="poisson"), (B, 2, 8, 8)),
    "seeded": (lambda: spiking_network(coding="poisson", seed=3, readout=lambda y: y.mean(0)), (B, 2, 8, 8)),
}


def states(net):
    return [(m.v, getattr(m, "v_seq", None)) for m in net.modules() if hasattr(m, "v")]


def assert_same_states(a, b):
    assert len(a) == len(b) > 0
    for (v, v_seq), (w, w_seq) in zip(a, b, strict=True):
        assert torch.equal(v, w)
        assert (v_seq is None) == (w_seq is None)
        assert v_seq is None or torch.equal(v_seq, w_seq)


def compare(whole, x, chunk, training, **kwargs):
    """Outputs, states and input gradients of both ways; gradients of parameters to rounding."""
    part = copy.deepcopy(whole)
    found = []
    for net, call in ((whole, lambda net, x: net(x)), (part, lambda net, x: chunked(net, x, chunk, **kwargs))):
        net.train(training)
        torch.manual_seed(7)
        leaf = x.clone().requires_grad_()
        y = call(net, leaf)
        torch.manual_seed(8)
        before = states(net)
        extra = sum(v.double().square().sum() for v, _ in before)  # the final states have gradients too
        ((y * torch.randn_like(y)).double().sum() + extra).backward()
        assert [v is w for (v, _), (w, _) in zip(before, states(net), strict=True)] == [True] * len(before)
        found.append((y.detach(), before, leaf.grad, [p.grad for p in net.parameters()]))
        assert y.flatten(1).std() > 0 or y.numel() < 100, "no neuron fires"
    (y, state, grad, grads), (y_part, state_part, grad_part, grads_part) = found
    assert torch.equal(y, y_part)
    assert_same_states(state, state_part)
    assert (grad is None) == (grad_part is None)
    for a, b in zip(grads + [grad] * (grad is not None), grads_part + [grad_part] * (grad is not None), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-5 * a.abs().max().item())
    return grad, grad_part


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_results_states_and_gradients_are_those_of_the_whole(name, training):
    make, shape = CASES[name]
    net = make()
    if training and name == "folded":
        net[1].eval(), net[4].norm.eval()
        net.train = lambda mode: net  # batch norms stay in evaluation
    grad, grad_part = compare(net, torch.rand(shape), 4, training)
    if name in ("sequence", "folded", "temporal"):
        assert torch.equal(grad, grad_part)  # each element of the input is in one chunk


@settings(max_examples=20)
@given(T=st.integers(1, 12), chunk=st.integers(1, 14), B=st.integers(1, 3), N=st.integers(1, 9))
def test_any_number_of_steps(T, chunk, B, N):
    net = nn.Sequential(snnfast.LIFNode(step_mode="m"), snnfast.layer.Linear(N, 2), snnfast.IFNode(step_mode="m"))
    compare(net.double(), torch.randn(T, B, N, dtype=torch.float64) * 2, chunk, True)


@pytest.mark.parametrize("steps", [1, 4, 5, 7])
@pytest.mark.parametrize("chunk", [2, 3, 6, 9])
def test_any_number_of_folded_steps(steps, chunk):
    net = nn.Sequential(nn.Linear(6, 5), snnfast.LIFNode(timesteps=steps), nn.Linear(5, 3))
    compare(busy(net).double(), torch.randn(steps * B, 6, dtype=torch.float64), chunk, True)


def test_single_folded_steps_cannot_be_told_from_a_mean():
    net = nn.Sequential(nn.Linear(6, 5), snnfast.LIFNode(timesteps=T))
    with pytest.raises(ValueError, match="chunks of 2 steps and more where time is folded"):
        chunked(net, torch.randn(T * B, 6), 1)
    functional.reset_net(net)
    net = nn.Sequential(net, nn.Unflatten(0, (-1, B)))
    compare(net, torch.randn(T * B, 6) * 4, 1, True)


def test_potentials_of_single_steps_and_of_neurons_that_do_not_run():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            single = snnfast.LIFNode(store_v_seq=True)
            self.steps = snnfast.layer.MultiStepContainer(nn.Linear(6, 5), single)
            self.other = snnfast.LIFNode(step_mode="m", store_v_seq=True)

        def forward(self, x):
            return self.steps(x)

    net = busy(Part()).double()
    x = torch.randn(T, B, 6, dtype=torch.float64)
    net.other(x)
    before = net.other.v_seq
    compare(net, x, 4, True)
    functional.reset_net(net.steps)
    chunked(net, x, 4)
    assert net.other.v_seq is before


@pytest.mark.parametrize("outer", [lambda net, x: chunked(net, x, 4), checkpoint], ids=["chunked", "checkpoint"])
def test_within_another(outer):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            net = sequence_network().eval().double()
            self.first, self.second, self.inner = net[:2], net[2:], lambda net, x: net(x)

        def forward(self, x):
            return self.inner(self.second, self.inner(self.first, x))

    net = Halves()
    x = torch.randn(T, B, 8, dtype=torch.float64)
    want = x.clone().requires_grad_()
    net(want).square().sum().backward()
    assert want.grad.abs().sum() > 0
    for inner in (lambda net, x: chunked(net, x, 2), checkpoint):
        functional.reset_net(net)
        net.inner = inner
        got = x.clone().requires_grad_()
        outer(net, got).square().sum().backward()
        torch.testing.assert_close(got.grad, want.grad)


def test_states_go_on_from_where_they_were():
    net = sequence_network().eval()
    x = torch.randn(2 * T, B, 8)
    want = net(x)
    functional.reset_net(net)
    got = torch.cat([chunked(net, x[:T], 3), chunked(net, x[T:], 4)])
    assert torch.equal(got, want)
    got.sum().backward()


def test_a_spiking_network_starts_afresh_unless_told_otherwise():
    net = spiking_network().eval()
    x = torch.randn(B, 2, 8, 8)
    want = net(x)
    assert torch.equal(chunked(net, x, 3), want)
    assert torch.equal(chunked(net, x, 3), want)
    net.auto_reset = False
    on = chunked(net, x, 3)
    assert not torch.equal(on, want)
    functional.reset_net(net)
    assert torch.equal(net(x), want)
    assert torch.equal(net(x), on)


def test_the_network_has_its_settings_back():
    net = spiking_network(coding="temporal", readout=lambda y: y.sum(0))
    x = torch.randn(T, B, 2, 8, 8)

    def of(net):
        return [
            (name, value)
            for m in net.modules()
            for name, value in vars(m).items()
            if name in ("timesteps", "_timesteps", "auto_reset", "restored", "coding", "readout", "next_mask", "masks")
        ]

    before = of(net)
    y = chunked(net, x, 3)
    assert of(net) == before
    y.sum().backward()
    assert of(net) == before
    with pytest.raises(RuntimeError):
        chunked(net, torch.randn(T, B, 3, 8, 8), 3)
    assert of(net) == before


# ---- batch norm and dropout ----
def test_running_statistics_are_updated_once_for_each_chunk():
    net = folded_network()
    want = copy.deepcopy(net)
    x = torch.randn(T * B, 2, 8, 8) * 2
    y = chunked(net, x, 4, chunk_statistics=True)
    after = [b.clone() for b in net.buffers()]
    y.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(after, net.buffers(), strict=True))
    for part in x.unflatten(0, (T, B)).split(4):
        for module in want.modules():
            if hasattr(module, "timesteps"):
                module.timesteps = len(part)
        want(part.flatten(0, 1))
    for a, b in zip(net.buffers(), want.buffers(), strict=True):
        assert torch.equal(a, b)


def test_batch_statistics_must_be_accepted():
    net = folded_network()
    x = torch.randn(T * B, 2, 8, 8)
    with pytest.raises(ValueError, match=r"'1', a BatchNorm2d in training.*chunk_statistics=True"):
        chunked(net, x, 4)
    net.eval()
    chunked(net, x, 4)
    node = snnfast.fused.BatchNormNode(nn.BatchNorm2d(2), snnfast.IFNode(timesteps=T), per_step=True)
    want = copy.deepcopy(node)(x)
    assert torch.equal(chunked(node, x, 4), want)


def test_stochastic_depth_drops_a_sample_at_all_steps():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm, self.drop, self.relu = nn.Linear(6, 6), nn.BatchNorm1d(6), DropPath(0.5), nn.ReLU()

        def forward(self, x):
            return x + self.drop(self.relu(self.norm(self.fc(x))))

    net = snnfast.to_spiking(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Block(), nn.Linear(6, 3)), 6)
    assert snnfast.fuse(net).fused == [("2.norm", "2.relu")]  # a draw hides nothing from the trace
    x = torch.rand(16, 6) * 3
    with torch.no_grad():
        net(x)
    net[2].norm.eval()
    torch.manual_seed(0)
    want = net(x)
    torch.manual_seed(0)
    assert torch.equal(chunked(net, x, 2), want)


def test_one_dropout_in_several_places_has_a_mask_for_each():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)
            self.wide, self.relu, self.drop = nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.5)

        def forward(self, x):
            x = self.drop(self.relu(self.fc1(x)))
            x = self.drop(self.relu(self.fc2(x)))
            return self.fc3(x), self.drop(self.relu(self.wide(x)))

    net = snnfast.to_spiking(busy(Shared()), T)
    x = torch.rand(B, 8)
    found = []
    for call in (net, lambda x: chunked(net, x, 3)):
        torch.manual_seed(0)
        net.zero_grad()
        y, wide = call(x)
        assert 0 < wide.mean() < 1
        (y.sum() + wide.sum()).backward()
        found.append((y.detach(), wide.detach(), net.fc2.weight.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_dropout_draws_again_what_it_drew():
    """nn.Dropout draws for each element, so the whole's numbers cannot be had; the gradient must fit the output."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    x = torch.ones(T, B, 8, requires_grad=True)
    y = chunked(net, x, 3)
    y.sum().backward()
    dropped = (y == 0).flatten(0, 1).double()
    want = (1 - dropped).sum(0).float() * 2  # each bias's gradient counts what was let through
    assert torch.equal(net[0].bias.grad, want)


def test_a_graph_that_is_kept_can_be_run_through_again():
    net = sequence_network().eval()
    x = torch.randn(T, B, 8, requires_grad=True)
    y = chunked(net, x, 4).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    after = [m.v.clone() for m in net.modules() if isinstance(m, snnfast.LIFNode)]
    assert torch.equal(torch.autograd.grad(y, x)[0], first)
    assert first.abs().sum() > 0
    assert all(map(torch.equal, after, (m.v for m in net.modules() if isinstance(m, snnfast.LIFNode))))


# ---- memory ----
def test_only_a_chunk_is_in_memory_at_a_time():
    live, most = [0], [0]

    class Watch(torch.autograd.Function):
        """Keeps a tensor for backward and counts how many such there are."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(Counted.of(x))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            ctx.saved_tensors  # noqa: B018 (the recomputation happens here)
            return grad

    class Counted:
        @staticmethod
        def of(x):
            t = x.detach().clone()
            live[0] += len(t)
            most[0] = max(most[0], live[0])
            weakref.finalize(t.untyped_storage(), Counted.gone, len(t))
            return t

        @staticmethod
        def gone(steps):
            live[0] -= steps

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.neuron = nn.Linear(8, 8), snnfast.LIFNode(step_mode="m")

        def forward(self, x):
            return Watch.apply(self.neuron(self.linear(x)))

    net = Layer()
    x = torch.randn(64, B, 8)
    y = chunked(net, x, 8)
    assert live[0] <= 8
    y.sum().backward()
    assert most[0] <= 16, "more than a chunk and the one that is let go"
    functional.reset_net(net)
    del y
    most[0] = 0
    net(x).sum().backward()
    assert most[0] == 64


def test_without_gradients_nothing_is_recomputed():
    net = sequence_network().eval()
    calls = []
    net.register_forward_hook(lambda *args: calls.append(1))
    x = torch.randn(T, B, 8)
    with torch.no_grad():
        y = chunked(net, x, 4)
    assert len(calls) == 3
    functional.reset_net(net)
    assert torch.equal(y, net(x))


def test_within_packed_spikes_and_autocast():
    net = nn.Sequential(snnfast.layer.Linear(64, 64), snnfast.LIFNode(step_mode="m"), snnfast.layer.Linear(64, 64))
    x = torch.randn(T, 32, 64)
    found = []
    for call in (lambda: net(x), lambda: chunked(net, x, 4)):
        functional.reset_net(net)
        net.zero_grad()
        with snnfast.packed_spikes(), torch.autocast("cpu", torch.bfloat16):
            y = call()
        y.float().square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in net.parameters())])
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * a.abs().max().item())


def test_several_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.neuron = snnfast.LIFNode(step_mode="m")

        def forward(self, x):
            s = self.neuron(x)
            return {"spikes": s, "sums": (s.sum(-1), [s.mean(-1)])}

    net = Two()
    x = torch.randn(T, B, 8)
    got = chunked(net, x, 4)
    functional.reset_net(net)
    want = net(x)
    assert torch.equal(got["spikes"], want["spikes"])
    assert torch.equal(got["sums"][0], want["sums"][0])
    assert torch.equal(got["sums"][1][0], want["sums"][1][0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu():
    make, shape = CASES["temporal"]
    net = make().cuda()
    compare(net, torch.rand(shape, device="cuda"), 4, True)


# ---- errors ----
def test_errors_say_what_would_do():
    net = sequence_network().eval()
    x = torch.randn(T, B, 8)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        chunked(lambda x: x, x, 4)
    for chunk in (0, 2.5, True):
        with pytest.raises((TypeError, ValueError), match="chunk must be"):
            chunked(net, x, chunk)
    with pytest.raises(ValueError, match="take a mean over time from the result"):
        chunked(nn.Flatten(0), x, 4)
    folded = folded_network().eval()
    with pytest.raises(ValueError, match=r"x must be \[T \* B, \*\] with timesteps=10"):
        chunked(folded, torch.randn(T * B + 1, 2, 8, 8), 4)
    folded[2].timesteps = 5
    with pytest.raises(ValueError, match=r"timesteps=\[5, 10\]"):
        chunked(folded, torch.randn(T * B, 2, 8, 8), 4)
    with pytest.raises(ValueError, match="max_pool='rates'"):
        chunked(spiking_network(max_pool="rates").eval(), torch.rand(B, 2, 8, 8), 4)
    with pytest.raises(ValueError, match="scale for each of T steps"):
        chunked(snnfast.layer.TemporalEffectiveBatchNorm1d(T, 8).eval(), x, 4)

    class Other(nn.Module):
        def reset(self):
            pass

    with pytest.raises(ValueError, match=r"'0', a Other, has a reset"):
        chunked(nn.Sequential(Other()), x, 4)
    with pytest.raises(ValueError, match="chunk that one"):
        chunked(nn.Sequential(spiking_network()).eval(), torch.rand(B, 2, 8, 8), 4)


class MeanOverTime(nn.Sequential):
    def forward(self, x):
        return super().forward(x).mean(0)


def test_what_would_come_out_as_something_else_is_refused():
    lif = snnfast.LIFNode
    x = torch.randn(16, 4, 6)
    cases = {
        "time as their first dimension": MeanOverTime(nn.Linear(6, 3), lif(step_mode="m")),  # B is the chunk's length
        "step_mode='s'": nn.Sequential(nn.Linear(6, 8), lif(), nn.Linear(8, 3)),
        "the GRU '0'": nn.Sequential(nn.GRU(6, 3)),
    }
    for message, net in cases.items():
        with pytest.raises(ValueError, match=message):
            snnfast.chunked(net, x, 4)


def test_no_mask_is_left_behind_by_an_error():
    net = snnfast.to_spiking(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)), 4)
    dropout = next(m for m in net.modules() if hasattr(m, "masks"))
    calls = []

    def fail(*_):
        calls.append(0)
        if len(calls) > 1:
            raise RuntimeError("second chunk")

    net.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="second chunk"):
        snnfast.chunked(net, torch.rand(2, 6), 2)
    assert dropout.masks == ()
