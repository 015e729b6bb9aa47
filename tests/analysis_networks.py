"""A small classifier and its images, for the tests of robustness and of its plot."""

from __future__ import annotations

import torch
from torch import nn

import snnfast

T = 3


def classifier(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(2), nn.Linear(16, 8), snnfast.LIFNode(step_mode="m", tau=1.5), nn.Linear(8, 3))
    for layer in (net[1], net[3]):  # strong enough for its answers to depend on the image
        nn.init.normal_(layer.weight, 0.05)
        nn.init.zeros_(layer.bias)
    return net


def predict(model, x):
    return model(x.expand(T, *x.shape)).mean(0)


DATA = (torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3)
