"""The loss of one pair of feature maps through a 1 x 1 convolution, with its gradients in one pass on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import native
from ..tensors import in_cpu_memory, is_called_plainly

_MOST_CHANNELS = 256  # beyond, torch's own convolutions are as fast


def time_mean(x: Tensor) -> Tensor:
    """Features ``[T, B, *]`` -> their mean over time ``[B, *]``."""
    # Divided after the sum: the backward of mean() divides once for every step.
    return x[0] if len(x) == 1 else x.sum(0) / len(x)


def convolved_mse(student: Tensor, teacher: Tensor, convolution: nn.Conv2d) -> Tensor:
    """``F.mse_loss(convolution(time_mean(student)), teacher)`` for a 1 x 1 ``convolution``.

    Args:
        student: ``[T, B, C, H, W]``.
        teacher: ``[B, C_teacher, H, W]``, fixed.
    """
    if not _is_served(student, teacher, convolution):
        return F.mse_loss(convolution(time_mean(student)), teacher)
    weight, bias = convolution.weight, convolution.bias
    assert bias is not None  # _is_served has seen to it
    if torch.is_grad_enabled() and (student.requires_grad or weight.requires_grad or bias.requires_grad):
        return _ConvolvedMSE.apply(student, teacher, weight, bias)[0]
    return native.feature_loss(student, teacher, weight, bias, False)[0]


def _is_served(student: Tensor, teacher: Tensor, convolution: nn.Conv2d) -> bool:
    return (
        _is_dense(student)  # first: nothing below is for a compiler's eyes
        and _is_dense(teacher)
        and not teacher.requires_grad
        and type(convolution) is nn.Conv2d
        and is_called_plainly(convolution)
        and convolution.weight.shape == (teacher.shape[1], student.shape[2], 1, 1)
        and all(type(p) in (nn.Parameter, Tensor) and _is_dense(p.detach()) for p in convolution.parameters())
        and convolution.bias is not None
        and convolution.stride == (1, 1)
        and convolution.padding == (0, 0)
        and teacher.shape == (student.shape[1], teacher.shape[1], *student.shape[3:])
        and max(student.shape[2], teacher.shape[1]) <= _MOST_CHANNELS
        and not torch.is_autocast_enabled("cpu")
        and native.missing(student.device) is None
    )


def _is_dense(t: Tensor) -> bool:
    return t.dtype is torch.float32 and in_cpu_memory(t) and t.is_contiguous() and t.numel() > 0


class _ConvolvedMSE(torch.autograd.Function):
    """The loss, and the mean over time, which is an output so that the gradients can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor) -> Any:
        loss, *rest = native.feature_loss(student, teacher, weight, bias, True)
        ctx.set_materialize_grads(False)
        ctx.shape = student.shape
        ctx.save_for_backward(teacher, weight, bias, *rest)
        return loss, rest[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_mean: Tensor | None) -> Any:
        teacher, weight, bias, mean, of_step, of_weight, of_bias = ctx.saved_tensors
        shape = ctx.shape
        of_student = None if grad_mean is None else (grad_mean / shape[0]).expand(shape)
        if grad is None:
            return of_student, None, None, None
        if torch.is_grad_enabled():  # to be differentiated again: by torch's operations
            inputs = (mean, weight, bias)
            loss = F.mse_loss(F.conv2d(mean, weight, bias), teacher)
            wanted = [t for t in inputs if t.requires_grad]
            found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
            of_mean, of_weight, of_bias = (next(found) if t.requires_grad else None for t in inputs)
            of_loss = (of_mean / shape[0]).expand(shape)
        else:
            of_loss, of_weight, of_bias = of_step.expand(shape) * grad, of_weight * grad, of_bias * grad
        return of_loss if of_student is None else of_loss + of_student, None, of_weight, of_bias
