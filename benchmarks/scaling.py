"""How time and saved memory grow: in T at constant N and in N at constant T, and the kernels on the roofline.

Forward and backward through autograd, float32 LIF; the roofline's ceilings (copy, add, a matrix product) are measured
in the same run, and every byte that must move is counted, the state after the last step included.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from snnfast.analysis import saved_bytes

from . import peer_neurons
from .measure import compare, take_turns
from .peer_neurons import COMPILED
from .rows import Point, Row, Settings, at_least, ms
from .workloads import Preallocated, random_input

TIMES, SHOWN_TIMES, COMPILED_TIMES = (1, 2, 4, 8, 16, 32, 64, 128, 256), (4, 64, 256), (4, 16)
NEURONS, T = 1 << 13, 4
SIZES, SHOWN_SIZES = tuple(1 << k for k in range(10, 22, 2)), (1 << 10, 1 << 20)
GPU_NEURONS, GPU_SIZES = 1 << 20, tuple(1 << k for k in range(10, 26, 2))
# Per neuron-step of LIF with decay_input and ATan: forward x - (v - v_r), times 1/tau, plus v, the comparison and the
# reset; the backward computes these again, then the surrogate's derivative and three products of gradients.
OPERATIONS = {"forward": 6, "backward": 20}


def measure(settings: Settings) -> Iterator[Row | Point]:
    gpu = settings.device == "cuda"
    neurons, sizes = (GPU_NEURONS, GPU_SIZES) if gpu else (NEURONS, SIZES)
    times, shown_times, shown_sizes = TIMES, SHOWN_TIMES, SHOWN_SIZES
    if settings.quick:
        neurons, sizes, times, shown_times = 64, (64, 256), (2, 8), (8,)
        shown_sizes = (256,)
    if not settings.present:
        for steps in shown_times:
            yield settings.absent(f"forward + backward [{steps}, {neurons}]", "every peer")
        yield settings.absent("roofline", "copy bandwidth")
        return
    for steps in times:
        yield from one_shape(steps, neurons, steps, "time", "memory", steps in shown_times, settings)
    for size in sizes:
        yield from one_shape(T, size, size, "time-n", "memory-n", size in shown_sizes, settings)
    yield from roofline(settings)


def one_shape(
    steps: int, neurons: int, at: int, time_figure: str, memory_figure: str, shown: bool, settings: Settings
) -> Iterator[Row | Point]:
    device = settings.device
    x, grad = (random_input(steps, neurons, device=device).unsqueeze(1) for _ in range(2))
    leaf = x.requires_grad_()
    calls, kept, notes = {}, {}, {}

    def step_of(name: str, module: torch.nn.Module):
        def run() -> None:
            with peer_neurons.implementation(name):
                torch.autograd.grad(module(leaf), leaf, grad)

        return run

    modules = {"snnfast": peer_neurons.ours().to(device)}
    for peer in peer_neurons.all_of(device, steps):
        if peer.make is None or (peer.name == COMPILED and steps not in COMPILED_TIMES):
            reason = peer.missing or f"compiled for T in {COMPILED_TIMES} only: each T takes seconds"
            if shown:
                yield Row(f"forward + backward [{steps}, {neurons}]", peer.name, None, None, True, "x", reason)
            continue
        notes[peer.name] = peer_neurons.disagreement(peer, steps, device)[1] if shown else ""
        modules[peer.name] = peer.make().to(device)
    for name, module in modules.items():
        calls[name] = step_of(name, module)
        if name != COMPILED:  # what its graphs keep is not seen by hooks
            with peer_neurons.implementation(name):
                kept[name] = saved_bytes(module, leaf) / leaf.numel()
    seconds = 0.02 if settings.quick else 0.3
    slow = steps * neurons >= 1 << 20 and not settings.quick  # some peers then take a second a call
    t = take_turns(calls, device, 3) if slow else compare(calls, device, seconds, 3)
    for name, found in t.items():
        yield Point(time_figure, name, at, found / leaf.numel() * 1e9)
    for name, found in kept.items():
        yield Point(memory_figure, name, at, found)
    if not shown:
        return
    for name in t:
        if name != "snnfast":
            note = f"{ms(t['snnfast'])} against {ms(t[name])}; {notes[name]}"
            if name in kept:
                note += f"; kept for backward {kept['snnfast']:.3g} B against {kept[name]:.3g} B per neuron-step"
            yield at_least(f"forward + backward [{steps}, {neurons}]", name, t[name] / t["snnfast"], None, note=note)


def roofline(settings: Settings) -> Iterator[Row | Point]:
    device = settings.device
    total = 1 << (12 if settings.quick else 28 if device == "cuda" else 24)
    y, a, b = (torch.randn(total, device=device) for _ in range(3))
    side = 64 if settings.quick else 8192 if device == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    ceilings = {
        "copy": partial(y.copy_, a),
        "add": partial(torch.add, a, b, out=y),
        "matmul": partial(torch.mm, left, right),
    }
    t = compare(ceilings, device, 0.6)
    copied, added, peak = 2 * 4 * total / t["copy"], 3 * 4 * total / t["add"], 2 * side**3 / t["matmul"]
    yield Row("copy bandwidth, read + write", f"{4 * total >> 20} MB", copied / 1e9, None, True, "GB/s")
    yield Row("add bandwidth, two reads + write", f"{4 * total >> 20} MB each", added / 1e9, None, True, "GB/s")
    yield Row("float32 matrix product", f"{side} x {side}", peak / 1e9, None, True, "Gop/s")
    for name, bandwidth in (("copy", copied), ("add", added)):
        for intensity in (0.125, peak / bandwidth, 128.0):
            yield Point("roofline", f"roof: {name}", intensity, min(bandwidth * intensity, peak) / 1e9)
    del ceilings, y, a, b, left, right
    for steps in (4, 16, 64):
        for dtype in (torch.float32, torch.bfloat16):
            x = random_input(steps, total // steps, dtype, device)
            grad = torch.randn_like(x)
            kernel, size = Preallocated(x, tau=peer_neurons.TAU), dtype.itemsize
            t = compare({"forward": kernel.forward, "backward": lambda k=kernel, g=grad: k.backward(g)}, device, 0.4, 3)
            moved = {"forward": 2 * size + 4 / steps, "backward": 3.0 * size}
            for direction, seconds in t.items():
                work = OPERATIONS[direction] * x.numel()
                name = f"{direction} {str(dtype).removeprefix('torch.')} T={steps}"
                yield Point("roofline", name, OPERATIONS[direction] / moved[direction], work / seconds / 1e9)
                share = 100 * moved[direction] * x.numel() / seconds / copied
                yield at_least(f"kernel {name}, beyond the caches", "copy bandwidth", share, None, "%", ms(seconds))
