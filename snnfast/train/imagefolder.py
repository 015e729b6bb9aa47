"""Folders of images, ``train/<class>/*.jpg`` and ``test/`` or ``val/``: decoded with Pillow as they are needed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import InputError

__all__ = ["FolderStore", "load_imagefolder"]

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"))
_THREADS = 8  # Pillow decodes outside of the interpreter lock


class FolderStore:
    """Images read lazily by threads; :meth:`prefetch` starts the batch after the present one."""

    def __init__(self, paths: list[Path], labels: list[int], size: int, device: torch.device | str = "cpu") -> None:
        try:
            from PIL import Image
        except ImportError:
            raise InputError("--data imagefolder needs Pillow: pip install pillow") from None
        self._image: Any = Image
        self.paths = paths
        self.size = size
        self.device = torch.device(device)
        self.labels = torch.tensor(labels, dtype=torch.long, device=self.device)
        self._pool = ThreadPoolExecutor(_THREADS, "snnfast-images")
        self._coming: dict[int, Future[np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def _read(self, index: int) -> np.ndarray:
        path, side = self.paths[index], self.size
        try:
            with self._image.open(path) as image:
                image = image.convert("RGB")
                # The short side to 8/7 of the size and the middle of it, as ImageNet is usually evaluated.
                scale = side * 8 / 7 / min(image.size)
                wide, high = (max(side, round(s * scale)) for s in image.size)
                left, top = (wide - side) // 2, (high - side) // 2
                image = image.resize((wide, high), self._image.Resampling.BILINEAR)
                return np.asarray(image.crop((left, top, left + side, top + side)))
        except (OSError, ValueError, SyntaxError, self._image.DecompressionBombError) as error:  # Pillow's errors
            raise InputError(f"{path} ({path.stat().st_size:,} bytes) is not a readable image: {error}") from None

    def prefetch(self, indices: Tensor) -> None:
        self._coming = {i: self._coming.get(i) or self._pool.submit(self._read, i) for i in indices.tolist()}

    def gather(self, indices: Tensor) -> Tensor:
        wanted = indices.tolist()
        futures = [self._coming.get(i) or self._pool.submit(self._read, i) for i in wanted]
        images = np.stack([future.result() for future in futures])
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(self.device)


def load_imagefolder(folder: Path, device: torch.device | str, size: int) -> tuple[FolderStore, FolderStore, int]:
    """Training and test split of a folder of images, and the number of classes.

    Raises:
        InputError: a split or its classes are missing.
    """
    splits, classes = [], None
    for names in (("train",), ("test", "val")):
        root = next((folder / name for name in names if (folder / name).is_dir()), None)
        if root is None:
            raise InputError(f"{folder} has no folder {' or '.join(names)} of images, one folder for each class in it")
        found = sorted(p.name for p in root.iterdir() if p.is_dir())
        if not found:
            raise InputError(f"{root} has no folders: one for each class is needed, with its images in it")
        if classes is not None and found != classes:
            odd = sorted(set(found) ^ set(classes))
            raise InputError(f"{root} must have the classes of the training images; they differ in {', '.join(odd)}")
        classes = found
        rows = [
            (path, label)
            for label, name in enumerate(found)
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in _SUFFIXES
        ]
        if not rows:
            raise InputError(f"{root} holds no images ({', '.join(sorted(_SUFFIXES))})")
        splits.append(FolderStore([r[0] for r in rows], [r[1] for r in rows], size, device))
    assert classes is not None
    return splits[0], splits[1], len(classes)
