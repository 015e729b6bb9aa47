"""Max-pooling by the CPU kernel: PyTorch's results and gradients bit for bit, and PyTorch itself for all else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU_SETS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from snnfast import pooling
from snnfast.pooling import max_pool2d

_C = pytest.importorskip("snnfast._C", reason="the compiled extension is not built here")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
FORMATS = (torch.contiguous_format, torch.channels_last)


def same(a, b):
    """Whether two tensors have the same bits, but for those of a NaN, and the same dtype, shape and strides."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.stride() == b.stride()
    a, b = a.detach(), b.detach()
    bits = BITS[a.element_size()]
    return bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


def values(kind, shape, generator):
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "spikes":
        return (x > 0.5).double()
    if kind == "ties":
        return x.round()
    if kind == "special":
        specials = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 5e-324])
        return specials.double()[torch.randint(8, shape, generator=generator)]
    return x


def arranged(x, kind, generator):
    """x with the same values otherwise in memory."""
    if kind == "last":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "sliced":  # gaps everywhere
        wide = torch.randn([size + 3 for size in x.shape], generator=generator).to(x.dtype)
        view = wide[tuple(slice(1, 1 + size) for size in x.shape)]
        return view.copy_(x)
    if kind == "sliced last":
        wide = torch.randn([size + 2 for size in x.shape], generator=generator).to(x.dtype)
        wide = wide.contiguous(memory_format=torch.channels_last)
        return wide[tuple(slice(1, 1 + size) for size in x.shape)].copy_(x)
    if kind == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "repeated":
        return x[:1].expand_as(x)
    return x


LAYOUTS = ("first", "last", "sliced", "sliced last", "transposed", "repeated")


def check(x, grad=None):
    """Values, indices (through the gradient) and memory formats are torch's."""
    results = []
    for pool in (max_pool2d, F.max_pool2d):
        leaf = x.detach().requires_grad_()  # a view: strides stay
        y = pool(leaf, 2)
        g = torch.ones_like(y) if grad is None else grad
        results.append((y, *torch.autograd.grad(y, leaf, g)))
        with torch.no_grad():
            results[-1] = *results[-1], pool(x, 2)
    for got, want in zip(*results, strict=True):
        assert same(got, want)


@settings(max_examples=150)
@given(
    n=st.integers(1, 3),
    c=st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 130])),
    h=st.integers(2, 9),
    w=st.one_of(st.integers(2, 20), st.sampled_from([30, 31, 32, 33, 34, 62, 64, 65, 66, 126, 128, 130, 131])),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["random", "spikes", "ties", "special"]),
    layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from(LAYOUTS),
    cpu_set=st.sampled_from(CPU_SETS),
    seed=st.integers(0, 10**6),
)
def test_fuzz(n, c, h, w, dtype, kind, layout, grad_layout, cpu_set, seed):
    before = _C.cpu_set()
    if cpu_set not in _C.cpu_sets():
        cpu_set = before
    generator = torch.Generator().manual_seed(seed)
    x = arranged(values(kind, (n, c, h, w), generator).to(dtype), layout, generator)
    grad = values(("random", "special")[seed % 2], (n, c, h // 2, w // 2), generator).to(dtype)
    _C.set_cpu_set(cpu_set)
    assert pooling._is_served(x) == (h > 1 and w > 1)
    try:
        check(x, arranged(grad, grad_layout, generator))
    finally:
        _C.set_cpu_set(before)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_set_and_size_has_torchs_bits(cpu_set, pool_calls, dtype, memory_format):
    generator = torch.Generator().manual_seed(1)
    count = 0
    for w in (2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 24, 32, 40, 64, 66, 128, 129, 192):
        for c, h in ((1, 2), (1, 3), (3, 2), (7, 4), (16, 2), (19, 5), (67, 2)):
            for kind in ("spikes", "special"):
                x = values(kind, (2, c, h, w), generator).to(dtype).contiguous(memory_format=memory_format)
                grad = values(("random", "special")[kind == "special"], (2, c, h // 2, w // 2), generator).to(dtype)
                check(x, grad.contiguous(memory_format=memory_format))
                count += 1
    assert pool_calls.count("max_pool") == 2 * count
    assert pool_calls.count("max_pool_backward") == count


def test_a_nan_comes_out_with_its_own_bits(cpu_set):
    for dtype, bits in ((torch.float32, 0x7FC01234), (torch.bfloat16, 0x7FC5), (torch.float16, 0x7E45)):
        nan = torch.tensor(bits, dtype=BITS[dtype.itemsize]).view(dtype)
        for at in range(4):
            for memory_format in FORMATS:
                x = torch.zeros(1, 70, 2, 2, dtype=dtype)
                x[..., at // 2, at % 2] = nan
                x = x.contiguous(memory_format=memory_format)
                assert bool((max_pool2d(x, 2).view(BITS[dtype.itemsize]) == bits).all())


def test_what_no_window_covers_has_no_gradient(cpu_set):
    for memory_format in FORMATS:
        x = torch.randn(3, 5, 7, 9).contiguous(memory_format=memory_format).requires_grad_()
        max_pool2d(x, 2).sum().backward()
        assert not x.grad[:, :, 6].any()
        assert not x.grad[..., 8].any()
        assert x.grad.sum() == 3 * 5 * 3 * 4


@pytest.mark.parametrize("shape", [(4, 64, 33, 40), (3, 100, 8, 8), (64, 128, 4, 4), (9, 1, 64, 128)])
def test_results_do_not_depend_on_the_number_of_threads(shape, pool_calls, keeps_threads):
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for memory_format in FORMATS:
            x = torch.randn(shape).round().contiguous(memory_format=memory_format)
            grad = torch.randn(*shape[:2], shape[2] // 2, shape[3] // 2).contiguous(memory_format=memory_format)
            check(x, grad)
    assert pool_calls.count("max_pool_backward") == 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_small_calls_survive_a_fork():
    code = """
import os, torch
from snnfast.pooling import max_pool2d
max_pool2d(torch.randn(8, 64, 32, 32), 2)
child = os.fork()
if child == 0:
    max_pool2d(torch.randn(2, 8, 32, 32), 2)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- shapes and arguments ----
def test_without_a_batch(pool_calls):
    for dtype in DTYPES:
        for x in (torch.randn(5, 8, 6), torch.randn(8, 6, 5).permute(2, 0, 1), torch.randn(1, 2, 3)):
            check(x.to(dtype))
    assert pool_calls


def test_memory_formats_that_strides_leave_open(pool_calls):
    for shape in ((1, 1, 4, 4), (2, 1, 5, 4), (1, 3, 2, 2), (4, 1, 2, 2)):
        for memory_format in FORMATS:
            check(torch.randn(shape).contiguous(memory_format=memory_format))
    check(torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)[:, :1])
    check(torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)[:, :, ::2])
    check(torch.randn(8, 8).expand(2, 3, 8, 8))
    check(torch.randn(4, 8, 8, 2).permute(3, 0, 1, 2))
    assert pool_calls.count("max_pool_backward") == 12


def test_anything_else_is_torchs(pool_calls):
    x = torch.randn(2, 3, 9, 8)
    cases = [
        {"kernel_size": 3},
        {"kernel_size": 2, "stride": 1},
        {"kernel_size": (2, 3)},
        {"kernel_size": 2, "padding": 1},
        {"kernel_size": 2, "dilation": 2},
        {"kernel_size": 2, "ceil_mode": True},
        {"kernel_size": 2, "stride": (2, 1)},
        {"kernel_size": (2,), "stride": 2},
    ]
    for case in cases:
        assert same(max_pool2d(x, **case), F.max_pool2d(x, **case))
        module = pooling.MaxPool2d(**case)
        assert same(module(x), nn.MaxPool2d(**case)(x))
    got, want = max_pool2d(x, 2, return_indices=True), F.max_pool2d(x, 2, return_indices=True)
    assert same(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert max_pool2d(torch.randint(9, (1, 2, 4, 4)), 2).dtype == torch.int64
    assert max_pool2d(torch.empty(0, 3, 4, 4), 2).shape == (0, 3, 2, 2)
    assert max_pool2d(torch.randn(2, 3, 4, 4, device="meta"), 2).device.type == "meta"
    assert not pool_calls
    for case in ({"kernel_size": 2}, {"kernel_size": (2, 2), "stride": [2, 2], "padding": (0, 0), "dilation": [1, 1]}):
        assert same(max_pool2d(x, **case), F.max_pool2d(x, 2))
    assert len(pool_calls) == 2


@pytest.mark.parametrize(
    ("x", "kernel_size"),
    [
        (torch.randn(2, 3, 1, 4), 2),
        (torch.randn(2, 3, 4, 1), 2),
        (torch.randn(4, 4), 2),
        (torch.randn(1, 2, 3, 4, 4), 2),
        (torch.randn(2, 0, 4, 4), 2),
        (torch.randn(2, 3, 4, 4), 2.0),
        (torch.randn(2, 3, 4, 4), "2"),
        (torch.zeros(1, 2, 4, 4).to_sparse(), 2),
        ([[1.0, 2.0], [3.0, 4.0]], 2),
    ],
    ids=["flat", "narrow", "2-d", "5-d", "no channels", "float size", "text", "sparse", "list"],
)
def test_errors_are_torchs(x, kernel_size):
    with pytest.raises(Exception) as want:  # noqa: PT011
        F.max_pool2d(x, kernel_size)
    with pytest.raises(type(want.value)) as got:
        max_pool2d(x, kernel_size)
    assert str(got.value) == str(want.value)


def test_freed_memory_is_an_error_and_no_crash():
    x = torch.randn(1, 2, 4, 4)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="not allocated"):
        max_pool2d(x, 2)
    assert not max_pool2d(torch._efficientzerotensor((1, 2, 4, 4)), 2).any()
