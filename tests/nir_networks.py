"""What the tests of NIR share: networks that spike, and a run that leaves them reset."""

from __future__ import annotations

import torch
from torch import nn

from snnfast import functional

DT = 1e-4


def spikes(net, x):
    functional.reset_net(net)
    with torch.no_grad():
        out = net(x)
    functional.reset_net(net)
    return out


def randomised(net, seed=0):
    """Weights and running statistics of a network that has been trained, so that it spikes."""
    generator = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_(0, 0.3, generator=generator)
            m.running_var.uniform_(0.5, 2.0, generator=generator)
            with torch.no_grad():
                m.weight.uniform_(0.8, 1.6, generator=generator)
                m.bias.normal_(0.2, 0.2, generator=generator)
        elif isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            fan_in = m.weight[0].numel()
            nn.init.normal_(m.weight, 1.0 / fan_in, 2.0 / fan_in**0.5, generator=generator)
    return net.eval()
