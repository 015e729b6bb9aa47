"""The Triton kernels as a GPU would get them: compiled and launched by Triton, their PTX run by tests/ptx."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_host import GXX, ROOT

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(GXX is None, reason="g++ is not on PATH, so the machine that runs PTX cannot be built"),
    pytest.mark.slow,
]


def test_compiled_kernels(tmp_path: Path) -> None:
    """What the kernels' Python source passes in Triton's interpreter, and no two threads of theirs race."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "TRITON_CACHE_DIR": str(tmp_path)}
    environment |= {"PTX_EVERY": "2"}
    checks = ["tests/triton_interpreter_checks.py", "-k"]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "triton_ptx", "-p", "no:cacheprovider", *chosen],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for chosen in ([*checks, "gradients"], [*checks, "not gradients"], ["tests/triton_bn_interpreter_checks.py"])
    ]
    for process in running:
        output = process.communicate()[0]
        assert process.returncode == 0, output
        assert " passed" in output
        assert "skipped" not in output, output
