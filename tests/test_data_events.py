"""Readers of event recordings: N-MNIST's files, and tonic's data sets (snnfast.train)."""

from __future__ import annotations

import io
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
from data_files import real

from snnfast.train import data, formats
from snnfast.train.errors import InputError

RNG = np.random.default_rng(0)


def encode(events: np.ndarray) -> bytes:
    x, y, p, t = events.T
    return np.stack((x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255), 1).astype(np.uint8).tobytes()


def test_nmnist_events_round_trip() -> None:
    events = np.stack(
        (RNG.integers(0, 34, 50), RNG.integers(0, 34, 50), RNG.integers(0, 2, 50), RNG.integers(0, 2**23, 50)), 1
    )
    assert np.array_equal(formats.read_nmnist_events(encode(events), "x"), events)
    with pytest.raises(InputError, match=r"a.bin must hold whole events of 5 bytes, found 249 bytes"):
        formats.read_nmnist_events(encode(events)[:-1], "a.bin")
    with pytest.raises(InputError, match="outside the 34 x 34 sensor"):
        formats.read_nmnist_events(b"\xff" * 5, "a.bin")


def test_frames_count_every_event_in_its_bin() -> None:
    events = np.stack(
        (RNG.integers(0, 6, 300), RNG.integers(0, 4, 300), RNG.integers(0, 2, 300), RNG.integers(50, 950, 300)), 1
    )
    frames = formats.events_to_frames(events, 7, (4, 6))
    expected = np.zeros((7, 2, 4, 6), int)
    first, last = events[:, 3].min(), events[:, 3].max()
    for x, y, p, t in events:  # by hand, one after another
        expected[int((t - first) * 7 / (last - first + 1)), p, y, x] += 1
    assert np.array_equal(frames, expected)
    halved = formats.events_to_frames(events, 1, (2, 3), (4, 6))
    assert np.array_equal(halved[0], expected.sum(0).reshape(2, 2, 2, 3, 2).sum((2, 4)))
    assert formats.events_to_frames(np.zeros((1000, 4), int), 1, (1, 1)).max() == 255


@pytest.mark.parametrize("layout", ["official", "lists", "archive"])
def test_nmnist_layouts(tmp_path: Path, layout: str) -> None:
    source = tmp_path if layout != "archive" else tmp_path / "made"
    for split, start in (("Train", 0), ("Test", 20)):
        lines = ["#sample #class"]
        for i in range(10):
            content = encode(np.array([[i, split == "Test", 1, 5], [3, 4, 0, 90_000]]))
            if layout == "official":
                path = source / split / str(i) / f"{i:05}.bin"
            else:
                path = source / f"{start + i}.bs2"
                lines.append(f"{start + i}\t{i}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if layout != "official":
            (source / f"{split.lower()}10.txt").write_text("\n".join(lines))
    folder = tmp_path
    if layout == "archive":
        folder = tmp_path / "packed"
        folder.mkdir()
        with tarfile.open(folder / "small.tar.xz", "w:xz") as archive:
            archive.add(source, "small")
    found = data.load("nmnist", folder, timesteps=3)
    assert found.has_time
    assert found.train.images.shape == (10, 3, 2, 34, 34)
    order = found.train.labels.tolist()
    assert sorted(order) == list(range(10))
    assert all(found.train.images[i, 0, 1, 0, digit] == 1 for i, digit in enumerate(order))
    assert found.test.images[:, 0, 1, 1].sum() == 10
    assert found.test.images[:, 2, 0, 4, 3].sum() == 10
    if layout == "lists":
        (folder / "3.bs2").unlink()
        with pytest.raises(InputError, match=r"3.bs2 is missing; .*train10.txt lists it"):
            data.load("nmnist", folder)
        (folder / "train10.txt").write_text("#sample #class")
        with pytest.raises(InputError, match="the training split is empty"):
            data.load("nmnist", folder)


def test_damaged_nmnist_archive(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no N-MNIST recordings: expected Train"):
        data.load("nmnist", tmp_path)
    path = tmp_path / "small.tar.xz"
    with tarfile.open(path, "w:xz") as archive:
        for i in range(5):
            info = tarfile.TarInfo(f"{i}.bs2")
            info.size = 1000
            archive.addfile(info, io.BytesIO(RNG.bytes(1000)))
    content = path.read_bytes()
    for size in (50, len(content) // 2, len(content) - 20):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=rf"small.tar.xz \({size:,} bytes\) is truncated or not xz data"):
            data.load("nmnist", tmp_path)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"small.tar.xz has no list train\*.txt"):
        data.load("nmnist", tmp_path)


def test_real_nmnist() -> None:
    found = data.load("nmnist", real("nmnist-small"), timesteps=8)
    assert found.train.images.shape == (1000, 8, 2, 34, 34)
    assert found.test.images.shape == (100, 8, 2, 34, 34)
    assert found.train.labels.unique().tolist() == list(range(10))
    events = found.train.images.long().sum((1, 2, 3, 4)).float()
    assert 3000 < events.mean() < 5000  # about 4,000 events a recording


def test_tonic_is_asked_for_its_folder_and_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tonic", None)
    with pytest.raises(InputError, match="through tonic: pip install tonic"):
        data.load("dvsgesture", tmp_path)
    kinds = [("x", "<i2"), ("y", "<i2"), ("p", "?"), ("t", "<i8")]

    class DVSGesture:  # as tonic's: a sequence of (events, label)
        sensor_size = (128, 128, 2)

        def __init__(self, save_to: str, train: bool) -> None:
            self.rows = [(np.array([(i, 64, 1, 0), (127, 127, 0, 99)], kinds), i) for i in range(11)]

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, i: int):
            return self.rows[i]

    fake = types.SimpleNamespace(datasets=types.SimpleNamespace(DVSGesture=DVSGesture))
    monkeypatch.setitem(sys.modules, "tonic", fake)
    with pytest.raises(InputError, match="has no folder DVSGesture"):
        data.load("dvsgesture", tmp_path)
    (tmp_path / "DVSGesture").mkdir()
    found = data.load("dvsgesture", tmp_path, timesteps=4, image_size=32)
    assert found.train.images.shape == (11, 4, 2, 32, 32)
    assert found.classes == 11
    assert found.train.images[8, 0, 1, 16, 2] == 1
    assert found.train.images[8, 3, 0, 31, 31] == 1


def test_the_real_tonic(tmp_path: Path) -> None:
    """tonic's own DVSGesture on recordings in its files' format: rows of x, y, polarity and milliseconds."""
    pytest.importorskip("tonic", reason="tonic is not installed")
    for split in ("Train", "Test"):
        archive = tmp_path / "DVSGesture" / f"ibmGesture{split}.tar.gz"
        archive.parent.mkdir(exist_ok=True)
        archive.write_bytes(b"tonic looks whether it is there")
        for user in range(10):  # tonic wants 100 recordings at least
            folder = archive.parent / f"ibmGesture{split}" / f"user{user:02}_fluorescent"
            folder.mkdir(parents=True)
            for label in range(11):
                events = [(label * 10, 20 + user, 1, 0.0), (127, 127, 0, 99.0), (127, 127, 0, 99.0)]
                np.save(folder / f"{label}.npy", np.array(events))
    found = data.load("dvsgesture", tmp_path, timesteps=4, image_size=32)
    assert found.train.images.shape == found.test.images.shape == (110, 4, 2, 32, 32)
    assert sorted(found.train.labels.tolist()) == sorted(list(range(11)) * 10)
    assert (found.train.images[:, 3, 0, 31, 31] == 2).all()
    first = found.train.images[:, 0, 1]  # x is the column, a quarter as fine
    assert (first.sum((1, 2)) == 1).all()
    assert (first.sum(1).argmax(1) == found.train.labels * 10 // 4).all()
