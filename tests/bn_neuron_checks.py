"""What the tests of batch norm and neuron in one share: inputs, norms, and a run with its gradients."""

from __future__ import annotations

import torch
from torch import nn

from snnfast.fused import BatchNormNode

T = 4


def norm_for(x, affine=True, **kwargs):
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    norm = kinds[x.dim()](x.shape[1], affine=affine, **kwargs)
    if affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.2, 0.6)
    if norm.running_mean is not None:
        nn.init.normal_(norm.running_mean, 2.5, 0.3)
        nn.init.uniform_(norm.running_var, 2.0, 4.0)
    return norm.double() if x.dtype == torch.float64 else norm


def random_input(*shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    return (torch.randn(shape) * 1.7 + 2.5).to(dtype).contiguous(memory_format=memory_format)


def run(model, x, weights=None, v_weight=0.0):
    """Spikes, gradients of x and of all parameters."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    s = model(x)
    if weights is None:
        weights = torch.linspace(-1, 1, s.numel(), dtype=torch.float64).view(s.shape).to(s.dtype)
    neuron = model.neuron if isinstance(model, BatchNormNode) else model[1]
    ((s * weights).sum() + v_weight * neuron.v.sum()).backward()
    return s.detach(), x.grad, [p.grad for p in model.parameters()]


def close(got, want, tolerance):
    return (got.double() - want.double()).norm() <= tolerance * want.double().norm() + 1e-12
