"""Checkpoints that appear whole or not at all: one folder each, written aside, synced to disk, then renamed.

``step-00000042/`` holds ``model.safetensors`` (the bare network), ``extra.safetensors`` (adapters), ``state.pt``
(everything else; loads with ``weights_only=True``) and ``manifest.json``, which has the size and SHA-256 of each. The
one before is kept until the next but one is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import CheckpointError

__all__ = [
    "FORMAT",
    "VERSION",
    "Checkpoints",
    "random_state",
    "restore_random_state",
    "seed_everything",
    "write_atomically",
]

FORMAT, VERSION = "snnfast-train", 1
_FILES = ("model.safetensors", "extra.safetensors", "state.pt")


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by ``content``: a reader, and a crash at any moment, sees the old file or the new one.

    Raises:
        CheckpointError: it cannot be written; the old file is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write(temporary, content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CheckpointError(_cannot_write(path, len(content), error)) from None
    _sync_folder(path.parent)


def _cannot_write(path: Path, size: int, error: OSError) -> str:
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(path.parent).free
        return f"{path} ({size:,} bytes) cannot be written: {error.strerror or error}; {free:,} bytes are free there"
    return f"{path} ({size:,} bytes) cannot be written: {error.strerror or error}"


def seed_everything(seed: int) -> None:
    """Seed every global random generator whose state a checkpoint keeps."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> dict[str, Any]:
    """The state of every global random generator, as values that ``weights_only`` loading accepts."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    inner = numpy_state["state"]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": {
            "generator": str(numpy_state["bit_generator"]),
            "key": torch.from_numpy(inner["key"].astype(np.int64)),
            "pos": int(inner["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set every global random generator to a state of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    saved = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": saved["generator"],
            "state": {"key": saved["key"].numpy().astype(np.uint32), "pos": saved["pos"]},
            "has_gauss": saved["has_gauss"],
            "gauss": saved["gauss"],
        }
    )


def _tensors(state: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    # safetensors refuses tensors that share memory (tied weights): each gets its own.
    return save({k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.items()})


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        folder: made if need be; what an interrupted write left there is removed.
        say: takes messages for the user.
        readonly: touch nothing (other processes than the first).
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print, readonly: bool = False) -> None:
        try:
            import safetensors.torch  # noqa: F401
        except ImportError:
            raise CheckpointError("checkpoints need safetensors: pip install snnfast[train]") from None
        self.folder = folder
        self.say = say
        if readonly:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".tmp-*"):
                shutil.rmtree(left, ignore_errors=True)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be made: {error.strerror}") from None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        names = (p.name.removeprefix("step-") for p in self.folder.glob("step-*") if p.is_dir())
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.folder / f"step-{step:08d}"

    def save(
        self, step: int, model: Mapping[str, Tensor], extra: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint, then drop all but the newest two.

        Raises:
            CheckpointError: it cannot be written; those before are intact.
        """
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        contents = dict(zip(_FILES, (_tensors(model), _tensors(extra), buffer.getvalue()), strict=True))
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "files": {n: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()},
        }
        contents["manifest.json"] = json.dumps(manifest, indent=1).encode()
        target, temporary = self.path(step), self.folder / f".tmp-{os.getpid()}"
        try:
            temporary.mkdir()
            for name, content in contents.items():
                _write(temporary / name, content)
            _sync_folder(temporary)
            if target.exists():  # a damaged one, or the same again
                old = self.folder / f".tmp-old-{os.getpid()}"
                target.rename(old)
                shutil.rmtree(old, ignore_errors=True)
            temporary.rename(target)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            message = _cannot_write(target, sum(map(len, contents.values())), error)
            good = self.steps()
            kept = f"the checkpoint of step {good[-1]} is intact" if good else "there is none before it"
            raise CheckpointError(f"{message}; {kept}: make room, then go on with --resume") from None
        _sync_folder(self.folder)
        for old_step in self.steps()[:-2]:
            shutil.rmtree(self.path(old_step), ignore_errors=True)
        return target

    def load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """Network, extra tensors and state of one checkpoint.

        Raises:
            CheckpointError: truncated, altered, or of another program or version.
        """
        folder = self.path(step)
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
                raise CheckpointError(f"{folder} is not a checkpoint of {FORMAT}")
            if manifest["version"] != VERSION:
                raise CheckpointError(
                    f"{folder} has format version {manifest['version']}, this program reads {VERSION}: use the "
                    "snnfast that wrote it, or start anew in another --out"
                )
            contents = []
            for name in _FILES:
                content, expected = (folder / name).read_bytes(), manifest["files"][name]
                if len(content) != expected["size"]:
                    raise CheckpointError(
                        f"{folder / name} must have {expected['size']:,} bytes, found {len(content):,}: it is truncated"
                    )
                if hashlib.sha256(content).hexdigest() != expected["sha256"]:
                    raise CheckpointError(f"{folder / name} is damaged: its content does not match its checksum")
                contents.append(content)
        except OSError as error:
            raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / 'manifest.json'} is damaged: {error}") from None
        from safetensors.torch import load

        state = torch.load(io.BytesIO(contents[2]), map_location="cpu", weights_only=True)
        return load(contents[0]), load(contents[1]), state

    def latest(self) -> tuple[int, dict[str, Tensor], dict[str, Tensor], dict[str, Any]] | None:
        """The newest good checkpoint, ``None`` without any; a damaged one is said and passed over.

        Raises:
            CheckpointError: there are checkpoints, and none is good.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                return step, *self.load(step)
            except CheckpointError as error:
                problems.append(str(error))
                self.say(f"{error}; trying the one before")
        if problems:
            raise CheckpointError(f"no good checkpoint is left in {self.folder}: {problems[0]}; start in another --out")
        return None
