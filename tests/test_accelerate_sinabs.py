"""sinabs' LIF and IAF against themselves, accelerated."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_checks import assert_same
from torch import nn

import snnfast

sinabs = pytest.importorskip("sinabs", reason="sinabs is not installed")
from sinabs import activation as sa  # noqa: E402
from sinabs import layers as sl  # noqa: E402

from snnfast.convert.adapters import sinabs as adapter  # noqa: E402


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    cls=st.sampled_from(("LIF", "IAF", "LIFSqueeze", "IAFSqueeze")),
    spike_fn=st.sampled_from((sa.MultiSpike, sa.SingleSpike)),
    surrogate=st.one_of(
        st.builds(sa.SingleExponential, st.floats(0.2, 2), st.floats(0.2, 2)),
        st.builds(sa.Gaussian, st.just(0.0), st.floats(0.2, 2), st.floats(0.2, 2)),
    ),
    threshold=st.floats(0.3, 1.5),
    tau_each=st.booleans(),
    train_alphas=st.booleans(),
    norm_input=st.booleans(),
    batch=st.integers(1, 3),
    shape=st.sampled_from(((4,), (2, 3, 4))),
    T=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
def test_random_configurations(
    cls, spike_fn, surrogate, threshold, tau_each, train_alphas, norm_input, batch, shape, T, seed
):
    def make():
        torch.manual_seed(seed)
        keywords = {
            "spike_fn": spike_fn,
            "surrogate_grad_fn": surrogate,
            "spike_threshold": torch.tensor(threshold),
        }
        if cls.startswith("LIF"):
            keywords |= {"norm_input": norm_input, "train_alphas": train_alphas}
            keywords["tau_mem"] = torch.rand(shape) * 9 + 2 if tau_each else 7.0
        if cls.endswith("Squeeze"):
            keywords["batch_size"] = batch
        return getattr(sl, cls)(**keywords)

    def drive(layer, x):
        if cls.endswith("Squeeze"):
            x = x.flatten(0, 1)
        first = layer(x)
        rate = layer.firing_rate
        return first, rate, layer(x * 0.7), layer.v_mem  # the state and its graph go on

    torch.manual_seed(seed)
    assert_same(make, drive, torch.randn(batch, T, *shape) * 2 + 0.5, step=torch.Size((batch, *shape)))


def test_several_spikes_a_step_occur():
    out = sl.IAF()(torch.full((1, 3, 2), 2.5))
    assert out.max() > 1


@pytest.mark.parametrize("kind", [sa.SingleExponential(0.4, 1.5), sa.Gaussian(0.0, 0.6, 0.5)])
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_surrogate_mapping(kind, threshold):
    v, theta = torch.linspace(-3, 3, 1001, dtype=torch.float64), torch.tensor(threshold, dtype=torch.float64)
    ours = adapter.fused_surrogate(kind, theta)
    assert torch.allclose(kind(v, theta), ours.derivative(v - theta), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"tau_syn": 5.0}, "tau_syn"),
        ({"min_v_mem": -1.0}, "min_v_mem"),
        ({"spike_fn": sa.MaxSpike(3)}, "MaxSpike"),
        ({"spike_fn": None}, "None"),
        ({"reset_fn": sa.MembraneReset()}, "MembraneReset"),
        ({"reset_fn": sa.MembraneSubtract(0.5)}, "MembraneSubtract"),
        ({"record_states": True}, "record_states"),
        ({"surrogate_grad_fn": sa.MultiGaussian()}, "MultiGaussian"),
        ({"surrogate_grad_fn": sa.Gaussian(mu=0.1)}, "Gaussian"),
        ({"spike_threshold": torch.ones(3)}, "SingleExponential"),
    ],
)
def test_left_with_the_reason(keywords, reason):
    layer = sl.LIF(tau_mem=5.0, **keywords)
    report = snnfast.accelerate(layer)
    assert type(layer) is sl.LIF
    assert reason in report.left[0].reason
    assert "LIFRecurrent" in snnfast.accelerate(sl.LIFRecurrent(5.0, nn.Linear(3, 3))).left[0].reason


def test_a_new_batch_size_resamples_the_state_with_the_same_random_numbers():
    plain, fast = sl.LIF(tau_mem=5.0), sl.LIF(tau_mem=5.0)
    snnfast.accelerate(fast)
    x = torch.randn(4, 3, 6) * 2
    for part in (x, x[:3], x[:, :, :2], x):
        outs = []
        for layer in (plain, fast):
            torch.manual_seed(5)
            outs.append((layer(part), layer.v_mem, torch.rand(1)))
        assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_its_own_reset_state_dict_and_back():
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), sl.LIF(tau_mem=5.0), nn.Linear(8, 4), sl.IAF())

    net, x = network(), torch.randn(2, 5, 6) * 3
    want = net(x)
    sinabs.reset_states(net)
    keys = list(net.state_dict())
    snnfast.accelerate(net)
    for _ in range(2):
        out = net(x)
        assert torch.equal(out, want)
        assert out.is_contiguous()
        out.sum().backward()
        sinabs.reset_states(net)
        sinabs.zero_grad(net)
        assert not net[1].v_mem.any()
    assert list(net.state_dict()) == keys
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(again[1]) is type(net[1])
        sinabs.reset_states(again)
        assert torch.equal(again(x), want)
    snnfast.restore(net)
    assert type(net[1]) is sl.LIF


def test_a_learnt_threshold_and_other_dtypes_run_its_own_code():
    plain, fast = sl.LIF(tau_mem=5.0), sl.LIF(tau_mem=5.0)
    snnfast.accelerate(fast)
    x = torch.randn(2, 4, 3) * 3
    grads = []
    for layer in (plain, fast):
        layer.spike_threshold.requires_grad_(True)
        layer(x).sum().backward()
        grads.append(layer.v_mem)
        layer.reset_states()
    assert torch.equal(*grads)
    assert torch.equal(plain(x.double()), fast(x.double()))


@pytest.mark.parametrize("spike_fn", [sa.SingleSpike, sa.MultiSpike])
def test_a_potential_at_the_threshold_fires(spike_fn):
    x = (torch.randn(2, 20, 64) * 4).round() / 4
    assert sl.IAF(spike_fn=spike_fn)(torch.ones(1, 1, 1)) == 1
    assert_same(lambda: sl.IAF(spike_fn=spike_fn), lambda layer, x: layer(x), x)
