"""The Triton kernels compiled for GPUs that need not be there: what the interpreter cannot show is read off the PTX,
the machine code and its register counts.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from snnfast import dynamics
from snnfast.backends import triton as backend
from snnfast.dynamics import (
    CLIPPED,
    DECAY_INPUT,
    DETACH_RESET,
    MULTI_SPIKE,
    NEURONS,
    NO_RESET,
    SOFT_RESET,
    STRICT,
    Constants,
    Neuron,
)
from snnfast.surrogate import SURROGATES

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)
if backend._why_missing() is not None:
    pytest.skip("this Triton is older than the kernels need", allow_module_level=True)
if "nvidia" not in triton.backends.backends:
    pytest.skip("this Triton has no NVIDIA backend", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

SM80, SM90 = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
LONG = 34  # two chunks, and a rest

EACH = 0b011  # of the own parameters, threshold and beta have one value for each neuron

neurons = pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)


def flags_of(neuron: Neuron) -> list[int]:
    """Two for each neuron, which together take every branch of its forward."""
    if neuron is dynamics.EXPONENTIAL_LIF:
        return [MULTI_SPIKE | CLIPPED, DECAY_INPUT | SOFT_RESET]
    if neuron.id >= dynamics.LEAKY.id:
        return [STRICT, STRICT | SOFT_RESET]
    return [STRICT, DECAY_INPUT | SOFT_RESET]


def divides(c: Constants) -> bool:
    """Whether the forward has a division that a multiplication cannot replace."""
    return (c.neuron == dynamics.LIF.id and c.tau == 3.0) or bool(c.flags & MULTI_SPIKE)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compile anew, and leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def constants(neuron: Neuron, flags: int = DECAY_INPUT, surrogate: int = 1, tau: float = 3.0) -> Constants:
    return Constants(neuron.id, surrogate, flags, 1.0, 0.0, tau, SURROGATES[surrogate]().alpha, 1.5, 0.25, 0.0)


def compile_kernel(
    name: str, c: Constants, T: int, dtype: torch.dtype, target: GPUTarget = SM90, aligned: bool = True
) -> Any:
    """What a launch with initial states, all gradients but v_seq's, and N a multiple of 16 compiles."""
    kernel = getattr(backend.kernels(), f"{name}_kernel")
    state = TYPES[dynamics.state_dtype(dtype)]
    neuron = NEURONS[c.neuron]
    _, forward, backward, chunks = backend._plan(c, T, dtype, EACH if neuron.own else 0)
    constexprs = dict(forward if name == "forward" else backward)
    options = {key: constexprs.pop(key) for key in backend._OPTIONS}
    one_state = len(neuron.states) == 1
    for unwanted, pointers in (
        (True, ("v_seq_ptr", "grad_v_seq_ptr")),
        (not chunks, ("states_ptr",)),
        (one_state, ("i0_ptr", "i_ptr", "grad_i_ptr", "grad_i0_ptr")),
        (not neuron.learnable, ("decay_ptr", "partial_ptr")),
        *((own not in neuron.own, (f"{own}_ptr", f"grad_{own}_ptr")) for own in dynamics.CURRENT_LIF.own),
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


# Compiling takes up to a quarter of a minute for 32 steps, so the long ones are those with the longest tapes.
LENGTHS = [
    *((neuron, 4, torch.float32) for neuron in NEURONS),
    (dynamics.LIF, 4, torch.bfloat16),
    (dynamics.SYNAPTIC_AT_ONCE, 4, torch.bfloat16),
    *((neuron, 16, torch.float32) for neuron in NEURONS),
    (dynamics.LIF, 16, torch.bfloat16),
    (dynamics.LIF, 32, torch.float32),
    (dynamics.SYNAPTIC_AT_ONCE, 32, torch.float32),
    (dynamics.PARAMETRIC_LIF, LONG, torch.float32),
    (dynamics.CURRENT_LIF, LONG, torch.bfloat16),
]


@pytest.mark.parametrize(("neuron", "T", "dtype"), LENGTHS, ids=lambda p: getattr(p, "name", str(p)))
def test_registers_do_not_spill(neuron: Neuron, T: int, dtype: torch.dtype, tmp_path: Path) -> None:
    for name in ("forward", "backward"):
        assert spilled_bytes(compile_kernel(name, constants(neuron), T, dtype), tmp_path) == 0


def test_registers_do_not_spill_with_several_spikes(tmp_path: Path) -> None:
    c = constants(dynamics.EXPONENTIAL_LIF, MULTI_SPIKE | DECAY_INPUT | SOFT_RESET)
    assert spilled_bytes(compile_kernel("backward", c, 32, torch.float32), tmp_path) == 0


@pytest.mark.parametrize(
    ("neuron", "T"),
    [(dynamics.IF, 4), (dynamics.LIF, 16), (dynamics.EXPONENTIAL_LIF, 4), (dynamics.SYNAPTIC_AT_ONCE, 16)],
    ids=lambda p: getattr(p, "name", str(p)),
)
def test_registers_do_not_spill_on_sm_80(neuron: Neuron, T: int, tmp_path: Path) -> None:
    compiled = compile_kernel("backward", constants(neuron, surrogate=T % 3), T, torch.float32, SM80)
    assert spilled_bytes(compiled, tmp_path) == 0


def check_rounding(c: Constants, T: int, target: GPUTarget, tmp_path: Path) -> None:
    compiled = compile_kernel("forward", c, T, torch.float32, target)
    ptx = compiled.asm["ptx"]
    # Rounding to an integer may flush what is below 2^-126: it becomes 0 either way.
    assert not re.findall(r"\bdiv\.(?:full|approx)|\bfma\.|(?<!cvt\.rmi|cvt\.rpi)\.ftz", ptx)
    assert not compiled.metadata.enable_fp_fusion  # so ptxas, too, contracts nothing
    assert ("div.rn.f32" in ptx) == divides(c)
    if not divides(c):  # a division itself is made of fused multiply-adds
        sass = tool("nvdisasm", compiled=compiled, tmp_path=tmp_path)
        assert "FADD" in sass
        assert "FFMA" not in sass


@neurons
def test_forward_rounds_as_the_loop_does(neuron: Neuron, tmp_path: Path) -> None:
    first, second = flags_of(neuron)
    check_rounding(constants(neuron, first), 2, SM90, tmp_path)
    check_rounding(constants(neuron, second, tau=2.0), 2, SM80, tmp_path)


@pytest.mark.parametrize("neuron", [dynamics.LIF, dynamics.SYNAPTIC], ids=lambda n: n.name)
def test_forward_in_chunks_rounds_as_the_loop_does(neuron: Neuron, tmp_path: Path) -> None:
    check_rounding(constants(neuron), LONG, SM90, tmp_path)


@neurons
def test_backward_recomputes_the_same_charges(neuron: Neuron) -> None:
    """Rect's derivative divides nothing and adds nothing, so what is left is the forward's arithmetic."""
    T = LONG if neuron is dynamics.IF else 2
    for flags in flags_of(neuron):
        c = constants(neuron, flags | DETACH_RESET, 7)
        ptx = compile_kernel("backward", c, T, torch.float32).asm["ptx"]
        assert not re.findall(r"\bdiv\.(?:full|approx)|\bfma\.rn\.f32", ptx)
        assert ("div.rn.f32" in ptx) == divides(c)


def test_the_search_for_divisions_can_find_one() -> None:
    assert "div.full" in compile_kernel("backward", constants(dynamics.IF), 1, torch.float32).asm["ptx"]


@pytest.mark.parametrize(
    ("neuron", "dtype", "target"),
    [
        *((neuron, torch.float32, SM90) for neuron in NEURONS),
        (dynamics.LIF, torch.float32, SM80),
        (dynamics.LIF, torch.bfloat16, SM90),
        (dynamics.PARAMETRIC_LIF, torch.bfloat16, SM80),
    ],
    ids=lambda p: getattr(p, "name", None) or getattr(p, "arch", None) or str(p),
)
def test_16_byte_accesses(neuron: Neuron, dtype: torch.dtype, target: GPUTarget) -> None:
    T, own, states = 4, len(neuron.own), len(neuron.states)
    each = backend.block_size(neuron.id, T, dtype) // (32 * backend._WARPS)  # neurons of a thread
    vectors, state = each * dtype.itemsize // 16, each * 4 // 16
    # The decay, and the own parameter that has one value for all.
    scalar = {"ld4": 1} if neuron.learnable or own > 2 else {}
    forward = compile_kernel("forward", constants(neuron), T, dtype, target)
    parameters = min(own, 2)
    loads, stores = T * vectors + state * (states + parameters), T * vectors + state * states
    assert accesses(forward.asm["ptx"]) == {"ld16": loads, "st16": stores} | scalar
    backward = compile_kernel("backward", constants(neuron), T, dtype, target)
    scalar |= {"st8": 1} if neuron.learnable else {}  # its partial sum
    loads, stores = 2 * T * vectors + state * (2 * states + parameters), T * vectors + state * (states + own)
    assert accesses(backward.asm["ptx"]) == {"ld16": loads, "st16": stores} | scalar


def test_odd_sizes_are_accessed_by_the_element() -> None:
    ptx = compile_kernel("forward", constants(dynamics.LIF), 4, torch.float32, aligned=False).asm["ptx"]
    assert accesses(ptx)["ld4"] >= 4 * 8


@neurons
def test_float64_numbers_arrive_exactly(neuron: Neuron) -> None:
    for name, surrogate in (("forward", 0), ("backward", 1 if neuron.id % 2 else 6)):
        c = constants(neuron, flags_of(neuron)[0], surrogate=surrogate)
        ptx = compile_kernel(name, c, 2, torch.float64).asm["ptx"]
        assert "cvt.f64.f32" not in ptx  # nothing passed through float32
        if name == "forward":
            assert ".f32" not in ptx
            assert "fma." not in ptx
            assert ("div.rn.f64" in ptx) == divides(c)


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    assert "cvt.rn.bf16" in compile_kernel("backward", constants(dynamics.IF), 4, torch.bfloat16).asm["ptx"]


def test_all_surrogates_compile() -> None:
    for surrogate, neuron in enumerate(NEURONS[: len(SURROGATES)]):
        flags = (0, DECAY_INPUT, SOFT_RESET, DETACH_RESET)[surrogate % 4]
        compile_kernel("backward", constants(neuron, flags, surrogate), 2, torch.float16)


def test_without_a_reset() -> None:
    """The subtraction of the threshold is left out when compiling, not multiplied by zero."""
    for neuron in NEURONS[dynamics.LEAKY.id :]:
        ptx = compile_kernel("forward", constants(neuron, STRICT | NO_RESET), 1, torch.float32).asm["ptx"]
        resetting = compile_kernel("forward", constants(neuron, STRICT | SOFT_RESET), 1, torch.float32).asm["ptx"]
        assert ptx.count("sub") < resetting.count("sub")


@neurons
def test_compiles_for_rocm(neuron: Neuron) -> None:
    if "amd" not in triton.backends.backends:
        pytest.skip("this Triton has no AMD backend")
    target = GPUTarget("hip", "gfx942", 64)
    code = compile_kernel("forward", constants(neuron, tau=2.0), 2, torch.float32, target).asm["amdgcn"]
    assert "v_add_f32" in code or "v_pk_add_f32" in code
    assert not re.search(r"v_(pk_)?(fma|fmac|mac|mad)\w*_f32", code)
    compile_kernel("backward", constants(neuron), LONG if neuron is dynamics.IF else 2, torch.bfloat16, target)
