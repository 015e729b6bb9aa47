"""fuse(): what it finds, what it leaves alone and why, and that nothing changes but the speed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import snnfast
import snnfast.checkpoint
from snnfast import backends, functional, layer
from snnfast.fused import BatchNormNode, FuseReport, fuse, unfuse

pytestmark = pytest.mark.skipif(
    backends.native.missing(torch.device("cpu")) is not None, reason="the compiled extension is not built here"
)
T = 4


def small_network(neuron=snnfast.LIFNode):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        neuron(timesteps=T),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), neuron(timesteps=T)),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 10, bias=False),
        nn.BatchNorm1d(10),
        neuron(timesteps=T),
    )


def equal_outputs_and_gradients(fused, apart, x):
    for training in (True, False):
        results = []
        for model in (fused, apart):
            model.train(training).zero_grad()
            functional.reset_net(model)
            y = model(x)
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
            results.append((y.detach(), [p.grad for p in model.parameters()]))
        (y, grads), (want, want_grads) = results
        assert torch.allclose(y, want, rtol=1e-5, atol=1e-6)
        for g, w in zip(grads, want_grads, strict=True):
            assert (g - w).norm() <= 1e-4 * w.norm() + 1e-6
        for b, w in zip(fused.buffers(), apart.buffers(), strict=True):
            assert torch.allclose(b, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("neuron", [snnfast.IFNode, snnfast.LIFNode, snnfast.ParametricLIFNode])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_sequential(neuron, memory_format, count_fused):
    net = small_network(neuron).to(memory_format=memory_format)
    apart = copy.deepcopy(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modules = dict(net.named_modules())
    report = fuse(net)
    assert report.fused == [("1", "2"), ("3.1", "3.2"), ("6", "7")]
    assert not report.left_alone
    assert dict(net.named_modules()) == modules
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    x = torch.randn(T * 2, 3, 8, 8).contiguous(memory_format=memory_format)
    equal_outputs_and_gradients(net, apart, x)
    assert len(count_fused) == 6
    net.load_state_dict(apart.state_dict())


def test_copies_pickles_and_the_way_back(count_fused):
    net = small_network()
    report = fuse(net)
    x = torch.randn(T * 2, 3, 8, 8)
    want = net.eval()(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        count_fused.clear()
        functional.reset_net(other)
        assert torch.equal(other(x), want)
        assert len(count_fused) == 3
        assert other[1].forward.norm is other[1]
        assert other[2].forward.neuron is other[2]
    assert fuse(net) == report  # as it was
    net[1] = copy.deepcopy(net[1])
    del net[1].__dict__["forward"]  # a new norm in place of a fused one
    assert fuse(net) == report
    assert unfuse(net) == 3
    count_fused.clear()
    functional.reset_net(net)
    assert torch.equal(net(x), want)
    assert not count_fused
    assert all("forward" not in m.__dict__ for m in net.modules())
    assert len(fuse(net).fused) == 3


@pytest.mark.parametrize("make", [snnfast.models.resnet18, snnfast.models.sew_resnet18, snnfast.models.vgg11])
def test_models(make, count_fused):
    net = make(timesteps=T, width=8) if make is not snnfast.models.vgg11 else make(timesteps=T)
    if make is snnfast.models.vgg11:
        assert len(fuse(net).fused) >= 7
        return
    apart = copy.deepcopy(net)
    report = fuse(net)
    blocks = 8
    assert len(report.fused) == (2 * blocks if make is snnfast.models.resnet18 else 2 * blocks + 3)
    kind = "CHARGE" if make is snnfast.models.resnet18 else "ADD"
    assert report.connected == {f"layers.{i}.{j}.bn2": kind for i in range(4) for j in range(2)}
    assert ("layers.1.0.bn1", "layers.1.0.relu1") in report.fused
    assert "repeats its input" in report.left_alone["bn1"]  # of the first neuron, which repeats a constant input
    if make is snnfast.models.resnet18:
        assert report.left_alone["layers.1.0.downsample.1"] == "its output goes to add_2, not to a neuron of snnfast"
    else:
        assert ("layers.1.0.downsample.1", "layers.1.0.downsample.2") in report.fused
    equal_outputs_and_gradients(net, apart, torch.rand(2, 3, 16, 16))
    assert len(count_fused) == 2 * len(report.fused)


def test_layers_with_time():
    net = nn.Sequential(
        layer.Conv2d(3, 4, 3, step_mode="m"),
        layer.BatchNorm2d(4, step_mode="m"),
        snnfast.IFNode(step_mode="m"),
        layer.Conv2d(4, 4, 3, step_mode="m"),
        layer.ThresholdDependentBatchNorm2d(1.0, 1.0, 4),
        snnfast.LIFNode(step_mode="m"),
        layer.TemporalEffectiveBatchNorm2d(T, 4),
        snnfast.LIFNode(step_mode="m"),
    )
    apart = copy.deepcopy(net)
    report = fuse(net)
    assert report.fused == [("1", "2"), ("4", "5")]
    assert "TemporalEffectiveBatchNorm2d is not one of" in report.left_alone["6"]
    equal_outputs_and_gradients(net, apart, torch.randn(T, 2, 3, 8, 8))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.lif = nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=T)

    def forward(self, x):
        y = self.bn(x)
        return self.lif(y) + y


class Loops(nn.Module):
    """A forward that no trace can follow, around parts that one can."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=T))
        self.bn, self.lif = nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=T)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.lif(self.bn(self.part(x)))


class ByMode(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.lif = nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=T)

    def forward(self, x):
        y = self.bn(x)
        return self.lif(y) if self.training else self.lif(y) + y.mean()


class ByOption(Twice):
    def forward(self, x, skip=None):
        y = self.bn(x)
        return y if skip is None else self.lif(y)


class Counts(Twice):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.bn(x)
        return self.lif(y) if self.calls == 1 else y


class Asks(Twice):
    def forward(self, x):
        y = self.lif(self.bn(x))
        return (y if isinstance(y, torch.Tensor) else y[0]) + x


def test_a_forward_may_ask_whether_spikes_are_a_tensor():
    net, x = Asks(), torch.randn(T * 2, 3, 5, 5)
    expected = copy.deepcopy(net)(x)
    assert fuse(net).connected == {"bn": "ADD"}
    assert torch.equal(net(x), expected)


class Own(snnfast.LIFNode):
    def neuronal_charge(self, x):
        self.v = self.v + 2 * x


def pair(norm=None, neuron=None):
    return nn.Sequential(norm or nn.BatchNorm2d(3), neuron or snnfast.LIFNode(timesteps=T))


def tied():
    net = nn.Sequential(*pair(), *pair())
    net[2].weight = net[0].weight
    return net


def called_twice():
    norm = nn.BatchNorm2d(3)
    return nn.Sequential(norm, snnfast.LIFNode(timesteps=T), norm, snnfast.LIFNode(timesteps=T))


def hooked(which, register):
    net = pair()
    getattr(net[which], register)(lambda *args: None)
    return net


def frozen():
    net = pair()
    net[0].eval()
    return net


class NormAndActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, features):
        super().__init__(features)
        self.act = snnfast.LIFNode(timesteps=T)

    def forward(self, x):
        return self.act(super().forward(x))


def between(hook):
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Identity(), snnfast.LIFNode(timesteps=T))
    if hook:
        net[1].register_forward_hook(lambda m, args, y: 2 * y)
    return net


def test_an_identity_between_changes_nothing(count_fused):
    """timm's blocks have these where an option is not used."""
    net = between(hook=False)
    apart = copy.deepcopy(net)
    assert fuse(net).fused == [("0", "2")]
    equal_outputs_and_gradients(net, apart, torch.randn(T * 2, 3, 5, 5))
    assert len(count_fused) == 2


REFUSED = {
    "identity with a hook": (lambda: between(hook=True), "0", "its output goes to a Identity"),
    "activation inside": (lambda: nn.Sequential(NormAndActivation(3)), "0", "NormAndActivation is not one of"),
    "output used twice": (Twice, "bn", "its output is used 2 times"),
    "in one mode only": (ByMode, "bn", "its output is used 2 times"),
    "with an option only": (ByOption, "bn", "its output goes to output, not to a neuron"),
    "counts": (Counts, "bn", "cannot be traced"),
    "tied weights": (tied, "0", "shares a parameter"),
    "called twice": (called_twice, "0", "called 2 times"),
    "hook on the norm": (lambda: hooked(0, "register_forward_hook"), "0", "the norm has hooks"),
    "hook on the neuron": (lambda: hooked(1, "register_forward_pre_hook"), "0", "the neuron has hooks"),
    "backward hook": (lambda: hooked(0, "register_full_backward_hook"), "0", "the norm has hooks"),
    "frozen norm": (frozen, "0", "the norm is in evaluation mode and the neuron in training mode"),
    "step modes": (lambda: pair(neuron=snnfast.LIFNode(step_mode="m")), "0", "step mode"),
    "own neuron": (lambda: pair(neuron=Own(timesteps=T)), "0", "Own is not one of"),
    "synchronised": (lambda: pair(nn.SyncBatchNorm(3)), "0", "SyncBatchNorm"),
    "complex": (lambda: pair(nn.BatchNorm2d(3).to(torch.complex64)), "0", "parameters are torch.complex64"),
    "potentials": (lambda: pair(neuron=snnfast.LIFNode(timesteps=T, store_v_seq=True)), "0", "store_v_seq"),
    "no neuron": (lambda: pair(neuron=nn.ReLU()), "0", "not to a neuron"),
    "untraced": (Loops, "bn", "cannot be traced"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_left_alone_with_the_reason(name, count_fused):
    make, norm, reason = REFUSED[name]
    net = make()
    apart = copy.deepcopy(net)
    report = fuse(net)
    assert reason in report.left_alone[norm], report
    assert norm not in dict(report.fused)
    assert norm in str(report)
    assert reason in str(report)
    if name not in ("synchronised", "complex"):
        for training in (True, False):
            if name != "frozen norm":
                net.train(training), apart.train(training)
            functional.reset_net(net), functional.reset_net(apart)
            x = torch.randn(T * 2, 3, 5, 5)
            assert torch.equal(net(x), apart(x))
    if name == "untraced":
        assert report.fused == [("part.0", "part.1")]
        assert len(count_fused) == 2


def test_a_fused_norms_output_elsewhere_is_what_it_stands_for():
    net = pair()
    apart = copy.deepcopy(net)
    fuse(net)
    x = torch.randn(T, 3, 5, 5)
    for use in (
        *(torch.relu, lambda y: y.mean(), lambda y: y.shape, lambda y: -y[0] / 2, lambda y: torch.cat([y, x])),
        *(lambda y: (y == 0) | (y != y), lambda y: ~(y > 0) ^ (y >= 0) & (y < 1), lambda y: 2 // y),
    ):
        got, want = use(net[0](x)), use(apart[0](x))
        assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want
    assert torch.allclose(net[0].running_mean, apart[0].running_mean)
    assert torch.equal(net[1](torch.ones(T, 2)), snnfast.LIFNode(timesteps=T)(torch.ones(T, 2)))  # a neuron as ever


def test_what_changes_after_fusing(count_fused):
    """A module that is changed afterwards runs as the two modules do."""
    x = torch.randn(T * 2, 3, 5, 5)
    for change in (
        lambda net: setattr(net[1], "store_v_seq", True),
        lambda net: setattr(net[1], "backend", "reference"),
        lambda net: net[0].eval(),
    ):
        net = pair()
        apart = copy.deepcopy(net)
        fuse(net)
        change(net), change(apart)
        assert torch.equal(net(x), apart(x))
    assert len(count_fused) == 1  # the frozen norm, which the kernels serve too


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_that_come_after_fusing_see_and_change_gradients(which, register, count_fused):
    def results(net, x):
        seen = []

        def hook(module, *gradients):
            seen.append([g.clone() for g in (*gradients[0], *gradients[-1])])
            return tuple(2 * g for g in gradients[0])

        handle = getattr(net[which], register)(hook)
        net(x).sum().backward()
        handle.remove()
        return x.grad, seen

    net = pair().double()
    apart = copy.deepcopy(net)
    fuse(net)
    x = torch.randn(T * 2, 3, 5, 5, dtype=torch.float64)
    (got, seen), (want, expected) = (results(n, x.clone().requires_grad_()) for n in (net, apart))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(seen, expected)
    assert not count_fused
    functional.reset_net(net)
    net(x)
    assert len(count_fused) == 1


HOOKS = {
    "norm's output": lambda net, seen: net[0].register_forward_hook(lambda m, i, o: seen.append(o)),
    "neuron's input": lambda net, seen: net[1].register_forward_pre_hook(lambda m, i: seen.append(i[0])),
    "of all modules": lambda net, seen: torch.nn.modules.module.register_module_forward_hook(
        lambda m, i, o: seen.append(o)
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_forward_hooks_that_come_after_fusing_get_tensors_to_keep(name, count_fused):
    x = torch.randn(T * 2, 3, 5, 5)
    found = []
    for net in (pair(), pair()):
        if found:
            fuse(net)
        seen: list = []
        handle = HOOKS[name](net, seen)
        net(x).sum().backward()
        handle.remove()
        assert all(isinstance(t, torch.Tensor) for t in seen)
        found.append((seen, net[0].weight.grad, net[0].running_mean))
    torch.testing.assert_close(found[1], found[0])
    assert len(found[0][0]) > 0
    assert not count_fused
    functional.reset_net(net)
    net(x)
    assert len(count_fused) == 1


def test_a_norm_that_is_called_by_keyword(count_fused):
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = pair()

        def forward(self, x):
            return self.pair[1](self.pair[0](input=x))

    net = ByKeyword()
    apart = copy.deepcopy(net)
    assert fuse(net).fused == [("pair.0", "pair.1")]
    x = torch.randn(T, 3, 5, 5)
    assert torch.equal(net(x), apart(x))
    assert len(count_fused) == 1
    with pytest.raises(TypeError, match="forward"):
        net.pair[0](x, x)


def test_a_pair_that_was_torn_apart_says_so():
    net = pair()
    fuse(net)
    net[1] = snnfast.IFNode(timesteps=T)
    with pytest.raises(TypeError, match=r"x_seq must be .*torn apart since: call fuse\(model\) again"):
        net(torch.randn(T, 3, 5, 5))
    fuse(net)
    assert net(torch.randn(T, 3, 5, 5)).shape == (T, 3, 5, 5)


def test_nodes_are_not_taken_apart_and_bad_arguments():
    net = nn.Sequential(BatchNormNode(nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=T)))
    assert fuse(net) == FuseReport()
    with pytest.raises(TypeError, match="model must be"):
        fuse([net])


def test_compiled_and_checkpointed():
    net = small_network()
    apart = copy.deepcopy(net)
    fuse(net)
    x = torch.randn(T * 2, 3, 8, 8)
    want = apart(x)
    want.sum().backward()
    compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)
    results = [(compiled, compiled(x)), (net, snnfast.checkpoint.checkpoint(net, x))]
    for model, y in results:
        y.sum().backward()
        assert torch.equal(y, want)
        for p, w in zip(model.parameters(), apart.parameters(), strict=True):
            assert (p.grad - w.grad).norm() <= 1e-4 * w.grad.norm() + 1e-6
        for b, w in zip(model.buffers(), apart.buffers(), strict=True):
            assert torch.allclose(b, w, rtol=1e-5, atol=1e-6)


def test_neurons_of_other_libraries_are_named():
    snntorch = pytest.importorskip("snntorch", reason="snnTorch is not installed")
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), snntorch.Leaky(beta=0.9, init_hidden=True))
    for prepare in (lambda: None, lambda: snnfast.accelerate(net)):
        prepare()
        report = fuse(net)
        assert not report.fused
        assert report.left_alone["1"] == "its output goes to a Leaky of snntorch, not to a neuron of snnfast"
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron", reason="SpikingJelly is not installed")
    net = nn.Sequential(nn.BatchNorm2d(3), neuron.LIFNode())
    assert "not those of other libraries, accelerated or not" in fuse(net).left_alone["0"]


class Recording(nn.Module):
    """Counts its calls, keeps what it computed, and makes what it needs at its first call."""

    def __init__(self):
        super().__init__()
        self.pair = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=4))
        self.register_buffer("calls", torch.zeros(()))
        self.steps, self.mask, self.all = 0, None, []

    def forward(self, x):
        self.calls.add_(1)
        self.steps += 1
        x = self.pair(x)
        if self.mask is None:
            self.mask = torch.ones_like(x) / 2
        self.all.append(x)
        return x * self.mask


@pytest.mark.parametrize("prepare", [snnfast.fuse, snnfast.optimize_for_inference])
def test_the_trace_leaves_nothing_in_the_network(prepare):
    torch.manual_seed(0)
    net = Recording().eval()
    x = 3 * torch.randn(8, 2, 6, 6)
    expected, state = copy.deepcopy(net)(x), torch.get_rng_state()
    found = prepare(net)
    assert torch.equal(torch.get_rng_state(), state)
    result = found[0] if isinstance(found, tuple) else net
    for model in (net, result):
        assert (model.calls, model.steps, model.mask, model.all) == (0, 0, None, [])
    torch.testing.assert_close(result(x), expected)
