"""Latency and throughput of whole networks: as trained, after optimize_for_inference, and with SpikingJelly's neurons.

VGG-11 and ResNet-18 with CIFAR's shapes, T = 4, batch 1 and 256, without gradients; on a GPU also captured as a CUDA
graph. Outputs are compared before anything is timed. On a CPU ours pool by snnfast's kernel and the one with
SpikingJelly's neurons by PyTorch's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import snnfast

from . import peer_neurons
from .measure import compare, take_turns
from .network import NETWORKS, T
from .peer_neurons import SPIKINGJELLY, TAU, Folded, implementation
from .rows import Row, Settings, at_least, ms

BATCHES, SIZE = (1, 256), 32
CPU_LIMIT = {"ResNet-18": 1}  # images at most on a CPU, where 256 take ten seconds a call
OPTIMIZED, LAST, CAPTURED = "optimize_for_inference", "optimize_for_inference, channels_last", "captured"
TOLERANCE = 1e-3


def trained(name: str, width: int, device: str) -> nn.Module:
    """A network whose norms have statistics, and under which neurons fire."""
    torch.manual_seed(0)
    kind = snnfast.surrogate.ATan()
    net = NETWORKS[name](timesteps=T, width=width, tau=TAU, surrogate_function=kind).to(device)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, 0.2, 1.2)
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(8, 3, SIZE, SIZE, device=device))
    return net.eval()


def measure(settings: Settings) -> Iterator[Row]:
    for name in NETWORKS:
        for batch in BATCHES:
            label = f"{name}, T={T}, batch {batch}"
            if not settings.present:
                yield settings.absent(f"{label}: {OPTIMIZED}", "eval()")
                yield settings.absent(f"{label}: {CAPTURED}", "eval()")
            elif settings.device == "cpu" and batch > CPU_LIMIT.get(name, batch):
                reason = "VGG-11 shows it; this one takes ten seconds a call on a CPU"
                yield Row(f"{label}: {OPTIMIZED}", "eval()", None, None, True, "x", reason)
            else:
                yield from one_batch(name, label, 2 if settings.quick and batch > 2 else batch, settings)


def one_batch(name: str, label: str, batch: int, settings: Settings) -> Iterator[Row]:
    device = settings.device
    net = trained(name, 8 if settings.quick else 64, device)
    x = torch.rand(batch, 3, SIZE, SIZE, device=device)
    fast, report = snnfast.optimize_for_inference(net)
    calls: dict[str, tuple[Any, Tensor]] = {
        "eval()": (net, x),
        OPTIMIZED: (fast, x),
        LAST: (
            copy.deepcopy(fast).to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        ),
    }
    peer = next(p for p in peer_neurons.all_of(device, T) if p.name.startswith(SPIKINGJELLY))
    if peer.make is not None:
        theirs = NETWORKS[name](
            timesteps=T, width=8 if settings.quick else 64, neuron=lambda timesteps: Folded(peer.make(), timesteps)
        )
        theirs.load_state_dict(net.state_dict())
        calls[f"{peer.name}'s neurons"] = (peer_neurons.with_torch_pooling(theirs).to(device).eval(), x)
    if device == "cuda":
        calls[CAPTURED] = (snnfast.capture(fast, x), x)
    notes = check(net, calls, x)
    t = timed(calls, settings, batch)
    for k, seconds in t.items():
        note = f"{ms(seconds)} a call, {batch / seconds:.3g} images/s; {notes[k]}"
        if k == OPTIMIZED:
            note += f"; {len(report.folded)} norms folded, {len(report.fused)} fused"
        yield at_least(f"{label}: {k}", "eval()", t["eval()"] / seconds, None, note=note)
    if peer.make is None:
        yield Row(f"{label}: {peer.name}'s neurons", "eval()", None, None, True, "x", peer.missing)


@contextmanager
def tf32(unchanged: bool) -> Iterator[None]:
    """Convolutions on a GPU in whole float32, or as torch is set."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and unchanged
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def check(net: nn.Module, calls: dict[str, tuple[Any, Tensor]], x: Tensor) -> dict[str, str]:
    """Words on how many images have other logits than from the network as it is; SystemExit where it is many.

    Folding, and another memory format, round otherwise; a charge within rounding of the threshold may then turn a
    spike, and what follows from it changes that image's logits (one in a few hundred images). So they are compared
    without TF32, in which a GPU's convolutions round their inputs to 11 bits: that turns spikes in every image.
    """
    notes = {}
    with torch.no_grad():
        for name, (call, given) in calls.items():
            captured = name == CAPTURED  # with the precision of its capture: it must do what was captured
            with implementation(name.removesuffix("'s neurons")), tf32(captured):
                want = calls[OPTIMIZED][0](x) if captured else net(x)
                off = (call(given) - want).abs().amax((0, 2)) > TOLERANCE * want.abs().max()
            turned = int(off.sum())
            notes[name] = "same logits" if not turned else f"a turned spike in {turned} of {len(off)} images"
            if turned > max(1, 0.1 * len(off)):
                raise SystemExit(f"{name}: {turned} of {len(off)} images have other logits: nothing timed")
    return notes


def timed(calls: dict[str, tuple[Any, Tensor]], settings: Settings, batch: int) -> dict[str, float]:
    def run_of(name: str, call: Any, given: Tensor) -> Any:
        def run() -> None:
            with torch.no_grad(), implementation(name.removesuffix("'s neurons")):
                call(given)

        return run

    runs = {name: run_of(name, call, given) for name, (call, given) in calls.items()}
    if settings.quick or (settings.device == "cpu" and batch > 16):
        return take_turns(runs, settings.device, 1 if settings.quick else 3)
    return compare(runs, settings.device, seconds=1.0)
