"""Triton's backend without a GPU: its kernels in Triton's interpreter, and what it answers where it cannot serve."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from snnfast import backends
from snnfast.backends import triton as backend

ROOT = Path(__file__).parents[1]
here = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 serves the CPU")


def interpreter_takes_numpy() -> bool:
    """Triton 3.6 makes Python scalars of arrays with one element, which NumPy 2.4 refuses."""
    triton = pytest.importorskip("triton")
    its, numpys = ([int(n) for n in v.split(".")[:2]] for v in (triton.__version__, numpy.__version__))
    return its >= [3, 7] or numpys < [2, 4]


@here
@pytest.mark.parametrize("checks", ["triton_interpreter_checks.py", "triton_bn_interpreter_checks.py"])
def test_kernels_in_the_interpreter(checks: str) -> None:
    if not interpreter_takes_numpy():
        pytest.skip(f"this Triton's interpreter does not work with NumPy {numpy.__version__}")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{checks}"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout, result.stdout


@here
@interpreted
def test_says_why_it_does_not_serve() -> None:
    reason = backend.missing(torch.device("cpu"))
    assert reason is not None
    assert "GPUs" in reason
    assert "TRITON_INTERPRET" in reason
    with pytest.raises(RuntimeError, match="Triton has kernels for GPUs"):
        backends.choose("triton", torch.device("cpu"))
    assert "mps" in (backend.missing(torch.device("mps")) or "")
    if not torch.cuda.is_available():
        assert backend.missing(torch.device("cuda")) is not None
        assert "no GPU" in backend.served()


def test_package_works_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # an import of it raises ImportError
import torch, snnfast
from snnfast.backends import triton
assert "Triton is not here" in triton.missing(torch.device("cuda")), triton.missing(torch.device("cuda"))
assert triton.served() == "nothing"
assert snnfast.IFNode(step_mode="m")(torch.ones(2, 3)).sum() == 6
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
