"""How an image becomes a sequence: the input codings of :func:`snnfast.to_spiking`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..encoding import poisson

__all__ = ["Coding", "Poisson", "find_coding", "temporal"]

Coding = Callable[[Tensor, int], Tensor]  # (x [B, *], T) -> [T, B, *]


class Poisson:
    """Spikes with the probability that the input gives, drawn anew at each step: rate coding.

    Args:
        seed: of a generator of its own, one per device: two networks with the same seed draw the same spikes in their
            first forward, the same in their second, and so on. ``None`` takes torch's global generator.

    Raises:
        ValueError: a value outside 0 to 1, which is no probability.

    Example:
        >>> Poisson(seed=0)(torch.tensor([[0.0, 1.0, 0.5]]), 4)[:, 0, :2]
        tensor([[0., 1.],
                [0., 1.],
                [0., 1.],
                [0., 1.]])
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, x: Tensor, T: int) -> Tensor:
        if not torch.compiler.is_compiling() and x.numel() and not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(
                f"x must be from 0 to 1 for Poisson coding, got values from {x.min().item():g} to {x.max().item():g}; "
                "rescale it, or use coding='direct'"
            )
        generator = None
        if self.seed is not None:
            if x.device not in self._generators:
                self._generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
            generator = self._generators[x.device]
        return poisson(x, T, generator)

    def __repr__(self) -> str:
        return f"Poisson(seed={self.seed})"


def temporal(x: Tensor, T: int) -> Tensor:
    """Data that has time already: ``[T, B, *]`` as it is.

    Raises:
        ValueError: another number of time steps than the network has.
    """
    if x.dim() < 2 or x.shape[0] != T:
        raise ValueError(
            f"x must be [T, B, *] with T = {T} for coding='temporal', got shape {tuple(x.shape)}; put time first, or "
            "set the network's timesteps"
        )
    return x


def find_coding(coding: str | Coding, seed: int | None) -> Coding | None:
    """The coding of that name; ``None`` for direct coding.

    Raises:
        ValueError: an unknown name, or a seed for a coding that draws no numbers.
        TypeError: neither a name nor callable.
    """
    if seed is not None and coding != "poisson":
        raise ValueError(f"seed={seed} is for coding='poisson', which draws random numbers, got coding={coding!r}")
    if not isinstance(coding, str):
        if not callable(coding):
            raise TypeError(f"coding must be a name or a callable (x, T) -> [T, B, *], got {coding!r}")
        return coding
    found = {"direct": None, "poisson": Poisson(seed), "temporal": temporal}
    if coding not in found:
        raise ValueError(f"coding must be one of {', '.join(map(repr, found))} or a callable, got {coding!r}")
    return found[coding]
