"""The cost and the noise benchmarks of distillation, and those that drive snnfast-train, end to end and small."""

# ruff: noqa: E402 (skips come before imports)
from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

for name in ("lightning_fabric", "safetensors", "rich", "matplotlib"):
    pytest.importorskip(name, reason="snnfast[train] is not installed")

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import cifar10, distillation, distillation_cost, distillation_noise, mnist_full
from benchmarks import distillation_cost_report as report


@pytest.fixture(autouse=True)
def _setting(monkeypatch, keeps_threads):
    for module in (cifar10, distillation, distillation_cost, distillation_noise, mnist_full):
        monkeypatch.setattr(module, "environment", dict)


# ---- noise ----
def test_noise_differences_are_paired_over_seeds():
    def run(seed, plain, other):
        accuracy = {"if-plain": {"gaussian": plain}, "if-response": {"gaussian": other}}
        return {"seed": seed, "accuracy": accuracy}

    runs = [run(0, [0.9, 0.5, 0.3], [0.92, 0.6, 0.4]), run(1, [0.8, 0.4, 0.2], [0.84, 0.6, 0.4])]
    found = distillation_noise.compare(runs, "if-plain", "if-response", "gaussian")
    assert found["clean"][0] == pytest.approx(0.03)
    assert found["corrupted"][0] == pytest.approx(0.15)
    assert found["beyond clean"][0] == pytest.approx(0.12)
    assert found["corrupted"][1] == pytest.approx(12.706 * 0.05)
    assert distillation_noise.curves(runs, "if-plain", "gaussian")[1][0] == pytest.approx(0.45)


def test_noise_runs_on_students_that_it_trains_if_need_be(small_mnist, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distillation, "LABELS", 100)
    monkeypatch.setattr(distillation_noise, "CORRUPTIONS", ("gaussian", "rotation"))
    monkeypatch.setattr(distillation_noise, "UNITS", ("", ""))
    monkeypatch.setattr(distillation_noise, "FAMILIES", {"if-plain": ["if-response"]})
    monkeypatch.setattr(distillation_noise, "VARIANTS", ["if-plain", "if-response"])
    command = ["--data-dir", str(small_mnist), "--seeds", "2", "--images", "30", "--quick"]
    command += ["--students", str(tmp_path / "s"), "--out", str(tmp_path / "o"), "--report", str(tmp_path)]
    distillation_noise.main(command)
    assert capsys.readouterr().out.count("if-plain: ") == 2
    distillation_noise.main(command)
    assert "if-plain: " not in capsys.readouterr().out
    figures = json.loads((tmp_path / "distillation_noise.json").read_text())
    assert len(figures["runs"]) == 2
    assert len(figures["runs"][0]["accuracy"]["if-response"]["rotation"]) == 6
    assert figures["runs"][0]["images"] == 30
    assert (tmp_path / "distillation_noise.png").stat().st_size > 10_000
    assert "| if-response | " in (tmp_path / "distillation_noise.md").read_text()


# ---- cost ----
def test_cost_of_every_way_with_a_student_that_is_the_bare_model(small_mnist, tmp_path, capsys):
    command = ["--data-dir", str(small_mnist), "--seeds", "1", "--epochs", "1", "--quick"]
    command += ["--out", str(tmp_path), "--report", str(tmp_path)]
    parser_settings = ["teacher", "ann", "plain-lif", "tssd-lif", "conversion", "overhead", "losses"]
    for run in parser_settings:  # in this process: a new one for each costs the import of torch
        distillation_cost.main([*command, "--run", run, "0"])
    found = {run: json.loads((tmp_path / f"{run}-seed0.json").read_text()) for run in parser_settings}
    free = found["overhead"]
    assert free["outputs equal bit for bit"]
    assert free["keys equal"]
    assert free["modules equal"]
    assert free["hooks left"] == 0
    assert 0.3 < free["latency ratio"] < 3
    # Twice the steps in training: about twice as much is kept.
    ratio = found["tssd-lif"]["kept for the backward"] / found["plain-lif"]["kept for the backward"]
    assert 1.7 < ratio < 2.3
    distillation_cost.main([*command, "--run", "memory-plain-lif", "0"])
    size = tmp_path / "memory-plain-lif-seed0.json"
    assert json.loads(size.read_text())["peak"] > 10**7
    for run in distillation_cost.rows():
        (tmp_path / f"memory-{run}-seed0.json").write_text(size.read_text())
    steps = found["conversion"]["steps"]
    assert steps["64"]["operations"]["acs"] > 4 * steps["4"]["operations"]["acs"]
    # Those that are not tested here stand in for one another, to see the table.
    for run, like in (("plain-if", "plain-lif"), ("response-if", "tssd-lif"), ("feature-if", "tssd-lif")):
        for name in (run, f"deep-{run}"):
            other = {"run": name, "against": None if "plain" in name else name.replace(run.split("-")[0], "plain")}
            (tmp_path / f"{name}-seed0.json").write_text(json.dumps(found[like] | other))
    capsys.readouterr()
    distillation_cost.main(command)
    assert "seed 0" not in capsys.readouterr().out
    text = (tmp_path / "distillation_cost.md").read_text()
    assert "| conversion, T = 64 | 64 |" in text
    assert "outputs equal bit for bit True" in text
    small, wide = found["losses"]["step"]["small"], found["losses"]["step"]["wide"]
    assert 0 < small["teacher"] < small["plain"] < wide["plain"]
    assert "| wide | " in text


def test_epochs_to_a_goal():
    assert report.reached([0.1, 0.5, 0.4, 0.6], 0.5) == 2
    assert report.reached([0.1, 0.2], 0.5) is None
    assert report.span([2, None, 4], ".0f") == "3 (2 to 4), 1 never"
    assert report.span([None], ".0f") == "never"


# ---- snnfast-train ----
def test_full_mnist_runs_and_goes_on(small_mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(mnist_full, "STUDENT", "channels=(4,4,4)")
    monkeypatch.setattr(mnist_full, "TEACHER", "channels=(4,6,6)")
    command = ["--data-dir", str(small_mnist), "--epochs", "1", "--teacher-epochs", "1"]
    command += ["--out", str(tmp_path / "run"), "--report", str(tmp_path)]
    mnist_full.main(command)
    mnist_full.main([*command, "--plain"])  # the others are finished
    text = (tmp_path / "mnist_full.md").read_text()
    assert "A small subset" in text
    assert "| plain |" in text
    assert "| distilled-logit-feature |" in text
    figures = json.loads((tmp_path / "mnist_full.json").read_text())
    assert str(tmp_path) not in json.dumps(figures)
    terms = figures["run"]["results"]["distilled-logit-feature"]["history"][0]["terms"]
    assert set(terms) == {"task", "logit_kd", "feature_kd.relu2", "feature_kd.relu3"}
    assert figures["run"]["results"]["plain"]["processor_seconds"] > 0


def test_cifar10_runs_goes_on_and_shares_its_teacher(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        records = rng.integers(0, 256, (20, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(20) % 10
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    (tmp_path / "test_batch_jpeg_substituted_indices.txt").write_text("3\n4\n")
    small = ["--teacher-args", "width=4", "--model-args", "width=4", "--threads", "1"]
    monkeypatch.setattr(cifar10, "options", lambda *args, _own=cifar10.options: [*_own(*args), *small])
    command = ["resnet18:wrn16_2", "--subset", "20", "--epochs", "1", "--seeds", "2", "--batch-size", "10"]
    command += ["--data-dir", str(tmp_path), "--device", "cpu", "--out", str(tmp_path / "o"), "--report", str(tmp_path)]
    cifar10.main(command)
    assert not any(isinstance(t, threading.Timer) and not t.finished.is_set() for t in threading.enumerate())
    figures = json.loads((tmp_path / "cifar10_subset.json").read_text())
    assert [row["student"] for row in figures["rows"]] == ["plain", "response", "feature"]
    assert all(row["seeds"] == 2 for row in figures["rows"])
    first, second = ({k: r["test_accuracy"] for k, r in run["results"].items()} for run in figures["runs"])
    assert first["teacher"] == pytest.approx(second["teacher"], abs=1)
    assert not (tmp_path / "o" / "resnet18-wrn16_2-seed1" / "teacher").exists()  # its teacher is the first one's
    text = (tmp_path / "cifar10_subset.md").read_text()
    assert "say nothing of the method" in text
    assert "2 of the test images here were rebuilt" in text
    with pytest.raises(SystemExit):
        cifar10.main(["resnet18", "--data-dir", str(tmp_path)])
