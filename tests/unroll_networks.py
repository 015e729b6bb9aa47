"""A network whose states go through forward, as the tests of unroll use it."""

from __future__ import annotations

import pytest
from torch import nn

snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")


class FullyConnected(nn.Module):
    """The network of snnTorch's tutorial 5, one time step: states in, states out."""

    def __init__(self, **keywords):
        super().__init__()
        self.fc1 = nn.Linear(12, 16)
        self.lif1 = snntorch.Leaky(beta=0.5, **keywords)
        self.fc2 = nn.Linear(16, 5)
        self.lif2 = snntorch.Leaky(beta=0.75, **keywords)

    def forward(self, x, mem1, mem2):
        spk1, mem1 = self.lif1(self.fc1(x), mem1)
        spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
        return spk2, mem1, mem2
