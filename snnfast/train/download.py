"""Fetching public data sets, with checksums, when the user asks for it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from .errors import InputError

__all__ = ["SOURCES", "fetch"]

# name -> (base address, {file: md5}, whether the files are archives to unpack)
SOURCES: dict[str, tuple[str, dict[str, str], bool]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        False,
    ),
    "cifar10": (
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        True,
    ),
    "cifar100": (
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
        True,
    ),
}


def fetch(name: str, folder: Path) -> None:
    """Download data set ``name`` into ``folder``; what is there already with the right checksum is kept.

    Raises:
        InputError: no known source, no pooch, no network, or a file that does not match its checksum.
    """
    if name not in SOURCES:
        raise InputError(f"--download knows {', '.join(SOURCES)}, not {name}: put its files in a folder (--data-dir)")
    try:
        pooch: Any = importlib.import_module("pooch")
    except ImportError:
        raise InputError("--download needs pooch: pip install snnfast[train]") from None
    base, files, packed = SOURCES[name]
    for file, md5 in files.items():
        processor = pooch.Untar(extract_dir=".") if packed else None
        try:
            pooch.retrieve(base + file, f"md5:{md5}", file, folder, processor=processor, progressbar=False)
        except ValueError as error:  # the checksum
            raise InputError(f"{base}{file} came, but is not the file expected: {error}") from None
        except OSError as error:  # requests' exceptions are OSErrors
            raise InputError(
                f"{base}{file} could not be fetched ({type(error).__name__}). Without a network, put the files "
                f"({', '.join(files)}) into {folder} by hand and leave --download out"
            ) from None
