"""Image corruptions of a given severity, in torch, drawn from a generator: the same seed gives the same images.

Every function takes images ``[N, C, H, W]`` with values in [0, 1], a severity (0 changes nothing), and a CPU generator,
and gives images of the same shape, dtype, device and range. Random numbers are drawn on the CPU, so that every device
sees the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__all__ = [
    "CORRUPTIONS",
    "LEVELS",
    "background",
    "contrast",
    "gaussian",
    "occlusion",
    "rotation",
    "salt_and_pepper",
    "translation",
]

Corruption = Callable[[Tensor, float, Generator], Tensor]


def _precise(t: Tensor, x: Tensor) -> Tensor:
    """``t`` beside ``x``, in float32 at least: 16 bits do not tell the places of an image's pixels apart."""
    return t.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


def _uniform(x: Tensor, *shape: int, generator: Generator) -> Tensor:
    return _precise(torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32), x)


def _signs(x: Tensor, n: int, generator: Generator) -> Tensor:
    return _precise(torch.randint(0, 2, (n,), generator=generator, device=generator.device), x) * 2 - 1


def gaussian(x: Tensor, level: float, generator: Generator) -> Tensor:
    """Gaussian noise of standard deviation ``level``, clipped to [0, 1]."""
    return (
        x + level * torch.randn(x.shape, generator=generator, device=generator.device, dtype=torch.float32).to(x)
    ).clamp(0, 1)


def salt_and_pepper(x: Tensor, level: float, generator: Generator) -> Tensor:
    """A share ``level`` of the pixels, all channels alike, becomes black or white, half and half."""
    u = _uniform(x, x.shape[0], 1, *x.shape[2:], generator=generator)
    return torch.where(u < level / 2, torch.zeros_like(x), torch.where(u < level, torch.ones_like(x), x))


def background(x: Tensor, level: float, generator: Generator) -> Tensor:
    """A cloudy background image of brightness up to ``level`` behind the picture (the brighter of both is seen).

    The backgrounds are sums of noise at four scales, since natural images are not part of the package.
    """
    n, c, height, width = x.shape
    image = torch.zeros((n, c, height, width), dtype=x.dtype, device=x.device)
    for octave in range(4):
        cells = (min(2 ** (octave + 1), height), min(2 ** (octave + 1), width))
        noise = _uniform(x, n, c, *cells, generator=generator)
        image += F.interpolate(noise, (height, width), mode="bilinear", align_corners=True) / 2**octave
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    return torch.maximum(x, level * (image - low) / (high - low).clamp(min=1e-6))


def _warp(x: Tensor, matrices: Tensor) -> Tensor:
    """Sample ``x`` where ``matrices`` ``[N, 2, 3]`` send each pixel; black outside."""
    grid = F.affine_grid(matrices, list(x.shape), align_corners=False)
    y = F.grid_sample(x.to(grid.dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return y.clamp(0, 1).to(x.dtype)


def rotation(x: Tensor, level: float, generator: Generator) -> Tensor:
    """A turn by ``level`` degrees about the centre, to a random side."""
    angle = math.radians(level) * _signs(x, len(x), generator)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    aspect = x.shape[2] / x.shape[3]  # grid coordinates run from -1 to 1 along both sides, whatever their lengths
    rows = [torch.stack((cos, -sin * aspect, zero), 1), torch.stack((sin / aspect, cos, zero), 1)]
    return _warp(x, torch.stack(rows, 1))


def translation(x: Tensor, level: float, generator: Generator) -> Tensor:
    """A shift by ``level`` of the image's side, in a random direction; what comes in is black."""
    angle = 2 * math.pi * _uniform(x, len(x), generator=generator)
    matrices = torch.zeros((len(x), 2, 3), dtype=angle.dtype, device=x.device)
    matrices[:, 0, 0] = matrices[:, 1, 1] = 1.0
    matrices[:, 0, 2], matrices[:, 1, 2] = 2 * level * angle.cos(), 2 * level * angle.sin()  # an image is 2 wide
    return _warp(x, matrices)


def occlusion(x: Tensor, level: float, generator: Generator) -> Tensor:
    """A black rectangle with sides of ``level`` of the image's, at a random place."""
    height, width = x.shape[2:]
    sides = (round(level * height), round(level * width))
    u = _uniform(x, len(x), 2, generator=generator)
    hidden = []
    for axis, (size, side) in enumerate(zip((height, width), sides, strict=True)):
        start = (u[:, axis] * (size - side + 1)).floor().clamp(max=size - side)[:, None]
        position = torch.arange(size, device=x.device)[None]
        hidden.append((position >= start) & (position < start + side))
    return x.masked_fill((hidden[0][:, :, None] & hidden[1][:, None, :])[:, None], 0.0)


def contrast(x: Tensor, level: float, generator: Generator) -> Tensor:
    """Contrast lowered by the share ``level``: every pixel that much nearer to its image's mean."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return x + level * (mean - x)


CORRUPTIONS: dict[str, Corruption] = {
    f.__name__: f for f in (gaussian, salt_and_pepper, background, rotation, translation, occlusion, contrast)
}

LEVELS: dict[str, tuple[float, ...]] = {
    "gaussian": (0.1, 0.2, 0.3, 0.4, 0.5),
    "salt_and_pepper": (0.05, 0.1, 0.2, 0.3, 0.4),
    "background": (0.2, 0.4, 0.6, 0.8, 1.0),
    "rotation": (10.0, 20.0, 30.0, 45.0, 60.0),
    "translation": (0.05, 0.1, 0.15, 0.2, 0.25),
    "occlusion": (0.2, 0.3, 0.4, 0.5, 0.6),
    "contrast": (0.3, 0.5, 0.7, 0.8, 0.9),
}
