"""NIR: the same spikes in Norse, snnTorch and SpikingJelly through their own importers."""

from __future__ import annotations

import contextlib
import io
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nir_networks import DT, randomised, spikes
from torch import nn

import snnfast
from snnfast.convert import from_nir, to_nir

pytest.importorskip("nir", reason="nir is not installed")


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def run_steps(module, x, stateful=True):
    """A peer's module over time, its state handed on."""
    state, out = None, []
    with torch.no_grad():
        for x_t in x:
            y = module(x_t, state) if stateful else module(x_t)
            y, state = y if isinstance(y, tuple) else (y, None)
            out.append(y)
    return torch.stack(out)


def in_norse(graph, x, dt=DT):
    norse = pytest.importorskip("norse.torch.utils.import_nir", reason="norse is not installed")
    with quiet():
        return run_steps(norse.from_nir(graph, ignore_warnings=True, dt=dt), x)


def in_snntorch(graph, x):
    snntorch = pytest.importorskip("snntorch.import_nir", reason="snntorch is not installed")
    with quiet():
        return run_steps(snntorch.import_from_nir(graph), x)


def in_spikingjelly(graph, x, dt=DT):
    sj = pytest.importorskip("spikingjelly.activation_based.nir_exchange", reason="spikingjelly is not installed")
    with quiet():
        return run_steps(sj.import_from_nir(graph, dt=dt), x)


def dense_net(kind, depth, width, **config):
    layers = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), kind(step_mode="m", **config)]
        nn.init.normal_(layers[-2].weight, std=1.5 / width**0.5)
        nn.init.normal_(layers[-2].bias, mean=0.3, std=0.3)
    return nn.Sequential(*layers)


def assert_same(got, expected):
    """Equal but for what the peer's other order of roundings moves across the threshold, which is next to nothing."""
    assert got.shape == expected.shape
    assert torch.equal(got, expected)


dense = {
    "depth": st.integers(1, 3),
    "width": st.integers(1, 24),
    "v_threshold": st.floats(0.3, 1.5),
    "T": st.integers(1, 12),
    "seed": st.integers(0, 10**6),
}


@settings(max_examples=25)
@given(tau=st.floats(1.2, 20.0), **dense)
def test_a_lif_graph_has_the_same_spikes_everywhere(tau, depth, width, v_threshold, T, seed):
    torch.manual_seed(seed)
    net = dense_net(snnfast.LIFNode, depth, width, tau=tau, v_threshold=v_threshold)
    x = torch.rand(T, 3, width) * 2
    expected = spikes(net, x)
    graph = to_nir(net, x, DT)
    assert_same(in_norse(graph, x), expected)
    assert_same(in_spikingjelly(graph, x), expected)
    assert_same(in_snntorch(graph, x), expected)


@settings(max_examples=15)
@given(tau=st.floats(1.2, 20.0), **dense)
def test_a_lif_graph_without_decay_of_the_input(tau, depth, width, v_threshold, T, seed):
    """r = tau: SpikingJelly and snnTorch read it, Norse does not look at r."""
    torch.manual_seed(seed)
    net = dense_net(snnfast.LIFNode, depth, width, tau=tau, v_threshold=v_threshold, decay_input=False)
    x = torch.rand(T, 3, width)
    expected = spikes(net, x)
    graph = to_nir(net, x, DT)
    assert_same(in_spikingjelly(graph, x), expected)
    assert_same(in_snntorch(graph, x), expected)


@settings(max_examples=25)
@given(**dense)
def test_an_if_graph_in_norse_and_spikingjelly(depth, width, v_threshold, T, seed):
    torch.manual_seed(seed)
    net = dense_net(snnfast.IFNode, depth, width, v_threshold=v_threshold)
    x = torch.rand(T, 3, width)
    expected = spikes(net, x)
    assert_same(in_norse(to_nir(net, x, DT, if_r="1", comparison=">"), x), expected)
    assert_same(in_spikingjelly(to_nir(net, x, DT, if_r="1/dt"), x), expected)


def test_differences_that_the_documentation_names():
    """docs/nir.md says what each peer does not read; when one learns it, the table is to be changed."""
    x = torch.rand(10, 3, 8) * 3
    torch.manual_seed(0)
    no_decay = dense_net(snnfast.LIFNode, 2, 8, decay_input=False)
    assert not torch.equal(in_norse(to_nir(no_decay, x, DT), x), spikes(no_decay, x))
    for kind in (snnfast.LIFNode, snnfast.IFNode):
        reset = dense_net(kind, 1, 8, v_reset=-0.2, v_threshold=0.4)
        expected = spikes(reset, x)
        assert 0.05 < expected.mean() < 0.95
        assert not torch.equal(in_norse(to_nir(reset, x, DT), x), expected)
        assert torch.equal(in_spikingjelly(to_nir(reset, x, DT), x), expected)
    with pytest.raises(AssertionError, match="v_leak not supported"):
        in_snntorch(to_nir(dense_net(snnfast.LIFNode, 1, 8, v_reset=-0.5), x, DT), x)
    integrate = dense_net(snnfast.IFNode, 2, 8)
    with pytest.raises(AssertionError, match="r != 1"):
        in_snntorch(to_nir(integrate, x, DT), x)
    with pytest.raises(TypeError, match="tuple"):
        in_snntorch(to_nir(integrate, x, DT, if_r="1"), x)
    with pytest.raises(ValueError, match="1 / dt"):
        in_spikingjelly(to_nir(integrate, x, DT, if_r="1"), x)
    grouped = randomised(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), snnfast.LIFNode()))
    image = torch.rand(5, 1, 4, 6, 6) * 2
    graph = to_nir(grouped, image[0], DT)
    with torch.no_grad():
        expected = torch.stack([grouped(x_t) for x_t in image])
    assert torch.equal(in_norse(graph, image), expected)
    assert torch.equal(in_snntorch(graph, image), expected)
    with pytest.raises(NotImplementedError, match="Grouped"):
        in_spikingjelly(graph, image)


def test_strict_comparison_is_exact_in_norse():
    """Inputs that reach the threshold exactly, which happens all the time with round weights."""
    net = nn.Sequential(snnfast.IFNode(v_threshold=0.75, step_mode="m"))
    x = torch.randint(0, 4, (20, 2, 9)) * 0.25
    expected = spikes(net, x)
    assert torch.equal(in_norse(to_nir(net, x, DT, if_r="1", comparison=">"), x), expected)
    assert not torch.equal(in_norse(to_nir(net, x, DT, if_r="1"), x), expected)


def test_a_convolutional_residual_graph_in_spikingjelly_and_norse():
    """NIR's Flatten does not count the batch; Norse gives it to torch, so it gets single samples without one."""
    T = 6

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.sn = snnfast.LIFNode(timesteps=T)

        def forward(self, x):
            return self.sn(self.conv(x)) + x

    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        snnfast.LIFNode(timesteps=T),
        Block(),
        nn.Flatten(),
        nn.Linear(48, 20),
        snnfast.LIFNode(timesteps=T, v_threshold=0.3),
    )
    net = randomised(net)
    x = torch.rand(T, 1, 2, 8, 8) * 3
    expected = spikes(net, x.flatten(0, 1)).unflatten(0, (T, 1))
    assert 0.02 < expected.mean() < 0.98
    graph = to_nir(net, x.flatten(0, 1), DT)
    assert_same(in_spikingjelly(graph, x), expected)
    assert_same(in_norse(graph, x[:, 0])[:, None], expected)


def test_a_graph_of_spikingjelly_is_read():
    sj = pytest.importorskip("spikingjelly.activation_based", reason="spikingjelly is not installed")
    from spikingjelly.activation_based import functional as sj_functional
    from spikingjelly.activation_based import nir_exchange

    theirs = nn.Sequential(
        sj.layer.Conv2d(2, 3, 3),
        sj.neuron.LIFNode(tau=3.0),
        sj.layer.Flatten(),
        sj.layer.Linear(108, 4),
        sj.neuron.IFNode(),
    )
    theirs = randomised(theirs)
    x = torch.rand(5, 2, 2, 8, 8) * 3
    graph = nir_exchange.export_to_nir(theirs, x[0], dt=DT)
    sj_functional.reset_net(theirs)
    with torch.no_grad():
        expected = torch.stack([theirs(x_t) for x_t in x])
    assert 0.02 < expected.mean() < 0.98
    assert torch.equal(spikes(from_nir(graph, DT, comparison=">="), x), expected)
