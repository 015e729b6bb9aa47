"""Augmentation of whole batches on their device: crop, flip, cutout and a RandAugment, drawn from one generator.

Random numbers are drawn for the whole batch of all processes and then cut to the part of this one, so that a batch is
the same however many processes share it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError, nearest

__all__ = ["KINDS", "Augment"]

KINDS = ("crop", "flip", "cutout", "randaugment")


class Augment:
    """uint8 images to augmented, normalised float32 images.

    Args:
        kinds: of :data:`KINDS`; ``()`` for none.
        mean: of each channel, pixels from 0 to 1.
        std: of each channel.
        events: the images are counts of events, ``[B, T, C, H, W]``: all steps are moved alike, values are kept.
        padding: largest shift of a crop as a share of the side.
        magnitude: strength of the randaugment operations, from 0 to 1.

    Raises:
        InputError: an unknown kind, or one that event frames do not have.

    Example:
        >>> augment = Augment(("crop", "flip"), torch.tensor([0.5]), torch.tensor([0.25]))
        >>> x = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
        >>> augment(x, torch.Generator().manual_seed(0)).amax()
        tensor(2.)
    """

    def __init__(
        self,
        kinds: Sequence[str],
        mean: Tensor,
        std: Tensor,
        events: bool = False,
        padding: float = 1 / 8,
        magnitude: float = 0.5,
    ) -> None:
        for kind in kinds:
            if kind not in KINDS:
                raise InputError(f"--augment must be of {', '.join(KINDS)} or none, got {kind!r}{nearest(kind, KINDS)}")
        if events and "randaugment" in kinds:
            raise InputError("--augment randaugment is for images; event frames take crop, flip and cutout")
        self.kinds = frozenset(kinds)
        self.mean, self.std = (t.view(-1, 1, 1) for t in (mean, std))
        self.events = events
        self.padding = padding
        self.magnitude = magnitude

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 ``[B, C, H, W]`` to float32; event counts ``[B, T, C, H, W]`` to float32 ``[T, B, C, H, W]``."""
        if self.events:
            return images.float().transpose(0, 1).contiguous()
        return (images.float() / 255 - self.mean) / self.std

    def __call__(self, images: Tensor, generator: torch.Generator, part: slice = slice(None), total: int = 0) -> Tensor:
        """Augment and normalise.

        Args:
            images: uint8, as :meth:`normalise` takes them: the ``part`` of a batch of ``total`` images.
            generator: on the images' device.
            part: which images of the whole batch these are.
            total: size of the whole batch; 0: these are all.
        """
        total = total or len(images)
        shape = images.shape
        x = images.flatten(1, 2) if self.events else images  # all steps of a recording move alike

        def draw(*size: int) -> Tensor:
            return torch.rand(total, *size, device=x.device, generator=generator)[part]

        if self.kinds & {"crop", "flip"}:
            x = self._moved(x, draw(3))
        cut = draw(2) if "cutout" in self.kinds else None
        if "randaugment" in self.kinds:
            x = self._randaugment(x.float() / 255, draw(2, 3))
            x = (x - self.mean) / self.std
        elif self.events:
            x = x.float()
        else:
            x = (x.float() / 255 - self.mean) / self.std
        if cut is not None:
            x = _cutout(x, cut)
        return x.view(shape).transpose(0, 1).contiguous() if self.events else x

    def _moved(self, x: Tensor, u: Tensor) -> Tensor:
        """Crop out of the zero-padded image and flip, by one gather."""
        height, width = x.shape[-2:]
        rows = torch.arange(height, device=x.device).expand(len(x), -1)
        columns = torch.arange(width, device=x.device).expand(len(x), -1)
        if "flip" in self.kinds:
            columns = torch.where(u[:, :1] < 0.5, width - 1 - columns, columns)
        if "crop" in self.kinds:
            pad = max(1, round(self.padding * min(height, width)))
            x = F.pad(x, (pad,) * 4)
            shift = (u[:, 1:] * (2 * pad + 1)).long()
            rows, columns = rows + shift[:, :1], columns + shift[:, 1:]
        image = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)
        channel = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
        return x[image, channel, rows[:, None, :, None], columns[:, None, None, :]]

    def _randaugment(self, x: Tensor, u: Tensor) -> Tensor:
        """Two of ten operations for each image (Cubuk et al., 2020), ``x`` from 0 to 1.

        Every operation runs on the whole batch with a strength of its own for each image, zero where it was not drawn:
        nothing is sorted by operation, so nothing waits for the device. Geometry comes before colour.
        """
        operation = (u[..., 0] * 10).long()  # [B, 2]; 0 is none
        signed = self.magnitude * (2 * u[..., 1] - 1)  # strength from -magnitude to magnitude
        strength = [torch.where(operation == k, signed, 0).sum(1) for k in range(10)]

        def column(k: int) -> Tensor:
            return strength[k].view(-1, 1, 1, 1)

        angle, shear_x, shear_y = strength[1] * math.pi / 3, 0.6 * strength[2], 0.6 * strength[3]
        cos, sin = angle.cos(), angle.sin()
        # Rotation after shear; affine_grid's coordinates run from -1 to 1.
        matrix = torch.stack(
            (
                torch.stack((cos - sin * shear_y, cos * shear_x - sin, 0.6 * strength[4]), 1),
                torch.stack((sin + cos * shear_y, sin * shear_x + cos, 0.6 * strength[5]), 1),
            ),
            1,
        )
        grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        x = x * (1 + column(6))  # brightness
        middle = x.mean((1, 2, 3), keepdim=True)
        x = middle + (x - middle) * (1 + 1.8 * column(7))  # contrast
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * (1 + 1.8 * column(8))  # colour; nothing to do for one channel
        x = x.clamp(0, 1)
        inverted = column(9)
        return torch.where(x > 1 - inverted.abs(), 1 - x, x)  # solarize


def _cutout(x: Tensor, u: Tensor) -> Tensor:
    """Zero a square of half the side around a random point (DeVries and Taylor, 2017); zero is the mean by now."""
    height, width = x.shape[-2:]
    centre = (u * u.new_tensor((height, width))).long()
    rows = (torch.arange(height, device=x.device) - centre[:, :1]).abs() < height // 4
    columns = (torch.arange(width, device=x.device) - centre[:, 1:]).abs() < width // 4
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
