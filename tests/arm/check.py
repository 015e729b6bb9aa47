"""The CPU kernels on ARM, without one: compiled for it by ziglang, run in an emulator, compared with this machine's.

``make arm`` installs both and runs this. Spikes and states must have the same bits, gradients agree to rounding.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = [
    *(
        "-std=c++17",
        "-O2",
        "-ffp-contract=off",
        "-fno-trapping-math",
        "-fno-math-errno",
        "-w",
        "-Wno-psabi",
        f"-I{CSRC}",
    ),
    *("-DSNNFAST_CPU_SET=baseline", "-DSNNFAST_CPU_SETS(X)=X(baseline)"),
]
ZIG = [sys.executable, "-m", "ziglang", "c++"]
# Of a gradient, relative to it and a hundredth of the largest; float32, float64, bfloat16, float16.
TOLERANCE = (1e-4, 1e-9, 2e-2, 5e-3)


def compiled(compiler: list[str], to: Path, *flags: str) -> Path:
    sources = [str(CSRC / "cpu.cpp"), str(HERE / "driver.cpp")]
    subprocess.run([*compiler, *FLAGS, *flags, *sources, "-o", str(to)], check=True)
    return to


def emulated(program: Path) -> None:
    """Run a static ARM program for Linux, whose root is its folder."""
    from qiling import Qiling
    from qiling.const import QL_VERBOSE

    root = str(program.parent)
    Qiling([str(program), "/text", "/binary"], root, verbose=QL_VERBOSE.OFF).run()


def numbers(memory: bytes, dtype: int) -> Any:
    if dtype == 2:
        return (np.frombuffer(memory, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(memory, (np.float32, np.float64, None, np.float16)[dtype]).astype(np.float64)


def compare(ours: Path, theirs: Path) -> str:
    """What agrees, in words; SystemExit where something does not."""
    lines = [(folder / "text").read_text().splitlines() for folder in (ours, theirs)]
    memory = [(folder / "binary").read_bytes() for folder in (ours, theirs)]
    at, equal, close, wrong = 0, 0, 0, []
    if len(lines[0]) != len(lines[1]):
        raise SystemExit(f"{len(lines[0])} results here and {len(lines[1])} there")
    for here, there in zip(*lines, strict=True):
        kind, *_, dtype, n = here.split()
        if here != there:
            wrong.append(f"{here} here, {there} there")
        if kind != "values":
            equal += 1
            continue
        bytes_ = int(n) * (4, 8, 2, 2)[int(dtype)]
        a, b = (numbers(m[at : at + bytes_], int(dtype)) for m in memory)
        at, close = at + bytes_, close + 1
        off = np.abs(a - b).max() if len(a) else 0.0
        far = np.abs(a - b) > TOLERANCE[int(dtype)] * (np.abs(a) + 0.01 * np.abs(a).max())
        if far.any() or not np.isfinite(off):
            wrong.append(f"{here}: {far.sum()} of them differ, by {off} at most")
    if wrong:
        raise SystemExit("\n".join([*wrong[:20], f"{len(wrong)} results differ"]))
    return f"{equal} results equal to the bit, {close} arrays of gradients and sums equal to rounding"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        here, there = Path(folder) / "here", Path(folder) / "there"
        here.mkdir(), there.mkdir()
        native = compiled([shutil.which("g++") or "c++"], here / "driver")
        arm = compiled(ZIG, there / "driver", "-target", "aarch64-linux-musl", "-static")
        subprocess.run([str(native), str(here / "text"), str(here / "binary")], check=True)
        emulated(arm)
        print("ARM (aarch64, Linux):", compare(here, there))
        macos = [*ZIG, *FLAGS, "-O0", "-target", "aarch64-macos", "-c", str(CSRC / "cpu.cpp"), "-o", f"{there}/cpu.o"]
        subprocess.run(macos, check=True)
        print("ARM (aarch64, macOS): compiles")


if __name__ == "__main__":
    main()
