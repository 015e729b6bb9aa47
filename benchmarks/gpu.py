"""``python -m benchmarks.gpu``: the GPU's table of targets, native and Triton kernels, with JSON and Markdown.

Bytes are counted whole (x, s, v after the last step; backward x, grad_s, grad_x), time is taken by events with buffers
rotated past the second-level cache, and the ceiling is the copy bandwidth of the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from snnfast import backends, dynamics
from snnfast.dynamics import NEURONS, Constants, Inputs, Neuron

from . import gpu_bn
from .cpu_targets import Row, at_least, at_most
from .measure import RESULTS, environment, per_call
from .workloads import check_spikes, forward_backward, fused, plain_loop, random_input, spikingjelly

ROTATE = 3
OWN = {"threshold": 1.0, "beta": 0.6, "current_decay": 0.8}  # one value for all neurons


def event_time(calls: list[Callable[[], Any]], rounds: int = 20) -> float:
    """Median seconds of a call; the calls rotate through buffers that together exceed the cache."""
    for call in calls * 2:
        call()
    times = []
    for i in range(rounds * len(calls)):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(4_000_000)  # about 2 ms, in which the host queues the call: what is timed is the GPU
        start.record()
        calls[i % len(calls)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read plus written per second."""
    pairs = [(torch.randn(1 << 28, device="cuda"), torch.empty(1 << 28, device="cuda")) for _ in range(2)]
    seconds = event_time([lambda a=a, b=b: b.copy_(a) for a, b in pairs], 10)
    return 2 * (1 << 30) / seconds


def bandwidth(ceiling: float, backend: str) -> list[Callable[[], list[Row]]]:
    """The cases of a backend."""
    return [
        partial(bandwidth_of, ceiling, backend, T, dtype, neuron)
        for T in (4, 8, 16)
        for dtype in (torch.float32, torch.bfloat16)
        for neuron in NEURONS
        if neuron is dynamics.LIF or T == 4
        if backends.KERNELS[backends.NAMES.index(backend) - 1].missing(torch.device("cuda", 0)) is None
    ]


def bandwidth_of(ceiling: float, backend: str, T: int, dtype: torch.dtype, neuron: Neuron) -> list[Row]:
    N, kernels = 1 << 24, backends.KERNELS[backends.NAMES.index(backend) - 1]
    tau = 3.0 if neuron is dynamics.LIF else 1.0
    c = Constants(neuron.id, 0, dynamics.DECAY_INPUT, 1.0, 0.0, tau, 4.0, 1.0, 0.0, 0.0)
    decay = torch.tensor(0.4, device="cuda") if neuron.learnable else None
    own = {name: torch.tensor(OWN[name], device="cuda") for name in neuron.own}
    forward, backward = [], []
    for _ in range(ROTATE):
        x, g = random_input(T, N, dtype, "cuda"), torch.randn(T, N, device="cuda").to(dtype)
        s, z, k = torch.empty_like(x), torch.empty_like(x), None if decay is None else torch.empty_like(decay)
        v, i = (torch.empty(N, device="cuda") if n < len(neuron.states) else None for n in range(2))
        outputs, grads, results = (s, v, i, None), (g, None, None, None), (z, None, None, k, None, None, None)
        given = Inputs(x, decay=decay, **own)
        forward.append(lambda given=given, outputs=outputs: kernels.forward(c, given, *outputs))
        backward.append(lambda grads=grads, given=given, results=results: kernels.backward(c, grads, given, *results))
    size, name = dtype.itemsize, f"{backend} {neuron.name} T={T} {str(dtype).removeprefix('torch.')} N=2^24"
    f, b = event_time(forward), event_time(backward)
    f_share = 100 * (N * (2 * T * size + 4 * len(neuron.states)) / f) / ceiling
    b_share = 100 * (N * 3 * T * size / b) / ceiling
    return [
        at_least(f"forward {name}", "copy bandwidth", f_share, 90, "%", f"{f * 1e3:.3f} ms"),
        at_least(f"backward {name}", "copy bandwidth", b_share, 85, "%", f"{b * 1e3:.3f} ms"),
    ]


def against_peers() -> list[Row]:
    rows = []
    T, N = 4, 1 << 24
    theirs = spikingjelly()
    for dtype in (torch.float32, torch.bfloat16):
        x, grad = random_input(T, N, dtype, "cuda"), torch.randn(T, N, device="cuda").to(dtype)
        name = f"forward + backward LIF [4, 2^24] {str(dtype).removeprefix('torch.')}"
        check_spikes(fused, x)
        ours = event_time([forward_backward(fused, x, grad)])
        loop = event_time([forward_backward(plain_loop, x, grad)], 5)
        rows.append(at_least(name, "plain loop", loop / ours, 10, note=f"{ours * 1e3:.3f} ms"))
        compiled = torch.compile(plain_loop, fullgraph=True, dynamic=False)
        start = time.perf_counter()
        forward_backward(compiled, x, grad)()
        first = time.perf_counter() - start
        t = event_time([forward_backward(compiled, x, grad)])
        rows.append(at_least(name, "torch.compile of it", t / ours, 1.3, note=f"its first call took {first:.1f} s"))
        if theirs is None:
            rows.append(at_least(name, "SpikingJelly", None, 1.15, note="not installed here"))
        else:
            t = event_time([forward_backward(theirs, x, grad)])
            rows.append(at_least(name, "SpikingJelly stock", t / ours, 1.15 if dtype == torch.float32 else 2))
    return rows


def overhead() -> list[Row]:
    x = torch.randn(4, 8, device="cuda")
    with torch.no_grad():
        seconds = per_call(lambda: fused(x), calls=1000)
    torch.cuda.synchronize()
    return [at_most("no-grad call on [4, 8]", "host time", seconds * 1e6, 12, "us")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: nothing measured")
    from .__main__ import markdown, shown

    device = environment()
    ceiling = copy_bandwidth()
    device["copy bandwidth"] = f"{ceiling / 1e12:.2f} TB/s, read + write"
    print(device)
    rows: list[Row] = []
    failures: list[str] = []
    native, triton = gpu_bn.cases(event_time, ceiling)
    native += [*bandwidth(ceiling, "native"), against_peers]
    triton += bandwidth(ceiling, "triton")  # last: each kernel has to be compiled
    for case in (overhead, *native, *triton):
        found = []
        try:
            torch.cuda.empty_cache()
            found = case()
        except (Exception, SystemExit):  # one case that fails shall not cost the others' figures
            failures.append(traceback.format_exc())
            print(failures[-1], flush=True)
        rows += found
        for row in found:
            print("  ".join(shown(row)), flush=True)
        # after each case, so that a run that is cut short leaves what it measured
        record = {"environment": device, "rows": [r.as_dict() for r in rows], "failures": failures}
        (arguments.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        (arguments.out / "gpu.md").write_text(markdown(rows, device).replace("# CPU", "# GPU"))
        if failures and "CUDA error" in failures[-1]:  # after which no call of this process works
            break
    if failures:
        raise SystemExit(f"{len(failures)} cases failed")


if __name__ == "__main__":
    main()
