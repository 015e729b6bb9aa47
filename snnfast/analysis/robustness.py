"""Accuracy under corrupted input, several models side by side on the same corrupted images."""

from __future__ import annotations

import contextlib
import math
import numbers
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from .._arguments import check_steps
from ._modules import evaluating
from ._tables import table
from .corruptions import CORRUPTIONS, LEVELS, Corruption

__all__ = ["RobustnessReport", "robustness", "wilson_interval"]


def wilson_interval(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share measured on ``n`` trials (E. B. Wilson, JASA 1927).

    Example:
        >>> [round(v, 3) for v in wilson_interval(0.9, 100)]
        [0.826, 0.945]
    """
    if n < 1 or not 0.0 < confidence < 1.0:
        raise ValueError(f"n must be at least 1 and confidence between 0 and 1, got n={n} and {confidence!r}")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be from 0 to 1, got {share!r}")
    z = math.sqrt(2.0) * torch.erfinv(torch.tensor(confidence, dtype=torch.float64, device="cpu")).item()
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass
class RobustnessReport:
    """What :func:`robustness` measured; ``print`` shows a table of accuracies in percent.

    Attributes:
        models: names, in the given order.
        levels: severities of each corruption, the clean images first, as 0.
        correct: ``correct[model][corruption]`` is ``[levels, images]``: how often, over the seeds, each image was
            classified correctly, from 0 to 1.
        confidence: of all intervals.
        seeds: the corruptions' seeds.
    """

    models: list[str]
    levels: dict[str, list[float]]
    correct: dict[str, dict[str, Tensor]]
    confidence: float
    seeds: tuple[int, ...]

    @property
    def samples(self) -> int:
        """Number of images."""
        return next(iter(next(iter(self.correct.values())).values())).shape[1]

    def accuracy(self, model: str, corruption: str) -> list[float]:
        """Accuracy at each level, from 0 to 1, averaged over the seeds."""
        return self.correct[model][corruption].mean(1).tolist()

    def band(self, model: str, corruption: str) -> list[tuple[float, float]]:
        """Wilson's interval of the accuracy at each level, over the images; more seeds do not narrow it."""
        return [wilson_interval(a, self.samples, self.confidence) for a in self.accuracy(model, corruption)]

    def difference(
        self, model: str, baseline: str, corruption: str, resamples: int = 2000
    ) -> list[tuple[float, float, float]]:
        """Paired difference in accuracy at each level, with the percentile bootstrap interval over the images."""
        check_steps("resamples", resamples)
        generator = torch.Generator("cpu").manual_seed(0)
        d = (self.correct[model][corruption] - self.correct[baseline][corruption]).double()
        means = torch.empty(resamples, len(d), dtype=torch.float64, device="cpu")
        for i in range(resamples):
            drawn = torch.randint(d.shape[1], (d.shape[1],), generator=generator, device="cpu")
            means[i] = d.index_select(1, drawn).mean(1)
        tail = (1 - self.confidence) / 2
        bounds = torch.quantile(means, means.new_tensor([tail, 1 - tail]), dim=0)
        return list(zip(d.mean(1).tolist(), bounds[0].tolist(), bounds[1].tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single images as plain numbers for JSON."""
        curves = {
            model: {
                corruption: {
                    "levels": levels,
                    "accuracy": self.accuracy(model, corruption),
                    "low": [low for low, _ in self.band(model, corruption)],
                    "high": [high for _, high in self.band(model, corruption)],
                }
                for corruption, levels in self.levels.items()
            }
            for model in self.models
        }
        return {
            "samples": self.samples,
            "seeds": list(self.seeds),
            "confidence": self.confidence,
            "interval": "Wilson",
            "curves": curves,
        }

    def __str__(self) -> str:
        rows = []
        for corruption, levels in self.levels.items():
            for i, level in enumerate(levels):
                cells = []
                for model in self.models:
                    low, high = self.band(model, corruption)[i]
                    cells.append(f"{100 * self.accuracy(model, corruption)[i]:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
                rows.append((corruption, f"{level:g}", *cells))
        return (
            f"Accuracy in % on {self.samples} images, {len(self.seeds)} seed(s), with {100 * self.confidence:g} % "
            f"Wilson intervals\n{table(('corruption', 'level', *self.models), rows)}"
        )


def _predict(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out.mean(0) if isinstance(out, Tensor) and out.dim() == 3 else out


def _generator(seed: int, corruption: str, batch: int) -> torch.Generator:
    # All levels draw the same numbers, so that a curve shows the level and not the draw.
    return torch.Generator("cpu").manual_seed(
        (seed * 1_000_003 + zlib.crc32(corruption.encode()) + 7919 * batch) % 2**63
    )


def _is_pair(data: Any) -> bool:
    return isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(d, Tensor) for d in data)


def _batches(data: Any, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    several = not _is_pair(data) and (hasattr(data, "__iter__") or hasattr(data, "__getitem__"))
    batches = list(data) if several else [data]
    for pair in batches:
        if not _is_pair(pair):
            raise TypeError(
                "data must be a pair of tensors, images and labels, or an iterable of such pairs, got "
                f"{type(pair).__name__} in {type(data).__name__}"
            )
    for x, y in batches:
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(
                f"data's images must be floating point [N, C, H, W] in [0, 1], got {tuple(x.shape)} in "
                f"{str(x.dtype).removeprefix('torch.')}"
            )
        if y.shape != x.shape[:1]:
            raise ValueError(
                f"data must hold as many labels as images, classes [N] = {tuple(x.shape[:1])}, got {tuple(y.shape)}"
            )
    batches = [(x, y) for x, y in batches if len(x)]
    if not batches:
        raise ValueError("data must hold at least one image, got none")
    for x, _ in batches:
        if not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(
                f"data's images must lie in [0, 1], got values from {x.min():.3g} to {x.max():.3g}; corrupt the raw "
                "images and normalise them in transform="
            )
    if several:
        return batches
    return list(zip(*(t.split(batch_size) for t in data), strict=True))


def _choose(
    corruptions: Iterable[str] | Mapping[str, Corruption], levels: Mapping[str, Sequence[float]] | None
) -> dict[str, tuple[Corruption, list[float]]]:
    named = {}
    if isinstance(corruptions, str) or not isinstance(corruptions, Iterable):
        raise TypeError(f"corruptions must be a list of names, or functions by name, got {corruptions!r}")
    if levels is not None and not isinstance(levels, Mapping):
        raise TypeError(f"levels must be a dict of severities by corruption, got {levels!r}")
    if isinstance(corruptions, Mapping):
        named = dict(corruptions)
    else:
        for name in corruptions:
            if name not in CORRUPTIONS:
                raise ValueError(f"corruptions must be among {', '.join(CORRUPTIONS)}, got {name!r}")
            named[name] = CORRUPTIONS[name]
    if not named:
        raise ValueError("corruptions must hold at least one, got none")
    chosen = {}
    for name, function in named.items():
        severities = (levels or {}).get(name, LEVELS.get(name))
        if severities is None:
            raise ValueError(f"levels must give severities for {name!r}, a corruption of your own")
        if not isinstance(severities, Iterable):
            raise TypeError(f"levels must be a list of severities for {name!r}, got {severities!r}")
        if any(not level >= 0 for level in severities):
            raise ValueError(f"levels must be at least 0, got {list(severities)} for {name!r}")
        chosen[name] = (function, [0.0, *(float(level) for level in severities if level)])
    if levels and set(levels) - set(named):
        raise ValueError(f"levels has {sorted(set(levels) - set(named))}, which corruptions has not")
    return chosen


def robustness(
    models: nn.Module | Mapping[str, nn.Module],
    data: Any,
    *,
    corruptions: Iterable[str] | Mapping[str, Corruption] = tuple(CORRUPTIONS),
    levels: Mapping[str, Sequence[float]] | None = None,
    seeds: Iterable[int] = (0,),
    transform: Callable[[Tensor], Tensor] | None = None,
    predict: Callable[[nn.Module, Tensor], Tensor] = _predict,
    batch_size: int = 256,
    confidence: float = 0.95,
) -> RobustnessReport:
    """Measure accuracy under corruptions of growing severity, for one or several models.

    All models see the same corrupted images, so their differences are paired; the same seeds, data and batch size give
    the same images on every device. Models run in eval mode without gradients, are reset before each batch, and are
    left in the mode they were in.

    Args:
        models: a network, or several by name.
        data: images ``[N, C, H, W]`` in [0, 1] and labels ``[N]``, as a pair of tensors or a loader of such pairs (a
            loader that shuffles is read once, so the models still see the same images).
        corruptions: names out of :data:`snnfast.analysis.CORRUPTIONS`, or functions ``(images, level, generator)`` by
            name.
        levels: severities by corruption, where not those of :data:`snnfast.analysis.LEVELS`; the clean images, level
            0, are always measured.
        seeds: of the corruptions; accuracies are averaged over them.
        transform: applied to the corrupted images, to normalise them say.
        predict: ``(model, images)`` -> logits ``[N, classes]``; by default the model's output, averaged over time
            where it is ``[T, N, classes]``.
        batch_size: images at a time, where ``data`` is a pair of tensors.
        confidence: of the intervals.

    Raises:
        TypeError, ValueError: an argument of another kind; the message names it.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 3
        >>> report = robustness(net, (x, y), corruptions=["gaussian"], levels={"gaussian": [0.2]})
        >>> report.levels
        {'gaussian': [0.0, 0.2]}
    """
    if not isinstance(models, (nn.Module, Mapping)):
        raise TypeError(f"models must be a network, or a dict of networks by name, got {type(models).__name__}")
    named = {"model": models} if isinstance(models, nn.Module) else dict(models)
    for name, model in named.items():
        if not isinstance(model, nn.Module):
            raise TypeError(f"models must be modules, got {type(model).__name__} for {name!r}")
    if not named:
        raise ValueError("models must hold at least one network, got none")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence!r}")
    seeds = tuple(seeds) if isinstance(seeds, Iterable) else seeds
    if not isinstance(seeds, tuple) or not all(isinstance(seed, numbers.Integral) for seed in seeds):
        raise TypeError(f"seeds must be whole numbers, such as range(3), got {seeds!r}")
    if not seeds:
        raise ValueError("seeds must hold at least one seed, got none")
    seeds = tuple(map(int, seeds))  # NumPy's have no place in JSON
    chosen = _choose(corruptions, levels)
    batches = _batches(data, check_steps("batch_size", batch_size))
    total = sum(len(x) for x, _ in batches)
    counts: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    correct = {
        name: {c: torch.zeros(len(severities), total, **counts) for c, (_, severities) in chosen.items()}
        for name in named
    }

    def hits(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        functional.reset_net(model)
        x = x.clone()  # a transform or model that works in place must not change what the next one sees
        try:
            logits = predict(model, x if transform is None else transform(x))
        finally:
            functional.reset_net(model)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(y):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"predict must give logits [N, classes] for N = {len(y)} images, got {got}; say in predict= how your "
                "model is to be run and read out"
            )
        return (logits.argmax(1) == y).float().cpu()

    with contextlib.ExitStack() as stack:
        for model in named.values():
            stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        start = 0
        for index, (x, y) in enumerate(batches):
            part = slice(start, start + len(x))
            start += len(x)
            clean = {name: hits(model, x, y) for name, model in named.items()}
            for corruption, (corrupt, severities) in chosen.items():
                for name in named:
                    correct[name][corruption][0, part] = clean[name]
                for i, level in enumerate(severities[1:], 1):
                    for seed in seeds:
                        corrupted = corrupt(x.clone(), level, _generator(seed, corruption, index))
                        for name, model in named.items():
                            correct[name][corruption][i, part] += hits(model, corrupted, y)
                for name in named:
                    correct[name][corruption][1:, part] /= len(seeds)
    return RobustnessReport(list(named), {c: s for c, (_, s) in chosen.items()}, correct, confidence, seeds)
