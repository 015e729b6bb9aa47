"""What a benchmark yields: rows of its table and points of its figures, and the settings it is run with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

VERDICT = {True: "met", False: "missed", None: "not measured"}


@dataclass
class Row:
    work: str
    against: str
    value: float | None  # None: not measured
    target: float | None  # None: shown without one
    at_least: bool
    unit: str
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None or self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    @property
    def verdict(self) -> str:
        return "" if self.value is not None and self.target is None else VERDICT[self.met]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


def at_least(
    work: str, against: str, value: float | None, target: float | None, unit: str = "x", note: str = ""
) -> Row:
    return Row(work, against, value, target, True, unit, note)


def at_most(work: str, against: str, value: float | None, target: float | None, unit: str = "x", note: str = "") -> Row:
    return Row(work, against, value, target, False, unit, note)


@dataclass
class Point:
    """One measurement of ``line`` in ``figure`` (the figures are named in :mod:`benchmarks.report`)."""

    figure: str
    line: str
    x: float
    y: float


@dataclass
class Settings:
    """How a benchmark is run.

    Attributes:
        device: ``'cpu'`` or ``'cuda'``.
        present: whether that device is here; without it every row is yielded as not measured.
        quick: small shapes and few runs, to see that it works; such figures mean nothing.
    """

    device: str = "cpu"
    present: bool = True
    quick: bool = False

    def absent(self, work: str, against: str, target: float | None = None, sign: bool = True, unit: str = "x") -> Row:
        return Row(work, against, None, target, sign, unit, f"no {self.device} device here")


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
