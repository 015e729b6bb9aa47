"""Synaptic operations: what a network's connections cost, counted from the spikes that really pass through them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .._arguments import check_steps
from ._modules import evaluating, is_single_step, is_spiking, run_steps, steps_and_samples
from ._tables import table

__all__ = ["PICOJOULE_PER_AC", "PICOJOULE_PER_MAC", "LayerSynops", "SynopsReport", "count_synops"]

# 32-bit floating point in 45 nm: a multiplication 3.7 pJ and an addition 0.9 pJ (M. Horowitz, "Computing's energy
# problem (and what we can do about it)", ISSCC 2014).
PICOJOULE_PER_MAC, PICOJOULE_PER_AC = 4.6, 0.9

_CONVOLUTIONS: dict[type, tuple[int, Callable[..., Tensor]]] = {
    nn.Conv1d: (1, F.conv1d),
    nn.Conv2d: (2, F.conv2d),
    nn.Conv3d: (3, F.conv3d),
    nn.ConvTranspose1d: (1, F.conv_transpose1d),
    nn.ConvTranspose2d: (2, F.conv_transpose2d),
    nn.ConvTranspose3d: (3, F.conv_transpose3d),
}
_CONNECTIONS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTIONS)


# ---- the report ----
@dataclass
class LayerSynops:
    """Counts of one layer, summed over all samples, time steps and calls.

    Attributes:
        name, kind: the module's path in the network and its class.
        macs: operations whose input was real-valued, zeros left out.
        acs: operations whose input was all of {-1, 0, 1}: accumulations.
        dense: operations if no input and no weight were zero, all time steps included.
        inputs, active_inputs: elements of the layer's input, and those of them that are not zero.
        calls: how often the layer was called.
    """

    name: str
    kind: str
    macs: int = 0
    acs: int = 0
    dense: int = 0
    inputs: int = 0
    active_inputs: int = 0
    calls: int = 0

    @property
    def rate(self) -> float:
        """Firing rate of the layer's *input*: the share of its elements that are not zero."""
        return self.active_inputs / self.inputs if self.inputs else 0.0

    @property
    def energy(self) -> float:
        """Estimated energy in picojoule, over all samples."""
        return self.macs * PICOJOULE_PER_MAC + self.acs * PICOJOULE_PER_AC


@dataclass
class SynopsReport:
    """What :func:`count_synops` found; ``print`` shows a table, per sample.

    Attributes:
        layers: one entry for each connection that was called, in the order of first call.
        samples: number of samples that the counts are sums over.
        timesteps: time steps each sample took, or ``None`` where no spiking neuron showed it.
    """

    layers: list[LayerSynops] = field(default_factory=list)
    samples: int = 0
    timesteps: int | None = None

    @property
    def macs(self) -> float:
        """Multiply-accumulate operations per sample."""
        return self._per_sample(sum(layer.macs for layer in self.layers))

    @property
    def acs(self) -> float:
        """Accumulate operations per sample."""
        return self._per_sample(sum(layer.acs for layer in self.layers))

    @property
    def synops(self) -> float:
        """Synaptic operations per sample: MACs and ACs."""
        return self.macs + self.acs

    @property
    def dense(self) -> float:
        """Operations per sample if nothing were zero, all time steps included."""
        return self._per_sample(sum(layer.dense for layer in self.layers))

    @property
    def energy(self) -> float:
        """Estimated energy per sample in picojoule: 4.6 a MAC, 0.9 an AC (45 nm, Horowitz 2014)."""
        return self._per_sample(sum(layer.energy for layer in self.layers))

    def _per_sample(self, value: float) -> float:
        return value / self.samples if self.samples else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers for JSON; operations and energy are per sample."""
        return {
            "samples": self.samples,
            "timesteps": self.timesteps,
            "macs": self.macs,
            "acs": self.acs,
            "synops": self.synops,
            "dense": self.dense,
            "energy_pj": self.energy,
            "energy_source": "estimate: 4.6 pJ per MAC, 0.9 pJ per AC, 45 nm, Horowitz, ISSCC 2014",
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "input_rate": layer.rate,
                    "macs": self._per_sample(layer.macs),
                    "acs": self._per_sample(layer.acs),
                    "dense": self._per_sample(layer.dense),
                    "energy_pj": self._per_sample(layer.energy),
                }
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        d = self.to_dict()
        rows = [
            (
                layer["name"],
                layer["kind"],
                f"{layer['input_rate']:.4f}",
                *(f"{layer[key]:,.0f}" for key in ("macs", "acs", "dense")),
                f"{layer['energy_pj'] / 1e3:,.3f}",
            )
            for layer in d["layers"]
        ]
        total = ("total", "", "", *(f"{d[key]:,.0f}" for key in ("macs", "acs", "dense")), f"{self.energy / 1e3:,.3f}")
        head = ("layer", "kind", "input rate", "MACs", "ACs", "dense", "energy [nJ]")
        steps = "" if self.timesteps is None else f" of {self.timesteps} time steps"
        return (
            f"Synaptic operations per sample{steps} (mean of {self.samples} samples)\n"
            f"{table(head, [*rows, total], left=2)}\n"
            "Energy is an estimate: 4.6 pJ per MAC, 0.9 pJ per AC (45 nm, Horowitz 2014), zero inputs free."
        )


# ---- counting ----
def _convolution_operations(layer: Any, counts: Tensor, weights: Tensor, output_size: Any) -> int:
    """Operations of a convolution whose inputs ``[C, *]`` were active ``counts`` times, with the given weights used.

    The count is linear in the inputs and in the weights, so the batch and the output channels are summed first.
    """
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    run = next(function for kind, (_, function) in _CONVOLUTIONS.items() if isinstance(layer, kind))
    groups = layer.groups
    if transposed:  # weight [C_in, C_out / groups, *]
        kernel, bias = weights.sum(1, keepdim=True), None
        options = {"stride": layer.stride, "padding": layer.padding}
        options["output_padding"] = layer._output_padding(
            counts[None], output_size, layer.stride, layer.padding, layer.kernel_size, counts.dim() - 1, layer.dilation
        )
    else:  # weight [C_out, C_in / groups, *]
        kernel, bias = weights.unflatten(0, (groups, -1)).sum(1), None
        options = {"stride": layer.stride, "padding": layer.padding}
        if layer.padding_mode != "zeros":
            # The padding repeats real inputs, which are multiplied like any other.
            counts = F.pad(counts[None], layer._reversed_padding_repeated_twice, mode=layer.padding_mode)[0]
            options["padding"] = 0
    out = run(counts[None], kernel, bias, dilation=layer.dilation, groups=groups, **options)
    return round(out.sum().item())


def _operations(layer: nn.Module, x: Tensor, output_size: Any) -> tuple[int, int, int, int]:
    """Effective and dense operations of one call, then its inputs and those that are not zero.

    ``output_size`` is that of a transposed convolution's call.
    """
    weight = layer.weight.detach()  # type: ignore[operator]
    used = (weight != 0).double()
    active = x.detach() != 0
    if isinstance(layer, nn.Linear):
        n = math.prod(x.shape[:-1])
        per_input = active.reshape(n, layer.in_features).sum(0, dtype=torch.float64)
        effective = round((per_input @ used.sum(0)).item())
        dense = n * layer.in_features * layer.out_features
    else:
        space = next(n for kind, (n, _) in _CONVOLUTIONS.items() if isinstance(layer, kind))
        folded = active.reshape(-1, *active.shape[-space - 1 :])
        # float64 convolutions of a single sample: exact up to 2^53 operations
        per_input = folded.sum(0, dtype=torch.float64)
        effective = _convolution_operations(layer, per_input, used, output_size)
        everything = torch.full_like(per_input, folded.shape[0])
        dense = _convolution_operations(layer, everything, torch.ones_like(used), output_size)
    return effective, dense, x.numel(), int(active.sum().item())


def _is_accumulation(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1) | (x == -1)).all().item())


class _Counter:
    """Hooks on every connection and neuron of a network, removed by :meth:`close`."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[str, LayerSynops] = {}
        self.first: nn.Module | None = None  # the spiking neuron that is called first tells steps and samples
        self.timesteps = self.samples = 0
        self._hooks: list[Any] = []
        for name, module in model.named_modules():
            if isinstance(module, _CONNECTIONS):
                # After the call, so that an input that does not fit gets the layer's own error.
                hook = module.register_forward_hook(self._on_connection(name or "network"), with_kwargs=True)
                self._hooks.append(hook)
            elif is_spiking(module):
                self._hooks.append(module.register_forward_pre_hook(self._on_neuron, with_kwargs=True))

    def _on_connection(self, name: str) -> Callable[..., None]:
        def count(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else next(t for t in kwargs.values() if isinstance(t, Tensor))
            output_size = kwargs.get("output_size", args[1] if len(args) > 1 else None)
            entry = self.layers.setdefault(name, LayerSynops(name, type(layer).__name__))
            effective, dense, inputs, active = _operations(layer, x, output_size)
            if _is_accumulation(x):
                entry.acs += effective
            else:
                entry.macs += effective
            entry.dense += dense
            entry.inputs += inputs
            entry.active_inputs += active
            entry.calls += 1

        return count

    def _on_neuron(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if self.first is None and x is not None:
            self.first = module
        if self.first is not module or x is None:
            return
        timesteps, self.samples = steps_and_samples(module, x.shape)
        self.timesteps += timesteps

    def start(self) -> None:
        """Before each input."""
        self.first, self.timesteps, self.samples = None, 0, 0

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


@contextlib.contextmanager
def _counting(model: nn.Module) -> Iterator[_Counter]:
    counter = _Counter(model)
    try:
        with evaluating(model), torch.no_grad():
            yield counter
    finally:
        counter.close()


def count_synops(
    model: nn.Module,
    x: Tensor | Iterable[Any],
    *,
    forward: Callable[[nn.Module, Tensor], Any] | None = None,
    samples: int | None = None,
) -> SynopsReport:
    """Count the synaptic operations of a network on real input, layer by layer.

    An operation is one weight, not zero, meeting one input element, not zero; biases, batch norm and neurons are not
    counted. It is an accumulation (AC) where the layer's whole input is of {-1, 0, 1}, else a multiplication and
    accumulation (MAC): the first layer of a directly coded network, and what follows an average pool. These are
    NeuroBench's definitions (Yik et al., Nature Communications 2025), and its totals. Counted are ``Linear``,
    ``Conv1d/2d/3d`` and ``ConvTranspose1d/2d/3d`` modules and subclasses of them; functional calls are not seen.

    The model runs in eval mode without gradients; its neurons are reset before and after, and its hooks and training
    mode are as they were.

    Args:
        model: any network, spiking or not: multi-step on ``[T, B, *]``, folded on ``[T * B, *]``, or single-step, which
            is called once for each of ``x``'s T steps. SpikingJelly's models work as they are. A network of single-step
            neurons that has a loop over time in its own forward needs ``forward=lambda model, x: model(x)``. Those of
            snnTorch, Norse and sinabs are called once, with all of ``x``.
        x: input, or an iterable of inputs (or of ``(input, label)`` pairs, as a loader gives) to sum over.
        forward: how to run ``model`` on one input, where ``model(x)``, or one call per step, is not the way.
        samples: number of samples in one input; by default the batch that the first spiking neuron sees.

    Raises:
        TypeError: ``model`` is no module, or ``x`` holds no tensors.
        ValueError: no input, no connection was called, or a model called step by step that loops over time itself;
            ``samples`` is not a whole number from 1.

    Example:
        >>> import snnfast
        >>> net = nn.Sequential(nn.Linear(4, 3), snnfast.IFNode(step_mode="m"), nn.Linear(3, 2))
        >>> report = count_synops(net, torch.ones(5, 1, 4) * 0.5)  # T = 5, one sample
        >>> report.macs, report.timesteps, report.dense
        (60.0, 5, 90.0)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if forward is not None and not callable(forward):
        raise TypeError(f"forward must be a function of the model and an input, got {type(forward).__name__}")
    if not (hasattr(x, "__iter__") or hasattr(x, "__getitem__")):
        raise TypeError(f"x must be a tensor, or an iterable of tensors, got {type(x).__name__}")
    if samples is not None:
        samples = check_steps("samples", samples, ", or None")
    report, inputs = SynopsReport(), 0
    with _counting(model) as counter:
        for batch in [x] if isinstance(x, Tensor) else x:
            given = batch[0] if isinstance(batch, (tuple, list)) else batch
            if not isinstance(given, Tensor):
                raise TypeError(f"x must be a tensor, or an iterable of tensors, got {type(given).__name__}")
            functional.reset_net(model)
            counter.start()
            try:
                run_steps(model, given, forward)
            finally:
                functional.reset_net(model)
            if forward is None and is_single_step(model) and counter.timesteps > len(given):
                raise ValueError(
                    "model's neurons are in single-step mode, so it was called once for each step of x, but the "
                    f"first of them was called {counter.timesteps} times in {len(given)} steps: if model runs them all "
                    "by itself, pass forward=lambda model, x: model(x)"
                )
            report.timesteps = counter.timesteps or None
            seen = math.prod(given.shape[:1]) if counter.first is None else counter.samples
            report.samples += seen if samples is None else samples
            inputs += 1
    report.layers = list(counter.layers.values())
    if not inputs:
        raise ValueError("x must hold at least one input, got none; an iterator is empty once it has been read")
    if not report.layers:
        raise ValueError(
            "model must call at least one Linear, Conv or ConvTranspose module, but none was called; layers that are "
            "written as functions (F.linear, F.conv2d) cannot be seen"
        )
    return report
