"""benchmarks/nmnist.py end to end on made-up recordings: folds, pairing, and that it goes on where it stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import nmnist, paired
from snnfast.train import data


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """200 recordings whose digit is told by where the events are, at all times."""
    folder, rng = tmp_path_factory.mktemp("nmnist"), np.random.default_rng(0)
    for split, count in (("Train", 18), ("Test", 2)):
        for digit in range(10):
            place = folder / split / str(digit)
            place.mkdir(parents=True)
            for i in range(count):
                x, y = 6 * (digit % 5) + rng.integers(0, 6, 300), 16 * (digit // 5) + rng.integers(0, 16, 300)
                p, t = rng.integers(0, 2, 300), np.sort(rng.integers(0, 300_000, 300))
                events = np.stack((x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255), 1).astype(np.uint8)
                (place / f"{i:05}.bin").write_bytes(events.tobytes())
    return folder


def test_folds_test_every_recording_once_with_all_digits():
    digits = torch.arange(10).repeat_interleave(torch.tensor([109, 104, 113, 110, 107, 115, 108, 116, 111, 107]))
    fold = nmnist.folds(digits)
    sizes = torch.bincount(fold)
    assert sizes.sum() == 1100
    assert sizes.max() - sizes.min() <= 10
    for k in range(nmnist.FOLDS):
        counts = torch.bincount(digits[fold == k])
        assert (counts - torch.bincount(digits) / nmnist.FOLDS).abs().max() < 1


def test_comparison_is_paired_by_fold_and_recording():
    plain = [{"accuracy": 0.5, "right": [1, 0]}, {"accuracy": 0.5, "right": [0, 1]}]
    other = [{"accuracy": 1.0, "right": [1, 1]}, {"accuracy": 0.5, "right": [1, 0]}]
    found = nmnist.compare(other, plain)
    assert found["differences of folds"] == [0.5, 0.0]
    assert (found["only this is right"], found["only plain is right"]) == (2, 1)
    assert found["difference"] == found["difference of recordings"] == 0.25
    assert found["half interval of folds"] == pytest.approx(12.706 * 0.25, rel=1e-3)


@pytest.mark.usefixtures("keeps_threads")
def test_it_runs_resumes_and_reports(recordings, tmp_path, monkeypatch, capsys):
    for name, value in (("environment", dict), ("FOLDS", 2), ("BATCH", 10)):
        monkeypatch.setattr(nmnist, name, value)
    command = ["tssd", "--data-dir", str(recordings), "--epochs", "3", "--out", str(tmp_path / "runs")]
    command += ["--report", str(tmp_path)]
    nmnist.main(command)
    first = json.loads((tmp_path / "runs" / "tssd-fold0.json").read_text())
    (tmp_path / "runs" / "tssd-fold0.json").unlink()
    capsys.readouterr()
    nmnist.main(command)
    assert capsys.readouterr().out.count("fold ") == 1  # the one that was missing
    again = json.loads((tmp_path / "runs" / "tssd-fold0.json").read_text())
    assert {k: v for k, v in first.items() if "seconds" not in k} == {
        k: v for k, v in again.items() if "seconds" not in k
    }
    with pytest.raises(SystemExit, match="other settings"):
        nmnist.main([*command, "--epochs", "2"])
    assert set(first["terms of the last batch"]) == {"task", "temporal_self_kd", "spatial_self_kd.spike2"}
    found = json.loads((tmp_path / "nmnist.json").read_text())
    assert [row["variant"] for row in found["rows"]] == ["plain", "tssd"]
    assert all(row["accuracy"] > 0.5 for row in found["rows"])  # by chance: 0.1
    assert "| tssd | 2 |" in (tmp_path / "nmnist.md").read_text()


def test_the_student_of_a_temporal_run_is_tested_on_its_own_steps(recordings):
    """What is tested sees 8 frames, although 16 were played in training."""
    frames, digits = nmnist.load(recordings)
    torch.manual_seed(0)
    net = nmnist.network()
    short, long = nmnist.seen("tssd", frames)
    nmnist.train(net, nmnist.variants()["tssd"], long[:80], digits[:80], 0, 1)
    assert {m.timesteps for m in net.modules() if hasattr(m, "timesteps")} == {nmnist.T}
    assert len(nmnist.hits(net, short[:7], digits[:7])) == 7


def test_what_is_seen_of_a_recording(recordings):
    frames, _ = nmnist.load(recordings)
    short, long = nmnist.seen("tssd", frames)
    eight = data.load("nmnist", recordings, timesteps=8).train.images.float()
    pooled = eight.unflatten(3, (17, 2)).unflatten(5, (17, 2)).sum((4, 6))
    assert torch.equal(short[: len(pooled)], pooled)  # read apart, in another way
    assert torch.equal(long[:, :8], short)
    assert torch.equal(long[:, 8:], short)
    short, long = nmnist.seen("half-tssd", frames)
    assert torch.equal(long, frames)
    assert torch.equal(short, frames[:, :8])


def test_a_finished_run_of_other_settings_is_not_taken(tmp_path):
    path = tmp_path / "a.json"
    assert paired.once(path, {"n": (1, 2)}, lambda: {"x": 1})["x"] == 1
    assert paired.once(path, {"n": [1, 2]}, lambda: {"x": 2})["x"] == 1
    with pytest.raises(SystemExit, match="other settings"):
        paired.once(path, {"n": [1, 3]}, lambda: {"x": 2})
