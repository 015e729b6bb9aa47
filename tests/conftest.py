"""Fixtures and helpers shared by the tests."""

from __future__ import annotations

import os

import pytest
import torch

from snnfast import backends


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so that an element that nobody writes shows."""

    def poison(make):
        def poisoned(*args, **kwargs):
            t = make(*args, **kwargs)
            # Only real eager tensors: the compiler traces these functions too.
            if (
                type(t) is torch.Tensor
                and t.is_floating_point()
                and t.device.type != "meta"
                and t.layout is torch.strided
            ):
                with torch.no_grad():
                    t.fill_(float("nan"))
            return t

        return poisoned

    if os.environ.get("SNNFAST_POISON", "1") == "1":
        for name in ("empty", "empty_like", "empty_strided"):
            monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def kernel_backends() -> list:
    """Every (backend, device) that has kernels here; those that do not are skipped with the reason."""
    found = []
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for name, kernels in zip(("native", "triton"), backends.KERNELS, strict=True):
        for device in devices:
            reason = kernels.missing(torch.device(device))
            marks = [pytest.mark.skip(reason=f"{name} on {device}: {reason}")] if reason else []
            found.append(pytest.param(name, device, id=f"{name}-{device}", marks=marks))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device here")
        found += [pytest.param(name, "cuda", id=f"{name}-cuda", marks=skip) for name in ("native", "triton")]
    return found
