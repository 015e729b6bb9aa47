"""snntorch's Leaky and Synaptic against themselves, accelerated."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_checks import assert_same, step_loop
from torch import nn
from torch.utils.checkpoint import checkpoint

import snnfast

warnings.filterwarnings("ignore", category=SyntaxWarning)
snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
from snntorch import surrogate as their_surrogate  # noqa: E402
from snntorch import utils  # noqa: E402

from snnfast.convert.adapters import snntorch as adapter  # noqa: E402

SURROGATES = st.one_of(
    st.none(),
    st.builds(their_surrogate.atan, st.floats(0.5, 5)),
    st.builds(their_surrogate.fast_sigmoid, st.floats(1, 40)),
    st.builds(their_surrogate.sigmoid, st.floats(0.5, 2)),  # steeper ones are NaN in snnTorch itself
)
EACH = st.sampled_from(("number", "per neuron", "learnt", "learnt per neuron"))
OPTIONS = {
    "reset_mechanism": st.sampled_from(("subtract", "zero", "none")),
    "reset_delay": st.booleans(),
    "spike_grad": SURROGATES,
    "init_hidden": st.booleans(),
    "output": st.booleans(),
}


def value(kind: str, shape: tuple[int, ...], low: float, high: float) -> torch.Tensor | float:
    t = low + (high - low) * torch.rand(shape)
    return t if "per neuron" in kind else t.flatten()[0].item()


def steps(module, x_seq):
    """The user's loop: states passed on where the neuron returns them, kept where it does not."""
    if module.init_hidden:
        return step_loop(module, x_seq)
    state, collected = (), []
    for x in x_seq:
        spk, *state = module(x, *state)
        collected.append((spk, *state))
    return collected


@pytest.mark.parametrize("cls", ["Leaky", "Synaptic"])
@settings(max_examples=60)
@given(
    options=st.fixed_dictionaries(OPTIONS),
    threshold=EACH,
    beta=EACH,
    alpha=EACH,
    graded=st.sampled_from((1.0, 0.7)),
    shape=st.sampled_from(((5,), (3, 4), (2, 3, 4, 5), (1, 7))),
    T=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
def test_random_configurations(cls, options, threshold, beta, alpha, graded, shape, T, seed):
    def make():
        torch.manual_seed(seed)
        own = shape[1:] if len(shape) > 1 else shape
        keywords = dict(
            options,
            beta=value(beta, own, 0.2, 1.2),  # beyond 1 it is clamped
            threshold=value(threshold, own, 0.3, 1.2),
            learn_beta="learnt" in beta,
            learn_threshold="learnt" in threshold,
        )
        if cls == "Leaky":
            keywords |= {"graded_spikes_factor": graded, "learn_graded_spikes_factor": graded != 1}
        else:
            keywords |= {"alpha": value(alpha, own, 0.1, 0.9), "learn_alpha": "learnt" in alpha}
        return getattr(snntorch, cls)(**keywords)

    torch.manual_seed(seed)
    x = torch.randn(T, *shape) * 1.5 + 0.3
    assert_same(make, steps, x)


def test_neurons_spike_in_these_tests():
    neuron = snntorch.Leaky(beta=0.9)
    spikes = torch.stack([s for s, _ in steps(neuron, torch.randn(9, 3, 4) * 1.5 + 0.3)])
    assert 0.05 < spikes.mean() < 0.9


@pytest.mark.parametrize(
    ("theirs", "u_range"),
    [(their_surrogate.atan(3.0), 3), (their_surrogate.fast_sigmoid(25), 3), (their_surrogate.sigmoid(4), 3)],
)
def test_surrogate_mapping(theirs, u_range):
    ours = adapter.fused_surrogate(theirs)
    u = torch.linspace(-u_range, u_range, 1001, dtype=torch.float64, requires_grad=True)
    theirs(u).sum().backward()
    assert torch.allclose(u.grad, ours.derivative(u.detach()), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"state_quant": lambda m: m}, "state_quant"),
        ({"inhibition": True}, "inhibition"),
        ({"surrogate_disable": True}, "surrogate_disable"),
        ({"spike_grad": their_surrogate.straight_through_estimator()}, "straight_through_estimator"),
        ({"spike_grad": lambda u: (u > 0).float()}, "not a fused surrogate"),
        ({"graded_spikes_factor": torch.tensor([1.0, 2.0])}, "graded_spikes_factor"),
    ],
)
@pytest.mark.filterwarnings("ignore:Inhibition")
def test_left_with_the_reason(keywords, reason):
    neuron = snntorch.Leaky(beta=0.9, **keywords)
    report = snnfast.accelerate(neuron)
    assert type(neuron) is snntorch.Leaky
    assert reason in report.left[0].reason
    assert reason in str(report)


def test_other_neurons_and_changed_subclasses_are_left():
    class Mine(snntorch.Leaky):
        def fire(self, mem):
            return super().fire(mem) * 2

    class Named(snntorch.Leaky):
        """Changes nothing that matters."""

    net = nn.Sequential(
        Mine(beta=0.5), Named(beta=0.5), snntorch.Lapicque(beta=0.5), snntorch.RLeaky(0.5, all_to_all=False)
    )
    report = snnfast.accelerate(net)
    assert [n.name for n in report.replaced] == ["1"]
    assert ["overrides fire" in report.left[0].reason, "Lapicque" in report.left[1].reason] == [True, True]
    assert len(report.left) == 3


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 8),
        snntorch.Leaky(beta=0.8, init_hidden=True, learn_beta=True),
        nn.Linear(8, 4),
        snntorch.Leaky(beta=0.8, init_hidden=True, output=True, spike_grad=their_surrogate.fast_sigmoid(10)),
    )


def test_the_object_stays_what_it_was():
    net = network()
    first, keys, beta = net[1], list(net.state_dict()), net[1].beta
    seen = []
    first.register_forward_hook(lambda module, args, out: seen.append(out))
    report = snnfast.accelerate(net)
    assert [n.name for n in report.replaced] == ["1", "3"]
    assert net[1] is first
    assert isinstance(first, snntorch.Leaky)
    assert list(net.state_dict()) == keys
    assert first.beta is beta
    out, _ = net(torch.randn(3, 6))
    assert len(seen) == 1
    assert out.shape == (3, 4)
    assert snnfast.accelerate(net).replaced == report.replaced  # once more changes nothing
    assert snnfast.restore(net) == 2
    assert type(first) is snntorch.Leaky
    assert "_snnfast_plan" not in first.__dict__
    net(torch.randn(3, 6))


def test_its_own_reset_works_before_and_after():
    net = network()
    x = torch.randn(5, 3, 6) * 2
    want = [net(s) for s in x]
    utils.reset(net)
    snnfast.accelerate(net)
    for _ in range(2):
        got = [net(s) for s in x]
        assert all(torch.equal(a, b) for g, w in zip(got, want, strict=True) for a, b in zip(g, w, strict=True))
        sum(m.sum() for _, m in got).backward()
        utils.reset(net)
        assert net[1].mem.count_nonzero() == 0
    snntorch.Leaky.detach_hidden()


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: snntorch.Leaky(beta=0.5, init_hidden=True),
        lambda: snntorch.Synaptic(alpha=0.5, beta=0.5, init_hidden=True),
        lambda: snntorch.RLeaky(beta=0.5, V=0.5, all_to_all=False, init_hidden=True),
    ],
    ids=("Leaky", "Synaptic", "RLeaky"),
)
def test_detach_net_cuts_the_history_and_keeps_the_state(make, accelerated):
    net = nn.Sequential(nn.Linear(6, 4), make())
    if accelerated:
        snnfast.accelerate(net)
    for x in torch.randn(3, 2, 6):
        net(x).sum().backward()
        before = net[1].mem.clone()
        snnfast.functional.detach_net(net)
        assert not net[1].mem.requires_grad
        assert torch.equal(net[1].mem, before)


def test_new_shapes_start_from_zero_and_a_wrong_call_raises_as_before():
    fast, plain = snntorch.Leaky(beta=0.9), snntorch.Leaky(beta=0.9)
    snnfast.accelerate(fast)
    for shape in ((3, 4), (2, 4), (2, 4), (2, 4, 1)):
        x = torch.randn(shape)
        assert torch.equal(fast(x)[1], plain(x)[1])
    hidden = snntorch.Leaky(beta=0.9, init_hidden=True)
    snnfast.accelerate(hidden)
    with pytest.raises(TypeError, match="init_hidden"):
        hidden(torch.zeros(2), torch.zeros(2))


def test_a_setting_changed_later_counts():
    fast, plain = snntorch.Leaky(beta=0.5), snntorch.Leaky(beta=0.5)
    snnfast.accelerate(fast)
    x = torch.randn(6, 4) * 2
    steps(fast, x)
    steps(plain, x)
    for neuron in (fast, plain):
        neuron.threshold = torch.tensor(0.4)
        neuron.beta.fill_(0.25)
        neuron.graded_spikes_factor.fill_(0.5)
    assert all(
        torch.equal(a, b)
        for f, p in zip(steps(fast, x), steps(plain, x), strict=True)
        for a, b in zip(f, p, strict=True)
    )
    for neuron in (fast, plain):
        neuron.state_quant = torch.round
    assert all(
        torch.equal(a, b)
        for f, p in zip(steps(fast, x), steps(plain, x), strict=True)
        for a, b in zip(f, p, strict=True)
    )
    for neuron in (fast, plain):
        neuron.state_quant = False
        neuron.fire = lambda mem: (mem > 0).float()
    assert all(
        torch.equal(a, b)
        for f, p in zip(steps(fast, x), steps(plain, x), strict=True)
        for a, b in zip(f, p, strict=True)
    )
    assert "not accelerated now: fire was set on the object" in repr(fast)


def test_parameters_of_each_neuron_written_in_place_count():
    own = {"beta": torch.rand(4), "threshold": torch.rand(4)}
    fast, plain = (snntorch.Leaky(**{k: v.clone() for k, v in own.items()}) for _ in range(2))
    snnfast.accelerate(fast)
    x = torch.randn(6, 2, 4) * 2
    for name in ("threshold", "beta", "threshold"):
        for neuron in (fast, plain):
            getattr(neuron, name).mul_(0.5)
            neuron.reset_mem()
        for f, p in zip(steps(fast, x), steps(plain, x), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(f, p, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_its_own_code(dtype):
    fast, plain = snntorch.Leaky(beta=0.5), snntorch.Leaky(beta=0.5)
    snnfast.accelerate(fast)
    x = torch.randn(4, 5, dtype=dtype) * 2
    for a, b in zip(steps(fast, x), steps(plain, x), strict=True):
        assert all(torch.equal(s, t) and s.dtype == t.dtype for s, t in zip(a, b, strict=True))


def test_deepcopy_and_pickle():
    net = network()
    snnfast.accelerate(net)
    x = torch.randn(3, 6)
    other = copy.deepcopy(net)
    a, b = net(x), other(x)
    assert torch.equal(a[1], b[1])
    assert type(other[1]) is type(net[1])
    assert snnfast.restore(other) == 2
    assert type(net[1]) is not type(other[1])


class PicklableSurrogate:
    """snnTorch's own closures cannot be pickled; a call of one of them by name can."""

    def __call__(self, u):
        return their_surrogate.atan(2.0)(u)


def test_pickle_of_a_left_and_a_converted_neuron():
    neuron = snntorch.Synaptic(alpha=0.5, beta=0.5)
    snnfast.accelerate(neuron)
    want = neuron(torch.ones(3))
    neuron.spike_grad = PicklableSurrogate()  # its configuration is now one that runs snnTorch's own code
    neuron.reset_mem()
    again = pickle.loads(pickle.dumps(neuron))
    assert type(again) is type(neuron)
    assert all(torch.equal(a, b) for a, b in zip(again(torch.ones(3)), want, strict=True))


def test_second_derivative():
    def second(neuron):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        outs = steps(neuron, x)
        (first,) = torch.autograd.grad(sum((m**2).sum() + s.sum() for s, m in outs), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), x)[0]

    fast, plain = snntorch.Leaky(beta=0.5, reset_mechanism="none"), snntorch.Leaky(beta=0.5, reset_mechanism="none")
    snnfast.accelerate(fast)
    assert torch.allclose(second(fast), second(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("delay", [True, False])
@pytest.mark.parametrize("cls", ["Leaky", "Synaptic"])
def test_a_potential_at_the_threshold_does_not_fire(cls, delay):
    x = (torch.randn(20, 64) * 4).round() / 4
    alpha = {"alpha": 0.0} if cls == "Synaptic" else {}

    def make():
        return getattr(snntorch, cls)(beta=1.0, reset_delay=delay, reset_mechanism="none", **alpha)

    assert any((mem == 1.0).any() for *_, mem in steps(make(), x))
    assert_same(make, steps, x)


def test_a_threshold_made_in_inference_mode():
    x = torch.rand(5, 3)
    grads = []
    for fused in (False, True):
        neuron = snntorch.Leaky(beta=0.9, learn_beta=True)
        if fused:
            snnfast.accelerate(neuron)
        with torch.inference_mode():
            neuron.threshold = torch.tensor(0.5)
        spikes, mem = neuron(x, torch.ones(5, 3))
        grads.append(torch.autograd.grad((spikes + mem).sum(), neuron.beta))
    assert torch.equal(*map(torch.stack, grads))


@pytest.mark.parametrize("beta", [0.9, torch.tensor([0.5, 0.6, 0.7, 0.8])], ids=["one", "per neuron"])
def test_training_after_an_evaluation_in_inference_mode(beta):
    net = nn.Sequential(nn.Linear(5, 4), snntorch.Leaky(beta=beta))
    snnfast.accelerate(net)

    def run():
        mem = torch.zeros(3, 4)
        for _ in range(3):
            spk, mem = net[1](net[0](torch.rand(3, 5)), mem)
        return spk.sum() + mem.sum()

    with torch.inference_mode():
        run()
    run().backward()
    assert net[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("unrolled", [False, True], ids=["stepped", "unrolled"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: snntorch.Leaky(beta=0.9, init_hidden=True),
        lambda: snntorch.Synaptic(alpha=0.8, beta=0.9, init_hidden=True),
    ],
    ids=["Leaky", "Synaptic"],
)
def test_the_first_call_of_all_under_gradient_checkpointing(make, unrolled):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), make(), nn.Linear(5, 4), make())
    snnfast.accelerate(net)
    x = 3 * torch.randn(4, 3, 6)

    def run(x):
        utils.reset(net)
        return snnfast.unroll(net, x) if unrolled else torch.stack([net(step) for step in x])

    grads = []
    for call in (lambda x: checkpoint(run, x, use_reentrant=False), run):
        net.zero_grad()
        call(x).sum().backward()
        grads.append(net[0].weight.grad.clone())
    assert grads[0].abs().sum() > 0
    assert torch.equal(*grads)
