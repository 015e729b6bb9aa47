"""The modules: state, modes, copies, the functions on networks, neurons of a user's own."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import snnfast
from snnfast import _notices, backends, functional, neuron, surrogate
from snnfast.checkpoint import checkpoint

NODES = {
    "IF": lambda **k: snnfast.IFNode(**k),
    "LIF": lambda **k: snnfast.LIFNode(tau=3.0, **k),
    "PLIF": lambda **k: snnfast.ParametricLIFNode(init_tau=3.0, **k),
}
nodes = pytest.mark.parametrize("make", NODES.values(), ids=NODES.keys())


@nodes
def test_single_steps_equal_multi_step(make):
    x = torch.randn(6, 3, 4)
    multi, single = make(step_mode="m", store_v_seq=True), make(store_v_seq=True)
    want = multi(x)
    got = torch.stack([single(x_t) for x_t in x])
    assert torch.equal(got, want)
    assert torch.equal(single.v, multi.v)
    assert torch.equal(single.v_seq, multi.v_seq)


@nodes
def test_state_is_kept_between_calls_and_reset(make):
    x = torch.randn(8, 5)
    whole, halves = make(step_mode="m"), make(step_mode="m")
    want = whole(x)
    assert torch.equal(torch.cat([halves(x[:4]), halves(x[4:])]), want)
    assert torch.equal(halves.v, whole.v)
    halves.reset()
    assert halves.v == 0.0
    assert halves.v_seq is None
    assert torch.equal(halves(x), want)


def test_state_follows_shape_dtype_and_reset_value():
    node = snnfast.LIFNode(v_reset=-0.25, step_mode="m")
    assert node.v == -0.25
    node(torch.randn(2, 3))
    fresh = snnfast.LIFNode(v_reset=-0.25, step_mode="m")
    x = torch.randn(2, 7)
    assert torch.equal(node(x), fresh(x)), "another shape starts afresh"
    node(x.double())
    assert node.v.dtype == torch.float64
    node(x.half())
    assert node.v.dtype == torch.float32
    node.double()
    assert node.v.dtype == torch.float64
    assert snnfast.IFNode(v_reset=None).v == 0.0


@nodes
def test_folded_layout_equals_time_first(make):
    x = torch.randn(4, 3, 2, 5, 5)
    folded, plain = make(timesteps=4, store_v_seq=True), make(step_mode="m", store_v_seq=True)
    assert folded.step_mode == "m"
    assert torch.equal(folded(x.flatten(0, 1)), plain(x).flatten(0, 1))
    assert torch.equal(folded.v_seq, plain.v_seq)
    assert folded.v.shape == (3, 2, 5, 5)


@nodes
def test_copies_and_pickles_carry_the_state_without_history(make):
    node = make(step_mode="m", store_v_seq=True)
    x = torch.randn(3, 4, requires_grad=True)
    node(x)
    for twin in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert torch.equal(twin.v, node.v)
        assert twin.v.grad_fn is None
        assert node.v.grad_fn is not None
        assert torch.equal(twin(x), copy.deepcopy(node)(x))
        assert repr(twin) == repr(node)
    buffer = io.BytesIO()
    torch.save(node, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).v, node.v)


def test_a_parametrized_neuron_is_copied_without_history():
    node = snnfast.ParametricLIFNode(step_mode="m")
    nn.utils.parametrize.register_parametrization(node, "w", nn.Tanh())
    x = torch.randn(3, 4) * 3
    node(x)
    assert node.v.grad_fn is not None
    twin = copy.deepcopy(nn.Sequential(node))[0]
    assert twin.v.grad_fn is None
    assert torch.equal(twin.v, node.v)
    assert torch.equal(twin(x), node(x))
    (twin.v.sum() + twin.w).backward()
    assert twin.parametrizations.w.original.grad is not None
    assert node.parametrizations.w.original.grad is None


def test_losses_on_the_state_and_on_v_seq_reach_the_input():
    for loss in (lambda n, s: n.v.sum(), lambda n, s: n.v_seq.square().sum(), lambda n, s: s.sum()):
        x = torch.randn(4, 5, requires_grad=True)
        node = snnfast.LIFNode(step_mode="m", store_v_seq=True)
        loss(node, node(x)).backward()
        assert x.grad.abs().sum() > 0


def net():
    return nn.Sequential(
        nn.Linear(3, 4), snnfast.LIFNode(step_mode="m"), nn.Linear(4, 2), snnfast.IFNode(step_mode="m")
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_forgotten_reset_names_the_remedy(backend):
    model = net()
    functional.set_backend(model, backend)
    model(torch.randn(2, 5, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="reset_net"):
        model(torch.randn(2, 5, 3)).sum().backward()
    functional.reset_net(model)
    model(torch.randn(2, 5, 3)).sum().backward()
    functional.detach_net(model)
    assert model[1].v.abs().sum() > 0
    model(torch.randn(2, 5, 3)).sum().backward()


def test_functions_on_networks():
    model = net()
    functional.set_step_mode(model, "s")
    assert [m.step_mode for m in model if hasattr(m, "step_mode")] == ["s", "s"]
    functional.set_backend(model, "reference", instance=snnfast.IFNode)
    assert (model[1].backend, model[3].backend) == ("auto", "reference")
    model(torch.randn(5, 3))
    functional.reset_net(model)
    assert (model[1].v, model[3].v) == (0.0, 0.0)


def test_neurons_of_a_users_own():
    class Adaptive(neuron.BaseNode):
        """Two states: the potential and an adaptation current."""

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.register_memory("a", 0.0)

        def neuronal_charge(self, x):
            self.v = self.v + x - self.a

        def neuronal_reset(self, spike):
            super().neuronal_reset(spike)
            self.a = 0.9 * self.a + 0.1 * spike

    x = torch.randn(5, 3, requires_grad=True)
    multi, single = Adaptive(step_mode="m", store_v_seq=True), Adaptive(store_v_seq=True)
    assert torch.equal(multi(x), torch.stack([single(x_t) for x_t in x]))
    assert torch.equal(multi.v_seq, single.v_seq)
    multi.v_seq.sum().backward()
    assert x.grad.abs().sum() > 0
    multi.reset()
    assert (multi.v, multi.a) == (0.0, 0.0)
    with pytest.raises(ValueError, match="Adaptive"):
        Adaptive(step_mode="m", backend="native")(x)


def test_a_charge_that_is_returned_in_place_of_being_set():
    class Returns(neuron.BaseNode):
        def neuronal_charge(self, x):
            return self.v + x

    class Both(neuron.BaseNode):
        def neuronal_charge(self, x):
            self.v = self.v + x
            return self.v

    x = torch.randn(4, 50)
    for step_mode in "sm":
        with pytest.raises(TypeError, match=r"Returns.neuronal_charge returned a Tensor, self.v is as it was"):
            Returns(step_mode=step_mode)(x)
    assert torch.equal(Both(step_mode="m")(x), snnfast.IFNode(step_mode="m")(x))


def test_a_subclass_that_overrides_a_step_leaves_the_kernels():
    class Bounded(snnfast.LIFNode):
        def neuronal_charge(self, x):
            super().neuronal_charge(x)
            self.v = self.v.clamp(min=0.0)

    class Renamed(snnfast.LIFNode):
        pass

    class Doubles:
        def neuronal_charge(self, x):
            super().neuronal_charge(2 * x)

    class Mixed(Doubles, Renamed):
        pass

    x = torch.randn(4, 50)
    assert Bounded.dynamics is None
    assert Mixed.dynamics is None
    assert torch.equal(Mixed(step_mode="m")(x), snnfast.LIFNode(step_mode="m")(2 * x))
    assert Renamed.dynamics is snnfast.LIFNode.dynamics
    node = Bounded(step_mode="m", store_v_seq=True)
    node(x)
    assert bool((node.v_seq >= 0).all())
    plain = snnfast.LIFNode(step_mode="m")
    assert torch.equal(Renamed(step_mode="m")(x), plain(x))


def test_a_step_that_the_kernels_would_not_call_is_refused_on_one_object():
    x = torch.randn(4, 50)
    node = snnfast.LIFNode(step_mode="m")
    with pytest.raises(
        TypeError, match="neuronal_charge of one LIFNode would not be called: override it in a subclass"
    ):
        node.neuronal_charge = lambda x: None
    assert torch.equal(node(x), snnfast.LIFNode(step_mode="m")(x))
    own = type("Own", (snnfast.LIFNode,), {"neuronal_fire": lambda self: self.v * 0})(step_mode="m")
    own.neuronal_fire = lambda: own.v * 0 + 2  # this one's are called
    assert bool((own(x) == 2).all())


@pytest.mark.parametrize("own_step", [False, True])
def test_potentials_of_a_neuron_that_charges_in_place(own_step):
    class InPlace(neuron.BaseNode):
        def neuronal_charge(self, x):
            self.v += x

    class Stepped(InPlace):
        def single_step_forward(self, x):
            self.v_float_to_tensor(x)
            return self._step(x)

    x = torch.rand(6, 50)
    node = (Stepped if own_step else InPlace)(step_mode="m", store_v_seq=True)
    plain = snnfast.IFNode(step_mode="m", store_v_seq=True)
    assert torch.equal(node(x), plain(x))
    assert torch.equal(node.v_seq, plain.v_seq)


def test_a_single_step_of_a_users_own_is_taken_in_both_modes():
    class Analog(snnfast.LIFNode):
        """As reinforcement-learning examples for SpikingJelly before 2.0 read out their networks."""

        def single_step_forward(self, x):
            self.v_float_to_tensor(x)
            self.neuronal_charge(x)
            return self.v

    x = torch.randn(4, 3, 5)
    want, v = [], torch.zeros(3, 5)
    for x_t in x:
        v = v + (x_t - v) / 2.0
        want.append(v)
    want = torch.stack(want)
    single, multi, folded = Analog(), Analog(step_mode="m", store_v_seq=True), Analog(timesteps=4)
    assert torch.equal(torch.stack([single(x_t) for x_t in x]), want)
    assert torch.equal(multi(x), want)
    assert torch.equal(multi.v_seq, want)
    assert torch.equal(folded(x.flatten(0, 1)), want.flatten(0, 1))


def test_neurons_written_as_those_of_spikingjelly_2():
    class Adaptive(neuron.BaseNode):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.register_memory("a", 0.0)

        def single_step_functional_forward(self, inputs, states, **kwargs):
            v, a = states[0] + inputs[0] - states[1], states[1]
            s = self.surrogate_function(v - self.v_threshold)
            return (s,), (v * (1.0 - s), 0.9 * a + 0.1 * s)

    class Halved(snnfast.LIFNode):
        def single_step_functional_forward(self, inputs, states, **kwargs):
            return super().single_step_functional_forward((inputs[0] / 2,), states)

    x = torch.randn(6, 3, 5) + 0.5
    multi, single = Adaptive(step_mode="m"), Adaptive()
    got = multi(x)
    v = a = torch.zeros(3, 5)
    for x_t, s_t in zip(x, got, strict=True):
        v = v + x_t - a
        s = (v >= 1.0).float()
        v, a = v * (1.0 - s), 0.9 * a + 0.1 * s
        assert torch.equal(s_t, s)
        assert torch.equal(single(x_t), s)
    assert torch.equal(multi.a, a)
    assert torch.equal(Halved(step_mode="m")(x * 2), snnfast.LIFNode(step_mode="m")(x))
    with pytest.raises(TypeError, match="overrides materialize_states"):
        type("Own", (snnfast.LIFNode,), {"materialize_states": lambda self, inputs, states, step_mode: states})


class Triangle(surrogate.SurrogateFunction):
    def derivative(self, u):
        return (1 - u.abs()).clamp(min=0)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize(
    "own", [Triangle(), StraightThrough.apply, surrogate.ATan(spiking=False)], ids=["object", "function", "primitive"]
)
def test_surrogates_of_a_users_own_work_and_say_so_once(own):
    _notices._said.clear()
    node = snnfast.LIFNode(step_mode="m", surrogate_function=own)
    x = torch.randn(4, 5, requires_grad=True)
    if backends.native.missing(x.device) is None:
        with pytest.warns(UserWarning, match="plain PyTorch loop"):
            s = node(x)
    else:
        s = node(x)
    s.sum().backward()
    assert x.grad.abs().sum() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        node(x.detach())


@pytest.mark.parametrize("kind", surrogate.SURROGATES, ids=lambda s: s.__name__)
def test_derivative_is_the_primitives_and_integrates_to_its_rise(kind):
    s = kind(1.5)
    u = torch.linspace(-3, 3, 101, dtype=torch.float64) + 1e-4
    u.requires_grad_()
    if kind is not surrogate.SuperSpike:  # it has no primitive, as in SpikingJelly
        (want,) = torch.autograd.grad(s.primitive(u).sum(), u)
        assert torch.allclose(s.derivative(u), want, atol=1e-9)
    else:
        with pytest.raises(NotImplementedError, match="primitive"):
            kind(spiking=False)(u)
    (through,) = torch.autograd.grad(s(u).sum(), u)
    assert torch.equal(through, s.derivative(u))


def test_old_constructor_forms():
    _notices._said.clear()
    with pytest.warns(UserWarning, match="cupy"):
        node = snnfast.IFNode(1.0, 0.0, surrogate.ATan(), False, "m", "cupy", True)
    assert (node.backend, node.store_v_seq, node.step_mode) == ("auto", True, "m")
    assert snnfast.IFNode(1.0, 0.0, surrogate.ATan(), False, "m", True).store_v_seq is True
    node = snnfast.LIFNode(2, False, 1, None, surrogate.ATan(), True, "m", "reference")
    assert (node.backend, node.tau, node.v_threshold, node.v_reset) == ("reference", 2.0, 1.0, None)
    assert "cupy" in node.supported_backends
    with pytest.raises(TypeError, match="positional"):
        snnfast.IFNode(1.0, 0.0, surrogate.ATan(), False, "m", True, True)


def test_repr_tells_the_configuration():
    assert "tau" not in repr(snnfast.ParametricLIFNode().to("meta"))
    text = repr(snnfast.ParametricLIFNode(init_tau=4.0, timesteps=8))
    for part in ("tau=4", "timesteps=8", "step_mode=m", "backend=auto", "Sigmoid"):
        assert part in text


def test_reset_net_resets_many_steps_of_training():
    torch.manual_seed(0)
    model, x = net(), torch.randn(2, 16, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        functional.reset_net(model)
        loss = (model(x).mean(0) - 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] <= losses[0]


class Other(nn.Module):
    """Has a state and a ``reset`` of the kind that each test names."""

    def __init__(self, reset):
        super().__init__()
        self.state = 1.0
        self.reset = reset(self)


@pytest.mark.parametrize(
    ("reset", "called"),
    [
        (lambda m: lambda: setattr(m, "state", 0.0), True),
        (lambda m: lambda value=0.0, *args, **kwargs: setattr(m, "state", value), True),
        (lambda m: lambda num_classes, pool=None: setattr(m, "state", num_classes), False),  # timm's classifiers
        (lambda m: lambda *, value: setattr(m, "state", value), False),
        (lambda m: nn.Linear(3, 3), False),  # a gate
    ],
    ids=["plain", "default values", "needs an argument", "needs a keyword", "a layer"],
)
def test_reset_net_calls_what_can_be_called_without_arguments(reset, called):
    model = nn.Sequential(Other(reset), snnfast.IFNode())
    model[1](torch.ones(2))
    functional.reset_net(model)
    assert model[0].state == (0.0 if called else 1.0)
    assert model[1].v == 0.0


def test_an_empty_folded_batch_gives_an_empty_result():
    x = torch.empty(0, 3, requires_grad=True)
    s = snnfast.LIFNode(timesteps=4)(x)
    assert s.shape == (0, 3)
    s.sum().backward()
    assert x.grad.shape == (0, 3)


def test_another_batch_size_starts_from_the_reset_value():
    node = snnfast.IFNode(v_threshold=1.0, v_reset=None, step_mode="m")
    node.set_reset_value("v", 0.5)
    node.reset()
    node(torch.zeros(1, 3))
    node(torch.zeros(1, 2))
    assert torch.equal(node.v, torch.full((2,), 0.5))


@pytest.mark.parametrize("other", [{"dtype": torch.float64}, {"device": "meta"}], ids=["dtype", "device"])
def test_potentials_of_single_steps_go_on_in_one_dtype_on_one_device(other):
    node = snnfast.IFNode(store_v_seq=True)
    for _ in range(2):
        node(torch.zeros(3))
    assert node.v_seq.shape == (2, 3)
    node(torch.zeros(3, **other))
    assert node.v_seq.shape == (1, 3), "as SpikingJelly's"
    assert (node.v_seq.dtype, node.v_seq.device) == (node.v.dtype, node.v.device)


def test_reset_net_calls_whatever_needs_no_argument():
    def forwarding(method):
        return lambda *args, **kwargs: method(*args, **kwargs)

    class Wrapped(torch.nn.Module):
        @forwarding
        def reset(self):
            self.done = True

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.count = []
            self.reset = self.count.clear  # a builtin

    class WithArgument(torch.nn.Module):
        def reset(self, classes):
            raise AssertionError("called")

    wrapped, own = Wrapped(), Own()
    own.count.append(1)
    functional.reset_net(torch.nn.ModuleList([wrapped, own, WithArgument()]))
    assert wrapped.done
    assert not own.count


# ---- the folded layout ----
@pytest.mark.parametrize("make", [snnfast.LIFNode, neuron.LI])
def test_timesteps_and_step_mode_agree(make):
    node = make(timesteps=4)
    with pytest.raises(ValueError, match="step_mode must be 'm' while timesteps=4"):
        node.step_mode = "s"
    with pytest.raises(ValueError, match="set timesteps = None first"):
        functional.set_step_mode(nn.Sequential(node), "s")
    with pytest.raises(ValueError, match="timesteps must be a whole number from 1, or None, got 0"):
        node.timesteps = 0
    assert (node.timesteps, node.step_mode) == (4, "m")
    node.timesteps = None
    node.step_mode = "s"
    node.timesteps = 2
    assert node.step_mode == "m"
    x = torch.rand(6, 3)
    assert torch.equal(node(x), make(step_mode="m")(x.unflatten(0, (2, 3))).flatten(0, 1))


# ---- run again in the backward pass ----
def _spiking(*more):
    torch.manual_seed(0)
    readout = neuron.LI(timesteps=4)
    return nn.Sequential(nn.Linear(5, 6), *more, snnfast.LIFNode(timesteps=4), nn.Linear(6, 2), readout)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["plain", "readout", "fused", "own"])
def test_a_checkpoint_that_knows_no_states_is_refused(kind, reentrant):
    class Own(neuron.BaseNode):
        def neuronal_charge(self, x):
            self.v = self.v + x

    net = {
        "plain": _spiking,
        "readout": lambda: nn.Sequential(nn.Linear(5, 2), neuron.LI(timesteps=4)),
        "fused": lambda: _spiking(nn.BatchNorm1d(6)),
        "own": lambda: nn.Sequential(nn.Linear(5, 2), Own(timesteps=4)),
    }[kind]()
    if kind == "fused":
        assert len(snnfast.fuse(net).fused) == 1
    x = torch.rand(8, 5, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=r"Use snnfast\.checkpoint\.checkpoint"):
        y.sum().backward()


def test_checkpoints_that_start_from_the_right_state_run():
    x = torch.rand(8, 5)
    want = _spiking()
    want(x).sum().backward()

    def afresh(net):
        def run(x):
            functional.reset_net(net)
            return net(x)

        return torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)

    def reset_before_backward(net):
        y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
        functional.reset_net(net)
        return y

    for run in (afresh, reset_before_backward, lambda net: checkpoint(net, x)):
        net = _spiking()
        run(net).sum().backward()
        for p, q in zip(net.parameters(), want.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


def _of_torch(net, x):
    return torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)


@pytest.mark.parametrize("call", [checkpoint, _of_torch])
def test_a_checkpoint_of_a_loop_over_time(call):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(5, 6), snnfast.LIFNode(), nn.Linear(6, 2), neuron.LI())

        def forward(self, x_seq):
            functional.reset_net(self.net)
            return torch.stack([self.net(x) for x in x_seq])

    gradients = []
    x = torch.rand(4, 2, 5) * 4
    for run in (lambda net, x: net(x), call):
        net = Loop()
        run(net, x).sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(g.abs().sum() > 0 for g in gradients[0])
    for got, want in zip(*gradients, strict=True):
        assert torch.equal(got, want)


def test_a_checkpoint_beside_another_call_of_its_batch_norms():
    gradients = []
    for call in (lambda net, x: net(x), checkpoint):
        torch.manual_seed(0)
        net, x = _spiking(nn.BatchNorm1d(6)), torch.rand(8, 5)
        first = net(x)
        functional.reset_net(net)
        (first.sum() + call(net, x + 1).sum()).backward()
        gradients.append([p.grad for p in net.parameters()] + list(net.buffers()))
    for got, want in zip(*gradients, strict=True):
        assert torch.equal(got, want)
