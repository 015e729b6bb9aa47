"""LIF neurons of every library in one shape: modules that take ``[T, B, *]`` and start afresh at each call.

``same`` says whether a neuron has the arithmetic of ours (its spikes must then be ours); the others have dynamics of
their own, and their spikes are compared with those of an accelerated copy. What is not installed, or not on this
device, is in the list with the reason.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import snnfast
from snnfast import surrogate
from snnfast.pooling import MaxPool2d

from .workloads import plain_loop

warnings.filterwarnings("ignore", category=SyntaxWarning)

SNNFAST, LOOP, COMPILED, SPIKINGJELLY = "snnfast", "plain loop", "torch.compile of the loop", "SpikingJelly"
COMPILES_TO = 16  # unrolled steps that torch.compile takes in seconds; from T = 64 it needs minutes
TAU = 2.0


@dataclass
class Peer:
    """``make()`` gives a module on ``[T, B, *]``; ``missing`` says why there is none."""

    name: str
    make: Callable[[], nn.Module] | None
    same: bool
    missing: str = ""


class FromStart(nn.Module):
    """A neuron whose every call starts from the initial state, over ``[T, B, *]``."""

    def __init__(self, neuron: nn.Module, call: Callable[[Any, Tensor], Tensor], reset: Callable[[Any], None]) -> None:
        super().__init__()
        self.neuron, self.call, self.restart = neuron, call, reset

    def forward(self, x_seq: Tensor) -> Tensor:
        self.restart(self.neuron)
        return self.call(self.neuron, x_seq)


class Compiled(nn.Module):
    """torch.compile of the plain loop, compiled once for any number of neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = torch.compile(plain_loop, fullgraph=True, dynamic=None)

    def __deepcopy__(self, memo: Any) -> Compiled:
        return self  # it has no state, and a copy would be compiled again

    def forward(self, x_seq: Tensor) -> Tensor:
        x = x_seq.flatten(1)
        torch._dynamo.maybe_mark_dynamic(x, 1)
        return self.loop(x).view_as(x_seq)


class Folded(nn.Module):
    """A neuron on ``[T, B, *]`` where a network has time folded into the batch, ``[T * B, *]``."""

    def __init__(self, neuron: nn.Module, timesteps: int) -> None:
        super().__init__()
        self.neuron, self.timesteps = neuron, timesteps

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(x.unflatten(0, (self.timesteps, -1))).flatten(0, 1)


# ---- the libraries ----
def _call(neuron: Any, x_seq: Tensor) -> Tensor:
    return neuron(x_seq)


def _reset(neuron: Any) -> None:
    neuron.reset()


def ours(backend: str = "auto") -> nn.Module:
    node = snnfast.LIFNode(tau=TAU, surrogate_function=surrogate.ATan(), step_mode="m", backend=backend)
    return FromStart(node, _call, _reset)


def spikingjelly(storage: str | None = None, device: str = "cpu") -> nn.Module:
    from spikingjelly.activation_based import neuron
    from spikingjelly.activation_based import surrogate as kinds

    node = FromStart(neuron.LIFNode(tau=TAU, surrogate_function=kinds.ATan(), step_mode="m"), _call, _reset)
    if storage is not None:
        from spikingjelly.activation_based.precision import PrecisionConfig, prepare_model_for_precision

        prepare_model_for_precision(node, device, PrecisionConfig(mode="bf16", neuron_storage=storage))
    return node


def snntorch() -> nn.Module:
    import snntorch

    def over_time(neuron: Any, x_seq: Tensor) -> Tensor:
        mem, spikes = neuron.init_leaky(), []
        for x in x_seq:
            s, mem = neuron(x, mem)
            spikes.append(s)
        return torch.stack(spikes)

    node = snntorch.Leaky(beta=1 - 1 / TAU, spike_grad=snntorch.surrogate.atan())
    return FromStart(node, over_time, lambda neuron: None)


def norse() -> nn.Module:
    import norse.torch as norse

    return FromStart(norse.LIF(), lambda neuron, x_seq: neuron(x_seq)[0], lambda neuron: None)


def sinabs() -> nn.Module:
    from sinabs.layers import LIF

    def batch_first(neuron: Any, x_seq: Tensor) -> Tensor:
        return neuron(x_seq.movedim(0, 1)).movedim(0, 1)

    return FromStart(LIF(tau_mem=TAU), batch_first, lambda neuron: neuron.reset_states())


def _installed(make: Callable[[], nn.Module]) -> str:
    try:
        make()
    except ImportError as error:
        return f"not installed here ({error})"
    except RuntimeError as error:  # SpikingJelly's, where the device or Triton is not there
        return str(error)
    return ""


def all_of(device: str, timesteps: int, dtype: torch.dtype = torch.float32) -> list[Peer]:
    """Every contender for ours, on this device and at this ``T``."""
    too_long = f"unrolled {timesteps} times, it would compile for minutes" if timesteps > COMPILES_TO else ""
    found = [Peer(LOOP, lambda: ours("reference"), True), Peer(COMPILED, Compiled, True, too_long)]
    missing = _installed(spikingjelly)
    if device == "cpu":
        found.append(Peer(SPIKINGJELLY, spikingjelly, True, missing))
    else:
        for implementation in ("cuda", "triton"):
            reason = missing or _implementation_missing(implementation)
            name = f"{SPIKINGJELLY} {'native' if implementation == 'cuda' else implementation}"
            found.append(Peer(name, spikingjelly, True, reason))
        if dtype == torch.bfloat16:
            config = 'SpikingJelly PrecisionConfig("bf16", neuron_storage="fp32")'
            make = partial(spikingjelly, "fp32", device)
            found.append(Peer(config, make, False, missing or _installed(make)))
    for name, make in (("snnTorch Leaky", snntorch), ("Norse LIF", norse), ("sinabs LIF", sinabs)):
        found.append(Peer(name, make, False, _installed(make)))
    for peer in found:
        if peer.missing:
            peer.make = None
    return found


# ---- SpikingJelly's implementations on a GPU ----
def _implementation_missing(name: str) -> str:
    try:
        from spikingjelly._ops.lif import _selection
    except ImportError as error:
        return f"this SpikingJelly cannot be told which implementation to take ({error})"
    with implementation(f"{SPIKINGJELLY} {name}"):
        try:
            _selection._get_cuda_selection(torch.device("cuda", torch.cuda.current_device()))
        except RuntimeError as error:
            return str(error)
    return ""


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """SpikingJelly's LIF runs what ``name`` ends with; it reads its environment variable only once a process."""
    wanted = {"native": "cuda", "cuda": "cuda", "triton": "triton"}.get(
        name.removeprefix(f"{SPIKINGJELLY} ").partition(",")[0]
    )
    if not name.startswith(SPIKINGJELLY) or wanted is None:
        yield
        return
    from spikingjelly._ops.lif import _selection

    before = _selection._requested
    _selection._requested = wanted
    _selection._selections.clear()
    try:
        yield
    finally:
        _selection._requested = before
        _selection._selections.clear()


# ---- whether the spikes agree ----
def disagreement(
    peer: Peer, timesteps: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[float, str]:
    """Share of spikes that differ from ours (``same``) or from its accelerated copy's, and that in words.

    Raises:
        SystemExit: a neuron of the same arithmetic disagrees in float32 on the CPU, so its time would mean nothing.
    """
    assert peer.make is not None
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(timesteps, 3, 1371, generator=generator).mul_(1.5).add_(0.5).to(dtype).to(device)
    theirs = peer.make().to(device)
    if peer.same:
        reference, against = ours().to(device), "ours"
    else:
        reference, against = copy.deepcopy(theirs), "its accelerated copy's"
        if not snnfast.accelerate(reference).replaced:
            reference, against = ours().to(device), "ours (another dynamics)"
    with torch.no_grad(), implementation(peer.name):
        got, want = theirs(x).detach(), reference(x).detach()
    rate = (got != want).double().mean().item()
    if peer.same and rate and device == "cpu" and dtype == torch.float32:
        raise SystemExit(f"{peer.name} and snnfast disagree on {rate:.1e} of the spikes: nothing timed")
    return rate, f"spikes equal {against}" if not rate else f"{rate:.0e} of the spikes are not {against}"


def with_torch_pooling(net: nn.Module) -> nn.Module:
    """``net`` with PyTorch's max-pooling in place of snnfast's, which gives the same."""
    for module in net.modules():
        if type(module) is MaxPool2d:
            module.__class__ = nn.MaxPool2d
    return net
