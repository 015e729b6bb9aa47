"""to_spiking against networks written by hand as a loop over time, one step after another."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import snnfast
from snnfast import functional
from snnfast.convert import to_spiking_layers

pytestmark = pytest.mark.usefixtures("one_thread")

T, B = 4, 3


# ---- the reference: neurons and networks stepped by hand ----
class Spike(torch.autograd.Function):
    """1 where u >= 0; its derivative that of a sigmoid of slope 4, as the default surrogate's."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        p = torch.sigmoid(4 * u)
        return grad * 4 * p * (1 - p)


class Loop(nn.Module):
    """A leaky (tau = 2, hard reset) or an integrate-and-fire (soft reset) neuron, one step a call."""

    def __init__(self, leaky=True):
        super().__init__()
        self.leaky, self.v = leaky, 0.0

    def forward(self, x):
        h = self.v + (x - self.v) / 2.0 if self.leaky else self.v + x
        s = Spike.apply(h - 1.0)
        self.v = (1.0 - s) * h if self.leaky else h - s
        return s


def loops(number, leaky=True):
    return [Loop(leaky) for _ in range(number)]


NEURONS = [
    pytest.param(True, {"neuron": snnfast.LIFNode, "tau": 2.0}, id="LIF"),
    pytest.param(False, {"neuron": snnfast.IFNode, "v_reset": None}, id="IF, soft reset"),
]


def check_equal(net, ann, x, reference):
    """The same logits, and the same gradients of weights and input."""
    x_net, x_ann = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = net(x_net)
    want = reference(ann, x_ann)
    assert got.shape == want.shape
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    assert want.std() > 0
    weight = torch.randn_like(want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    assert torch.allclose(x_net.grad, x_ann.grad, rtol=1e-7, atol=1e-10)
    of_net = dict(net.named_parameters())
    for name, p in ann.named_parameters():
        assert (p.grad is None) == (of_net[name].grad is None), name
        if p.grad is not None:
            assert torch.allclose(of_net[name].grad, p.grad, rtol=1e-7, atol=1e-10), name
            assert p.grad.abs().sum() > 0, name


class Functional(nn.Module):
    """ReLU in all the ways one can call it, and a view by the batch size of the input."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.fc1, self.fc2, self.fc3 = nn.Linear(4 * 16, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        b = x.size(0)
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x), inplace=True)
        x = x.view(b, -1)
        x = self.fc1(x).relu_()
        return self.fc3(self.fc2(x).clamp(min=0))


def functional_by_hand(leaky):
    def run(ann, x):
        n, out = loops(5, leaky), []
        for _ in range(T):
            y = n[0](ann.conv1(x))
            y = F.max_pool2d(n[1](ann.conv2(y)), 2)
            y = n[2](ann.conv3(y)).flatten(1)
            out.append(ann.fc3(n[4](ann.fc2(n[3](ann.fc1(y))))))
        return torch.stack(out)

    return run


def strong(ann):
    """Weights and biases large enough for spikes in every layer, in float64."""
    with torch.no_grad():
        for m in ann.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                m.weight.mul_(4.0)
                if m.bias is not None:
                    m.bias.uniform_(0.2, 1)
    return ann.double()


@pytest.mark.parametrize(("leaky", "arguments"), NEURONS)
def test_functional_calls(leaky, arguments):
    ann = strong(Functional())
    net = snnfast.to_spiking(ann, T, **arguments)
    assert [n for n, m in net.named_children() if isinstance(m, snnfast.neuron.BaseNode)] == [
        "relu", "relu_2", "relu_3", "relu_4", "clamp",
    ]  # fmt: skip
    check_equal(net, ann, 2 * torch.randn(B, 2, 12, 12).double(), functional_by_hand(leaky))


class TorchvisionBlock(nn.Module):
    """As torchvision writes it: one in-place ReLU for both activations, an in-place sum."""

    def __init__(self, cin, cout, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class TorchvisionResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(TorchvisionBlock(4, 4), TorchvisionBlock(4, 4))
        self.layer2 = nn.Sequential(TorchvisionBlock(4, 8, 2), TorchvisionBlock(8, 8))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(8, 5)

    def _forward_impl(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    def forward(self, x):
        return self._forward_impl(x)


def resnet_step(ann, x, n):
    """One time step of TorchvisionResNet with the neurons ``n``."""
    n = iter(n)
    y = ann.maxpool(next(n)(ann.bn1(ann.conv1(x))))
    for block in (*ann.layer1, *ann.layer2):
        z = block.bn2(block.conv2(next(n)(block.bn1(block.conv1(y)))))
        y = next(n)(z + (y if block.downsample is None else block.downsample(y)))
    return ann.fc(y.mean((2, 3)))


def trained_norms(ann):
    """Batch norms as after training: their statistics and weights are anything."""
    for m in ann.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.3, 1)
            nn.init.uniform_(m.weight, 1, 3)
            nn.init.normal_(m.bias, 0, 0.5)
    return ann


@pytest.mark.parametrize(("leaky", "arguments"), NEURONS)
@pytest.mark.parametrize("coding", ["direct", "temporal"])
def test_torchvision_style_resnet(leaky, arguments, coding):
    ann = trained_norms(TorchvisionResNet().double()).eval()
    net = snnfast.to_spiking(ann, T, coding=coding, **arguments)
    assert isinstance(net, TorchvisionResNet)
    assert isinstance(net.layer1[0], TorchvisionBlock)
    assert {"relu", "relu_2"} < {n for n, _ in net.layer1[0].named_children()}
    x = torch.randn(*([T] if coding == "temporal" else []), B, 3, 12, 12).double()

    def by_hand(ann, x):
        n = loops(9, leaky)
        return torch.stack([resnet_step(ann, x[t] if coding == "temporal" else x, n) for t in range(T)])

    check_equal(net, ann, x, by_hand)


def test_batch_norm_in_training_is_over_time_and_batch():
    ann = strong(TorchvisionBlock(3, 4, 2)).train()
    net = snnfast.to_spiking(ann, T, coding="temporal")

    def by_hand(ann, x):
        def fold(layer, y):
            return layer(y.flatten(0, 1)).unflatten(0, (T, B))

        def neuron(y, n):
            return torch.stack([n(step) for step in y])

        first, second = loops(2)
        y = neuron(fold(lambda y: ann.bn1(ann.conv1(y)), x), first)
        return neuron(fold(lambda y: ann.bn2(ann.conv2(y)), y) + fold(ann.downsample, x), second)

    check_equal(net, ann, 2 * torch.randn(T, B, 3, 8, 8).double(), by_hand)
    for name, value in ann.named_buffers():
        assert torch.allclose(net.get_buffer(name), value), name


def test_what_is_constant_is_computed_once():
    ann = trained_norms(TorchvisionResNet().double()).train()
    once, always = (snnfast.to_spiking(ann, T, coding=c) for c in ("direct", lambda x, T: x.expand(T, *x.shape)))
    seen = {}
    for name in ("conv1", "bn1", "maxpool", "layer1.0.conv1", "fc"):
        once.get_submodule(name).register_forward_hook(lambda m, i, o, n=name: seen.__setitem__(n, len(i[0])))
    x = torch.randn(B, 3, 12, 12).double()
    got, want = once(x), always(x)
    assert seen == {"conv1": B, "bn1": B, "maxpool": T * B, "layer1.0.conv1": T * B, "fc": T * B}
    assert torch.allclose(got, want)
    for y in (got, want):
        y.square().sum().backward()
    for (name, p), q in zip(once.named_parameters(), always.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=1e-9), name
    assert torch.allclose(once.bn1.running_mean, always.bn1.running_mean)
    n = B * 12 * 12  # the running variance is unbiased: it counts the samples
    biased = [(v - 0.9 * ann.bn1.running_var) * (m - 1) / m for v, m in (
        (once.bn1.running_var, n), (always.bn1.running_var, T * n),
    )]  # fmt: skip
    assert torch.allclose(*biased)


class Preactivated(nn.Module):
    """A shortcut around the first neuron: what is constant meets what is not."""

    def __init__(self):
        super().__init__()
        self.stem, self.relu = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()
        self.conv, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4 * 8 * 8, 5)

    def forward(self, x):
        x = self.stem(x)
        b, c, h, w = x.shape
        y = self.conv(self.relu(x)) + x
        y = torch.cat([y, x * 2, y.new_ones(b, c, h, w)], 1).reshape(b, 3 * c, -1)
        return self.head(y[:, :c].reshape(b, -1)) + y.mean((1, 2)).view(x.shape[0], 1)


def test_a_shortcut_around_the_first_neuron():
    ann = strong(Preactivated())
    net = snnfast.to_spiking(ann, T)

    def by_hand(ann, x):
        (n,), out = loops(1), []
        for _ in range(T):
            z = ann.stem(x)
            y = ann.conv(n(z)) + z
            all_of_it = torch.cat([y, z * 2, torch.ones_like(y)], 1)
            out.append(ann.head(y.flatten(1)) + all_of_it.mean((1, 2, 3))[:, None])
        return torch.stack(out)

    seen = []
    net.stem.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    check_equal(net, ann, torch.randn(B, 2, 8, 8).double(), by_hand)
    assert seen == [B]


def test_the_kernels_repeat_the_input_unless_someone_looks(monkeypatch):
    if snnfast.backends.native.missing(torch.device("cpu")) is not None:
        pytest.skip("the CPU kernels are not built")
    calls = []
    run = snnfast.constant_input.multi_step
    monkeypatch.setattr(snnfast.constant_input, "multi_step", lambda *args: calls.append(len(args[0])) or run(*args))
    ann = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten())
    x = torch.randn(B, 2, 9, 9)
    results = []

    def result(prepare):
        torch.manual_seed(0)
        net = snnfast.to_spiking(ann, T, snnfast.ParametricLIFNode, surrogate_function=snnfast.surrogate.ATan())
        prepare(net[2])
        given = x.clone().requires_grad_()
        y = net(given)
        assert y.shape == (T, B, 4 * 25)
        results.append((y, net[2].v, *torch.autograd.grad((y.sin()).sum(), [given, *net.parameters()])))
        return net

    seen = []
    result(lambda neuron: None)
    assert calls == [B]
    # Whoever looks at the neuron's input or calls sees the repeated input.
    result(lambda neuron: neuron.register_forward_hook(lambda m, i, o: seen.append(len(i[0]))))
    result(lambda neuron: neuron.register_forward_pre_hook(lambda m, i: seen.append(len(i[0]))))
    assert seen == [T * B] * 2
    kept = result(lambda neuron: setattr(neuron, "store_v_seq", True))
    assert kept[2].v_seq.shape[:2] == (T, B)
    result(lambda neuron: snnfast.functional.set_backend(neuron, "reference"))
    assert calls == [B]
    for other in results[1:]:
        for k, (got, want) in enumerate(zip(results[0], other, strict=True)):
            assert torch.equal(got, want) if k < 2 else torch.allclose(got, want, rtol=1e-4, atol=1e-5)


def first_neuron(kind=snnfast.IFNode, **kwargs):
    """As a converted network has it."""
    return to_spiking_layers.prepare_neuron(kind(timesteps=T, v_threshold=0.3, **kwargs), True)


def repeated(neuron, x):
    """What it gives for the input that is repeated."""
    other = type(neuron)(timesteps=T, v_threshold=0.3)
    other.load_state_dict(neuron.state_dict())
    return other.to(next(neuron.parameters(), x).dtype)(x.repeat(T, *(1,) * (x.dim() - 1)))


def test_a_constant_input_is_of_one_call():
    x = torch.rand(6, 33)
    neuron = first_neuron()
    snnfast.functional.set_step_mode(neuron, "s")
    assert neuron(x).shape == (T * 6, 33)  # repeated, in this mode one step
    snnfast.functional.set_step_mode(neuron, "m")
    for other in (x.bfloat16(), x.double(), x):
        assert torch.equal(neuron(other).double(), repeated(neuron, other).double())
    neuron._takes_constant(x)  # a call that never came
    assert torch.equal(neuron(x[:4].bfloat16()), repeated(neuron, x[:4].bfloat16()))
    with pytest.raises(ValueError, match="x must be a dense float32 tensor on the CPU, and T from 2 to 16, got"):
        snnfast.constant_input.multi_step(x, 17, None, None, neuron._constants(0.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_a_constant_input_and_a_decay_of_any_dtype(dtype):
    neuron = first_neuron(snnfast.ParametricLIFNode).to(dtype)
    x = torch.rand(6, 33) * 2
    got = neuron(x)
    assert torch.equal(got, repeated(neuron, x))
    assert 0.01 < got.mean() < 0.9
    got.sum().backward()
    assert neuron.w.grad.dtype == dtype
    assert neuron.w.grad != 0


def test_a_constant_input_that_is_looked_at_or_has_no_values_of_its_own():
    neuron, x, seen = first_neuron(), torch.rand(6, 33), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    try:
        neuron(x)
    finally:
        handle.remove()
    assert seen[0] == T * 6
    negative = torch._neg_view(-x)
    assert torch.equal(neuron(negative), repeated(neuron, x))


class InPlace(nn.Module):
    """An in-place ReLU whose input is used again: that sees the activation."""

    def __init__(self, relu):
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(6, 6), nn.Linear(6, 5), relu

    def forward(self, x):
        y = self.first(x)
        z = self.relu(y)
        return self.second(y + z) + self.second(y)


@pytest.mark.parametrize("relu", [nn.ReLU(inplace=True), nn.ReLU(), F.relu_, torch.relu_], ids=repr)
def test_in_place(relu):
    ann = strong(InPlace(relu))
    in_place = relu in (F.relu_, torch.relu_) or relu.inplace

    def by_hand(ann, x):
        (n,), out = loops(1), []
        for _ in range(T):
            y = ann.first(x)
            z = n(y)
            y = z if in_place else y
            out.append(ann.second(y + z) + ann.second(y))
        return torch.stack(out)

    check_equal(snnfast.to_spiking(ann, T), ann, 2 * torch.randn(B, 6).double(), by_hand)


class Shared(nn.Module):
    """One block for two layers."""

    def __init__(self):
        super().__init__()
        self.block, self.head = nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.block(self.block(x)))


def test_a_block_used_twice_shares_weights_and_no_state():
    ann = strong(Shared())
    net = snnfast.to_spiking(ann, T)

    def by_hand(ann, x):
        first, second = loops(2)
        linear = ann.block[0]
        return torch.stack([ann.head(second(linear(first(linear(x))))) for _ in range(T)])

    check_equal(net, ann, 2 * torch.randn(B, 6).double(), by_hand)
    with pytest.raises(ValueError, match=r"auto_reset can be False only .* 'block' .* more than once"):
        net.auto_reset = False


# ---- networks drawn at random ----
class Residual(nn.Module):
    def __init__(self, body, relu):
        super().__init__()
        self.body, self.relu = body, relu

    def forward(self, x):
        return self.relu(self.body(x) + x) if self.relu is not None else self.body(x) + x


def layers(draw, depth):
    makers = {
        "conv": lambda: nn.Conv2d(3, 3, 3, padding=1, bias=draw(st.booleans())),
        "norm": lambda: nn.BatchNorm2d(3),
        "relu": lambda: nn.ReLU(inplace=False),
        "max": lambda: nn.MaxPool2d(3, 1, 1),
        "average": lambda: nn.AvgPool2d(3, 1, 1),
        "dropout": lambda: nn.Dropout(0.5),
        "residual": lambda: Residual(layers(draw, depth - 1), draw(st.sampled_from([nn.ReLU(), None]))),
    }
    names = sorted(makers if depth else set(makers) - {"residual"})
    return nn.Sequential(*(makers[n]() for n in draw(st.lists(st.sampled_from(names), min_size=1, max_size=5))))


@st.composite
def networks(draw):
    torch.manual_seed(draw(st.integers(0, 1000)))
    net = nn.Sequential(layers(draw, 2), nn.Conv2d(3, 3, 3), nn.ReLU(), layers(draw, 1), nn.Flatten(), nn.Linear(48, 5))
    return trained_norms(strong(net)).eval()


def by_steps(ann, leaky):
    """A copy of ``ann`` with hand-written neurons, one for each ReLU module; called once per step."""
    ann = copy.deepcopy(ann)
    for parent in list(ann.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, Loop(leaky))
    return ann


@settings(max_examples=30, deadline=None)
@given(networks(), st.sampled_from(NEURONS), st.sampled_from(["direct", "temporal"]), st.integers(1, 5))
def test_random_networks(ann, neuron, coding, T):
    leaky, arguments = neuron.values
    net = snnfast.to_spiking(ann, T, coding=coding, **arguments)
    assert list(net.state_dict()) == list(ann.state_dict())
    reference = by_steps(ann, leaky)
    x = torch.randn(T, 2, 3, 6, 6).double()
    x = x if coding == "temporal" else x[0]
    want = torch.stack([reference(x[t] if coding == "temporal" else x) for t in range(T)])
    got = net(x)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-10)
    weight = torch.randn_like(want)
    grads = [
        torch.autograd.grad((y * weight).sum(), list(n.parameters()), allow_unused=True)
        for y, n in ((got, net), (want, reference))
    ]
    for g, w in zip(*grads, strict=True):
        assert (g is None) == (w is None)
        assert g is None or torch.allclose(g, w, rtol=1e-6, atol=1e-9)


# ---- what stays and what is copied ----
def test_the_original_stays_and_the_keys_too():
    ann = TorchvisionResNet()
    before = copy.deepcopy(ann.state_dict())
    net = snnfast.to_spiking(ann, T, snnfast.ParametricLIFNode)
    net(torch.randn(B, 3, 12, 12)).sum().backward()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    assert type(ann) is TorchvisionResNet
    assert type(ann.layer1[0]) is TorchvisionBlock
    assert type(ann.relu) is nn.ReLU
    assert all(torch.equal(v, before[k]) for k, v in ann.state_dict().items())
    assert list(before) == [k for k in net.state_dict() if not k.endswith(".w")]
    assert sum(k.endswith(".w") for k in net.state_dict()) == 9
    ann.load_state_dict(snnfast.to_spiking(ann, T).state_dict())
    shared = snnfast.to_spiking(ann, T, share_weights=True)
    assert all(p is q for p, q in zip(shared.parameters(), ann.parameters(), strict=True))


@pytest.mark.parametrize("make", [TorchvisionResNet, lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), Last())])
def test_copies_and_pickles(make):
    net = snnfast.to_spiking(make(), T).eval()
    x = torch.randn(B, 3, 12, 12)
    want = net(x)
    saved = io.BytesIO()
    torch.save(net, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(saved, weights_only=False)):
        assert torch.equal(copied(x), want)
        assert type(copied) is type(net)
        copied.timesteps = 2
        assert copied(x).shape[0] == 2
    assert net.timesteps == T


class Last(nn.Module):
    def forward(self, x):
        return F.relu(x).mean((2, 3))


def test_timesteps_can_be_set():
    ann = strong(Preactivated())
    ann = nn.Sequential(ann, nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 5).double())
    net, longer = snnfast.to_spiking(ann, T), snnfast.to_spiking(ann, 7)
    x = torch.randn(B, 2, 8, 8).double()
    net.eval(), longer.eval()
    want = net(x)
    net.timesteps = 7
    assert torch.equal(net(x), longer(x))
    net.timesteps = T
    assert torch.equal(net(x), want)
    with pytest.raises(ValueError, match="timesteps must be a whole number from 1, got 0"):
        net.timesteps = 0


def test_each_forward_starts_afresh_unless_asked():
    ann = strong(Functional())
    net = snnfast.to_spiking(ann, T, coding="temporal")
    x = torch.randn(2 * T, B, 2, 12, 12).double()
    first = net(x[:T])
    assert torch.equal(net(x[:T]), first)  # no reset_net in between
    functional.reset_net(net)
    assert torch.equal(net(x[:T]), first)
    whole = snnfast.to_spiking(ann, 2 * T, coding="temporal")(x)
    net.auto_reset = False
    functional.reset_net(net)
    assert torch.equal(torch.cat([net(x[:T]), net(x[T:])]), whole)
    assert not torch.equal(net(x[:T]), first)
    net.auto_reset = True
    assert torch.equal(net(x[:T]), first)


def test_channels_last_stays():
    net = snnfast.to_spiking(TorchvisionResNet(), T).to(memory_format=torch.channels_last)
    layouts = []
    net.layer1[0].conv1.register_forward_hook(
        lambda m, i, o: layouts.append(i[0].is_contiguous(memory_format=torch.channels_last))
    )
    x = torch.randn(B, 3, 12, 12)
    net.eval()
    assert torch.allclose(net(x.to(memory_format=torch.channels_last)), net(x), atol=1e-6)
    assert layouts[0]
