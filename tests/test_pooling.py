"""Max-pooling by the CPU kernel: PyTorch's results and gradients bit for bit, and PyTorch itself for all else."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import snnfast
from snnfast import layer, pooling
from snnfast.backends import native
from snnfast.pooling import max_pool2d

_C = pytest.importorskip("snnfast._C", reason="the compiled extension is not built here")
SETS = ("avx512", "avx2", "baseline")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(params=SETS)
def cpu_set(request):
    if request.param not in _C.cpu_sets():
        pytest.skip(f"{request.param} is not built or this processor lacks it")
    before = _C.cpu_set()
    _C.set_cpu_set(request.param)
    yield request.param
    _C.set_cpu_set(before)


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels' calls."""
    made = []
    for name in ("max_pool", "max_pool_backward"):
        run = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *args, run=run, name=name: made.append(name) or run(*args))
    return made


def same(a, b, nan_too=False):
    """Whether two tensors have the same bits, shapes and strides; NaNs need not be the same, unless nan_too."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.stride() == b.stride()
    a, b = a.detach(), b.detach()
    # Not view, which torch.equal of NaN would need: integers of the same bits, in any layout.
    equal = a.view(BITS[a.element_size()]) == b.view(BITS[a.element_size()])
    return bool((equal if nan_too else equal | (a.isnan() & b.isnan())).all())


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


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 3),
    c=st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 130])),
    h=st.integers(2, 9),
    w=st.one_of(st.integers(2, 20), st.sampled_from([30, 31, 32, 33, 34, 62, 64, 65, 66, 126, 128, 130, 131])),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["random", "spikes", "ties", "special"]),
    layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from(LAYOUTS),
    cpu_set=st.sampled_from(SETS),
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
    try:
        check(x, arranged(grad, grad_layout, generator))
    finally:
        _C.set_cpu_set(before)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_set_and_size_has_torchs_bits(cpu_set, calls, dtype, memory_format):
    generator = torch.Generator().manual_seed(1)
    count = 0
    for w in (2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 24, 32, 40, 64, 66, 128, 129, 192):
        for c, h in ((1, 2), (1, 3), (3, 2), (7, 4), (16, 2), (19, 5), (67, 2)):
            for kind in ("spikes", "special"):
                x = values(kind, (2, c, h, w), generator).to(dtype).contiguous(memory_format=memory_format)
                grad = values("random", (2, c, h // 2, w // 2), generator).to(dtype)
                check(x, grad.contiguous(memory_format=memory_format))
                count += 1
    assert calls.count("max_pool") == 2 * count
    assert calls.count("max_pool_backward") == count


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
def test_results_do_not_depend_on_the_number_of_threads(shape):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for memory_format in FORMATS:
                x = torch.randn(shape).round().contiguous(memory_format=memory_format)
                grad = torch.randn(*shape[:2], shape[2] // 2, shape[3] // 2).contiguous(memory_format=memory_format)
                check(x, grad)
    finally:
        torch.set_num_threads(before)


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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---- shapes and arguments ----
def test_without_a_batch(calls):
    for dtype in DTYPES:
        for x in (torch.randn(5, 8, 6), torch.randn(8, 6, 5).permute(2, 0, 1), torch.randn(1, 2, 3)):
            check(x.to(dtype))
    assert calls


def test_memory_formats_that_strides_leave_open():
    for shape in ((1, 1, 4, 4), (2, 1, 5, 4), (1, 3, 2, 2), (4, 1, 2, 2)):
        for memory_format in FORMATS:
            check(torch.randn(shape).contiguous(memory_format=memory_format))
    check(torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)[:, :1])
    check(torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)[:, :, ::2])
    check(torch.randn(8, 8).expand(2, 3, 8, 8))
    check(torch.randn(4, 8, 8, 2).permute(3, 0, 1, 2))


def test_anything_else_is_torchs(calls):
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
    assert not calls
    for case in ({"kernel_size": 2}, {"kernel_size": (2, 2), "stride": [2, 2], "padding": (0, 0), "dilation": [1, 1]}):
        assert same(max_pool2d(x, **case), F.max_pool2d(x, 2))
    assert len(calls) == 2


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


# ---- memory ----
def test_a_byte_for_each_output_is_kept():
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = max_pool2d(x * 1, 2)
    assert [(t.dtype, t.numel()) for t in kept if t.dtype != x.dtype] == [(torch.uint8, y.numel())]
    assert not any(t.shape == x.shape and t.data_ptr() != x.data_ptr() for t in kept)  # x of the product alone
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, torch.autograd.grad(F.max_pool2d(x, 2).sum(), x)[0])
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_the_input_is_freed_and_may_be_overwritten():
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    between = x * 1
    y = max_pool2d(between, 2)
    want = torch.autograd.grad(F.max_pool2d(x * 1, 2).sum(), x)[0]
    between.data.fill_(7.0)
    reference = weakref.ref(between)
    del between
    gc.collect()
    assert reference() is None
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)


def test_without_gradients_nothing_is_kept(monkeypatch):
    kept = []
    run = native.max_pool
    monkeypatch.setattr(native, "max_pool", lambda dims, x, y, chosen: kept.append(chosen) or run(dims, x, y, chosen))
    max_pool2d(torch.randn(2, 3, 8, 8), 2)
    with torch.no_grad():
        max_pool2d(torch.randn(2, 3, 8, 8, requires_grad=True), 2)
    with torch.inference_mode():
        y = max_pool2d(torch.randn(2, 3, 8, 8), 2)
    assert y.is_inference()
    assert kept == [None] * 3


@pytest.mark.parametrize("packed", [False, True])
def test_a_network_keeps_less_than_with_torchs(calls, packed):
    def kept(pool):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), snnfast.IFNode(timesteps=2), pool, nn.Conv2d(8, 4, 3))
        x = torch.randn(4, 2, 32, 32)
        with snnfast.packed_spikes() if packed else contextlib.nullcontext():
            size, y = snnfast.analysis.saved_bytes(net, x), net(x)
        return size, torch.autograd.grad(y.square().sum(), net.parameters())

    ours, theirs = kept(pooling.MaxPool2d(2)), kept(nn.MaxPool2d(2))
    assert "max_pool_backward" in calls
    assert all(map(torch.equal, ours[1], theirs[1]))
    assert ours[0] < theirs[0]


def test_hooks_may_change_the_layout_of_what_is_kept_and_no_more():
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(2, 3, 4, 4)
    want = torch.autograd.grad(F.max_pool2d(x, 2), x, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(order="C"), torch.from_numpy):
        assert torch.equal(torch.autograd.grad(max_pool2d(x, 2), x, grad)[0], want[0])
    for unpack in (torch.Tensor.float, lambda t: t[:1]):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = max_pool2d(x, 2)
            with pytest.raises(RuntimeError, match="saved_tensors_hooks must give back"):
                torch.autograd.grad(y, x, grad)


# ---- autograd ----
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_second_derivatives(memory_format):
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()

    def curved(t):
        return max_pool2d(t, 2).square()

    assert torch.autograd.gradcheck(curved, x, check_batched_grad=True)
    # Of the second derivative, torch cannot batch that of channels last.
    batches = memory_format is torch.contiguous_format
    assert torch.autograd.gradgradcheck(curved, x, check_batched_grad=batches)
    found = []
    for pool in (max_pool2d, F.max_pool2d):
        (first,) = torch.autograd.grad(pool(x, 2).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
        found.append((first, second, *torch.autograd.grad(second.sin().sum(), x)))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_batched_gradients():
    x = torch.randn(2, 3, 6, 4, requires_grad=True)
    grads = torch.randn(5, 2, 3, 3, 2)
    want = torch.stack([torch.autograd.grad(F.max_pool2d(x, 2), x, g)[0] for g in grads])
    y = max_pool2d(x, 2)
    assert torch.equal(torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)[0], want)
    assert torch.equal(torch.func.vmap(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(grads), want)


def test_backward_under_another_default_device():
    x = torch.randn(2, 3, 6, 4, requires_grad=True)
    y = max_pool2d(x, 2)
    with torch.device("meta"):
        (found,) = torch.autograd.grad(y, x, torch.ones(2, 3, 3, 2, device="cpu"))
        assert max_pool2d(x, 2).device.type == "cpu"
    assert torch.equal(found, torch.autograd.grad(F.max_pool2d(x, 2).sum(), x)[0])


def test_a_result_without_a_gradient():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    y = max_pool2d(x, 2)

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    assert torch.autograd.grad(Cut.apply(y).sum(), x, allow_unused=True) == (None,)


# ---- whoever looks sees torch's own call ----
def test_transforms_modes_and_subclasses(calls):
    x = torch.randn(3, 2, 4, 6, 8)
    want = F.max_pool2d(x.flatten(0, 1), 2).unflatten(0, (3, 2))
    assert torch.equal(torch.func.vmap(lambda t: max_pool2d(t, 2))(x), want)
    grad = torch.func.grad(lambda t: max_pool2d(t, 2).sum())(x[0])
    assert torch.equal(grad, torch.func.grad(lambda t: F.max_pool2d(t, 2).sum())(x[0]))
    primal, tangent = torch.func.jvp(lambda t: max_pool2d(t, 2), (x[0],), (x[1],))
    again = torch.func.jvp(lambda t: F.max_pool2d(t, 2), (x[0],), (x[1],))
    assert torch.equal(primal, again[0])
    assert torch.equal(tangent, again[1])

    class Sub(torch.Tensor):
        pass

    assert type(max_pool2d(x[0].as_subclass(Sub), 2)) is Sub
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        max_pool2d(x[0], 2)
    assert F.max_pool2d in seen

    class Dispatch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Dispatch():
        max_pool2d(x[0], 2)
    assert any("max_pool2d" in str(s) for s in seen[1:])
    assert not calls


def test_traces(calls):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), pooling.MaxPool2d(2))
    x = torch.randn(2, 2, 8, 8)
    traced = torch.jit.trace(net, x)
    assert "max_pool2d" in str(traced.inlined_graph)
    graph = torch.fx.symbolic_trace(net)
    assert F.max_pool2d in [n.target for n in graph.graph.nodes]
    exported = torch.export.export(net, (x,))
    assert "max_pool2d" in str(exported.graph)
    calls.clear()
    want = F.max_pool2d(net[0](x), 2)
    for made in (traced, graph, exported.module()):
        assert torch.equal(made(x), want)
    assert not calls


def test_compiled_in_one_graph():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), pooling.MaxPool2d(2))
    x = torch.randn(2, 2, 8, 8, requires_grad=True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    want, got = net(x), compiled(x)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)]
    assert torch.equal(*grads)


def test_autocast_takes_the_kernel(calls):
    conv = nn.Conv2d(2, 3, 3)
    x = torch.randn(2, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert max_pool2d(conv(x), 2).dtype == torch.bfloat16
    assert calls == ["max_pool"]


# ---- layers and converted networks ----
def test_the_layer(calls):
    x = torch.randn(3, 2, 4, 6, 8)
    want = F.max_pool2d(x.flatten(0, 1), 2).unflatten(0, (3, 2))
    assert torch.equal(layer.MaxPool2d(2, step_mode="m")(x), want)
    assert torch.equal(layer.MaxPool2d(2)(x[0]), want[0])
    assert torch.equal(layer.MaxPool2d(2)(input=x[0]), want[0])
    assert len(calls) == 3
    assert isinstance(layer.MaxPool2d(2), nn.MaxPool2d)
    assert repr(layer.MaxPool2d(2)) == f"{repr(nn.MaxPool2d(2))[:-1]}, step_mode=s)"
    got, indices = layer.MaxPool2d(2, return_indices=True, step_mode="m")(x)
    assert torch.equal(got, want)
    assert indices.shape == want.shape


def small_vgg():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


@pytest.mark.parametrize("share_weights", [False, True])
def test_converted_networks(calls, share_weights):
    ann = small_vgg()
    net = snnfast.to_spiking(ann, timesteps=4, share_weights=share_weights)
    assert type(ann[3]) is nn.MaxPool2d
    assert [type(net[k]) for k in (3, 7)] == [pooling.MaxPool2d] * 2
    assert isinstance(net[3], nn.MaxPool2d)
    assert repr(net[3]) == repr(ann[3])
    assert list(net.state_dict()) == list(ann.state_dict())
    plain = copy.deepcopy(net)
    for k in (3, 7):
        plain[k].__class__ = nn.MaxPool2d
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    x = torch.rand(2, 3, 8, 8)
    results = []
    for each in (plain, net, copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        y = each(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), each.parameters())))
        assert calls == ([] if each is plain else ["max_pool", "max_pool_backward"])
        calls.clear()
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    assert results[0][0].any()


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        x = torch.max_pool2d(x, kernel_size=(2, 2), stride=2)
        return self.fc(x.flatten(1))


def test_converted_functional_pooling(calls, monkeypatch):
    net = snnfast.to_spiking(Functional(), timesteps=4, v_threshold=0.125)
    x = torch.rand(2, 3, 8, 8)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    with torch.no_grad():
        got = net(x)
        assert calls == ["max_pool"] * 2
        assert torch.equal(torch.load(buffer, weights_only=False)(x), got)
        assert calls == ["max_pool"] * 4
        monkeypatch.setattr(pooling, "_is_served", lambda x: False)
        assert torch.equal(net(x), got)
    assert len(calls) == 4
    assert not torch.equal(got, net.fc.bias.expand_as(got))  # something spiked


def test_rates_are_pooled_as_before():
    net = snnfast.to_spiking(small_vgg(), timesteps=4, calibration=torch.rand(4, 3, 8, 8))
    assert not any(isinstance(m, pooling.MaxPool2d) for m in net.modules())


def test_a_converted_networks_graph_shows_torchs_call():
    net = snnfast.to_spiking(small_vgg(), timesteps=2).eval()
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        want = net(x)
        exported = torch.export.export(net, (x,))
        assert torch.equal(exported.module()(x), want)
        assert "max_pool2d" in str(exported.graph)
        assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(x), want)
    assert snnfast.fuse(copy.deepcopy(net)).fused == [("5", "6")]
