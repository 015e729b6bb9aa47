"""pytest-benchmark: fused against the plain loop at T = 4 ... 512, float32 and bf16, forward and forward + backward.

Run by ``make bench``. Contenders of one shape stand in one group of the table, with the copy of the same tensor, which
is what the hardware can do. Spikes are compared before anything is timed. Peak memory is in ``extra_info``.
"""

from __future__ import annotations

import gc

import pytest
import torch

from benchmarks.measure import synchronize
from benchmarks.workloads import check_spikes, fused, plain_loop, random_input

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]
STEPS = 1 << 22  # neuron-steps on the CPU
GPU_STEPS = 1 << 26


def kept_bytes(call, x: torch.Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, each storage counted once."""
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(x.detach().requires_grad_())
    return sum(saved.values())


@pytest.mark.parametrize("contender", ["fused", "loop", "copy"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("T", [4, 16, 64, 512])
@pytest.mark.parametrize("device", DEVICES)
def test_neuron(benchmark, device, T, dtype, direction, contender):
    steps = GPU_STEPS if device == "cuda" else STEPS
    x = random_input(T, steps // T, dtype, device)
    benchmark.group = f"{device} T={T} {str(dtype).removeprefix('torch.')} {direction}"
    call = {"fused": fused, "loop": plain_loop, "copy": torch.clone}[contender]
    if contender == "fused":
        check_spikes(fused, x)
    if direction == "forward":

        def run():
            with torch.no_grad():
                call(x)
            synchronize(device)
    else:
        leaf, grad = x.requires_grad_(), torch.randn_like(x)

        def run():
            if contender == "copy":
                x.detach().clone(), x.detach() + grad
            else:
                torch.autograd.grad(call(leaf), leaf, grad)
            synchronize(device)

        if contender != "copy":
            benchmark.extra_info["bytes kept for backward per neuron-step"] = kept_bytes(call, x) / x.numel()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        benchmark.extra_info["peak bytes per neuron-step"] = (torch.cuda.max_memory_allocated() - before) / x.numel()
    gc.collect()
    slow = contender == "loop"
    benchmark.pedantic(run, warmup_rounds=2, rounds=5 if slow else 25, iterations=1)
