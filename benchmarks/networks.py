"""Networks of the training runs, which ``snnfast-train`` takes as ``benchmarks.networks:NAME``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

import snnfast
from snnfast import surrogate


def digits(
    num_classes: int = 10, in_channels: int = 1, timesteps: int | None = None, channels: Sequence[int] = (48, 96, 96)
) -> nn.Module:
    """Images of 28 x 28 through convolutions at 14, 7 and 7 pixels: an ANN, or KDSNN's IF neurons for ``T`` steps."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    before = in_channels
    for i, width in enumerate(channels, 1):
        parts[f"conv{i}"] = nn.Conv2d(before, width, 3, padding=1, stride=2 if i < 3 else 1, bias=False)
        parts[f"norm{i}"], parts[f"relu{i}"] = nn.BatchNorm2d(width), nn.ReLU()
        before = width
    parts["flatten"], parts["head"] = nn.Flatten(), nn.Linear(before * 49, num_classes)
    ann = nn.Sequential(parts)
    if timesteps is None:
        return ann
    return snnfast.to_spiking(
        ann,
        timesteps,
        snnfast.IFNode,
        share_weights=True,
        surrogate_function=surrogate.ATan(),
        detach_reset=True,
    )
