"""Where the tests find the official files of data sets, if they are there."""

from __future__ import annotations

from pathlib import Path

import pytest

REAL = Path(__file__).parents[2] / "shared" / "data"


def real(name: str) -> Path:
    folder = REAL / name
    if not folder.is_dir():
        pytest.skip(f"the official {name} files are not beside this checkout (../shared/data)")
    return folder
