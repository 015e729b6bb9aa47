"""Networks written by hand as a loop over time, one step after another: the reference of to_spiking's tests."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import snnfast

T, B = 4, 3


class Spike(torch.autograd.Function):
    """1 where u >= 0; its derivative that of a sigmoid of slope 4, as the default surrogate's."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        p = torch.sigmoid(4 * u)
        return grad * 4 * p * (1 - p)


class Loop(nn.Module):
    """A leaky (tau = 2, hard reset) or an integrate-and-fire (soft reset) neuron, one step a call."""

    def __init__(self, leaky=True):
        super().__init__()
        self.leaky, self.v = leaky, 0.0

    def forward(self, x):
        h = self.v + (x - self.v) / 2.0 if self.leaky else self.v + x
        s = Spike.apply(h - 1.0)
        self.v = (1.0 - s) * h if self.leaky else h - s
        return s


def loops(number, leaky=True):
    return [Loop(leaky) for _ in range(number)]


NEURONS = [
    pytest.param(True, {"neuron": snnfast.LIFNode, "tau": 2.0}, id="LIF"),
    pytest.param(False, {"neuron": snnfast.IFNode, "v_reset": None}, id="IF, soft reset"),
]


def check_equal(net, ann, x, reference):
    """The same logits, and the same gradients of weights and input."""
    x_net, x_ann = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = net(x_net)
    want = reference(ann, x_ann)
    assert got.shape == want.shape
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    assert want.std() > 0
    weight = torch.randn_like(want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    assert torch.allclose(x_net.grad, x_ann.grad, rtol=1e-7, atol=1e-10)
    of_net = dict(net.named_parameters())
    for name, p in ann.named_parameters():
        assert (p.grad is None) == (of_net[name].grad is None), name
        if p.grad is not None:
            assert torch.allclose(of_net[name].grad, p.grad, rtol=1e-7, atol=1e-10), name
            assert p.grad.abs().sum() > 0, name


class Functional(nn.Module):
    """ReLU in all the ways one can call it, and a view by the batch size of the input."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.fc1, self.fc2, self.fc3 = nn.Linear(4 * 16, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        b = x.size(0)
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x), inplace=True)
        x = x.view(b, -1)
        x = self.fc1(x).relu_()
        return self.fc3(self.fc2(x).clamp(min=0))


def strong(ann):
    """Weights and biases large enough for spikes in every layer, in float64."""
    with torch.no_grad():
        for m in ann.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                m.weight.mul_(4.0)
                if m.bias is not None:
                    m.bias.uniform_(0.2, 1)
    return ann.double()


class TorchvisionBlock(nn.Module):
    """As torchvision writes it: one in-place ReLU for both activations, an in-place sum."""

    def __init__(self, cin, cout, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class TorchvisionResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(TorchvisionBlock(4, 4), TorchvisionBlock(4, 4))
        self.layer2 = nn.Sequential(TorchvisionBlock(4, 8, 2), TorchvisionBlock(8, 8))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(8, 5)

    def _forward_impl(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    def forward(self, x):
        return self._forward_impl(x)


def trained_norms(ann):
    """Batch norms as after training: their statistics and weights are anything."""
    for m in ann.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.3, 1)
            nn.init.uniform_(m.weight, 1, 3)
            nn.init.normal_(m.bias, 0, 0.5)
    return ann


class Preactivated(nn.Module):
    """A shortcut around the first neuron: what is constant meets what is not."""

    def __init__(self):
        super().__init__()
        self.stem, self.relu = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()
        self.conv, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4 * 8 * 8, 5)

    def forward(self, x):
        x = self.stem(x)
        b, c, h, w = x.shape
        y = self.conv(self.relu(x)) + x
        y = torch.cat([y, x * 2, y.new_ones(b, c, h, w)], 1).reshape(b, 3 * c, -1)
        return self.head(y[:, :c].reshape(b, -1)) + y.mean((1, 2)).view(x.shape[0], 1)
