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
from snnfast.dynamics import (
    CLIPPED,
    DECAY_INPUT,
    DETACH_RESET,
    MULTI_SPIKE,
    NEURONS,
    NO_RESET,
    SOFT_RESET,
    STORE_V_SEQ,
    STRICT,
    Constants,
    Inputs,
    Neuron,
)
from snnfast.surrogate import SURROGATES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on Inf and NaN

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STEPS = (1, 2, 4, 7, 16, 33)  # 33: chunks of 16 and a rest of 1
ODD = 37
GUARD = 64
# Which of the gradients of s, v, i and v_seq come in.
SUBSETS = [subset for subset in itertools.product((False, True), repeat=4) if any(subset[:2]) or subset[3]]


def variants(neuron: Neuron) -> list[int]:
    """The flags that make a difference to a neuron, but for the reset's."""
    if neuron is dynamics.IF:
        return [0, STRICT]
    if neuron in (dynamics.LIF, dynamics.PARAMETRIC_LIF):
        return [STRICT, DECAY_INPUT]
    if neuron is dynamics.EXPONENTIAL_LIF:
        return [CLIPPED, DECAY_INPUT, MULTI_SPIKE]
    if neuron in (dynamics.BOX_LIF, dynamics.CURRENT_LIF):
        return [STRICT]
    return [STRICT, STRICT | NO_RESET]


FORWARD = [
    pytest.param(neuron, flags | soft, id=f"{neuron.name}-{flags}-{soft}")
    for neuron in NEURONS
    for flags in variants(neuron)
    for soft in ((0,) if flags & NO_RESET else (0, SOFT_RESET))
]
BACKWARD = [
    pytest.param(neuron, flags | detach, id=f"{neuron.name}-{flags | detach}")
    for neuron, flags in (v.values for v in FORWARD)
    for detach in ((0,) if neuron.id >= dynamics.LEAKY.id else (0, DETACH_RESET))
]


class Run(NamedTuple):
    s: Tensor
    v: Tensor
    i: Tensor | None
    v_seq: Tensor | None


def as_float32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


def constants_for(neuron: Neuron, flags: int, surrogate: int = 0, tau: float = 2.3, exact: bool = True) -> Constants:
    """Numbers that float32 must round, or, not ``exact``, rounded already: for comparison with float64."""
    v_reset = 0.0 if flags & SOFT_RESET else -0.1
    numbers = (0.7, v_reset, tau, SURROGATES[surrogate]().alpha, 1.3, 0.15, 0.05)
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


def inputs(neuron: Neuron, T: int, N: int, dtype: torch.dtype, with_state: bool, each: int = 0b101) -> Inputs:
    """Random ones; ``each`` has a bit for each of the own parameters that has one value for each neuron."""
    state = dynamics.state_dtype(dtype)
    scale = 3.0 if neuron is dynamics.EXPONENTIAL_LIF else 1.5
    own = {}
    for k, name in enumerate(neuron.own):
        spread = torch.rand(N if each >> k & 1 else (), dtype=torch.float64) * 0.3
        own[name] = ({"threshold": 0.6, "beta": 0.55, "current_decay": 0.4}[name] + spread).to(state)
    return Inputs(
        (torch.randn(T, N, dtype=torch.float64) * scale + 0.6).to(dtype),
        v0=torch.randn(N, dtype=torch.float64).to(state) * 0.5 if with_state else None,
        i0=torch.randn(N, dtype=torch.float64).to(state) * 0.5 if with_state and len(neuron.states) > 1 else None,
        decay=torch.tensor(0.37, dtype=state) if neuron.learnable else None,
        **own,
    )


def run(c: Constants, given: Inputs) -> Run:
    x = given.x
    state = dynamics.state_dtype(x.dtype)
    s, v = poisoned(*x.shape, dtype=x.dtype), poisoned(*x.shape[1:], dtype=state)
    i = poisoned(*x.shape[1:], dtype=state) if len(NEURONS[c.neuron].states) > 1 else None
    v_seq = poisoned(*x.shape, dtype=state) if c.flags & STORE_V_SEQ else None
    backend.forward(c, given, s, v, i, v_seq)
    for t in (s, v, i, v_seq):
        check_guard(t)
    return Run(s, v, i, v_seq)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert torch.equal(got.isnan(), expected.isnan())
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
    assert torch.equal(got.nan_to_num(0.0).view(integer), expected.nan_to_num(0.0).view(integer))


def check_forward(c: Constants, given: Inputs) -> Run:
    got = run(c, given)
    for g, e in zip(got, ops._reference(given, c), strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            assert_same_bits(g, e)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("neuron", "flags"), FORWARD)
def test_forward_has_the_bits_of_the_loop(neuron: Neuron, flags: int, dtype: torch.dtype) -> None:
    fired = []
    for turn, T in list(enumerate(STEPS))[(neuron.id + DTYPES.index(dtype)) % 2 :: 2]:
        with_state = bool(turn // 2 % 2)
        given = inputs(neuron, T, ODD, dtype, with_state, each=turn)
        tau = 2.3 if turn < 4 else 2.0  # a power of two is multiplied by its inverse
        got = check_forward(constants_for(neuron, flags | STORE_V_SEQ * with_state, tau=tau), given)
        fired.append(got.s.double().clamp(max=1.0).mean().item())
    assert 0.1 < sum(fired) / len(fired) < 0.9, "the data should make some neurons fire and some not"


def test_strict_is_strict() -> None:
    """A potential of exactly the threshold, which random numbers do not meet, forward and backward."""
    one = torch.ones(())
    for neuron, strict in itertools.product(NEURONS, (0, STRICT)):
        x = torch.tensor([[0.5, 1.0, 1.5]] * 2, requires_grad=True)
        given = Inputs(x, **dict.fromkeys(neuron.own, one), decay=one if neuron.learnable else None)
        c = constants_for(neuron, strict)._replace(threshold=1.0, tau=1.0, v_reset=0.0, v_leak=0.0, v_init=0.0)
        assert run(c, given).s[0].tolist() == [0.0, 0.0 if strict else 1.0, 1.0], neuron.name
        check_forward(c, given)
        both = ops.multi_step(given, c, backends.TRITON), ops._reference(given, c)
        got, expected = (torch.autograd.grad(s.sum() + v.sum(), x)[0] for s, v, *_ in both)
        torch.testing.assert_close(got, expected, msg=lambda m, n=neuron: f"{n.name}: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("neuron", "flags"), FORWARD)
def test_special_values(neuron: Neuron, flags: int, dtype: torch.dtype) -> None:
    large = 60.0 if flags & MULTI_SPIKE else 6e4  # the interpreter truncates bfloat16: counts should fit into it
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 0.7, 1e-7, large, -large]
    special = torch.tensor(special, dtype=dtype)
    x = torch.cartesian_prod(special, special).T.contiguous()
    given = inputs(neuron, 1, len(x.T), dtype, True)
    v0 = special.to(dynamics.state_dtype(dtype)).repeat(len(special))
    given = given._replace(x=x, v0=v0, i0=None if given.i0 is None else v0.roll(1))
    for tau in (2.0, 2.3) if neuron is dynamics.LIF else (2.0,):
        check_forward(constants_for(neuron, flags | STORE_V_SEQ, tau=tau), given)


@pytest.mark.parametrize("neuron", [dynamics.LIF, dynamics.SYNAPTIC], ids=lambda n: n.name)
def test_sizes_around_the_block(neuron: Neuron) -> None:
    for T in (3, 34):
        block = backend.block_size(neuron.id, T, torch.float32)
        for N in (1, 16, block, block + 1):
            check_forward(constants_for(neuron, DECAY_INPUT), inputs(neuron, T, N, torch.float32, True))
            check_backward(neuron, DECAY_INPUT, 1, T, N, torch.float32, (True, True, True, False), True)


# Relative to the largest gradient; a half-precision result is rounded once, at the end.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def check_backward(
    neuron: Neuron,
    flags: int,
    surrogate: int,
    T: int,
    N: int,
    dtype: torch.dtype,
    subset: tuple[bool, bool, bool, bool],
    with_state: bool,
    each: int = 0b011,
    own_gradients: bool = True,
) -> None:
    """Against autograd through the plain loop in float64, with one parameter for each neuron."""
    c = constants_for(neuron, flags | STORE_V_SEQ, surrogate, exact=dtype == torch.float64)
    state = dynamics.state_dtype(dtype)
    given = inputs(neuron, T, N, dtype, with_state, each)
    leaves = given._replace(**{name: getattr(given, name).expand(N) for name in neuron.own})
    leaves = Inputs._make(None if t is None else t.double().clone().requires_grad_() for t in leaves)
    outputs = ops._reference(leaves, c)
    assert torch.equal(outputs[0].to(dtype), ops._reference(given, c)[0]), "float64 fires at other times here"

    grads = [
        torch.randn(o.shape).to(dtype if k == 0 else state) if wanted and o is not None else None
        for k, (o, wanted) in enumerate(zip(outputs, subset, strict=True))
    ]
    results = [poisoned(T, N, dtype=dtype)]
    for name, t in zip(Inputs._fields[1:], given[1:], strict=True):
        wanted = t is not None and (own_gradients or name not in neuron.own)
        results.append(poisoned(*(() if name == "decay" else (N,)), dtype=state) if wanted else None)
    backend.backward(c, grads, given, *results)
    torch.autograd.backward(
        [o for o, g in zip(outputs, grads, strict=True) if g is not None], [g.double() for g in grads if g is not None]
    )
    for name, got, leaf in zip(Inputs._fields, results, leaves, strict=True):
        if got is None:
            continue
        check_guard(got)
        truth = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        rtol = TOLERANCE[dtype] if name == "x" else TOLERANCE[state]
        # A parameter's is a sum in which terms of the size of grad_x cancel.
        scale = leaves.x.grad.abs()
        scale = scale.sum() if name == "decay" else scale.sum(0).max() if name in neuron.own else truth.abs().max()
        torch.testing.assert_close(
            got.double(), truth, rtol=rtol, atol=rtol * scale.item(), msg=lambda m, n=name: f"grad_{n}: {m}"
        )


@pytest.mark.parametrize(("neuron", "flags"), BACKWARD)
def test_gradients(neuron: Neuron, flags: int) -> None:
    """Surrogates, incoming and wanted gradients, initial states and kinds of parameters take turns."""
    start = 3 * flags + neuron.id
    for turn, T in enumerate(STEPS[start // 2 % 2 :: 2], start):
        subset = SUBSETS[turn % len(SUBSETS)]
        check_backward(
            neuron, flags, turn % 8, T, ODD, torch.float32, subset, bool(turn // 2 % 2), turn % 8, bool(turn % 5)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("surrogate", range(len(SURROGATES)), ids=lambda k: SURROGATES[k].__name__)
def test_gradients_of_every_surrogate_in_every_dtype(surrogate: int, dtype: torch.dtype) -> None:
    for turn, subset in enumerate(SUBSETS[(surrogate + DTYPES.index(dtype)) % 2 :: 2], surrogate):
        neuron = NEURONS[(surrogate + turn) % len(NEURONS)]
        flags = (0, DECAY_INPUT | SOFT_RESET, DETACH_RESET | DECAY_INPUT, STRICT)[turn % 4]
        check_backward(neuron, flags, surrogate, 3, ODD, dtype, subset, True)


def test_decay_of_zero_has_no_gradient() -> None:
    given = inputs(dynamics.PARAMETRIC_LIF, 4, ODD, torch.float32, False)._replace(decay=torch.zeros(()))
    grad_decay = torch.full((), float("nan"))
    c = constants_for(dynamics.PARAMETRIC_LIF, DECAY_INPUT)
    grads = given.x, None, None, None
    backend.backward(c, grads, given, torch.empty_like(given.x), None, None, grad_decay, None, None, None)
    assert grad_decay == 0


@pytest.mark.parametrize("neuron", [dynamics.LIF, dynamics.CURRENT_LIF], ids=lambda n: n.name)
def test_through_the_ops(neuron: Neuron) -> None:
    """The whole way: chosen by name, autograd around the op, channels_last input and another layout of the gradient."""
    assert backends.choose("triton", torch.device("cpu")) == backends.TRITON
    assert "interpreted" in backend.served() or not backend._interpreted()
    c = constants_for(neuron, DECAY_INPUT | STRICT)
    x = torch.randn(4, 2, 3, 5, 5).transpose(2, 4).contiguous().transpose(2, 4).requires_grad_()
    values = {"threshold": torch.tensor(0.7), "beta": torch.rand(5), "current_decay": torch.rand(3, 5, 5) * 0.5}
    own = {name: values[name].requires_grad_() for name in neuron.own}
    given = Inputs(x, **own)
    weight = torch.randn(x.shape)
    found = []
    for s, v, i, _ in (ops.multi_step(given, c, backends.TRITON), ops._reference(given, c)):
        loss = (s * weight).sum() + (v * weight[1]).sum() + (0.0 if i is None else (i * weight[2]).sum())
        found.append([s, v, *([] if i is None else [i]), *torch.autograd.grad(loss, [x, *own.values()])])
    assert found[0][0].stride() == x.stride()
    for k, (got, expected) in enumerate(zip(*found, strict=True)):
        if k < 1 + len(neuron.states):
            assert torch.equal(got, expected)
        else:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
