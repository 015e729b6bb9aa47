"""Triton's batch norm and neuron in one, compiled for GPUs that need not be there: see test_triton_compile.py."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_triton_compile import LONG, SM80, SM90, TYPES, accesses, constants, own_cache, spilled_bytes, tool

from snnfast import dynamics
from snnfast.backends import triton_batch_norm as backend
from snnfast.dynamics import DECAY_INPUT, DETACH_RESET, SOFT_RESET, STRICT, Constants, Neuron
from snnfast.fused.ops import Connect

triton = pytest.importorskip("triton", reason="triton is not installed")
from triton.compiler import ASTSource  # noqa: E402

__all__ = ["own_cache"]  # the fixture
NEURONS = [n for n in dynamics.NEURONS if not n.own]
CHANNELS_LAST, CHANNELS_FIRST = (4, 8, 64, 16, 16), (4, 8, 64, 32, 32)
neurons = pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)


def compile_kernel(
    name: str,
    c: Constants,
    dtype: torch.dtype,
    T: int = 4,
    last: bool = True,
    connect: Connect = Connect.NONE,
    groups: int = 1,
    target: Any = SM90,
) -> Any:
    """What a launch on an aligned input compiles, with an initial state and all gradients."""
    x = torch.empty((T, *(CHANNELS_LAST if last else CHANNELS_FIRST)[1:]), dtype=dtype, device="meta")
    if last:
        x = x.to(memory_format=torch.preserve_format).movedim(2, -1).contiguous().movedim(-1, 2)
    sums = name in ("statistics", "gradient_sums")  # of one kernel
    kernel = getattr(backend.kernels(), "sums_kernel" if sums else f"{name}_kernel")
    state = TYPES[dynamics.state_dtype(dtype)]
    plain = sums or name == "backward_input"
    shape = backend._shape(x, 1024 if plain else backend._block_size(T, dtype))
    options = dict(backend.backend._OPTIONS)
    constexprs: dict[str, Any] = {"BR": shape.BR, "BC": shape.BC, "FOLD": shape.FOLD, "GROUPS": groups > 1}
    constexprs |= {"grad_ptr": None} if name == "statistics" else {}
    if not plain:
        _, forward, backward, chunks = backend._plan(c, x, shape, groups, connect)
        constexprs |= {k: v for k, v in (forward if name == "forward" else backward).items() if k not in options}
        constexprs |= {"SCALED": False}
        constexprs |= {} if chunks else {"states_ptr": None}
        constexprs |= {} if c.neuron == dynamics.PARAMETRIC_LIF.id else {"decay_ptr": None, "decay_partial_ptr": None}
        constexprs |= {"skip_ptr": None} if connect == Connect.NONE else {}
        constexprs |= {"grad_skip_ptr": None} if connect in (Connect.NONE, Connect.ADD) else {}
    sizes = {"rows": shape.rows, "period": shape.period, "inner": shape.inner, "channels": shape.channels}
    sizes |= {"tiles": shape.tiles, "rows_each": shape.each(shape.rows)}
    constexprs |= {k: 1 for k, v in sizes.items() if v == 1}  # as Triton does with a 1
    constexprs = {k: v for k, v in constexprs.items() if k in kernel.arg_names}

    def kind(arg: str) -> str:
        if arg in constexprs:
            return "constexpr"
        if arg in ("x_ptr", "s_ptr", "grad_s_ptr", "grad_x_ptr", "skip_ptr", "grad_skip_ptr", "grad_ptr"):
            return f"*{TYPES[dtype]}"
        if arg.endswith("_ptr"):
            return "*fp64" if "partial" in arg or (arg == "from_ptr" and name == "statistics") else f"*{state}"
        if arg in (*sizes, "chunks", "steps_down"):
            return "i32"
        return "i64" if state == "fp64" else "fp32"

    signature = {arg: kind(arg) for arg in kernel.arg_names}
    whole = [arg for arg, v in sizes.items() if v % 16 == 0]
    divisible = [i for i, (arg, k) in enumerate(signature.items()) if k[0] == "*" or (arg in whole and k == "i32")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(arg),): value for arg, value in constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    return triton.compile(source, target=target, options=options)


CASES = [
    *((neuron, 4, torch.float32, last, Connect.NONE) for neuron in NEURONS for last in (True, False)),
    (dynamics.LIF, 4, torch.bfloat16, True, Connect.NONE),
    (dynamics.LIF, 4, torch.bfloat16, True, Connect.CHARGE),
    (dynamics.PARAMETRIC_LIF, 4, torch.float32, False, Connect.IAND),
    (dynamics.PARAMETRIC_LIF, 16, torch.bfloat16, True, Connect.NONE),
    (dynamics.PARAMETRIC_LIF, 16, torch.float32, False, Connect.AND),
    (dynamics.LIF, LONG, torch.float32, True, Connect.CHARGE),
]


@pytest.mark.parametrize(
    ("neuron", "T", "dtype", "last", "connect"), CASES, ids=lambda p: getattr(p, "name", None) or str(p)
)
def test_registers_do_not_spill(
    neuron: Neuron, T: int, dtype: torch.dtype, last: bool, connect: Connect, tmp_path: Path
) -> None:
    for name in ("forward", "backward"):
        assert spilled_bytes(compile_kernel(name, constants(neuron), dtype, T, last, connect), tmp_path) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_knows_no_neuron(dtype: torch.dtype, tmp_path: Path) -> None:
    for name, last in itertools.product(("statistics", "gradient_sums", "backward_input"), (True, False)):
        compiled = compile_kernel(name, constants(dynamics.IF), dtype, last=last)
        assert spilled_bytes(compiled, tmp_path) == 0
        assert any(key in accesses(compiled.asm["ptx"]) for key in ("ld8", "ld16")), accesses(compiled.asm["ptx"])


@neurons
def test_forward_rounds_as_the_loop_does(neuron: Neuron, tmp_path: Path) -> None:
    for flags, tau, connect, target in (
        (DECAY_INPUT | STRICT, 3.0, Connect.CHARGE, SM90),
        (SOFT_RESET, 2.0, Connect.IAND, SM80),
    ):
        c = constants(neuron, flags, tau=tau)
        compiled = compile_kernel("forward", c, torch.float32, 2, connect=connect, target=target)
        ptx = compiled.asm["ptx"]
        divides = neuron is dynamics.LIF and tau == 3.0
        assert not re.findall(r"\bdiv\.(?:full|approx)|\bfma\.rn\.f32|\.ftz", ptx)
        assert not compiled.metadata.enable_fp_fusion
        assert ("div.rn.f32" in ptx) == divides
        if not divides:
            sass = tool("nvdisasm", compiled=compiled, tmp_path=tmp_path)
            assert "FADD" in sass
            assert "FFMA" not in sass


@neurons
def test_backward_recomputes_the_same_charges(neuron: Neuron) -> None:
    """Rect's derivative divides nothing and adds nothing, so what is left is the forward's arithmetic."""
    for T in (2, LONG) if neuron is dynamics.IF else (2,):
        c = constants(neuron, DECAY_INPUT | DETACH_RESET, 7)
        ptx = compile_kernel("backward", c, torch.float32, T, connect=Connect.CHARGE).asm["ptx"]
        assert not re.findall(r"\bdiv\.(?:full|approx)|\bfma\.rn\.f32", ptx)
        assert ("div.rn.f32" in ptx) == (neuron is dynamics.LIF)


def test_float64_numbers_arrive_exactly() -> None:
    for name in ("forward", "backward"):
        ptx = compile_kernel(name, constants(dynamics.LIF), torch.float64, 2).asm["ptx"]
        assert "cvt.f64.f32" not in ptx


def test_wide_accesses() -> None:
    for last in (True, False):
        for dtype, key in ((torch.bfloat16, "ld8"), (torch.float32, "ld16")):
            ptx = compile_kernel("forward", constants(dynamics.LIF), dtype, last=last).asm["ptx"]
            assert accesses(ptx)[key] >= 4, accesses(ptx)


def test_constants_of_each_step_compile() -> None:
    for name in ("statistics", "forward", "backward", "gradient_sums", "backward_input"):
        compile_kernel(name, constants(dynamics.LIF), torch.float32, groups=4)


def test_compiles_for_rocm() -> None:
    if "amd" not in triton.backends.backends:
        pytest.skip("this Triton has no AMD backend")
    target = type(SM90)("hip", "gfx942", 64)
    code = compile_kernel("forward", constants(dynamics.IF), torch.float32, 2, target=target).asm["amdgcn"]
    assert not re.search(r"v_(pk_)?(fma|fmac|mac|mad)\w*_f32", code)
    compile_kernel("backward", constants(dynamics.LIF), torch.bfloat16, 2, target=target)
