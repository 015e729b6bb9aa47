"""SpikingJelly's neurons against themselves, accelerated."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_checks import assert_same, step_loop
from torch import nn

import snnfast

theirs = pytest.importorskip("spikingjelly.activation_based.neuron", reason="spikingjelly is not installed")
from spikingjelly.activation_based import functional, surrogate  # noqa: E402

KINDS = ("Sigmoid", "ATan", "PiecewiseQuadratic", "PiecewiseExp", "SoftSign", "SuperSpike", "Erf", "Rect")


@settings(max_examples=150)
@given(
    cls=st.sampled_from(("IFNode", "LIFNode", "ParametricLIFNode")),
    tau=st.sampled_from((2.0, 3.0, 1.7, 100.0)),
    decay_input=st.booleans(),
    common=st.fixed_dictionaries(
        {
            "v_threshold": st.floats(0.25, 2.0),
            "v_reset": st.one_of(st.none(), st.floats(-0.5, 0.5, width=32, allow_subnormal=False), st.just(0.0)),
            "surrogate_function": st.builds(
                lambda name, alpha: getattr(surrogate, name)(alpha), st.sampled_from(KINDS), st.floats(0.5, 5.0)
            ),
            "detach_reset": st.booleans(),
            "step_mode": st.sampled_from("sm"),
            "store_v_seq": st.booleans(),
        }
    ),
    shape=st.sampled_from(((5,), (3, 4), (2, 3, 4, 5))),
    T=st.integers(1, 9),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    seed=st.integers(0, 10**6),
)
def test_random_configurations(cls, tau, decay_input, common, shape, T, dtype, seed):
    def make():
        more = {} if cls == "IFNode" else {"decay_input": decay_input}
        more |= {"LIFNode": {"tau": tau}, "ParametricLIFNode": {"init_tau": tau}}.get(cls, {})
        return getattr(theirs, cls)(**common, **more)

    def drive(neuron, x):
        """Two sequences of other lengths with kept state, then one after a reset."""
        found = []
        for part in (x, x[: T // 2 + 1] * 0.5):
            spikes = torch.stack(step_loop(neuron, part)) if neuron.step_mode == "s" else neuron(part)
            found += [spikes, neuron.v] + ([] if neuron.v_seq is None else [neuron.v_seq])
        neuron.reset()
        assert not isinstance(neuron.v, torch.Tensor)
        assert neuron.v_seq is None
        return [*found, neuron(x if neuron.step_mode == "m" else x[0])]

    torch.manual_seed(seed)
    x = (torch.randn(T, *shape) + 0.5).to(dtype)
    assert_same(make, drive, x)


def network(step_mode="m"):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8),
        theirs.LIFNode(surrogate_function=surrogate.ATan(), step_mode=step_mode),
        nn.Linear(8, 4),
        theirs.ParametricLIFNode(v_reset=None, step_mode=step_mode),
    )


def test_its_own_functions_work_before_and_after():
    net, x = network(), torch.randn(5, 3, 6) * 2
    want = net(x)
    functional.reset_net(net)  # SpikingJelly remembers the modules of this call
    report = snnfast.accelerate(net)
    assert len(report.replaced) == 2
    for _ in range(2):
        assert torch.equal(net(x), want)
        functional.detach_net(net)
        net(x).sum().backward()
        functional.reset_net(net)
        assert net[1].v == 0.0
    functional.set_step_mode(net, "s")
    assert torch.equal(torch.stack([net(s) for s in x]), want)
    functional.reset_net(net)
    snnfast.restore(net)
    assert type(net[1]) is theirs.LIFNode
    functional.set_step_mode(net, "m")
    assert torch.equal(net(x), want)


def test_left_with_the_reason():
    net = nn.Sequential(
        theirs.IFNode(surrogate_function=surrogate.LeakyKReLU()),
        theirs.IFNode(surrogate_function=surrogate.ATan(spiking=False)),
        theirs.QIFNode(),
    )
    report = snnfast.accelerate(net)
    assert not report.replaced
    for left, reason in zip(report.left, ("LeakyKReLU", "spiking=False", "QIFNode"), strict=True):
        assert reason in left.reason


def test_settings_changed_later_count():
    fast, plain = theirs.LIFNode(step_mode="m"), theirs.LIFNode(step_mode="m")
    snnfast.accelerate(fast)
    x = torch.randn(6, 4) * 2

    def gradient(neuron):
        leaf = x.clone().requires_grad_()
        neuron.reset()
        neuron(leaf).sum().backward()
        return leaf.grad

    for change in (
        lambda n: None,
        lambda n: setattr(n, "v_threshold", 0.5),
        lambda n: setattr(n, "detach_reset", True),
        lambda n: setattr(n.surrogate_function, "alpha", 1.5),
        lambda n: setattr(n, "surrogate_function", surrogate.ATan()),
        lambda n: n.surrogate_function.set_spiking_mode(False),
        lambda n: setattr(n, "surrogate_function", surrogate.S2NN()),
    ):
        for n in (fast, plain):
            n.surrogate_function = copy.deepcopy(n.surrogate_function)
            change(n)
        assert torch.allclose(gradient(fast), gradient(plain), rtol=1e-5, atol=1e-7)


def test_half_precision_runs_its_own_code():
    fast, plain = theirs.LIFNode(step_mode="m"), theirs.LIFNode(step_mode="m")
    snnfast.accelerate(fast)
    x = torch.randn(6, 4, dtype=torch.bfloat16) * 2
    assert torch.equal(fast(x), plain(x))
    assert fast.v.dtype == plain.v.dtype


def test_deepcopy_and_pickle():
    net = network()
    snnfast.accelerate(net)
    x = torch.randn(5, 3, 6) * 2
    with torch.no_grad():
        want = net(x)
        for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert type(again[1]) is type(net[1])
            functional.reset_net(again)
            assert torch.equal(again(x), want)
            snnfast.restore(again)
            assert type(again[1]) is theirs.LIFNode


def test_verify_finds_the_same_and_a_difference():
    net = network()
    x = torch.randn(5, 3, 6) * 2
    found = snnfast.verify(net, x, repeats=1)
    assert found.ok
    assert "the same" in str(found)
    assert net[1].v == 0.0
    assert type(net[1]) is theirs.LIFNode
    assert {c.name for c in found.gradients} == {"of the input", *dict(net.named_parameters())}

    def run(model, x):
        return model(x) * (2.0 if hasattr(model[1], "snnfast_replaced") else 1.0)

    assert not snnfast.verify(net, x, run, repeats=0).ok


def test_types_are_checked():
    with pytest.raises(TypeError, match="model must be"):
        snnfast.accelerate(theirs.LIFNode)
    with pytest.raises(TypeError, match="model must be"):
        snnfast.restore(3)


def test_a_potential_at_the_threshold_fires():
    x = (torch.randn(20, 64) * 4).round() / 4
    assert theirs.IFNode()(torch.ones(1)) == 1
    assert_same(lambda: theirs.IFNode(step_mode="m"), lambda neuron, x: neuron(x), x)


def test_verify_does_not_compare_rounding_with_itself():
    """The bias before a batch norm in training has no gradient, only what is left of it by rounding."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), theirs.IFNode(), nn.Flatten(), nn.Linear(4 * 64, 5))
    net = nn.Sequential(*layers)
    found = snnfast.verify(net, 3 * torch.rand(8, 1, 10, 10), repeats=0)
    bias = next(c for c in found.gradients if c.name == "0.bias")
    assert bias.differing
    assert found.ok, str(found)
    assert "nothing was converted" in str(snnfast.verify(nn.Linear(2, 2), torch.rand(3, 2), repeats=1))
