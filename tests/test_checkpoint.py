"""Checkpoint files: whole after a crash at any write, damage named, nothing run or lost (snnfast.train.checkpoint)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors", reason="snnfast[train] is not installed")
pytest.importorskip("lightning_fabric", reason="snnfast[train] is not installed")
from snnfast.train import checkpoint
from snnfast.train.checkpoint import Checkpoints, random_state, restore_random_state
from snnfast.train.errors import CheckpointError


def _state(value: int) -> tuple[dict, dict, dict]:
    model = {"w": torch.full((300, 300), float(value)), "n": torch.tensor(value)}
    return model, {"a": torch.full((3,), float(value))}, {"value": value, "random": random_state()}


def _value(found: tuple) -> int:
    """The value that a checkpoint was made with, once all its parts agree on it."""
    step, model, extra, state = found
    assert step == state["value"] == int(model["n"]) == float(model["w"].unique()) == float(extra["a"].unique())
    return step


def test_a_crash_at_any_write_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the program before each of its operations on files in turn, and in the middle of each write."""

    class Crash(BaseException):
        pass

    rmtree = checkpoint.shutil.rmtree
    seen = set()
    for crash_at in range(1, 100):
        folder = tmp_path / str(crash_at)
        checkpoints = Checkpoints(folder)
        checkpoints.save(1, *_state(1))
        checkpoints.save(2, *_state(2))
        if crash_at % 2:  # the step that is written is there already, but damaged
            checkpoints.save(3, *_state(3))
            (checkpoints.path(3) / "state.pt").write_bytes(b"")
        count = 0

        def tick(crash_at: int = crash_at) -> None:
            nonlocal count
            count += 1
            if count >= crash_at:
                raise Crash

        def write(path: Path, content: bytes) -> None:
            path.write_bytes(content[: len(content) // 2])
            tick()
            path.write_bytes(content)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_write", write)
            patch.setattr(checkpoint, "_sync_folder", lambda folder: tick())
            for name in ("rename", "mkdir"):
                original = getattr(Path, name)
                patch.setattr(Path, name, lambda self, *a, _o=original, **k: (tick(), _o(self, *a, **k))[1])
            patch.setattr(checkpoint.shutil, "rmtree", lambda *a, **k: (tick(), rmtree(*a, **k)))
            try:
                checkpoints.save(3, *_state(3))
                finished = True
            except Crash:
                finished = False
        after = Checkpoints(folder, say=lambda message: None)
        assert not list(folder.glob(".tmp-*"))
        seen.add(_value(after.latest()))
        if finished:
            assert _value(after.latest()) == 3
            break
    assert finished
    assert crash_at > 8
    assert seen == {2, 3}


@pytest.mark.parametrize("name", ["model.safetensors", "extra.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path: Path, name: str, damage: str) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, said.append)
    for value in (1, 2, 3):
        checkpoints.save(value, *_state(value))
    assert checkpoints.steps() == [2, 3]  # the newest and the one before
    path = checkpoints.path(3) / name
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "altered":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    else:
        path.unlink()
    assert _value(checkpoints.latest()) == 2
    assert len(said) == 1
    assert str(checkpoints.path(3)) in said[0]
    (checkpoints.path(2) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint is left"):
        checkpoints.latest()


def test_foreign_and_newer_formats_are_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, *_state(1))
    path = checkpoints.path(1) / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(CheckpointError, match="format version 99, this program reads 1"):
        checkpoints.load(1)
    path.write_text(json.dumps({"format": "other"}))
    with pytest.raises(CheckpointError, match="not a checkpoint of snnfast-train"):
        checkpoints.load(1)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoints.load(1)


def test_no_code_is_run_by_loading(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    model, extra, state = _state(1)
    checkpoints.save(1, model, extra, state | {"history": Evil()})
    with contextlib.suppress(Exception):
        checkpoints.load(1)
    assert not (tmp_path / "evil").exists()


def test_size_limit_of_the_system(tmp_path: Path) -> None:
    """A real refusal by the kernel, in the middle of a file."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, *_state(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))  # the weights take 360,000
    try:
        with pytest.raises(CheckpointError, match=r"File too large.*the checkpoint of step 1 is intact"):
            checkpoints.save(2, *_state(2))
        path = tmp_path / "file"
        path.write_bytes(b"old")
        with pytest.raises(CheckpointError, match="cannot be written"):
            checkpoint.write_atomically(path, bytes(300_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "step-00000001"]
    assert _value(checkpoints.latest()) == 1


def test_random_generators_come_back() -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.standard_normal()  # leaves a second value in store
    state = random_state()

    def draw() -> list[float]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.standard_normal(),
            np.random.rand(),
            torch.rand(1).item(),
        ]

    first = draw()
    assert draw() != first
    restore_random_state(state)
    assert draw() == first


def test_tied_weights_are_kept(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": shared, "b": shared, "t": shared.view(2, 3).T}, {}, {})
    _, model, _, _ = checkpoints.latest()
    assert torch.equal(model["a"], model["b"])
    assert torch.equal(model["t"], shared.view(2, 3).T)
