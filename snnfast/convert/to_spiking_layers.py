"""The modules that a converted network has besides its neurons; all see time folded into the batch, ``[T * B, *]``."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..neuron import BaseNode

__all__ = [
    "DrawnOnce",
    "DropPath",
    "Dropout",
    "MaxPoolOfRates",
    "Repeat",
    "ScaledNeuron",
    "prepare_neuron",
    "repeat",
    "stand_in",
]


def repeat(x: Any, T: int) -> Any:
    """``[B, *]`` -> ``[T * B, *]``, the same at every step and in the same memory format; numbers stay as they are.

    A list of tensors, such as the branches that a block gets, is repeated one by one.
    """
    if isinstance(x, (list, tuple)) and not isinstance(x, torch.Size):
        parts = [repeat(part, T) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)  # named tuples take them one by one
    if T == 1 or not isinstance(x, Tensor) or x.dim() == 0:
        return x
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).repeat(T, 1, 1, 1).permute(0, 3, 1, 2)
    # Not expand and flatten: torch.export cannot prove their strides for every batch size.
    return x.repeat(T, *(1,) * (x.dim() - 1))


class Repeat(nn.Module):
    """Repeats what was computed once from a constant input, where it meets what changes with time."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps

    def forward(self, x: Any) -> Any:
        return repeat(x, self.timesteps)

    def extra_repr(self) -> str:
        return f"timesteps={self.timesteps}"


# ---- neurons ----
def _start_afresh(neuron: Any, args: Any) -> None:
    """Forward pre-hook: a call sees all time steps of its sequences, so it starts from the initial state.

    A second call within one forward (gradient checkpointing, a module shared between layers) then has the first one's
    spikes, or its own, and never a state left over.
    """
    if neuron.auto_reset:
        neuron.reset()
    elif not (torch.compiler.is_compiling() or neuron.restored) and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a neuron with auto_reset=False was called again by torch.utils.checkpoint, from a later state than in the "
            "forward. Use snnfast.checkpoint.checkpoint, which restores it, or leave auto_reset at True"
        )


def _repeat_input(neuron: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward pre-hook of the first neurons: their input is constant and was computed once."""
    x, *rest = args
    # The kernels repeat it themselves, if nobody looks at the input between here and them.
    hidden = next(reversed(neuron._forward_pre_hooks.values())) is _repeat_input and not rest
    if hidden and isinstance(x, Tensor) and isinstance(neuron, BaseNode) and neuron._takes_constant(x):
        return args
    return (repeat(x, neuron.timesteps), *rest)


def prepare_neuron(neuron: nn.Module, repeats: bool) -> nn.Module:
    """``neuron`` with the hooks it needs within a converted network."""
    neuron.auto_reset, neuron.restored = True, False  # type: ignore[assignment]
    surrogate = getattr(neuron, "surrogate_function", None)
    if isinstance(surrogate, nn.Module):
        # The default is one object for all neurons, and torch.export hands out stand-ins for shared modules, which the
        # kernels do not know: the program would contain the plain loop.
        neuron.surrogate_function = copy.deepcopy(surrogate)
    if callable(getattr(neuron, "reset", None)):
        neuron.register_forward_pre_hook(_start_afresh)
    if repeats:
        neuron.register_forward_pre_hook(_repeat_input)
    return neuron


class ScaledNeuron(nn.Module):
    """A neuron whose spikes count as much as its threshold, so that its mean output is the activation of a ReLU.

    The threshold is part of the ``state_dict`` (``_extra_state``): it belongs to the weights it was found for.
    """

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(x) * self.neuron.v_threshold

    def set_threshold(self, value: float) -> None:
        """Spike at ``value`` and start half-way there, which rounds the spike count to the nearest."""
        neuron: Any = self.neuron
        neuron.v_threshold = float(value)
        neuron.set_reset_value("v", float(value) / 2)
        neuron.reset()

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.neuron.v_threshold, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.set_threshold(float(state))


class Observer(nn.Module):
    """A ReLU that remembers the largest activation, or a percentile of all; the network's stand-in for a neuron."""

    def __init__(self, percentile: float, repeats: bool) -> None:
        super().__init__()
        self.percentile, self.repeats = percentile, repeats
        self.limit = float("inf")  # 6 for a ReLU6: a neuron cannot fire more than once a step, so it is limited too
        self.threshold = 0.0
        self.timesteps = 1

    def forward(self, x: Tensor) -> Tensor:
        y = x.clamp(0.0, self.limit)
        values = y.detach().float().flatten()
        largest = values.numel() - max(1, round(self.percentile / 100 * values.numel())) + 1
        # Not kthvalue: it takes quadratic time on as many equal values as a ReLU's zeros are.
        self.threshold = max(self.threshold, values.topk(largest, sorted=False).values.min().item())
        return y


def limit_of(thing: Any, activation: str | None) -> float:
    """The largest output of an activation, or of the observer in its place."""
    return getattr(thing, "limit", 6.0 if activation in ("ReLU6", "relu6") else float("inf"))


# ---- dropout and pooling ----
DROPOUTS = {nn.Dropout: "dropout", nn.Dropout1d: "feature_dropout", nn.Dropout2d: "feature_dropout"}
DROPOUTS[nn.Dropout3d] = "feature_dropout"
DROPOUT_FUNCTIONS = {F.dropout: "dropout", torch.dropout: "dropout", F.dropout1d: "feature_dropout"}
DROPOUT_FUNCTIONS |= {F.dropout2d: "feature_dropout", F.dropout3d: "feature_dropout"}
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
POOL_FUNCTIONS = {
    function: module
    for module in POOLS[:3]
    for name in (module.__name__.replace("MaxPool", "max_pool"),)
    for function in (getattr(F, name), getattr(torch, name))
} | {
    getattr(F, name): module
    for module in POOLS[3:]
    for name in (module.__name__.replace("AdaptiveMaxPool", "adaptive_max_pool"),)
}
STOCHASTIC_DEPTHS = ("DropPath", "StochasticDepth")  # classes of timm's and torchvision's, by name: neither is needed


class DrawnOnce(nn.Module):
    """A layer that draws a random mask once for all time steps."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.next_mask: int | None = None  # for snnfast.chunked, whose calls are parts of one, and draw in the first
        self.masks: tuple[Tensor, ...] = ()  # one for each place where the network calls this

    def draw(self, x: Tensor) -> Tensor:
        """A mask that broadcasts to one time step ``x`` ``[B, *]``."""
        raise NotImplementedError

    def masked(self, x: Tensor) -> Tensor:
        """``[T * B, *]`` times the mask."""
        x = x.unflatten(0, (self.timesteps, -1))
        if self.next_mask is None:
            return (x * self.draw(x[0])).flatten(0, 1)
        if self.next_mask == len(self.masks):
            self.masks = (*self.masks, self.draw(x[0]))
        mask = self.masks[self.next_mask]
        self.next_mask += 1
        return (x * mask).flatten(0, 1)


class Dropout(DrawnOnce):
    """Dropout with one mask per sample for all its time steps.

    A mask that changes at each step would average out over time; this is what SpikingJelly does too.

    Args:
        kind: how :mod:`torch.nn` names it: ``'dropout'`` drops elements, ``'feature_dropout'`` whole channels.
        always: drop in evaluation too, as a functional call with ``training=True`` does.
    """

    def __init__(self, p: float, kind: str, timesteps: int, always: bool = False) -> None:
        super().__init__(timesteps)
        self.p, self.kind, self.always = p, kind, always

    def draw(self, x: Tensor) -> Tensor:
        return getattr(torch, self.kind)(torch.ones_like(x), self.p, True)

    def forward(self, x: Tensor) -> Tensor:
        return self.masked(x) if (self.training or self.always) and self.p else x

    def extra_repr(self) -> str:
        return f"p={self.p}, timesteps={self.timesteps}"


class DropPath(DrawnOnce):
    """Stochastic depth, timm's ``DropPath`` or torchvision's ``StochasticDepth``, with one draw per sample for all its
    time steps."""

    def __init__(self, module: nn.Module, timesteps: int) -> None:
        super().__init__(timesteps)
        self.module = module

    def draw(self, x: Tensor) -> Tensor:
        return self.module(x.new_ones(len(x), *(1,) * (x.dim() - 1)))  # it multiplies each sample by one number

    def forward(self, x: Tensor) -> Tensor:
        return self.masked(x) if self.training else x

    def extra_repr(self) -> str:
        return f"timesteps={self.timesteps}"


class MaxPoolOfRates(nn.Module):
    """Max-pooling of firing rates: the largest spike count of a window so far, as spikes at the steps where it grows.

    A maximum of spikes at each step counts a window's spikes at different steps as if they came from one neuron, which
    overestimates its largest rate; here the pooled count after each step is exactly the largest count (after the idea
    of the gated max-pooling of Rueckauer et al., "Conversion of Continuous-Valued Deep Networks to Efficient
    Event-Driven Networks for Image Classification", Frontiers in Neuroscience 2017).
    """

    def __init__(self, pool: nn.Module, timesteps: int) -> None:
        super().__init__()
        self.pool = pool
        self.timesteps = timesteps

    def forward(self, x: Tensor) -> Tensor:
        T = self.timesteps
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32  # bfloat16 counts to 256 only
        counts = self.pool(x.unflatten(0, (T, -1)).cumsum(0, dtype=dtype).flatten(0, 1)).unflatten(0, (T, -1))
        return torch.diff(counts, dim=0, prepend=torch.zeros_like(counts[:1])).flatten(0, 1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"timesteps={self.timesteps}"


def stand_in(function: Any, args: Any, kwargs: Any, timesteps: int, pool_rates: bool) -> nn.Module | None:
    """What stands for a call of a functional dropout or max-pooling where there is time; ``None`` for other calls."""
    if function in DROPOUT_FUNCTIONS:
        given = dict(zip(("input", "p", "training"), args, strict=False)) | dict(kwargs)
        p, training = given.get("p", 0.5), given.get("training", given.get("train", True))
        if training is not True or not isinstance(p, (int, float)):
            return None
        return Dropout(p, DROPOUT_FUNCTIONS[function], timesteps, always=True)
    if not pool_rates or function not in POOL_FUNCTIONS:
        return None
    kind: Any = POOL_FUNCTIONS[function]
    order: tuple[str, ...] = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    if "Adaptive" in kind.__name__:
        order = ("input", "output_size", "return_indices")
    given = dict(zip(order, args, strict=False)) | dict(kwargs)
    if given.get("return_indices"):
        return None
    known = inspect.signature(kind.__init__).parameters
    return MaxPoolOfRates(kind(**{k: v for k, v in given.items() if k in known}), timesteps)
