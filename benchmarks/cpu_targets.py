"""Every row of the CPU's table of targets: what is measured, against what, the target, and whether it is met."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import snnfast
from snnfast import functional, surrogate
from snnfast.analysis import saved_bytes

from .measure import compare, per_call
from .rows import Row, at_least, at_most, ms
from .workloads import (
    Preallocated,
    check_spikes,
    forward_backward,
    fused,
    plain_loop,
    random_input,
    spikingjelly,
)

LARGE = (4, 1 << 24)
MIDDLE = ((4, 1 << 20), (16, 1 << 18))


def bandwidth() -> Iterator[Row]:
    """Kernels alone, beyond the caches, against copy and add."""
    T, N = LARGE
    x, grad = random_input(T, N), torch.randn(T, N)
    kernel, y, z = Preallocated(x), torch.empty_like(x), torch.empty_like(x)
    t = compare({"copy": lambda: y.copy_(x), "forward": kernel.forward})
    yield at_least(
        f"forward, preallocated, [{T}, 2^24]", "y.copy_(x)", 100 * t["copy"] / t["forward"], 150, "%",
        f"{ms(t['forward'])} against {ms(t['copy'])}",
    )  # fmt: skip
    t = compare({"add": lambda: torch.add(x, grad, out=z), "backward": lambda: kernel.backward(grad)})
    yield at_least(
        f"backward, preallocated, [{T}, 2^24]", "torch.add(x, g, out=z)", 100 * t["add"] / t["backward"], 115, "%",
        f"{ms(t['backward'])} against {ms(t['add'])}",
    )  # fmt: skip
    t = compare({"clone": lambda: x.clone(), "forward": lambda: fused(x)})
    yield at_least("public forward, same size", "x.clone()", t["clone"] / t["forward"], 2, note=f"{ms(t['forward'])}")
    leaf = x.requires_grad_()
    s = fused(leaf)
    t = compare(
        {"add": lambda: x.detach() + grad, "backward": lambda: torch.autograd.grad(s, leaf, grad, retain_graph=True)}
    )
    yield at_least("public backward, same size", "x + g", t["add"] / t["backward"], 2, note=f"{ms(t['backward'])}")


def against_loops() -> Iterator[Row]:
    """Public calls against the plain loop, SpikingJelly and torch.compile."""
    theirs = spikingjelly()
    for T, N in MIDDLE:
        x, grad = random_input(T, N), torch.randn(T, N)
        name = f"[{T}, 2^{N.bit_length() - 1}]"
        check_spikes(fused, x)
        compiled = torch.compile(plain_loop, fullgraph=True, dynamic=False)
        with torch.no_grad():
            t = compare({"loop": lambda: plain_loop(x), "fused": lambda: fused(x), "compiled": lambda: compiled(x)})
        yield at_least(
            f"forward {name}",
            "plain loop",
            t["loop"] / t["fused"],
            15,
            note=f"{ms(t['fused'])} against {ms(t['loop'])}",
        )
        yield at_least(
            f"forward {name}",
            "torch.compile of it",
            t["compiled"] / t["fused"],
            1.8,
            note=f"against {ms(t['compiled'])}",
        )
        contenders: dict[str, Callable[[], Any]] = {
            "loop": forward_backward(plain_loop, x, grad),
            "fused": forward_backward(fused, x, grad),
            "compiled": forward_backward(compiled, x, grad),
            "copy + add": lambda: (x.clone(), x + grad),
        }
        y, z = torch.empty_like(x), torch.empty_like(x)
        contenders["copy + add, preallocated"] = lambda: (y.copy_(x), torch.add(x, grad, out=z))
        if theirs is not None:
            check_spikes(theirs, x)
            contenders["spikingjelly"] = forward_backward(theirs, x, grad)
        t = compare(contenders, seconds=0.5)
        work = f"forward + backward {name}"
        yield at_least(work, "plain loop", t["loop"] / t["fused"], 25, note=f"{ms(t['fused'])} against {ms(t['loop'])}")
        yield at_most(
            work, "x.clone() and x + g", t["fused"] / t["copy + add"], 1.2, note=f"against {ms(t['copy + add'])}"
        )
        yield at_most(
            work, "copy_ and add(out=)", t["fused"] / t["copy + add, preallocated"], 1.2,
            note="these allocate nothing; the public call allocates its outputs",
        )  # fmt: skip
        peer = t.get("spikingjelly")
        note = "SpikingJelly is not installed" if peer is None else f"against {ms(peer)}"
        yield at_least(work, "SpikingJelly", None if peer is None else peer / t["fused"], 25, note=note)
        yield at_least(work, "torch.compile of it", t["compiled"] / t["fused"], 3, note=f"against {ms(t['compiled'])}")


def long_sequences() -> Iterator[Row]:
    """The same number of neuron-steps at T = 64 and 512."""
    kernels = {T: Preallocated(random_input(T, (1 << 22) // T)) for T in (4, 64, 512)}
    t = compare({str(T): k.forward for T, k in kernels.items()})
    for T in (64, 512):
        yield at_most(f"forward, T = {T}, 2^22 neuron-steps", "T = 4", t[str(T)] / t["4"], 1.3)
    kernel = kernels[512]
    x, grad, z = kernel.x, torch.randn_like(kernel.x), torch.empty_like(kernel.x)
    t = compare({"add": lambda: torch.add(x, grad, out=z), "backward": lambda: kernel.backward(grad)})
    yield at_least(
        "backward, T = 512", "torch.add(x, g, out=z)", 100 * t["add"] / t["backward"], 65, "%", ms(t["backward"])
    )
    inputs = {"dense": x, "2 % non-zero": x * (torch.rand_like(x) < 0.02), "silent": torch.zeros_like(x)}
    kernels = {name: Preallocated(value) for name, value in inputs.items()}
    t = compare({name: k.forward for name, k in kernels.items()})
    t2 = compare({name: (lambda k=k: k.backward(grad)) for name, k in kernels.items()})
    for name in ("2 % non-zero", "silent"):
        yield at_most(f"forward, T = 512, {name}", "dense input", t[name] / t["dense"], 1.2)
        yield at_most(f"backward, T = 512, {name}", "dense input", t2[name] / t2["dense"], 1.2)


def dtypes_and_surrogates() -> Iterator[Row]:
    for T, N in MIDDLE:
        x = random_input(T, N)
        half = Preallocated(x.bfloat16(), tau=3.0)
        single = Preallocated(x, tau=3.0)
        t = compare({"float32": single.forward, "bf16": half.forward})
        yield at_least(
            f"bf16 forward, tau = 3, [{T}, 2^{N.bit_length() - 1}]",
            "float32",
            t["float32"] / t["bf16"],
            1.4,
            note=ms(t["bf16"]),
        )
    T, N = MIDDLE[0]
    x, grad = random_input(T, N), torch.randn(T, N)
    kinds = (surrogate.ATan, surrogate.Sigmoid, surrogate.PiecewiseExp, surrogate.Erf)
    t = compare({k.__name__: forward_backward(fused, x, grad, kind=k()) for k in kinds}, seconds=0.5)
    for kind in kinds[1:]:
        yield at_most(
            f"forward + backward, {kind.__name__}", "ATan", t[kind.__name__] / t["ATan"], 1.3, note=ms(t[kind.__name__])
        )


def readers() -> Iterator[Row]:
    """A layer that reads the spikes right after the neuron, with the default stores and with caching ones."""
    from snnfast import _C

    default = _C.stream_stores_from()

    def with_threshold(bytes_: int, call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            _C.set_stream_stores_from(bytes_)
            try:
                call()
            finally:
                _C.set_stream_stores_from(default)

        return run

    for megabytes in (1, 4, 16, 64):
        linear, x = nn.Linear(256, 16), random_input(4, megabytes << 16).view(4, -1, 256)

        def call(linear: nn.Linear = linear, x: Tensor = x) -> None:
            for _ in range(4):  # so that most calls find the caches as a call of their own kind has left them
                linear(fused(x))

        with torch.no_grad():
            t = compare(
                {"default": with_threshold(default, call), "cached": with_threshold(1 << 60, call)}, seconds=0.6
            )
        yield at_most(
            f"Linear after {megabytes} MB of spikes",
            "non-streaming stores",
            t["default"] / t["cached"],
            1.05,
            note=ms(t["default"] / 4),
        )


def overhead() -> Iterator[Row]:
    x = torch.randn(4, 8)
    node = snnfast.LIFNode(step_mode="m")
    with torch.no_grad():
        yield at_most("no-grad call of LIFNode on [4, 8]", "host time", per_call(lambda: node(x)) * 1e6, 12, "us")
        yield at_most(
            "no-grad call of lif_multi_step on [4, 8]",
            "host time",
            per_call(lambda: functional.lif_multi_step(x)) * 1e6,
            12,
            "us",
        )


def memory() -> Iterator[Row]:
    """What a training forward keeps until its backward."""
    theirs = spikingjelly()
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        x = random_input(4, 1 << 16).to(dtype).requires_grad_()
        loop = saved_bytes(plain_loop, x) / x.numel()
        note = f"plain loop {loop:.3g} B"
        if theirs is not None and dtype == torch.float32:
            note += f", SpikingJelly {saved_bytes(theirs, x) / x.numel():.3g} B"
        work = f"kept for backward per neuron-step, {str(dtype).removeprefix('torch.')}"
        yield at_most(work, "the size of x", saved_bytes(fused, x) / x.numel(), size, "B", note)


GROUPS: dict[str, Callable[[], Iterator[Row]]] = {
    "bandwidth": bandwidth,
    "loops": against_loops,
    "long": long_sequences,
    "kinds": dtypes_and_surrogates,
    "readers": readers,
    "overhead": overhead,
    "memory": memory,
}
