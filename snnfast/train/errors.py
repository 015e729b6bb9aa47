"""What stops a run, each with the exit code that the command returns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["CheckpointError", "InputError", "Interrupted", "NonFiniteError", "TrainError", "nearest"]


class TrainError(Exception):
    """A run cannot go on; its message says why and what would do."""

    exit_code = 1


class InputError(TrainError, ValueError):
    """Something that the user gave (an option, a file, a model) will not do."""

    exit_code = 2


class NonFiniteError(TrainError):
    """The loss or a weight became NaN or infinite."""

    exit_code = 3


class CheckpointError(TrainError):
    """A checkpoint cannot be written or read."""

    exit_code = 4


class Interrupted(TrainError):
    """Ctrl-C or a termination signal."""

    exit_code = 130


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """``"; did you mean 'a' or 'b'?"``, or an empty string where nothing is near.

    Example:
        >>> nearest("epoch", ["epochs", "seed"])
        "; did you mean 'epochs'?"
    """
    close = difflib.get_close_matches(name, list(known), count, 0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
