"""Messages that are said once per process."""

from __future__ import annotations

import warnings

_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn with ``message`` unless it has been said already."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, UserWarning, stacklevel=3)
