"""The tables of ``python -m benchmarks.distillation_cost``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import paired

Results = dict[str, list[dict[str, Any]]]  # of each run, one entry for each seed


def reached(curve: Sequence[float], goal: float) -> int | None:
    """The first epoch, from 1, at which ``curve`` is at ``goal``."""
    return next((epoch for epoch, value in enumerate(curve, 1) if value >= goal), None)


def span(values: Sequence[float | None], form: str) -> str:
    """Median and range; ``None`` is what was not reached."""
    numbers = [v for v in values if v is not None]
    if not numbers:
        return "never"
    text = format(statistics.median(numbers), form)
    if min(numbers) < max(numbers):
        text += f" ({format(min(numbers), form)} to {format(max(numbers), form)})"
    return text + (f", {len(values) - len(numbers)} never" if len(numbers) < len(values) else "")


def summary(results: Results) -> list[dict[str, Any]]:
    """Figures of each row of the table."""
    found = []
    for name, own in results.items():
        if "accuracy by epoch" not in own[0]:
            continue
        against, taught = own[0]["against"], own[0]["taught"]
        plain = results[against or name]
        row = {"row": name, "T": own[0]["T"], "parameters": own[0]["parameters"], "against": against}
        for key in ("accuracy", "processor seconds", "seconds", "kept for the backward"):
            row[key] = statistics.median(r[key] for r in own)
        size = results[f"memory-{name}"][0]
        row["memory of training"] = size["peak"] - size["before"]
        row["teacher seconds"] = (
            statistics.median(r["processor seconds"] for r in results["teacher"]) if taught else 0.0
        )
        row["energy"] = statistics.median(r["operations"]["energy_pj"] for r in own)
        pairs = list(zip(own, plain, strict=True))
        row["difference"] = paired.interval([a["accuracy"] - b["accuracy"] for a, b in pairs])
        row["epochs to plain"] = [reached(a["accuracy by epoch"], b["accuracy"]) for a, b in pairs]
        row["cost of an epoch"] = statistics.median(a["processor seconds"] / b["processor seconds"] for a, b in pairs)
        found.append(row)
        if name == "ann":
            for steps in results["conversion"][0]["steps"]:
                converted = [r["steps"][steps] for r in results["conversion"]]
                both = list(zip(converted, results["plain-if"], strict=True))
                found.append(
                    {
                        **row,
                        "row": f"conversion, T = {steps}",
                        "T": int(steps),
                        "accuracy": statistics.median(r["accuracy"] for r in converted),
                        "energy": statistics.median(r["operations"]["energy_pj"] for r in converted),
                        "difference": paired.interval([a["accuracy"] - b["accuracy"] for a, b in both]),
                        "against": "plain-if",
                        "epochs to plain": [],
                        "processor seconds": row["processor seconds"]
                        + statistics.median(r["processor seconds"] for r in results["conversion"]),
                    }
                )
    return found


def report(
    results: Results, settings: dict[str, Any], environment: dict[str, Any], about: str | None, folder: Path
) -> None:
    """Write the tables and all figures."""
    found = summary(results)
    head = ("run", "T", "test accuracy", "to plain (points)", "training, processor", "beside it, the teacher")
    head += (
        "kept for the backward, a batch of 50",
        "memory of training, a batch of 500",
        "epochs to plain",
        "parameters",
        "energy an image",
    )
    cells = []
    for row in found:
        conversion = row["row"].startswith("conversion")
        cells.append(
            (
                *(row["row"], row["T"], f"{row['accuracy']:.2%}"),
                paired.points(*row["difference"]) + f" to {row['against']}" if row["against"] else "-",
                f"{row['processor seconds']:.1f} s",
                f"{row['teacher seconds']:.1f} s" if row["teacher seconds"] else "-",
                f"{row['kept for the backward'] / 2**20:.1f} MiB",
                f"{row['memory of training'] / 2**20:.0f} MiB",
                "no training" if conversion else span(row["epochs to plain"], ".0f") if row["against"] else "-",
                *(f"{row['parameters']:,}", f"{row['energy'] / 1e6:.2f} µJ"),
            )
        )
    free = results["overhead"]
    ratios = [r["latency ratio"] for r in free]
    extra = []
    for title in results["losses"][0]["step"]:
        steps = [r["step"][title] for r in results["losses"]]
        own = {name: [s[name] / (s["plain"] + s["teacher"]) - 1 for s in steps] for name in steps[0]}
        plain, ahead = (1e3 * statistics.median(s[name] for s in steps) for name in ("plain", "teacher"))
        shares = (span([100 * v for v in own[name]], ".1f") + " %" for name in own if name not in ("plain", "teacher"))
        extra.append((title, f"{plain:.1f} ms", f"{ahead:.1f} ms", *shares))
    titles = ("student", "plain step", "teacher's forward", *(n for n in own if n not in ("plain", "teacher")))
    text = (
        f"# What distillation costs\n\n{paired.about(about)}\n\n"
        f"{paired.listed(settings)}, seeds: {[r['seed'] for r in results['ann']]}\n\n{paired.table(head, cells)}\n\n"
        "Medians over the seeds; differences are means with the 95 % interval of Student's t. Training is seconds of "
        "this process on the processor, for the clock is that of a machine that others use too (it is in the JSON); "
        "the teacher is trained once and is extra. Memory of training is the peak of a process that trains on a "
        "large batch, above what it held before, allocator and all; what is kept for the backward is exact. Energy is "
        "an estimate (4.6 pJ per MAC, 0.9 pJ per AC, Horowitz 2014).\n\n"
        "The TSSD student after training, against a bare network with the same weights: outputs equal bit for bit "
        f"{all(r['outputs equal bit for bit'] for r in free)}, keys equal {all(r['keys equal'] for r in free)}, "
        f"modules equal {all(r['modules equal'] for r in free)}, hooks left {sum(r['hooks left'] for r in free)}, "
        f"latency ratio {span(ratios, '.3f')}.\n\n"
        "What the losses cost: a distilled training step beyond a plain step and the teacher's forward, as a share of "
        f"these two, batch {results['losses'][0]['batch']}, medians of processor time:\n\n"
        f"{paired.table(titles, extra)}\n\n{paired.listed(environment)}\n"
    )
    runs = [{k: v for k, v in r.items() if k != "settings"} for own in results.values() for r in own]
    figures = {"settings": settings, "environment": environment, "rows": found, "runs": runs}
    paired.save(folder, "distillation_cost", text, figures)
