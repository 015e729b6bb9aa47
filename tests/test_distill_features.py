"""The kernel of feature distillation against torch's operations in float64, and who gets torch's own instead."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from snnfast.backends import native
from snnfast.distill import features
from snnfast.distill.features import convolved_mse, time_mean
from snnfast.distill.losses import FeatureAdapter

_C = native._C
pytestmark = pytest.mark.skipif(_C is None, reason="needs the compiled kernels")


def pair(T=4, B=5, C=6, C_teacher=9, H=3, W=5) -> tuple[Tensor, Tensor, nn.Conv2d]:
    student = (torch.rand(T, B, C, H, W) < 0.3).float().requires_grad_()
    return student, torch.randn(B, C_teacher, H, W), nn.Conv2d(C, C_teacher, 1)


def composed(student: Tensor, teacher: Tensor, convolution: nn.Conv2d) -> Tensor:
    return F.mse_loss(convolution(time_mean(student)), teacher)


def gradients(loss: Tensor, *inputs: Tensor, **kwargs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(3 * loss, inputs, **kwargs)


def added_up(student: Tensor, teacher: Tensor, convolution: nn.Conv2d) -> tuple[Tensor, ...]:
    """What the loss and its gradients are sums of, by magnitude: where these cancel, their roundings stay."""
    weight, bias = (p.detach().abs().requires_grad_() for p in convolution.parameters())
    features = F.conv2d(time_mean(student), weight, bias)
    difference = (features + teacher.abs()).detach()
    loss = 2 * (features * difference).mean()
    return ((2 * difference * difference).mean(), *gradients(loss, student, weight, bias))


def check(student: Tensor, teacher: Tensor, convolution: nn.Conv2d) -> None:
    """Against float64, every number to a few roundings of the largest and of what was added up."""
    assert features._is_served(student, teacher, convolution)
    exact = nn.Conv2d(convolution.in_channels, convolution.out_channels, 1).double()
    exact.load_state_dict(convolution.state_dict())
    student64 = student.detach().double().requires_grad_()
    want = composed(student64, teacher.double(), exact)
    got = convolved_mse(student, teacher, convolution)
    inputs, inputs64 = (student, *convolution.parameters()), (student64, *exact.parameters())
    found, wanted = (got, *gradients(got, *inputs)), (want, *gradients(want, *inputs64))
    terms = added_up(student64, teacher.double(), exact)
    for g, w, t in zip(found, wanted, terms, strict=True):
        assert g.shape == w.shape
        assert (g.double() - w).abs().max() <= 2e-7 * w.abs().max() + 2**-22 * t.max()
    with torch.no_grad():
        assert torch.equal(convolved_mse(student, teacher, convolution), got)


@pytest.mark.parametrize("name", _C.cpu_sets() if _C else [])
@pytest.mark.parametrize(
    "shape",
    [(4, 33, 32, 64, 7, 7), (1, 3, 5, 7, 1, 1), (2, 2, 17, 3, 9, 15), (3, 1, 70, 130, 8, 8), (2, 20, 1, 1, 2, 33)],
)
def test_every_instruction_set_gives_the_loss_and_its_gradients(name, shape):
    before = _C.cpu_set()
    _C.set_cpu_set(name)
    try:
        check(*pair(*shape))
    finally:
        _C.set_cpu_set(before)


@settings(max_examples=40)
@given(st.tuples(*(st.integers(1, most) for most in (5, 20, 40, 40, 10, 10))))
def test_any_shape(shape):
    torch.manual_seed(sum(shape))
    check(*pair(*shape))


def test_the_bits_do_not_depend_on_the_threads(keeps_threads):
    student, teacher, convolution = pair(2, 40, 24, 33, 9, 9)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss = convolved_mse(student, teacher, convolution)
        found.append((loss, *gradients(loss, student, *convolution.parameters())))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_gradients_can_be_differentiated_again():
    student, teacher, convolution = pair()
    inputs = (student, *convolution.parameters())

    def twice(loss: Tensor) -> tuple[Tensor, ...]:
        first = gradients(loss, *inputs, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first) + loss, inputs)

    fused, plain = convolved_mse(student, teacher, convolution), composed(student, teacher, convolution)
    for got, want in zip(twice(fused), twice(plain), strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-7)


def test_what_wants_no_gradient_gets_none():
    student, teacher, convolution = pair()
    convolution.requires_grad_(False)
    loss = convolved_mse(student, teacher, convolution)
    (got,) = gradients(loss, student, create_graph=True)
    (want,) = gradients(composed(student, teacher, convolution), student)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-8)
    assert not convolved_mse(student.detach(), teacher, convolution).requires_grad
    convolution.requires_grad_(True)
    convolved_mse(student.detach(), teacher, convolution).backward()
    assert convolution.weight.grad is not None


@pytest.mark.parametrize(
    "change",
    ["float64", "strides", "teacher", "channels", "hook", "forward", "subclass", "wide", "meta", "autocast", "empty"],
)
def test_torch_serves_the_rest(change, monkeypatch):
    student, teacher, convolution = pair()
    called = []
    if change == "float64":
        student, teacher, convolution = student.double(), teacher.double(), convolution.double()
    elif change == "strides":
        student = student.detach().transpose(3, 4).contiguous().transpose(3, 4)
    elif change == "teacher":
        teacher.requires_grad_()
    elif change == "channels":
        monkeypatch.setattr(features, "_MOST_CHANNELS", 8)
    elif change == "hook":
        convolution.register_forward_hook(lambda module, inputs, output: called.append(output.shape))
    elif change == "forward":
        convolution.forward = lambda x: nn.Conv2d.forward(convolution, x) + 1
    elif change == "subclass":
        convolution.__class__ = type(
            "Shifted", (nn.Conv2d,), {"forward": lambda self, x: nn.Conv2d.forward(self, x) + 1}
        )
    elif change == "wide":
        convolution = nn.Conv2d(6, 9, 3, padding=1)
    elif change == "empty":
        student, teacher = student[:, :0], teacher[:0]
    device = torch.device("meta") if change == "meta" else contextlib.nullcontext()  # for what is made inside
    with device, torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        assert not features._is_served(student, teacher, convolution)
        got, want = convolved_mse(student, teacher, convolution), composed(student, teacher, convolution)
    assert torch.equal(got, want) or change == "empty"  # which is NaN
    assert len(called) == 2 * (change == "hook")


def test_it_compiles_in_one_piece():
    student, teacher, convolution = pair()
    compiled = torch.compile(lambda: convolved_mse(student, teacher, convolution), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(), convolved_mse(student, teacher, convolution), rtol=1e-5)


def test_an_adapter_pools_the_larger_image():
    student, teacher, _ = pair(H=6, W=10)
    adapter = FeatureAdapter("a: b", student.shape[2:], (9, 3, 5))
    teacher = torch.randn(5, 9, 3, 5)
    want = F.mse_loss(adapter.bridge(F.adaptive_avg_pool2d(student.mean(0), (3, 5))), teacher)
    assert torch.allclose(adapter(student, teacher), want, rtol=1e-5)


def test_freed_memory_is_not_read():
    student, teacher, convolution = pair()
    teacher.untyped_storage().resize_(0)
    assert not features._is_served(student, teacher, convolution)
    assert not features._is_served(student, torch._efficientzerotensor(5, 9, 3, 5), convolution)
