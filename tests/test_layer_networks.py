"""Step-mode containers and network functions: each against SpikingJelly's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import snnfast
from snnfast import functional, layer, neuron

sj_layer = pytest.importorskip("spikingjelly.activation_based.layer", reason="spikingjelly is not installed")
sj_functional = pytest.importorskip("spikingjelly.activation_based.functional")
sj_neuron = pytest.importorskip("spikingjelly.activation_based.neuron")


def _block(library, neurons):
    torch.manual_seed(0)
    conv = library.Conv2d(2, 3, 3, padding=1)
    return [conv, library.BatchNorm2d(3), neurons.LIFNode(v_threshold=0.3)]


@pytest.mark.parametrize(
    "container", ["MultiStepContainer", "StepModeContainer stateful", "StepModeContainer", "SeqToANN"]
)
@pytest.mark.parametrize("functions", ["ours", "theirs"])
def test_containers(container, functions):
    x = torch.randn(5, 2, 2, 6, 6)
    outputs = []
    for library, neurons in ((sj_layer, sj_neuron), (layer, neuron)):
        modules = _block(library, neurons)
        if container == "MultiStep":
            net = library.MultiStepContainer(*modules)
        elif container == "SeqToANN":
            net = library.SeqToANNContainer(*modules[:2])
        else:
            stateful = container.endswith("stateful")
            net = library.StepModeContainer(stateful, "s", *(modules if stateful else modules[:2]))
        # Our function knows their containers; their function knows only theirs.
        f = functional if functions == "ours" or library is layer else sj_functional
        whole = nn.Sequential(net)
        f.set_step_mode(whole, "m")
        assert all(m.step_mode == "s" for m in net)
        y = whole(x)
        f.reset_net(whole)
        again = whole(x)
        f.set_step_mode(whole, "s")  # their two multi-step containers have no step mode to refuse it
        outputs.append((y, again, list(whole.state_dict())))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert outputs[0][2] == outputs[1][2]
    assert outputs[1][0].abs().sum() > 0


def test_containers_refuse_multi_step_modules():
    with pytest.raises(ValueError, match="modules in a SeqToANNContainer must be in step mode 's', got 'm' for '0'"):
        layer.SeqToANNContainer(layer.Conv2d(2, 2, 1, step_mode="m"))
    with pytest.raises(ValueError, match="MultiStepContainer"):
        layer.MultiStepContainer(snnfast.IFNode(step_mode="m"))
    with pytest.raises(ValueError, match="StepModeContainer"):
        layer.StepModeContainer(True, "s", snnfast.IFNode(step_mode="m"))


def test_slices_of_a_container():
    net = layer.StepModeContainer(False, "m", nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    part = net[1:]
    assert (part.stateful, part.step_mode, list(part)) == (False, "m", list(net)[1:])
    assert net[-1] is part[-1]


def test_set_step_mode_keeps_what_it_is_told_to():
    class Cell(nn.Sequential):
        pass

    net = nn.Sequential(snnfast.IFNode(), Cell(snnfast.IFNode()))
    functional.set_step_mode(net, "m", keep_step_mode_instance=(Cell,))
    assert (net[0].step_mode, net[1][0].step_mode) == ("m", "s")
    functional.set_step_mode(net, "m")
    assert net[1][0].step_mode == "m"
    with pytest.raises(ValueError, match="step_mode must be 's' or 'm', got 'x'"):
        functional.set_step_mode(net, "x")
    with pytest.raises(TypeError, match=r"net must be a torch\.nn\.Module, got list"):
        functional.set_step_mode([net], "m")


def test_functions_on_sequences_are_theirs():
    x = torch.randn(5, 3, 4)
    modules = [nn.Linear(4, 6), nn.Sigmoid()]
    net = nn.Sequential(*modules)
    for single in (net, modules, tuple(modules), lambda v: net(v)):
        assert torch.equal(functional.multi_step_forward(x, single), sj_functional.multi_step_forward(x, single))
        assert torch.equal(functional.seq_to_ann_forward(x, single), sj_functional.seq_to_ann_forward(x, single))
    pair = functional.seq_to_ann_forward((x, x), lambda a, b: (a + b, a * b))
    assert torch.equal(pair[0], x + x)
    assert torch.equal(pair[1], x * x)
    with pytest.raises(
        ValueError, match=r"x_seq must hold tensors of one \[T, B\], got the shapes \(5, 3, 4\), \(4, 3, 4\)"
    ):
        functional.seq_to_ann_forward((x, x[:4]), torch.add)
    node = snnfast.LIFNode(step_mode="m")
    whole = node(x)
    node.reset()
    assert torch.equal(functional.chunk_multi_step_forward(2, x, node), whole)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 4), steps=st.integers(0, 7))
def test_small_functions_are_theirs(seed, n, steps):
    torch.manual_seed(seed)
    labels = torch.randint(0, 5, (6,))
    assert torch.equal(functional.redundant_one_hot(labels, 5, n), sj_functional.redundant_one_hot(labels, 5, n))
    spikes = (torch.rand(3, 4, 8) < 0.3).float()
    assert torch.equal(functional.first_spike_index(spikes), sj_functional.first_spike_index(spikes))
    x = torch.randn(5, 2)
    assert torch.equal(functional.delay(x, steps), sj_functional.delay(x, steps))
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(3, 4))
    weights = []
    for f in (functional, sj_functional):
        torch.manual_seed(seed)
        f.kaiming_normal_conv_linear_weight(net)
        weights.append([p.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("kind", ["ElementWise", "Linear"])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_recurrent_containers_are_theirs(kind, step_mode):
    x = torch.randn(6, 2, 3)
    results, keys = [], []
    for library, neurons in ((sj_layer, sj_neuron), (layer, neuron)):
        torch.manual_seed(0)
        node = neurons.LIFNode(v_threshold=0.3)
        if kind == "Linear":
            net = library.LinearRecurrentContainer(nn.Sequential(nn.Linear(3, 5), node), 3, 5)
        else:
            net = library.ElementWiseRecurrentContainer(node, lambda y, x: 0.7 * y + x)
        f = functional if library is layer else sj_functional
        f.set_step_mode(net, step_mode)
        assert node.step_mode == "s"
        calls = []
        for _ in range(2):
            y = net(x) if step_mode == "m" else torch.stack([net(x_t) for x_t in x])
            calls.append(y)
            f.reset_net(net)
        grads = torch.autograd.grad(y.sum(), list(net.parameters())) if kind == "Linear" else []
        results.append([*calls, *grads])
        keys.append(list(net.state_dict()))
    assert keys[0] == keys[1]
    assert results[1][0].sum() > 0
    assert torch.equal(results[1][0], results[1][1])
    for t, o in zip(*results, strict=True):
        assert torch.allclose(t, o, rtol=1e-5, atol=1e-6)
    assert net(x[:, :1] if step_mode == "m" else x[0, :1]).shape[-2] == 1  # another batch starts afresh
    with pytest.raises(ValueError, match="sub_module must be in step mode 's', got 'm'"):
        layer.ElementWiseRecurrentContainer(snnfast.IFNode(step_mode="m"), torch.add)
