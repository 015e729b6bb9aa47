"""What the tests of packed spikes share: a network that keeps every kind of tensor, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import snnfast
from snnfast import functional
from snnfast.backends import native

T = 4
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
_C = native._C
needs_kernels = pytest.mark.skipif(_C is None, reason="the compiled extension is not built here")


class Residual(nn.Module):
    """Spikes that go two ways, of which one is added to and one is pooled."""

    def __init__(self):
        super().__init__()
        self.conv, self.neuron = nn.Conv2d(8, 8, 3, padding=1), snnfast.LIFNode(timesteps=T)

    def forward(self, x):
        return self.neuron(self.conv(x) + x)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        snnfast.LIFNode(timesteps=T),
        Residual(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        snnfast.fused.BatchNormNode(nn.BatchNorm2d(8), snnfast.ParametricLIFNode(timesteps=T)),
        nn.Flatten(),
        nn.Linear(8 * 36, 16),
        snnfast.IFNode(timesteps=T),
        nn.Linear(16, 3),
    )


def gradients(net, x, context, autocast=False):
    """Output, and the gradients of the input and of every parameter."""
    functional.reset_net(net)
    net.zero_grad()
    x = x.detach().requires_grad_()
    with context, torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = net(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in net.parameters())]


def assert_equal(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def spikes_like(shape, dtype=torch.float32, value=1.0):
    return (torch.rand(shape) < 0.3).to(dtype) * value
