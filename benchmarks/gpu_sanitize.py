"""A small run of every CUDA kernel, for compute-sanitizer (``make gpu``)."""

from __future__ import annotations

import itertools

import torch

from snnfast import dynamics, functional
from snnfast.dynamics import NEURONS, Constants
from snnfast.fused.ops import Connect, batch_norm_multi_step


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
    for connect, dtype, (T, *shape) in itertools.product(
        Connect, dtypes, [(4, 2, 16, 8, 8), (4, 2, 5, 3, 3), (1, 40, 24), (19, 3, 8, 4, 4)]
    ):
        x = torch.randn(T, *shape, device="cuda", dtype=torch.float64).to(dtype).requires_grad_()
        if len(shape) == 4:
            x = x.movedim(2, -1).contiguous().movedim(-1, 2) if calls % 2 else x
        skip = None if connect == Connect.NONE else torch.rand_like(x)
        decay = torch.tensor(0.4, device="cuda", dtype=dynamics.state_dtype(dtype), requires_grad=True)
        constants = Constants(dynamics.PARAMETRIC_LIF.id, 1, dynamics.DECAY_INPUT, 1.0, 0.0, 2.0, 2.0, 1.0, 0.0, 0.0)
        for per_step in (False, True):
            s, v, *_ = batch_norm_multi_step(
                x, None, None, None, None, None, decay, skip, connect, eps=1e-5, per_step=per_step, constants=constants
            )
            (s.float().sum() + v.sum()).backward()
            calls += 1
    torch.cuda.synchronize()
    print(f"{calls} forward and backward calls")


if __name__ == "__main__":
    main()
