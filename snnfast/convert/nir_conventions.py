"""What NIR leaves open, and how it is settled."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import numpy as np
import torch

COMPARISONS, IF_R = (">=", ">"), ("1/dt", "1")


class Conventions(NamedTuple):
    """The choices that stand in a graph's metadata; see :func:`snnfast.to_nir`."""

    dt: float
    comparison: str
    if_r: str


def load_nir() -> Any:
    """The package nir.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("nir")
    except ImportError as error:
        raise ImportError(f"exchange through NIR needs the package nir: pip install snnfast[nir] ({error})") from error


def _next(value: float, towards: float, dtype: torch.dtype) -> float:
    kind: Any = np.float64 if dtype == torch.float64 else np.float32
    return float(np.nextafter(kind(value), kind(towards)))


def threshold_to_write(v_threshold: float, comparison: str, dtype: torch.dtype) -> float:
    """snnfast's ``v >= v_threshold`` as the graph's threshold: ``v > a`` is ``v >= b`` for the next number ``b``."""
    return v_threshold if comparison == ">=" else _next(v_threshold, -math.inf, dtype)


def threshold_to_read(v_threshold: float, comparison: str, dtype: torch.dtype) -> float:
    """The graph's threshold as snnfast's."""
    return v_threshold if comparison == ">=" else _next(v_threshold, math.inf, dtype)
