"""Firing rates: watching them, in training too, and pulling them towards a target."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ._modules import runs_again, spiking_modules

__all__ = ["FiringRateMonitor", "FiringRateRegulariser"]


def _spikes(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _find(model: nn.Module, types: Iterable[type[nn.Module]]) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(types, Iterable):
        raise TypeError(f"types must be classes in a tuple, as in types=(MyNeuron,), got {types!r}")
    kinds = tuple(types)
    if kinds:
        found = {name or "network": m for name, m in model.named_modules() if isinstance(m, kinds)}
    else:
        found = spiking_modules(model)
    if not found:
        raise ValueError(
            "model must have spiking neurons, but none was found (of snnfast, SpikingJelly, snnTorch, Norse, sinabs); "
            "name the classes of your own with types=(MyNeuron,)"
        )
    return found


class FiringRateMonitor:
    """The firing rate of every spiking neuron layer: spikes per neuron and time step, over all calls since the start.

    A context manager; outside one, call :meth:`close` when done. It costs one reduction a layer and keeps no graph, so
    it can stay on while training. Sums stay on the model's device; only :meth:`rates` waits for them. Watch a
    network of ``torch.compile`` from before its first call: compiled code does not look for hooks that come later.

    Args:
        model: the network; neurons of snnfast, SpikingJelly, snnTorch, Norse and sinabs are found by themselves.
        types: classes of neurons of your own, to be watched in place of those.

    Raises:
        TypeError: ``model`` is no module, ``types`` are no classes.
        ValueError: no neuron was found.

    Example:
        >>> import snnfast
        >>> net = nn.Sequential(snnfast.IFNode(step_mode="m"))
        >>> with FiringRateMonitor(net) as monitor:
        ...     _ = net(torch.full((4, 2, 3), 0.5))
        >>> monitor.rates()
        {'0': 0.5}
    """

    def __init__(self, model: nn.Module, types: Iterable[type[nn.Module]] = ()) -> None:
        self._modules = _find(model, types)
        self._hooks = [m.register_forward_hook(self._hook(name)) for name, m in self._modules.items()]
        self.clear()

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: Any, output: Any) -> None:
            if module is not self._modules[name] or runs_again():  # a deep copy of the model has its hooks
                return
            s = _spikes(output).detach()
            spikes = s.sum(dtype=torch.float32 if s.device.type == "mps" else torch.float64)
            self._sums[name] = spikes + self._sums[name] if name in self._sums else spikes
            self._elements[name] = self._elements.get(name, 0) + s.numel()

        return add

    def rates(self) -> dict[str, float]:
        """Mean firing rate of each layer that was called, by its path, in spikes per neuron and time step."""
        return {
            name: self._sums[name].item() / max(self._elements[name], 1) for name in self._modules if name in self._sums
        }

    def mean(self) -> float:
        """Mean firing rate over all neurons of all layers."""
        spikes = sum(total.item() for total in self._sums.values())
        return spikes / max(sum(self._elements.values()), 1)

    def clear(self) -> None:
        """Start counting anew, at the beginning of an epoch say."""
        self._sums: dict[str, Tensor] = {}
        self._elements: dict[str, int] = {}

    def close(self) -> None:
        """Take the hooks off the model; what was counted stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> FiringRateMonitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class FiringRateRegulariser:
    """A loss term that pulls every layer's firing rate towards a target.

    ``weight * mean over layers of (rate - target)^2``, with the rate over all steps of the calls since the last
    :meth:`loss`; its gradient reaches the weights through the surrogates.

    Args:
        model: the network.
        target: the wanted rate, from 0 to 1 spikes per neuron and time step.
        weight: factor of the term.
        types: classes of neurons of your own, to be taken in place of those that are found.

    Raises:
        TypeError: ``model`` is no module, ``types`` are no classes, or ``target`` or ``weight`` is no number.
        ValueError: ``target`` outside [0, 1], ``weight`` below 0, or no neuron was found.

    Example:
        >>> import snnfast
        >>> net = nn.Sequential(nn.Linear(3, 5), snnfast.LIFNode(step_mode="m"))
        >>> regulariser = FiringRateRegulariser(net, target=0.1, weight=0.5)
        >>> out = net(torch.randn(4, 2, 3))
        >>> (out.mean() + regulariser.loss()).backward()
        >>> net[0].weight.grad is not None
        True
        >>> regulariser.close()
    """

    def __init__(
        self, model: nn.Module, target: float, weight: float = 1.0, types: Iterable[type[nn.Module]] = ()
    ) -> None:
        if not 0.0 <= functional.check_number("target", target) <= 1.0:
            raise ValueError(f"target must be a firing rate from 0 to 1, got {target!r}")
        if not functional.check_number("weight", weight) >= 0.0:
            raise ValueError(f"weight must be at least 0, got {weight!r}")
        self.target, self.weight = float(target), float(weight)
        self._calls: dict[str, list[tuple[Tensor, int]]] = {}
        self._modules = _find(model, types)
        self._hooks = [m.register_forward_hook(self._hook(name)) for name, m in self._modules.items()]

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if module is not self._modules[name] or runs_again():  # as in FiringRateMonitor
                return
            s = _spikes(output)
            if torch.is_grad_enabled() and s.requires_grad:  # an evaluation has no loss to add to, and must not pile up
                dtype = torch.promote_types(s.dtype, torch.float32)
                self._calls.setdefault(name, []).append((s.sum(dtype=dtype), s.numel()))

        return keep

    def loss(self) -> Tensor:
        """The term for the calls since the last time, a 0-d tensor.

        Raises:
            RuntimeError: the model was not called with gradients since.
        """
        if not self._calls:
            raise RuntimeError("the model must run with gradients before loss() is called: there is no firing rate yet")
        rates = [sum(s for s, _ in calls) / sum(n for _, n in calls) for calls in self._calls.values()]
        self._calls = {}
        return self.weight * (torch.stack(rates) - self.target).square().mean()  # type: ignore[arg-type]

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._calls = {}

    def __enter__(self) -> FiringRateRegulariser:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
