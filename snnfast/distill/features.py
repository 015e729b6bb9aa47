"""The loss of one pair of feature maps through a 1 x 1 convolution, with its gradients in one pass on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import native
from ..tensors import is_plain

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
    if _is_served(student, teacher, convolution):
        return _ConvolvedMSE.apply(student, teacher, convolution.weight, convolution.bias)[0]
    return F.mse_loss(convolution(time_mean(student)), teacher)


def _is_served(student: Tensor, teacher: Tensor, convolution: nn.Conv2d) -> bool:
    weight, bias = convolution.weight, convolution.bias
    return (
        is_plain(student)  # first: nothing below is for a compiler's eyes
        and bias is not None
        and _is_dense(student)
        and _is_dense(teacher)
        and _is_dense(weight)
        and _is_dense(bias)
        and type(teacher) is Tensor
        and not teacher.requires_grad
        and type(weight) in (nn.Parameter, Tensor)
        and type(bias) in (nn.Parameter, Tensor)
        and student.numel() > 0
        and student.shape[2] == convolution.in_channels
        and teacher.shape == (student.shape[1], convolution.out_channels, *student.shape[3:])
        and max(student.shape[2], teacher.shape[1]) <= _MOST_CHANNELS
        and not torch.is_autocast_enabled("cpu")
        and not (convolution._forward_hooks or convolution._forward_pre_hooks or convolution._backward_hooks)
        and native.missing(student.device) is None
    )


def _is_dense(t: Tensor) -> bool:
    return t.dtype is torch.float32 and t.is_cpu and t.is_contiguous() and not t.is_neg()


class _ConvolvedMSE(torch.autograd.Function):
    """The loss, and the mean over time, which is an output so that the gradients can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor) -> Any:
        loss, *rest = native.feature_loss(student, teacher, weight, bias, any(ctx.needs_input_grad))
        ctx.set_materialize_grads(False)
        ctx.shape = student.shape
        ctx.save_for_backward(teacher, weight, bias, *rest)
        return loss, *rest[:1]

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
