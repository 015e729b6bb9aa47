"""The backends, which of them serves a device, and why another does not.

A backend is a module with ``forward`` and ``backward`` of one signature (see :mod:`snnfast.backends.native`), a
``missing(device)`` that says why it cannot serve a device (``None`` if it can), and a ``served()`` for people.
``reference`` is the exception: it is the plain loop itself and has no kernels.
"""

from __future__ import annotations

import os

import torch

from .._notices import say_once
from . import native, triton

NATIVE, TRITON, REFERENCE = 0, 1, 2
KERNELS = (native, triton)
NAMES = ("auto", "native", "triton", "reference")
LEGACY_NAMES = ("torch", "cupy", "inductor")

_INDEX = {"native": NATIVE, "triton": TRITON, "reference": REFERENCE}
_chosen: dict[tuple[str, torch.device], int] = {}


def check_name(backend: str) -> str:
    """A backend's name as it is kept, with the names of older SpikingJelly code meaning ``auto``.

    Raises:
        ValueError: the name is none of the accepted ones.
    """
    if backend in LEGACY_NAMES:
        say_once(f"backend={backend!r} is a name of older code; snnfast chooses its fused kernels (backend='auto').")
        return "auto"
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))}, got {backend!r}")
    return backend


def choose(backend: str, device: torch.device) -> int:
    """The backend that serves ``device`` under the name ``backend``: ``NATIVE``, ``TRITON`` or ``REFERENCE``.

    ``auto`` takes the first of native, triton, reference that can; ``SNNFAST_BACKEND`` replaces ``auto``. Any other
    name means that backend and no other.

    Raises:
        ValueError: unknown name.
        RuntimeError: the named backend cannot serve the device; the message says why and what would do.
    """
    if not isinstance(backend, str):  # a list, say, is no key
        check_name(backend)
    key = (backend, device)
    if key not in _chosen:
        _chosen[key] = _choose(check_name(backend), device)
    return _chosen[key]


# What torch.compiler.assume_constant_result does, and nothing else; calling that imports the compiler, for a second.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose(backend: str, device: torch.device) -> int:
    source = "backend"
    if backend == "auto":
        backend, source = os.environ.get("SNNFAST_BACKEND", "auto") or "auto", "SNNFAST_BACKEND"
        if backend not in NAMES:
            raise ValueError(f"SNNFAST_BACKEND must be one of {', '.join(NAMES)}, got {backend!r}")
    if backend == "auto":
        if device.type == "meta":
            return NATIVE
        for index, kernels in enumerate(KERNELS):
            if kernels.missing(device) is None:
                return index
        if device.type in ("cpu", "cuda"):
            say_once(
                f"no fused kernels for {device.type}; the plain PyTorch loop runs instead, many times slower. "
                "`python -m snnfast` says why."
            )
        return REFERENCE
    index = _INDEX[backend]
    if index != REFERENCE and device.type != "meta":
        reason = KERNELS[index].missing(device)
        if reason is not None:
            remedy = "Use backend='auto'" if source == "backend" else f"Unset {source}"
            raise RuntimeError(
                f"{source}={backend!r} cannot serve a tensor on {device}: {reason}. {remedy}, or move the tensor; "
                "`python -m snnfast` lists what each backend serves."
            )
    return index


def forget_choices() -> None:
    """Ask the backends anew at the next call, after the environment changed."""
    _chosen.clear()
