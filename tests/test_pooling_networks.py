"""Max-pooling within autograd, under whoever looks at a call, in layers and in converted networks."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import snnfast
from snnfast import layer, pooling
from snnfast.backends import native
from snnfast.pooling import max_pool2d

pytest.importorskip("snnfast._C", reason="the compiled extension is not built here")
FORMATS = (torch.contiguous_format, torch.channels_last)


# ---- memory ----
def test_a_byte_for_each_output_is_kept():
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = max_pool2d(x * 1, 2)
    assert [(t.dtype, t.numel()) for t in kept if t.dtype != x.dtype] == [(torch.uint8, y.numel())]
    assert not any(t.shape == x.shape and t.data_ptr() != x.data_ptr() for t in kept)  # x of the product alone
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, torch.autograd.grad(F.max_pool2d(x, 2).sum(), x)[0])
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_the_input_is_freed_and_may_be_overwritten():
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    between = x * 1
    y = max_pool2d(between, 2)
    want = torch.autograd.grad(F.max_pool2d(x * 1, 2).sum(), x)[0]
    between.data.fill_(7.0)
    reference = weakref.ref(between)
    del between
    gc.collect()
    assert reference() is None
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)


def test_without_gradients_nothing_is_kept(monkeypatch):
    kept = []
    run = native.max_pool
    monkeypatch.setattr(native, "max_pool", lambda dims, x, y, chosen: kept.append(chosen) or run(dims, x, y, chosen))
    max_pool2d(torch.randn(2, 3, 8, 8), 2)
    with torch.no_grad():
        max_pool2d(torch.randn(2, 3, 8, 8, requires_grad=True), 2)
    with torch.inference_mode():
        y = max_pool2d(torch.randn(2, 3, 8, 8), 2)
    assert y.is_inference()
    assert kept == [None] * 3


@pytest.mark.parametrize("packed", [False, True])
def test_a_network_keeps_less_than_with_torchs(pool_calls, packed):
    def kept(pool):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), snnfast.IFNode(timesteps=2), pool, nn.Conv2d(8, 4, 3))
        x = torch.randn(4, 2, 32, 32)
        with snnfast.packed_spikes() if packed else contextlib.nullcontext():
            size, y = snnfast.analysis.saved_bytes(net, x), net(x)
        return size, torch.autograd.grad(y.square().sum(), net.parameters())

    ours, theirs = kept(pooling.MaxPool2d(2)), kept(nn.MaxPool2d(2))
    assert "max_pool_backward" in pool_calls
    assert all(map(torch.equal, ours[1], theirs[1]))
    assert ours[0] < theirs[0]


def test_hooks_may_change_the_layout_of_what_is_kept_and_no_more():
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(2, 3, 4, 4)
    want = torch.autograd.grad(F.max_pool2d(x, 2), x, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(order="C"), torch.from_numpy):
        assert torch.equal(torch.autograd.grad(max_pool2d(x, 2), x, grad)[0], want[0])
    for unpack in (torch.Tensor.float, lambda t: t[:1]):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = max_pool2d(x, 2)
            with pytest.raises(RuntimeError, match="saved_tensors_hooks must give back"):
                torch.autograd.grad(y, x, grad)


# ---- autograd ----
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_second_derivatives(memory_format):
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()

    def curved(t):
        return max_pool2d(t, 2).square()

    assert torch.autograd.gradcheck(curved, x, check_batched_grad=True)
    # Of the second derivative, torch cannot batch that of channels last.
    batches = memory_format is torch.contiguous_format
    assert torch.autograd.gradgradcheck(curved, x, check_batched_grad=batches)
    found = []
    for pool in (max_pool2d, F.max_pool2d):
        (first,) = torch.autograd.grad(pool(x, 2).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
        found.append((first, second, *torch.autograd.grad(second.sin().sum(), x)))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_batched_gradients():
    x = torch.randn(2, 3, 6, 4, requires_grad=True)
    grads = torch.randn(5, 2, 3, 3, 2)
    want = torch.stack([torch.autograd.grad(F.max_pool2d(x, 2), x, g)[0] for g in grads])
    y = max_pool2d(x, 2)
    assert torch.equal(torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)[0], want)
    assert torch.equal(torch.func.vmap(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(grads), want)


def test_backward_under_another_default_device():
    x = torch.randn(2, 3, 6, 4, requires_grad=True)
    y = max_pool2d(x, 2)
    with torch.device("meta"):
        (found,) = torch.autograd.grad(y, x, torch.ones(2, 3, 3, 2, device="cpu"))
        assert max_pool2d(x, 2).device.type == "cpu"
    assert torch.equal(found, torch.autograd.grad(F.max_pool2d(x, 2).sum(), x)[0])


def test_a_result_without_a_gradient():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    y = max_pool2d(x, 2)

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    assert torch.autograd.grad(Cut.apply(y).sum(), x, allow_unused=True) == (None,)


# ---- whoever looks sees torch's own call ----
def test_transforms_modes_and_subclasses(pool_calls):
    x = torch.randn(3, 2, 4, 6, 8)
    want = F.max_pool2d(x.flatten(0, 1), 2).unflatten(0, (3, 2))
    assert torch.equal(torch.func.vmap(lambda t: max_pool2d(t, 2))(x), want)
    grad = torch.func.grad(lambda t: max_pool2d(t, 2).sum())(x[0])
    assert torch.equal(grad, torch.func.grad(lambda t: F.max_pool2d(t, 2).sum())(x[0]))
    primal, tangent = torch.func.jvp(lambda t: max_pool2d(t, 2), (x[0],), (x[1],))
    again = torch.func.jvp(lambda t: F.max_pool2d(t, 2), (x[0],), (x[1],))
    assert torch.equal(primal, again[0])
    assert torch.equal(tangent, again[1])

    class Sub(torch.Tensor):
        pass

    assert type(max_pool2d(x[0].as_subclass(Sub), 2)) is Sub
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        max_pool2d(x[0], 2)
    assert F.max_pool2d in seen

    class Dispatch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Dispatch():
        max_pool2d(x[0], 2)
    assert any("max_pool2d" in str(s) for s in seen[1:])
    assert not pool_calls


def test_traces(pool_calls):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), pooling.MaxPool2d(2))
    x = torch.randn(2, 2, 8, 8)
    traced = torch.jit.trace(net, x)
    assert "max_pool2d" in str(traced.inlined_graph)
    graph = torch.fx.symbolic_trace(net)
    assert F.max_pool2d in [n.target for n in graph.graph.nodes]
    exported = torch.export.export(net, (x,))
    assert "max_pool2d" in str(exported.graph)
    pool_calls.clear()
    want = F.max_pool2d(net[0](x), 2)
    for made in (traced, graph, exported.module()):
        assert torch.equal(made(x), want)
    assert not pool_calls


def test_compiled_in_one_graph():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), pooling.MaxPool2d(2))
    x = torch.randn(2, 2, 8, 8, requires_grad=True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    want, got = net(x), compiled(x)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)]
    assert torch.equal(*grads)


def test_autocast_takes_the_kernel(pool_calls):
    conv = nn.Conv2d(2, 3, 3)
    x = torch.randn(2, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert max_pool2d(conv(x), 2).dtype == torch.bfloat16
    assert pool_calls == ["max_pool"]


# ---- layers and converted networks ----
def test_the_layer(pool_calls):
    x = torch.randn(3, 2, 4, 6, 8)
    want = F.max_pool2d(x.flatten(0, 1), 2).unflatten(0, (3, 2))
    assert torch.equal(layer.MaxPool2d(2, step_mode="m")(x), want)
    assert torch.equal(layer.MaxPool2d(2)(x[0]), want[0])
    assert torch.equal(layer.MaxPool2d(2)(input=x[0]), want[0])
    assert len(pool_calls) == 3
    assert isinstance(layer.MaxPool2d(2), nn.MaxPool2d)
    assert repr(layer.MaxPool2d(2)) == f"{repr(nn.MaxPool2d(2))[:-1]}, step_mode=s)"
    got, indices = layer.MaxPool2d(2, return_indices=True, step_mode="m")(x)
    assert torch.equal(got, want)
    assert indices.shape == want.shape


def small_vgg():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


@pytest.mark.parametrize("share_weights", [False, True])
def test_converted_networks(pool_calls, share_weights):
    ann = small_vgg()
    net = snnfast.to_spiking(ann, timesteps=4, share_weights=share_weights)
    assert type(ann[3]) is nn.MaxPool2d
    assert [type(net[k]) for k in (3, 7)] == [pooling.MaxPool2d] * 2
    assert isinstance(net[3], nn.MaxPool2d)
    assert repr(net[3]) == repr(ann[3])
    assert list(net.state_dict()) == list(ann.state_dict())
    plain = copy.deepcopy(net)
    for k in (3, 7):
        plain[k].__class__ = nn.MaxPool2d
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    x = torch.rand(2, 3, 8, 8)
    results = []
    for each in (plain, net, copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        y = each(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), each.parameters())))
        assert pool_calls == ([] if each is plain else ["max_pool", "max_pool_backward"])
        pool_calls.clear()
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    assert results[0][0].any()


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        x = torch.max_pool2d(x, kernel_size=(2, 2), stride=2)
        return self.fc(x.flatten(1))


def test_converted_functional_pooling(pool_calls, monkeypatch):
    net = snnfast.to_spiking(Functional(), timesteps=4, v_threshold=0.125)
    x = torch.rand(2, 3, 8, 8)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    with torch.no_grad():
        got = net(x)
        assert pool_calls == ["max_pool"] * 2
        assert torch.equal(torch.load(buffer, weights_only=False)(x), got)
        assert pool_calls == ["max_pool"] * 4
        monkeypatch.setattr(pooling, "_is_served", lambda x: False)
        assert torch.equal(net(x), got)
    assert len(pool_calls) == 4
    assert not torch.equal(got, net.fc.bias.expand_as(got))  # something spiked


def test_rates_are_pooled_as_before():
    net = snnfast.to_spiking(small_vgg(), timesteps=4, calibration=torch.rand(4, 3, 8, 8))
    assert not any(isinstance(m, pooling.MaxPool2d) for m in net.modules())


def test_a_converted_networks_graph_shows_torchs_call():
    net = snnfast.to_spiking(small_vgg(), timesteps=2).eval()
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        want = net(x)
        exported = torch.export.export(net, (x,))
        assert torch.equal(exported.module()(x), want)
        assert "max_pool2d" in str(exported.graph)
        assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(x), want)
    assert snnfast.fuse(copy.deepcopy(net)).fused == [("5", "6")]


@pytest.mark.parametrize("functional", [False, True])
def test_unrolled_models_pool_by_it(functional, monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.neuron, self.pool = nn.Conv2d(1, 3, 3), snnfast.IFNode(), nn.MaxPool2d(2)

        def forward(self, x):
            s = self.neuron(self.conv(x))
            return F.max_pool2d(s, 2) if functional else self.pool(s)

    net, x = Net(), torch.rand(4, 2, 1, 8, 8)
    want = torch.stack([net(step) for step in x])
    snnfast.functional.reset_net(net)
    calls, pool = [], pooling._pool
    monkeypatch.setattr(pooling, "_pool", lambda *args: calls.append(1) or pool(*args))
    assert torch.equal(snnfast.unroll(net, x), want)
    assert calls == [1]
    if functional:
        return
    net.pool.register_forward_hook(lambda module, inputs, output: calls.append("hook"))  # such a layer is called
    snnfast.functional.reset_net(net)
    assert torch.equal(snnfast.unroll(net, x), want)
    assert calls == [1, "hook"]
