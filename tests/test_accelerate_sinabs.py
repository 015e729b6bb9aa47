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


@settings(max_examples=120)
@given(
    cls=st.sampled_from(("LIF", "IAF", "LIFSqueeze", "IAFSqueeze")),
    spike_fn=st.sampled_from((sa.MultiSpike, sa.SingleSpike)),
    surrogate=st.one_of(
        st.builds(sa.SingleExponential, st.floats(0.2, 2), st.floats(0.2, 2)),
        st.builds(sa.Gaussian, st.just(0.0), st.floats(0.2, 2), st.floats(0.2, 2)),
    ),
    threshold=st.floats(0.3, 1.5),
    min_v_mem=st.one_of(st.none(), st.floats(-2, 0.25, width=32, allow_subnormal=False), st.just(-1)),
    zeroes=st.booleans(),
    record_states=st.booleans(),
    tau_each=st.booleans(),
    train_alphas=st.booleans(),
    norm_input=st.booleans(),
    batch=st.integers(1, 3),
    shape=st.sampled_from(((4,), (2, 3, 4))),
    T=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
def test_random_configurations(
    cls, spike_fn, surrogate, threshold, min_v_mem, zeroes, record_states, tau_each, train_alphas, norm_input, batch,
    shape, T, seed,
):  # fmt: skip
    def make():
        torch.manual_seed(seed)
        keywords = {
            "spike_fn": spike_fn,
            "surrogate_grad_fn": surrogate,
            "spike_threshold": torch.tensor(threshold),
            "min_v_mem": min_v_mem,
            "record_states": record_states,
        }
        if zeroes and spike_fn is sa.SingleSpike:
            keywords["reset_fn"] = sa.MembraneReset()
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
        rate, kept = layer.firing_rate, layer.recordings
        return first, rate, kept, layer(x * 0.7), layer.v_mem, layer.recordings  # the state and its graph go on

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
        ({"min_v_mem": torch.tensor([-1.0, -2.0])}, "min_v_mem"),
        ({"min_v_mem": -float("inf")}, "min_v_mem"),
        ({"spike_fn": sa.MaxSpike(3)}, "MaxSpike"),
        ({"spike_fn": None}, "None"),
        ({"reset_fn": sa.MembraneReset()}, "MembraneReset"),
        ({"reset_fn": sa.MembraneReset(0.1), "spike_fn": sa.SingleSpike}, "MembraneReset"),
        ({"reset_fn": sa.MembraneSubtract(0.5)}, "MembraneSubtract"),
        ({"surrogate_grad_fn": sa.MultiGaussian()}, "MultiGaussian"),
        ({"surrogate_grad_fn": sa.Gaussian(mu=0.1)}, "Gaussian"),
        ({"spike_threshold": torch.ones(3)}, "SingleExponential"),
        ({"surrogate_grad_fn": sa.SingleExponential(torch.tensor(0.5))}, "a tensor for a number"),
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


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("tau_syn", [None, 3.0])
def test_detach_net_cuts_the_history(accelerated, tau_syn):
    net = nn.Sequential(nn.Linear(6, 4), sl.LIF(tau_mem=5.0, tau_syn=tau_syn))
    if accelerated:
        snnfast.accelerate(net)
    for x in torch.randn(3, 2, 5, 6):
        net(x).sum().backward()
        snnfast.functional.detach_net(net)
        assert not net[1].v_mem.requires_grad


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


def test_what_from_model_makes_is_accelerated_as_it_is():
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 5), nn.ReLU())
    for p in ann.parameters():
        p.data *= 4  # so that the last layer fires too
    nets = [sinabs.from_torch.from_model(copy.deepcopy(ann), batch_size=3).spiking_model for _ in range(2)]
    report = snnfast.accelerate(nets[1])
    assert [item.name for item in report.replaced] == ["1", "5"]
    x = (torch.rand(3 * 7, 2, 8, 8) < 0.3).float()
    outs = [net(x) for net in nets]
    lowest = [module.v_mem.min() for module in (nets[0][1], nets[1][1])]
    assert torch.equal(*outs)
    assert lowest[0] == lowest[1] == -1, "no potential was as low as min_v_mem"
    for net, out in zip(nets, outs, strict=True):
        out.square().sum().backward()
        assert net[0].weight.grad.abs().sum() > 0
    torch.testing.assert_close(nets[1][0].weight.grad, nets[0][0].weight.grad, rtol=1e-5, atol=1e-5)


def outputs_and_gradients(layer, x):
    """And the state, of one call from the initial state."""
    layer.reset_states()
    leaf = x.clone().requires_grad_()
    out = layer(leaf)
    learnt = [p for p in layer.parameters() if p.requires_grad]
    loss = out.square().sum() + layer.v_mem.square().sum()
    return [out, layer.v_mem, *torch.autograd.grad(loss, [leaf, *learnt], allow_unused=True)]


def assert_alike(layers, x):
    for a, b in zip(*(outputs_and_gradients(layer, x) for layer in layers), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def two_layers(cls=sl.LIF, **keywords):
    layers = [cls(**keywords) for _ in range(2)]
    assert snnfast.accelerate(layers[1]).replaced
    return layers


def is_accelerated(layer):
    return repr(layer).endswith("[accelerated by snnfast]")


def test_numbers_that_are_written_on_the_surrogate_and_the_reset_count_from_the_next_call_on():
    x = torch.randn(2, 7, 4) * 2
    layers = two_layers(tau_mem=5.0, surrogate_grad_fn=sa.SingleExponential(0.5))
    for kind in {id(layer.surrogate_grad_fn): layer.surrogate_grad_fn for layer in layers}.values():
        assert_alike(layers, x)
        kind.grad_width, kind.grad_scale = 3.0, 0.25  # annealed
    assert_alike(layers, x)
    layers = [
        two_layers(tau_mem=5.0, spike_fn=sa.SingleSpike, reset_fn=sa.MembraneReset()),
        two_layers(tau_mem=5.0, reset_fn=sa.MembraneSubtract()),
    ]
    for pair, name, values in zip(layers, ("reset_value", "subtract_value"), ((0.3, 0.0), (0.3, None)), strict=True):
        assert_alike(pair, x)
        for value in values:
            setattr(pair[0].reset_fn, name, value)
            setattr(pair[1].reset_fn, name, value)
            assert_alike(pair, x)
        assert is_accelerated(pair[1])  # again


def test_what_is_learnt_later_has_its_gradient():
    layers, x = two_layers(tau_mem=5.0, min_v_mem=-0.25), torch.randn(2, 7, 4) * 2
    for learnt in (True, False):
        for layer in layers:
            layer.min_v_mem.requires_grad_(learnt)
        assert_alike(layers, x)
    assert is_accelerated(layers[1])
    own = outputs_and_gradients(layers[0].requires_grad_(True), x)
    assert own[4].abs() > 0, "no potential was as low as min_v_mem"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_time_constants_of_another_dtype_run_its_own_code(dtype):
    x = torch.randn(3, 40, 4) * 2
    for tau in (7.3, torch.tensor([1.2, 7.0, 9.0, 11.0])):
        layers = two_layers(tau_mem=tau, min_v_mem=-0.3)
        outs = []
        for layer in layers:
            outs.append((layer.to(dtype)(x), layer.v_mem))
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_layers_without_values():
    layer = sl.LIF(tau_mem=5.0, min_v_mem=-1.0)
    assert "no value" in snnfast.accelerate(layer.to("meta")).left[0].reason
    layers, x = two_layers(tau_mem=5.0, min_v_mem=-1.0), torch.randn(2, 7, 4) * 2
    made = layers[1].to("meta")
    assert made(x.to("meta")).shape == x.shape
    layers[0](x)  # whose potentials are in its state_dict
    made.to_empty(device="cpu").load_state_dict(layers[0].state_dict())
    assert_alike((layers[0], made), x)
    assert is_accelerated(made)


def test_a_lowest_potential_that_is_written_counts_from_the_next_call_on():
    layer = sl.IAF(min_v_mem=-1.0)
    snnfast.accelerate(layer)
    x = torch.full((1, 3, 2), -0.75)
    layer(x)
    assert layer.v_mem.tolist() == [[-1.0, -1.0]]
    with torch.no_grad():
        layer.min_v_mem.fill_(-1.5)
    layer(x)
    assert layer.v_mem.tolist() == [[-1.5, -1.5]]
