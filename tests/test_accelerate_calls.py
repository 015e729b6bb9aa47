"""Calls of accelerated neurons off the beaten track: parameters larger than the input, results written in place."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peer_checks import assert_same, step_loop, tensors
from torch import nn

import snnfast
from snnfast import _notices, backends

warnings.filterwarnings("ignore", category=SyntaxWarning)
pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = ((), (1,), (8,), (1, 1), (3, 1), (1, 8), (3, 8), (2, 3, 8))
STEPS = ((1,), (8,), (3, 1), (1, 8), (3, 8))


def with_state(module, x_seq):
    """The loop over one step a call of a neuron that returns its state."""
    state, found = None, []
    for x in x_seq:
        out, state = module(x, state)
        found.append((out, *state))
    return found


def own(shape, seed, low, high, learnt):
    t = low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(t) if learnt else t


def leaky(shape, which, learnt, seed):
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
    values = {"beta": own(shape, seed, 0.2, 1.1, False), "threshold": own(shape, seed, 0.3, 1.0, False)}
    return snntorch.Leaky(**{"beta": 0.6, which: values[which]}, learn_beta=learnt, learn_threshold=learnt)


def synaptic(shape, which, learnt, seed):
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
    which = "alpha" if which == "beta" else which
    value = own(shape, seed, 0.2, 0.9, False)
    keywords = {"alpha": 0.5, "beta": 0.6, which: value}
    return snntorch.Synaptic(**keywords, learn_alpha=learnt, learn_threshold=learnt, reset_delay=False)


def norse_cell(name):
    def make(shape, which, learnt, seed):
        norse = pytest.importorskip("norse.torch", reason="norse is not installed")
        from norse.torch.functional.lif import LIFParameters
        from norse.torch.functional.lif_box import LIFBoxParameters

        field, low, high = ("tau_mem_inv", 50, 400) if which == "beta" else ("v_th", 0.1, 0.6)
        parameters = LIFBoxParameters if "Box" in name else LIFParameters
        return getattr(norse, name)(parameters(**{field: own(shape, seed, low, high, learnt)}))

    return make


def sinabs_lif(shape, which, learnt, seed):
    sl = pytest.importorskip("sinabs.layers", reason="sinabs is not installed")
    from sinabs import activation

    tau = own(shape, seed, 2, 9, False) if which == "beta" else 5.0
    threshold = own(shape, seed, 0.3, 1.0, False) if which == "threshold" else torch.tensor(1.0)
    return sl.LIF(tau_mem=tau, spike_threshold=threshold, surrogate_grad_fn=activation.Gaussian())


MADE = {
    "Leaky": (leaky, step_loop),
    "Synaptic": (synaptic, step_loop),
    "LIFCell": (norse_cell("LIFCell"), with_state),
    "LIFBoxCell": (norse_cell("LIFBoxCell"), with_state),
    "LIF": (norse_cell("LIF"), lambda module, x: module(x)),
    "sinabs LIF": (sinabs_lif, lambda module, x: (module(x.transpose(0, 1)), module.v_mem)),
}


@pytest.mark.parametrize("name", MADE)
@example(shape=(), step=(1,), which="beta", learnt=True, seed=2)  # the steps cancel to 0.4 % of what is added up
@settings(max_examples=40)
@given(
    shape=st.sampled_from(SHAPES),
    step=st.sampled_from(STEPS),
    which=st.sampled_from(("beta", "threshold")),
    learnt=st.booleans(),
    seed=st.integers(0, 999),
)
def test_parameters_of_other_shapes_than_the_input(name, shape, step, which, learnt, seed):
    """Where they broadcast beyond the input, the potentials grow to their shape, or it is an error: as it was."""
    make, drive = MADE[name]
    torch.manual_seed(seed)
    x = torch.randn(4, *step) * 1.5 + 0.3
    try:
        drive(make(shape, which, learnt, seed), x)
    except (RuntimeError, ValueError) as error:
        fast = make(shape, which, learnt, seed)
        snnfast.accelerate(fast)
        with pytest.raises(type(error)):
            drive(fast, x)
        return
    assert_same(lambda: make(shape, which, learnt, seed), drive, x, tolerance=3e-5)


def test_what_spikingjelly_has_more_than_one_of_is_left():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron", reason="spikingjelly is not installed")
    for attribute in ("v_threshold", "v_reset", "tau", "w"):
        node = neuron.ParametricLIFNode() if attribute == "w" else neuron.LIFNode()
        setattr(node, attribute, nn.Parameter(torch.ones(3)) if attribute == "w" else torch.ones(3))
        report = snnfast.accelerate(node)
        assert type(node) in (neuron.LIFNode, neuron.ParametricLIFNode)
        assert attribute in report.left[0].reason


# ---- results written in place ----
WRITES = {
    "mul_": lambda t: t.mul_(0.5),
    "add_": lambda t: t.add_(0.25),
    "item": lambda t: t.__setitem__((slice(None), 0), 0.0),
}


def leaky_twice(write, which):
    def drive(module, x_seq):
        mem, found = None, []
        for x in x_seq:
            spk, mem = module(x, mem)
            WRITES[write]((spk, mem)[which])
            found += [spk, mem.clone()]
        return found

    return drive


def cell_twice(write, which):
    def drive(module, x_seq):
        state, found = None, []
        for x in x_seq:
            z, state = module(x, state)
            WRITES[write]((z, state.v)[which])
            found += [z, state.v.clone(), state.i.clone()]
        return found

    return drive


@pytest.mark.parametrize("which", [0, 1], ids=["spikes", "potential"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_results_may_be_written_in_place(backend, write, which, monkeypatch):
    if backend == "reference":
        monkeypatch.setattr(backends, "choose", lambda *given: backends.REFERENCE)
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
    x = torch.randn(5, 3, 4) * 1.5 + 0.3
    assert_same(lambda: snntorch.Leaky(beta=0.6), leaky_twice(write, which), x)
    norse = pytest.importorskip("norse.torch", reason="norse is not installed")
    assert_same(norse.LIFCell, cell_twice(write, which), x * 20)


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("of", ["s", "v", "v_seq"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_own_results_may_be_written_in_place(backend, of, step_mode):
    x = torch.randn(5, 3, 4, requires_grad=True)
    grads = []
    for in_place in (True, False):
        node = snnfast.LIFNode(step_mode=step_mode, store_v_seq=True, backend=backend)
        s = node(x)
        t = {"s": s, "v": node.v, "v_seq": node.v_seq}[of]
        t = t.mul_(3) if in_place else t * 3
        grads.append(torch.autograd.grad(sum(((k + 1) * q).sum() for k, q in enumerate(tensors([t]))), x)[0])
        assert grads[-1].abs().sum() > 0
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_states_may_be_detached_in_place(backend, monkeypatch):
    if backend == "reference":
        monkeypatch.setattr(backends, "choose", lambda *given: backends.REFERENCE)
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
    neuron = snntorch.Leaky(beta=0.6, init_hidden=True)
    snnfast.accelerate(neuron)
    for _ in range(2):
        neuron(torch.randn(3, 4, requires_grad=True)).sum().backward()
        neuron.mem.detach_()  # what snntorch.Leaky.detach_hidden does


def test_training_goes_on_from_a_state_of_inference_mode():
    """Which their additions do not save for backward, and the kernels do."""
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron", reason="spikingjelly is not installed")
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")

    def evaluated_before(call, module, x):
        with torch.inference_mode():
            call(module, x)
        return call(module, x)

    x = torch.randn(4, 3, 5) * 2
    over_time = {"step_mode": "m", "v_reset": None}
    assert_same(lambda: neuron.LIFNode(**over_time), lambda m, x: evaluated_before(lambda m, x: m(x), m, x), x)
    assert_same(lambda: neuron.LIFNode(v_reset=None), lambda m, x: evaluated_before(step_loop, m, x), x)
    assert_same(lambda: snntorch.Leaky(beta=0.5, init_hidden=True), lambda m, x: evaluated_before(step_loop, m, x), x)
    ours = snnfast.LIFNode(step_mode="m")
    leaf = x.clone().requires_grad_()
    evaluated_before(lambda m, x: m(x), ours, leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_exchanged_buffers_count():
    """``functional_call`` puts tensors in their places without setting an attribute, and takes them away again."""
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
    sl = pytest.importorskip("sinabs.layers", reason="sinabs is not installed")
    x = torch.randn(4, 5, 6) * 2

    def drive(neuron, x):
        names = ("beta", "threshold", "graded_spikes_factor") if hasattr(neuron, "beta") else ("spike_threshold",)
        other = {name: torch.tensor(0.7) for name in names}
        found = []
        for values in ({}, other, {}):
            found.append(torch.func.functional_call(neuron, values, (x,)))
        return found

    assert_same(lambda: snntorch.Leaky(beta=0.4, init_hidden=True), drive, x)
    assert_same(lambda: sl.LIF(tau_mem=5.0), drive, x, step=torch.Size((4, 6)))


def test_parametrized_before_and_after():
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")

    class Squash(nn.Module):
        def forward(self, x):
            return x.sigmoid()

    x, found = torch.randn(6, 3, 5) * 2, []
    for when in ("never accelerated", "before", "after", "and restored"):
        neuron = snntorch.Leaky(beta=0.3, init_hidden=True)
        if when in ("after", "and restored"):
            snnfast.accelerate(neuron)
        nn.utils.parametrize.register_parametrization(neuron, "beta", Squash())
        if when == "before":
            assert snnfast.accelerate(neuron).replaced
        if when == "and restored":
            assert snnfast.restore(neuron) == 1
            assert not isinstance(neuron, snnfast.convert.adapters.base.Fused)
        neuron = copy.deepcopy(neuron)
        first = step_loop(neuron, x)
        neuron = copy.deepcopy(neuron)
        with torch.no_grad():
            neuron.parametrizations.beta.original.fill_(-2.0)
        found.append(torch.stack(first + step_loop(neuron, x)))
        if when != "before":
            assert isinstance(neuron, snntorch.Leaky)
    assert all(torch.equal(f, found[0]) for f in found)
    assert found[0].mean() > 0.05


# ---- what is said ----
def test_a_forgotten_reset_is_named():
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
    net = nn.Sequential(nn.Linear(3, 2), snntorch.Leaky(beta=0.9, init_hidden=True))
    snnfast.accelerate(net)

    def step():
        sum(net(torch.rand(4, 3)) for _ in range(3)).sum().backward()

    step()
    with pytest.raises(RuntimeError, match=r"reset_net\(model\)"):
        step()
    snnfast.functional.reset_net(net)
    step()


class OwnNeuron(nn.Module):
    def forward(self, x):
        return (x > 1).float()


SAID = {
    "an ANN": (
        lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU()),
        r"it has ReLUs: snnfast\.to_spiking\(model, timesteps",
    ),
    "snnfast's": (lambda: nn.Sequential(nn.Linear(3, 2), snnfast.LIFNode()), "1 is snnfast's own.*nothing to do"),
    "of one's own": (lambda: nn.Sequential(OwnNeuron()), r"for an ANN there is .*BaseNode"),
}


@pytest.mark.parametrize("case", SAID)
def test_a_model_without_anything_to_convert_is_told_so(case, monkeypatch):
    make, message = SAID[case]
    monkeypatch.setattr(_notices, "_said", set())
    looked = "accelerate changed nothing: Sequential has no neurons of SpikingJelly, snnTorch, Norse or sinabs; .*"
    with pytest.warns(UserWarning, match=looked + message) as told:
        snnfast.accelerate(make())
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snnfast.accelerate(make())  # once


def test_neurons_that_are_all_left_are_told_and_converted_ones_are_not(monkeypatch):
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
    monkeypatch.setattr(_notices, "_said", set())
    net = nn.Sequential(snntorch.Leaky(beta=0.9, inhibition=True), snntorch.Leaky(beta=0.9, inhibition=True))
    with pytest.warns(
        UserWarning, match=r"0 \(snntorch\.Leaky\) is left as it is: inhibition.*1 more, which the report"
    ):
        snnfast.accelerate(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.append(snntorch.Leaky(beta=0.9))
        snnfast.accelerate(net)
        snnfast.accelerate(net)


def test_the_repr_tells_a_converted_neuron():
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
    sl = pytest.importorskip("sinabs.layers", reason="sinabs is not installed")
    for neuron in (snntorch.Leaky(beta=0.9), sl.LIF(tau_mem=10.0)):
        net = nn.Sequential(neuron)
        before = repr(net)
        snnfast.accelerate(net)
        assert repr(net).count("accelerated by snnfast") == 1
        assert repr(net).replace(" [accelerated by snnfast]", "") == before
        assert repr(copy.deepcopy(net)) == repr(net)
        assert "accelerated by snnfast" in repr(net.to("meta"))
        snnfast.restore(net)
        assert "accelerated" not in repr(net)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("steps", ["one", "all"])
def test_a_module_converted_between_forward_and_backward(steps, dtype):
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
    gradients = []
    for fused in (False, True):
        neuron = snntorch.Leaky(beta=0.75, threshold=0.5, learn_threshold=True, init_hidden=True)
        if fused:
            snnfast.accelerate(neuron)
        x = torch.linspace(-0.5, 1.5, 24).view(4, 6).requires_grad_()
        s = snnfast.unroll(neuron, x) if fused and steps == "all" else torch.stack([neuron(step) for step in x])
        neuron.to(dtype)
        (s * torch.linspace(-1, 1, 24).view(4, 6)).sum().backward()
        gradients.append(x.grad)
    assert gradients[0].any()
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=1e-4)  # the libraries' own goes on in bfloat16
