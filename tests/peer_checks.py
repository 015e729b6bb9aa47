"""What the tests of the adapters share: one configuration built twice, one of them accelerated, driven alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import snnfast


def tensors(nest: Any) -> list[Tensor]:
    return [t for t in tree_flatten(nest)[0] if isinstance(t, Tensor)]


def assert_close(a: Tensor | None, b: Tensor | None, what: str, tolerance: float = 1e-5) -> None:
    assert (a is None) == (b is None), what
    if a is not None and b is not None:
        assert a.shape == b.shape, what
        # One value for all neurons has the sum of all their gradients, which may cancel to next to nothing.
        scale = max(a.abs().max().item(), 0.5 if a.numel() == 1 else 0.0)
        assert (a - b).abs().max().item() <= tolerance * max(scale, 1e-12), f"{what}: {(a - b).abs().max()} of {scale}"


def learnt_of(module: nn.Module) -> list[Tensor]:
    """Parameters, and those that Norse keeps in ``p`` without registering them."""
    found = list(module.parameters())
    for m in module.modules():
        found += [t for t in tree_flatten(tuple(getattr(m, "p", ())))[0] if isinstance(t, nn.Parameter)]
    return [p for p in found if p.requires_grad]


def assert_same(
    make: Callable[[], nn.Module],
    drive: Callable[[nn.Module, Tensor], Any],
    x: Tensor,
    tolerance: float = 1e-5,
) -> None:
    """``make()`` twice, one accelerated: all outputs bit for bit, all gradients to the tolerance."""
    results = []
    for accelerated in (False, True):
        module = make()
        if accelerated:
            report = snnfast.accelerate(module)
            assert report.replaced, str(report)
            assert not report.left, str(report)
        leaf = x.clone().requires_grad_()
        outputs = tensors(drive(module, leaf))
        generator = torch.Generator().manual_seed(3)
        grads = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
        pairs = [(t, g) for t, g in zip(outputs, grads, strict=True) if t.requires_grad]
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        results.append((outputs, leaf.grad, [p.grad for p in learnt_of(module)], module))
    (outputs, grad_x, grads, plain), (outputs_2, grad_x_2, grads_2, fused) = results
    assert len(outputs) == len(outputs_2)
    for k, (a, b) in enumerate(zip(outputs, outputs_2, strict=True)):
        assert a.dtype == b.dtype
        assert a.requires_grad == b.requires_grad
        assert torch.equal(a, b), f"output {k}: {(a != b).sum()} of {a.numel()} differ"
    assert_close(grad_x, grad_x_2, "grad_x", tolerance)
    for k, (a, b) in enumerate(zip(grads, grads_2, strict=True)):
        assert_close(a, b, f"gradient of parameter {k}", tolerance)
    for (name, a), (name_2, b) in zip(plain.named_buffers(), fused.named_buffers(), strict=True):
        assert name == name_2
        assert torch.equal(a, b), name


def step_loop(module: nn.Module, x_seq: Tensor) -> list[Any]:
    """A neuron that keeps its own state, called once for each step."""
    return [module(x) for x in x_seq]
