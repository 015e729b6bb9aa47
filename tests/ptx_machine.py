"""The PTX that nvcc and Triton made of the GPU kernels, run on the CPU by tests/ptx, and what a run counted."""

import ctypes
import subprocess

from cuda_host import GXX, ROOT, SHIM, open_library

FOLDER = ROOT / "tests" / "ptx"


class Counts(ctypes.Structure):
    """Of launches, all threads together; sectors are the 32 bytes that a GPU's memory moves at once."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("instructions", "slots"),  # by thread, and by warp
            *("loads", "stores", "load_sectors", "store_sectors", "bytes_loaded", "bytes_stored"),
            *("distinct_loaded", "distinct_stored"),  # each byte once a launch
            "launches",
        )
    ]


def build(folder, *objects):
    """The machine as a shared library, with the objects that nvcc made, which launch their kernels on it."""
    library = folder / "libptx.so"
    command = [GXX, "-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    command += ["-shared", "-Wl,-Bsymbolic"]  # bound to this runtime, also where torch has brought CUDA's
    sources = [FOLDER / "runtime.cpp", *([SHIM / "calls.cpp", SHIM / "bn_driver.cpp"] if objects else [])]
    subprocess.run([*command, *map(str, (*sources, *objects)), "-o", str(library)], check=True)
    return library


def open_machine(path):
    library = ctypes.CDLL(str(path))
    library.ptx_launch.restype = library.ptx_profile.restype = ctypes.c_char_p
    return library


def open_compiled(compiled, folder):
    """nvcc's kernels behind the calls of :mod:`cuda_host`."""
    folders = [kept for kept, _ in compiled.values()]
    path = build(folder, *(kept / "cuda.o" for kept in folders))
    library, machine = open_library(path), open_machine(path)
    for kept in folders:
        assert machine.ptx_load((kept / "cuda.ptx").read_bytes()) >= 0
    library.profile = lambda: machine.ptx_profile().decode()
    library.counts = lambda: take_counts(machine)
    return library


def take_counts(machine):
    """Of the launches since the last call of this."""
    counts = Counts()
    machine.ptx_take_counts(ctypes.byref(counts))
    return counts
