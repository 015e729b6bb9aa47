"""Whole training steps of spiking networks: forward, loss, backward, optimiser, with each library's neurons in place.

VGG-11 and ResNet-18 with CIFAR's shapes, T = 4, B = 16. Neurons of the same arithmetic must give the same logits
before anything is timed. On a CPU ours pool by snnfast's kernel and the others by PyTorch's, as their users' networks
do; rows with ``event_driven()`` have event-driven convolutions, SpikingJelly's network where they name it as well as
ours; all others, and "best" among them, have PyTorch's. ``free neurons`` is the same network with ReLUs, contiguous and
unfused; the breakdown says where the rest goes. On a CPU some are measured once more in a process that keeps the memory
it has freed (``snnfast.keep_freed_memory``); ``python -m benchmarks.network NAME --kept`` is that process.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnfast
from snnfast import functional, models

from . import peer_neurons
from .breakdown import Breakdown
from .measure import keep_memory, take_turns, where_memory_is_kept
from .peer_neurons import (
    COMPILED,
    LOOP,
    SPIKINGJELLY,
    TAU,
    Folded,
    disagreement,
    implementation,
    with_torch_pooling,
)
from .rows import Row, Settings, at_least, at_most, ms

NETWORKS: dict[str, Callable[..., Any]] = {"VGG-11": models.vgg11, "ResNet-18": models.resnet18}
T, B, SIZE = 4, 16, 32
FREE, FUSED, LAST = "free neurons", "snnfast, fuse()", ", channels_last"
BY_EVENTS = ", event_driven()"


def _neurons(net: nn.Module) -> list[nn.Module]:
    """Those that stand where the ANN has its ReLUs, not what they consist of."""
    found = [m for m in net.modules() if isinstance(m, (Folded, snnfast.neuron.BaseNode, Free))]
    inside = {part for m in found for part in m.modules() if part is not m}
    return [m for m in found if m not in inside]


class Free(nn.Module):
    """What costs next to nothing where a neuron was: the ReLU of the network that was made spiking."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def contenders(
    name: str, settings: Settings, width: int, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The networks, all with the same weights, and why there are some not."""
    torch.manual_seed(0)
    kind = snnfast.surrogate.ATan
    ours = NETWORKS[name](timesteps=T, width=width, tau=TAU, surrogate_function=kind())
    found: dict[str, nn.Module] = {"snnfast": ours}
    missing = {}

    def with_neuron(neuron: Callable[..., nn.Module]) -> nn.Module:
        net = NETWORKS[name](timesteps=T, width=width, neuron=neuron)
        theirs = net.state_dict()  # sinabs' neurons have parameters of their own
        net.load_state_dict({k: v for k, v in ours.state_dict().items() if k in theirs}, strict=False)
        return net if neuron is Free else with_torch_pooling(net)

    for peer in peer_neurons.all_of(settings.device, T, dtype):
        if peer.make is None:
            missing[peer.name] = peer.missing
        else:
            found[peer.name] = with_neuron(lambda timesteps, make=peer.make: Folded(make(), timesteps))
    found[FREE] = with_neuron(Free)
    found = {k: v.to(settings.device) for k, v in found.items()}
    found[FUSED] = copy.deepcopy(found["snnfast"])
    snnfast.fuse(found[FUSED])
    if settings.device == "cpu":
        for label in [k for k in found if k in (FUSED, SPIKINGJELLY)]:
            found[f"{label}{BY_EVENTS}"] = copy.deepcopy(found[label])
            snnfast.event_driven(found[f"{label}{BY_EVENTS}"])
    for label in [k for k in found if k.startswith(("snnfast", SPIKINGJELLY))]:
        found[f"{label}{LAST}"] = copy.deepcopy(found[label]).to(memory_format=torch.channels_last)
    return found, missing


def training_step(net: nn.Module, x: Tensor, y: Tensor, name: str, dtype: torch.dtype) -> Callable[[], Any]:
    """Forward, cross-entropy of the mean over time, backward, SGD with momentum; a rate that changes little."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-5, momentum=0.9)
    autocast = torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32)
    x = x.contiguous(memory_format=torch.channels_last) if name.endswith(LAST) else x

    def run() -> None:
        optimizer.zero_grad()
        functional.reset_net(net)
        with implementation(name):
            with autocast:
                loss = F.cross_entropy(net(x).float().mean(0), y)
            loss.backward()
        optimizer.step()

    return run


def check_logits(name: str, nets: dict[str, nn.Module], x: Tensor) -> dict[str, str]:
    """Words on whether each network computes what ours does; SystemExit where it must and does not."""
    found = {}
    # Another memory format, or other convolutions, round otherwise: each is compared with ours in the same.
    for last, events in itertools.product(("", LAST), (False, True)):
        given = x.contiguous(memory_format=torch.channels_last) if last else x
        ours = copy.deepcopy(nets[f"snnfast{last}"])
        if events:
            snnfast.event_driven(ours)
        with torch.no_grad():
            want = ours(given)
            for label, net in nets.items():
                if not label.startswith((LOOP, COMPILED, SPIKINGJELLY)):
                    continue
                if label.endswith(LAST) != bool(last) or (BY_EVENTS in label) != events:
                    continue
                with implementation(label):
                    off = (copy.deepcopy(net)(given) - want).abs().max().item()
                if off > 1e-4 * want.abs().max().item() and x.device.type == "cpu":
                    raise SystemExit(f"{name} with {label}'s neurons gives other logits, by {off:.1e}: nothing timed")
                found[label] = "logits equal" if not off else f"logits within {off:.0e}"
    return found


def measure(settings: Settings) -> Iterator[Row]:
    dtypes = [torch.float32] if settings.device == "cpu" else [torch.float32, torch.bfloat16]
    for name in NETWORKS:
        for dtype in dtypes:
            batch, size = (2, 16) if settings.quick else (B, SIZE)
            label = f"{name} [T={T}, B={batch}, 3, {size}, {size}] {str(dtype).removeprefix('torch.')}"
            if not settings.present:
                yield settings.absent(f"{label}: training step", SPIKINGJELLY, 1.5)
                yield settings.absent(f"{label}: training step", FREE, 1.25, False)
                continue
            yield from one_network(name, label, dtype, settings)


def one_network(name: str, label: str, dtype: torch.dtype, settings: Settings) -> Iterator[Row]:
    device, width = settings.device, 8 if settings.quick else 64
    batch, size = (2, 16) if settings.quick else (B, SIZE)
    x = torch.rand(batch, 3, size, size, device=device)
    y = torch.randint(0, 10, (batch,), device=device)
    nets, missing = contenders(name, settings, width, dtype)
    notes = check_logits(name, nets, x)
    for peer in peer_neurons.all_of(device, T, dtype):
        if peer.make is not None and not peer.same:
            notes[peer.name] = disagreement(peer, T, device, dtype)[1]
    if name != "VGG-11" and not settings.quick and device == "cpu":
        for slow in (COMPILED, "snnTorch Leaky", "Norse LIF", "sinabs LIF"):  # a minute more, and VGG-11 has shown it
            if nets.pop(slow, None) is not None:
                missing[slow] = "measured in VGG-11 only"
    steps = {k: training_step(net, x, y, k, dtype) for k, net in nets.items()}
    rounds = 1 if settings.quick else 15 if name == "VGG-11" or device == "cuda" else 9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t = take_turns(steps, device, rounds)
    best = best_of(t)
    theirs = {k: t[k] for k in t if k.startswith(SPIKINGJELLY) and BY_EVENTS not in k}
    target = 1.3 if device == "cpu" and name == "VGG-11" else 1.5 if device == "cuda" else None
    work = f"{label}: training step"
    exchanged = target if device == "cpu" else None  # the neurons alone are another library's
    for ours, kind, goal in (("snnfast", "", exchanged), (FUSED, "", None), (best, "best: ", target)):
        if theirs:
            rival = min((k for k in theirs if kind or not k.endswith(LAST)), key=lambda k: theirs[k])
            note = f"{ms(t[ours])} against {ms(t[rival])}; {notes.get(rival, '')}"
            yield at_least(f"{work}, {kind}{ours}", f"{kind}{rival}'s neurons", t[rival] / t[ours], goal, note=note)
    for k in t:
        if not k.startswith((SPIKINGJELLY, "snnfast", FREE)):
            note = f"{ms(t['snnfast'])} against {ms(t[k])}; {notes.get(k, '')}"
            against = k if k in (LOOP, COMPILED) else f"{k}'s neurons"
            yield at_least(f"{work}, snnfast", against, t[k] / t["snnfast"], None, note=note)
    for k, reason in missing.items():
        yield Row(f"{work}, snnfast", k, None, None, True, "x", reason)
    for k in (FUSED, f"snnfast{LAST}", f"{FUSED}{LAST}"):
        yield at_least(f"{work}, {k}", "snnfast", t["snnfast"] / t[k], None, note=ms(t[k]))
    if device == "cpu":
        events = best_of(t, with_events=True)
        rates = f"of the convolutions' inputs {event_rates(nets[events], x)} are not 0"
        same = [best_of(t, SPIKINGJELLY, with_events=True)] if theirs else []
        for k in (best, *theirs, *same):
            note = f"{ms(t[events])} against {ms(t[k])}; {rates}"
            yield at_least(f"{work}, {events}", k, t[k] / t[events], target if k in same else None, note=note)
    limit = 1.25 if device == "cuda" else None
    yield at_most(f"{work}, {best}", FREE, t[best] / t[FREE], limit, note=f"{ms(t[best])} against {ms(t[FREE])}")
    if device == "cpu" and not settings.quick:
        yield from with_kept_memory(name, work, t)
    yield from shares(label, nets, steps, settings)


def best_of(t: dict[str, float], whose: str = "snnfast", with_events: bool = False) -> str:
    """The fastest of ours or theirs, with or without event-driven convolutions."""
    return min((k for k in t if k.startswith(whose) and (BY_EVENTS in k) == with_events), key=lambda k: t[k])


def event_rates(net: nn.Module, x: Tensor) -> str:
    """The share of inputs that are not 0, from the convolution with the fewest to that with the most."""
    net, rates = copy.deepcopy(net), []
    for module in net.modules():
        if isinstance(module, snnfast.events.EventConv2d):
            module.register_forward_pre_hook(
                lambda module, inputs: rates.append((inputs[0] != 0).float().mean().item())
            )
    with torch.no_grad():
        net(x)
    return f"{min(rates):.0%} to {max(rates):.0%}"


def with_kept_memory(name: str, work: str, default: dict[str, float]) -> Iterator[Row]:
    """The same steps where freed memory stays in the process."""
    try:
        t = where_memory_is_kept("network", name)
    except RuntimeError as error:
        yield Row(f"{work}, keep_freed_memory()", "without", None, None, True, "x", str(error))
        return
    best, events = best_of(t), best_of(t, with_events=True)
    rivals = [k for k in t if k.startswith(SPIKINGJELLY) and BY_EVENTS not in k]
    for k in (best, events, *rivals):
        note = f"{ms(t[k])} against {ms(default[k])}"
        yield at_least(f"{work}, {k}, keep_freed_memory()", "without", default[k] / t[k], None, note=note)
    for rival in rivals:
        for ours in (best, events):
            note = f"{ms(t[ours])} against {ms(t[rival])}"
            yield at_least(
                f"{work}, {ours}, both keep_freed_memory()", f"{rival}'s neurons", t[rival] / t[ours], None, note=note
            )


def main() -> None:
    """The times of one network's training steps in a process that keeps the memory it has freed, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network", description=main.__doc__)
    parser.add_argument("name", choices=NETWORKS)
    parser.add_argument("--kept", action="store_true", required=True)
    name = parser.parse_args().name
    keep_memory()
    settings = Settings("cpu", True, False)
    torch.manual_seed(0)
    nets, _ = contenders(name, settings, 64)
    nets = {k: net for k, net in nets.items() if k.startswith(("snnfast", SPIKINGJELLY))}
    x, y = torch.rand(B, 3, SIZE, SIZE), torch.randint(0, 10, (B,))
    steps = {k: training_step(net, x, y, k, torch.float32) for k, net in nets.items()}
    print(json.dumps(take_turns(steps, "cpu", 15 if name == "VGG-11" else 9)))


def shares(
    label: str, nets: dict[str, nn.Module], steps: dict[str, Callable[[], Any]], settings: Settings
) -> Iterator[Row]:
    """The neurons' share of the step, and everything else's."""
    for k in (
        "snnfast",
        FUSED,
        *(n for n in nets if n.startswith(SPIKINGJELLY) and not n.endswith(LAST) and BY_EVENTS not in n),
    ):
        net = nets[k]
        clocks = Breakdown(net, _neurons(net), settings.device)
        whole = clocks.measure(steps[k], 1 if settings.quick else 9)
        clocks.remove()
        parts = {kind: 100 * sum(s) / whole for kind, s in clocks.seconds.items()}
        neurons = parts.pop("neurons")
        rest = ", ".join(f"{kind} {share:.0f} %" for kind, share in parts.items() if share >= 0.5)
        other = 100 - neurons - sum(parts.values())
        forward, backward = clocks.seconds["neurons"]
        note = f"{ms(forward)} forward, {ms(backward)} backward; {rest}, loss, optimiser and the rest {other:.0f} %"
        what = "neurons with their batch norms" if k == FUSED else "neurons"
        target = 10.0 if k == "snnfast" and settings.device == "cpu" else None
        yield at_most(f"{label}: {what}, {k}", "the whole training step", neurons, target, "%", note)


if __name__ == "__main__":
    main()
