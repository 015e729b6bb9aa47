"""How results are shown: tables in the terminal and in Markdown, figures, and REPORT.md, which collects all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .rows import Point, Row

# figure: x axis, y axis, what to draw beside the points
FIGURES = {
    "time": ("time steps T (N constant)", "ns per neuron-step, forward + backward"),
    "time-n": ("neurons N (T constant)", "ns per neuron-step, forward + backward"),
    "memory": ("time steps T (N constant)", "bytes kept for backward per neuron-step"),
    "memory-n": ("neurons N (T constant)", "bytes kept for backward per neuron-step"),
    "roofline": ("operations per byte that must move", "Gop/s"),
}
MARKERS = "os^Dvph"
BEYOND = "measured over target (right of the line: met)"


# ---- tables ----
def shown(row: Row) -> tuple[str, str, str, str, str, str]:
    value = "-" if row.value is None else f"{row.value:.3g} {row.unit}"
    sign = "≥" if row.at_least else "≤"
    target = "-" if row.target is None else f"{sign} {row.target:g} {row.unit}"
    return row.work, row.against, value, target, row.verdict, row.note


def table(rows: list[Row]) -> str:
    lines = ["| work | against | measured | target | | |", "|---|---|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(shown(r)) + " |" for r in rows)])


def facts(device: dict[str, Any]) -> str:
    return ", ".join(f"{k}: {v}" for k, v in device.items())


def markdown(rows: list[Row], device: dict[str, Any], title: str = "CPU targets") -> str:
    return f"# {title}\n\n{facts(device)}\n\n{table(rows)}\n"


# ---- figures ----
def _axes(height: float = 4.0) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(10, height))


def bars(rows: list[Row], path: Path) -> bool:
    """Of a table of targets how far beyond them the rows are, else the speed-ups with their targets; False: no row."""
    measured = [r for r in rows if r.value]
    table_of_targets = 2 * sum(r.target is not None for r in measured) > len(measured)
    rows = [r for r in measured if (r.target if table_of_targets else r.unit == "x" and r.at_least)]
    if not rows:
        return False
    figure, axes = _axes(0.22 * len(rows) + 1)
    lengths = [float(r.value or 0) for r in rows]
    if table_of_targets:
        pairs = [(r, float(r.value or 0), float(r.target or 0)) for r in rows]
        lengths = [value / target if r.at_least else target / value for r, value, target in pairs]
    widths = [length - 1 for length in lengths]  # from 1 on, to either side
    axes.barh(range(len(rows)), widths, left=1, color=["#cc6677" if r.met is False else "#4477aa" for r in rows])
    if not table_of_targets:
        for k, row in enumerate(rows):
            if row.target is not None:
                axes.plot([row.target] * 2, [k - 0.45, k + 0.45], color="black", linewidth=2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{r.work} / {r.against}" for r in rows], fontsize=6)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:.2g}")
    axes.tick_params(axis="x", which="both", labelsize=6)
    axes.set_xlabel(BEYOND if table_of_targets else "times as fast (mark: target)")
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def lines(points: list[Point], name: str, path: Path) -> None:
    """One line for each contender; in the roofline, ``roof: ...`` lines are the measured limits."""
    figure, axes = _axes()
    by_line: dict[str, list[Point]] = {}
    for p in points:
        by_line.setdefault(p.line, []).append(p)
    for k, (line, members) in enumerate(by_line.items()):
        members = sorted(members, key=lambda p: p.x)
        style: dict[str, Any] = {"marker": MARKERS[k % len(MARKERS)], "color": f"C{k % 10}"}
        if line.startswith("roof: "):
            style = {"linestyle": ("--", ":")[k % 2], "color": "black", "alpha": 0.6}
        elif name == "roofline":
            style["linestyle"] = "none"
        axes.plot([p.x for p in members], [p.y for p in members], label=line.removeprefix("roof: "), **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(FIGURES[name][0])
    axes.set_ylabel(FIGURES[name][1])
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


# ---- files ----
def write(folder: Path, stem: str, title: str, device: dict[str, Any], rows: list[Row], points: list[Point]) -> None:
    """``stem``.json, .md, .png, and ``stem``-FIGURE.png of each figure that there are points of."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("", *(f"-{f}" for f in FIGURES)):  # an older run's
        (folder / f"{stem}{name}.png").unlink(missing_ok=True)
    record = {
        "environment": device,
        "title": title,
        "rows": [r.as_dict() for r in rows],
        "points": [vars(p) for p in points],
    }
    (folder / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    text = markdown(rows, device, title)
    if bars(rows, folder / f"{stem}.png"):
        text += f"\n![]({stem}.png)\n"
    for name in FIGURES:
        if chosen := [p for p in points if p.figure == name]:
            lines(chosen, name, folder / f"{stem}-{name}.png")
            text += f"\n![{name}]({stem}-{name}.png)\n"
    (folder / f"{stem}.md").write_text(text)


def read_rows(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Environment and rows of a result file, whichever benchmark wrote it."""
    record = json.loads(path.read_text())
    keys = ("work", "against", "value", "target", "at_least", "unit", "note")
    rows = [Row(**{k: row[k] for k in keys}) for row in record["rows"]]
    return record.get("environment") or record.get("device") or {}, rows


def collect(folder: Path, report: Path, sections: dict[str, tuple[str, str]], commands: dict[str, str]) -> None:
    """REPORT.md from the result files of ``folder``: ``sections`` are ``stem: (title, what is missing)``."""
    head = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks`; every section names the machine, versions, date and commit of its figures,",
        "and the command that takes them again. A speed-up is a ratio of medians within one run; peers' spikes are",
        "compared before they are timed. How: [README.md](README.md).",
        "",
    ]
    summary, body = ["| benchmark | targets met | measured | commit |", "|---|---|---|---|"], []
    for stem, (title, missing) in sections.items():
        path = folder / f"{stem}.json"
        command = f"`{commands[stem]}`"
        if not path.exists():
            summary.append(f"| {title} | - | not measured: {missing} | |")
            body += [f"## {title}", "", f"Not measured: {missing}. {command} does it.", ""]
            continue
        try:
            device, rows = read_rows(path)
        except (KeyError, TypeError):  # a file of another form: its own Markdown says what it has
            summary.append(f"| {title} | | [{stem}.md]({(folder / stem).relative_to(report.parent).as_posix()}.md) | |")
            continue
        with_target = [r for r in rows if r.target is not None and r.value is not None]
        unmeasured = sum(r.value is None for r in rows)
        met = f"{sum(bool(r.met) for r in with_target)} of {len(with_target)}"
        if unmeasured:
            met += f", {unmeasured} rows not measured"
        summary.append(
            f"| [{title}](#{_anchor(title)}) | {met} | {device.get('date', '')} | {device.get('commit', '')} |"
        )
        figures = [f"{stem}.png", *(f"{stem}-{name}.png" for name in FIGURES)]
        links = [f"![]({(folder / f).relative_to(report.parent).as_posix()})" for f in figures if (folder / f).exists()]
        body += [f"## {title}", "", f"{command}. {facts(device)}", "", table(rows), "", *links, ""]
    report.write_text("\n".join([*head, *summary, "", *body]).rstrip() + "\n")


def _anchor(title: str) -> str:
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")
