"""A pytest plugin that makes Triton launch on CPU tensors: its own compiler and launches, and for the GPU tests/ptx.

``test_triton_ptx.py`` runs the interpreter's checks with it, in a process of their own.
"""

from __future__ import annotations

import ctypes
import os
import struct
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ptx_machine

from snnfast.backends import triton as backend

machine: Any = None


def word_of(kind: str, value: Any) -> int:
    """A kernel's argument as 8 bytes."""
    if kind.startswith("*"):
        return value.data_ptr()
    if kind == "fp32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    assert kind in ("i32", "i64"), kind
    return value % 2**64


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.kinds = list(source.signature.values())
        self.metadata = metadata

    def __call__(
        self, x: int, y: int, z: int, stream: Any, program: Any, packed: Any, launch: Any, enter: Any, leave: Any,
        *args: Any,
    ) -> None:  # fmt: skip
        words = [word_of(k, a) for k, a in zip(self.kinds, args, strict=True) if k != "constexpr"]
        error = machine.ptx_launch(
            program, self.metadata.name.encode(), (ctypes.c_uint32 * 3)(x, y, z), 32 * self.metadata.num_warps,
            self.metadata.shared, (ctypes.c_uint64 * len(words))(*words), len(words),
        )  # fmt: skip
        assert error == b"", error.decode()


def load(name: str, ptx: bytes, shared: int, device: int) -> tuple[Any, int, int, int, int]:
    program = machine.ptx_load(ptx)
    assert program >= 0, name
    return program, program, 0, 0, 1024


class Driver:
    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=load,
        unload_module=lambda program: None,
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Compiling takes minutes, so a run may take every so many of the checks."""
    items[:] = items[:: int(os.environ.get("PTX_EVERY", "1"))]


def pytest_configure() -> None:
    """As a plugin, not when the module is imported for its docstrings."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend

    global machine
    with tempfile.TemporaryDirectory() as folder:
        machine = ptx_machine.open_machine(ptx_machine.build(Path(folder)))
    # The PTX stands where the machine code would, which no one needs here.
    CUDABackend.make_cubin = lambda self, source, *rest: source.encode()
    triton.runtime.driver.set_active(Driver())
    backend.missing = lambda device: None
