"""Batch norm, neuron and residual connection in one: against the three apart, in nodes and found by fuse()."""

from __future__ import annotations

import copy
import itertools
import operator

import pytest
import torch
from torch import nn

import snnfast
from snnfast import backends, functional
from snnfast.fused import BatchNormNode, fuse, unfuse

pytestmark = pytest.mark.skipif(
    backends.native.missing(torch.device("cpu")) is not None, reason="the compiled extension is not built here"
)
T = 4
KINDS = ("CHARGE", "ADD", "AND", "IAND")


class Apart(nn.Module):
    def __init__(self, node):
        super().__init__()
        self.norm, self.neuron, self.connect = copy.deepcopy(node.norm), copy.deepcopy(node.neuron), node.connect.name

    def forward(self, x, skip):
        if self.connect == "CHARGE":
            return self.neuron(self.norm(x) + skip)
        s = self.neuron(self.norm(x))
        return {"ADD": s + skip, "AND": s * skip, "IAND": (1 - s) * skip}[self.connect]


def results(model, x, skip, v_weight=0.3):
    x, skip = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, skip))
    out = model(x, skip)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    ((out * weights).sum() + v_weight * model.neuron.v.sum()).backward()
    return out.detach(), [x.grad, skip.grad, *(p.grad for p in model.parameters())]


def close(got, want, tolerance):
    return (got.double() - want.double()).norm() <= tolerance * want.double().norm() + 1e-9


CASES = [((T * 3, 5, 8, 8), torch.contiguous_format), ((T * 2, 17, 9, 11), torch.channels_last), ((T * 5, 33), None)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("connect", KINDS)
def test_equals_the_three_apart(connect, dtype, training, count_fused):
    for (shape, memory_format), kind, v_reset in itertools.product(
        CASES, (snnfast.IFNode, snnfast.ParametricLIFNode), (0.0, None)
    ):
        x = (torch.randn(shape) * 1.7 + 2.5).to(dtype)
        skip = (torch.rand(shape) < 0.4).to(dtype) * (1.0 if connect != "ADD" else 2.0)
        if memory_format is torch.channels_last:
            x, skip = x.to(memory_format=memory_format), skip.to(memory_format=memory_format)
        norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1], dtype=dtype)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0.1, 0.6)
        neuron = kind(timesteps=T, v_reset=v_reset, detach_reset=v_reset is None).to(dtype)
        node = BatchNormNode(norm, neuron, connect=connect)
        apart = Apart(node)
        exact = copy.deepcopy(apart).double()
        count_fused.clear()
        out, grads = results(node.train(training), x, skip)
        assert len(count_fused) == 1
        want, _ = results(apart.train(training), x, skip)
        assert torch.equal(out, want)
        assert 0.01 < (out != 0).double().mean() < 0.98
        _, wanted = results(exact.train(training), x.double(), skip.double())
        for g, w in zip(grads, wanted, strict=True):
            assert close(g, w, 1e-5 if dtype == torch.float32 else 1e-11)
        assert grads[1].stride() == skip.stride()


@pytest.mark.parametrize("connect", KINDS)
@pytest.mark.parametrize("timesteps", [1, 9, 40])
def test_other_numbers_of_steps_and_half_precision(connect, timesteps, count_fused):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = (torch.randn(timesteps * 2, 3, 33, 31) + 0.5).to(dtype)
        skip = (torch.rand(x.shape) < 0.4).to(dtype)
        node = BatchNormNode(nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=timesteps), connect=connect)
        apart = Apart(node)
        out, grads = results(node, x, skip)
        if dtype != torch.float32:  # the kernels' state and normalised input are in float32: so is the truth
            apart, x, skip = apart.float(), x.float(), skip.float()
        want, wanted = results(apart, x, skip)
        assert out.dtype == dtype
        assert (out != want.to(dtype)).float().mean() < (1e-4 if dtype == torch.float32 else 2e-3)
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        assert all(close(g, w, tolerance) for g, w in zip(grads, wanted, strict=True))
    assert len(count_fused) == 3


def test_what_the_kernels_do_not_take_runs_apart(count_fused):
    x = torch.randn(T * 2, 3, 5, 5)
    for skip in (torch.rand(3, 5, 5), torch.rand(T * 2, 3, 5, 5, dtype=torch.float64), 1.0):
        for connect in KINDS:
            node = BatchNormNode(nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=T), connect=connect)
            apart = Apart(node)
            assert torch.equal(node(x, skip), apart(x, skip))
    assert not count_fused
    node = BatchNormNode(nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=T), connect="add")
    with pytest.raises(TypeError, match="connect='ADD' got no skip"):
        node(x)
    with pytest.raises(TypeError, match="connect='NONE' got a skip of Tensor"):
        BatchNormNode(nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=T))(x, x)
    with pytest.raises(ValueError, match="'CHARGE', 'ADD', 'AND', 'IAND', got 'xor'"):
        BatchNormNode(nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=T), connect="xor")


@pytest.mark.parametrize("connect", KINDS)
def test_double_backward(connect):
    torch.manual_seed(0)
    node = BatchNormNode(
        nn.BatchNorm2d(3).double(), snnfast.LIFNode(timesteps=2, surrogate_function=snnfast.surrogate.ATan()),
        connect=connect,
    )  # fmt: skip
    apart = Apart(node)
    x, skip = (torch.randn(4, 3, 4, 4, dtype=torch.double, requires_grad=True) for _ in range(2))
    second = []
    for model in (node, apart):
        out = (model(x, skip) * torch.arange(1.0, 5).view(4, 1, 1, 1)).sum()
        first = torch.autograd.grad(out, [x, skip, model.norm.weight], create_graph=True)
        total = sum((g * g).sum() for g in first if g.requires_grad)
        second.append((first, torch.autograd.grad(total, [x, skip, model.norm.weight], allow_unused=True)))
    for got, want in zip(second[0][0] + second[0][1], second[1][0] + second[1][1], strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("connect", KINDS)
def test_only_the_final_potential_has_a_gradient(connect):
    x, skip = torch.randn(2, T * 2, 3, 5, 5).unbind()
    node = BatchNormNode(nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=T), connect=connect)
    grads = []
    for model in (Apart(node), node):
        a, b = x.clone().requires_grad_(), skip.clone().requires_grad_()
        model(a, b)
        model.neuron.v.square().sum().backward()
        grads.append((a.grad, torch.zeros_like(b) if b.grad is None else b.grad))
    for got, want in zip(*grads, strict=True):
        assert close(got, want, 1e-5)


def test_the_ops():
    x = torch.randn(T, 2, 3, 5, 5)
    node = BatchNormNode(nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=T))
    mean, var = torch.ops.snnfast.bn_statistics(x, False)
    checks = ("test_schema", "test_faketensor")
    for kind in range(1, 5):
        call = (x, mean, var, None, None, None, None, torch.rand_like(x), kind, 1e-5, *node.neuron._constants(0.0))
        torch.library.opcheck(torch.ops.snnfast.bn_multi_step.default, call, test_utils=checks)
        backward = torch.ops.snnfast.bn_multi_step_backward.default
        torch.library.opcheck(backward, (torch.randn_like(x), None, *call, True), test_utils=checks)


# ---- fuse ----
class Block(nn.Module):
    def __init__(self, meet):
        super().__init__()
        self.conv1, self.bn1, self.sn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), snnfast.IFNode(timesteps=T)
        self.conv2, self.bn2, self.sn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), snnfast.IFNode(timesteps=T)
        for norm in (self.bn1, self.bn2):
            nn.init.constant_(norm.bias, 0.5)
        self.meet = meet

    def forward(self, x):
        x = self.sn1(self.bn1(self.conv1(x)))
        return self.meet(self, x)


def spikes(self, x):
    return self.sn2(self.bn2(self.conv2(x)))


def added_in_place(self, x):
    out = self.bn2(self.conv2(x))
    out += x
    return self.sn2(out)


MEETINGS = {
    "CHARGE": [
        lambda self, x: self.sn2(self.bn2(self.conv2(x)) + x),
        lambda self, x: self.sn2(x + self.bn2(self.conv2(x))),
        lambda self, x: self.sn2(torch.add(self.bn2(self.conv2(x)), x)),
        lambda self, x: self.sn2(torch.add(x, self.bn2(self.conv2(x)))),
        lambda self, x: self.sn2(self.bn2(self.conv2(x)).add(x)),
        lambda self, x: self.sn2(x.add(self.bn2(self.conv2(x)))),
        added_in_place,
    ],
    "ADD": [
        lambda self, x: spikes(self, x) + x,
        lambda self, x: x + spikes(self, x),
        lambda self, x: operator.iadd(spikes(self, x), x),
    ],
    "AND": [
        lambda self, x: x * spikes(self, x),
        lambda self, x: torch.mul(spikes(self, x), x),
        lambda self, x: x.mul(spikes(self, x)),
    ],
    "IAND": [lambda self, x: x * (1.0 - spikes(self, x)), lambda self, x: (1 - spikes(self, x)) * x],
}


def outputs_and_gradients(net, x):
    functional.reset_net(net)
    net.zero_grad()
    out = net(x)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out.detach(), [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize(("kind", "meet"), [(k, m) for k, many in MEETINGS.items() for m in many])
def test_fuse_finds(kind, meet, count_fused):
    net = Block(meet)
    x = torch.rand(T * 2, 4, 6, 6)
    want = outputs_and_gradients(copy.deepcopy(net), x)
    report = fuse(net)
    assert report.connected == {"bn2": kind}
    assert f"bn2 + sn2, residual {kind}" in str(report)
    got = outputs_and_gradients(net, x)
    assert len(count_fused) == 2
    assert torch.equal(got[0], want[0])
    # The bias of a convolution before a batch norm has no gradient but rounding.
    assert all((g - w).norm() <= 1e-4 * w.norm() + 1e-4 for g, w in zip(got[1], want[1], strict=True))
    assert torch.equal(outputs_and_gradients(copy.deepcopy(net), x)[0], outputs_and_gradients(net, x)[0])
    assert unfuse(net) == 2
    count_fused.clear()
    outputs_and_gradients(net, x)
    assert not count_fused


def changes_the_shortcut(self, x):
    y = x * 2
    y += self.bn2(self.conv2(x))
    return self.sn2(y) - y


def twice(self, x):
    s = spikes(self, x)
    return s + x * s


def twice_the_sum(self, x):
    out = self.bn2(self.conv2(x)) + x
    return self.sn2(out) + out


@pytest.mark.parametrize(
    "meet",
    [
        changes_the_shortcut,
        twice,
        twice_the_sum,
        lambda self, x: torch.add(spikes(self, x), x, alpha=2),
        lambda self, x: spikes(self, x) + 1.0,
        lambda self, x: spikes(self, x).add_(x),
        lambda self, x: x - spikes(self, x),
        lambda self, x: 2 - spikes(self, x),
        lambda self, x: spikes(self, x) + x if self.training else spikes(self, x) * x,
    ],
)
def test_fuse_takes_no_other_for_a_connection(meet):
    net = Block(meet)
    x = torch.rand(T * 2, 4, 6, 6)
    for training in (True, False):
        unfuse(net)
        net.train(training)
        net.sn2.v_reset = net.sn1.v_reset
        apart = copy.deepcopy(net)
        assert not fuse(net).connected
        assert torch.equal(outputs_and_gradients(net, x)[0], outputs_and_gradients(apart, x)[0])


def test_one_connection_has_one_side(count_fused):
    def two_neurons(self, x):
        return self.sn1(self.bn1(self.conv1(x))) + spikes(self, x)

    class TwoNeurons(Block):
        def forward(self, x):
            return two_neurons(self, x)

    net = TwoNeurons(None)
    report = fuse(net)
    assert report.connected == {"bn1": "ADD"}
    net(torch.rand(T * 2, 4, 6, 6))
    assert len(count_fused) == 2


def input_changed(self, x):
    y = self.conv2(x)
    out = self.bn2(y)
    y.mul_(2.0)
    return self.sn2(out)


def input_changed_before_the_addition(self, x):
    y = self.conv2(x)
    out = self.bn2(y)
    skip = y * 0.5
    y.mul_(0.0)
    return self.sn2(out + skip)


def skip_changed(self, x):
    skip = x * 0.5
    out = self.bn2(self.conv2(x)) + skip
    skip.mul_(-3.0)
    return self.sn2(out)


@pytest.mark.parametrize("meet", [input_changed, input_changed_before_the_addition, skip_changed])
def test_what_is_changed_on_the_way_is_refused(meet):
    net = Block(meet)
    fuse(net)
    with torch.no_grad(), pytest.raises(RuntimeError, match="changed in place before its neuron ran"):
        net(torch.rand(T * 2, 4, 6, 6))


def how(self, x):
    s = spikes(self, x)
    return {
        "add": lambda: s + x,
        "add alpha": lambda: s.add(x, alpha=2),
        "multiply": lambda: s * x,
        "alone": lambda: s * 1.0,
        "subtract": lambda: x - s,
        "opposite": lambda: (1 - s) * x,
        "in place": lambda: operator.iadd(x * 1.0, s),
        "read": lambda: x * s.mean(),
    }[self.how]()


@pytest.mark.parametrize("traced", ["add", "multiply", "opposite"])
def test_a_forward_that_changes_after_fusing_is_right(traced):
    net = Block(how)
    net.how = traced
    apart = copy.deepcopy(net)
    assert len(fuse(net).connected) == 1
    x = torch.rand(T * 2, 4, 6, 6)
    for net.how in ("add", "add alpha", "multiply", "alone", "subtract", "opposite", "in place", "read"):
        apart.how = net.how
        got, want = outputs_and_gradients(net, x), outputs_and_gradients(apart, x)
        assert torch.equal(got[0], want[0])
        assert all((g - w).norm() <= 1e-4 * w.norm() + 1e-4 for g, w in zip(got[1], want[1], strict=True))
        assert torch.allclose(net.bn2.running_mean, apart.bn2.running_mean, atol=1e-6)


def test_two_uses_where_the_trace_saw_one_are_refused():
    def meet(self, x):
        s = spikes(self, x)
        return s + x + s if self.how == "twice" else s + x

    net = Block(meet)
    net.how = "once"
    fuse(net)
    net.how = "twice"
    with pytest.raises(RuntimeError, match=r"uses the output .* twice"):
        net(torch.rand(T * 2, 4, 6, 6))


def test_hooks_of_the_neuron_get_spikes_to_keep():
    net = Block(how)
    net.how = "add"
    apart = copy.deepcopy(net)
    assert fuse(net).connected
    x = torch.rand(T * 2, 4, 6, 6)
    seen: list = []
    for model in (net, apart):
        model.sn2.register_forward_hook(lambda module, inputs, s: seen.append(s))
        model(x).sum().backward()
    assert all(isinstance(s, torch.Tensor) for s in seen)
    assert torch.equal(*seen)
    assert seen[0].unique().tolist() == [0.0, 1.0]
    torch.testing.assert_close(net.bn2.weight.grad, apart.bn2.weight.grad)


def no_grad_at_the_norm(self, x):
    with torch.no_grad():
        out = self.bn2(self.conv2(x))
    return self.sn2(out) + x * self.scale


def no_grad_at_the_neuron(self, x):
    out = self.bn2(self.conv2(x))
    with torch.no_grad():
        s = self.sn2(out)
    return s + x * self.scale


@pytest.mark.parametrize("meet", [no_grad_at_the_norm, no_grad_at_the_neuron])
def test_gradients_stop_where_they_did(meet):
    net = Block(meet)
    net.scale = nn.Parameter(torch.tensor(0.5))
    apart = copy.deepcopy(net)
    assert fuse(net).connected == {"bn2": "ADD"}
    x = torch.rand(T * 2, 4, 6, 6)
    for model in (net, apart):
        model(x).sum().backward()
    for (name, p), q in zip(net.named_parameters(), apart.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
    assert net.bn2.weight.grad is None
    assert torch.allclose(net.scale.grad, apart.scale.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind):
    net = Block(MEETINGS[kind][0])
    fuse(net)
    x = torch.rand(T * 2, 4, 6, 6)
    want = outputs_and_gradients(net, x)
    functional.reset_net(net)
    torch._dynamo.reset()
    got = outputs_and_gradients(torch.compile(net, backend="aot_eager"), x)
    assert torch.equal(got[0], want[0])
    assert all((g - w).norm() <= 1e-5 * w.norm() + 1e-4 for g, w in zip(got[1], want[1], strict=True))


def test_spikingjellys_sew_networks(count_fused, zoo):
    for kind in ("ADD", "AND", "IAND"):
        net = zoo.sew_resnet.sew_resnet18(cnf=kind, spiking_neuron=snnfast.IFNode, timesteps=T)
        apart = copy.deepcopy(net)
        report = fuse(net)
        assert set(report.connected.values()) == {kind}
        assert len(report.connected) == 8
        x = torch.rand(T, 3, 32, 32)
        count_fused.clear()
        got, want = outputs_and_gradients(net, x)[0], outputs_and_gradients(apart, x)[0]
        assert len(count_fused) == len(report.fused)
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
