"""The machine that runs PTX (tests/ptx): that it computes as a GPU would, and notices what it says it does."""

import ctypes
import math
import struct

import pytest
import torch
from cuda_host import GXX
from ptx_machine import build, open_machine, take_counts

pytestmark = pytest.mark.skipif(GXX is None, reason="g++ is not on PATH, so the machine cannot be built")


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    return open_machine(build(tmp_path_factory.mktemp("ptx")))


HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f32 %f<9>; .reg .f64 %d<9>;
    .shared .align 4 .b8 tile[512];
    ld.param.u64 %rd1, [p];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    mov.u32 %r2, tile;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r2, %r3;
"""


def run(machine, body, memory, threads=64):
    """A kernel with memory's address in %rd1 and of the thread's element in %rd3, of its element of `tile` in %r4."""
    text = f"{HEADER}.visible .entry k(.param .u64 p)\n{{\n{REGISTERS}\n{body}\nret;\n}}\n"
    program = machine.ptx_load(text.encode())
    words = (ctypes.c_uint64 * 1)(memory.data_ptr())
    return machine.ptx_launch(program, b"k", (ctypes.c_uint32 * 3)(1, 1, 1), threads, 0, words, 1).decode()


LEFT = "st.shared.u32 [%r4], %r1; {between} xor.b32 %r5, %r4, 32; ld.shared.u32 %r6, [%r5]; st.global.u32 [%rd3], %r6;"


def test_barriers_order_threads(machine):
    """Each thread reads what another has written: of its own warp, and with 32 * 4 of the next one."""
    out = torch.zeros(64, dtype=torch.int32)
    assert run(machine, LEFT.format(between="bar.sync 0;"), out) == ""
    assert out.tolist() == [k ^ 8 for k in range(64)]
    assert "race" in run(machine, LEFT.format(between=""), out)


def test_shuffles_order_a_warp_and_no_more(machine):
    out = torch.zeros(64, dtype=torch.int32)
    shuffle = "shfl.sync.bfly.b32 %r7, %r1, 1, 31, -1;"
    assert run(machine, LEFT.format(between=shuffle), out) == ""
    assert "another reads" in run(machine, LEFT.format(between=shuffle).replace("%r4, 32", "%r4, 128"), out)
    exchanged = shuffle + "st.global.u32 [%rd3], %r7;"
    assert run(machine, exchanged, out) == ""
    assert out.tolist() == [k ^ 1 for k in range(64)]


def test_writes_to_one_place(machine):
    out = torch.zeros(64, dtype=torch.int32)
    assert "race" in run(machine, "st.global.u32 [%rd1], %r1;", out)
    assert run(machine, "mov.u32 %r5, 7; st.global.u32 [%rd1], %r5;", out) == ""  # all of them the same
    assert "another reads" in run(machine, "ld.global.u32 %r5, [%rd1]; st.global.u32 [%rd1], %r1;", out)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.v2.u32 {%r5, %r6}, [%rd3];", "boundary"),
        ("mov.u64 %rd4, 0; ld.global.u32 %r5, [%rd4];", "null"),
        ("ld.shared.u32 %r5, [%r4+512];", "out of bounds"),
        ("ld.u32 %r5, [%rd1];", "which memory"),
        ("setp.lt.u32 %p1, %r1, 16; @%p1 ret; shfl.sync.down.b32 %r5, %r1, 1, 31, -1;", "have ended"),
        ("setp.lt.u32 %p1, %r1, 16; @%p1 bra L; shfl.sync.down.b32 %r5, %r1, 1, 31, -1; L: bar.sync 0;", "do not come"),
        ("frobnicate.b32 %r5, %r1;", "frobnicate"),
        ("bra nowhere;", "nowhere"),
    ],
)
def test_says_what_is_wrong(machine, body, message):
    assert message in run(machine, body, torch.zeros(64, dtype=torch.int32))


def bits(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


def test_rounding(machine):
    """A product and a sum are rounded once each, a fused one once; denormal numbers stay but for .ftz."""
    a = 1 + 2**-12
    out = torch.zeros(8, dtype=torch.float32)
    body = f"""
        mov.f32 %f1, 0f{bits(a):08X}; mov.f32 %f2, 0f{bits(-1 - 2**-11):08X};
        mul.rn.f32 %f3, %f1, %f1; add.rn.f32 %f3, %f3, %f2; st.global.f32 [%rd1], %f3;
        fma.rn.f32 %f4, %f1, %f1, %f2; st.global.f32 [%rd1+4], %f4;
        mov.f32 %f5, 0f{bits(2.0**-130):08X}; mov.f32 %f6, 0f{bits(1.0):08X};
        mul.rn.f32 %f7, %f5, %f6; st.global.f32 [%rd1+8], %f7;
        mul.rn.ftz.f32 %f7, %f5, %f6; st.global.f32 [%rd1+12], %f7;
        cvt.rn.bf16x2.f32 %r5, %f1, %f6; mov.b32 {{%h1, %h2}}, %r5;
        cvt.f32.bf16 %f7, %h1; st.global.f32 [%rd1+16], %f7;
        cvt.rn.f16.f32 %h3, %f1; cvt.f32.f16 %f7, %h3; st.global.f32 [%rd1+20], %f7;
        mov.f32 %f8, 0f{bits(math.nan):08X}; setp.gtu.f32 %p1, %f8, %f1; selp.f32 %f7, %f1, %f6, %p1;
        st.global.f32 [%rd1+24], %f7;
    """
    assert run(machine, body, out, threads=1) == ""
    half = torch.tensor(a).half().item()
    assert out[:7].tolist() == [0.0, 2.0**-24, 2.0**-130, 0.0, 1.0, half, a]


def test_counts(machine):
    """Every second element: all of the sectors for half of the bytes."""
    out = torch.zeros(256, dtype=torch.int32)
    take_counts(machine)
    body = "mul.wide.u32 %rd4, %r1, 8; add.s64 %rd5, %rd1, %rd4; st.global.u32 [%rd5], %r1;"
    assert run(machine, body, out) == ""
    counts = take_counts(machine)
    assert (counts.launches, counts.stores, counts.bytes_stored, counts.distinct_stored) == (1, 2, 256, 256)
    assert counts.store_sectors in (16, 18)  # by where the tensor begins
    assert take_counts(machine).stores == 0
