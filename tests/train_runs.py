"""The training command with small networks and few images, as its tests call it, and what it wrote."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

from snnfast.train import cli

TESTS = Path(__file__).parent
SMALL = [
    "--data", "mnist", "--student", "train_networks:student", "--teacher", "train_networks:teacher",
    "--timesteps", "2", "--epochs", "2", "--batch-size", "20", "--augment", "none", "--robustness-samples", "0",
    "--threads", "1", "--device", "cpu",
]  # fmt: skip


def train(folder: Path, out: Path, *more: str) -> int:
    return cli.main([*SMALL, "--data-dir", str(folder), "--out", str(out), *more])


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def losses(out: Path, network: str = "plain") -> list[float]:
    with (out / network / "log.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) for key in ("train_loss", "test_loss")]


def environment() -> dict[str, str]:
    """For a process that trains: this checkout's package, and the networks of the tests."""
    path = os.pathsep.join(filter(None, (str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
