"""Experiments of many small runs: each is kept when it is finished, and is compared with its partner."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # of t, 97.5 %


# ---- statistics ----
def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half of the 95 % interval of Student's t, ``None`` where there are too few values (or over ten)."""
    half = None
    if len(values) - 1 in QUANTILE:
        half = QUANTILE[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def verdict(mean: float, half: float | None) -> str:
    """What an interval of paired differences says, where more is better."""
    if half is None:
        return ""
    return "helps" if mean - half > 0 else "hurts" if mean + half < 0 else "no difference shown"


def points(mean: float, half: float | None = None) -> str:
    """A difference of shares in points, with its interval.

    Example:
        >>> points(0.0123, 0.004)
        '+1.23 ± 0.40'
    """
    return f"{100 * mean:+.2f}" + ("" if half is None else f" ± {100 * half:.2f}")


# ---- finished runs ----
def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Write ``path`` in one go: it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    save(part)
    part.replace(path)


def once(path: Path, identity: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``run()`` gave, from ``path`` if it is there; a file of other settings stops the command."""
    identity = json.loads(json.dumps(identity))  # as it comes back: tuples are lists
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["settings"] != identity:
            sys.exit(f"{path} was made with other settings: remove it, or choose another --out")
        return stored
    path.parent.mkdir(parents=True, exist_ok=True)
    result = run() | {"settings": identity}
    text = json.dumps(result, indent=1) + "\n"
    write(path, lambda p: p.write_text(text))
    return result


class Clock:
    """Seconds of the clock, and of this process on the processor: beside busy neighbours only the latter mean much."""

    def __init__(self) -> None:
        self.started, self.worked = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Both since this clock was made."""
        return {
            "seconds": time.perf_counter() - self.started,
            "processor seconds": time.process_time() - self.worked,
        }


# ---- reports ----
def about(docstring: str | None) -> str:
    """The paragraph of a command's docstring that says what was done, as one line."""
    return (docstring or "").split("\n\n")[1].replace("\n", " ")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [" | ".join(head), "|".join("---" for _ in head), *(" | ".join(map(str, row)) for row in rows)]
    return "\n".join(f"| {line} |" if i != 1 else f"|{line}|" for i, line in enumerate(lines))


def listed(values: dict[str, Any]) -> str:
    """Settings or an environment in one sentence."""
    return ", ".join(f"{key}: {value}" for key, value in values.items())


def save(folder: Path, name: str, text: str, figures: dict[str, Any]) -> None:
    """``name.md`` and ``name.json`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text.rstrip("\n") + "\n")
    (folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
