"""Host time of tiny calls: what a call costs before any work, ours as module, function and op, and the peers'.

``[T=4, 1, 8]``. Without gradients the neuron's state goes on from call to call; with them every call starts afresh, the
reset included. On a GPU the kernels run behind, and the clock reads what Python spends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import snnfast
from snnfast import backends, dynamics, functional, surrogate

from . import peer_neurons
from .measure import per_call, synchronize
from .rows import Row, Settings, at_most

T, N = 4, 8
TARGET = 12.0  # us, of a forward without gradients
MODULE, OP = "snnfast.LIFNode", "torch.ops.snnfast.multi_step"
Call = tuple[Callable[[Tensor], Any], Callable[[], Any]]  # and the reset


def nothing() -> None:
    return None


def ours(device: str) -> dict[str, Call]:
    """The ways in, from the outermost to the op."""
    kind, tau = surrogate.ATan(), peer_neurons.TAU
    node = snnfast.LIFNode(tau=tau, surrogate_function=kind, step_mode="m")
    constants = functional.constants_of(
        dynamics.LIF, kind, 0.0, tau=tau, decay_input=True, v_threshold=1.0, v_reset=0.0, detach_reset=False
    )
    op, backend = torch.ops.snnfast.multi_step.default, backends.choose("auto", torch.device(device))

    def function(x: Tensor) -> Any:
        return functional.lif_multi_step(x, 0.0, tau, surrogate_function=kind)[0]

    return {
        MODULE: (node, node.reset),
        "functional.lif_multi_step": (function, nothing),
        OP: (lambda x: op(x, *(None,) * 6, *constants, backend), nothing),
    }


def measure(settings: Settings) -> Iterator[Row]:
    device, kinds = settings.device, {"without gradients": TARGET, "forward + backward": None}
    if not settings.present:
        for kind, target in kinds.items():
            yield settings.absent(f"{MODULE}, {kind}", "host time", target, False, "us")
        return
    calls = 20 if settings.quick else 2000
    x, grad = torch.randn(T, 1, N, device=device), torch.randn(T, 1, N, device=device)
    leaf = x.clone().requires_grad_()
    found, missing, notes = ours(device), {}, {}
    for peer in peer_neurons.all_of(device, T):
        if peer.make is None:
            missing[peer.name] = peer.missing
            continue
        notes[peer.name] = peer_neurons.disagreement(peer, T, device)[1]
        module: Any = peer.make().to(device)
        if isinstance(module, peer_neurons.FromStart):  # without the wrapper that only the other benchmarks need
            found[peer.name] = (
                lambda x, m=module: m.call(m.neuron, x),
                lambda m=module: m.restart(m.neuron),
            )
        else:
            found[peer.name] = (module, nothing)
    for kind, target in kinds.items():
        for name, (call, reset) in found.items():

            def training(call: Callable[..., Any] = call, reset: Callable[[], Any] = reset) -> None:
                reset()
                torch.autograd.grad(call(leaf), leaf, grad)

            with peer_neurons.implementation(name):
                reset()
                if target is not None:
                    with torch.no_grad():
                        seconds = per_call(lambda: call(x), calls, 5)
                elif name == OP:
                    continue  # it has no gradients: the function and the module add them
                else:
                    seconds = per_call(training, max(calls // 4, 5), 5)
            synchronize(device)
            limit = target if name == MODULE else None
            yield at_most(f"{name}, {kind}", "host time", seconds * 1e6, limit, "us", notes.get(name, ""))
    for name, reason in missing.items():
        yield Row(name, "host time", None, None, False, "us", reason)
