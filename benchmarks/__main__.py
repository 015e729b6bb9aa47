"""``python -m benchmarks``: every row of the CPU's targets in one table, with JSON, Markdown and a plot in results/."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from . import cpu_targets
from .cpu_targets import Row
from .measure import RESULTS, environment, refuse_unless_idle

VERDICT = {True: "met", False: "missed", None: "not measured"}


def shown(row: Row) -> tuple[str, str, str, str, str, str]:
    value = "-" if row.value is None else f"{row.value:.3g} {row.unit}"
    sign = "≥" if row.at_least else "≤"
    return row.work, row.against, value, f"{sign} {row.target:g} {row.unit}", VERDICT[row.met], row.note


def markdown(rows: list[Row], device: dict[str, Any]) -> str:
    lines = ["| work | against | measured | target | | |", "|---|---|---|---|---|---|"]
    lines += ["| " + " | ".join(shown(r)) + " |" for r in rows]
    facts = ", ".join(f"{k}: {v}" for k, v in device.items())
    return f"# CPU targets\n\n{facts}\n\n" + "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r.value]
    figure, axes = plt.subplots(figsize=(10, 0.32 * len(rows) + 1))
    # How far beyond its target each row is, on either side of 1.
    reach = [(r.value / r.target if r.at_least else r.target / r.value) for r in rows]
    axes.barh(range(len(rows)), reach, color=["#4477aa" if r.met else "#cc6677" for r in rows])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{r.work} / {r.against}" for r in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("measured over target (right of the line: met)")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("groups", nargs="*", help=f"some of {', '.join(cpu_targets.GROUPS)}; all where none is named")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too (the result says so)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    arguments = parser.parse_args()
    unknown = set(arguments.groups) - set(cpu_targets.GROUPS)
    if unknown:
        parser.error(f"unknown groups {sorted(unknown)}; there are {', '.join(cpu_targets.GROUPS)}")
    refuse_unless_idle(arguments.force)
    from rich.console import Console
    from rich.table import Table

    device = environment()
    table = Table("work", "against", "measured", "target", "", "")
    rows: list[Row] = []
    torch.manual_seed(0)
    for name in arguments.groups or cpu_targets.GROUPS:
        for row in cpu_targets.GROUPS[name]():
            rows.append(row)
            table.add_row(*shown(row), style=None if row.met else "red")
            print("  ".join(shown(row)), flush=True)
    console = Console(width=160)
    console.print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "cpu" if not arguments.groups else "cpu-" + "-".join(arguments.groups)
    record = {"environment": device, "rows": [r.as_dict() for r in rows]}
    (arguments.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(markdown(rows, device))
    plot(rows, arguments.out / f"{name}.png")
    met = sum(r.met is True for r in rows)
    console.print(f"{met} of {len(rows)} targets met; written to {arguments.out / name}.json, .md, .png")


if __name__ == "__main__":
    main()
