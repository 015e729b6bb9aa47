"""The neuron calls that are timed: snnfast's, the plain loop (the package's own reference) and the peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from snnfast import backends, dynamics, functional, surrogate
from snnfast.dynamics import LIF, Constants, Inputs, Parameters

ATAN = surrogate.ATan()


def random_input(T: int, N: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Random input under which about half of the neurons fire at some step; never zeros."""
    generator = torch.Generator(device).manual_seed(T * 31 + N)
    return torch.randn(T, N, device=device, generator=generator).mul_(1.2).add_(0.3).to(dtype)


def plain_loop(x: Tensor, tau: float = 2.0, kind: Any = ATAN) -> Tensor:
    """The baseline: the package's reference loop, for bf16 as it is run in float32."""
    return dynamics.multi_step(LIF, x, 0.0, Parameters(1.0, 0.0, kind, tau))[0]


def fused(x: Tensor, tau: float = 2.0, kind: Any = ATAN, backend: str = "auto") -> Tensor:
    return functional.lif_multi_step(x, 0.0, tau, surrogate_function=kind, backend=backend)[0]


def spikingjelly() -> Callable[..., Tensor] | None:
    """SpikingJelly's functional LIF, or None where it is not installed."""
    try:
        from spikingjelly.activation_based import functional as theirs
        from spikingjelly.activation_based import surrogate as their_surrogate
    except ImportError:
        return None
    kind = their_surrogate.ATan()

    def call(x: Tensor, tau: float = 2.0) -> Tensor:
        v = torch.zeros_like(x[0], dtype=dynamics.state_dtype(x.dtype))
        return theirs.lif_multi_step(x, v, tau, True, 1.0, 0.0, kind)[0]

    return call


def forward_backward(call: Callable[..., Tensor], x: Tensor, grad: Tensor, **kwargs: Any) -> Callable[[], None]:
    """A training step of the neuron alone, through autograd."""
    leaf = x.detach().requires_grad_()

    def run() -> None:
        torch.autograd.grad(call(leaf, **kwargs), leaf, grad)

    return run


def check_spikes(call: Callable[..., Tensor], x: Tensor, **kwargs: Any) -> None:
    """Refuse to time what is wrong: the spikes of a call must be the plain loop's on the CPU."""
    sample = x[:, :4099]
    want = plain_loop(sample.cpu(), **kwargs)
    with torch.no_grad():
        got = call(sample.contiguous(), **kwargs).cpu()
    if not torch.equal(got, want):
        raise SystemExit(f"{call} and the plain loop disagree on {(got != want).sum()} spikes: nothing timed")
    share = want.float().amax(0).mean().item()
    if not 0.2 < share < 1.0:
        raise SystemExit(f"{share:.0%} of the neurons fire: not a realistic load")


class Preallocated:
    """The kernels alone, with outputs that exist already: what the bandwidth targets measure."""

    def __init__(self, x: Tensor, tau: float = 2.0, kind: int = 1, alpha: float = 2.0) -> None:
        self.constants = Constants(LIF.id, kind, dynamics.DECAY_INPUT, 1.0, 0.0, tau, alpha, 1.0, 0.0, 0.0)
        self.kernels = backends.KERNELS[backends.choose("auto", x.device)]
        self.x, self.s, self.grad_x = x, torch.empty_like(x), torch.empty_like(x)
        self.inputs = Inputs(x)
        self.v = torch.empty(x.shape[1:], dtype=dynamics.state_dtype(x.dtype), device=x.device)

    def forward(self) -> None:
        self.kernels.forward(self.constants, self.inputs, self.s, self.v, None, None)

    def backward(self, grad_s: Tensor) -> None:
        grads = grad_s, None, None, None
        self.kernels.backward(self.constants, grads, self.inputs, self.grad_x, *(None,) * 6)
