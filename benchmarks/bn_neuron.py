"""``python -m benchmarks.bn_neuron``: batch norm and neuron in one against torch's batch norm followed by our neuron.

[T=4, B=32, 64, 32, 32], a training step forward and backward (and the forward alone, and evaluation), in every dtype
and memory format. Spikes and gradients are compared before the clock starts.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import snnfast
from snnfast.fused import BatchNormNode

from .measure import RESULTS, compare, environment, refuse_unless_idle
from .rows import Row

T, B, C, SIZE = 4, 32, 64, 32
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Passes over [T, N] in a training step, a read or a write each: docs/fusion.md lists them.
FUSED_PASSES, SEPARATE_PASSES = 3 + 6, 5 + 8


class Work:
    """One model on one input, by steps that leave no state behind."""

    def __init__(self, model: nn.Module, x: Tensor, weights: Tensor) -> None:
        self.model, self.x, self.weights = model, x, weights

    def forward_backward(self) -> tuple[Tensor, Tensor]:
        self.x.grad = None
        self.model.zero_grad()
        snnfast.functional.reset_net(self.model)
        s = self.model(self.x)
        s.backward(self.weights)
        assert self.x.grad is not None
        return s, self.x.grad

    def forward(self) -> Tensor:
        snnfast.functional.reset_net(self.model)
        with torch.no_grad():
            return self.model(self.x)


def contenders(dtype: torch.dtype, memory_format: torch.memory_format, training: bool) -> dict[str, Work]:
    """The fused node and the two modules with the same parameters, on the same input."""
    shape = (T * B, C, SIZE, SIZE)
    x = torch.randn(shape).add_(0.7).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    weights = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    norm = nn.BatchNorm2d(C)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, 0.0, 0.5)
    node = BatchNormNode(norm, snnfast.LIFNode(timesteps=T)).train(training)
    apart = nn.Sequential(copy.deepcopy(norm), snnfast.LIFNode(timesteps=T)).train(training)
    return {"fused": Work(node, x, weights), "apart": Work(apart, x, weights)}


def check(works: dict[str, Work], dtype: torch.dtype) -> str:
    """Raise where the two disagree by more than rounding explains; the rate of differing spikes, in words."""
    s, grad = works["fused"].forward_backward()
    want_s, want_grad = works["apart"].forward_backward()
    differing = (s != want_s).double().mean().item()
    off = ((grad - want_grad).double().norm() / want_grad.double().norm()).item()
    # bfloat16: the two modules round the normalised input, which turns spikes whose charge is close to the threshold.
    spikes, gradients = (1e-5, 1e-2) if dtype == torch.float32 else (5e-3, 0.2)
    if differing > spikes or off > gradients:
        raise AssertionError(f"{differing:.1e} of the spikes differ and the gradient by {off:.1e}")
    return f"{differing:.0e} of the spikes differ, rate {want_s.double().mean().item():.2f}"


def rows() -> Iterator[Row]:
    """Every case; the target is that of the contiguous float32 training step."""
    calls: dict[str, Callable[[Work], Callable[[], Any]]] = {
        "training step": lambda work: work.forward_backward,
        "forward": lambda work: work.forward,
    }
    for dtype in (torch.float32, torch.bfloat16):
        for format_name, memory_format in FORMATS.items():
            for training in (True, False):
                works = contenders(dtype, memory_format, training)
                note = check(works, dtype)
                for call_name, call in calls.items():
                    found = compare({name: call(work) for name, work in works.items()}, seconds=1.0)
                    mode = "train" if training else "eval"
                    name = f"{str(dtype).removeprefix('torch.')} {format_name} {mode}: {call_name}"
                    ratio = found["apart"] / found["fused"]
                    target = 1.8 if training and call_name == "training step" else 1.0
                    times = f"{found['fused'] * 1e3:.1f} ms against {found['apart'] * 1e3:.1f} ms"
                    yield Row(name, "torch's norm, then LIFNode", ratio, target, True, "x", f"{times}; {note}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bn_neuron", description=__doc__)
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too (the result says so)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    arguments = parser.parse_args()
    refuse_unless_idle(arguments.force)
    device = environment()
    torch.manual_seed(0)
    print(f"passes over [T, N]: fused {FUSED_PASSES}, apart {SEPARATE_PASSES}")
    found = []
    for row in rows():
        found.append(row)
        print(f"{row.work:<55} {row.value:.2f}x  (target {row.target:g})  {row.note}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"environment": device, "rows": [r.as_dict() for r in found]}
    path = arguments.out / "bn_neuron.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
