"""Event-driven convolutions against PyTorch's in float64, who gets PyTorch's instead, and networks of them."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import snnfast
from snnfast import events, layer
from snnfast.backends import native
from snnfast.events import EventConv2d, event_driven

_C = native._C
pytestmark = pytest.mark.skipif(_C is None, reason="needs the compiled kernels")


@pytest.fixture(autouse=True)
def gradients_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few of the kernel's output channels are used."""
    monkeypatch.setattr(events, "_MOST_FILLING", 1000.0)


def spikes(*shape: int, rate: float = 0.05, graded: bool = False, channels_last: bool = False) -> Tensor:
    x = (torch.rand(shape) < rate).float()
    x = x * torch.randn(shape) if graded else x
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that run from now on."""
    found: list[str] = []
    for name in ("event_convolve", "event_weight_gradient"):
        kernel = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *args, n=name, k=kernel: found.append(n) or k(*args))
    return found


def results(conv: nn.Conv2d, x: Tensor, magnitudes: bool = False) -> tuple[Tensor, ...]:
    """The output and the gradients of a weighted sum of it, which with ``magnitudes`` is of absolute values."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    y = conv(x)
    weights = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad(y, (x, *conv.parameters()), weights.abs() if magnitudes else weights)
    return y, *grads


def check(conv: EventConv2d, x: Tensor) -> None:
    """Every number to the roundings of what is added up for it."""
    exact: Any = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        bias=conv.bias is not None, dtype=torch.float64,
    )  # fmt: skip
    exact.load_state_dict(conv.state_dict())
    want = results(exact, x.double())
    with torch.no_grad():
        for p in exact.parameters():
            p.abs_()
    terms = results(exact, x.double().abs(), magnitudes=True)
    found = results(conv, x)
    like = torch.channels_last
    last = any(not t.is_contiguous() and t.is_contiguous(memory_format=like) for t in (x, conv.weight))
    assert found[0].is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    for g, w, t in zip(found, want, terms, strict=True):
        assert g.shape == w.shape
        assert ((g.double() - w).abs() <= 2**-20 * t + 1e-30).all()
    with torch.no_grad():
        assert torch.equal(conv(x), found[0])


# ---- numbers ----
@pytest.mark.parametrize("name", _C.cpu_sets() if _C else [])
@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize(
    ("x", "conv"),
    [
        ((5, 64, 16, 16), {"out_channels": 128, "kernel_size": 3, "padding": 1}),
        ((40, 96, 4, 4), {"out_channels": 80, "kernel_size": 3, "padding": 1, "bias": False}),
        ((3, 17, 9, 21), {"out_channels": 33, "kernel_size": (1, 5), "padding": (0, 3)}),
        ((2, 70, 40, 40), {"out_channels": 16, "kernel_size": 5, "dilation": 2}),
        ((4, 64, 32, 32), {"out_channels": 48, "kernel_size": 3, "stride": 2, "padding": 1}),
        ((1, 16, 7, 7), {"out_channels": 200, "kernel_size": 7, "padding": 3, "stride": (1, 2)}),
    ],
)
def test_every_instruction_set(name, graded, x, conv):
    before = _C.cpu_set()
    _C.set_cpu_set(name)
    try:
        for channels_last in (False, True):
            made = EventConv2d(x[1], **conv)
            if channels_last:
                made = made.to(memory_format=torch.channels_last)
            check(made, spikes(*x, graded=graded, channels_last=channels_last))
    finally:
        _C.set_cpu_set(before)


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 9), st.integers(16, 80), st.integers(1, 20), st.integers(1, 20)),
    st.tuples(*(st.integers(1, 4) for _ in range(2)), *(st.integers(0, 4) for _ in range(2))),
    st.tuples(*(st.integers(1, 3) for _ in range(4))),
    st.integers(16, 140),
    st.booleans(),
)
def test_any_shape(shape, window, geometry, out_channels, graded):
    torch.manual_seed(sum(shape))
    kernel, padding, stride, dilation = window[:2], window[2:], geometry[:2], geometry[2:]
    conv = EventConv2d(shape[1], out_channels, kernel, stride, padding, dilation)
    x = spikes(*shape, rate=0.04, graded=graded)
    if min(conv._output_size(x)) > 0:
        if conv._is_served(x, conv.weight, conv.bias):
            check(conv, x)
        else:
            assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, stride, padding, dilation))


def test_no_events_give_the_bias_and_a_gradient_of_zeros():
    conv = EventConv2d(16, 20, 3, padding=1)
    y = conv(torch.zeros(2, 16, 5, 5))
    assert conv.bias is not None
    assert torch.equal(y, conv.bias.detach().view(1, -1, 1, 1).expand_as(y))
    y.sum().backward()
    assert conv.weight.grad is not None
    assert not conv.weight.grad.any()
    assert torch.isfinite(conv(torch.full((1, 16, 5, 5), -0.0))).all()


def test_values_that_are_no_numbers_pass():
    conv = EventConv2d(16, 16, 3, padding=1)
    x = torch.zeros(1, 16, 8, 8)
    x[0, 3, 2, 2], x[0, 5, 6, 6] = float("nan"), float("inf")
    with torch.no_grad():
        y, want = conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())


def test_the_bits_do_not_depend_on_the_threads(keeps_threads):
    for shape, conv in (
        ((40, 96, 6, 6), EventConv2d(96, 80, 3, padding=1)),
        ((3, 48, 40, 40), EventConv2d(48, 64, 3, padding=1)),
    ):
        x, found = spikes(*shape, graded=True), []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            y, _, of_weight, _ = results(conv, x)  # the other gradients are PyTorch's
            found.append((y, of_weight))
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))


# ---- who is served ----
def test_the_input_alone_decides(monkeypatch):
    ran = calls(monkeypatch)
    monkeypatch.setattr(events, "_MOST_FILLING", 1.25)
    conv = EventConv2d(16, 64, 3)
    x = torch.zeros(2, 16, 10, 10)
    x.view(-1)[: x.numel() // 5] = 1
    conv(x).sum().backward()
    assert ran == ["event_convolve", "event_weight_gradient"]
    x.view(-1)[x.numel() // 5] = 1  # one more than a fifth
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias))
    strided = EventConv2d(16, 64, 3, stride=2)
    few = spikes(2, 16, 10, 10)
    strided(few).sum().backward()
    assert ran[2:] == ["event_convolve"]  # PyTorch's gradient
    strided(spikes(2, 16, 10, 10, rate=0.15))
    assert len(ran) == 3
    narrow = EventConv2d(16, 16, 3)
    narrow(spikes(2, 16, 10, 10, rate=0.15))
    assert len(ran) == 3
    narrow(few).sum().backward()
    assert ran[3:] == ["event_convolve"]


@pytest.mark.parametrize(
    "conv",
    [
        {"out_channels": 32, "kernel_size": 1},
        {"out_channels": 32, "kernel_size": 3, "groups": 2},
        {"out_channels": 8, "kernel_size": 3},
        {"out_channels": 32, "kernel_size": 9, "padding": 4},
        {"out_channels": 32, "kernel_size": 2, "padding": "same"},
        {"out_channels": 32, "kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"out_channels": 32, "kernel_size": 3, "dtype": torch.float64},
    ],
    ids=str,
)
def test_other_convolutions_are_pytorchs(conv, monkeypatch):
    ran = calls(monkeypatch)
    x = spikes(2, 16, 6, 6).to(conv.get("dtype", torch.float32))
    made, plain = EventConv2d(16, **conv), nn.Conv2d(16, **conv)
    plain.load_state_dict(made.state_dict())
    assert torch.equal(made(x), plain(x))
    if conv.get("dtype") is None:  # whose reason may be in the input
        report = event_driven(nn.Sequential(plain))
        assert type(plain) is nn.Conv2d
        assert not report.event_driven
        assert f"0 left alone: {report.left_alone['0']}" in str(report)
    assert not ran


def test_other_inputs_are_pytorchs(monkeypatch):
    ran = calls(monkeypatch)
    conv, x = EventConv2d(16, 16, 3), spikes(2, 16, 6, 6)
    assert torch.equal(conv(x[0]), F.conv2d(x[0], conv.weight, conv.bias))  # [C, H, W]
    assert conv(torch.empty(0, 16, 6, 6)).shape == (0, 16, 4, 4)
    assert conv.to("meta")(x.to("meta")).device.type == "meta"
    conv = EventConv2d(16, 16, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    assert torch.func.vmap(conv)(x.unsqueeze(0)).shape == (1, 2, 16, 4, 4)
    assert torch.compile(conv, backend="eager", fullgraph=True)(x).shape == (2, 16, 4, 4)
    traced = torch.fx.symbolic_trace(nn.Sequential(conv))
    assert torch.equal(traced(x), F.conv2d(x, conv.weight, conv.bias))
    assert not ran
    for wrong in (torch.zeros(2, 17, 6, 6), torch.zeros(2, 16, 2, 2), torch.zeros(16)):
        with pytest.raises(RuntimeError) as error:
            F.conv2d(wrong, conv.weight, conv.bias)
        with pytest.raises(RuntimeError, match="^" + re.escape(str(error.value).splitlines()[0])):
            conv(wrong)


def test_second_derivatives_and_parts_of_the_gradients():
    conv, x = EventConv2d(16, 16, 3), spikes(2, 16, 6, 6).requires_grad_()
    found = []
    for call in (conv, lambda x: F.conv2d(x, conv.weight, conv.bias)):
        first = torch.autograd.grad(call(x).square().sum(), (x, conv.weight), create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, conv.weight))])
    for g, w in zip(*found, strict=True):
        assert torch.allclose(g, w, rtol=1e-4, atol=1e-4 * w.abs().max().item())
    conv.weight.requires_grad_(False)
    conv(x).sum().backward()
    assert conv.weight.grad is None
    assert x.grad is not None


def test_whatever_memory_weights_and_biases_have():
    x = spikes(2, 16, 8, 8)
    turned = nn.Parameter(torch.randn(16, 32, 3, 3).transpose(0, 1))  # dense, neither channels first nor last
    conv = EventConv2d(16, 32, 3)
    conv.weight, conv.bias = turned, nn.Parameter(torch.arange(64.0)[::2])
    check(conv, x)
    found = torch.func.functional_call(conv, {"bias": torch.tensor(3.0).expand(32)}, (x,))
    assert torch.allclose(found, F.conv2d(x, turned) + 3, atol=1e-4)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.allclose(conv(x), F.conv2d(x, turned, conv.bias), atol=1e-4)
    finally:
        torch.set_default_dtype(before)


def test_other_shapes_and_geometries_are_pytorchs(monkeypatch):
    ran = calls(monkeypatch)
    x = spikes(2, 16, 8, 8)
    conv = EventConv2d(16, 32, 3)
    conv.weight, conv.bias = (nn.Parameter(p.data[:20].clone()) for p in (conv.weight, conv.bias))
    assert conv(x).shape == (2, 20, 6, 6)
    for name, value in (("stride", 0), ("padding", -1), ("dilation", 0)):
        wrong, plain = (kind(16, 32, 3, **{name: value}) for kind in (EventConv2d, nn.Conv2d))
        with pytest.raises(RuntimeError) as error:
            plain(x)
        with pytest.raises(RuntimeError, match="^" + re.escape(str(error.value).splitlines()[0])):
            wrong(x)
    conv = EventConv2d(16, 32, 3)
    conv.stride = 1  # type: ignore[assignment]
    assert conv(x).shape == (2, 32, 6, 6)
    assert "four pairs" in event_driven(nn.Sequential(conv)).left_alone["0"]
    assert EventConv2d(16, 16, 3, padding=20000, dilation=20000)(x[:1]).shape == (1, 16, 8, 8)
    assert not ran


def test_hooks_that_give_back_another_dtype():
    conv, x = EventConv2d(16, 64, 3, bias=False), spikes(2, 16, 8, 8)
    want = torch.autograd.grad(conv(x).sum(), conv.weight)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.double()):
        y = conv(x)
    with pytest.raises(RuntimeError):  # PyTorch's own backward says that the dtypes differ
        y.sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = conv(x)
    assert torch.equal(torch.autograd.grad(y.sum(), conv.weight)[0], want)


def test_long_sums_round_as_pytorchs():
    conv, x = EventConv2d(16, 64, 3, bias=False), spikes(128, 16, 32, 32, rate=0.19)
    y = conv(x)
    grad = torch.full_like(y, 0.1)
    found = torch.autograd.grad(y, conv.weight, grad)[0]
    exact = conv.weight.detach().double().requires_grad_()
    want = torch.autograd.grad(F.conv2d(x.double(), exact), exact, grad.double())[0]
    assert ((found - want).abs() / want.abs()).max() < 5e-5


# ---- networks ----
def test_a_network_in_place():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), snnfast.LIFNode(timesteps=4), nn.Conv2d(16, 32, 3, padding=1), nn.MaxPool2d(2),
        snnfast.LIFNode(timesteps=4), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, groups=2),
    )  # fmt: skip
    dense = copy.deepcopy(net)
    seen: list[Tensor] = []
    net[2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert event_driven(net).event_driven == ["2"]
    assert event_driven(net).event_driven == ["2"]  # again
    assert event_driven(nn.Sequential(type("Own", (nn.Conv2d,), {})(16, 16, 3))).left_alone == {
        "0": "Own is no Conv2d of torch, snnfast or SpikingJelly"
    }
    assert list(net.state_dict()) == list(dense.state_dict())
    assert isinstance(net[2], nn.Conv2d)
    x = torch.rand(8, 3, 12, 12) * 3
    found = []
    for each in (net, dense):
        y = each(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), tuple(each.parameters()))))
    assert len(seen) == 1
    assert seen[0].grad_fn is not None
    assert "EventConvolution" in type(seen[0].grad_fn).__name__
    for g, w in zip(*found, strict=True):
        assert torch.allclose(g, w, rtol=1e-4, atol=1e-5 * w.abs().max().item())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        event_driven([net])


def test_layers_with_a_step_mode(monkeypatch):
    ran = calls(monkeypatch)
    net = nn.Sequential(layer.Conv2d(16, 16, 3, step_mode="m"))
    plain = copy.deepcopy(net)
    assert event_driven(net).event_driven == ["0"]
    x = spikes(4 * 2, 16, 6, 6).unflatten(0, (4, 2))
    assert torch.allclose(net(x), plain(x), atol=1e-6)
    assert ran == ["event_convolve"]
    again = pickle.loads(pickle.dumps(net))
    assert torch.equal(again(x), net(x))
    assert again[0].step_mode == "m"


def test_packed_spikes_and_checkpoints_give_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    conv, x = EventConv2d(16, 32, 3, padding=1), spikes(8, 16, 12, 12)
    want = torch.autograd.grad(conv(x).square().sum(), conv.weight)[0]
    with snnfast.packed_spikes():
        y = conv(x)
    assert torch.equal(torch.autograd.grad(y.square().sum(), conv.weight)[0], want)
    y = checkpoint(conv, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.square().sum(), conv.weight)[0], want)


def test_fuse_before_and_after():
    for first, second in ((snnfast.fuse, event_driven), (event_driven, snnfast.fuse)):
        torch.manual_seed(0)
        net = snnfast.models.resnet18(timesteps=2, width=16)
        first(net)
        second(net)
        assert isinstance(net.get_submodule(event_driven(net).event_driven[0]), EventConv2d)
        net(torch.rand(2, 3, 32, 32)).sum().backward()
        assert all(p.grad is not None for p in net.parameters())


# ---- inference ----
def test_optimized_networks_keep_what_the_kernel_made_of_their_weights(monkeypatch):
    packs = []
    pack = native.pack_event_weights
    monkeypatch.setattr(native, "pack_event_weights", lambda *args: packs.append(1) or pack(*args))
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), snnfast.IFNode(timesteps=2)).eval()
    fast, report = snnfast.optimize_for_inference(net)
    assert report.event_driven == ["0"]
    assert "skip inputs of 0 on a CPU: 0" in str(report)
    x = spikes(4, 16, 8, 8)

    def output() -> Tensor:
        snnfast.functional.reset_net(fast)
        with torch.no_grad():
            y = fast[0](x)
            assert torch.allclose(y, F.conv2d(x, fast[0].weight, fast[0].bias, padding=1), atol=1e-6)
            fast(x)
        return y

    output(), output()
    assert len(packs) == 1
    with torch.no_grad():
        fast[0].weight.mul_(2)
    output()
    assert len(packs) == 2
    fast[0].bias = nn.Parameter(torch.ones(16), requires_grad=False)
    output()
    assert len(packs) == 3
    copied = pickle.loads(pickle.dumps(copy.deepcopy(fast[0])))
    assert "_kept" not in copied.__dict__
    assert torch.equal(copied(x), fast[0](x))
    with torch.inference_mode():
        made, _ = snnfast.optimize_for_inference(net)
        assert torch.equal(made[0](x), made[0](x))
    view = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), snnfast.IFNode(timesteps=2), nn.MaxPool2d(2))
    assert snnfast.optimize_for_inference(view)[0](x).view(4, -1).shape == (4, 16 * 16)
    fast[0].requires_grad_(True)  # fused optimisers write without raising the version
    packs.clear()
    output(), output()
    assert len(packs) == 4
    fast[0].requires_grad_(False)
    torch.nn.utils.vector_to_parameters(torch.zeros(16 * 16 * 9 + 16), fast[0].parameters())
    assert not fast[0](x).any()
    # Where weights are trained nothing is kept, for what writes weight.data leaves no trace.
    conv = EventConv2d(16, 16, 3)
    with torch.no_grad():
        before = conv(x)
        conv.weight.data.mul_(2)
        assert not torch.equal(conv(x), before)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, (3, 5), padding=padding, dilation=(2, 1) if padding == "same" else 1)
    events = copy.deepcopy(conv)
    assert event_driven(events).event_driven == [""]
    x = (torch.rand(3, 16, 9, 11) < 0.05).float()
    assert events._is_served(x, events.weight, events.bias)
    found = []
    for module in (conv, events):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        found.append((y, leaf.grad, module.weight.grad, module.bias.grad))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_other_convolutions_are_told_with_the_reason():
    report = event_driven(nn.Sequential(nn.Conv1d(16, 16, 3), nn.Conv2d(16, 16, 2, padding="same")))
    assert report.left_alone == {
        "0": "Conv1d is no Conv2d of torch, snnfast or SpikingJelly",
        "1": "padding='same' pads its two sides unequally here",
    }
