"""benchmarks/distillation.py: its statistics, its data, and that it goes on where it stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import distillation
from benchmarks.distillation import mnist_data


def result(accuracy: float) -> dict:
    return {
        "accuracy": accuracy,
        distillation.LONGER: accuracy,
        "synaptic operations": 1.0,
        "training seconds": 1.0,
        "firing rates": {"spike1": 0.1},
        "teacher accuracy": None,
    }


def test_intervals_are_of_paired_differences():
    plain, other = [0.90, 0.92, 0.94, 0.91, 0.93], [0.91, 0.94, 0.945, 0.93, 0.94]
    results = {("lif-plain", s): result(a) for s, a in enumerate(plain)}
    results |= {("lif-spatial", s): result(a) for s, a in enumerate(other)}
    results["lif-spatial", 5] = result(0.1)  # not paired: left out
    row = distillation.paired(results, "lif-spatial", range(6))
    differences = np.array(other) - plain
    assert row["difference"] == pytest.approx(differences.mean())
    # Student's t, 4 degrees of freedom, 97.5 %
    assert row["half interval"] == pytest.approx(2.7764451 * differences.std(ddof=1) / 5**0.5, rel=1e-3)
    assert distillation.verdict(row) == "helps"
    results["lif-spatial", 0] = result(0.80)
    assert distillation.verdict(distillation.paired(results, "lif-spatial", range(5))) == "no difference shown"
    assert "difference" not in distillation.paired(results, "lif-plain", range(5))


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data-dir must hold .*train-images-idx3-ubyte"):
        distillation.load(tmp_path)


@pytest.mark.usefixtures("keeps_threads")
def test_a_run_goes_on_where_it_stopped_and_is_paired(tmp_path, monkeypatch, capsys):
    try:
        mnist_data.data_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(distillation, "environment", dict)
    command = ["if-plain", "if-response", "--quick", "--seeds", "1", "--out", str(tmp_path), "--report", str(tmp_path)]
    distillation.main(command)
    first = json.loads((tmp_path / "if-plain-seed0.json").read_text())
    (tmp_path / "if-response-seed0.json").unlink()
    capsys.readouterr()
    distillation.main(command)
    assert capsys.readouterr().out.count("seed 0") == 1  # the one that was missing
    (tmp_path / "if-plain-seed0.json").unlink()
    distillation.main(command)
    again = json.loads((tmp_path / "if-plain-seed0.json").read_text())
    assert {k: v for k, v in first.items() if "seconds" not in k} == {
        k: v for k, v in again.items() if "seconds" not in k
    }
    with pytest.raises(SystemExit, match="other settings"):
        distillation.main([*command, "--shift", "1"])
    report = json.loads((tmp_path / "distillation.json").read_text())
    assert [row["variant"] for row in report["rows"]] == ["if-plain", "if-response"]
    assert report["rows"][1]["teacher accuracy"] > 0
    assert "| if-response | 1 |" in (tmp_path / "distillation.md").read_text()


def test_unknown_variants_are_refused(capsys):
    with pytest.raises(SystemExit):
        distillation.parse(["if-magic"])
    assert "unknown variants ['if-magic']; there are if-plain" in capsys.readouterr().err
