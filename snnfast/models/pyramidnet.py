"""PyramidNet-18 for small images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ._spiking import Neuron, check_sizes, conv3x3, finish

__all__ = ["PyramidNet", "pyramidnet18"]


class PyramidBlock(nn.Module):
    """Batch norm before, between and after two convolutions; the shortcut is pooled and padded with empty channels."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), conv3x3(cin, cout, stride)
        self.bn2, self.relu = nn.BatchNorm2d(cout), nn.ReLU()
        self.conv2, self.bn3 = conv3x3(cout, cout), nn.BatchNorm2d(cout)
        self.shortcut = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        self.new_channels = cout - cin

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn3(self.conv2(self.relu(self.bn2(self.conv1(self.bn1(x))))))
        return y + F.pad(self.shortcut(x), (0, 0, 0, 0, 0, self.new_channels))


class PyramidNet(nn.Module):
    """Stages of blocks whose width grows by the same amount at each block, from ``width`` to ``width + alpha``."""

    def __init__(self, blocks: tuple[int, ...], width: int, alpha: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(in_channels, width), nn.BatchNorm2d(width)
        stages, cin, done = [], width, 0
        for i, number in enumerate(blocks):
            stage = []
            for j in range(number):
                done += 1
                cout = width + round(alpha * done / sum(blocks))
                stage.append(PyramidBlock(cin, cout, 2 if i and j == 0 else 1))
                cin = cout
            stages.append(nn.Sequential(*stage))
        self.layers = nn.ModuleList(stages)
        self.bn, self.relu = nn.BatchNorm2d(cin), nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(cin, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        for layer in self.layers:
            x = layer(x)
        return self.fc(self.avgpool(self.relu(self.bn(x))).flatten(1))


def pyramidnet18(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    timesteps: int | None = None,
    neuron: Neuron | None = None,
    width: int = 64,
    alpha: int | None = None,
    **kwargs: Any,
) -> Any:
    """PyramidNet-18 (Han et al., "Deep Pyramidal Residual Networks", CVPR 2017) with a stem for small images.

    Four stages of two basic blocks, as the paper's networks of that depth for large images have.

    Args:
        width: channels of the stem.
        alpha: channels of the last block beyond those; by default ``7 * width``, which ends at the 512 of ResNet-18.

    The other arguments, the result and the errors are those of :func:`~snnfast.models.resnet18`.

    Example:
        >>> import torch
        >>> pyramidnet18(timesteps=2, width=8)(torch.rand(3, 3, 32, 32)).shape
        torch.Size([2, 3, 10])
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels, width=width)
    if alpha is None:
        alpha = 7 * width
    elif not isinstance(alpha, int) or alpha < 0:
        raise ValueError(f"alpha must be a whole number from 0, got {alpha!r}")
    net = PyramidNet((2, 2, 2, 2), width, alpha, num_classes, in_channels)
    return finish(net, timesteps, neuron, kwargs)
