"""cuda.cu compiled for the CPU by tests/cuda_host_shim: the library, and calls of it on guarded memory."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "tests" / "cuda_host_shim"
GXX, NVCC = shutil.which("g++"), shutil.which("nvcc")
PARTS = {"forward": 1, "backward": 2}  # of cuda.cu
GUARD = 24  # elements of NaN around every tensor, which must survive

INTEGERS = ["T", "N", "neuron", "surrogate", "flags", "dtype", "division", "own_each"]
REALS = ["threshold", "v_reset", "tau", "alpha", "gain", "v_leak", "v_init"]
OWN = ["threshold_each", "beta", "current_decay"]
POINTERS = ["x", "v0", "i0", "decay", *OWN, "s", "v", "i", "v_seq", "grad_s", "grad_v", "grad_i", "grad_v_seq"]
POINTERS += ["grad_x", "grad_v0", "grad_i0", *(f"grad_{name}" for name in OWN), "grad_decay_partial", "workspace"]


class FlatCall(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in INTEGERS]
        + [(name, ctypes.c_double) for name in REALS]
        + [(name, ctypes.c_void_p) for name in POINTERS]
    )


def build(folder, *flags):
    """Compile cuda.cu and the shim's driver, side by side, into a shared library."""
    common = [GXX, "-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-psabi", *flags]
    common += [f"-I{SHIM}", f"-I{ROOT / 'csrc'}", '-DSNNFAST_CUDA_ARCH_LIST="host"', "-x", "c++", "-c"]
    jobs = [
        (folder / f"{name}.o", [*common, *define, str(source), "-o", str(folder / f"{name}.o")])
        for name, define, source in [
            ("forward", ["-DSNNFAST_CUDA_PART=1"], ROOT / "csrc" / "cuda.cu"),
            ("backward", ["-DSNNFAST_CUDA_PART=2"], ROOT / "csrc" / "cuda.cu"),
            ("driver", [], SHIM / "driver.cpp"),
            ("calls", [], SHIM / "calls.cpp"),
            ("bn_driver", [], SHIM / "bn_driver.cpp"),
        ]
    ]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _, command in jobs]
    for process in processes:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    library = folder / "libcuda_host.so"
    # Bound to its own runtime, also where torch has brought CUDA's into the process.
    link = [GXX, "-shared", "-Wl,-Bsymbolic", *flags]
    subprocess.run([*link, *(str(path) for path, _ in jobs), "-o", str(library)], check=True)
    return library


def compile_for_gpu(folders):
    """cuda.cu by nvcc, a folder for each part, with what it kept there and what ptxas said."""
    running = {}
    for name, part in PARTS.items():
        folder = folders[name]
        flags = ["-std=c++17", "-O3", "-fmad=false", "-gencode", "arch=compute_90,code=sm_90", "-Xptxas", "-v"]
        flags += ["-Xcompiler", "-fPIC", "--keep", "--keep-dir", str(folder), f"-DSNNFAST_CUDA_PART={part}"]
        flags += [
            '-DSNNFAST_CUDA_ARCH_LIST="sm_90"',
            "-c",
            str(ROOT / "csrc" / "cuda.cu"),
            "-o",
            str(folder / "cuda.o"),
        ]
        running[name] = subprocess.Popen([NVCC, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    results = {}
    for name, process in running.items():
        log = process.communicate()[0]
        assert process.returncode == 0, log
        results[name] = (folders[name], log)
    return results


def open_library(path):
    library = ctypes.CDLL(str(path))
    for name in ("shim_forward", "shim_backward", "shim_probe", "shim_batch_norm"):
        getattr(library, name).restype = ctypes.c_char_p
    for name in ("shim_workspace", "shim_partials", "shim_batch_norm_workspace"):
        getattr(library, name).restype = ctypes.c_int64
    library.shim_first_block.argtypes = [ctypes.c_int64]
    return library


class Guarded:
    """A tensor of NaN with room around it that must stay NaN; `shift` elements off a 16-byte boundary."""

    def __init__(self, *shape, dtype, shift=0):
        size = math.prod(shape)
        self.memory = torch.full((size + 2 * GUARD + shift,), math.nan, dtype=dtype)
        self.start, self.end = GUARD + shift, GUARD + shift + size
        self.tensor = self.memory[self.start : self.end].view(shape)

    def check(self, name, written=True):
        outside = torch.cat([self.memory[: self.start], self.memory[self.end :]])
        assert outside.isnan().all(), f"{name} was written outside its bounds"
        if written:
            assert not self.tensor.isnan().any(), f"{name} has elements that were not written"


def guarded_copy(tensor, shift=0):
    guarded = Guarded(*tensor.shape, dtype=tensor.dtype, shift=shift)
    guarded.tensor.copy_(tensor)
    return guarded


def point(call, **tensors):
    """Set the call's pointers."""
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(call, name, (tensor.tensor if isinstance(tensor, Guarded) else tensor).data_ptr())
    return call
