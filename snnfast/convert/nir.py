"""Exchange with other simulators and with hardware through NIR, the Neuromorphic Intermediate Representation.

NIR (Pedersen et al., Nature Communications 2024) states neurons as differential equations and leaves open how they are
stepped. :func:`to_nir` and :func:`from_nir` take what it leaves open as arguments and write it into the graph's
metadata. ``docs/nir.md`` has the table of how Norse, snnTorch and SpikingJelly read such a graph.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._version import __version__
from ..functional import check_number
from ..network import copy_of
from ..surrogate import Sigmoid, SurrogateLike
from . import nir_export, nir_import
from .nir_conventions import COMPARISONS, IF_R, Conventions, load_nir

if TYPE_CHECKING:
    import nir  # type: ignore[import-untyped,import-not-found,unused-ignore]

    from .nir_import import NIRNetwork

__all__ = ["from_nir", "to_nir"]


def _check_dt(dt: float) -> float:
    value = check_number("dt", dt)
    if not 0.0 < value < math.inf:
        raise ValueError(f"dt must be a time step in seconds above 0, got {dt!r}")
    return value


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
    return value


def to_nir(
    model: nn.Module, sample: Tensor, dt: float = 1e-4, *, comparison: str = ">=", if_r: str = "1/dt"
) -> nir.NIRGraph:
    """Write a network as a NIR graph.

    Understood are ``Conv1d/2d``, ``Linear``, ``Flatten``, ``AvgPool2d`` (as a sum pool with ``divisor_override=1``),
    ``AdaptiveAvgPool2d`` where it divides evenly, batch norm (in eval, folded into the layer before it), dropout (left
    out), ``IFNode``, ``LIFNode``, ``ParametricLIFNode`` (its present time constant) and ``LI``; networks are
    ``Sequential`` or anything that ``torch.fx`` can trace, with additions for residual connections, and may fold time
    into the batch and back. The model is not changed and its neurons' state is not touched.

    Args:
        model: the network, single- or multi-step.
        sample: an input as the model takes it (``[T, B, *]``, ``[T * B, *]`` or ``[B, *]``); only shapes matter.
        dt: length of a time step in seconds; a LIF neuron gets ``tau * dt``. The peers assume 1e-4 (Norse: 1e-3).
        comparison: how the reader compares potential and threshold. ``'>='`` (snnfast, SpikingJelly) writes the
            threshold as it is; ``'>'`` (NIR's text, Norse, snnTorch) writes the next smaller number, for which ``v >``
            is true exactly where ``v >= v_threshold`` was.
        if_r: resistance of an IF neuron, ``'1/dt'`` (NIR's equation; SpikingJelly) or ``'1'`` (Norse, which adds the
            input as it is).

    Returns:
        A ``nir.NIRGraph``; save it with ``nir.write(path, graph)``. Its metadata has ``dt``, ``comparison``, ``if_r``.

    Raises:
        TypeError, ValueError: an argument of another kind, or something that NIR has no node for, soft reset and
            max-pooling among them; the message names the module and what would do.
        ImportError: the package nir is not installed.

    Example:
        >>> import snnfast
        >>> net = nn.Sequential(nn.Linear(3, 2), snnfast.LIFNode(tau=2.0, step_mode="m"))
        >>> graph = to_nir(net, torch.zeros(4, 1, 3), dt=1e-3)
        >>> list(graph.nodes), graph.nodes["1"].tau
        (['input', '0', '1', 'output'], array([0.002, 0.002]))
    """
    load_nir()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(sample, Tensor) or not sample.is_floating_point():
        got = str(sample.dtype).removeprefix("torch.") if isinstance(sample, Tensor) else type(sample).__name__
        raise TypeError(f"sample must be a floating-point tensor as the model takes it, got {got}")
    conventions = Conventions(
        _check_dt(dt), _check_choice("comparison", comparison, COMPARISONS), _check_choice("if_r", if_r, IF_R)
    )
    graph = nir_export.export(_unfused(model), sample, conventions)
    graph.metadata = {"producer": f"snnfast {__version__}", **conventions._asdict()}
    return graph


def _unfused(model: nn.Module) -> nn.Module:
    """The model, or a copy with its batch norms and neurons apart, where ``snnfast.fuse`` has made them run as one."""
    from ..fused import unfuse

    apart = copy_of(model)
    return apart if unfuse(apart) else model


def from_nir(
    graph: nir.NIRGraph | str | os.PathLike[str],
    dt: float | None = None,
    *,
    comparison: str | None = None,
    if_r: str | None = None,
    surrogate_function: SurrogateLike = Sigmoid(),  # noqa: B008 (stateless)
    dtype: torch.dtype = torch.float32,
) -> NIRNetwork:
    """Build a network from a NIR graph or file.

    Args:
        graph: the graph, or the path of a file written by ``nir.write``.
        dt: length of a time step in seconds; by default what the graph's metadata says.
        comparison: how the graph's thresholds are meant, ``'>='`` or ``'>'``; by default what its metadata says, else
            ``'>'`` as in NIR's text.
        if_r: the resistance at which an IF neuron adds its input as it is, ``'1/dt'`` or ``'1'``; by default what the
            metadata says, else ``'1/dt'`` as in NIR's equation.
        surrogate_function: derivative of the spikes, for training on.
        dtype: of weights, float32 or float64.

    Returns:
        A module from ``[T, B, *]`` to ``[T, B, *]`` with neurons in multi-step mode; reset it with
        :func:`snnfast.functional.reset_net`. Neurons start at ``v_reset``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a truncated or foreign file, an unknown node, a cycle, shapes that do not fit, parameters that no
            snnfast neuron has; the message names the node.
        ImportError: the package nir is not installed.

    Example:
        >>> import numpy as np, nir
        >>> lif = nir.LIF(*(np.full(2, v) for v in (2e-3, 1.0, 0.0, 1.0)))  # tau, r, v_leak, v_threshold
        >>> net = from_nir(nir.NIRGraph.from_list(nir.Linear(np.ones((2, 3), dtype="float32")), lif), dt=1e-3)
        >>> net(torch.ones(4, 1, 3)).shape
        torch.Size([4, 1, 2])
    """
    load_nir()
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype!r}")
    read = nir_import.read(graph)
    metadata = read.metadata if isinstance(read.metadata, dict) else {}
    if dt is None and "dt" not in metadata:
        raise ValueError(
            "dt must be given: NIR graphs have no time step, and this one's metadata does not say it either"
        )
    conventions = Conventions(
        _check_dt(dt if dt is not None else float(metadata["dt"])),
        _check_choice("comparison", comparison or metadata.get("comparison", ">"), COMPARISONS),
        _check_choice("if_r", if_r or metadata.get("if_r", "1/dt"), IF_R),
    )
    return nir_import.build(read, conventions, surrogate_function, dtype)
