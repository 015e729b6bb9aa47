"""Batch norm and neuron in one by Triton's interpreter, against plain PyTorch: see triton_interpreter_checks.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from snnfast import dynamics, ops
from snnfast.backends import triton_batch_norm as backend
from snnfast.dynamics import DECAY_INPUT, DETACH_RESET, SOFT_RESET, STRICT, Constants, Inputs, Neuron
from snnfast.fused.ops import Connect, connected
from snnfast.surrogate import SURROGATES

NEURONS = [n for n in dynamics.NEURONS if not n.own]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLAGS = (DECAY_INPUT, 0, DECAY_INPUT | SOFT_RESET, DETACH_RESET | STRICT)
# Channels-first: columns of one channel, and of several; one channel; channels-last; a linear layer's output.
SHAPES = [
    ((3, 4, 8, 8), False), ((2, 5, 5, 3), False), ((2, 3, 2, 2), False), ((1, 1, 20, 20), False),
    ((3, 6, 5, 5), True), ((2, 160, 3, 2), True), ((9, 24), False), ((40, 3), False),
]  # fmt: skip


def laid_out(t: Tensor, last: bool) -> Tensor:
    """``t`` ``[T, B, C, *]`` with the channels last in memory."""
    return t.movedim(2, -1).contiguous().movedim(-1, 2) if last else t.contiguous()


def nan_like(t: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(t, dtype=dtype).fill_(float("nan"))


def constants_for(neuron: Neuron, turn: int) -> Constants:
    flags, kind = FLAGS[turn % len(FLAGS)], turn % len(SURROGATES)
    v_reset = 0.0 if flags & SOFT_RESET else 0.125
    tau = (2.0, 2.5)[turn % 2]
    return Constants(neuron.id, kind, flags, 0.75, v_reset, tau, SURROGATES[kind]().alpha, 1.25, 0.0, 0.0625)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """``[G, C]`` so that it broadcasts over ``x``."""
    return values.reshape(values.shape[0], 1, -1, *(1,) * (x.dim() - 3))


def over(x: Tensor, groups: int) -> list[int]:
    return [d for d in range(x.dim()) if d != 2 and not (groups > 1 and d == 0)]


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    want = want.double()
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-9)
    assert error <= tolerance, float(error)


class Case:
    """A call: what the kernels get, and what plain PyTorch makes of it."""

    def __init__(
        self, neuron: Neuron, dtype: torch.dtype, shape: tuple[int, ...], last: bool, turn: int, connect: Connect,
        groups: int,
    ) -> None:  # fmt: skip
        self.c, self.connect, self.groups = constants_for(neuron, turn), connect, groups
        self.dtype, self.state = dtype, dynamics.state_dtype(dtype)
        like = laid_out(torch.empty(shape), last)

        def random(scale: float = 1.0, mean: float = 0.0, of: Tensor = like) -> Tensor:
            return torch.empty_like(of).copy_(torch.randn(of.shape) * scale + mean)

        self.x = random(1.7, 0.5).to(dtype)
        channels = shape[2]
        self.scale = (torch.rand(groups, channels) + 0.5).to(self.state)
        self.shift = (torch.randn(groups, channels) * 0.5).to(self.state)
        self.centre = (torch.randn(groups, channels) * 0.5 + 0.5).to(self.state)
        self.v0 = random(0.4, of=like[0]).to(self.state) if turn % 2 else None
        self.decay = torch.tensor(0.375, dtype=self.state) if neuron.learnable else None
        self.skip = None if connect == Connect.NONE else (random() > 0.3).to(dtype)
        self.grad_s = random().to(dtype) if turn % 5 else None
        self.grad_v = random(of=like[0]).to(self.state) if turn % 3 else None

    def charging(self, dtype: torch.dtype) -> Tensor:
        """What the neuron gets, as it is written."""
        scale, shift = (per_channel(t.to(dtype), self.x) for t in (self.scale, self.shift))
        y = self.x.to(dtype) * scale + shift
        return y + self.skip.to(dtype) if self.connect == Connect.CHARGE and self.skip is not None else y

    def forward(self) -> None:
        s, v = nan_like(self.x, self.dtype), nan_like(self.x[0], self.state)
        backend.batch_norm_forward(
            self.c, self.x, self.v0, self.decay, self.scale, self.shift, self.skip, self.connect, s, v
        )
        want, want_v, *_ = ops._reference(Inputs(self.charging(self.state), self.v0, None, self.decay), self.c)
        self.rate = want.mean().item()
        skip = None if self.skip is None else self.skip.to(self.state)
        assert torch.equal(s, connected(want, skip, self.connect).to(self.dtype))
        assert torch.equal(v, want_v)

    def backward(self, scaled: bool) -> None:
        grad_x = nan_like(self.x, self.dtype)
        grad_v0 = None if self.v0 is None else nan_like(self.x[0], self.state)
        wanted = self.connect not in (Connect.NONE, Connect.ADD)
        grad_skip = nan_like(self.x, self.dtype) if wanted else None
        sums = torch.full((self.groups, self.x.shape[2], 2), float("nan"), dtype=torch.float64)
        skip = None if self.connect == Connect.ADD else self.skip
        grad_decay = backend.batch_norm_backward(
            self.c, self.grad_s, self.grad_v, self.x, self.v0, self.decay, self.scale, self.shift, self.centre,
            scaled, skip, self.connect, grad_x, grad_v0, sums, grad_skip,
        )  # fmt: skip
        # Autograd through the loop in float64, from the state's own normalised input.
        y = self.charging(self.state).double().requires_grad_()
        v0 = None if self.v0 is None else self.v0.double().requires_grad_()
        decay = None if self.decay is None else self.decay.double().requires_grad_()
        other = None if self.skip is None else self.skip.double().requires_grad_()
        s, v, *_ = ops._reference(Inputs(y, v0, None, decay), self.c)
        out = connected(s, other, self.connect)
        loss: Any = 0.0
        for t, grad in ((out, self.grad_s), (v, self.grad_v)):
            if grad is not None:
                loss = loss + (t * grad.double()).sum()
        loss.backward()
        g = y.grad
        assert g is not None
        rounding = torch.finfo(self.dtype).eps
        exact = 1e-11 if self.dtype == torch.float64 else 1e-5
        scale = per_channel(self.scale.double(), self.x)
        assert_close(grad_x, g * scale if scaled else g, max(rounding, exact))
        away = self.x.double() - per_channel(self.centre.double(), self.x)
        for k, terms in enumerate((g, g * away)):
            size = terms.abs().sum(over(self.x, self.groups)).max().item()
            error = (sums[..., k].flatten() - terms.sum(over(self.x, self.groups)).flatten()).abs().max()
            assert error <= (exact if self.groups == 1 else max(rounding, exact)) * size, (k, error, size)
        for got, leaf in ((grad_v0, v0), (grad_decay, decay)):
            if leaf is not None:
                assert isinstance(got, Tensor)
                size = g.abs().sum() if got.dim() == 0 else g.abs().max()
                assert ((got.double() - leaf.grad).abs() <= 10 * exact * size).all()
        if grad_skip is not None:
            want = g if self.connect == Connect.CHARGE else None if other is None else other.grad
            assert want is not None
            assert_close(grad_skip, want, max(rounding, exact))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)
def test_forward_and_backward(neuron: Neuron, dtype: torch.dtype) -> None:
    rates = []
    for turn, (shape, last) in enumerate(SHAPES[DTYPES.index(dtype) % 2 :: 2], 4 * neuron.id + 1):
        case = Case(neuron, dtype, ((4, 1, 3, 7)[turn % 4], *shape), last, turn, Connect.NONE, 1)
        case.forward()
        if case.grad_s is not None or case.grad_v is not None:
            case.backward(scaled=not turn % 2)
        rates.append(case.rate)
    assert 0.05 < sum(rates) / len(rates) < 0.95


@pytest.mark.parametrize("connect", [c for c in Connect if c], ids=lambda c: c.name)
def test_residual_connections(connect: Connect) -> None:
    for turn, (neuron, dtype) in enumerate(itertools.product(NEURONS, DTYPES[:2]), 1):
        shape, last = SHAPES[turn % len(SHAPES)]
        case = Case(neuron, dtype, (3, *shape), last, 1 + turn % 4, connect, 1)
        case.forward()
        case.backward(scaled=not turn % 2)


@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)
def test_constants_of_each_step(neuron: Neuron) -> None:
    for turn, (shape, last) in enumerate((SHAPES[0], SHAPES[4], SHAPES[1]), 1):
        case = Case(neuron, DTYPES[turn // 3], (4, *shape), last, turn, Connect.CHARGE if turn % 2 else Connect.NONE, 4)
        case.forward()
        case.backward(scaled=False)


@pytest.mark.parametrize("connect", [Connect.NONE, Connect.CHARGE, Connect.IAND], ids=lambda c: c.name)
def test_long_time(connect: Connect) -> None:
    """Two chunks of 16 steps and a rest."""
    case = Case(dynamics.PARAMETRIC_LIF, torch.float32, (34, 2, 3, 2, 2), True, 1, connect, 1)
    case.forward()
    case.backward(scaled=False)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("shape", "last"), SHAPES, ids=str)
def test_statistics(shape: tuple[int, ...], last: bool, groups: int) -> None:
    for dtype in DTYPES:
        x = laid_out(torch.randn(4, *shape) * 0.5, last).to(dtype)
        x[0, 0] += 50  # what the sums are relative to is an outlier
        first = (
            torch.empty_like(x[:groups, 0]).copy_(x[:groups, 0]).flatten(2)[..., 0] if x.dim() > 3 else x[:groups, 0]
        )
        sums = torch.full((groups, shape[1], 2), float("nan"), dtype=torch.float64)
        backend.batch_norm_statistics(x, first.double().contiguous(), sums)
        away = x.double() - per_channel(first.double(), x)
        for k, terms in enumerate((away, away * away)):
            want = terms.sum(over(x, groups)).reshape(groups, -1)
            torch.testing.assert_close(sums[..., k], want, rtol=1e-12, atol=1e-9)


def test_the_second_pass() -> None:
    for dtype, groups, (shape, last) in itertools.product(DTYPES, (1, 3), SHAPES):
        x, grad_x = (laid_out(torch.randn(3, *shape), last).to(dtype) for _ in range(2))
        state = dynamics.state_dtype(dtype)
        values = torch.randn(4, groups, shape[1]).to(state).unbind(0)
        scale, centre, slope, offset = (per_channel(t.double(), x) for t in values)
        want = grad_x.double() * scale + ((x.double() - centre) * slope + offset)
        backend.batch_norm_backward_input(x, *(t.contiguous() for t in values), grad_x)
        assert_close(grad_x, want, max(torch.finfo(dtype).eps, 1e-14))


def test_more_rows_than_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program goes down several blocks, the last of which is not whole."""
    monkeypatch.setattr(backend, "_MOST_CHUNKS", 4)
    for last in (False, True):
        case = Case(dynamics.PARAMETRIC_LIF, torch.float32, (2, 45, 3, 8, 8), last, 1, Connect.NONE, 1)
        case.forward()
        case.backward(scaled=False)
        x, sums = case.x, torch.empty(1, 3, 2, dtype=torch.float64)
        backend.batch_norm_statistics(x, torch.zeros(1, 3, dtype=torch.float64), sums)
        torch.testing.assert_close(sums[0, :, 0], x.double().sum((0, 1, 3, 4)), rtol=1e-12, atol=1e-9)
