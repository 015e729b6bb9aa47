"""For benchmarks.gpu: batch norm and neuron in one against torch's (cuDNN's) norm and our own neuron after it.

Passes over [T, N], a read or a write each: 3 + 6 where the norm and the neuron are one, 3 + 5 where the
gradient between them is computed twice, 5 + 8 where they are two.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import snnfast
from snnfast import backends
from snnfast.fused import BatchNormNode

from .cpu_targets import Row, at_least

T, SHAPE = 4, (256, 64, 32, 32)
FUSED_PASSES = {"training step": 9, "evaluation": 2}


class Apart(nn.Module):
    def __init__(self, norm: nn.Module, neuron: nn.Module) -> None:
        super().__init__()
        self.norm, self.neuron = norm, neuron

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        return self.neuron(y if skip is None else y + skip)


@contextmanager
def backend_is(name: str) -> Any:
    """What ``backend="auto"`` means."""
    before = os.environ.get("SNNFAST_BACKEND")
    os.environ["SNNFAST_BACKEND"] = name
    backends.forget_choices()
    try:
        yield
    finally:
        os.environ.pop("SNNFAST_BACKEND")
        if before is not None:
            os.environ["SNNFAST_BACKEND"] = before
        backends.forget_choices()


def step(model: nn.Module, inputs: tuple[Tensor, ...], weights: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        snnfast.functional.reset_net(model)
        for t in (*inputs, *model.parameters()):
            t.grad = None
        s = model(*inputs)
        s.backward(weights)
        return s

    return run


def evaluation(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        snnfast.functional.reset_net(model)
        with torch.no_grad():
            return model(*inputs)

    return run


Cases = list[Callable[[], list[Row]]]


def cases(event_time: Callable[..., float], ceiling: float) -> tuple[Cases, Cases]:
    """The native kernels' and Triton's; ``event_time`` takes calls, ``ceiling`` is the same run's copy bandwidth."""
    found: tuple[Cases, Cases] = [], []
    for backend, dtype, channels_last, skips in [
        ("native", torch.bfloat16, True, False),
        ("native", torch.bfloat16, True, True),
        ("native", torch.bfloat16, False, False),
        ("native", torch.float32, True, False),
        ("triton", torch.bfloat16, True, False),
    ]:
        if backends.KERNELS[backends.NAMES.index(backend) - 1].missing(torch.device("cuda", 0)) is None:
            case = partial(rows, event_time, ceiling, backend, dtype, channels_last, skips)
            found[backend == "triton"].append(case)
    return found


def rows(
    event_time: Callable[..., float],
    ceiling: float,
    backend: str,
    dtype: torch.dtype,
    channels_last: bool,
    skips: bool,
) -> list[Row]:
    """One case, a training step and an evaluation."""
    found = []
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def tensor() -> Tensor:
        x = torch.randn(T * SHAPE[0], *SHAPE[1:], device="cuda").add_(0.7).to(dtype)
        return x.contiguous(memory_format=layout)

    norm = nn.BatchNorm2d(SHAPE[1]).cuda()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, 0.0, 0.5)
    node = BatchNormNode(norm, snnfast.LIFNode(timesteps=T), connect="CHARGE" if skips else None).cuda()
    apart = Apart(copy.deepcopy(norm), snnfast.LIFNode(timesteps=T)).cuda()
    inputs = tuple(tensor().requires_grad_() for _ in range(1 + skips))
    weights = tensor()
    name = f"{backend} BN + LIF T={T} {SHAPE} {str(dtype).removeprefix('torch.')}"
    name += " channels_last" * channels_last + " with a residual" * skips
    with backend_is(backend):
        # The norm apart rounds its output, which turns spikes whose charge is close to the threshold.
        differing = (step(node, inputs, weights)() != step(apart, inputs, weights)()).double().mean().item()
        assert differing < (1e-4 if dtype == torch.float32 else 2e-2), f"{differing:.1e} of the spikes differ"
        for work in FUSED_PASSES:
            training = work == "training step"
            node.train(training), apart.train(training)
            calls = [step(m, inputs, weights) if training else evaluation(m, inputs) for m in (node, apart)]
            ours, theirs = (event_time([c]) for c in calls)
            passes = FUSED_PASSES[work] + skips * (4 if training else 1)  # R; R, W and x once more
            if training and backend == "native" and dtype == torch.float32:  # the gradient of the normalised input:
                passes += skips - 1  # x once more and the skip in place of W, R
            share = 100 * passes * weights.numel() * weights.element_size() / ours / ceiling
            note = f"{ours * 1e3:.3f} ms, {share:.0f} % of copy bandwidth; {differing:.0e} of the spikes differ"
            target = 1.5 if backend == "native" and training else 1.0
            found.append(at_least(f"{name}: {work}", "cuDNN's norm, then our neuron", theirs / ours, target, note=note))
    return found
