"""Norse's LIF, LIFBox and IAF against themselves, accelerated."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_checks import assert_same
from torch import nn

import snnfast

norse = pytest.importorskip("norse.torch", reason="norse is not installed")
from norse.torch.functional.iaf import IAFParameters  # noqa: E402
from norse.torch.functional.lif import LIFFeedForwardState, LIFParameters  # noqa: E402
from norse.torch.functional.lif_box import LIFBoxFeedForwardState, LIFBoxParameters  # noqa: E402
from norse.torch.functional.reset import reset_subtract, reset_value  # noqa: E402
from norse.torch.functional.threshold import threshold  # noqa: E402

from snnfast.convert.adapters import norse as adapter  # noqa: E402


def drive(neuron, x_seq):
    """Over time in one call or in a loop of cells, then again with the state that came."""
    if not hasattr(neuron, "record_states"):
        state, found = None, []
        for x in x_seq:
            z, state = neuron(x, state)
            found.append((z, *state))
        return found
    z, state = neuron(x_seq)
    again, last = neuron(x_seq.flip(0), state)
    return z, *state, again, *last


EACH = st.sampled_from(("number", "per neuron", "learnt", "learnt per neuron"))


def value(kind, shape, low, high):
    t = low + (high - low) * torch.rand(shape)
    t = t if "per neuron" in kind else t.flatten()[0].clone()
    return nn.Parameter(t) if "learnt" in kind else t


@settings(max_examples=150)
@given(
    cls=st.sampled_from(("LIFCell", "LIF", "LIFBoxCell", "IAFCell", "IAF")),
    method=st.sampled_from(tuple(adapter.METHODS)),
    alpha=st.floats(0.5, 10),
    v_th=EACH,
    tau=EACH,
    reset=st.sampled_from((reset_value, reset_subtract)),
    shape=st.sampled_from(((5,), (3, 4), (2, 3, 4, 5))),
    T=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
def test_random_configurations(cls, method, alpha, v_th, tau, reset, shape, T, seed):
    def make():
        torch.manual_seed(seed)
        own = shape[1:] if len(shape) > 1 else shape
        common = {
            "method": method,
            "alpha": torch.tensor(alpha),
            "v_th": value(v_th, own, 0.1, 0.6),
            "v_reset": torch.tensor(-0.1),
        }
        if cls.startswith("IAF"):
            common["v_th"] = torch.tensor(0.4)
            return getattr(norse, cls)(IAFParameters(**common))
        common |= {"tau_mem_inv": value(tau, own, 50, 400), "v_leak": torch.tensor(0.05)}
        if cls == "LIFBoxCell":
            return norse.LIFBoxCell(LIFBoxParameters(**common, reset_method=reset))
        return getattr(norse, cls)(LIFParameters(**common, tau_syn_inv=value(tau, own, 50, 400)))

    torch.manual_seed(seed)
    assert_same(make, drive, torch.randn(T, *shape) * 1.5 + 0.3)


def test_neurons_spike_in_these_tests():
    torch.manual_seed(0)
    cell = norse.LIFBoxCell(LIFBoxParameters(v_th=torch.tensor(0.3)))
    spikes = torch.stack([z for z, _ in drive(cell, torch.randn(9, 3, 40) * 1.5 + 0.3)])
    assert 0.01 < spikes.mean() < 0.9


@pytest.mark.parametrize("method", adapter.METHODS)
@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_surrogate_mapping(method, alpha):
    u = torch.linspace(-3, 3, 1001, dtype=torch.float64, requires_grad=True)
    threshold(u, method, alpha).sum().backward()
    ours = adapter.METHODS[method](alpha).derivative(u.detach())
    assert torch.allclose(u.grad, ours, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: norse.LIF(record_states=True), "record_states"),
        (lambda: norse.LIF(LIFParameters(method="adjoint")), "adjoint"),
        (lambda: norse.LIFCell(LIFParameters(method="circ")), "circ"),
        (lambda: norse.LIFCell(LIFParameters(v_reset=nn.Parameter(torch.tensor(0.0)))), "v_reset"),
        (lambda: norse.LIFBoxCell(LIFBoxParameters(v_leak=torch.zeros(3))), "v_leak"),
        (lambda: norse.IAFCell(IAFParameters(v_th=nn.Parameter(torch.tensor(1.0)))), "v_th"),
        (lambda: norse.IAF(IAFParameters(v_th=torch.ones(3))), "v_th"),
        (lambda: norse.LIFRecurrentCell(3, 4), "LIFRecurrentCell"),
        (lambda: norse.LICell(), "LICell"),
    ],
)
def test_left_with_the_reason(make, reason):
    report = snnfast.accelerate(make())
    assert not report.replaced
    assert reason in report.left[0].reason


def test_states_of_every_form():
    """A state of one number, of numbers and tensors mixed, and one that broadcasts, which Norse itself must take."""
    x = torch.randn(3, 4)
    for cell, states in (
        (
            norse.LIFCell,
            [
                LIFFeedForwardState(torch.tensor(0.3), torch.rand(3, 4)),
                LIFFeedForwardState(torch.rand(4), torch.rand(3, 4)),
            ],
        ),
        (norse.LIFBoxCell, [LIFBoxFeedForwardState(torch.tensor(0.3)), LIFBoxFeedForwardState(torch.rand(3, 1))]),
    ):
        plain, fast = cell(), cell()
        snnfast.accelerate(fast)
        for state in states:
            z, after = plain(x, state)
            z_2, after_2 = fast(x, state)
            assert torch.equal(z, z_2)
            assert type(after) is type(after_2)
            assert all(torch.equal(a, b) for a, b in zip(after, after_2, strict=True))


def test_the_gradient_of_a_given_state():
    grads = []
    for accelerated in (False, True):
        cell = norse.LIFCell(LIFParameters(v_th=torch.tensor(0.2)))
        if accelerated:
            snnfast.accelerate(cell)
        v, i = torch.tensor(0.3, requires_grad=True), torch.full((3, 4), 0.5, requires_grad=True)
        z, after = cell(torch.linspace(-1, 2, 12).reshape(3, 4), LIFFeedForwardState(v, i))
        (z.sum() + (after.v**2).sum() + after.i.sum()).backward()
        grads.append((v.grad, i.grad))
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_its_own_code(dtype):
    plain, fast = norse.LIFCell(), norse.LIFCell()
    snnfast.accelerate(fast)
    x = torch.randn(4, 3, 5, dtype=dtype) * 20
    for a, b in zip(drive(fast, x), drive(plain, x), strict=True):
        assert all(torch.equal(s, t) and s.dtype == t.dtype for s, t in zip(a, b, strict=True))


def test_a_network_of_its_own_and_back():
    def network():
        torch.manual_seed(0)
        return norse.SequentialState(nn.Linear(6, 8), norse.LIFCell(), nn.Linear(8, 4), norse.LIFBoxCell())

    net, x = network(), torch.randn(3, 6) * 20
    want, state = net(x)
    report = snnfast.accelerate(net)
    assert [n.name for n in report.replaced] == ["1", "3"]
    out, state_2 = net(x)
    assert torch.equal(out, want)
    other = copy.deepcopy(net)
    assert torch.equal(other(x, state_2)[0], net(x, state)[0])
    snnfast.restore(net)
    assert type(net[1]) is norse.LIFCell


@pytest.mark.parametrize("cls", ["IAFCell", "IAF", "LIFBoxCell"])
def test_a_potential_at_the_threshold_does_not_fire(cls):
    x = (torch.randn(20, 64) * 4).round() / 4

    def make():
        if cls == "LIFBoxCell":  # dt / tau of 1: the potential is the input
            return norse.LIFBoxCell(LIFBoxParameters(tau_mem_inv=torch.tensor(1.0)), dt=1.0)
        return getattr(norse, cls)(IAFParameters(v_reset=torch.tensor(0.0)))

    assert (x == 1.0).any()
    assert_same(make, drive, x)
