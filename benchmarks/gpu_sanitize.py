"""A small run of every CUDA kernel, for compute-sanitizer (``make gpu``)."""

from __future__ import annotations

import itertools

import torch

from snnfast import dynamics, functional
from snnfast.backends import native
from snnfast.dynamics import NEURONS, Constants
from snnfast.fused.ops import Connect, batch_norm_multi_step
from snnfast.memory import _ONES


def main() -> None:
    calls = 0
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for neuron, dtype, (T, N) in itertools.product(
        NEURONS, dtypes, [(1, 7), (4, 4096), (8, 1000), (16, 513), (40, 64)]
    ):
        x = torch.randn(T, N, device="cuda", dtype=torch.float64).to(dtype).requires_grad_()
        state = dynamics.state_dtype(dtype)
        states = tuple(torch.randn(N, device="cuda", dtype=state, requires_grad=True) for _ in neuron.states)
        decay = torch.tensor(0.4, device="cuda", dtype=state, requires_grad=True) if neuron.learnable else None
        own = tuple(torch.rand(N, device="cuda", dtype=state, requires_grad=True) for _ in neuron.own)
        given = states if len(states) > 1 else states[0]
        s, last, v_seq = functional.multi_step(neuron, x, given, decay, own, store_v_seq=True, backend="native")
        last = last if isinstance(last, tuple) else (last,)
        (s.float().sum() + sum(t.sum() for t in last) + v_seq.sum()).backward()
        calls += 1
    kinds = [dynamics.IF, dynamics.LIF, dynamics.PARAMETRIC_LIF]
    for connect, dtype, last, (T, *shape) in itertools.product(
        Connect, dtypes, (False, True), [(4, 2, 16, 8, 8), (4, 2, 5, 3, 3), (1, 40, 24), (19, 3, 8, 4, 4)]
    ):
        neuron, affine, batch = kinds[calls % 3], calls % 2 == 0, calls % 5 != 0
        calls += 1
        state = dynamics.state_dtype(dtype)

        def tensor(*size: int, dtype: torch.dtype = dtype, odd: bool = calls % 7 == 0) -> torch.Tensor:
            size_ = torch.Size(size).numel()
            return torch.randn(size_ + odd, device="cuda").to(dtype)[int(odd) :].view(size)  # at an odd address

        x = tensor(T, *shape)
        if last and len(shape) == 4:
            x = x.movedim(2, -1).contiguous().movedim(-1, 2)
        skip = None if connect == Connect.NONE else tensor(*x.shape).requires_grad_()
        decay = torch.tensor(0.4, device="cuda", dtype=state, requires_grad=True) if neuron.learnable else None
        constants = Constants(neuron.id, 1, dynamics.DECAY_INPUT, 1.0, 0.0, 2.0, 2.0, 1.0, 0.0, 0.0)
        channels = x.shape[2]
        used = (None, None) if batch else (torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda"))
        norm = [torch.rand(channels, device="cuda", requires_grad=True) if affine else None for _ in range(2)]
        v0 = tensor(*x.shape[1:], dtype=state).requires_grad_() if affine else None
        for per_step in (False, True) if batch else (False,):
            s, v, *_ = batch_norm_multi_step(
                x.requires_grad_(), *used, *norm, v0, decay, skip, connect,
                eps=1e-5, per_step=per_step, constants=constants,
            )  # fmt: skip
            (s.float().sum() + v.sum()).backward()
    for dtype, n in itertools.product(dtypes, (1024, 1031, 70001)):
        spikes = (torch.rand(n, device="cuda") < 0.3).to(dtype)
        bits = torch.zeros((n + 63) // 64 * 8 + 8, dtype=torch.uint8, device="cuda")
        one = _ONES[dtype]
        native.cuda_pack_bits(spikes, bits, one)
        native.cuda_unpack_bits(bits, one, back := torch.empty_like(spikes))
        assert torch.equal(back, spikes)
    torch.cuda.synchronize()
    print(f"{calls} forward and backward calls")


if __name__ == "__main__":
    main()
