"""Plots, as matplotlib figures; with ``path`` they are saved too (PNG by default). None touches pyplot's state."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._arguments import check_steps
from .robustness import RobustnessReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_accuracy", "plot_firing_rates", "plot_raster", "plot_robustness"]

PathLike = str | os.PathLike[str]


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install snnfast[train]") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _finish(figure: Figure, path: PathLike | None) -> Figure:
    if path is not None:
        figure.savefig(path)
    return figure


_SEVERITY = {
    "gaussian": "standard deviation",
    "salt_and_pepper": "share of pixels",
    "background": "brightness",
    "rotation": "degrees",
    "translation": "share of the side",
    "occlusion": "share of the side",
    "contrast": "share lost",
}


def _legend_above(figure: Figure, axes: Any) -> None:
    """A legend over the whole width of ``figure``, in as many columns as its longest name allows."""
    handles, names = axes.get_legend_handles_labels()
    column = 0.6 + 0.08 * max(map(len, names))  # inches
    columns = max(1, min(len(names), int(figure.get_figwidth() / column)))
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(names) // columns))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize="small")


def _label(name: str) -> str:
    """``name`` in a legend, from which matplotlib leaves out what is empty or starts with an underscore."""
    return f" {name}" if str(name)[:1] in ("", "_") else name


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def plot_accuracy(
    curves: Mapping[str, Sequence[float]], path: PathLike | None = None, *, ylabel: str = "accuracy [%]"
) -> Figure:
    """One line for each run over its epochs, which start at 1.

    Args:
        curves: values per epoch by run; accuracies from 0 to 1 are shown in percent where ``ylabel`` ends in ``[%]``.
        path: file to save to.
        ylabel: name of the values, ``"loss"`` say.

    Raises:
        ValueError: no curve, or an empty one.
        ImportError: matplotlib is not installed.

    Example:
        >>> figure = plot_accuracy({"plain": [0.8, 0.9], "distilled": [0.85, 0.93]})
    """
    if not curves or not all(len(values) for values in curves.values()):
        raise ValueError("curves must hold at least one run with at least one value each")
    figure = _figure(6, 4)
    axes = figure.subplots()
    factor = 100.0 if ylabel.endswith("[%]") else 1.0
    for name, values in curves.items():
        axes.plot(
            range(1, len(values) + 1), [factor * float(v) for v in values], marker="o", markersize=3, label=_label(name)
        )
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="epoch", ylabel=ylabel)
    _legend_above(figure, axes)
    _tidy(axes)
    return _finish(figure, path)


def plot_firing_rates(
    rates: Mapping[str, float] | Mapping[str, Mapping[str, float]], path: PathLike | None = None
) -> Figure:
    """Firing rate of each layer, in spikes per neuron and time step.

    Args:
        rates: rate by layer, as :meth:`FiringRateMonitor.rates` gives; or such rates by model, to compare.
        path: file to save to.

    Raises:
        ValueError: no rate.
        ImportError: matplotlib is not installed.

    Example:
        >>> figure = plot_firing_rates({"plain": {"1": 0.1, "3": 0.2}, "distilled": {"1": 0.12, "3": 0.21}})
    """
    nested = {k: v for k, v in rates.items() if isinstance(v, Mapping)}
    single = {k: v for k, v in rates.items() if not isinstance(v, Mapping)}
    models: dict[str, Mapping[str, float]] = nested or {"": single}
    layers = list(dict.fromkeys(layer for by_layer in models.values() for layer in by_layer))
    if not layers or (nested and single):
        raise ValueError("rates must map layers to rates, or models to such mappings, and must not be empty")
    figure = _figure(max(5.0, 1.5 + 0.35 * len(layers) * max(1, len(models) / 2)), 4)
    axes = figure.subplots()
    width = 0.8 / len(models)
    for i, (model, by_layer) in enumerate(models.items()):
        places = [j + (i - (len(models) - 1) / 2) * width for j in range(len(layers))]
        axes.bar(places, [by_layer.get(layer, 0.0) for layer in layers], width, label=_label(model))
    axes.set_xticks(
        range(len(layers)), layers, rotation=45 if len(layers) > 4 else 0, ha="right" if len(layers) > 4 else "center"
    )
    axes.set(xlabel="layer", ylabel="spikes per neuron and step")
    if nested:
        _legend_above(figure, axes)
    _tidy(axes)
    return _finish(figure, path)


def plot_raster(spikes: Tensor, path: PathLike | None = None, *, title: str = "", most: int = 500) -> Figure:
    """Spikes of one sample: a dash for each, time to the right, neurons upwards.

    Args:
        spikes: ``[T, *]``, the neurons of one sample; not zero where a neuron spikes.
        path: file to save to.
        title: shown above.
        most: of more neurons than this, evenly spaced ones are shown, and the axis says so.

    Raises:
        ValueError: ``spikes`` has no time or neuron dimension, or is empty; ``most`` is not a whole number from 1.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> figure = plot_raster(torch.rand(8, 16, 4, 4) < 0.1)
    """
    if not isinstance(spikes, Tensor) or spikes.dim() < 2 or not spikes.numel():
        got = tuple(spikes.shape) if isinstance(spikes, Tensor) else type(spikes).__name__
        raise ValueError(f"spikes must be [T, *] of one sample, not empty, got {got}")
    check_steps("most", most)
    flat = spikes.detach().flatten(1) != 0
    total = flat.shape[1]
    shown = flat[:, :: -(-total // most)]
    steps, neurons = shown.nonzero(as_tuple=True)
    figure = _figure(6, 4)
    axes = figure.subplots()
    x, y = steps.cpu().numpy(), neurons.cpu().numpy()
    width = min(2.0, max(0.4, 200 / shown.shape[1]))
    axes.hlines(y, x - 0.45, x + 0.45, color="black", linewidth=width)
    axes.set(xlim=(-0.5, len(flat) - 0.5), ylim=(-1, shown.shape[1]), xlabel="time step", title=title)
    axes.set_ylabel("neuron" if shown.shape[1] == total else f"neuron ({shown.shape[1]} of {total})")
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    return _finish(figure, path)


def plot_robustness(report: RobustnessReport, path: PathLike | None = None) -> Figure:
    """Accuracy against severity, one panel for each corruption, one line with its confidence band for each model.

    Args:
        report: of :func:`snnfast.analysis.robustness`.
        path: file to save to.

    Raises:
        ImportError: matplotlib is not installed.
    """
    names = list(report.levels)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = _figure(3.0 * columns + 0.5, 2.6 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, corruption in zip(grid.flat, names, strict=False):
        for model in report.models:
            levels, band = report.levels[corruption], report.band(model, corruption)
            (line,) = axes.plot(
                levels,
                [100 * a for a in report.accuracy(model, corruption)],
                marker="o",
                markersize=3,
                label=_label(model),
            )
            low, high = [100 * b[0] for b in band], [100 * b[1] for b in band]
            axes.fill_between(levels, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(title=corruption.replace("_", " "), xlabel=_SEVERITY.get(corruption, "severity"))
        _tidy(axes)
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy [%]")
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    _legend_above(figure, grid[0, 0])
    figure.supxlabel(
        f"{report.samples} images, {len(report.seeds)} seed(s), bands: {100 * report.confidence:g} % Wilson",
        fontsize="small",
    )
    return _finish(figure, path)
