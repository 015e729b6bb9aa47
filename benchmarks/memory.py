"""``python -m benchmarks.memory``: what a training step keeps for its backward, beside SpikingJelly's neurons.

Spiking ResNet-18 and VGG-11 of :mod:`snnfast.models`, CIFAR shapes, T = 4. Counted are the bytes that autograd saves,
each storage once, without parameters and buffers; max-pooling is PyTorch's, as on a GPU, but in the rows that say
otherwise (snnfast's own on a CPU keeps a byte for each output, PyTorch's its input and an int64). SpikingJelly's
neurons stand in the same networks:

* ``torch``: its CPU implementation, as it is counted here;
* ``GPU``: its native and Triton kernels keep the neuron's input x and its charge h, [T, N] each, h in float32. They
  need a GPU, so a neuron that saves just these two stands for them: kept = kept(snnfast) + 4 bytes * T * N per neuron.
* ``GPU, h alone``: its Triton kernels under a ``PrecisionConfig``, which forgo second derivatives, keep h only:
  kept = kept(snnfast) + (4 bytes - bytes of x) * T * N per neuron.

And a sequence of T = 64, whole and in chunks: the allocator's peak over the step, as torch.profiler sees it. Counting
is not timing: other work on the machine does no harm.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import snnfast
from snnfast import functional
from snnfast.analysis import saved_bytes
from snnfast.pooling import MaxPool2d

from .cpu_targets import Row
from .measure import RESULTS, environment
from .peer_neurons import with_torch_pooling

T, B, LONG, CHUNK = 4, 2, 64, 8
NETWORKS: dict[str, Callable[..., Any]] = {"ResNet-18": snnfast.models.resnet18, "VGG-11": snnfast.models.vgg11}
MIB, NO_TARGET = 2**20, float("inf")
ATAN = snnfast.surrogate.ATan()


# ---- SpikingJelly's neurons in our networks ----
class _SavesInputAndCharge(torch.autograd.Function):
    """What SpikingJelly's kernels keep; no gradient is asked of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, T: int, input_too: bool) -> Tensor:
        s, _, _ = functional.lif_multi_step(x.unflatten(0, (T, -1)), surrogate_function=ATAN)
        h = torch.empty_like(x, dtype=torch.float32)
        ctx.save_for_backward(*((x, h) if input_too else (h,)))
        return s.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


class TheirNeuronOnGpu(nn.Module):
    """Stands for SpikingJelly's LIFNode on a GPU: keeps as many bytes."""

    def __init__(self, timesteps: int, input_too: bool = True) -> None:
        super().__init__()
        self.timesteps, self.input_too = timesteps, input_too

    def forward(self, x: Tensor) -> Tensor:
        return _SavesInputAndCharge.apply(x, self.timesteps, self.input_too)


class TheirNeuron(nn.Module):
    """SpikingJelly's LIFNode, multi-step; on the CPU it is a torch loop."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        from spikingjelly.activation_based import neuron, surrogate

        self.timesteps = timesteps
        self.node = neuron.LIFNode(surrogate_function=surrogate.ATan(), step_mode="m")

    def reset(self) -> None:
        self.node.reset()

    def forward(self, x: Tensor) -> Tensor:
        return self.node(x.unflatten(0, (self.timesteps, -1))).flatten(0, 1)


# ---- what is counted ----
def _network(
    make: Callable[..., Any], dtype: torch.dtype, neuron: Any = None, timesteps: int = T, own_pooling: bool = False
) -> nn.Module:
    torch.manual_seed(0)
    own = {"surrogate_function": ATAN} if neuron is None else {"neuron": neuron}
    net = make(timesteps=timesteps, **own).to(dtype)
    return net if own_pooling else with_torch_pooling(net)


def kept(make: Callable[..., Any], dtype: torch.dtype) -> dict[str, int]:
    """Bytes kept for the backward of one step, by variant."""
    x = torch.rand(B, 3, 32, 32, dtype=dtype)
    found = {}
    with contextlib.suppress(ImportError):
        found["SpikingJelly, torch"] = saved_bytes(_network(make, dtype, TheirNeuron), x)
    found["SpikingJelly, GPU"] = saved_bytes(_network(make, dtype, TheirNeuronOnGpu), x)
    of_h = functools.partial(TheirNeuronOnGpu, input_too=False)
    found["SpikingJelly, GPU, h alone"] = saved_bytes(_network(make, dtype, of_h), x)
    pools = any(isinstance(m, MaxPool2d) for m in _network(make, dtype, own_pooling=True).modules())
    for fused, own_pooling in itertools.product((False, True), (False, True) if pools else (False,)):
        net = _network(make, dtype, own_pooling=own_pooling)
        if fused:
            snnfast.fuse(net)
        name = ("snnfast + fuse" if fused else "snnfast") + (" + max-pooling of its own" if own_pooling else "")
        found[name] = saved_bytes(net, x)
        with snnfast.packed_spikes():
            found[f"{name} + packed_spikes"] = saved_bytes(net, x)
    return found


def check_gradients(make: Callable[..., Any]) -> None:
    """Raise unless spikes packed into bits give the bits of the gradients without."""
    x = torch.rand(B, 3, 32, 32)
    for fused in (False, True):
        plain = _network(make, torch.float32)
        if fused:
            snnfast.fuse(plain)
        packed = copy.deepcopy(plain)
        want = plain(x)
        with snnfast.packed_spikes():
            y = packed(x)
        for output in (want, y):
            output.square().sum().backward()
        if not torch.equal(y, want):
            raise AssertionError("the outputs differ")
        for (name, p), q in zip(plain.named_parameters(), packed.parameters(), strict=True):
            if not torch.equal(p.grad, q.grad):  # type: ignore[arg-type]
                raise AssertionError(f"the gradient of {name} differs")


def peak(net: nn.Module, step: Callable[[], Any]) -> int:
    """The most bytes that the CPU's allocator had given out at once during ``step``, beyond those at its beginning."""
    from torch.profiler import ProfilerActivity, profile

    step()  # what is allocated once and for all
    net.zero_grad()
    functional.reset_net(net)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    found: Any = profiler.profiler
    events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def peaks() -> Iterator[tuple[str, int]]:
    """Peak memory of a training step of VGG-11 over ``LONG`` time steps, by variant."""
    x = torch.rand(B, 3, 32, 32)
    contexts: dict[str, Any] = {"": contextlib.nullcontext, " + packed_spikes": snnfast.packed_spikes}
    for fused in (False, True):
        net = _network(NETWORKS["VGG-11"], torch.float32, timesteps=LONG)
        if fused:
            snnfast.fuse(net)
        calls: dict[str, Callable[[], Any]] = {"snnfast + fuse" if fused else "snnfast": lambda net=net: net(x)}
        calls[f"{next(iter(calls))} + chunked, {CHUNK} at a time"] = lambda net=net: snnfast.chunked(
            net, x, CHUNK, chunk_statistics=True
        )
        for name, call in calls.items():
            for more, context in contexts.items():
                if more and "chunked" in name:
                    continue

                def step(call: Any = call, context: Any = context) -> None:
                    with context():
                        y = call()
                    y.square().mean().backward()

                yield name + more, peak(net, step)


def rows() -> Iterator[Row]:
    """Everything as ratios to SpikingJelly on the GPU, and for the long sequence to snnfast alone."""
    for dtype in (torch.float32, torch.bfloat16):
        for name, make in NETWORKS.items():
            if dtype == torch.float32:
                check_gradients(make)
            found = kept(make, dtype)
            theirs = found["SpikingJelly, GPU"]
            for variant, size in found.items():
                target = 0.5 if variant == "snnfast + fuse + packed_spikes" else NO_TARGET
                note = f"{size / MIB:.1f} MiB against {theirs / MIB:.1f} MiB"
                if target == 0.5:
                    note += "; gradients of the same bits as without packing" if dtype == torch.float32 else ""
                work = f"{name}, T={T}, B={B}, {str(dtype).removeprefix('torch.')}: {variant}"
                yield Row(work, "SpikingJelly, GPU", size / theirs, target, False, "x", note)
    found = dict(peaks())
    for variant, size in found.items():
        work = f"VGG-11, T={LONG}, B={B}, float32, peak of a step: {variant}"
        note = f"{size / MIB:.0f} MiB against {found['snnfast'] / MIB:.0f} MiB"
        yield Row(work, "snnfast", size / found["snnfast"], NO_TARGET, False, "x", note)


def markdown(found: list[Row], device: dict[str, Any]) -> str:
    lines = ["| work | against | kept | | |", "|---|---|---|---|---|"]
    for row in found:
        target = "" if row.target == NO_TARGET else f"target ≤ {row.target:g}: {'met' if row.met else 'missed'}"
        lines.append(f"| {row.work} | {row.against} | {row.value:.2f} x | {row.note} | {target} |")
    facts = ", ".join(f"{k}: {v}" for k, v in device.items())
    about = str(__doc__).split("\n", 1)[1].strip()
    return f"# Memory of a training step\n\n{about}\n\n{facts}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    arguments = parser.parse_args()
    device = environment()
    found = []
    for row in rows():
        found.append(row)
        print(f"{row.work:<80} {row.value:.2f}x  {row.note}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows_ = [r.as_dict() | ({"target": None, "met": None} if r.target == NO_TARGET else {}) for r in found]
    record = {"environment": device, "rows": rows_}
    (arguments.out / "memory.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.out / "memory.md").write_text(markdown(found, device))
    print(f"written to {arguments.out / 'memory'}.json, .md")


if __name__ == "__main__":
    main()
