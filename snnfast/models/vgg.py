"""VGG networks for small images, with batch norm: VGG-9 and VGG-11."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._spiking import Neuron, check_sizes, conv3x3, finish

__all__ = ["VGG", "vgg9", "vgg11"]


class VGG(nn.Module):
    """Convolutions and poolings one after another, adaptive average pooling and a classifier.

    Args:
        plan: channels of each convolution; 0 for a 2×2 max-pooling.
        pooled: side of what the average pooling leaves.
        hidden: size of the classifier's hidden layer, 0 for none.
    """

    def __init__(self, plan: tuple[int, ...], pooled: int, hidden: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        cin = in_channels
        for cout in plan:
            if cout:
                layers += [conv3x3(cin, cout), nn.BatchNorm2d(cout), nn.ReLU()]
                cin = cout
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(pooled)
        size = cin * pooled * pooled
        if hidden:
            self.classifier = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
        else:
            self.classifier = nn.Sequential(nn.Linear(size, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def vgg9(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    timesteps: int | None = None,
    neuron: Neuron | None = None,
    width: int = 64,
    **kwargs: Any,
) -> Any:
    """VGG-9: seven convolutions and two linear layers (Lee et al., "Enabling Spike-Based Backpropagation for Training
    Deep Neural Network Architectures", Frontiers in Neuroscience 2020).

    The arguments, the result and the errors are those of :func:`~snnfast.models.resnet18`. Batch norm follows each
    convolution.

    Example:
        >>> import torch
        >>> vgg9(timesteps=2, width=8)(torch.rand(3, 3, 32, 32)).shape
        torch.Size([2, 3, 10])
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels, width=width)
    w = width
    net = VGG((w, w, 0, 2 * w, 2 * w, 0, 4 * w, 4 * w, 4 * w), 4, 16 * w, num_classes, in_channels)
    return finish(net, timesteps, neuron, kwargs)


def vgg11(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    timesteps: int | None = None,
    neuron: Neuron | None = None,
    width: int = 64,
    **kwargs: Any,
) -> Any:
    """VGG-11 (Simonyan and Zisserman, ICLR 2015) with batch norm and one linear layer, as is usual for small images.

    Its last pooling is an average over what is left of the image. The arguments, the result and the errors are those of
    :func:`~snnfast.models.resnet18`.
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels, width=width)
    w = width
    plan = (w, 0, 2 * w, 0, 4 * w, 4 * w, 0, 8 * w, 8 * w, 0, 8 * w, 8 * w)
    return finish(VGG(plan, 1, 0, num_classes, in_channels), timesteps, neuron, kwargs)
