"""Wide residual networks: WRN-16-2 and WRN-28-4."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._spiking import Neuron, check_sizes, conv1x1, conv3x3, finish

__all__ = ["WideResNet", "wrn16_2", "wrn28_4"]


class WideBlock(nn.Module):
    """Activations before convolutions; where the width changes, the shortcut starts from the first activation."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.relu1, self.conv1 = nn.BatchNorm2d(cin), nn.ReLU(), conv3x3(cin, cout, stride)
        self.bn2, self.relu2, self.conv2 = nn.BatchNorm2d(cout), nn.ReLU(), conv3x3(cout, cout)
        self.shortcut = conv1x1(cin, cout, stride) if stride != 1 or cin != cout else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(self.relu2(self.bn2(self.conv1(y)))) + identity


class WideResNet(nn.Module):
    """Three groups of ``(depth - 4) / 6`` blocks, with ``width * widen``, twice and four times that many channels."""

    def __init__(self, depth: int, widen: int, width: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width)
        groups, cin = [], width
        for i in range(3):
            cout, blocks = width * widen * 2**i, []
            for j in range((depth - 4) // 6):
                blocks.append(WideBlock(cin, cout, 2 if i and j == 0 else 1))
                cin = cout
            groups.append(nn.Sequential(*blocks))
        self.layers = nn.ModuleList(groups)
        self.bn, self.relu = nn.BatchNorm2d(cin), nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(cin, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for layer in self.layers:
            x = layer(x)
        return self.fc(self.avgpool(self.relu(self.bn(x))).flatten(1))


def wrn16_2(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    timesteps: int | None = None,
    neuron: Neuron | None = None,
    width: int = 16,
    **kwargs: Any,
) -> Any:
    """WRN-16-2, 0.69 million parameters (Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016).

    The arguments, the result and the errors are those of :func:`~snnfast.models.resnet18`. As a spiking network it adds
    currents, not spikes, over the shortcuts.

    Example:
        >>> import torch
        >>> wrn16_2(timesteps=2)(torch.rand(3, 3, 32, 32)).shape
        torch.Size([2, 3, 10])
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels, width=width)
    return finish(WideResNet(16, 2, width, num_classes, in_channels), timesteps, neuron, kwargs)


def wrn28_4(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    timesteps: int | None = None,
    neuron: Neuron | None = None,
    width: int = 16,
    **kwargs: Any,
) -> Any:
    """WRN-28-4, 5.85 million parameters; otherwise as :func:`wrn16_2`."""
    check_sizes(num_classes=num_classes, in_channels=in_channels, width=width)
    return finish(WideResNet(28, 4, width, num_classes, in_channels), timesteps, neuron, kwargs)
