"""Messages that are said once per process."""

from __future__ import annotations

import sys
import warnings

import torch

_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn with ``message`` unless it has been said already, at the user's line: past snnfast and torch."""
    if message in _said:
        return
    _said.add(message)
    level = 2
    if not torch.compiler.is_compiling():  # which cannot look at frames
        frame = sys._getframe(1)
        while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("snnfast", "torch"):
            frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
