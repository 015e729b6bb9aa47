"""Long sequences in bounded memory: :func:`chunked` runs a network over some time steps at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.utils.checkpoint
from torch import Tensor, nn

from . import functional, layer
from ._arguments import check_steps, says_what_it_takes
from .base import MemoryModule
from .checkpoint import _again, _Anew, _state
from .convert.to_spiking import SpikingNetwork
from .convert.to_spiking_layers import DrawnOnce, MaxPoolOfRates
from .fused import BatchNormNode
from .network import holds_single_steps, reset_of

__all__ = ["chunked"]


@says_what_it_takes
def chunked(model: nn.Module, x: Tensor, chunk: int, *, chunk_statistics: bool = False) -> Any:
    """``model(x)`` by ``chunk`` time steps at a time: the same result and gradients in the memory of one chunk.

    States go from one chunk to the next, and gradients back through all of them (full BPTT). With gradients, only each
    chunk's input, its output and the states at its start are kept; the backward computes a chunk's activations again
    when it gets there, which costs one more forward. Without gradients the chunks only run one after the other.
    In the second run random numbers are those of the first, and running statistics are updated once.
    Neurons give the bits of the whole; PyTorch's products may round otherwise for a batch of another size.

    Args:
        model: a multi-step network, ``[T, B, *]`` -> ``[T, B, *]``; a folded one, whose neurons have ``timesteps=T``,
            ``[T * B, *]`` -> ``[T * B, *]``; or one of :func:`snnfast.to_spiking`, called as usual. It may return
            several tensors; each must have time. States start from where they are and end as after ``model(x)``. What
            mixes time steps otherwise, such as a convolution over time, sees one chunk only and cannot be found out.
        chunk: time steps at a time; the last chunk may have fewer.
        chunk_statistics: accept that a batch norm in training takes its statistics from a chunk, not from all of ``T``
            (and updates its running ones at each chunk): a different network then, as with a smaller batch.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a ``chunk`` of another kind; batch norms in training without ``chunk_statistics``; a layer that sees
            all time steps together, for which the message tells why; an output without time.

    Example:
        >>> import snnfast
        >>> net = nn.Sequential(nn.Linear(3, 4), snnfast.LIFNode(step_mode="m"))
        >>> x = torch.randn(64, 2, 3)
        >>> y = chunked(net, x, 16); y.shape
        torch.Size([64, 2, 4])
        >>> snnfast.functional.reset_net(net); torch.equal(y, net(x))
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    chunk = check_steps("chunk", chunk)
    _check_layers(model, chunk_statistics)
    run = _OfSpikingNetwork(model) if isinstance(model, SpikingNetwork) else _Run(model)
    parts = run.split(x, chunk)
    outputs = []
    # Single steps, in a container, append theirs by themselves.
    potentials: dict[Any, list[Tensor]] = {
        m: [] for m in run.modules if hasattr(m, "v_seq") and getattr(m, "step_mode", "m") == "m"
    }
    try:
        for steps, part in parts:
            before = {m: m.v_seq for m in potentials}
            outputs.append(_one_chunk(run, part, steps))
            for module, found in potentials.items():
                if module.v_seq is not None and module.v_seq is not before[module]:
                    found.append(module.v_seq)
    finally:
        run.set_masks([()] * len(run.dropouts))
    for module, found in potentials.items():
        if found:
            module.v_seq = torch.cat(found)
    return run.finish(_concatenated(outputs, [run.leading(steps, part) for steps, part in parts]))


def _one_chunk(run: _Run, part: Any, steps: int) -> Any:
    if not torch.is_grad_enabled():
        return run(part, steps)
    before, masks = _state(run.model), run.masks()
    return torch.utils.checkpoint.checkpoint(
        run,
        part,
        steps,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _Anew(lambda: run.again(before, masks))),
    )


def _concatenated(outputs: list[Any], leading: list[list[tuple[int, ...]]]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        for y, allowed in zip(outputs, leading, strict=True):
            if not any(tuple(y.shape[: len(dims)]) == dims for dims in allowed):
                raise ValueError(
                    f"model must return tensors with time as their first dimension, got shape {tuple(y.shape)} for a "
                    f"chunk of {allowed[0][0]} steps; take a mean over time from the result of chunked, and "
                    "chunks of 2 steps and more where time is folded into the batch"
                )
        return torch.cat(outputs)
    if isinstance(first, dict):
        return type(first)((k, _concatenated([y[k] for y in outputs], leading)) for k in first)
    if isinstance(first, (tuple, list)):
        parts = (_concatenated(list(each), leading) for each in zip(*outputs, strict=True))
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first


# ---- how a network is told how many steps there are ----
class _Run:
    """Calls of a network of fewer time steps than it is made for."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules: list[Any] = list(model.modules())
        self.folded = [
            m for m in self.modules if getattr(m, "timesteps", None) is not None and not isinstance(m, SpikingNetwork)
        ]
        self.dropouts = [m for m in self.modules if isinstance(m, DrawnOnce)]
        self.tells = False  # whether a chunk tells an output with time, folded, from a mean over time

    def split(self, x: Tensor, chunk: int) -> list[tuple[int, Any]]:
        """The chunks as ``(steps, input)``."""
        if not isinstance(x, Tensor) or x.dim() == 0:
            raise ValueError(f"x must be a tensor with time as its first dimension, got {x!r}")
        found = sorted({m.timesteps for m in self.folded})
        if not found:
            return [(len(part), part) for part in x.split(chunk)]
        if len(found) > 1:
            raise ValueError(f"model must have one number of time steps, got modules with timesteps={found}")
        if x.shape[0] % found[0]:
            raise ValueError(f"x must be [T * B, *] with timesteps={found[0]}, got shape {tuple(x.shape)}")
        parts = x.unflatten(0, (found[0], -1)).split(chunk)
        self.tells = len(parts) == 1 or len(parts[0]) > 1
        return [(len(part), part.flatten(0, 1)) for part in parts]

    def leading(self, steps: int, part: Tensor) -> list[tuple[int, ...]]:
        """The first dimensions that a chunk's outputs may have: as many steps alone could be as large a batch, and one
        step is as large as a mean over time, which a chunk of several steps does not give."""
        batch = len(part) // steps if self.folded else part.shape[1] if part.dim() > 1 else 0
        with_time = (steps, batch) if batch == steps else (steps,)
        return [(len(part),), with_time] if self.tells else [with_time]

    def finish(self, y: Any) -> Any:
        """The network's result from the chunks' outputs."""
        return y

    def masks(self) -> list[tuple[Tensor, ...]]:
        """Those of dropouts, and of stochastic depth, that draw one for all time steps."""
        return [m.masks for m in self.dropouts]

    def set_masks(self, masks: list[tuple[Tensor, ...]]) -> None:
        for module, drawn in zip(self.dropouts, masks, strict=True):
            module.masks = drawn

    @contextlib.contextmanager
    def again(self, before: Any, masks: list[tuple[Tensor, ...]]) -> Iterator[None]:
        """The second run of a chunk, from the states before its first."""
        after = self.masks()
        self.set_masks(masks)
        try:
            with _again(self.model, before):
                yield
        finally:
            self.set_masks(after)

    def settings(self, steps: int) -> Iterator[tuple[Any, str, Any]]:
        """What is otherwise while a chunk runs: module, attribute, value."""
        for module in self.folded:
            yield module, "timesteps", steps
        for module in self.dropouts:
            yield module, "next_mask", 0

    def __call__(self, part: Any, steps: int) -> Any:
        """One chunk; the backward calls it again, when the network has its own settings back."""
        before = [(m, name, getattr(m, name)) for m, name, _ in self.settings(steps)]
        try:
            for module, name, value in self.settings(steps):
                setattr(module, name, value)
            return self.model(part)
        finally:
            for module, name, value in before:
                setattr(module, name, value)


class _OfSpikingNetwork(_Run):
    """The same for a network of :func:`snnfast.to_spiking`, which codes its input and starts afresh at each call."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.hooked = [m for m in self.modules if m is not model and hasattr(m, "auto_reset")]
        if model._untraced:
            model.auto_reset = False  # raises, with the reason
        if model.auto_reset:
            functional.reset_net(model)

    def split(self, x: Tensor, chunk: int) -> list[tuple[int, Any]]:
        T = self.model.timesteps
        if self.model._coding is None:
            return [(min(chunk, T - start), x) for start in range(0, T, chunk)]
        return [(len(part), part) for part in self.model._coding(x, T).split(chunk)]

    def leading(self, steps: int, part: Tensor) -> list[tuple[int, ...]]:
        batch = len(part) if self.model._coding is None else part.shape[1]
        return [(steps, batch)]

    def finish(self, y: Any) -> Any:
        return y if self.model._readout is None else self.model._readout(y)

    def settings(self, steps: int) -> Iterator[tuple[Any, str, Any]]:
        yield self.model, "_timesteps", steps
        yield self.model, "_readout", None
        if self.model._coding is not None:
            yield self.model, "_coding", _coded
        yield from super().settings(steps)
        for module in self.hooked:
            yield module, "auto_reset", False
            yield module, "restored", True


def _coded(x_seq: Tensor, T: int) -> Tensor:
    """The coding of a chunk: it was coded with all others."""
    return x_seq


# ---- layers that see all time steps together ----
def _check_layers(model: nn.Module, chunk_statistics: bool) -> None:
    of_steps = {m.norm for m in model.modules() if isinstance(m, BatchNormNode) and m.per_step}
    stepped = {m for container in model.modules() if holds_single_steps(container) for m in container.modules()}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if module is not model and isinstance(module, SpikingNetwork):
            raise ValueError(f"model must not contain a network of to_spiking, got one at {name!r}: chunk that one")
        if isinstance(module, MaxPoolOfRates):
            raise ValueError(f"model must not have max_pool='rates', which counts over all steps, got it at {name!r}")
        if torch.is_grad_enabled() and _keeps_unknown_state(module):
            raise ValueError(
                f"model must keep its states where the second run of a chunk can restore them, but {name!r}, a {kind}, "
                "has a reset and is no snnfast.base.MemoryModule: make it one, or take snnfast's neurons"
            )
        single = getattr(module, "step_mode", None) == "s" and getattr(module, "timesteps", None) is None
        if single and isinstance(module, MemoryModule) and module not in stepped:
            raise ValueError(
                f"model must take all time steps in one call, got the {kind} {name!r} with step_mode='s': call "
                "snnfast.functional.set_step_mode(model, 'm')"
            )
        if isinstance(module, nn.RNNBase):
            raise ValueError(f"model must not have the {kind} {name!r}, whose state chunked cannot hand on")
        if isinstance(module, layer._TemporalEffective):
            raise ValueError(f"model must not have a scale for each of T steps, got the {kind} {name!r}")
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module in of_steps or chunk_statistics:
            continue
        if module.training or module.running_mean is None:
            raise ValueError(
                f"model must not take batch statistics over all time steps, as {name!r}, a {kind} in training, does: "
                "call eval() on it, or accept a chunk's with chunk_statistics=True"
            )


def _keeps_unknown_state(module: nn.Module) -> bool:
    if isinstance(module, MemoryModule) or isinstance(getattr(module, "_memories", None), dict):
        return False
    if type(module).__module__.startswith("timm."):  # whose reset(num_classes) makes another classifier
        return reset_of(module) is not None
    return callable(getattr(module, "reset", None)) or reset_of(module) is not None
