"""``accelerate``: the neurons of SpikingJelly, snnTorch, Norse and sinabs inside a model, converted in place.

What each adapter computes is in ``docs/adapters.md``.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .. import base, network
from .._notices import say_once
from .adapters.base import Fused, find, fused_class, replaced_by

__all__ = ["Report", "Verification", "accelerate", "restore", "verify"]


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


class Neuron(NamedTuple):
    """One line of a report: a neuron, and why it was left, if it was."""

    name: str
    kind: str
    reason: str = ""


@dataclass
class Report:
    """What :func:`accelerate` did; prints as a table.

    Attributes:
        replaced: neurons that run fused from now on.
        left: neurons of a known library that stayed as they were, with the reason.
    """

    replaced: list[Neuron] = field(default_factory=list)
    left: list[Neuron] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.replaced and not self.left:
            return "no neurons of SpikingJelly, snnTorch, Norse or sinabs found"
        rows = [("neuron", "class", "")]
        rows += [(n.name, n.kind, "fused") for n in self.replaced]
        rows += [(n.name, n.kind, f"left: {n.reason}") for n in self.left]
        return _table(rows)


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _library_class(module: Any) -> str:
    cls = type(module).snnfast_replaced if isinstance(module, Fused) else type(module)
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def accelerate(model: nn.Module) -> Report:
    """Make the neurons of SpikingJelly, snnTorch, Norse and sinabs in ``model`` run as fused kernels, in place.

    Each neuron stays the same object and becomes an instance of a subclass of its class, so parameters, buffers, state,
    hooks, ``state_dict`` keys, ``isinstance`` and the library's own reset functions keep working. It is called as
    before and gives the same spikes, states and gradients in float32 (``docs/adapters.md`` has each neuron's numerics;
    SpikingJelly's also in float64). A call of another kind, in bfloat16 say, runs the library's own code.

    Args:
        model: a network, or a single neuron. Neurons that cannot be converted are left and named in the report, and
            so are those that a subclass has changed. Where none is converted, a warning says why. The ``repr`` of a
            converted neuron tells that it is one.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> import snntorch
        >>> net = nn.Sequential(nn.Linear(3, 2), snntorch.Leaky(beta=0.9, init_hidden=True))
        >>> print(accelerate(net))
        neuron  class
        1       snntorch.Leaky  fused
        >>> net(torch.ones(4, 3)).shape, isinstance(net[1], snntorch.Leaky)
        (torch.Size([4, 2]), True)
    """
    _check_module(model)
    report = Report()
    for name, module in model.named_modules():
        name = name or "(model)"
        mixin, reason = find(module)
        if mixin is not None:
            kind = _library_class(module)
            module.__class__ = fused_class(type(module), mixin)
            module._plan()  # now, rather than inside a call that torch.compile traces
            report.replaced.append(Neuron(name, kind))
        elif isinstance(module, Fused):
            report.replaced.append(Neuron(name, _library_class(module)))
        elif reason:
            report.left.append(Neuron(name, _library_class(module), reason))
    if not report.replaced:
        say_once(f"accelerate changed nothing: {_why_nothing(model, report)}")
    return report


def _why_nothing(model: nn.Module, report: Report) -> str:
    """What was looked for in a model without a neuron to convert, and what would do."""
    if report.left:
        name, kind, reason = report.left[0]
        more = f"; so are {len(report.left) - 1} more, which the report names" if len(report.left) > 1 else ""
        return f"{name} ({kind}) is left as it is: {reason}{more}"
    looked = f"{type(model).__name__} has no neurons of SpikingJelly, snnTorch, Norse or sinabs"
    own = [name or "(model)" for name, m in model.named_modules() if isinstance(m, base.MemoryModule)]
    if own:
        return f"{looked}; {own[0]} is snnfast's own, which needs no conversion, so there is nothing to do"
    if any(isinstance(m, nn.ReLU) for m in model.modules()):
        return f"{looked}; it has ReLUs: snnfast.to_spiking(model, timesteps) makes it a spiking network"
    return (
        f"{looked}; for an ANN there is snnfast.to_spiking(model, timesteps), and a neuron of your own can be written "
        "as an snnfast.neuron.BaseNode"
    )


def restore(model: nn.Module) -> int:
    """Undo :func:`accelerate`: give every neuron its own class back, with the state it has now.

    Returns:
        The number of neurons restored.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_module(model)
    fused: list[Any] = [module for module in model.modules() if isinstance(module, Fused)]
    for module in fused:
        module.__dict__.pop("_snnfast_plan", None)
        module.__class__ = replaced_by(type(module))
    return len(fused)


# ---- verification ----
class Compared(NamedTuple):
    """One tensor of both runs: how many elements differ, and the largest difference relative to its largest value."""

    name: str
    elements: int
    differing: int
    relative: float


@dataclass
class Verification:
    """What :func:`verify` found; prints as a table.

    Attributes:
        spikes: the first output of every converted neuron over all its calls.
        outputs: every tensor that the run returned.
        gradients: of the input and of every parameter.
        seconds: of a forward and backward pass, original and accelerated.
        ok: whether no spike differs and outputs and gradients are within the tolerance.
    """

    report: Report
    spikes: list[Compared]
    outputs: list[Compared]
    gradients: list[Compared]
    seconds: tuple[float, float]
    tolerance: float

    @property
    def ok(self) -> bool:
        within = all(c.relative <= self.tolerance for c in self.outputs + self.gradients)
        return bool(self.report.replaced) and within and not any(c.differing for c in self.spikes)

    def __str__(self) -> str:
        rows = [("compared", "elements", "differing", "relative")]
        for title, found in (("spikes", self.spikes), ("output", self.outputs), ("gradient", self.gradients)):
            rows += [(f"{title} {c.name}", f"{c.elements}", f"{c.differing}", f"{c.relative:.1e}") for c in found]
        before, after = self.seconds
        same = "the same" if self.ok else "NOT the same" if self.report.replaced else "nothing was converted"
        return (
            f"{_table(rows)}\n{same} (tolerance {self.tolerance:.0e}); forward and backward "
            f"{before * 1e3:.2f} ms, accelerated {after * 1e3:.2f} ms, {before / after:.1f} times"
        )


def _compare(name: str, a: Tensor | None, b: Tensor | None, scale: float = 0.0) -> Compared:
    if a is None or b is None:
        same = a is b
        count = 0 if same else (a if a is not None else b).numel()  # type: ignore[union-attr]
        return Compared(name, count, count, 0.0 if same else float("inf"))
    if a.shape != b.shape or a.dtype != b.dtype:
        return Compared(
            f"{name} {tuple(a.shape)} {a.dtype} vs {tuple(b.shape)} {b.dtype}", a.numel(), a.numel(), float("inf")
        )
    differing = int(((a != b) & ~((a != a) & (b != b))).sum())
    if not differing or not a.is_floating_point():
        return Compared(name, a.numel(), differing, float(differing > 0))
    error, scale = float((a.double() - b.double()).abs().max()), max(scale, float(a.double().abs().max()))
    return Compared(name, a.numel(), differing, error / scale if scale > 0 else float("inf"))


def _scales(gradients: dict[str, Tensor | None]) -> dict[str, float]:
    """The largest gradient of each parameter's layer: a bias before a batch norm has none but what rounding leaves of
    it, which cannot be compared with itself."""
    largest: dict[str, float] = {}
    layers = {name: name.rpartition(".")[0] if not name.startswith("of the input") else name for name in gradients}
    for name, gradient in gradients.items():
        if gradient is not None and gradient.numel():
            layer = layers[name]
            largest[layer] = max(largest.get(layer, 0.0), float(gradient.double().abs().max()))
    return {name: largest.get(layer, 0.0) for name, layer in layers.items()}


class _Run(NamedTuple):
    spikes: dict[str, list[Tensor]]
    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]


def _run(model: nn.Module, x: Any, run: Callable[[nn.Module, Any], Any], watched: Iterable[str], seed: int) -> _Run:
    torch.manual_seed(seed)
    spikes: dict[str, list[Tensor]] = {name: [] for name in watched}
    handles = []
    for name in spikes:

        def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            spikes[name].append((output[0] if isinstance(output, tuple) else output).detach().clone())

        neuron = model if name == "(model)" else model.get_submodule(name)
        handles.append(neuron.register_forward_hook(keep))
    x = _leaf(x)
    outputs = [t for t in tree_flatten(run(model, x))[0] if isinstance(t, Tensor)]
    for handle in handles:
        handle.remove()
    _backward(outputs, seed)
    gradients: dict[str, Tensor | None] = {}
    for k, t in enumerate(t for t in tree_flatten(x)[0] if isinstance(t, Tensor) and t.requires_grad):
        gradients["of the input" if not k else f"of the input, tensor {k}"] = t.grad
    gradients.update((name, p.grad) for name, p in model.named_parameters() if p.requires_grad)
    return _Run(spikes, [t.detach() for t in outputs], gradients)


def _leaf(x: Any) -> Any:
    """Input tensors as leaves that want a gradient."""
    return tree_map(
        lambda t: t.detach().clone().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t, x
    )


def _backward(outputs: list[Tensor], seed: int) -> None:
    """Backward from a random weighting of everything that has a gradient."""
    generator = torch.Generator("cpu").manual_seed(seed)
    wanted = [t for t in outputs if t.requires_grad]
    grads = [torch.randn(t.shape, generator=generator, device="cpu", dtype=torch.float32).to(t) for t in wanted]
    if wanted:
        torch.autograd.backward(wanted, grads)


def verify(
    model: nn.Module,
    x: Any,
    run: Callable[[nn.Module, Any], Any] | None = None,
    *,
    tolerance: float = 1e-5,
    repeats: int = 3,
    seed: int = 0,
) -> Verification:
    """Run a model as its library computes it and accelerated, and compare spikes, outputs, gradients and time.

    Both runs are made on copies: ``model``, its state and its gradients stay as they are.

    Args:
        model: accelerated or not.
        x: what the model is called with: a tensor, or any nest of tensors.
        run: ``run(model, x)`` calls the model where that is more than ``model(x)``: a loop over time, say. What it
            returns (any nest of tensors) is compared and differentiated.
        tolerance: the largest difference of outputs, relative to the largest value of the tensor, and of gradients,
            relative to the largest of the layer's.
        repeats: timed runs of each; the median counts.
        seed: of the generators before each run, and of the random weights that make a loss of the outputs.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: ``model`` holds state that belongs to a graph, which cannot be copied.

    Example:
        >>> import snntorch
        >>> net = nn.Sequential(nn.Linear(3, 2), snntorch.Leaky(beta=0.9, init_hidden=True, output=True))
        >>> verify(net, torch.ones(5, 4, 3), lambda net, x: [net(step) for step in x]).ok
        True
    """
    _check_module(model)
    if run is not None and not callable(run):
        raise TypeError(
            f"run must be a function of the model and x, got {type(run).__name__}; where the model takes more than one "
            "argument, give x as a tuple and run=lambda model, x: model(*x)"
        )
    if run is None:

        def run(model: nn.Module, x: Any) -> Any:
            return model(x)

    plain = network.copy_of(model)
    restore(plain)
    fast = copy.deepcopy(plain)
    report = accelerate(fast)
    names = [n.name for n in report.replaced]
    seconds: tuple[list[float], list[float]] = [], []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        found = [_run(copy.deepcopy(m), x, run, names, seed) for m in (plain, fast)]
        for _ in range(repeats):
            for times, which in zip(seconds, (plain, fast), strict=True):
                candidate, leaf = copy.deepcopy(which), _leaf(x)
                start = time.perf_counter()
                _backward([t for t in tree_flatten(run(candidate, leaf))[0] if isinstance(t, Tensor)], seed)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
    a, b = found
    if len(a.outputs) != len(b.outputs):
        raise RuntimeError(f"run returned {len(a.outputs)} tensors, and {len(b.outputs)} from the accelerated model")
    scales = _scales(a.gradients)
    medians = [statistics.median(times) if times else float("nan") for times in seconds]
    return Verification(
        report,
        [_compare(n, _joined(a.spikes[n]), _joined(b.spikes[n])) for n in names],
        [_compare(f"{k}", *pair) for k, pair in enumerate(zip(a.outputs, b.outputs, strict=True))],
        [_compare(n, a.gradients[n], b.gradients.get(n), scales[n]) for n in a.gradients],
        (medians[0], medians[1]),
        tolerance,
    )


def _joined(calls: list[Tensor]) -> Tensor | None:
    return torch.cat([t.flatten() for t in calls]) if calls else None
