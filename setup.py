"""Builds snnfast._C: writes a build.ninja and runs ninja. Everything else is in pyproject.toml.

No torch is needed to build: csrc includes no torch header. What the build finds decides what it makes:

* a C++ compiler: the CPU kernels, once per instruction set; without one the install is Python (and Triton) only;
* nvcc: the CUDA kernels too, with the CUDA runtime linked statically.

Environment: ``CXX``, ``SNNFAST_CUDA=0`` (skip CUDA), ``SNNFAST_CUDA_ARCHS="80;90"``, ``SNNFAST_NVCC`` (path),
``NVCC_CCBIN`` (nvcc's host compiler), ``SNNFAST_SANITIZE=address,undefined`` (a build for ``make sanitize``).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc"
# Vector loops: without -fno-trapping-math gcc leaves SSE2 and AVX2 loops scalar. No contraction: the forward must have
# the plain loop's bits.
CPU_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-trapping-math -fno-math-errno -Wall -Wextra"
)
OPTIONAL_CPU_FLAGS = ("-fno-unswitch-loops", "-Wno-psabi", "-Wno-maybe-uninitialized", "-fopenmp")  # not clang's all
X86_SETS = {  # best first
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c",
    "avx2": "-mavx2 -mfma -mf16c",
    "baseline": "-O1",  # for processors from before 2013, which is no reason to compile for twice as long
}
CUDA_FLAGS = "-std=c++17 -O3 -fmad=false -Xfatbin=-compress-all -Xcompiler -fPIC,-fvisibility=hidden"


def say(message: str) -> None:
    print(f"snnfast: {message}", file=sys.stderr)


def run(*command: str) -> str | None:
    """A command's output, or None where it cannot run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None


def accepts(compiler: str, flags: str, scratch: Path) -> bool:
    """Whether the compiler takes these flags."""
    scratch.mkdir(parents=True, exist_ok=True)
    source = scratch / "probe.cpp"
    source.write_text("int main() {\n#pragma omp parallel\n  {}\n}\n")  # some know -fopenmp and have no library for it
    return run(compiler, *flags.split(), str(source), "-o", str(scratch / "probe")) is not None


def find_compiler() -> str | None:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and run(*name.split(), "--version") is not None:
            return name
    return None


def find_nvcc() -> str | None:
    """nvcc as a command; it may be a wrapper script, so nothing is derived from its path."""
    if os.environ.get("SNNFAST_CUDA", "1") == "0":
        return None
    candidates = [os.environ.get("SNNFAST_NVCC"), shutil.which("nvcc")]
    candidates += [str(Path(os.environ[v]) / "bin/nvcc") for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    candidates += ["/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and run(c, "--version")), None)


def host_compiler(nvcc: str, compiler: str, scratch: Path) -> list[str]:
    """nvcc's arguments that name a C++ compiler it takes: each release refuses those that are newer than it.

    Raises:
        RuntimeError: there is none.
    """
    source = scratch / "probe.cu"
    source.write_text("#include <vector>\n")
    asked = os.environ.get("NVCC_CCBIN")
    older = [name for version in range(15, 8, -1) if shutil.which(name := f"g++-{version}")]
    candidates = [asked] if asked else [compiler, "", *older]  # "" is nvcc's own choice
    said = ""
    for candidate in candidates:
        arguments = ["-ccbin", candidate] if candidate else []
        command = [nvcc, *arguments, "-std=c++17", "-c", str(source), "-o", str(scratch / "probe.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return arguments
        said = done.stdout + done.stderr
    raise RuntimeError(
        f"{said}\nsnnfast: {nvcc} takes none of these C++ compilers: {', '.join(filter(None, candidates))}. Name one "
        "that this release of CUDA supports in NVCC_CCBIN, or build without CUDA kernels: SNNFAST_CUDA=0"
    )


def cuda_archs(nvcc: str) -> list[str]:
    """Compute capabilities to compile for: those asked for, else sm_80, sm_90 and newer that this nvcc knows."""
    asked = os.environ.get("SNNFAST_CUDA_ARCHS")
    if asked:
        return [a.strip().replace(".", "") for a in re.split("[;, ]+", asked) if a.strip()]
    known = re.findall(r"sm_(\d+)\b", run(nvcc, "--list-gpu-code") or "")
    wanted = [a for a in ("80", "90") if a in known]
    return wanted or known[-1:]


class Ninja:
    """A build.ninja in the making."""

    def __init__(self) -> None:
        self.rules: list[str] = []
        self.edges: list[str] = []
        self.objects: list[str] = []

    def rule(self, name: str, command: str) -> None:
        self.rules.append(
            f"rule {name}\n  command = {command}\n  description = {name} $out\n  depfile = $out.d\n  deps = gcc\n"
        )

    def compile(self, rule: str, source: Path, output: str, flags: str = "") -> None:
        self.objects.append(output)
        self.edges.append(f"build {output}: {rule} {escape(source)}\n  flags = {flags}\n")


def escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quoted(*parts: object) -> str:
    return " ".join(f"'{p}'" if re.search(r"[ ();]", str(p)) else str(p) for p in parts)


class BuildKernels(build_ext):
    """Compiles csrc through ninja, or leaves a Python-only install where there is no compiler."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        scratch = Path(self.build_temp).resolve()
        compiler = find_compiler()
        if compiler is None:
            ext.optional = True  # nothing to copy, and not an error
            say("no C++ compiler found: installing without compiled kernels (Python and Triton only).")
            output.unlink(missing_ok=True)
            return
        scratch.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (scratch / "build.ninja").write_text(self.ninja_file(compiler, output, scratch))
        environment = {k: v for k, v in os.environ.items() if k != "NINJA_STATUS"}
        done = subprocess.run(["ninja", "-C", str(scratch)], env=environment)
        if done.returncode:
            raise RuntimeError("snnfast: the kernels did not compile; the compiler's message stands above")

    def ninja_file(self, compiler: str, output: Path, scratch: Path) -> str:
        import pybind11

        ninja = Ninja()
        x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
        sets = {s: f for s, f in X86_SETS.items() if x86 and accepts(compiler, f, scratch)} or {"baseline": ""}
        sanitize = os.environ.get("SNNFAST_SANITIZE", "")
        flags = CPU_FLAGS
        for optional in OPTIONAL_CPU_FLAGS:
            if accepts(compiler, f"-Werror {optional}", scratch):
                flags += f" {optional}"
        openmp = "-fopenmp" if "-fopenmp" in flags else ""
        if not openmp:
            say("the compiler has no OpenMP: the CPU kernels run on one thread.")
        if sanitize:
            flags = flags.replace("-O3", "-O1")  # checks in -O3 loops take minutes to compile
            flags += f" -fsanitize={sanitize} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
        table = "'-DSNNFAST_CPU_SETS(X)=" + " ".join(f"X({s})" for s in sets) + "'"
        ninja.rule("cxx", f"{compiler} {flags} {table} $flags -MMD -MF $out.d -c $in -o $out")
        for name, set_flags in sets.items():
            wide = (
                "-mprefer-vector-width=512"
                if name == "avx512" and accepts(compiler, "-mprefer-vector-width=512", scratch)
                else ""
            )
            ninja.compile("cxx", CSRC / "cpu.cpp", f"cpu_{name}.o", f"-DSNNFAST_CPU_SET={name} {set_flags} {wide}")
        includes = [sysconfig.get_paths()["include"], sysconfig.get_paths()["platinclude"], pybind11.get_include()]
        binding_flags = " ".join(quoted(f"-I{i}") for i in dict.fromkeys(includes))

        nvcc = find_nvcc()
        link = f"{compiler} -shared -fPIC $in -o $out {openmp}"
        if sanitize:
            link += f" -fsanitize={sanitize}"
        if sys.platform == "darwin":
            link += " -undefined dynamic_lookup"
        if nvcc:
            with_host = quoted(nvcc, *host_compiler(nvcc, compiler, scratch))
            self.add_cuda(ninja, with_host, cuda_archs(nvcc))
            binding_flags += " -DSNNFAST_CUDA"
            # nvcc links, so that it finds its own runtime.
            host_flags = f" -Xcompiler {openmp}" if openmp else ""
            link = f"{with_host} -shared -cudart static -Xcompiler -fPIC{host_flags} $in -o $out"
        ninja.compile("cxx", CSRC / "bindings.cpp", "bindings.o", binding_flags.replace("$", "$$"))
        edges = "\n".join(ninja.edges)
        final = f"build {escape(output)}: link {' '.join(ninja.objects)}\n"
        return (
            "ninja_required_version = 1.5\n"
            + "\n".join(ninja.rules)
            + f"\nrule link\n  command = {link}\n  description = link $out\n\n"
            + f"{edges}\n{final}\ndefault {escape(output)}\n"
        )

    def add_cuda(self, ninja: Ninja, nvcc: str, archs: list[str]) -> None:
        highest = max(archs, key=lambda a: int(re.sub(r"\D", "", a)))
        codes = [f"-gencode arch=compute_{a},code=sm_{a}" for a in archs]
        codes.append(f"-gencode arch=compute_{highest},code=compute_{highest}")
        names = " ".join(f"sm_{a}" for a in archs) + f" and PTX of {highest}"
        say(f"compiling CUDA kernels for {names}")
        macro = f"""'-DSNNFAST_CUDA_ARCH_LIST="{names}"'"""
        ninja.rule(
            "nvcc",
            f"{nvcc} {CUDA_FLAGS} {' '.join(codes)} {macro} $flags -MD -MF $out.d -c $in -o $out",
        )
        for part in (1, 2):  # forward and backward, so that two cores have work
            ninja.compile("nvcc", CSRC / "cuda.cu", f"cuda_{part}.o", f"-DSNNFAST_CUDA_PART={part}")


setup(ext_modules=[Extension("snnfast._C", sources=[])], cmdclass={"build_ext": BuildKernels})
