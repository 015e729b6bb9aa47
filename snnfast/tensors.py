"""How the tensors of a call lie in memory, and who looks at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from . import dynamics

__all__ = [
    "ALL_MODULES_HOOKS",
    "apply_unwatched",
    "empty_sequence",
    "empty_state",
    "has_hooks",
    "in_cpu_memory",
    "is_called_plainly",
    "is_plain",
    "is_time_major",
    "is_unwatched",
    "is_wrapped",
    "laid_out_as",
    "nothing",
    "saveable",
    "time_major",
]


# ---- in memory ----
def is_time_major(x: Tensor) -> bool:
    """Whether ``x`` fills its memory without gaps and time is its outermost stride (channels_last is fine)."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return x.shape[0] == 1 or x.stride(0) == expected


def time_major(x: Tensor) -> Tensor:
    """``x`` itself where kernels can walk through it, else a contiguous copy."""
    return x if is_time_major(x) else x.contiguous()


def empty_state(x: Tensor) -> Tensor:
    """One state per neuron, laid out as one time step of ``x``."""
    if x.dtype is torch.float32:  # the usual call, in less time
        return x.new_empty_strided(x.shape[1:], x.stride()[1:])
    return torch.empty_strided(x.shape[1:], x.stride()[1:], dtype=dynamics.state_dtype(x.dtype), device=x.device)


def empty_sequence(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=dynamics.state_dtype(x.dtype), device=x.device)


def nothing(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=dynamics.state_dtype(x.dtype), device=x.device)


def laid_out_as(t: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``t`` in the memory layout and dtype of ``like``: gradients and states may come in any."""
    if t is None or (t.dtype == dtype and t.stride() == like.stride()):
        return t
    return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=like.device).copy_(t)


# ---- who looks ----
def is_unwatched() -> bool:
    """Whether nobody looks at calls now: no compilation or trace, no torch.func transform or tangents, no mode."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


# Of a tensor that torch.func made; it may outlive the transform, in a neuron's state say, and has no memory of its own.
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor


def is_plain(x: Tensor) -> bool:
    """Whether nobody looks at a call with this tensor, which is no subclass and has its own values in memory."""
    return (
        type(x) is Tensor
        and is_unwatched()
        and not x.is_neg()
        and not is_wrapped(x)
        and (x.is_cpu or x.device.type != "meta")
    )


def apply_unwatched(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` where :func:`is_unwatched` and no tensor :func:`is_wrapped`: PyTorch's own search for
    such tensors takes 2 us."""
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def in_cpu_memory(t: Tensor) -> bool:
    """Whether nobody looks at a call with ``t``, which has its own values in a CPU's memory."""
    return (
        is_plain(t)
        and t.is_cpu
        and t.layout is torch.strided
        and not torch._C._functorch.is_legacy_batchedtensor(t)  # autograd.grad(is_grads_batched=True)
        and torch._C._len_torch_function_stack() == 0
        and t.data_ptr() != 0  # no stand-in for zeros, and not freed
    )


# Those of register_module_forward_hook and its like.
ALL_MODULES_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: Any, allowed: tuple[Any, ...] = ()) -> bool:
    """Whether something hooked into ``module``'s calls would see a difference."""
    return any(hook not in allowed for name in _HOOKS for hook in getattr(module, name).values())


def is_called_plainly(module: nn.Module) -> bool:
    """Whether a call of ``module`` is its class's forward and nothing more."""
    return "forward" not in module.__dict__ and not has_hooks(module) and not any(ALL_MODULES_HOOKS)


def saveable(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Copies of those that inference mode made, a state say, for autograd saves no such tensor."""
    for t in tensors:
        if t is not None and t.is_inference():
            return [None if t is None else t.clone() if t.is_inference() else t for t in tensors]
    return tensors
