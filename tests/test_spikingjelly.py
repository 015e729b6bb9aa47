"""Drop-in for SpikingJelly 2.0.0: same spikes, states, gradients, state_dict keys and constructor."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import snnfast
from snnfast import functional

sj_neuron = pytest.importorskip("spikingjelly.activation_based.neuron", reason="spikingjelly is not installed")
sj_functional = pytest.importorskip("spikingjelly.activation_based.functional")
sj_surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")

NAMES = ("IFNode", "LIFNode", "ParametricLIFNode")
SURROGATES = ("Sigmoid", "ATan", "PiecewiseQuadratic", "PiecewiseExp", "SoftSign", "SuperSpike", "Erf", "Rect")


@pytest.mark.parametrize("name", NAMES)
def test_constructor_arguments_order_and_defaults(name):
    theirs = inspect.signature(getattr(sj_neuron, name).__init__).parameters
    ours = inspect.signature(getattr(snnfast, name).__init__).parameters
    positional = [p for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == list(theirs)
    for p in positional:
        if p.name == "surrogate_function":
            assert repr(p.default) == repr(theirs[p.name].default)
        else:
            assert p.default == theirs[p.name].default
    assert {p.name for p in ours.values() if p.kind is p.KEYWORD_ONLY} == {"backend", "timesteps"}


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates_have_their_derivatives_and_defaults(name):
    theirs, ours = getattr(sj_surrogate, name)(), getattr(snnfast.surrogate, name)()
    assert ours.alpha == theirs.alpha
    grads = []
    for s in (theirs, ours):
        u = torch.linspace(-3, 3, 1001, dtype=torch.float64).requires_grad_()
        out = s(u)
        out.sum().backward()
        grads.append((out, u.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.allclose(grads[0][1], grads[1][1], rtol=1e-12, atol=1e-15)


configurations = st.fixed_dictionaries(
    {
        "v_threshold": st.floats(0.25, 2.0),
        "v_reset": st.one_of(st.none(), st.floats(-0.5, 0.5, width=32, allow_subnormal=False), st.just(0.0)),
        "surrogate": st.tuples(st.sampled_from(SURROGATES), st.floats(0.5, 5.0)),
        "detach_reset": st.booleans(),
        "store_v_seq": st.booleans(),
        "step_mode": st.sampled_from("sm"),
    }
)


@settings(max_examples=120)
@given(
    name=st.sampled_from(NAMES),
    config=configurations,
    tau=st.floats(1.05, 20.0),
    decay_input=st.booleans(),
    T=st.integers(1, 9),
    rest=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    calls=st.integers(1, 2),
    seed=st.integers(0, 10**6),
)
def test_same_spikes_states_and_gradients(name, config, tau, decay_input, T, rest, calls, seed):
    kind, alpha = config.pop("surrogate")
    extra = {} if name == "IFNode" else {"decay_input": decay_input, "tau" if name == "LIFNode" else "init_tau": tau}
    theirs = getattr(sj_neuron, name)(surrogate_function=getattr(sj_surrogate, kind)(alpha), **extra, **config)
    ours = getattr(snnfast, name)(surrogate_function=getattr(snnfast.surrogate, kind)(alpha), **extra, **config)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(calls, T, *rest, generator=generator) * 1.5
    weight = torch.randn(calls, T, *rest, generator=generator)
    results = []
    for node in (theirs, ours):
        x_given = x.clone().requires_grad_()
        outputs, loss = [], 0.0
        for call in range(calls):
            s = node(x_given[call]) if node.step_mode == "m" else torch.stack([node(x_t) for x_t in x_given[call]])
            outputs.append(s)
            loss = loss + (s * weight[call]).sum()
            if node.store_v_seq:
                outputs.append(node.v_seq)
                loss = loss + node.v_seq.square().sum()
        loss = loss + node.v.sin().sum()
        parameters = list(node.parameters())
        results.append((outputs + [node.v], torch.autograd.grad(loss, [x_given, *parameters])))
        node.reset()
        assert node.v == (config["v_reset"] or 0.0)
    for g, w in zip(results[1][0], results[0][0], strict=True):
        assert torch.equal(g, w)
    for index, (g, w) in enumerate(zip(results[1][1], results[0][1], strict=True)):
        scale = w.abs().max().clamp(min=1e-3 if index == 0 else 1.0)
        assert (g - w).abs().max() / scale < 2e-5


def test_their_functions_drive_our_modules():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), snnfast.LIFNode(), torch.nn.Linear(4, 2), snnfast.IFNode())
    sj_functional.set_step_mode(net, "m")
    first = net(torch.ones(5, 2, 3))
    assert first.shape == (5, 2, 2)
    sj_functional.reset_net(net)
    assert net[1].v == 0.0
    assert torch.equal(net(torch.ones(5, 2, 3)), first)
    sj_functional.detach_net(net)
    assert net[1].v.grad_fn is None


def test_our_functions_drive_their_modules():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), sj_neuron.LIFNode())
    functional.set_step_mode(net, "m")
    net(torch.ones(5, 2, 3))
    functional.reset_net(net)
    assert net[1].v == 0.0
