"""The build route: what setup.py finds, what it writes for ninja, and an install without any compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import snnfast

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source checkout")


def build(target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py build_ext into ``target``, in an environment of its own."""
    pytest.importorskip("setuptools", reason="setuptools is not installed here")
    pytest.importorskip("pybind11", reason="pybind11 is not installed here")
    command = [sys.executable, str(ROOT / "setup.py"), "build_ext", "--build-lib", str(target / "lib")]
    command += ["--build-temp", str(target / "temp")]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def fake_tool(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_without_a_compiler_the_install_is_python_only_and_says_so(tmp_path):
    done = build(tmp_path, PATH=str(tmp_path), CXX="no-such-compiler", SNNFAST_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found" in done.stderr
    assert not list((tmp_path / "lib").rglob("_C*"))


def test_ninja_file_with_a_wrapped_nvcc(tmp_path):
    """nvcc may be a wrapper script in a folder of its own; ninja only records what it was called with."""
    nvcc = fake_tool(tmp_path, "nvcc", 'case "$1" in --list-gpu-code) echo sm_80 sm_90 sm_100;; *) echo nvcc;; esac')
    fake_tool(tmp_path, "ninja", "exit 0")
    done = build(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", SNNFAST_NVCC=str(nvcc))
    assert done.returncode == 0, done.stderr
    text = next((tmp_path / "temp").rglob("build.ninja")).read_text()
    assert f"{nvcc} -ccbin" in text
    assert "code=sm_80" in text
    assert "arch=compute_90,code=compute_90" in text
    assert "-cudart static" in text
    assert "-DSNNFAST_CUDA" in text
    assert "torch" not in text.replace(str(ROOT), "").replace(sys.prefix, "").replace(str(tmp_path), "")
    chosen = build(
        tmp_path / "2", PATH=f"{tmp_path}:{os.environ['PATH']}", SNNFAST_CUDA_ARCHS="8.6;90", SNNFAST_NVCC=str(nvcc)
    )
    assert chosen.returncode == 0
    text = next((tmp_path / "2" / "temp").rglob("build.ninja")).read_text()
    assert set(re.findall(r"code=sm_(\d+)", text)) == {"86", "90"}


def test_nvcc_gets_a_compiler_that_it_takes(tmp_path):
    """Each release of CUDA refuses compilers that are newer than it; an older one may stand beside the default."""
    fake_tool(tmp_path, "ninja", "exit 0")
    fake_tool(tmp_path, "g++-12", "exit 0")
    refusing = 'case "$*" in *list-gpu*|*version*|*"-ccbin g++-12"*) echo sm_90;; *) echo gcc is too new; exit 1;; esac'
    nvcc = fake_tool(tmp_path, "nvcc", refusing)
    here = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SNNFAST_NVCC": str(nvcc)}
    assert build(tmp_path, **here).returncode == 0
    text = next((tmp_path / "temp").rglob("build.ninja")).read_text()
    assert text.count(f"{nvcc} -ccbin g++-12 ") == 2  # compiles and links
    refused = build(tmp_path / "2", **here, NVCC_CCBIN="g++-99")
    assert refused.returncode != 0
    assert "gcc is too new" in refused.stderr
    assert "takes none of these C++ compilers: g++-99. Name one" in refused.stderr


def test_cuda_can_be_left_out(tmp_path):
    fake_tool(tmp_path, "ninja", "exit 0")
    fake_tool(tmp_path, "nvcc", "echo nvcc")
    done = build(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", SNNFAST_CUDA="0")
    assert done.returncode == 0, done.stderr
    text = next((tmp_path / "temp").rglob("build.ninja")).read_text()
    assert "cuda.cu" not in text
    assert "cpu_baseline.o" in text


def test_the_source_distribution_has_all_that_the_build_reads(tmp_path):
    pytest.importorskip("setuptools", "77", reason="setuptools 77 is not installed here")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "snnfast"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist"], cwd=tmp_path, check=True, timeout=300)
    (path,) = (tmp_path / "dist").iterdir()
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [p.relative_to(tmp_path).as_posix() for k in ("csrc/*", "snnfast/**/*.py") for p in tmp_path.glob(k)]
    assert len(wanted) > 100
    assert set(wanted) - found == set()


def test_python_m_snnfast_tells_versions_backends_and_reasons():
    out = subprocess.run([sys.executable, "-m", "snnfast", "--json"], capture_output=True, text=True, check=True)
    report = json.loads(out.stdout)
    assert report["versions"]["snnfast"] == snnfast.__version__
    assert set(report["backends"]) == {"native", "triton", "reference"}
    assert report["auto"]["cpu"] in ("native", "reference")
    assert report["missing"]["cpu"]["triton"]
    text = subprocess.run([sys.executable, "-m", "snnfast"], capture_output=True, text=True, check=True).stdout
    assert "backend='auto' takes" in text
    assert report["missing"]["cpu"]["triton"] in text
    native = snnfast.functional.backends.native
    assert report["missing"]["cpu"]["native"] or native.has_cuda_kernels() or "without CUDA kernels" in text


@pytest.mark.parametrize(("value", "reason"), [("triton", "Unset SNNFAST_BACKEND"), ("fast", "must be one of auto")])
def test_python_m_snnfast_tells_of_a_backend_that_the_environment_asks_for_in_vain(value, reason):
    command = [sys.executable, "-m", "snnfast"]
    done = subprocess.run(command, env=os.environ | {"SNNFAST_BACKEND": value}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "takes nothing: SNNFAST_BACKEND" in done.stdout
    assert reason in done.stdout


def test_the_environment_replaces_auto():
    code = "import snnfast, torch; print(snnfast.functional.backends.choose('auto', torch.device('cpu')))"

    def run(value: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"SNNFAST_BACKEND": value}, capture_output=True, text=True
        )

    assert run("reference").stdout.strip() == "2"
    assert "cannot serve" in run("triton").stderr
    assert "SNNFAST_BACKEND must be one of" in run("fast").stderr


def test_the_compiled_extension_stays_small_and_free_of_torch():
    _C = pytest.importorskip("snnfast._C", reason="the compiled extension is not built here")
    path = Path(_C.__file__)
    assert path.stat().st_size <= 20 * 2**20
    content = path.read_bytes()
    assert b"libtorch" not in content
    assert b"libcudart.so" not in content


def test_importing_and_running_imports_neither_the_compiler_nor_triton():
    """Which take a second and a quarter of one."""
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport snnfast\n"
        "snnfast.LIFNode(step_mode='m')(torch.rand(4, 8))\n"
        "print([m for m in ('torch._dynamo', 'triton') if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
