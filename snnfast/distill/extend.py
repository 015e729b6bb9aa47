"""A student that runs more time steps for one call: its ``timesteps`` and its batch norm, both put back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..fused import BatchNormNode

BATCH_NORM = ("all", "student", "per_step")
_NORMS = ((nn.BatchNorm1d, (2, 3)), (nn.BatchNorm2d, (4,)), (nn.BatchNorm3d, (5,)))


def timed_modules(model: nn.Module) -> list[Any]:
    """The modules with a whole number ``timesteps`` that can be set: snnfast's neurons, and what repeats an input."""
    found = []
    for module in model.modules():
        value = getattr(module, "timesteps", None)
        computed = getattr(type(module), "timesteps", None)
        if isinstance(value, int) and not isinstance(value, bool):
            if isinstance(computed, property) and computed.fset is None:
                continue
            found.append(module)
    return found


@contextlib.contextmanager
def timesteps_set(modules: Sequence[Any], timesteps: int) -> Iterator[None]:
    """Every one of ``modules`` runs ``timesteps`` steps while the block runs."""
    before = [module.timesteps for module in modules]
    try:
        for module in modules:
            module.timesteps = timesteps
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.timesteps = value


def _group_norm_over_time(norm: Any, x: Tensor, groups: Sequence[int], counted: int) -> Tensor:
    """Batch norm of ``x`` ``[T, B, C, *]`` with statistics for each group of steps by itself.

    The running statistics move once, to the mean over the first ``counted`` groups: those that inference will run.
    """
    buffers = (norm.running_mean, norm.running_var)
    tracked = norm.track_running_stats and norm.running_mean is not None
    momentum = 0.0
    if tracked:
        norm.num_batches_tracked.add_(1)
        momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    parts, seen = [], []
    for i, part in enumerate(x.split(list(groups))):
        statistics: Any = (None, None)
        if tracked and i < counted:
            # With a momentum of 1 fresh buffers take the statistics of this group.
            statistics = buffers if counted == 1 else tuple(torch.zeros_like(b) for b in buffers)
            seen.append(statistics)
        rate = momentum if counted == 1 else 1.0
        mean, var = statistics
        y = F.batch_norm(part.flatten(0, 1), mean, var, norm.weight, norm.bias, True, rate, norm.eps)
        parts.append(y.unflatten(0, part.shape[:2]))
    if tracked and counted > 1:
        with torch.no_grad():
            for buffer, values in zip(buffers, zip(*seen, strict=True), strict=True):
                buffer.lerp_(torch.stack(values).mean(0), momentum)
    return torch.cat(parts)


def check_batch_norms(model: nn.Module, mode: str) -> None:
    """Refuse batch norms whose statistics :func:`batch_norm_by_steps` cannot take apart.

    Raises:
        ValueError: the message names the class.
    """
    known = tuple(kind for kind, _ in _NORMS)
    for name, module in model.named_modules():
        own = isinstance(module, BatchNormNode) and module.per_step  # statistics of each step, and no others
        if own or (isinstance(module, _BatchNorm) and not isinstance(module, known)):
            kind = f"{type(module).__name__}{'(per_step=True)' * own}"
            raise ValueError(f"batch_norm={mode!r} does not work with {kind} in student (at {name!r}); use 'all'")


@contextlib.contextmanager
def batch_norm_by_steps(model: nn.Module, mode: str, T_teacher: int, T_student: int, B: int) -> Iterator[None]:
    """While the block runs, the training-mode batch norms of ``model`` take their statistics over fewer steps than all.

    ``mode`` ``'student'``: the first ``T_student`` steps together, as without distillation, and the rest together;
    ``'per_step'``: every step by itself. The modules keep their parameters, buffers and keys. A batch norm that sees
    one step at a time has statistics per step anyway.
    """
    if mode == "all":
        yield
        return
    groups = [T_student, T_teacher - T_student] if mode == "student" else [1] * T_teacher
    counted = 1 if mode == "student" else T_student
    changed = []

    def replacement(norm: Any, dims: tuple[int, ...], original: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            if norm.training and x.shape[:1] == (T_teacher * B,) and x.dim() in dims:
                return _group_norm_over_time(norm, x.unflatten(0, (T_teacher, B)), groups, counted).flatten(0, 1)
            if norm.training and x.shape[:2] == (T_teacher, B) and x.dim() == dims[-1] + 1:
                return _group_norm_over_time(norm, x, groups, counted)
            return original(x)

        return forward

    try:
        for module in model.modules():
            for kind, dims in _NORMS:
                if isinstance(module, kind):
                    changed.append((module, module.__dict__.get("forward")))
                    module.__dict__["forward"] = replacement(module, dims, module.forward)
        yield
    finally:
        for module, own in changed:
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own
