"""What the fused neurons save: one training step with the plain loop and with snnfast, the same modules and weights."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mnist_data import Batch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from snnfast import functional
from snnfast.neuron import BaseNode

LOSS_TOLERANCE = 1e-4  # relative: gradients agree to float rounding, which a few optimiser steps amplify a little
BACKENDS = {"plain loop": "reference", "snnfast": "auto"}
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # images and digits -> loss and share of right answers
NewStep = Callable[[nn.Module, int], Step]  # a network and its number of steps -> a step that trains it


def compare(
    net: nn.Module, data: Sequence[Batch], new_step: NewStep, repetitions: int, console: Console
) -> dict[str, Any]:
    """Losses of the first steps and times of one step with both backends, printed and returned; ``net`` stays as is."""
    losses = first_losses(net, data, new_step)
    difference = max(abs(a - b) / abs(a) for a, b in zip(*losses.values(), strict=True))
    print_losses(losses, difference, console)
    times = measure(net, data[0], new_step, repetitions)
    print_times(times, len(data[0][0]), repetitions, console)
    speedup = times["step, plain loop"] / times["step, snnfast"]
    return {"losses": losses, "loss difference": difference, "milliseconds": times, "speedup": speedup}


def with_backend(net: nn.Module, backend: str) -> nn.Module:
    """A copy of ``net`` in training mode whose neurons run on ``backend``."""
    own = copy.deepcopy(net).train()
    functional.set_backend(own, backend)
    return own


def first_losses(net: nn.Module, data: Sequence[Batch], new_step: NewStep) -> dict[str, list[float]]:
    """Losses of the first steps with each backend: same weights, same batches."""
    losses = {}
    for name, backend in BACKENDS.items():
        step = new_step(with_backend(net, backend), len(data))
        losses[name] = [step(*batch)[0].item() for batch in data]
    return losses


def measure(net: nn.Module, batch: Batch, new_step: NewStep, repetitions: int) -> dict[str, float]:
    """Median milliseconds of each part; all are measured in turn, so that a busy machine disturbs them alike."""
    parts: dict[str, Callable[[], Any]] = {}
    for name, backend in BACKENDS.items():
        step = new_step(with_backend(net, backend), repetitions + 2)
        parts[f"step, {name}"] = lambda step=step: step(*batch)
        parts[f"neurons, {name}"] = modules_alone(with_backend(net, backend), batch[0], BaseNode)
    for name, kind in (("convolutions", nn.Conv2d), ("batch norms", nn.BatchNorm2d)):
        parts[name] = modules_alone(with_backend(net, "auto"), batch[0], kind)
    synchronize = torch.cuda.synchronize if batch[0].is_cuda else lambda: None
    times: dict[str, list[float]] = {name: [] for name in parts}
    for repetition in range(repetitions + 2):
        for name, part in parts.items():
            synchronize()
            started = time.perf_counter()
            part()
            synchronize()
            if repetition >= 2:  # the first two warm up
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def modules_alone(net: nn.Module, images: Tensor, kind: type) -> Callable[[], None]:
    """Forward and backward of only the modules of one kind, on the inputs that they see in the network."""
    calls: list[tuple[nn.Module, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Only the images need no gradient.
        calls.append((module, inputs[0].detach().clone().requires_grad_(inputs[0].requires_grad)))

    # Before the hook with which the first neuron of a converted network repeats its input, for that runs again below.
    hooks = [m.register_forward_pre_hook(record, prepend=True) for m in net.modules() if isinstance(m, kind)]
    net(images)
    for hook in hooks:
        hook.remove()
    gradients = [torch.randn_like(module(x)) for module, x in calls]

    def run() -> None:
        functional.reset_net(net)
        net.zero_grad()
        for (module, x), gradient in zip(calls, gradients, strict=True):
            x.grad = None
            module(x).backward(gradient)

    return run


def print_losses(losses: dict[str, list[float]], difference: float, console: Console) -> None:
    title = "Plain SNN: losses of the first training steps, from the same weights"
    table = Table("training step", *losses, "difference", title=title)
    for i, (a, b) in enumerate(zip(*losses.values(), strict=True)):
        table.add_row(str(i + 1), f"{a:.7f}", f"{b:.7f}", f"{abs(a - b):.1e}")
    console.print(table)
    console.print(f"largest relative difference {difference:.1e}, allowed {LOSS_TOLERANCE:.0e}\n")


def print_times(times: dict[str, float], batch_size: int, repetitions: int, console: Console) -> None:
    title = f"Plain SNN: one training step, batch {batch_size}; medians of {repetitions} interleaved repetitions"
    table = Table("milliseconds", *BACKENDS, "loop / snnfast", title=title)
    neurons, step = ([times[f"{part}, {name}"] for name in BACKENDS] for part in ("neurons", "step"))
    table.add_row("neurons, forward and backward", *(f"{t:.1f}" for t in neurons), f"{neurons[0] / neurons[1]:.2f} x")
    table.add_row("everything else", *(f"{s - n:.1f}" for s, n in zip(step, neurons, strict=True)), "")
    table.add_row("whole step", *(f"{t:.1f}" for t in step), f"{step[0] / step[1]:.2f} x", style="bold")
    console.print(table)
    alone = "convolutions {convolutions:.1f}, batch norms {batch norms:.1f}".format(**times)
    console.print(f"of everything else, measured alone (ms): {alone}\n")
