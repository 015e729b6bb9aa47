"""Runs killed, interrupted, out of disk or at NaN, and resumed: the same bits in the end (snnfast.train.checkpoint)."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="snnfast[train] is not installed")
pytest.importorskip("lightning_fabric", reason="snnfast[train] is not installed")
from train_runs import environment

from snnfast.train import checkpoint, cli, trainer
from snnfast.train.checkpoint import Checkpoints

# Dropout, augmentation, adapters and two networks: every kind of state that a resumed run must bring back.
RUN = [
    "--data", "mnist", "--train-samples", "128", "--test-samples", "40",
    "--student", "train_networks:dropped", "--teacher", "train_networks:teacher", "--timesteps", "2",
    "--distill", "logit,feature,spatial", "--epochs", "2", "--teacher-epochs", "1", "--batch-size", "16",
    "--augment", "crop,randaugment", "--checkpoint-steps", "1", "--robustness-samples", "0", "--no-tensorboard",
    "--threads", "1", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(small_mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    threads = torch.get_num_threads()
    assert _main(small_mnist, out, "--checkpoint-steps", "100") == 0
    torch.set_num_threads(threads)
    return out


def _main(folder: Path, out: Path, *more: str) -> int:
    return cli.main([*RUN, "--data-dir", str(folder), "--out", str(out), *more])


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, adapters, optimiser and history bit for bit; times differ."""
    networks = sorted(p.parent.name for p in a.glob("*/model.safetensors"))
    assert networks == ["distilled-logit-feature-spatial", "plain", "teacher"]
    for name in networks:
        assert (a / name / "model.safetensors").read_bytes() == (b / name / "model.safetensors").read_bytes(), name
        loaded = [Checkpoints(out / name / "checkpoints").latest() for out in (a, b)]
        assert loaded[0][0] == loaded[1][0]
        for i in (1, 2):
            assert loaded[0][i].keys() == loaded[1][i].keys()
            assert all(torch.equal(t, loaded[1][i][k]) for k, t in loaded[0][i].items())
        states = [result[3] for result in loaded]
        for state in states:
            for entry in state["history"]:
                for key in ("seconds", "processor_seconds", "data_share", "peak_memory"):
                    del entry[key]
            del state["seconds"], state["rate"]
        assert _flat(states[0]) == _flat(states[1])


def _flat(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {k: _flat(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_flat(v) for v in value]
    return value


KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import lightning_fabric, safetensors.torch, snnfast.distill, snnfast.analysis, matplotlib.figure
from snnfast.train import cli, experiment
rng, kills, arguments = random.Random(int(sys.argv[1])), 0, sys.argv[2:]
def steps():
    out = arguments[arguments.index("--out") + 1]
    return {os.path.join(at, name) for at, names, _ in os.walk(out) for name in names if name.startswith("step-")}
while True:
    child = os.fork()  # imports are done: a kill hits training, not the start of Python
    if child == 0:
        os._exit(cli.main(arguments))
    # Some checkpoints later and at any moment until the next: as often on a fast machine as on a slow one.
    seen, checkpoints, delay = steps(), rng.randint(1, 8), rng.uniform(0, 0.02)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            print(kills, os.waitstatus_to_exitcode(status))
            sys.exit(os.waitstatus_to_exitcode(status))
        new = steps() - seen
        checkpoints -= len(new)
        seen |= new
        if checkpoints <= 0 and kills < 12:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            break
        time.sleep(0.001)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_killed_at_random_times_ends_with_the_same_bits(small_mnist: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    seed = random.SystemRandom().randrange(10**6)
    command = [
        sys.executable,
        "-c",
        KILLER,
        str(seed),
        *RUN,
        "--data-dir",
        str(small_mnist),
        "--out",
        str(out),
        "--resume",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment())
    assert done.returncode == 0, f"seed {seed}: {done.stdout}{done.stderr}"
    assert int(done.stdout.split()[0]) >= 3, f"too few kills, seed {seed}: {done.stdout}{done.stderr}"
    assert "goes on at step" in done.stderr
    assert_same_run(uninterrupted, out)


@pytest.mark.usefixtures("keeps_threads")
def test_killed_as_a_user_would(small_mnist: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "snnfast.train", *RUN, "--data-dir", str(small_mnist), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    deadline = time.monotonic() + 60
    while not list(out.glob("teacher/checkpoints/step-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "report.json").exists()
    assert _main(small_mnist, out, "--resume") == 0
    assert_same_run(uninterrupted, out)


@pytest.mark.usefixtures("keeps_threads")
def test_interrupted_between_any_two_steps(
    small_mnist: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Ctrl-C every third step: a checkpoint, exit code 130, and the same bits in the end."""
    step = trainer.Trainer._step
    counted = 0

    def interrupted(self: trainer.Trainer, batch: torch.Tensor) -> None:
        nonlocal counted
        counted += 1
        if counted % 3 == 0:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, batch)

    monkeypatch.setattr(trainer.Trainer, "_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    out = tmp_path / "run"
    codes = []
    while not codes or codes[-1] == 130:
        codes.append(_main(small_mnist, out, "--resume"))
        assert len(codes) < 40
        if codes[-1] == 130:
            assert "go on with --resume" in capsys.readouterr().err
    assert codes[-1] == 0
    assert len(codes) == 14  # 40 steps
    assert signal.getsignal(signal.SIGINT) is before
    assert_same_run(uninterrupted, out)


@pytest.mark.usefixtures("keeps_threads")
def test_full_disk_keeps_the_last_checkpoint(
    small_mnist: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    write = checkpoint._write
    written = 0

    def full(path: Path, content: bytes) -> None:
        nonlocal written
        written += len(content)
        if written > 300_000:
            path.write_bytes(content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(checkpoint, "_write", full)
    out = tmp_path / "run"
    assert _main(small_mnist, out) == 4
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "is intact: make room, then go on with --resume" in message
    monkeypatch.undo()
    assert not list(out.glob("*/checkpoints/.tmp*"))
    assert _main(small_mnist, out, "--resume") == 0
    assert_same_run(uninterrupted, out)


@pytest.mark.usefixtures("keeps_threads")
@pytest.mark.parametrize("name", ["tensorboard", "accuracy.png"])
def test_logs_and_figures_that_cannot_be_written(
    small_mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    pytest.importorskip("tensorboard", reason="snnfast[train] is not installed")
    arguments = [a for a in RUN if a != "--no-tensorboard"] + ["--distill", "none", "--data-dir", str(small_mnist)]
    arguments += ["--epochs", "1", "--checkpoint-steps", "100", "--out", str(tmp_path)]
    (tmp_path / name).symlink_to(tmp_path / "nowhere" / "file")
    assert cli.main(arguments) == 4
    assert re.search(rf"{name}\S* cannot be written: .*go on with --resume", capsys.readouterr().err)
    (tmp_path / name).unlink()
    assert cli.main([*arguments, "--resume"]) == 0


@pytest.mark.usefixtures("keeps_threads")
def test_nan_loss_stops_and_keeps_the_last_checkpoint(
    small_mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    assert _main(small_mnist, out, "--student", "train_networks:not_a_number", "--distill", "none") == 3
    message = capsys.readouterr().err
    assert "the loss is not finite at epoch 1, step 5" in message
    assert "the checkpoint of step 4 is intact" in message
    step, weights, _, _ = Checkpoints(out / "plain" / "checkpoints").latest()
    assert step == 4
    assert all(t.isfinite().all() for t in weights.values())


@pytest.mark.usefixtures("keeps_threads")
def test_resuming_something_else_is_refused(
    small_mnist: Path, uninterrupted: Path, capsys: pytest.CaptureFixture
) -> None:
    assert _main(small_mnist, uninterrupted) == 2
    assert "holds checkpoints: add --resume" in capsys.readouterr().err
    assert _main(small_mnist, uninterrupted, "--resume", "--lr", "0.5") == 2
    assert "lr (0.002 there, 0.5 now)" in capsys.readouterr().err
    fcntl = pytest.importorskip("fcntl")
    with (uninterrupted / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert _main(small_mnist, uninterrupted, "--resume") == 2
    assert "another run is writing there" in capsys.readouterr().err
