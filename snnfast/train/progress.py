"""What the user sees while a run goes on, and the memory that it takes."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import InputError

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = ["Display", "history_csv", "peak_memory", "reset_peak_memory"]


def reset_peak_memory(device: torch.device) -> None:
    """Start to look for the peak anew, where the system can (a GPU; Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Largest memory since :func:`reset_peak_memory` in bytes: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


class Display:
    """A bar with ETA on a terminal, and one line for each epoch anywhere.

    Args:
        quiet: say nothing (other processes than the first).
    """

    def __init__(self, quiet: bool = False) -> None:
        try:
            from rich.console import Console
        except ImportError:
            raise InputError("training shows its progress with rich: pip install snnfast[train]") from None
        self.console: Any = Console(highlight=False, stderr=True, quiet=quiet, soft_wrap=True)

    def say(self, message: str) -> None:
        """One line."""
        self.console.print(message, markup=False)

    @contextlib.contextmanager
    def stage(self, name: str, trainer: Trainer) -> Iterator[Callable[[Trainer], None]]:
        """A bar for one stage; what it yields is called with the trainer to move it."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
        )  # fmt: skip
        hidden = not self.console.is_terminal or self.console.quiet
        with Progress(*columns, console=self.console, disable=hidden, transient=True) as bars:
            total = trainer.per_epoch * trainer.stage.epochs
            task = bars.add_task(name, total=total, completed=trainer.step, figures="")

            def move(now: Trainer) -> None:
                if not hidden:
                    bars.update(task, completed=now.step, figures=_figures(now))

            yield move

    def epoch(self, name: str, epochs: int, entry: dict[str, Any]) -> None:
        """One line on an epoch."""
        rate = "" if entry["firing_rate"] is None else f", firing rate {entry['firing_rate']:.3f}"
        self.say(
            f"{name}: epoch {entry['epoch']}/{epochs}, loss {entry['train_loss']:.4f}, training accuracy "
            f"{entry['train_accuracy']:.2%}, test accuracy {entry['test_accuracy']:.2%}{rate}, {entry['seconds']:.0f} s"
        )


def _figures(trainer: Trainer) -> str:
    loss, right = (trainer.sums / max(1, trainer.batch)).tolist()
    terms = zip(trainer.stage.objective.names, trainer.terms.tolist(), strict=False)
    shown = f"loss {loss:.3f}"
    if len(trainer.terms) > 1:
        shown += f" ({', '.join(f'{n} {t:.3f}' for n, t in terms)})"
    shown += f" acc {right:.1%}"
    return shown if trainer.rate is None else f"{shown} rate {trainer.rate:.3f}"


def history_csv(history: list[dict[str, Any]]) -> bytes:
    """A stage's history as a table: a row for each epoch, a column for each term and layer."""
    rows = []
    for entry in history:
        row = {k: v for k, v in entry.items() if not isinstance(v, dict)}
        row |= {f"term {k}": v for k, v in entry["terms"].items()}
        rows.append(row | {f"rate {k}": v for k, v in entry["firing_rates"].items()})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
