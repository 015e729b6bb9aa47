"""What stops a run, each with the exit code that the command returns."""

from __future__ import annotations

from .._arguments import nearest

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
