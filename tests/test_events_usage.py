"""Event-driven convolutions as users call them: other geometries, gradients, layouts and memory at each call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_events import calls, spikes
from torch import Tensor, nn

from snnfast import events, optimize_for_inference
from snnfast.backends import native
from snnfast.events import EventConv2d, event_driven

pytestmark = pytest.mark.skipif(native._C is None, reason="needs the compiled kernels")


def close(found: Tensor, want: Tensor) -> bool:
    return bool(torch.allclose(found.double(), want.double(), rtol=1e-4, atol=1e-5 * float(want.abs().max())))


def test_one_convolution_at_several_dilations(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = calls(monkeypatch)
    conv: Any = EventConv2d(16, 64, 3, bias=False)
    x = spikes(2, 16, 10, 10).requires_grad_()
    given, exact = (x, conv.weight), tuple(t.detach().double().requires_grad_() for t in (x, conv.weight))
    outputs, wants = [], []
    for dilation in (1, 2, 3):
        conv.dilation = conv.padding = (dilation, dilation)
        outputs.append(conv(x).square().sum())
        wants.append(F.conv2d(*exact, padding=dilation, dilation=dilation).square().sum())
    found = torch.autograd.grad(torch.stack(outputs).sum(), given)
    assert all(map(close, found, torch.autograd.grad(torch.stack(wants).sum(), exact)))
    assert ran == ["event_convolve"] * 3 + ["event_weight_gradient"] * 3


def test_many_gradients_at_once() -> None:
    conv, x = EventConv2d(16, 64, 3), spikes(2, 16, 5, 5)
    y = conv(x)
    several = torch.randn(3, *y.shape)
    found = torch.autograd.grad(y, tuple(conv.parameters()), several, is_grads_batched=True, retain_graph=True)
    for k, grad in enumerate(several):
        for g, w in zip(found, torch.autograd.grad(y, tuple(conv.parameters()), grad, retain_graph=True), strict=True):
            assert close(g[k], w)


def test_windows_that_spread_far_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = calls(monkeypatch)
    conv, x = EventConv2d(16, 64, 3, dilation=60), spikes(4, 16, 121, 121)
    y = conv(x)
    assert y.shape == (4, 64, 1, 1)
    found = torch.autograd.grad(y, conv.weight, torch.ones_like(y))[0]
    assert ran == ["event_convolve"]  # the copy of the 256 gradients would have 64 MB
    monkeypatch.setattr(events, "_FEW_COPIED", 2**40)
    want = torch.autograd.grad(conv(x), conv.weight, torch.ones_like(y))[0]
    assert ran[2:] == ["event_weight_gradient"]
    assert close(found, want)
    ran.clear()
    conv = EventConv2d(16, 32, (1, 3))
    assert conv(torch.zeros(1, 16, 1, 2**16 + 1)).shape == (1, 32, 1, 2**16 - 1)  # nor do very long rows
    assert not ran
    conv(torch.zeros(1, 16, 1, 2**16))
    assert ran == ["event_convolve"]


def _laid_out(x: Tensor) -> dict[str, Tensor]:
    last = torch.channels_last
    twice = torch.cat([x, x], 1)
    return {
        "first": x,
        "last": x.contiguous(memory_format=last),
        "slice": twice[:, : x.shape[1]],
        "slice of last": twice.contiguous(memory_format=last)[:, : x.shape[1]],
        "turned": x.transpose(0, 1).contiguous().transpose(0, 1),
    }


@pytest.mark.parametrize("size", [1, 6])
def test_outputs_lie_in_memory_as_pytorchs(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = calls(monkeypatch)
    plain, conv = nn.Conv2d(16, 32, 3, padding=1), EventConv2d(16, 32, 3, padding=1)
    for laid, x in _laid_out(spikes(3, 16, size, size)).items():
        for of_weight, weight in _laid_out(torch.randn(32, 16, 3, 3)).items():
            plain.weight = conv.weight = nn.Parameter(weight)
            assert plain(x).stride() == conv(x).stride(), (laid, of_weight)
    assert len(ran) == 25


def test_kept_weights_and_what_is_done_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = EventConv2d(16, 32, 3).requires_grad_(False), spikes(2, 16, 8, 8)
    conv.keeps_weights = True

    def check() -> None:
        assert close(conv(x), F.conv2d(x, conv.weight, conv.bias))

    check()
    conv.weight.data = conv.weight.data.transpose(2, 3)  # the same memory and version
    check()
    conv.to(torch.bfloat16)
    assert "_kept" not in conv.__dict__
    conv.float()
    check()
    assert "_kept" in conv.__dict__


def test_a_model_that_is_a_convolution_has_a_name_in_print() -> None:
    conv = nn.Conv2d(16, 32, 3)
    assert str(event_driven(conv)).endswith("left alone: 0\n  (model)")
    assert str(event_driven(nn.Conv2d(3, 32, 3))).splitlines()[1].startswith("  (model) left alone: it maps 3 channels")
    made, report = optimize_for_inference(conv)
    assert made.keeps_weights
    assert str(report).endswith("skip inputs of 0 on a CPU: (model)")
