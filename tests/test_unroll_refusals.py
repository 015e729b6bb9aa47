"""What ``unroll`` refuses or says: networks that cannot be unrolled, arguments, and an x that may mean two things."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from unroll_networks import FullyConnected

import snnfast
from snnfast import _notices, functional, layer

snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
sj = pytest.importorskip("spikingjelly.activation_based.neuron", reason="spikingjelly is not installed")
norse = pytest.importorskip("norse.torch", reason="norse is not installed")


class OwnLoop(nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.fc, self.lif, self.fixed = nn.Linear(6, 6), snntorch.Leaky(beta=0.5), fixed

    def forward(self, x):
        mem, found = self.lif.init_leaky(), []
        for t in range(5 if self.fixed else x.size(0)):
            spk, mem = self.lif(self.fc(x if self.fixed else x[t]), mem)
            found.append(spk)
        return torch.stack(found)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.back, self.lif = nn.Linear(6, 6), nn.Linear(6, 6), snnfast.IFNode()

    def forward(self, x, before):
        return self.lif(self.fc(x) + self.back(before))


class KeepsState(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.v = nn.Linear(6, 6), 0.0

    def forward(self, x):
        self.v = self.v * 0.5 + self.fc(x)
        return self.v


class Mixes(nn.Module):
    def __init__(self):
        super().__init__()
        self.lif = snnfast.IFNode()

    def forward(self, x):
        return self.lif(x).mean(0)


class NormWithNeuron(nn.BatchNorm1d):
    def __init__(self, features):
        super().__init__(features)
        self.lif = snnfast.LIFNode()

    def forward(self, x):
        return self.lif(super().forward(x))


class Counts(nn.Module):
    def __init__(self, past_autograd):
        super().__init__()
        self.past_autograd = past_autograd
        self.lif = snnfast.LIFNode()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        (self.calls.data if self.past_autograd else self.calls).add_(1)
        return self.lif(x)


class Step(nn.Module):
    """A layer and a neuron, for a forward of the test's own."""

    def __init__(self, neuron, **attributes):
        super().__init__()
        self.fc, self.lif = nn.Linear(6, 6), neuron()
        self.__dict__.update(attributes)


def step(forward, neuron=snnfast.LIFNode, **attributes):
    return type("Step", (Step,), {"forward": forward})(neuron, **attributes)


def leaky(**keywords):
    return snntorch.Leaky(beta=0.5, **keywords)


def reads_v(m, x):
    return m.lif(m.fc(x)), m.lif.v


def reads_mem(m, x):
    return m.lif(m.fc(x)), m.lif.mem


def scales_by_v(m, x):
    return m.lif(m.fc(x)) * m.lif.v


def resets(m, x):
    functional.reset_net(m)
    return m.lif(m.fc(x))


def counts(m, x):
    m.steps += 1
    return m.lif(m.fc(x)) / m.steps


COUNTER = itertools.count(1)


def counts_elsewhere(m, x):
    m.config["steps"] += 1
    return m.lif(m.fc(x)) / m.config["steps"]


def counts_in_a_tensor(m, x):
    m.count += 1
    return m.lif(m.fc(x) / m.count)


def counts_by_an_iterator(m, x):
    return m.lif(m.fc(x)) / next(COUNTER)


def draws_by_numpy(m, x):
    return m.lif(m.fc(x)) * np.random.random()


def writes_a_parameter(m, x):
    m.fc.weight.data.mul_(0.5)
    return m.lif(m.fc(x))


def writes_a_parameter_by_a_tensor(m, x):
    y = m.fc(x)
    m.fc.weight.data += 0.1 * y.T @ x
    return m.lif(y)


def adds_to_the_state_in_place(m, x):
    spk, mem = m.lif(m.fc(x))
    mem += 1
    return spk


def records(m, x):
    m.record.append(m.lif(m.fc(x)))
    return m.record[-1]


def draws(m, x):
    return m.lif(m.fc(x) + torch.rand(6))


def divides_by_the_largest(m, x):
    y = m.fc(x)
    return m.lif(y / y.max())


def clamps_the_state(m, x, mem):
    spk, mem = m.lif(m.fc(x), mem)
    return spk, mem.clamp(min=0)


def clamps_the_state_in_place(m, x):
    spk, mem = m.lif(m.fc(x))
    mem.clamp_(min=0)
    return spk


def swaps_the_states(m, x, syn, mem):
    spk, syn, mem = m.lif(m.fc(x), syn, mem)
    return spk, mem, syn


def synaptic():
    return snntorch.Synaptic(alpha=0.5, beta=0.75)


def drops_the_state(m, x, state=None):
    return m.lif(m.fc(x), state)[0]


def takes_no_state(m, x):
    return m.lif(m.fc(x))


EMPTY = (torch.zeros(0),)


@pytest.mark.parametrize(
    ("make", "state", "message"),
    [
        (lambda: step(reads_v), (), r"reads or sets lif\.v, the state"),
        (lambda: step(scales_by_v), (), r"reads or sets lif\.v, the state"),
        (lambda: step(scales_by_v, sj.LIFNode), (), r"reads or sets lif\.v, the state"),
        (lambda: step(reads_mem, lambda: leaky(init_hidden=True)), (), r"reads or sets lif\.mem, the state"),
        (lambda: step(resets), (), r"reads or sets lif\.v, the state"),
        (lambda: step(resets, sj.LIFNode), (), r"reads or sets lif\.v, the state"),
        (lambda: step(resets, lambda: leaky(init_hidden=True)), (), r"reads or sets lif\.mem, the state"),
        (lambda: step(counts, steps=0), (), "Step writes its attribute steps"),
        (lambda: step(counts_elsewhere, config={"steps": 0}), (), "Step writes its attribute config"),
        (lambda: step(counts_in_a_tensor, count=torch.zeros(())), (), "writes its attribute count"),
        (lambda: step(counts_by_an_iterator), (), r"another thing at each call \(truediv changes\)"),
        (lambda: step(draws_by_numpy), (), "another thing at each call"),
        (lambda: step(writes_a_parameter), (), r"forward writes fc\.weight \(mul_\)"),
        (lambda: step(writes_a_parameter_by_a_tensor), (), r"forward sets data of fc_weight"),
        (lambda: step(adds_to_the_state_in_place, leaky), (), "iadd where the loop takes the state that lif"),
        (lambda: step(records, record=[]), (), "Step keeps a result"),
        (lambda: step(draws), (), "draws random numbers"),
        (lambda: step(divides_by_the_largest), (), "takes one number, max_1, of all samples of all steps"),
        (lambda: step(clamps_the_state, leaky), EMPTY, "returns clamp where the loop takes the state that lif"),
        (lambda: step(clamps_the_state_in_place, leaky), (), "clamp_ where the loop takes the state that lif"),
        (lambda: step(swaps_the_states, synaptic), EMPTY * 2, "returns getitem_2 where the loop takes the state"),
        (lambda: step(drops_the_state, norse.LIFCell), (), "drops the state of lif"),
        (lambda: step(takes_no_state, norse.LIFBoxCell), (), "takes no state for lif"),
    ],
)
@pytest.mark.parametrize("accelerated", [False, True])
def test_what_forward_does_at_every_step_beside_calling_layers_is_refused(make, state, message, accelerated):
    model = make()
    if accelerated:
        snnfast.accelerate(model)
    x = torch.randn(5, 3, 6)
    state_before = {k: v.clone() for k, v in model.lif.named_buffers()}, getattr(model.lif, "v", None)
    before = copy.deepcopy({k: v for k, v in vars(model).items() if k in ("steps", "record", "config", "count")})
    with pytest.raises(ValueError, match=message):
        snnfast.unroll(model, x, state=state)
    assert {k: vars(model)[k] for k in before} == before
    if "takes one number" not in message:
        assert getattr(model.lif, "v", None) == state_before[1]
        assert all(torch.equal(v, state_before[0][k]) for k, v in model.lif.named_buffers())


def test_hooks_of_modules_that_are_not_called_are_refused():
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), snnfast.IFNode()))
    x = torch.randn(5, 3, 6)
    snnfast.unroll(model, x)
    for module in (model, model[0]):
        handle = module.register_forward_hook(lambda m, args, out: out * 2)
        with pytest.raises(ValueError, match="Sequential has hooks"):
            snnfast.unroll(model, x)
        handle.remove()
    snnfast.unroll(model, x)


@pytest.mark.parametrize("past_autograd", [False, True])
def test_a_buffer_that_forward_writes_is_refused_and_stays(past_autograd):
    net = Counts(past_autograd)
    with pytest.raises(ValueError, match="Counts writes its buffer calls in forward"):
        snnfast.unroll(net, torch.randn(5, 3, 6))
    assert net.calls == 0


@pytest.mark.parametrize(
    ("make", "state", "message"),
    [
        (lambda: nn.Sequential(NormWithNeuron(6)), (), r"0 \(NormWithNeuron\) is a batch norm with a neuron inside"),
        (lambda: OwnLoop(True), (), r"(?s)lif is called 5 times.*def forward.*snnfast.unroll"),
        (lambda: OwnLoop(False), (), r"(?s)own loop over time.*def forward.*snnfast.unroll"),
        (Recurrent, (torch.zeros(3, 6),), "recurrence"),
        (KeepsState, (), "KeepsState keeps a result"),
        (Mixes, (), "mixes samples"),
        (lambda: nn.Sequential(snnfast.IFNode(step_mode="m")), (), "step mode 'm'"),
        (lambda: norse.SequentialState(norse.LIF()), (), "takes all time steps"),
    ],
)
def test_refused_with_the_reason(make, state, message):
    model = make()
    before = {m: set(m.__dict__) for m in model.modules()}
    with pytest.raises(ValueError, match=message):
        snnfast.unroll(model, torch.randn(5, 3, 6), state=state)
    assert before == {m: set(m.__dict__) for m in model.modules()}  # nothing of the trace stays behind


def test_arguments_are_checked():
    model = nn.Sequential(snnfast.IFNode())
    with pytest.raises(TypeError, match=r"takes mem2: .*state=\(mem1, mem2,\)"):
        snnfast.unroll(FullyConnected(), torch.rand(5, 3, 12), state=(torch.zeros(0),))
    with pytest.raises(TypeError, match="mem1, mem2"):
        snnfast.unroll(FullyConnected(), torch.randn(5, 3, 12))
    with pytest.raises(TypeError, match="state must hold 2 at most, as many as forward takes beside x, got 3"):
        snnfast.unroll(FullyConnected(), torch.randn(5, 3, 12), state=torch.zeros(3, 6))
    with pytest.raises(ValueError, match="timesteps must be"):
        snnfast.unroll(model, torch.randn(3, 6), 0)
    with pytest.raises(ValueError, match="bn must be"):
        snnfast.unroll(model, torch.randn(3, 6), 2, bn="none")
    with pytest.raises(ValueError, match="T, B"):
        snnfast.unroll(model, torch.randn(3))
    with pytest.raises(TypeError, match="x must be"):
        snnfast.unroll(model, [1.0])


def test_sinabs_layers_take_all_steps_already():
    layers = pytest.importorskip("sinabs.layers", reason="sinabs is not installed")
    with pytest.raises(ValueError, match="takes all time steps"):
        snnfast.unroll(nn.Sequential(nn.Linear(6, 6), layers.IAF()), torch.randn(5, 3, 6))


# ---- what was meant by x ----
LAYERS = {
    "linear": (nn.Linear(3, 2), (4, 3)),
    "convolution": (nn.Conv2d(2, 3, 3), (4, 2, 6, 6)),
    "one sample": (nn.Linear(3, 2), (1, 3)),
    "batch norm": (nn.BatchNorm2d(2), (4, 2, 6, 6)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_input_without_time_is_refused_with_the_remedy(case):
    layer, shape = LAYERS[case]
    net, x = nn.Sequential(layer, snnfast.IFNode()), torch.rand(shape)
    with pytest.raises(
        ValueError, match=rf"^'0'(,| cannot) .*x of shape \({shape[0]}, .*read as \[T, B.*unroll\(model, x, timesteps=T"
    ):
        snnfast.unroll(net, x)
    assert snnfast.unroll(net, x, timesteps=2).shape[:2] == (2, shape[0])


def test_sequence_given_with_timesteps_is_refused_by_a_layer_or_said(recwarn):
    conv = nn.Sequential(nn.Conv2d(2, 3, 3), snnfast.IFNode())
    with pytest.raises(ValueError, match=r"timesteps=5 steps; if it is a sequence .*leave timesteps out"):
        snnfast.unroll(conv, torch.rand(5, 4, 2, 6, 6), 5)
    linear = nn.Sequential(nn.Linear(3, 2), snnfast.IFNode())
    snnfast.unroll(linear, torch.rand(6, 3), 6)  # a batch of as many samples is none
    snnfast.unroll(linear, torch.rand(2, 6, 3), 6)
    assert not [w for w in recwarn if "unroll" in str(w.message)]
    _notices._said.clear()
    with pytest.warns(UserWarning, match=r"x of shape \(6, 4, 3\) was read as \[B.*leave timesteps out") as told:
        snnfast.unroll(linear, torch.rand(6, 4, 3), 6)
    assert told[0].filename == __file__


def test_images_taken_for_a_sequence_of_one_sample_are_told(monkeypatch):
    monkeypatch.setattr(_notices, "_said", set())
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2), snnfast.IFNode())
    snnfast.unroll(net, torch.rand(5, 2, 1, 3, 4))
    with pytest.warns(UserWarning, match=r"5 time steps of 1 samples of shape \(3, 4\).*timesteps=T"):
        snnfast.unroll(net, torch.rand(5, 1, 3, 4))


def test_errors_that_no_shape_explains_pass_as_they_are():
    net = nn.Sequential(nn.Linear(3, 2), snnfast.IFNode())
    with pytest.raises(RuntimeError, match="dtype"):
        snnfast.unroll(net, torch.rand(5, 4, 3, dtype=torch.float64))


@pytest.mark.parametrize("first", [layer.Conv2d(1, 2, 3), layer.SeqToANNContainer(nn.Conv2d(1, 2, 3))])
def test_a_multi_step_network_is_told_so_whatever_its_first_layer(first):
    model = nn.Sequential(first, snnfast.IFNode())
    functional.set_step_mode(model, "m")
    with pytest.raises(ValueError, match=r"in step mode 'm': unroll takes a single-step model"):
        snnfast.unroll(model, torch.rand(4, 3, 1, 8, 8))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_a_wrapped_network_is_asked_for_itself(wrap):
    with pytest.raises(
        TypeError, match=r"wrapped in a (DataParallel: give model.module|OptimizedModule: give model._orig)"
    ):
        snnfast.unroll(wrap(nn.Sequential(nn.Linear(6, 6), snnfast.IFNode())), torch.rand(5, 3, 6))
