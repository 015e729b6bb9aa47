"""A small run of every CUDA kernel, for compute-sanitizer (``make gpu``), which is slow: in a mixed order, and no
longer than ``SECONDS``, so that there is a verdict in any case.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable

import torch
from torch import Tensor

from snnfast import dynamics, functional
from snnfast.backends import native
from snnfast.dynamics import NEURONS, Constants, Neuron
from snnfast.fused.ops import Connect, batch_norm_multi_step
from snnfast.memory import _ONES

SECONDS = 110.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FUSED = (dynamics.IF, dynamics.LIF, dynamics.PARAMETRIC_LIF)


def neuron_alone(device: str, neuron: Neuron, dtype: torch.dtype, T: int, N: int) -> None:
    x = torch.randn(T, N, device=device, dtype=torch.float64).to(dtype).requires_grad_()
    state = dynamics.state_dtype(dtype)
    states = tuple(torch.randn(N, device=device, dtype=state, requires_grad=True) for _ in neuron.states)
    decay = torch.tensor(0.4, device=device, dtype=state, requires_grad=True) if neuron.learnable else None
    own = tuple(torch.rand(N, device=device, dtype=state, requires_grad=True) for _ in neuron.own)
    given = states if len(states) > 1 else states[0]
    v_min = -0.2 if neuron is dynamics.EXPONENTIAL_LIF and T % 2 == 0 else None
    s, last, v_seq = functional.multi_step(
        neuron, x, given, decay, own, store_v_seq=True, v_min=v_min, backend="native"
    )  # fmt: skip
    last = last if isinstance(last, tuple) else (last,)
    (s.float().sum() + sum(t.sum() for t in last) + v_seq.sum()).backward()


def norm_and_neuron(
    device: str, number: int, connect: Connect, dtype: torch.dtype, last: bool, T: int, *shape: int
) -> None:
    neuron, affine, batch = FUSED[number % 3], number % 2 == 0, number % 5 != 0
    state = dynamics.state_dtype(dtype)

    def tensor(*size: int, dtype: torch.dtype = dtype, odd: bool = number % 7 == 0) -> Tensor:
        size_ = torch.Size(size).numel()
        return torch.randn(size_ + odd, device=device).to(dtype)[int(odd) :].view(size)  # at an odd address

    x = tensor(T, *shape)
    if last and len(shape) == 4:
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    skip = None if connect == Connect.NONE else tensor(*x.shape).requires_grad_()
    decay = torch.tensor(0.4, device=device, dtype=state, requires_grad=True) if neuron.learnable else None
    constants = Constants(neuron.id, 1, dynamics.DECAY_INPUT, 1.0, 0.0, 2.0, 2.0, 1.0, 0.0, 0.0)
    channels = x.shape[2]
    used = (None, None) if batch else (torch.zeros(channels, device=device), torch.ones(channels, device=device))
    norm = [torch.rand(channels, device=device, requires_grad=True) if affine else None for _ in range(2)]
    v0 = tensor(*x.shape[1:], dtype=state).requires_grad_() if affine else None
    for per_step in (False, True) if batch else (False,):
        s, v, *_ = batch_norm_multi_step(
            x.requires_grad_(), *used, *norm, v0, decay, skip, connect,
            eps=1e-5, per_step=per_step, constants=constants,
        )  # fmt: skip
        (s.float().sum() + v.sum()).backward()


def bits(dtype: torch.dtype, n: int) -> None:
    spikes = (torch.rand(n, device="cuda") < 0.3).to(dtype)
    packed = torch.zeros((n + 63) // 64 * 8 + 8, dtype=torch.uint8, device="cuda")
    one = _ONES[dtype]
    native.cuda_pack_bits(spikes, packed, one)
    native.cuda_unpack_bits(packed, one, back := torch.empty_like(spikes))
    assert torch.equal(back, spikes)


def main(device: str = "cuda", seconds: float = SECONDS) -> int:
    """How many of the cases ran."""
    cases: list[tuple[Callable[..., None], tuple[object, ...]]] = []
    for neuron, dtype, size in itertools.product(NEURONS, DTYPES, [(1, 7), (4, 4096), (8, 1000), (16, 513), (40, 64)]):
        cases.append((neuron_alone, (device, neuron, dtype, *size)))
    shapes = [(4, 2, 16, 8, 8), (4, 2, 5, 3, 3), (1, 40, 24), (19, 3, 8, 4, 4)]
    for number, (connect, dtype, last, shape) in enumerate(itertools.product(Connect, DTYPES, (False, True), shapes)):
        cases.append((norm_and_neuron, (device, number, connect, dtype, last, *shape)))
    if device == "cuda":
        cases += [(bits, (dtype, n)) for dtype, n in itertools.product(DTYPES, (1024, 1031, 70001))]
    random.Random(0).shuffle(cases)
    end, ran = time.perf_counter() + seconds, 0
    for run, arguments in cases:
        if time.perf_counter() > end:
            break
        run(*arguments)
        ran += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{ran} of {len(cases)} calls, forward and backward")
    return ran


if __name__ == "__main__":
    main()
