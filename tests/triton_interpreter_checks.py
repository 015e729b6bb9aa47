"""The Triton kernels in Triton's interpreter, against the plain loop.

``test_triton_interpreter.py`` runs these in a process of their own, because TRITON_INTERPRET=1 has to be set before the
kernels are imported.
"""

from __future__ import annotations

import itertools
import struct
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from snnfast import backends, dynamics, ops
from snnfast.backends import triton as backend
from snnfast.dynamics import DECAY_INPUT, DETACH_RESET, NEURONS, SOFT_RESET, STORE_V_SEQ, Constants, Neuron
from snnfast.surrogate import SURROGATES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on Inf and NaN

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STEPS = (1, 2, 4, 7, 16, 33)  # 33: chunks of 16 and a rest of 1
SUBSETS = [subset for subset in itertools.product((False, True), repeat=3) if any(subset)]  # of the incoming gradients
ODD = 37
GUARD = 64
# What the neurons of the registry are called with: those that ignore decay_input are not called twice.
VARIANTS = [
    pytest.param(neuron, decay | soft | detach, id=f"{neuron.name}-{decay}{soft}{detach}")
    for neuron in NEURONS
    for decay in ((0,) if neuron is dynamics.IF else (0, DECAY_INPUT))
    for soft in (0, SOFT_RESET)
    for detach in (0, DETACH_RESET)
]


class Run(NamedTuple):
    s: Tensor
    v: Tensor
    v_seq: Tensor | None


def as_float32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


def constants_for(neuron: Neuron, flags: int, surrogate: int = 0, tau: float = 2.3, exact: bool = True) -> Constants:
    """Numbers that float32 must round, or, not ``exact``, rounded already: for comparison with float64."""
    v_reset = 0.0 if flags & SOFT_RESET else -0.1
    numbers = (0.7, v_reset, tau, SURROGATES[surrogate]().alpha, 0.05)
    return Constants(neuron.id, surrogate, flags, *(numbers if exact else map(as_float32, numbers)))


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """NaN, followed in memory by more of it, which nobody may touch."""
    size = torch.Size(shape).numel()
    return torch.full((size + GUARD,), float("nan"), dtype=dtype)[:size].view(shape)


def check_guard(t: Tensor | None) -> None:
    if t is None:
        return
    around = t.as_strided((t.numel() + GUARD,), (1,))
    assert around[t.numel() :].isnan().all(), "written behind the end"


def inputs(
    neuron: Neuron, T: int, N: int, dtype: torch.dtype, with_v0: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    state = dynamics.state_dtype(dtype)
    x = (torch.randn(T, N, dtype=torch.float64) * 1.5 + 0.6).to(dtype)
    v0 = torch.randn(N, dtype=torch.float64).to(state) * 0.5 if with_v0 else None
    decay = torch.tensor(0.37, dtype=state) if neuron.learnable else None
    return x, v0, decay


def run(c: Constants, x: Tensor, v0: Tensor | None, decay: Tensor | None) -> Run:
    state = dynamics.state_dtype(x.dtype)
    s, v = poisoned(*x.shape, dtype=x.dtype), poisoned(*x.shape[1:], dtype=state)
    v_seq = poisoned(*x.shape, dtype=state) if c.flags & STORE_V_SEQ else None
    backend.forward(c, x, v0, decay, s, v, v_seq)
    for t in (s, v, v_seq):
        check_guard(t)
    return Run(s, v, v_seq)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert torch.equal(got.isnan(), expected.isnan())
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
    assert torch.equal(got.nan_to_num(0.0).view(integer), expected.nan_to_num(0.0).view(integer))


def check_forward(c: Constants, x: Tensor, v0: Tensor | None, decay: Tensor | None) -> Run:
    got = run(c, x, v0, decay)
    expected = ops._reference(x, v0, decay, c)
    assert_same_bits(got.s, expected[0])
    assert_same_bits(got.v, expected[1])
    if c.flags & STORE_V_SEQ:
        assert_same_bits(got.v_seq, expected[2])
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("neuron", "flags"), [v for v in VARIANTS if not v.values[1] & DETACH_RESET])
def test_forward_has_the_bits_of_the_loop(neuron: Neuron, flags: int, dtype: torch.dtype) -> None:
    fired = 0.0
    for i, T in enumerate(STEPS):
        for with_v0 in (False, True):
            x, v0, decay = inputs(neuron, T, ODD, dtype, with_v0)
            tau = 2.0 if (i + with_v0) % 2 else 2.3  # a power of two is multiplied by its inverse
            store = STORE_V_SEQ if with_v0 else 0
            got = check_forward(constants_for(neuron, flags | store, tau=tau), x, v0, decay)
            fired += got.s.double().mean().item() / (2 * len(STEPS))
    assert 0.1 < fired < 0.9, "the data should make some neurons fire and some not"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("neuron", "flags"), [v for v in VARIANTS if not v.values[1] & DETACH_RESET])
def test_special_values(neuron: Neuron, flags: int, dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 0.7, 1e-7, 6e4, -6e4], dtype=dtype)
    x = torch.cartesian_prod(special, special).T.contiguous()
    v0 = special.to(dynamics.state_dtype(dtype)).repeat(len(special))
    decay = inputs(neuron, 1, 1, dtype, False)[2]
    for tau in (2.0, 2.3):
        check_forward(constants_for(neuron, flags | STORE_V_SEQ, tau=tau), x, v0, decay)


@pytest.mark.parametrize("N", [1, 16, 1025, 2048])
def test_sizes_around_the_block(N: int) -> None:
    c = constants_for(dynamics.LIF, DECAY_INPUT)
    for T in (3, 34):
        check_forward(c, *inputs(dynamics.LIF, T, N, torch.float32, True))
        check_backward(dynamics.LIF, DECAY_INPUT, 1, T, N, torch.float32, (True, True, False), True)


# Relative to the largest gradient; a half-precision result is rounded once, at the end.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def check_backward(
    neuron: Neuron,
    flags: int,
    surrogate: int,
    T: int,
    N: int,
    dtype: torch.dtype,
    given: tuple[bool, bool, bool],
    with_v0: bool,
) -> None:
    """Against autograd through the plain loop in float64."""
    c = constants_for(neuron, flags | STORE_V_SEQ, surrogate, exact=dtype == torch.float64)
    state = dynamics.state_dtype(dtype)
    x, v0, decay = inputs(neuron, T, N, dtype, with_v0)
    shapes = ((T, N, dtype), (N, state), (T, N, state))
    grads = [torch.randn(s[:-1]).to(s[-1]) if g else None for s, g in zip(shapes, given, strict=True)]

    grad_x = poisoned(T, N, dtype=dtype)
    grad_v0 = poisoned(N, dtype=state) if with_v0 else None
    grad_decay = poisoned(1, dtype=state)[0] if decay is not None else None
    backend.backward(c, *grads, x, v0, decay, grad_x, grad_v0, grad_decay)
    for t in (grad_x, grad_v0, grad_decay):
        check_guard(t)

    leaves = [None if t is None else t.double().requires_grad_() for t in (x, v0, decay)]
    outputs = ops._reference(*leaves, c)
    assert torch.equal(outputs[0].to(dtype), ops._reference(x, v0, decay, c)[0]), "float64 fires at other times here"
    torch.autograd.backward(
        [o for o, g in zip(outputs, grads, strict=True) if g is not None], [g.double() for g in grads if g is not None]
    )
    for name, got, leaf in zip(("x", "v0", "decay"), (grad_x, grad_v0, grad_decay), leaves, strict=True):
        if leaf is not None:
            truth = leaf.grad
            rtol = TOLERANCE[dtype] if name == "x" else TOLERANCE[state]
            # The decay's is a sum in which terms of the size of grad_x cancel.
            scale = leaves[0].grad.abs().sum() if name == "decay" else truth.abs().max()
            atol = rtol * scale.item()
            torch.testing.assert_close(
                got.double(), truth, rtol=rtol, atol=atol, msg=lambda m, n=name: f"grad_{n}: {m}"
            )


@pytest.mark.parametrize(("neuron", "flags"), VARIANTS)
def test_gradients(neuron: Neuron, flags: int) -> None:
    """Every surrogate with every short T and one with each long; incoming gradients and initial states take turns."""
    turn = itertools.count(3 * flags + neuron.id)
    for T in STEPS:
        for surrogate in range(8) if T < 8 else (next(turn) % 8,):
            i = next(turn)
            check_backward(neuron, flags, surrogate, T, ODD, torch.float32, SUBSETS[i % 7], bool(i // 7 % 2))


@pytest.mark.parametrize("given", SUBSETS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_in_every_dtype(dtype: torch.dtype, given: tuple[bool, bool, bool]) -> None:
    for surrogate in range(len(SURROGATES)):
        neuron = NEURONS[(surrogate + sum(given)) % len(NEURONS)]
        flags = (0, DECAY_INPUT | SOFT_RESET, DETACH_RESET | DECAY_INPUT)[surrogate % 3]
        check_backward(neuron, flags, surrogate, 3, ODD, dtype, given, True)


def test_decay_of_zero_has_no_gradient() -> None:
    x, _, _ = inputs(dynamics.PARAMETRIC_LIF, 4, ODD, torch.float32, False)
    decay, grad_decay = torch.zeros(()), torch.full((), float("nan"))
    c = constants_for(dynamics.PARAMETRIC_LIF, DECAY_INPUT)
    backend.backward(c, x, None, None, x, None, decay, torch.empty_like(x), None, grad_decay)
    assert grad_decay == 0


def test_through_the_ops() -> None:
    """The whole way: chosen by name, autograd around the op, channels_last input and another layout of the gradient."""
    assert backends.choose("triton", torch.device("cpu")) == backends.TRITON
    assert "interpreted" in backend.served()
    c = constants_for(dynamics.LIF, DECAY_INPUT)
    x = torch.randn(4, 2, 3, 5, 5).transpose(2, 4).contiguous().transpose(2, 4).requires_grad_()
    weight = torch.randn(x.shape)
    s, v, _ = ops.multi_step(x, None, None, c, backends.TRITON)
    expected = ops._reference(x, None, None, c)
    assert torch.equal(s, expected[0])
    assert torch.equal(v, expected[1])
    assert s.stride() == x.stride()
    (got,) = torch.autograd.grad((s * weight).sum() + v.sum(), x)
    (truth,) = torch.autograd.grad((expected[0] * weight).sum() + expected[1].sum(), x)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)
