"""Triton's kernels compiled for GPUs that are not here: what the PTX and the machine code of sm_80 and sm_90 hold.

The interpreter shows neither contraction, nor the inexact division, nor spills; these tests read them.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from snnfast.dynamics import DECAY_INPUT, NEURONS, Constants

triton = pytest.importorskip("triton", reason="triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from snnfast.backends import triton as backend  # noqa: E402
from snnfast.backends import triton_kernels as kernels  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 does not compile")
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def compile_kernel(direction, neuron, T, dtype, capability=90, surrogate=0):
    """A kernel as a training step launches it: no initial state, no potentials, gradients of spikes and final state."""
    constants = Constants(neuron.id, surrogate, DECAY_INPUT, 1.0, 0.0, 3.0, 4.0, 0.0)
    _, forward, backward, chunks = backend._plan(constants, T, dtype)
    function, arguments = (
        (kernels.forward_kernel, forward) if direction == "forward" else (kernels.backward_kernel, backward)
    )
    options = {name: value for name, value in arguments.items() if name in backend._OPTIONS}
    constexprs = {name: value for name, value in arguments.items() if name not in backend._OPTIONS}
    absent = {"v0_ptr", "v_seq_ptr", "grad_v_seq_ptr", "grad_v0_ptr"}
    absent |= set() if chunks else {"states_ptr"}
    absent |= set() if neuron.learnable else {"decay_ptr", "partial_ptr"}
    signature, fixed, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constexprs or name in absent:
            signature[name] = "constexpr"
            fixed[(index,)] = constexprs.get(name)
        elif name in ("x_ptr", "s_ptr", "grad_s_ptr", "grad_x_ptr"):
            signature[name] = f"*{TYPES[dtype]}"
        elif name == "partial_ptr":
            signature[name] = "*fp64"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32"
        else:
            signature[name] = "i32" if name in ("N", "chunks") else "fp32"
        if signature[name].startswith("*") or name == "N":
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled(kernel, tmp_path) -> tuple[int, int]:
    """Bytes of stack and of local memory of the compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this triton brings no cuobjdump")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    text = subprocess.run([str(tool), "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("T", [4, 100])
@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)
def test_forward_divides_exactly_and_contracts_nothing(neuron, T):
    ptx = compile_kernel("forward", neuron, T, torch.float32).asm["ptx"]
    assert not re.findall(r"\bdiv\.(?:full|approx)|\bfma\.|\.ftz", ptx)
    assert bool(re.search(r"\bdiv\.rn\.f32", ptx)) == (neuron.name == "LIF")


def test_the_check_for_division_can_fail():
    """The backward may divide inexactly and contract: the same search finds it there."""
    ptx = compile_kernel("backward", NEURONS[1], 4, torch.float32, surrogate=1).asm["ptx"]
    assert re.findall(r"\bdiv\.(?:full|approx|rn)|\bfma\.", ptx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accesses_are_sixteen_bytes_at_four_steps(dtype):
    for direction in ("forward", "backward"):
        ptx = compile_kernel(direction, NEURONS[1], 4, dtype).asm["ptx"]
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 4, direction
        assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) >= 4, direction


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("T", [4, 16, 32, 100])
def test_no_register_spills(T, capability, tmp_path):
    for neuron, dtype in ((NEURONS[1], torch.float32), (NEURONS[2], torch.bfloat16)):
        for direction in ("forward", "backward"):
            kernel = compile_kernel(direction, neuron, T, dtype, capability)
            assert spilled(kernel, tmp_path) == (0, 0), (direction, neuron.name, dtype)
