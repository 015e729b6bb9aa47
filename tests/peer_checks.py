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
        scale = a.abs().max().item()
        assert (a - b).abs().max().item() <= tolerance * max(scale, 1e-12), f"{what}: {(a - b).abs().max()} of {scale}"


def learnt_places(module: nn.Module) -> list[tuple[Any, str, nn.Parameter]]:
    """``(module, name, parameter)`` of what is learnt, of what Norse keeps in ``p`` without registering it too."""
    found = []
    for m in module.modules():
        named = [*m.named_parameters(recurse=False), *getattr(getattr(m, "p", None), "_asdict", dict)().items()]
        found += [(m, name, t) for name, t in named if isinstance(t, nn.Parameter) and t.requires_grad]
    return found


def learnt_of(module: nn.Module) -> list[Tensor]:
    return [t for _, _, t in learnt_places(module)]


def _set(module: Any, name: str, value: Any) -> None:
    if name in module._parameters:
        setattr(module, name, value)
    else:
        module.p = module.p._replace(**{name: value})


def in_double(module: nn.Module, step: torch.Size) -> list[int]:
    """Make a neuron compute in float64, with each parameter that is one number given to each neuron on its own.

    Returns which of ``learnt_places`` these are.
    """
    module.double()
    for m in module.modules():
        if hasattr(m, "p"):
            own = {k: t for k, t in m.p._asdict().items() if isinstance(t, Tensor)}
            m.p = m.p._replace(
                **{k: nn.Parameter(t.detach().double()) if isinstance(t, nn.Parameter) else t.detach().double()
                   for k, t in own.items()}
            )  # fmt: skip
    places = learnt_places(module)
    wide = [k for k, (_, _, t) in enumerate(places) if t.numel() == 1 and t.dim() <= len(step)]
    for k in wide:
        m, name, t = places[k]
        _set(m, name, nn.Parameter(t.detach().reshape(()).expand(step).clone()))
    return wide


def _run(module: nn.Module, drive: Callable[[nn.Module, Tensor], Any], x: Tensor) -> tuple[list[Tensor], Tensor]:
    leaf = x.clone().requires_grad_()
    outputs = tensors(drive(module, leaf))
    pairs = _with_gradients(outputs)
    torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
    return outputs, leaf.grad


def _with_gradients(outputs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The differentiable outputs, each with the same random gradient in every run."""
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
    return [(t, g) for t, g in zip(outputs, grads, strict=True) if t.requires_grad]


def assert_sums_are_true(
    make: Callable[[], nn.Module],
    drive: Callable[[nn.Module, Tensor], Any],
    x: Tensor,
    step: torch.Size,
    outputs: list[Tensor],
    gradients: list[Tensor | None],
    own: list[Tensor | None],
) -> list[int]:
    """The gradients of values that all neurons share (which ones is returned) against float64 of the library's code.

    Unless they have the bits of the library's ``own`` ones: then its own code ran, and how exact that is is its affair.

    Such a gradient is the sum of all neurons' and may cancel to next to nothing: in these tests the libraries' own ones
    are up to 3e-5 off, and the fused ones up to 1e-4, as parts of the sum. So they are held to 1e-5 of the absolute
    terms that were added up (5e-6 was seen); where a neuron's own steps cancel, to some float32 roundings for each step
    of what each output adds by itself.
    """
    module = make()
    wide = in_double(module, step)
    if not wide:
        return []
    true_outputs = tensors(drive(module, x.double().requires_grad_()))
    for a, b in zip(outputs, true_outputs, strict=True):
        assert (a - b).abs().max() < 1e-3, "a spike differs in float64: choose another seed"
    places = learnt_places(module)
    by_output = [
        torch.autograd.grad(t, [places[k][2] for k in wide], g, retain_graph=True, allow_unused=True)
        for t, g in _with_gradients(true_outputs)
    ]
    for k, parts in zip(wide, zip(*by_output, strict=True), strict=True):
        by_one = [t for t in parts if t is not None]
        terms, found = sum(by_one) if by_one else None, gradients[k]
        if found is not None and own[k] is not None and torch.equal(found, own[k]):
            continue
        if terms is None or found is None:
            assert not (terms is not None and terms.any()), places[k][1]
            continue
        error, scale = abs(found.sum().item() - terms.sum().item()), terms.abs().sum().item()
        added = sum(t.abs().sum().item() for t in by_one)
        assert error <= max(1e-5 * scale, (len(x) + 3) * 2**-22 * added), f"{places[k][1]}: {error} of {scale}"
    return wide


def assert_same(
    make: Callable[[], nn.Module],
    drive: Callable[[nn.Module, Tensor], Any],
    x: Tensor,
    tolerance: float = 1e-5,
    step: torch.Size | None = None,
) -> None:
    """``make()`` twice, one accelerated: all outputs bit for bit, all gradients to the tolerance.

    ``step`` is the shape of one time step's potentials if it is not that of ``x[0]``.
    """
    results = []
    for accelerated in (False, True):
        module = make()
        if accelerated:
            report = snnfast.accelerate(module)
            assert report.replaced, str(report)
            assert not report.left, str(report)
        results.append((*_run(module, drive, x), [p.grad for p in learnt_of(module)], module))
    (outputs, grad_x, grads, plain), (outputs_2, grad_x_2, grads_2, fused) = results
    assert len(outputs) == len(outputs_2)
    for k, (a, b) in enumerate(zip(outputs, outputs_2, strict=True)):
        assert a.dtype == b.dtype
        assert a.requires_grad == b.requires_grad
        assert torch.equal(a, b), f"output {k}: {(a != b).sum()} of {a.numel()} differ"
    assert_close(grad_x, grad_x_2, "grad_x", tolerance)
    sums = assert_sums_are_true(make, drive, x, x.shape[1:] if step is None else step, outputs_2, grads_2, grads)
    for k, (a, b) in enumerate(zip(grads, grads_2, strict=True)):
        if a is None or b is None or k not in sums:
            assert_close(a, b, f"gradient of parameter {k}", tolerance)
    for (name, a), (name_2, b) in zip(plain.named_buffers(), fused.named_buffers(), strict=True):
        assert name == name_2
        assert torch.equal(a, b), name


def step_loop(module: nn.Module, x_seq: Tensor) -> list[Any]:
    """A neuron that keeps its own state, called once for each step."""
    return [module(x) for x in x_seq]
