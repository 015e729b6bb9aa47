"""Layers run together with the neuron behind them.

:class:`BatchNormNode` is a batch norm and a neuron as one module; :func:`fuse` finds such pairs in a network and makes
them run as one in place, :func:`unfuse` undoes it.
"""

from .batch_norm import BatchNormNode
from .fuse import FuseReport, fuse, unfuse

__all__ = ["BatchNormNode", "FuseReport", "fuse", "unfuse"]
