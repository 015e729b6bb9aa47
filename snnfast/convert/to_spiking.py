"""An ordinary network with ReLU as a spiking network: :func:`to_spiking`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from .._arguments import check_steps, names_of, refuse_unknown
from ..network import copy_of
from ..neuron import IFNode, LIFNode
from ..pooling import with_fast_pooling
from .stepping import is_stateful, refuse_wrapper
from .to_spiking_classes import with_mixin
from .to_spiking_coding import Coding, find_coding
from .to_spiking_graph import DYNAMIC, STATIC, Converter, NeedsTime
from .to_spiking_layers import Observer, ScaledNeuron, prepare_neuron, repeat
from .to_spiking_trace import place

__all__ = ["SpikingNetwork", "to_spiking"]

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # from torch 2.7 on


class SpikingNetwork:
    """What :func:`to_spiking` adds to the class of a model: the input coding and time around its forward."""

    training: bool
    _timesteps: int
    _at_input: bool
    _auto_reset: bool
    _untraced: tuple[str, ...]
    _coding: Coding | None  # private, as the model may have a layer of this name
    _readout: Callable[[Tensor], Any] | None

    def forward(self, x: Tensor) -> Any:
        """``[B, *]`` (``[T, B, *]`` with temporal coding) -> logits ``[T, B, C]``."""
        T = self._timesteps
        if self._coding is not None:
            x_seq = self._coding(x, T)
            if x_seq.dim() < 2 or x_seq.shape[0] != T:
                raise ValueError(f"coding must give [T, B, *] with T = {T}, got a tensor of shape {tuple(x_seq.shape)}")
            x = x_seq.flatten(0, 1)
        elif self._at_input:
            x = repeat(x, T)
        y = _unfold(super().forward(x), T)  # type: ignore[misc]
        # A compiled forward that leaves its state behind would be compiled again for the second call, which finds a
        # tensor where the first found a number; an exported program has nowhere to leave it.
        if _is_exporting() or (torch.compiler.is_compiling() and self._auto_reset):
            functional.reset_net(self)  # type: ignore[arg-type]
        return y if self._readout is None else self._readout(y)

    @property
    def timesteps(self) -> int:
        """The number of time steps; it can be set, and holds for every module of the network."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: int) -> None:
        self._timesteps = check_steps("timesteps", value)
        for module in self.modules():  # type: ignore[attr-defined]
            if module is not self and hasattr(module, "timesteps"):
                module.timesteps = value

    @property
    def auto_reset(self) -> bool:
        """Whether each forward starts from the initial state (the default), or goes on from the last one's."""
        return self._auto_reset

    @auto_reset.setter
    def auto_reset(self, value: bool) -> None:
        if not value and self._untraced:
            raise ValueError(
                "auto_reset can be False only where each neuron is known to be called once in a forward, but "
                + "; ".join(self._untraced)
            )
        self._auto_reset = bool(value)
        for module in self.modules():  # type: ignore[attr-defined]
            if module is not self and hasattr(module, "auto_reset"):
                module.auto_reset = self._auto_reset


def _unfold(y: Any, T: int) -> Any:
    """``[T * B, *]`` -> ``[T, B, *]`` in whatever a model returns."""
    if isinstance(y, Tensor):
        return y.unflatten(0, (T, -1)) if y.dim() else y  # a loss has no time
    if isinstance(y, dict):
        return type(y)((k, _unfold(v, T)) for k, v in y.items())
    if isinstance(y, tuple) and hasattr(y, "_fields"):
        return type(y)(*(_unfold(v, T) for v in y))
    if isinstance(y, (tuple, list)):
        return type(y)(_unfold(v, T) for v in y)
    if dataclasses.is_dataclass(y) and not isinstance(y, type):
        return dataclasses.replace(y, **{f.name: _unfold(getattr(y, f.name), T) for f in dataclasses.fields(y)})
    return y


def to_spiking(
    model: nn.Module,
    timesteps: int,
    neuron: Callable[..., nn.Module] | None = None,
    *,
    coding: str | Coding = "direct",
    seed: int | None = None,
    calibration: Tensor | None = None,
    percentile: float = 99.9,
    max_pool: str | None = None,
    other_activations: str = "error",
    readout: Callable[[Tensor], Any] | None = None,
    share_weights: bool = False,
    **neuron_kwargs: Any,
) -> Any:
    """The spiking network of an ANN: a neuron in place of each ReLU, ``[B, *]`` -> logits ``[T, B, C]``.

    The result is a copy of ``model``, still an instance of its class, with the same parameters, buffers and
    ``state_dict`` keys; a :class:`~snnfast.ParametricLIFNode` adds its ``w``, a calibrated neuron its threshold. ReLU
    modules become neurons under the same path. Functional calls (``F.relu``, ``torch.relu``, ``x.relu_()``,
    ``x.clamp(min=0)``) are found by torch.fx; their neurons are named ``relu``, ``relu_2`` and so on, and a ReLU module
    that is called several times becomes as many neurons. In a ``forward`` that was followed so, numbers and flags read
    from the module stay what they were; parameters and buffers do not. Convolutions and batch norms see ``[T * B, *]``:
    in training, batch norm takes its statistics over time and batch together.

    With direct coding, layers before the first neuron run once and their result is repeated; batch norms there have the
    same statistics, except that the unbiased running variance counts ``B`` and not ``T * B`` samples. Dropout draws one
    mask per sample for all time steps, as SpikingJelly does, and so do ``DropPath`` of timm and ``StochasticDepth`` of
    torchvision. Every forward starts from the initial state: nothing goes
    wrong without ``reset_net``. Set ``net.auto_reset = False`` to go on from the last state, and ``net.timesteps`` to
    change ``T``.

    Args:
        model: the ANN, with a single input ``[B, *]``, of which it does not mix the samples. A submodule that torch.fx
            cannot follow must use ReLU modules.
        timesteps: ``T``.
        neuron: class of the neurons, called as ``neuron(timesteps=T, **neuron_kwargs)``; by default
            :class:`~snnfast.LIFNode`, or :class:`~snnfast.IFNode` with ``calibration``.
        coding: ``'direct'``, the input is a constant current; ``'poisson'``, spikes with the probability that the
            input (from 0 to 1) gives; ``'temporal'``, the input has time, ``[T, B, *]``; or a callable ``(x, T)`` that
            returns ``[T, B, *]``.
        seed: of the random numbers of Poisson coding; ``None`` takes torch's own.
        calibration: a batch of inputs ``[B, *]``, from which each neuron gets the threshold ``θ`` that makes its mean
            output the activation of the trained ReLU: soft reset, ``v`` starts at ``θ / 2``, a spike counts ``θ``. The
            mean of the logits over time then tends to the ANN's logits (Diehl et al., IJCNN 2015; Rueckauer et al.,
            Frontiers in Neuroscience 2017; start at ``θ / 2``: Bu et al., "Optimal ANN-SNN Conversion", ICLR 2022).
        percentile: of the activations of a layer, which becomes its threshold; 100 for their maximum.
        max_pool: ``'keep'``, the maximum at each step, which is a spike if there is one; ``'rates'``, spikes at the
            largest rate of the window, save for pools that return indices. By default ``'keep'``, or ``'rates'`` with
            ``calibration``.
        other_activations: what to do about GELU, SiLU, ReLU6, sigmoid and so on: ``'error'``, ``'keep'`` (at each
            step, as the gates of squeeze-and-excitation should be) or ``'replace'`` (by neurons; of these a calibrated
            network approximates ReLU6 only, a neuron's rate being limited as well). LSTM, GRU, RNN and their cells
            count among them and can only be kept; attention and softmax are computed at each step and are none.
        readout: called with the logits ``[T, B, C]``; its result is the network's. ``lambda y: y.mean(0)`` makes a
            drop-in for the ANN.
        share_weights: use the model's own parameters and buffers instead of copies.

    Raises:
        ValueError: no ReLU, another activation or a recurrent layer (the message names the place), results kept in a
            forward that must be written anew, a ``T`` or option of another kind.
        TypeError: ``model`` is not a module, or ``neuron`` does not take ``timesteps``.

    Example:
        >>> import snnfast
        >>> ann = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
        >>> net = to_spiking(ann, timesteps=4, tau=2.0)
        >>> net(torch.rand(2, 1, 8, 8)).shape
        torch.Size([4, 2, 10])
        >>> isinstance(net[1], snnfast.LIFNode), list(net.state_dict()) == list(ann.state_dict())
        (True, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    refuse_wrapper(model)
    for path, module in model.named_modules():
        if is_stateful(module):
            raise ValueError(
                f"model must be an ordinary ANN, but {place(path, module)} is a spiking module already; "
                "snnfast.accelerate runs the neurons of other libraries as they are"
            )
    timesteps = check_steps("timesteps", timesteps)
    if getattr(model, "timesteps", timesteps) != timesteps:
        raise ValueError(
            f"model must have no attribute timesteps, which is the network's, got {model.timesteps!r} there; rename it"
        )
    _check_choice("other_activations", other_activations, ("error", "keep", "replace"))
    max_pool = max_pool or ("keep" if calibration is None else "rates")
    _check_choice("max_pool", max_pool, ("keep", "rates"))
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be above 0 and at most 100, got {percentile!r}")
    found_coding = find_coding(coding, seed)
    if calibration is not None:
        if not isinstance(calibration, Tensor) or not calibration.numel():
            got = tuple(calibration.shape) if isinstance(calibration, Tensor) else type(calibration).__name__
            raise ValueError(f"calibration must be a tensor of at least one input, [B, *], got {got}")
        if not calibration.isfinite().all():
            raise ValueError("calibration must be finite, got NaN or Inf in it: no threshold comes from these")
        neuron = _check_calibrated(neuron, neuron_kwargs)
        neuron_kwargs = neuron_kwargs | {"v_reset": None}
    neuron = neuron or LIFNode
    check_arguments("to_spiking", neuron, neuron_kwargs, OPTIONS)
    _new_neuron(neuron, timesteps, neuron_kwargs)  # errors in the arguments show before any work

    device = next((p.device for p in model.parameters()), None)

    def make(repeats: bool) -> nn.Module:
        if calibration is not None:
            return Observer(percentile, repeats)
        # A neuron may have parameters.
        return prepare_neuron(_new_neuron(neuron, timesteps, neuron_kwargs).to(device), repeats)

    net, converter, at_input = _convert(
        model, make, timesteps if calibration is None else 1, found_coding, other_activations, max_pool, share_weights
    )
    if not converter.neurons:
        if converter.kept:
            raise ValueError(
                "model must have at least one ReLU besides what other_activations='keep' keeps, found none in "
                f"{type(model).__name__}, but {converter.kept[0]}; put ReLUs in place of such activations and train "
                "the model again, or choose other_activations='replace', which puts neurons there"
            )
        raise ValueError(
            f"model must have at least one ReLU, found none in {type(model).__name__}; put an nn.ReLU() where a neuron "
            "shall be"
        )
    net.__class__ = with_mixin(type(net), SpikingNetwork)
    net._untraced = tuple(converter.untraced)
    net._at_input, net._auto_reset = at_input, True
    net._coding, net._readout = None, None
    net._timesteps = timesteps if calibration is None else 1
    if calibration is not None:
        _calibrate(net, calibration)
        _place_neurons(net, lambda: _new_neuron(neuron, timesteps, neuron_kwargs))
        net.timesteps = timesteps
    net._coding, net._readout = found_coding, readout
    return net


# What to_spiking takes by name, besides a neuron's arguments.
OPTIONS = [name for name in inspect.signature(to_spiking).parameters if name not in ("model", "neuron_kwargs")]


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_calibrated(neuron: Callable[..., nn.Module] | None, neuron_kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The neuron of a calibrated network: without a leak, with soft reset, its threshold from the data."""
    if neuron is not None and not (isinstance(neuron, type) and issubclass(neuron, IFNode)):
        name = getattr(neuron, "__name__", neuron)
        raise ValueError(f"neuron must be snnfast.IFNode with calibration: {name} does not keep the sum of its input")
    for name in ("v_threshold", "v_reset"):
        if neuron_kwargs.get(name) is not None:
            raise ValueError(f"{name} must not be given with calibration, which sets it, got {neuron_kwargs[name]!r}")
    return neuron or IFNode


def check_arguments(owner: str, neuron: Any, given: dict[str, Any], own: Sequence[str]) -> None:
    """Refuse what neither ``owner``, which takes ``own`` arguments, nor its neurons know."""
    neuron = neuron or LIFNode
    theirs = names_of(neuron) if callable(neuron) and not isinstance(neuron, nn.Module) else None
    if theirs is not None:
        refuse_unknown(owner, given, [*own, *(name for name in theirs if name not in own)])


def _new_neuron(neuron: Callable[..., nn.Module], timesteps: int, neuron_kwargs: dict[str, Any]) -> nn.Module:
    if not callable(neuron) or isinstance(neuron, nn.Module):  # one neuron could not stand for all
        raise TypeError(
            f"neuron must be a class of neurons, such as snnfast.LIFNode, got {neuron!r}; its arguments go beside it, "
            "as in tau=2.0"
        )
    if isinstance(neuron, type) and "timesteps" not in (names_of(neuron) or ["timesteps"]):
        raise TypeError(
            f"neuron must take timesteps, as snnfast.LIFNode or another snnfast.neuron.BaseNode does, got "
            f"{neuron.__module__}.{neuron.__name__}"
        )
    made = neuron(timesteps=timesteps, **neuron_kwargs)
    if not isinstance(made, nn.Module) or not hasattr(made, "timesteps"):
        raise TypeError(
            "neuron must make a module with timesteps, such as snnfast.LIFNode or another snnfast.neuron.BaseNode, "
            f"got {type(made).__name__}"
        )
    return made


def _convert(
    model: nn.Module,
    make: Callable[[bool], nn.Module],
    timesteps: int,
    coding: Coding | None,
    other_activations: str,
    max_pool: str,
    share_weights: bool,
) -> tuple[Any, Converter, bool]:
    """A converted copy, its converter, and whether the input is to be repeated."""
    for status in (STATIC, DYNAMIC) if coding is None else (DYNAMIC,):
        memo = {id(t): t for t in (*model.parameters(), *model.buffers())} if share_weights else {}
        net = copy_of(model, memo)
        converter = Converter(make, timesteps, other_activations, max_pool == "rates")
        try:
            converter.convert(net, "", status, {})
        except NeedsTime:
            continue
        if max_pool == "keep":
            with_fast_pooling(net)
        return net, converter, status == DYNAMIC
    raise AssertionError("a conversion with time everywhere cannot need more of it")


def _calibrate(net: Any, batch: Tensor) -> None:
    """Run the ANN, which the network is while observers stand for its neurons, in evaluation mode."""
    modes = [(m, m.training) for m in net.modules()]
    net.eval()
    with torch.no_grad():
        net(batch)
    for module, training in modes:
        module.training = training


def _place_neurons(net: nn.Module, new: Callable[[], nn.Module]) -> None:
    """Neurons with the observers' thresholds in their places."""
    for parent in list(net.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, Observer):
                scaled = ScaledNeuron(prepare_neuron(new(), child.repeats))
                scaled.set_threshold(child.threshold or 1.0)  # a layer that never fires may have any
                parent.add_module(name, scaled.train(child.training))
