"""Readers of the data sets' own file formats: idx, CIFAR binary and pickled batches, N-MNIST events, image folders.

Each returns uint8 arrays and int64 labels, and refuses a file that is short, corrupt or of another format by name.
"""

from __future__ import annotations

import gzip
import io
import lzma
import pickle
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError

__all__ = [
    "events_to_frames",
    "find",
    "read_bytes",
    "read_cifar_binary",
    "read_cifar_pickle",
    "read_idx",
    "read_nmnist_events",
    "recordings",
]

Arrays = tuple[np.ndarray, np.ndarray]  # images in uint8 and labels in int64
_PACKED = (".gz", ".xz")


def find(folder: Path, *names: str, subfolders: tuple[str, ...] = ()) -> Path | None:
    """The first of ``names``, plain or packed with gzip or xz, in ``folder`` or in one of its ``subfolders``."""
    for place in (folder, *(folder / s for s in subfolders)):
        for name in names:
            for suffix in ("", *_PACKED):
                path = place / (name + suffix)
                if path.is_file():
                    return path
    return None


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked if its name ends in ``.gz`` or ``.xz``.

    Raises:
        InputError: it is missing, unreadable, or its packing is damaged.
    """
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        size = path.stat().st_size
        raise InputError(
            f"{path} ({size:,} bytes) is truncated or not {path.suffix[1:]} data: {error}; fetch it again"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes (LeCun's MNIST format), ``dimensions`` of them: 3 for images, 1 for labels.

    Raises:
        InputError: another format, or another size than its header says.
    """
    content = read_bytes(path)
    magic = 0x0800 + dimensions
    header = 4 + 4 * dimensions
    found = int.from_bytes(content[:4], "big") if len(content) >= header else None
    if found != magic:
        got = "a file too short for its header" if found is None else f"{found:#010x}"
        raise InputError(f"{path} must start with {magic:#010x} (idx, unsigned bytes, {dimensions}-d), got {got}")
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise InputError(
            f"{path} must hold {expected:,} bytes for its header's shape {shape}, found {len(content):,}; it is "
            f"{'truncated' if len(content) < expected else 'too long'}, fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_cifar_binary(path: Path, coarse: bool = False) -> Arrays:
    """A binary CIFAR batch: images ``[N, 3, 32, 32]`` and labels; ``coarse``: records start with a coarse label too.

    Raises:
        InputError: not a whole number of records.
    """
    content = read_bytes(path)
    record = 3072 + (2 if coarse else 1)
    count, rest = divmod(len(content), record)
    if not count or rest:
        raise InputError(
            f"{path} must hold whole records of {record:,} bytes (official: 10,000 or 50,000 of them), found "
            f"{len(content):,} bytes = {count} records and {rest} bytes; it is truncated or of another format"
        )
    table = np.frombuffer(content, np.uint8).reshape(count, record)
    return table[:, -3072:].reshape(count, 3, 32, 32), table[:, record - 3073].astype(np.int64)


class _ArraysOnly(pickle.Unpickler):
    """CIFAR's python batches are pickles, which may run any code: this reader builds numpy arrays and nothing else."""

    _ALLOWED = frozenset(
        [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
        + [(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")]
        + [("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")]
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no CIFAR batch needs")
        return super().find_class(module, name)


def read_cifar_pickle(path: Path, key: str = "labels") -> Arrays:
    """A pickled CIFAR batch: images ``[N, 3, 32, 32]`` and its labels under ``key``.

    Raises:
        InputError: not such a pickle, or images and labels that do not match.
    """
    try:
        batch = _ArraysOnly(io.BytesIO(read_bytes(path)), encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError, ImportError) as error:
        raise InputError(f"{path} is truncated or not a pickled CIFAR batch: {error}") from None
    if isinstance(batch, Mapping):
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
    if not isinstance(batch, Mapping) or "data" not in batch or key not in batch:
        raise InputError(f"{path} must be a dictionary with 'data' and {key!r}")
    images, labels = np.asarray(batch["data"]), np.asarray(batch[key], dtype=np.int64)
    if images.dtype != np.uint8 or images.shape != (len(labels), 3072):
        raise InputError(
            f"{path} must hold uint8 images of shape ({len(labels)}, 3072) for its {len(labels)} labels, found "
            f"{images.dtype} {images.shape}"
        )
    return images.reshape(-1, 3, 32, 32), labels


def read_nmnist_events(content: bytes, name: str) -> np.ndarray:
    """Events ``[N, 4]`` (x, y, polarity, time in µs) of an N-MNIST recording: 5 bytes each (Orchard et al., 2015).

    Raises:
        InputError: empty, not a whole number of events, or an event outside the 34 × 34 sensor.
    """
    if not content or len(content) % 5:
        raise InputError(f"{name} must hold whole events of 5 bytes, found {len(content):,} bytes; it is truncated")
    raw = np.frombuffer(content, np.uint8).reshape(-1, 5).astype(np.int64)
    x, y, polarity = raw[:, 0], raw[:, 1], raw[:, 2] >> 7
    time = (raw[:, 2] & 127) << 16 | raw[:, 3] << 8 | raw[:, 4]
    if max(x.max(), y.max()) > 33:
        raise InputError(f"{name} has an event at ({x.max()}, {y.max()}), outside the 34 x 34 sensor: not N-MNIST")
    return np.stack((x, y, polarity, time), 1)


def events_to_frames(
    events: np.ndarray, timesteps: int, size: tuple[int, int], sensor: tuple[int, int] | None = None
) -> np.ndarray:
    """Events ``[N, 4]`` (x, y, polarity, time) counted in ``timesteps`` equal spans of time: uint8 ``[T, 2, H, W]``.

    Args:
        events: in any order of time and any unit of it.
        timesteps: number of bins from the first event to the last.
        size: height and width of the frames.
        sensor: height and width of the sensor, where they differ; coordinates are scaled down.

    Counts stop at 255.

    Example:
        >>> events_to_frames(np.array([[0, 1, 1, 5], [0, 1, 1, 6], [2, 0, 0, 9]]), 2, (2, 3))[:, 1, 1, 0]
        array([2, 0], dtype=uint8)
    """
    x, y, polarity, time = events.T.astype(np.int64)
    if sensor is not None:
        x, y = x * size[1] // sensor[1], y * size[0] // sensor[0]
    span = int(time.max() - time.min()) + 1
    step = (time - time.min()) * timesteps // span
    cell = ((step * 2 + polarity) * size[0] + y) * size[1] + x
    counts = np.bincount(cell, minlength=timesteps * 2 * size[0] * size[1])
    return np.minimum(counts, 255).astype(np.uint8).reshape(timesteps, 2, *size)


def _listed(text: str, name: str) -> list[tuple[str, int]]:
    """The (id, label) lines of a SLAYER list."""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = line.split()
        if len(parts) != 2 or not parts[1].isdigit():
            raise InputError(f"{name}, line {number}: must be an id and a label, got {line!r}")
        rows.append((parts[0], int(parts[1])))
    return rows


def recordings(folder: Path, train: bool) -> Iterator[tuple[str, int, bytes]]:
    """Name, label and content of every N-MNIST recording of one split.

    Knows the official layout, ``Train/<digit>/*.bin`` and ``Test/…``, and SLAYER's: ``<id>.bs2`` beside the lists
    ``train*.txt`` and ``test*.txt``, in a folder or in a ``.tar``, ``.tar.gz`` or ``.tar.xz``.

    Raises:
        InputError: neither is there, or a listed recording is missing.
    """
    split = "Train" if train else "Test"
    for root in (folder, folder / "N-MNIST"):
        official = sorted((root / split).glob("[0-9]/*.bin"))
        if official:
            for path in official:
                yield str(path), int(path.parent.name), path.read_bytes()
            return
    lists = sorted(folder.rglob(f"{split.lower()}*.txt"))
    if lists:
        for sample, label in _listed(lists[0].read_text(), str(lists[0])):
            path = lists[0].parent / f"{sample}.bs2"
            if not path.is_file():
                raise InputError(f"{path} is missing; {lists[0]} lists it")
            yield str(path), label, path.read_bytes()
        return
    archives = sorted(p for p in folder.glob("*.tar*") if p.is_file())
    if not archives:
        raise InputError(
            f"{folder} has no N-MNIST recordings: expected {split}/<digit>/*.bin, or {split.lower()}*.txt with .bs2 "
            "files, or a .tar.xz of those"
        )
    yield from _archived(archives[0], split.lower())


def _archived(path: Path, split: str) -> Iterator[tuple[str, int, bytes]]:
    unpacked = read_bytes(path)  # first, because tarfile takes a truncated stream for a short archive
    try:
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
            contents = {}
            for member in archive:
                if member.isfile() and member.name.endswith((".bs2", ".txt")):
                    file: Any = archive.extractfile(member)
                    contents[member.name.rsplit("/", 1)[-1]] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged: {error}") from None
    lists = sorted(name for name in contents if name.startswith(split) and name.endswith(".txt"))
    if not lists:
        raise InputError(f"{path} has no list {split}*.txt of ids and labels")
    for sample, label in _listed(contents[lists[0]].decode(), f"{path}: {lists[0]}"):
        name = f"{sample}.bs2"
        if name not in contents:
            raise InputError(f"{path} lacks {name}, which {lists[0]} lists")
        yield f"{path}: {name}", label, contents[name]
