"""``unroll`` against the loop over time that it replaces."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_checks import assert_close, tensors
from torch import nn
from torch.nn import functional as F
from unroll_networks import FullyConnected

import snnfast
from snnfast.convert import unroll_graph
from snnfast.convert.unroll_graph import Program

snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
norse = pytest.importorskip("norse.torch", reason="norse is not installed")
sj = pytest.importorskip("spikingjelly.activation_based.neuron", reason="spikingjelly is not installed")


def sixteenths(t: torch.Tensor) -> torch.Tensor:
    """Values whose sums are exact in any order: batched and single layers then agree to the bit."""
    return (t * 16).round() / 16


def exact(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(sixteenths(p * 2))
    return model


def loop(model, steps, state=()):
    """The user's loop, stacked as ``unroll`` returns it; with states passed on if there are any."""
    collected = []
    for x in steps:
        out = model(x, *state)
        if state:
            state = out[1:]
        collected.append(out)
    if not isinstance(collected[0], tuple):
        return torch.stack(collected)
    return tuple(torch.stack(parts) for parts in zip(*collected, strict=True))


def assert_unrolls(model, x, timesteps=None, state=(), unrolled=None, bn="per_step"):
    """Outputs, buffers and gradients of the loop on ``model`` and of ``unroll`` on a copy."""
    other = copy.deepcopy(model) if unrolled is None else unrolled
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    want = loop(model, a if timesteps is None else [a] * timesteps, state)
    got = snnfast.unroll(other, b, timesteps, state=state, bn=bn)
    assert len(tensors(want)) == len(tensors(got))
    for k, (w, g) in enumerate(zip(tensors(want), tensors(got), strict=True)):
        assert w.shape == g.shape
        assert torch.equal(w, g), f"output {k}: {(w != g).sum()} of {w.numel()} differ"
    grads = [torch.randn_like(w) for w in tensors(want)]
    torch.autograd.backward(tensors(want), grads)
    torch.autograd.backward(tensors(got), grads)
    assert_close(a.grad, b.grad, "grad_x")
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_close(p.grad, q.grad, name, 1e-4 if p.numel() == 1 else 1e-5)
    for (name, p), q in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7), name
    return got


def convolutional():
    """The network of snnTorch's tutorial 6."""
    common = {"beta": 0.5, "init_hidden": True}
    return nn.Sequential(
        nn.Conv2d(1, 3, 5),
        nn.MaxPool2d(2),
        snntorch.Leaky(**common),
        nn.Conv2d(3, 4, 5),
        nn.MaxPool2d(2),
        snntorch.Leaky(**common),
        nn.Flatten(),
        nn.Linear(16, 5),
        snntorch.Leaky(**common, output=True),
    )


@settings(max_examples=25)
@given(
    constant=st.booleans(),
    accelerated=st.booleans(),
    reset=st.sampled_from(("subtract", "zero", "none")),
    delay=st.booleans(),
    T=st.integers(1, 7),
    B=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_states_threaded_through_forward(constant, accelerated, reset, delay, T, B, seed):
    torch.manual_seed(seed)
    model = exact(FullyConnected(reset_mechanism=reset, reset_delay=delay, learn_beta=True))
    other = copy.deepcopy(model)
    if accelerated:
        snnfast.accelerate(other)
    x = sixteenths(torch.randn(*(() if constant else (T,)), B, 12) * 2)
    assert_unrolls(model, x, T if constant else None, (torch.zeros(0), torch.zeros(0)), other)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_the_convolutional_tutorial_network(accelerated, constant):
    model = exact(convolutional())
    other = copy.deepcopy(model)
    if accelerated:
        snnfast.accelerate(other)
    x = sixteenths(torch.randn(*(() if constant else (6,)), 3, 1, 20, 20))
    spikes, potentials = assert_unrolls(model, x, 6 if constant else None, unrolled=other)
    assert spikes.shape == potentials.shape == (6, 3, 5)
    assert 0 < spikes.mean() < 1


def test_layers_before_the_first_neuron_run_once_for_a_constant_input():
    calls = []
    model = convolutional()
    for k in (0, 3):
        model[k].register_forward_hook(lambda m, args, out, k=k: calls.append((k, out.shape[0])))
    snnfast.unroll(model, torch.randn(3, 1, 20, 20), 6)
    assert calls == [(0, 3), (3, 18)]
    calls.clear()
    snnfast.unroll(model, torch.randn(6, 3, 1, 20, 20))
    assert calls == [(0, 18), (3, 18)]


class Residual(nn.Module):
    """A constant branch and a spiking one meet, and a size is read from the input."""

    def __init__(self, reads_size=False):
        super().__init__()
        self.a, self.lif, self.b = nn.Linear(6, 6), snnfast.LIFNode(), nn.Linear(6, 4)
        self.reads_size = reads_size

    def forward(self, x):
        cur = self.a(x)
        y = self.lif(cur) + cur
        y = y.view(x.size(0), -1) if self.reads_size else torch.relu(y)
        return {"logits": self.b(y), "current": cur}


@pytest.mark.parametrize("reads_size", [False, True])
@pytest.mark.parametrize("timesteps", [None, 5])
def test_branches_and_nests(reads_size, timesteps):
    model = exact(Residual(reads_size))
    x = sixteenths(torch.randn(*(() if timesteps else (5,)), 3, 6))
    want = [model(step) for step in ([x] * 5 if timesteps else x)]
    model.lif.reset()
    got = snnfast.unroll(model, x, timesteps)
    for name in ("logits", "current"):
        assert torch.equal(got[name], torch.stack([w[name] for w in want]))


class Picks(nn.Module):
    """A neuron whose membrane is taken from the end of what it returns, or by a slice."""

    def __init__(self, pick):
        super().__init__()
        self.lif, self.pick = snntorch.Synaptic(alpha=0.5, beta=0.75), pick

    def forward(self, x):
        return self.pick(self.lif(x))


@pytest.mark.parametrize("pick", [lambda r: (r[0], r[-1]), lambda r: r[1:], lambda r: r[2]], ids=("end", "slice", "2"))
def test_elements_of_what_a_neuron_returns(pick):
    model = Picks(pick)
    other = copy.deepcopy(model)
    snnfast.accelerate(other)
    assert_unrolls(model, sixteenths(torch.rand(5, 3, 4)), unrolled=other)


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("constant", [False, True])
def test_batch_norm_runs_per_step(track, momentum, constant):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 8, bias=False),  # batch norm leaves a bias no gradient but noise
            nn.BatchNorm1d(8, momentum=momentum, track_running_stats=track),
            snnfast.IFNode(),
            nn.BatchNorm1d(8, momentum=momentum),
        )

    x = torch.randn(*(() if constant else (5,)), 4, 6) * 2
    assert_unrolls(make(), x, 5 if constant else None)


def test_merged_batch_norm_is_one_call_over_all_steps():
    model = nn.Sequential(nn.BatchNorm1d(6), snnfast.IFNode())
    other = copy.deepcopy(model)
    x = torch.randn(5, 4, 6)
    got = snnfast.unroll(other, x, bn="merged")
    want = model[1].multi_step_forward(model[0](x.flatten(0, 1)).unflatten(0, (5, 4)))
    assert torch.equal(got, want)
    assert torch.equal(model[0].running_mean, other[0].running_mean)
    assert other[0].num_batches_tracked == 1


def test_dropout_draws_a_mask_for_each_step():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6, bias=False), snnfast.IFNode())
    model[1].weight.data.copy_(torch.eye(6))
    out = snnfast.unroll(model, torch.ones(64, 6), 4)
    assert not torch.equal(out[0], out[1] * 0 + out[0].flip(0))
    assert abs(out.mean() - 0.5) < 0.1
    assert not torch.equal(out[0], out[1])


class Draws(nn.Module):
    """A random input to a neuron that passes it on."""

    def __init__(self, draw):
        super().__init__()
        self.draw, self.lif = draw, snnfast.LIFNode()

    def forward(self, x):
        y = self.draw(x)
        return y, self.lif(y)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: F.dropout(x, 0.5),
        lambda x: (torch.rand_like(x) < x).float(),
        torch.bernoulli,
        nn.Sequential(nn.Hardtanh(-1.0, -0.5), nn.RReLU()),
        snnfast.encoding.PoissonEncoder(),
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True),
    ],
    ids=("dropout", "rand_like", "bernoulli", "RReLU", "PoissonEncoder", "Transformer"),
)
def test_random_numbers_are_drawn_for_each_step_of_a_constant_input(draw):
    torch.manual_seed(0)
    drawn, _ = snnfast.unroll(Draws(draw), torch.full((2, 3, 4), 0.5), 5)
    assert len({tuple(step.flatten().tolist()) for step in drawn}) == 5


class Frozen(nn.Module):
    """Parts of forward run without gradients, or in another precision."""

    def __init__(self, mode):
        super().__init__()
        self.a, self.b, self.lif, self.mode = nn.Linear(6, 6), nn.Linear(6, 6), snnfast.LIFNode(), mode

    def forward(self, x):
        with self.mode():
            y = self.a(x)
        return self.lif(self.b(y.float())), y


@pytest.mark.parametrize(
    ("mode", "outer"),
    [
        (torch.no_grad, False),
        (lambda: torch.autocast("cpu", torch.bfloat16), False),
        (lambda: torch.autocast("cpu", enabled=False), False),
        (lambda: torch.autocast("cpu", enabled=False), True),
    ],
    ids=("no_grad", "autocast", "no autocast", "no autocast within"),
)
@pytest.mark.parametrize("constant", [False, True])
def test_modes_that_forward_sets(mode, outer, constant):
    model = exact(Frozen(mode))
    snnfast.unroll(model, torch.zeros(1, 1, 6))  # traced without the outer mode
    model.lif.reset()
    other = copy.deepcopy(model)
    x = sixteenths(torch.randn(*(() if constant else (5,)), 3, 6))
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        want = loop(model, [x] * 5 if constant else x)
        got = snnfast.unroll(other, x, 5 if constant else None)
    for w, g in zip(want, got, strict=True):
        assert w.dtype == g.dtype
        assert torch.equal(w, g)
        assert w.requires_grad == g.requires_grad
    want[0].float().sum().backward()
    got[0].float().sum().backward()
    assert (model.a.weight.grad is None) == (other.a.weight.grad is None) == (mode is torch.no_grad)


def test_a_first_call_without_gradients():
    model = exact(Frozen(torch.no_grad))
    x = sixteenths(torch.randn(5, 3, 6))
    with torch.no_grad():
        assert not snnfast.unroll(model, x)[0].requires_grad
    assert not model.lif.v.requires_grad
    model.lif.reset()
    s, y = snnfast.unroll(model, x)
    assert s.requires_grad
    assert not y.requires_grad, "forward's own no_grad"


@pytest.mark.parametrize("functional", [False, True])
def test_batch_norm_of_single_samples_in_channels_last(functional):
    # torch's batch norm has wrong gradients where a batch of 1 has another stride than channels last gives it.
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.neuron, self.fc = nn.BatchNorm2d(4), snnfast.LIFNode(), nn.Linear(64, 3)

        def forward(self, x):
            n = self.norm
            if functional:
                y = F.batch_norm(x.relu(), n.running_mean, n.running_var, n.weight, n.bias, n.training)
            else:
                y = n(x.relu())
            return self.fc(self.neuron(y.contiguous()).flatten(1))

    gradients = []
    for run in (lambda net, x: torch.stack([net(step) for step in x]), snnfast.unroll):
        torch.manual_seed(0)
        net = Net().double()
        x = torch.randn(3, 4, 4, 4).double().to(memory_format=torch.channels_last).requires_grad_()
        run(net, x.unflatten(0, (3, 1))).pow(2).sum().backward()
        gradients.append((x.grad, net.norm.weight.grad))
    for loop_grad, grad in zip(*gradients, strict=True):
        assert loop_grad.any()
        torch.testing.assert_close(grad, loop_grad)


def test_a_folded_neuron_is_refused_with_what_to_call():
    with pytest.raises(ValueError, match="With timesteps=2 the model runs all of them in one call: call it itself"):
        snnfast.unroll(nn.Sequential(snnfast.IFNode(timesteps=2)), torch.rand(4, 3, 6))


@torch.inference_mode()
def test_a_network_made_in_inference_mode():
    model = nn.Sequential(Picks(lambda r: r[2]), nn.Linear(6, 6), nn.Sequential(snnfast.LIFNode())).eval()
    model[2].register_buffer("unused", torch.ones(3))
    assert snnfast.unroll(model, torch.rand(5, 3, 6)).shape == (5, 3, 6)


def test_an_empty_batch_and_a_number_of_steps_of_numpy():
    model = nn.Sequential(nn.Linear(6, 5), snnfast.LIFNode())
    assert snnfast.unroll(model, torch.zeros(4, 0, 6)).shape == (4, 0, 5)
    assert snnfast.unroll(model, torch.zeros(0, 6), np.int64(4)).shape == (4, 0, 5)


def test_norse_networks_return_the_last_state():
    model = norse.SequentialState(nn.Linear(6, 8), norse.LIFCell(), nn.Linear(8, 5), norse.LIFBoxCell(), norse.LICell())
    exact(model)
    x = sixteenths(torch.randn(6, 3, 6) * 20)
    state, outs = None, []
    for step in x:
        out, state = model(step, state)
        outs.append(out)
    for accelerated in (False, True):
        if accelerated:
            snnfast.accelerate(model)
        got, last = snnfast.unroll(model, x)
        assert torch.equal(got, torch.stack(outs))
        assert [s is None for s in last] == [s is None for s in state]
        for a, b in zip(tensors(state), tensors(last), strict=True):
            assert torch.equal(a, b)


def test_spikingjelly_and_snnfast_neurons_and_a_lone_neuron():
    model = exact(nn.Sequential(nn.Linear(6, 6), sj.LIFNode(), nn.Linear(6, 6), sj.QIFNode(), snnfast.IFNode()))
    x = sixteenths(torch.randn(7, 3, 6) * 4)
    other = copy.deepcopy(model)
    snnfast.accelerate(other)
    assert_unrolls(model, x, unrolled=other)
    neuron = snntorch.Synaptic(alpha=0.5, beta=0.75)
    snnfast.accelerate(neuron)
    want = loop(snntorch.Synaptic(alpha=0.5, beta=0.75), x)
    got = snnfast.unroll(neuron, x)
    assert all(torch.equal(w, g) for w, g in zip(want, got, strict=True))
    assert torch.equal(neuron.mem, got[2][-1])


def test_neurons_with_hooks_and_without_a_fused_form_are_stepped():
    model = exact(nn.Sequential(nn.Linear(6, 6), snntorch.Lapicque(beta=0.5, init_hidden=True), snnfast.IFNode()))
    seen = []
    model[2].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    x = sixteenths(torch.randn(7, 3, 6) * 4)
    assert_unrolls(model, x)
    assert seen == [(3, 6)] * 14


class ForwardOfItsOwn(snnfast.LIFNode):
    def forward(self, x):
        return super().forward(3 * x)


class TheirsWithForward(sj.LIFNode):
    def forward(self, x):
        return super().forward(3 * x)


class TheirsWithStep(sj.LIFNode):
    def single_step_forward(self, x):
        return super().single_step_forward(3 * x)


class TheirsWithFunctionalStep(sj.LIFNode):
    def single_step_functional_forward(self, inputs, states, **keywords):
        return super().single_step_functional_forward((3 * inputs[0],), states, **keywords)


class Memory(snnfast.base.MemoryModule):
    def __init__(self):
        super().__init__()
        self.register_memory("v", 0.0)

    def forward(self, x):
        self.v = 0.5 * self.v + x
        return self.v


def patched(node):
    forward = node.forward
    node.forward = lambda x: forward(3 * x)
    return node


def patched_and_converted():
    leaky = snntorch.Leaky(beta=0.5, init_hidden=True)
    snnfast.accelerate(leaky)
    return patched(leaky)


@pytest.mark.parametrize(
    "make",
    [
        ForwardOfItsOwn,
        TheirsWithForward,
        TheirsWithStep,
        TheirsWithFunctionalStep,
        Memory,
        lambda: patched(snnfast.LIFNode()),
        patched_and_converted,
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_a_neuron_whose_step_a_subclass_changes_is_stepped(make, alone):
    model, other = (make() if alone else nn.Sequential(make()) for _ in range(2))
    assert_unrolls(model, torch.randn(5, 3, 6), unrolled=other)


def test_the_state_goes_on_as_in_the_loop():
    model = exact(nn.Sequential(nn.Linear(6, 6), snnfast.LIFNode()))
    x = sixteenths(torch.randn(8, 3, 6) * 2)
    want = loop(model, x)
    model[1].reset()
    got = torch.cat([snnfast.unroll(model, x[:5]), snnfast.unroll(model, x[5:])])
    assert torch.equal(got, want)


def test_training_and_evaluation_mode_and_an_exchanged_layer():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.9), snnfast.IFNode())
    x = torch.randn(5, 3, 6)
    snnfast.unroll(model, x)
    model.eval()
    model[2].reset()
    got = snnfast.unroll(model, x)
    model[2].reset()
    assert torch.equal(got, loop(model, x))
    model[0] = nn.Linear(6, 2)
    model[2].reset()
    assert snnfast.unroll(model, x).shape == (5, 3, 2)


class Annealed(nn.Module):
    """Reads numbers, flags and a buffer in ``forward``, as schedules in training scripts change them."""

    def __init__(self):
        super().__init__()
        self.fc, self.lif = nn.Linear(6, 6), snnfast.LIFNode()
        self.gain, self.skips, self.gains, self.rate = 1.0, False, [1.0], torch.tensor(1.0)
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x):
        x = self.fc(x) * self.gain * self.gains[0] * (1 / self.scale) * torch.exp(self.rate)
        s = self.lif(F.dropout(x, 0.9, self.training))
        return s + x if self.skips else s


def test_what_forward_reads_of_the_model_may_change_between_calls(monkeypatch):
    traced = []
    monkeypatch.setattr(unroll_graph, "Program", lambda *args: traced.append(args) or Program(*args))
    net = Annealed().eval()
    model = nn.Sequential(net)  # whose own mode stays
    x = torch.randn(5, 3, 6)

    def changes(net):
        yield net
        net.gain = 4.0
        yield net
        net.gains[0] = 0.5
        yield net
        net.scale.mul_(0.25)
        yield net
        net.rate = torch.tensor(-1.0)
        yield net
        net.skips = True
        yield net

    results = []
    for _ in changes(net):
        net.lif.reset()
        snnfast.unroll(model, x)
        net.lif.reset()
        got = snnfast.unroll(model, x)
        net.lif.reset()
        assert torch.equal(got, loop(model, x))
        results.append(got)
        assert len(traced) == len(results)  # once for each change
    net.train()
    net.lif.reset()
    assert not torch.equal(snnfast.unroll(model, x), results[-1])  # now dropout drops


class InPlace(nn.Module):
    """Writes to what another name has too, and makes what it needs at its first call."""

    def __init__(self):
        super().__init__()
        self.fc, self.lif, self.mask = nn.Linear(6, 6), snnfast.LIFNode(), None

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.arange(6) % 2.0
        x = shortcut = self.fc(x) * 4
        x += self.mask
        s = spikes = self.lif(shortcut)
        s *= 2
        return spikes + shortcut


@pytest.mark.parametrize("constant", [False, True])
def test_what_forward_writes_in_place_and_makes_once(constant):
    net = InPlace()
    want = copy.deepcopy(net)
    x = torch.randn(3, 6) if constant else torch.randn(5, 3, 6)
    for _ in range(2):
        got = snnfast.unroll(net, x, 5 if constant else None)
        assert torch.equal(got, loop(want, x.expand(5, 3, 6)))
    assert torch.equal(net.mask, want.mask)


class ConvWithNeuron(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.lif = snnfast.LIFNode()

    def forward(self, x):
        return self.lif(super().forward(x) * 4)


class FunctionalNorm(nn.Module):
    """As timm's BatchNormAct2d calls it, with statistics of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.lif, self.again = nn.BatchNorm1d(6), snnfast.LIFNode(), snnfast.LIFNode()

    def forward(self, x):
        n = self.norm
        x = self.lif(x)
        x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, self.training, n.momentum, n.eps)
        return self.again(x * 2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: nn.Sequential(ConvWithNeuron(2, 3, 3)), (2, 6, 6)), (FunctionalNorm, (6,))],
    ids=["layer with a neuron inside", "functional batch norm"],
)
def test_layers_that_are_not_quite_torchs(make, shape, training):
    loop = make().train(training)
    net = copy.deepcopy(loop)
    x = torch.randn(5, 3, *shape) * 2
    want = torch.stack([loop(step) for step in x])
    assert 0.02 < want.mean() < 0.9
    assert torch.equal(snnfast.unroll(net, x), want)
    for a, b in zip(net.buffers(), loop.buffers(), strict=True):
        assert torch.allclose(a, b)
