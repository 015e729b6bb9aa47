"""Small networks for the tests of snnfast.train, named on its command line as ``train_networks:function``."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

import snnfast


class _Repeat(nn.Module):
    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if x.dim() == 5 else x.repeat(self.timesteps, 1, 1, 1)


class Student(nn.Module):
    """Folded inside, ``[T, B, C]`` outside, with stages by name."""

    def __init__(self, classes: int, channels: int, timesteps: int, width: int, norm: bool, dropout: float) -> None:
        super().__init__()

        def stage(inputs: int) -> nn.Sequential:
            parts = [nn.Conv2d(inputs, width, 3, 2, 1), nn.BatchNorm2d(width) if norm else nn.Identity()]
            return nn.Sequential(*parts, snnfast.IFNode(timesteps=timesteps, v_threshold=0.5))

        self.repeat = _Repeat(timesteps)
        self.layer1, self.layer2 = stage(channels), stage(width)
        self.dropout = nn.Dropout(dropout)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        B = x.shape[1] if x.dim() == 5 else x.shape[0]
        y = self.dropout(self.layer2(self.layer1(self.repeat(x))))
        return self.fc(self.pool(y).flatten(1)).unflatten(0, (-1, B))


def student(
    num_classes: int, in_channels: int, timesteps: int, width: int = 8, norm: bool = True, dropout: float = 0.0
) -> nn.Module:
    return Student(num_classes, in_channels, timesteps, width, norm, dropout)


def dropped(num_classes: int, in_channels: int, timesteps: int) -> nn.Module:
    return student(num_classes, in_channels, timesteps, dropout=0.3)


class Teacher(nn.Module):
    def __init__(self, classes: int, channels: int, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer2(self.layer1(x))
        return self.fc(torch.nn.functional.adaptive_avg_pool2d(y, 2).flatten(1))


def teacher(num_classes: int, in_channels: int, width: int = 12) -> nn.Module:
    return Teacher(num_classes, in_channels, width)


class WithAuxiliary(Teacher):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = super().forward(x)
        return (y, y) if self.training else y


def auxiliary(num_classes: int, in_channels: int) -> nn.Module:
    """Wrong: in training it gives more than logits, as torchvision's GoogLeNet does."""
    return WithAuxiliary(num_classes, in_channels, 12)


def auxiliary_student(num_classes: int, in_channels: int, timesteps: int) -> nn.Module:
    """The same, spiking: it must be refused before its teacher is trained."""
    return snnfast.to_spiking(auxiliary(num_classes, in_channels), timesteps)


class OfOneSize(Teacher):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 224, f"Wrong image height! Expected 224 but got {x.shape[-1]}!"
        return super().forward(x)


def of_one_size(num_classes: int, in_channels: int) -> nn.Module:
    """Wrong: it asserts the size of its images, as vision transformers do."""
    return OfOneSize(num_classes, in_channels, 12)


def not_a_number(num_classes: int, in_channels: int, timesteps: int) -> nn.Module:
    """Its loss becomes NaN in the fifth training step."""
    net = student(num_classes, in_channels, timesteps)
    calls = iter(range(10**6))

    def poison(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        trains = module.training and torch.is_grad_enabled()  # the check before training is without
        return output * float("nan") if trains and next(calls) == 4 else output

    net.register_forward_hook(poison)
    return net


def not_a_number_elsewhere(num_classes: int, in_channels: int, timesteps: int) -> nn.Module:
    """The same, where the process is the second."""
    second = os.environ.get("RANK") == "1"
    return (not_a_number if second else student)(num_classes, in_channels, timesteps)


def no_time(num_classes: int, in_channels: int, timesteps: int) -> nn.Module:
    """Wrong: a student that averages over time itself."""

    class Averaged(Student):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(0)

    return Averaged(num_classes, in_channels, timesteps, 8, True, 0.0)


def lazy(num_classes: int, in_channels: int, timesteps: int) -> nn.Module:
    net = student(num_classes, in_channels, timesteps)
    net.fc = nn.LazyLinear(num_classes)
    return net
