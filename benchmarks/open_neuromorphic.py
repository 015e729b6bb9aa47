"""The workload of open-neuromorphic.org's benchmark of libraries: Linear(n, n) and LIF, T = 500, B = 16.

As there: forward with gradients, then ``output.sum().backward(retain_graph=True)``, random normal input. Other than
there: the clock waits for the device, each contender starts from the initial state, and the neuron is also timed alone.
The published sizes are n = 4096, 8192 and 16384, on a GPU. On a CPU all contenders run at a smaller n, and ours and
SpikingJelly at the smallest published one: the matrix product is what takes the time there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import peer_neurons
from .measure import once
from .peer_neurons import SPIKINGJELLY, disagreement, implementation
from .rows import Row, Settings, at_least, ms

T, B = 500, 16
PUBLISHED = (4096, 8192, 16384)
SMALLER = 1024
PATIENCE = 2.0


def measure(settings: Settings) -> Iterator[Row]:
    if settings.device == "cuda":
        for n in PUBLISHED:
            if settings.present:
                yield from one_size(min(n, 64) if settings.quick else n, None, settings)
            else:
                yield settings.absent(name_of(n, T), "every peer")
        return
    if settings.quick:
        yield from one_size(32, None, settings)
        return
    yield from one_size(SMALLER, None, settings)
    yield from one_size(PUBLISHED[0], (SPIKINGJELLY,), settings)


def name_of(n: int, steps: int) -> str:
    label = "" if n in PUBLISHED and steps == T else ", smaller than any published size"
    return f"Linear({n}, {n}) + LIF [{steps}, {B}, {n}]{label}"


class Clocked:
    """Forward and backward of a model on one input, timed one after the other."""

    def __init__(self, name: str, model: nn.Module, x: Tensor) -> None:
        self.name, self.model, self.x = name, model, x
        self.out: Tensor | None = None

    def _forward(self) -> None:
        self.out = None  # its graph is not this forward's business
        self.out = self.model(self.x)

    def _backward(self) -> None:
        assert self.out is not None
        self.out.sum().backward(retain_graph=True)

    def __call__(self, device: str) -> tuple[float, float]:
        with implementation(self.name):
            return once(self._forward, device), once(self._backward, device)

    def release(self) -> None:
        self.out = None


def medians(calls: dict[str, Clocked], device: str, rounds: int) -> dict[str, tuple[float, float]]:
    """After a warm-up; a contender that takes more than ``PATIENCE`` seconds a call gets one call only."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    slow = set()
    for k in range(rounds + 1):
        for name, call in calls.items():
            if k > 1 and name in slow:
                continue
            times = call(device)
            call.release()
            if k:
                found[name].append(times)
            elif sum(times) > PATIENCE:
                slow.add(name)
    return {
        name: tuple(sorted(t[d] for t in times)[len(times) // 2] for d in (0, 1))  # type: ignore[misc]
        for name, times in found.items()
    }


def one_size(n: int, only: tuple[str, ...] | None, settings: Settings) -> Iterator[Row]:
    device, steps = settings.device, 20 if settings.quick else T
    work = name_of(n, steps)
    torch.manual_seed(0)
    linear = nn.Linear(n, n, device=device)
    x = torch.randn(steps, B, n, device=device)
    current = linear(x).detach()
    neurons: dict[str, nn.Module] = {"snnfast": peer_neurons.ours().to(device)}
    notes = {}
    for peer in peer_neurons.all_of(device, steps):
        if peer.make is None or (only is not None and peer.name not in only):
            reason = peer.missing or f"measured at n = {SMALLER} only"
            yield Row(f"{work}: forward + backward", peer.name, None, None, True, "x", reason)
            continue
        notes[peer.name] = disagreement(peer, min(steps, 64), device)[1]
        neurons[peer.name] = peer.make().to(device)
    whole: dict[str, Any] = {k: Clocked(k, nn.Sequential(linear, neuron), x) for k, neuron in neurons.items()}
    rounds = 1 if settings.quick else 3
    t = medians(whole, device, rounds)
    alone = medians({k: Clocked(k, v, current.clone().requires_grad_()) for k, v in neurons.items()}, device, rounds)
    parts: dict[str, Callable[[tuple[float, float]], float]] = {
        "forward": lambda s: s[0],
        "backward": lambda s: s[1],
    }
    for name in neurons:
        if name == "snnfast":
            continue
        for part, of in parts.items():
            note = f"{ms(of(t['snnfast']))} against {ms(of(t[name]))}; {notes[name]}"
            yield at_least(f"{work}: {part}", name, of(t[name]) / of(t["snnfast"]), None, note=note)
        ours, theirs = sum(alone["snnfast"]), sum(alone[name])
        note = f"{ms(ours)} against {ms(theirs)}"
        yield at_least(f"{work}: the neuron alone, forward + backward", name, theirs / ours, None, note=note)
    share = 100 * sum(alone["snnfast"]) / sum(t["snnfast"])
    yield Row(f"{work}: the neuron's share, snnfast", "forward + backward", share, None, False, "%")
