"""Spikes packed into bits and indices into few bytes come back as they were, by every kernel and without one."""

from __future__ import annotations

import pytest
import torch
import torch.utils._device
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_checks import DTYPES, FORMATS, T, needs_kernels, spikes_like

from snnfast import memory
from snnfast.backends import native

pytestmark = pytest.mark.usefixtures("one_thread")
_C = native._C


# ---- round trips ----
def bits_of(t):
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 17), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from(DTYPES),
    value=st.sampled_from([1.0, 0.25, -0.0, float("inf"), float("nan")]),
    cut=st.booleans(),
)
def test_any_layout_comes_back(shape, order, dtype, value, cut):
    dimensions = list(range(len(shape)))
    order.shuffle(dimensions)
    t = spikes_like([*shape, 3], dtype)
    t = torch.where(t > 0, torch.tensor(value, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    t = t[..., 1:].permute(*dimensions, len(shape)) if cut else t.permute(len(shape), *dimensions)
    packed = memory._as_bits(t)
    back = packed.unpack()
    assert (back.shape, back.stride(), back.dtype) == (t.shape, t.stride(), t.dtype)
    assert torch.equal(bits_of(back), bits_of(t))
    assert packed.nbytes <= t.numel() / 8 + 8


def test_another_default_device(monkeypatch):
    monkeypatch.undo()  # the default holds for torch's own functions, which tests poison
    torch.utils._device._device_constructors.cache_clear()
    t = spikes_like([64, 65], torch.float32)
    torch.set_default_device("meta")
    try:
        back = memory._as_bits(t).unpack()
    finally:
        torch.set_default_device(None)
        torch.utils._device._device_constructors.cache_clear()
    assert torch.equal(back, t)


@needs_kernels
@pytest.mark.parametrize("name", _C.cpu_sets() if _C else [])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_packs_alike(name, dtype):
    before = _C.cpu_set()
    _C.set_cpu_set(name)
    try:
        for n in (0, 1, 63, 64, 65, 1000, 16384, 16385, 100_003):
            t = spikes_like(n, dtype)
            bits = torch.full(((n + 63) // 64 * 8,), 255, dtype=torch.uint8)
            assert native.pack_bits(t, bits) is not None
            ones = ((bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().bool()
            assert torch.equal(ones[:n], t != 0)
            assert not ones[n:].any()
            back = torch.full((n + 8,), 7.0, dtype=dtype)
            native.unpack_bits(bits, memory._ONES[dtype], back[:n])
            assert torch.equal(back[:n], t)
            assert bool((back[n:] == 7).all()), "written beyond the end"
            for place in {0, n // 2, n - 1} if n > 2 else ():
                other = torch.ones_like(t)
                other[place] = 0.5
                assert native.pack_bits(other, bits) is None
    finally:
        _C.set_cpu_set(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_kernels_torch_packs_the_same_bits(dtype, monkeypatch):
    t = spikes_like((5, 7, 33), dtype).transpose(0, 1)
    want = memory._as_bits(t)
    monkeypatch.setattr(native, "missing", lambda device: "for this test")
    got = memory._as_bits(t)
    assert torch.equal(got.bits, want.bits)
    assert torch.equal(got.unpack(), t)
    assert got.unpack().stride() == t.stride()
    assert memory._as_bits(t + 0.5) is None


def test_indices_of_a_pooling_take_as_few_bytes_as_hold_them():
    for most, size in ((200, 1), (1000, 2), (40_000, 4)):
        t = torch.randint(0, most, (64, 64))
        t[0, 0] = most
        packed = memory.made_smaller(t)
        assert packed.nbytes == t.numel() * size
        assert torch.equal(packed.unpack(), t)
    assert memory.made_smaller(torch.randint(0, 2**40, (64, 64))) is None
    assert memory.made_smaller(torch.full((64, 64), -1)) is None


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_what_was_repeated_is_kept_once(memory_format):
    from snnfast.convert.to_spiking_layers import repeat

    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    y = repeat((x * 1).contiguous(memory_format=memory_format), T)
    for t in (y, y.unflatten(0, (T, 2)), y.flatten(2), x.repeat(3, 1, 1, 1).transpose(1, 2)):
        times = 3 if len(t) == 6 else T
        packed = memory.made_smaller(t)
        assert packed.nbytes == t.numel() * 4 // times
        assert torch.equal(packed.unpack(), t)
        assert packed.unpack().stride() == t.stride()
    changed = x.repeat(3, 1, 1, 1)
    with torch.no_grad():
        changed[0] += 1
    for t in (y[2:], x.repeat(2, 2, 1, 1), changed, y * 2, y.unflatten(0, (T, 2))[:, :1], y.flip(0)):
        assert memory.made_smaller(t) is None


# ---- the CUDA kernels, compiled for the CPU ----
DRIVER = """
#include "cuda_bits.cuh"
dim3 threadIdx, blockIdx, blockDim, gridDim;
namespace host_shim {
int64_t first_block = 0;
void wait_for_block() {}
double exchange_down(double value, int) { return value; }
void run_grid(dim3 grid, dim3 block, const std::function<void()>& body) {
  for (unsigned b = 0; b < grid.x; ++b)
    for (unsigned t = 0; t < block.x; ++t) {
      blockIdx = dim3(b), threadIdx = dim3(t);
      body();
    }
}
}  // namespace host_shim
extern "C" int run(int pack, int64_t n, int element_bytes, void* elements, void* bits, uint64_t one, void* other) {
  snnfast::BitsCall c{};
  c.n = n, c.element_bytes = element_bytes, c.elements = elements, c.bits = bits, c.one = one, c.other = other;
  return snnfast::launch_bits(c, pack, nullptr);
}
"""


@pytest.fixture(scope="module")
def cuda_bits(tmp_path_factory):
    import ctypes
    import subprocess

    from cuda_host import GXX, ROOT, SHIM

    if GXX is None:
        pytest.skip("there is no g++ here")
    folder = tmp_path_factory.mktemp("cuda_bits")
    (folder / "driver.cpp").write_text(DRIVER)
    command = [GXX, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-psabi", f"-I{SHIM}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(folder / "driver.cpp"), "-o", str(folder / "bits.so")], check=True)
    run = ctypes.CDLL(str(folder / "bits.so")).run
    run.argtypes = [
        *(ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64),
        ctypes.c_void_p,
    ]
    return run


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "shifted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cuda_kernels_on_the_host(cuda_bits, dtype, shift):
    one, size = memory._ONES[dtype], dtype.itemsize
    for n in (0, 1, 7, 8, 64, 65, 1000, 4099):
        words = (n + 63) // 64 * 8
        t = spikes_like(n + shift, dtype)[shift:]
        bits = torch.full((words + 8,), 85, dtype=torch.uint8)
        bits[words:] = 0
        flag = bits.data_ptr() + words
        assert cuda_bits(1, n, size, t.data_ptr(), bits.data_ptr(), one, flag) == 0
        assert not bits[words:].any()
        packed = memory._as_bits(t)
        assert torch.equal(bits[:words], packed.bits[:words])
        back = torch.full((n + shift + 8,), 7.0, dtype=dtype)
        assert cuda_bits(0, n, size, back[shift:].data_ptr(), bits.data_ptr(), one, flag) == 0
        assert torch.equal(back[shift : n + shift], t)
        assert bool((back[n + shift :] == 7).all())
        if n:
            t[n // 2] = 2.0
            assert cuda_bits(1, n, size, t.data_ptr(), bits.data_ptr(), one, flag) == 0
            assert cuda_bits(0, n, size, back[shift:].data_ptr(), bits.data_ptr(), one, flag) == 0
            assert bool(back[shift : n + shift].isnan().all()), "wrong values must show"
