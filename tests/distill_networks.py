"""Small students and teachers for the tests of distillation, and the losses' formulas in float64."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

import snnfast
from snnfast import surrogate
from snnfast.neuron import BaseNode

T, B, CLASSES = 4, 6, 5


def lif(**kwargs) -> snnfast.LIFNode:
    return snnfast.LIFNode(decay_input=False, v_reset=None, surrogate_function=surrogate.Rect(), **kwargs)


class Repeat(nn.Module):
    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(self.timesteps, *[1] * (x.dim() - 1))


def folded(channels: int = 8, timesteps: int = T) -> nn.Sequential:
    """[B, 1, 8, 8] -> [T * B, C], as a network whose ReLUs were replaced."""
    net = nn.Sequential(
        *(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), Repeat(timesteps), lif(timesteps=timesteps)),
        *(nn.Conv2d(channels, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), lif(timesteps=timesteps)),
        nn.Flatten(),
        nn.Linear(8 * 16, CLASSES),
    )
    nn.init.normal_(net[-1].weight, std=0.5)  # divergences well above rounding
    return net


class Stepped(nn.Module):
    """The same layers, called once per time step, [B, ...] each; gives [T, B, C]."""

    def __init__(self, net: nn.Sequential, timesteps: int = T) -> None:
        super().__init__()
        self.net, self.T = copy.deepcopy(net), timesteps
        for module in self.net.modules():
            if isinstance(module, BaseNode):
                module.timesteps, module.step_mode = None, "s"
            if isinstance(module, Repeat):
                module.timesteps = 1

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.net(x) for _ in range(self.T)])


class TimeFirst(nn.Module):
    """[T, B, 6] -> [T, B, C], with no module that knows T."""

    def __init__(self, hidden: int = 7) -> None:
        super().__init__()
        self.fc, self.neuron, self.out = nn.Linear(6, hidden), lif(step_mode="m"), nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.neuron(self.fc(x)))


def teacher(channels: int = 12, classes: int = CLASSES, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, channels, 3, padding=1, stride=stride), nn.BatchNorm2d(channels), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    )


def batch(n: int = B) -> tuple[Tensor, Tensor]:
    return 2 * torch.randn(n, 1, 8, 8), torch.randint(CLASSES, (n,))


# ---- formulas, in float64 and without torch ----
def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(student, target, tau):
    """tau^2 * sum_c p log(p / q), mean over everything else."""
    q, p = (softmax(z.detach().numpy().astype(np.float64) / tau) for z in (student, target))
    p = np.broadcast_to(p, q.shape)
    return tau**2 * (p * np.log(p / q)).sum(-1).mean()


def cross_entropy(z, labels):
    p = softmax(z.detach().numpy().astype(np.float64))
    return -np.log(p[np.arange(len(p)), labels.numpy()]).mean()


def close(a: Tensor, b: float) -> bool:
    return abs(a.item() - b) <= 1e-5 * (0.1 + abs(b))  # of float32 logits
