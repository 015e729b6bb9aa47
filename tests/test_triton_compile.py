"""The Triton kernels compiled for GPUs that need not be there: what the interpreter cannot show is read off the PTX,
the machine code and its register counts.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from snnfast import dynamics
from snnfast.backends import triton as backend
from snnfast.dynamics import DECAY_INPUT, DETACH_RESET, NEURONS, SOFT_RESET, Constants, Neuron
from snnfast.surrogate import SURROGATES

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)
if "nvidia" not in triton.backends.backends:
    pytest.skip("this Triton has no NVIDIA backend", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

SM80, SM90 = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
LONG = 34  # two chunks, and a rest

neurons = pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compile anew, and leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def constants(neuron: Neuron, flags: int = DECAY_INPUT, surrogate: int = 1, tau: float = 3.0) -> Constants:
    return Constants(neuron.id, surrogate, flags, 1.0, 0.0, tau, SURROGATES[surrogate]().alpha, 0.0)


def compile_kernel(
    name: str, c: Constants, T: int, dtype: torch.dtype, target: GPUTarget = SM90, aligned: bool = True
) -> Any:
    """What a launch with v0, all gradients but v_seq's, and N a multiple of 16 compiles."""
    kernel = getattr(backend.kernels, f"{name}_kernel")
    state = TYPES[dynamics.state_dtype(dtype)]
    _, forward, backward, chunks = backend._plan(c, T, dtype)
    constexprs = dict(forward if name == "forward" else backward)
    options = {key: constexprs.pop(key) for key in backend._OPTIONS}
    for unwanted, pointers in (
        (True, ("v_seq_ptr", "grad_v_seq_ptr")),
        (not chunks, ("states_ptr",)),
        (not NEURONS[c.neuron].learnable, ("decay_ptr", "partial_ptr")),
    ):
        if unwanted:
            constexprs |= {pointer: None for pointer in pointers if pointer in kernel.arg_names}

    def kind(arg: str) -> str:
        if arg in constexprs:
            return "constexpr"
        if arg in ("x_ptr", "s_ptr", "grad_s_ptr", "grad_x_ptr"):
            return f"*{TYPES[dtype]}"
        if arg.endswith("_ptr"):
            return "*fp64" if arg == "partial_ptr" else f"*{state}"
        if arg in ("N", "chunks"):
            return "i32"
        return "i64" if state == "fp64" else "fp32"  # float64 numbers come as their bits

    signature = {arg: kind(arg) for arg in kernel.arg_names}
    divisible = [i for i, (arg, type_) in enumerate(signature.items()) if type_[0] == "*" or (aligned and arg == "N")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(arg),): value for arg, value in constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    return triton.compile(source, target=target, options=options)


def tool(name: str, *options: str, compiled: Any, tmp_path: Path) -> str:
    """The output of one of the tools that come with Triton on a kernel's machine code."""
    if not (TOOLS / name).exists():
        pytest.skip(f"this Triton comes without {name}")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    return subprocess.run([TOOLS / name, *options, cubin], check=True, capture_output=True, text=True).stdout


def spilled_bytes(compiled: Any, tmp_path: Path) -> int:
    usage = tool("cuobjdump", "-res-usage", compiled=compiled, tmp_path=tmp_path)
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    print(f"{compiled.metadata.name}: {registers} registers, {stack + local} bytes of local memory")
    return stack + local


def accesses(ptx: str) -> dict[str, int]:
    """How often the PTX loads and stores, by bytes per thread."""
    found: dict[str, int] = {}
    for op, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", ptx):
        key = f"{op}{int(vector or 1) * int(bits) // 8}"
        found[key] = found.get(key, 0) + 1
    return found


@neurons
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [4, 16, 32, LONG])
def test_registers_do_not_spill(neuron: Neuron, T: int, dtype: torch.dtype, tmp_path: Path) -> None:
    for name in ("forward", "backward"):
        assert spilled_bytes(compile_kernel(name, constants(neuron), T, dtype), tmp_path) == 0


@neurons
def test_registers_do_not_spill_on_sm_80(neuron: Neuron, tmp_path: Path) -> None:
    for T, surrogate in ((4, 0), (16, 1)):
        compiled = compile_kernel("backward", constants(neuron, surrogate=surrogate), T, torch.float32, SM80)
        assert spilled_bytes(compiled, tmp_path) == 0


@neurons
@pytest.mark.parametrize("target", [SM80, SM90], ids=lambda t: f"sm_{t.arch}")
def test_forward_rounds_as_the_loop_does(neuron: Neuron, target: GPUTarget, tmp_path: Path) -> None:
    divides = neuron is dynamics.LIF
    for flags, (tau, T) in itertools.product((0, DECAY_INPUT | SOFT_RESET), ((2.0, 2), (3.0, 4), (3.0, LONG))):
        compiled = compile_kernel("forward", constants(neuron, flags, tau=tau), T, torch.float32, target)
        ptx = compiled.asm["ptx"]
        assert not re.findall(r"\bdiv\.(?:full|approx)|\bfma\.|\.ftz", ptx)
        assert not compiled.metadata.enable_fp_fusion  # so ptxas, too, contracts nothing
        assert ("div.rn.f32" in ptx) == (divides and tau == 3.0)
        if not (divides and tau == 3.0):  # a division itself is made of fused multiply-adds
            sass = tool("nvdisasm", compiled=compiled, tmp_path=tmp_path)
            assert "FADD" in sass
            assert "FFMA" not in sass


@neurons
def test_backward_recomputes_the_same_charges(neuron: Neuron) -> None:
    """Rect's derivative divides nothing and adds nothing, so what is left is the forward's arithmetic."""
    ptx = compile_kernel("backward", constants(neuron, DETACH_RESET | DECAY_INPUT, 7), LONG, torch.float32).asm["ptx"]
    assert not re.findall(r"\bdiv\.(?:full|approx)|\bfma\.rn\.f32", ptx)
    assert ("div.rn.f32" in ptx) == (neuron is dynamics.LIF)


def test_the_search_for_divisions_can_find_one() -> None:
    assert "div.full" in compile_kernel("backward", constants(dynamics.IF), 1, torch.float32).asm["ptx"]


@neurons
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [SM80, SM90], ids=lambda t: f"sm_{t.arch}")
def test_16_byte_accesses(neuron: Neuron, dtype: torch.dtype, target: GPUTarget) -> None:
    T = 4
    vectors = {torch.float32: 2, torch.bfloat16: 1}[dtype]  # of a thread's 8 neurons; the state's are 2 always
    scalar = {"ld4": 1} if neuron.learnable else {}  # the decay
    forward = compile_kernel("forward", constants(neuron), T, dtype, target)
    assert accesses(forward.asm["ptx"]) == {"ld16": T * vectors + 2, "st16": T * vectors + 2} | scalar
    backward = compile_kernel("backward", constants(neuron), T, dtype, target)
    scalar |= {"st8": 1} if neuron.learnable else {}  # its partial sum
    assert accesses(backward.asm["ptx"]) == {"ld16": 2 * T * vectors + 4, "st16": T * vectors + 2} | scalar


def test_odd_sizes_are_accessed_by_the_element() -> None:
    ptx = compile_kernel("forward", constants(dynamics.LIF), 4, torch.float32, aligned=False).asm["ptx"]
    assert accesses(ptx)["ld4"] >= 4 * 8


@neurons
def test_float64_numbers_arrive_exactly(neuron: Neuron) -> None:
    for name, surrogate in (("forward", 0), ("backward", 1), ("backward", 6)):
        ptx = compile_kernel(name, constants(neuron, surrogate=surrogate), 4, torch.float64).asm["ptx"]
        assert "cvt.f64.f32" not in ptx  # nothing passed through float32
        if name == "forward":
            assert ".f32" not in ptx
            assert "fma." not in ptx
            assert ("div.rn.f64" in ptx) == (neuron is dynamics.LIF)


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    assert "cvt.rn.bf16" in compile_kernel("backward", constants(dynamics.IF), 4, torch.bfloat16).asm["ptx"]


@neurons
def test_all_surrogates_compile(neuron: Neuron) -> None:
    for surrogate in range(len(SURROGATES)):
        flags = (0, DECAY_INPUT, SOFT_RESET, DETACH_RESET)[surrogate % 4]
        compile_kernel("backward", constants(neuron, flags, surrogate), 2, torch.float16)


@neurons
def test_compiles_for_rocm(neuron: Neuron) -> None:
    if "amd" not in triton.backends.backends:
        pytest.skip("this Triton has no AMD backend")
    target = GPUTarget("hip", "gfx942", 64)
    code = compile_kernel("forward", constants(neuron, tau=2.0), 4, torch.float32, target).asm["amdgcn"]
    assert "v_add_f32" in code or "v_pk_add_f32" in code
    assert not re.search(r"v_(pk_)?(fma|fmac|mac|mad)\w*_f32", code)
    compile_kernel("backward", constants(neuron), LONG, torch.bfloat16, target)
