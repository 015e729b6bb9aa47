"""Residual networks for small images: ResNet-18, ResNet-19 and SEW-ResNet-18."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._spiking import Neuron, check_sizes, conv1x1, conv3x3, finish

__all__ = ["ResNet", "resnet18", "resnet19", "sew_resnet18"]


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut; the activation comes after the sum."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = conv3x3(cin, cout, stride), nn.BatchNorm2d(cout), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = conv3x3(cout, cout), nn.BatchNorm2d(cout), nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(conv1x1(cin, cout, stride), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.downsample(x))


class SEWBlock(BasicBlock):
    """The same, with the activations before the sum: as spikes, what is added are spikes."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__(cin, cout, stride)
        if isinstance(self.downsample, nn.Sequential):
            self.downsample.append(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y))) + self.downsample(x)


class ResNet(nn.Module):
    """A 3×3 stem, stages of blocks that halve the size from the second on, average pooling and a classifier.

    Args:
        blocks: how many blocks each stage has.
        widths: how many channels.
        hidden: size of a hidden layer before the classifier's last, 0 for none.
    """

    def __init__(
        self,
        block: type[BasicBlock],
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        num_classes: int,
        in_channels: int,
        hidden: int = 0,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = conv3x3(in_channels, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU()
        stages, cin = [], widths[0]
        for i, (number, width) in enumerate(zip(blocks, widths, strict=True)):
            strides = [2 if i else 1] + [1] * (number - 1)
            stages.append(nn.Sequential(*(block(cin if j == 0 else width, width, s) for j, s in enumerate(strides))))
            cin = width
        self.layers = nn.ModuleList(stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = nn.Linear(cin, num_classes)
        if hidden:
            self.fc = nn.Sequential(nn.Linear(cin, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for layer in self.layers:
            x = layer(x)
        return self.fc(self.avgpool(x).flatten(1))


def _multiples(width: int, *factors: int) -> tuple[int, ...]:
    return tuple(width * f for f in factors)


def resnet18(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    timesteps: int | None = None,
    neuron: Neuron | None = None,
    width: int = 64,
    **kwargs: Any,
) -> Any:
    """ResNet-18 with a stem for small images (He et al., CVPR 2016): stages of 64, 128, 256 and 512 channels.

    Args:
        timesteps: ``None`` for the ANN, ``[B, in_channels, H, W]`` -> ``[B, num_classes]``; ``T`` for the spiking
            network, -> ``[T, B, num_classes]``. ``H`` and ``W`` are any from 16. Inputs with time, such as event frames
            ``[T, B, in_channels, H, W]``, take ``coding="temporal"``.
        neuron: class of the neurons, :class:`~snnfast.LIFNode` by default.
        width: channels of the first stage.
        **kwargs: the neurons' arguments, and those of :func:`snnfast.to_spiking`, which makes the network spiking.

    Raises:
        ValueError: arguments for neurons without ``timesteps``; a size that is not a whole number from 1.

    Example:
        >>> import torch
        >>> resnet18(timesteps=2, width=8, tau=2.0)(torch.rand(3, 3, 32, 32)).shape
        torch.Size([2, 3, 10])
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels, width=width)
    net = ResNet(BasicBlock, (2, 2, 2, 2), _multiples(width, 1, 2, 4, 8), num_classes, in_channels)
    return finish(net, timesteps, neuron, kwargs)


def resnet19(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    timesteps: int | None = None,
    neuron: Neuron | None = None,
    width: int = 128,
    **kwargs: Any,
) -> Any:
    """ResNet-19 (Zheng et al., "Going Deeper With Directly-Trained Larger Spiking Neural Networks", AAAI 2021).

    Stages of 3, 3 and 2 blocks with 128, 256 and 512 channels, and a hidden layer of 256 before the last.
    The arguments, the result and the errors are those of :func:`resnet18`.
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels, width=width)
    net = ResNet(BasicBlock, (3, 3, 2), _multiples(width, 1, 2, 4), num_classes, in_channels, hidden=2 * width)
    return finish(net, timesteps, neuron, kwargs)


def sew_resnet18(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    timesteps: int | None = None,
    neuron: Neuron | None = None,
    width: int = 64,
    **kwargs: Any,
) -> Any:
    """SEW-ResNet-18, whose shortcuts add spikes (Fang et al., "Deep Residual Learning in SNNs", NeurIPS 2021).

    The arguments, the result and the errors are those of :func:`resnet18`.
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels, width=width)
    net = ResNet(SEWBlock, (2, 2, 2, 2), _multiples(width, 1, 2, 4, 8), num_classes, in_channels)
    return finish(net, timesteps, neuron, kwargs)
