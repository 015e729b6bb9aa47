"""Where the time of a training step goes: clocks around the calls of a network's layers, forward and backward.

Before a layer and behind it stands an identity whose forward and whose backward take the time, so a layer's backward is
what passes between the two: that holds because autograd runs a chain without branches from its end to its beginning.
On a GPU the clocks are events of the stream.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from snnfast.fused.pair import Deferred, StandIn

from .measure import synchronize

KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "convolutions": (nn.modules.conv._ConvNd,),
    "linear": (nn.Linear,),
    "norms": (nn.modules.batchnorm._BatchNorm,),
    "pooling": (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd),
}


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, at_backward: Callable[[], None]) -> Tensor:
        ctx.at_backward = at_backward
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.at_backward()
        return grad, None


class Breakdown:
    """Clocks in the layers of ``net``: after :meth:`measure`, ``seconds`` has forward and backward of each kind.

    Args:
        neurons: the modules that count as neurons; nothing inside them is measured by itself.
    """

    def __init__(self, net: nn.Module, neurons: list[nn.Module], device: str) -> None:
        self.device = device
        self.seconds: dict[str, tuple[float, float]] = {}
        self._spans: dict[str, tuple[list[Any], list[Any]]] = defaultdict(lambda: ([], []))
        self._watched: list[tuple[nn.Module, Any]] = []
        inside = {m for n in neurons for m in n.modules()}
        for module in net.modules():
            if module in neurons:
                self._watch(module, "neurons")
            elif module not in inside:
                for kind, classes in KINDS.items():
                    if isinstance(module, classes):
                        self._watch(module, kind)

    def _now(self) -> Any:
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _watch(self, module: nn.Module, kind: str) -> None:
        spans = self._spans[kind]

        own, forward = module.__dict__.get("forward"), module.forward

        def timed(x: Any, *rest: Any) -> Any:
            call: dict[str, Any] = {}

            def grad_is_done() -> None:
                if "backward" in call:  # not where a fused norm hands its input on: its neuron's clock runs
                    spans[1].append((call["backward"], self._now()))

            if isinstance(x, Deferred):
                x.x = _mark(x.x, grad_is_done)
            else:
                x = _mark(x, grad_is_done)
            start = self._now()
            output = forward(x, *rest)
            if not _is_tensor(output):
                return output
            spans[0].append((start, self._now()))
            return _mark(output, lambda: call.__setitem__("backward", self._now()))

        # In place of hooks, at whose sight a fused norm and its neuron run apart.
        module.__dict__["forward"] = timed
        self._watched.append((module, own))

    def measure(self, step: Callable[[], Any], rounds: int) -> float:
        """Run ``step`` some times; returns its median seconds, which the clocks are a small part of. Each kind's are
        medians too: a round that the machine was elsewhere counts for nothing."""
        step()
        whole: list[float] = []
        found: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        for _ in range(rounds):
            for spans in self._spans.values():
                for part in spans:
                    part.clear()
            synchronize(self.device)
            start = time.perf_counter()
            step()
            synchronize(self.device)
            whole.append(time.perf_counter() - start)
            for kind, spans in self._spans.items():
                for seconds, part in zip(found[kind], spans, strict=True):
                    seconds.append(sum(map(self._length, part)))
        self.seconds = {kind: (median(forward), median(backward)) for kind, (forward, backward) in found.items()}
        return median(whole)

    def _length(self, span: tuple[Any, Any]) -> float:
        start, end = span
        return end - start if self.device == "cpu" else start.elapsed_time(end) / 1e3

    def remove(self) -> None:
        for module, own in self._watched:
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


def _mark(x: Any, at_backward: Callable[[], None]) -> Any:
    return _Mark.apply(x, at_backward) if _is_tensor(x) else x


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, StandIn)  # which says that it is one
