"""Functions on whole networks: reset, step mode, backend, and how a module of one time step sees a sequence.

Public through :mod:`snnfast.functional`. Those on networks treat SpikingJelly's modules as they treat ours.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, base

__all__ = [
    "chunk_multi_step_forward",
    "delay",
    "detach_net",
    "first_spike_index",
    "kaiming_normal_conv_linear_weight",
    "multi_step_forward",
    "redundant_one_hot",
    "reset_net",
    "seq_to_ann_forward",
    "set_backend",
    "set_step_mode",
    "temporal_efficient_training_cross_entropy",
]

ModuleOrModules = Callable[..., Any] | Sequence[Callable[..., Any]]

# SpikingJelly's containers that call single-step modules; ours say so by an attribute `holds_single_steps`.
_THEIR_CONTAINERS = frozenset(
    (
        "StepModeContainer",
        "MultiStepContainer",
        "SeqToANNContainer",
        "TLastMultiStepContainer",
        "TLastSeqToANNContainer",
        "ElementWiseRecurrentContainer",
        "LinearRecurrentContainer",
    )
)

_THEIR_RESETS = {"snntorch": "reset_mem", "sinabs": "reset_states"}  # of one neuron, by library


# ---- state, step mode and backend of every module ----
def _check_net(net: Any) -> None:
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")


def _modules_with(net: nn.Module, name: str) -> Iterator[Any]:
    _check_net(net)
    return (m for m in net.modules() if hasattr(m, name))


def reset_net(net: nn.Module) -> None:
    """Reset every stateful module of ``net``: call it before each new batch of sequences.

    Modules of other libraries that have a ``reset()`` are reset too, and so are snnTorch's and sinabs' neurons. A
    ``reset`` that needs arguments, as that of timm's classifiers does, is another thing and is left alone.

    Raises:
        TypeError: ``net`` is not a module.

    Example:
        >>> import snnfast
        >>> net = nn.Sequential(nn.Linear(3, 2), snnfast.IFNode())
        >>> _ = net(torch.randn(5, 3)); reset_net(net); net[1].v
        0.0
    """
    _check_net(net)
    for module in net.modules():
        reset = reset_of(module)
        if reset is not None:
            reset()


def reset_of(module: nn.Module) -> Any:
    """What returns ``module`` to its initial state, called without arguments; ``None`` where nothing does."""
    reset = getattr(module, "reset", None)  # in snnTorch's neurons a tensor
    if isinstance(module, base.MemoryModule):
        return reset
    if callable(reset) and not isinstance(reset, nn.Module) and _needs_nothing(reset):
        return reset
    return _their_reset(module)


def _needs_nothing(method: Callable[..., Any]) -> bool:
    """Whether ``method`` can be called without arguments: timm's classifiers have a ``reset(num_classes)``."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):  # of a builtin, which does not tell
        return True
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not inspect.Parameter.empty or p.kind in kinds for p in parameters)


def _their_library(module: nn.Module) -> str | None:
    """The package of a neuron that keeps its state in buffers."""
    for cls in type(module).__mro__[:-1]:  # torch.compile before 2.8 cannot look at object
        package = cls.__module__.partition(".")[0]
        if package in _THEIR_RESETS:
            return package
    return None


def _their_reset(module: nn.Module) -> Any:
    library = _their_library(module)
    return None if library is None else getattr(module, _THEIR_RESETS[library], None)


def detach_net(net: nn.Module) -> None:
    """Cut the autograd history of every state in ``net``, snnTorch's and sinabs' neurons included, and keep its value.

    Example:
        >>> import snnfast
        >>> net = nn.Sequential(nn.Linear(3, 2), snnfast.LIFNode(step_mode="m"))
        >>> for x in torch.randn(100, 4, 3).split(20):  # truncated BPTT: gradients go back 20 steps, states 100
        ...     net(x).sum().backward()
        ...     detach_net(net)
    """
    _check_net(net)
    module: Any
    for module in net.modules():
        if _their_library(module) is not None:  # snnTorch's own detach() without arguments does nothing
            for name, state in module._buffers.items():
                if state is not None and state.grad_fn is not None:
                    module._buffers[name] = state.detach()
        elif hasattr(module, "detach"):
            module.detach()


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """A deep copy. Weights that a hook computes before each call, as pruning's do, are copied without their graph.

    Args:
        memo: that of :func:`copy.deepcopy`.

    Raises:
        RuntimeError: a neuron's state belongs to a graph, so that it cannot be copied; the message names the remedy.
    """
    computed = [t for m in model.modules() if m._forward_pre_hooks for t in vars(m).values() if isinstance(t, Tensor)]
    try:
        return copy.deepcopy(
            model, {id(t): t.detach().clone() for t in computed if t.grad_fn is not None} | (memo or {})
        )
    except RuntimeError as error:
        raise RuntimeError(
            "the model cannot be copied, most likely because a neuron's state still belongs to a graph: call "
            "snnfast.functional.reset_net(model) first"
        ) from error


def holds_single_steps(module: nn.Module) -> bool:
    """Whether ``module`` is a container that calls its children one step at a time, whatever the network's mode."""
    kind = type(module)
    if getattr(module, "holds_single_steps", False):
        return True
    return any(c.__name__ in _THEIR_CONTAINERS and c.__module__.startswith("spikingjelly.") for c in kind.__mro__)


def set_step_mode(
    net: nn.Module, step_mode: str, keep_step_mode_instance: type | tuple[type, ...] | None = None
) -> None:
    """Set ``'s'`` (one call per time step) or ``'m'`` (time first, all steps in one call) on every module that has it.

    What is inside a container that calls its children one step at a time (``layer.SeqToANNContainer``,
    ``MultiStepContainer``, ``StepModeContainer``, and SpikingJelly's) keeps its mode.

    Args:
        keep_step_mode_instance: further classes whose children keep their mode.

    Raises:
        TypeError: ``net`` is not a module.
        ValueError: another step mode, or a module that has only the other one.

    Example:
        >>> import snnfast
        >>> net = nn.Sequential(nn.Linear(3, 2), snnfast.IFNode())
        >>> set_step_mode(net, "m"); net[1].step_mode
        'm'
    """
    _check_net(net)
    if step_mode not in ("s", "m"):
        raise ValueError(f"step_mode must be 's' or 'm', got {step_mode!r}")
    keep = keep_step_mode_instance or ()
    modules: list[Any] = [net]
    seen: set[int] = set()
    while modules:
        module = modules.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if hasattr(module, "step_mode"):
            module.step_mode = step_mode
        if not holds_single_steps(module) and not isinstance(module, keep):
            modules.extend(module.children())


def set_backend(net: nn.Module, backend: str, instance: type | tuple[type, ...] = nn.Module) -> None:
    """Set the backend of every neuron in ``net`` that is an ``instance``.

    Args:
        backend: ``'auto'``, ``'native'``, ``'triton'`` or ``'reference'``; the names of older SpikingJelly code
            (``'torch'``, ``'cupy'``, ``'inductor'``) mean ``'auto'``.

    Raises:
        ValueError: an unknown backend.
    """
    name = backends.check_name(backend)
    for module in _modules_with(net, "backend"):
        if isinstance(module, instance):
            module.backend = name  # type: ignore[attr-defined]


# ---- a module of one time step on a sequence ----
def _call(x: Any, modules: ModuleOrModules) -> Any:
    if not isinstance(modules, (list, tuple)):
        modules = (modules,)  # type: ignore[assignment]
    args = x if isinstance(x, tuple) else (x,)
    for module in modules:  # type: ignore[union-attr]
        x = module(*args)
        args = (x,)
    return x


def multi_step_forward(x_seq: Tensor, single_step_module: ModuleOrModules) -> Tensor:
    """Call ``single_step_module`` (or several in turn) on each time step: ``[T, *]`` -> ``[T, *]``.

    Example:
        >>> multi_step_forward(torch.tensor([[1.0], [2.0]]), (torch.square, torch.neg)).flatten()
        tensor([-1., -4.])
    """
    return torch.stack([_call(x, single_step_module) for x in x_seq])


def chunk_multi_step_forward(split_size: int, x_seq: Tensor, multi_step_module: Callable[[Tensor], Tensor]) -> Tensor:
    """Call a multi-step module on ``split_size`` steps of ``x_seq`` ``[T, *]`` at a time; its state goes on."""
    return torch.cat([multi_step_module(x) for x in torch.split(x_seq, split_size)])


def fold_time(x_seq: Tensor) -> Tensor:
    """``[T, B, *]`` -> ``[T * B, *]`` without a copy where strides allow, and in any case channels last if it was."""
    if x_seq.shape[0] == 1:  # flatten gives a batch of 1 a stride with which torch's batch norm has wrong gradients
        return x_seq.squeeze(0)
    if x_seq.dim() > 3 and x_seq.stride(2) == 1 and x_seq.stride(0) != x_seq.shape[1] * x_seq.stride(1):
        # Such as a constant image expanded over time: flatten would copy it into another memory format.
        return x_seq.movedim(2, -1).flatten(0, 1).movedim(-1, 1)
    return x_seq.flatten(0, 1)


def unfold_time(y: Any, T: int, B: int) -> Any:
    """``[T * B, *]`` -> ``[T, B, *]``, of a tensor or each of a tuple."""
    if isinstance(y, tuple):
        return tuple(unfold_time(t, T, B) for t in y)
    if T == 1 and B == 1 and y.shape[:1] == (1,):
        return y.unsqueeze(0)  # as in fold_time
    return y.view(T, B, *y.shape[1:]) if y.is_contiguous() else y.unflatten(0, (T, B))


def seq_to_ann_forward(x_seq: Tensor | tuple[Tensor, ...], stateless_module: ModuleOrModules) -> Any:
    """Call stateless modules on all steps at once, time folded into the batch: ``[T, B, *]`` -> ``[T, B, *]``.

    Args:
        x_seq: one tensor, or a tuple of tensors, which the first module takes as its arguments.
        stateless_module: a module or function, or several to call in turn.

    Returns:
        The output, or a tuple of them, with time unfolded; channels-last input stays channels last.

    Raises:
        ValueError: tensors of different ``[T, B]``.

    Example:
        >>> seq_to_ann_forward(torch.randn(4, 2, 3, 8, 8), nn.Conv2d(3, 5, 3)).shape
        torch.Size([4, 2, 5, 6, 6])
    """
    several = isinstance(x_seq, tuple)
    tensors: tuple[Tensor, ...] = x_seq if isinstance(x_seq, tuple) else (x_seq,)
    T, B = tensors[0].shape[:2]
    if any(t.shape[:2] != (T, B) for t in tensors):
        raise ValueError(
            f"x_seq must hold tensors of one [T, B], got the shapes {', '.join(str(tuple(t.shape)) for t in tensors)}"
        )
    folded = tuple(fold_time(t) for t in tensors)
    return unfold_time(_call(folded if several else folded[0], stateless_module), T, B)


# ---- small functions that training scripts call ----
def redundant_one_hot(labels: Tensor, num_classes: int, n: int) -> Tensor:
    """One-hot labels with each class ``n`` times: ``[B]`` -> ``[B, num_classes * n]``, for ``n`` neurons per class.

    Example:
        >>> redundant_one_hot(torch.tensor([1]), 2, 3)
        tensor([[0., 0., 0., 1., 1., 1.]])
    """
    return F.one_hot(labels, num_classes).repeat_interleave(n, dim=-1).to(torch.get_default_dtype())


def first_spike_index(spikes: Tensor) -> Tensor:
    """``True`` at each neuron's first spike; time is the **last** dimension here: ``[*, T]`` -> bool ``[*, T]``.

    Example:
        >>> first_spike_index(torch.tensor([0.0, 1.0, 1.0]))
        tensor([False,  True, False])
    """
    return (spikes != 0) & (spikes.cumsum(dim=-1) == 1)


def kaiming_normal_conv_linear_weight(net: nn.Module) -> None:
    """Draw the weights of every convolution and linear layer by Kaiming's normal rule with ``a = sqrt(5)``."""
    for module in net.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, a=math.sqrt(5))


def delay(x_seq: Tensor, delay_steps: int) -> Tensor:
    """``x_seq`` ``[T, *]`` later by ``delay_steps``, zeros before.

    Example:
        >>> delay(torch.tensor([1.0, 2.0, 3.0]), 1)
        tensor([0., 1., 2.])
    """
    if delay_steps < 0:
        raise ValueError(f"delay_steps must be a number of time steps from 0, got {delay_steps!r}")
    kept = max(x_seq.shape[0] - delay_steps, 0)
    return torch.cat((torch.zeros_like(x_seq[: x_seq.shape[0] - kept]), x_seq[:kept]))


def temporal_efficient_training_cross_entropy(x_seq: Tensor, target: Tensor) -> Tensor:
    """SpikingJelly's name for the mean over all steps of each one's cross-entropy; see :func:`snnfast.losses.tet_loss`.

    Args:
        x_seq: outputs ``[T, B, C, *]``.
        target: classes ``[B, *]``.
    """
    T = x_seq.shape[0]
    return F.cross_entropy(x_seq.flatten(0, 1), target.expand(T, *target.shape).flatten(0, 1))
