"""Batch norm and neuron in one by the CUDA kernels, driven on the CPU, against the CPU kernels (which
tests/test_bn_neuron.py and tests/test_residual.py hold against the modules apart)."""

import ctypes
import itertools
import math
import re

import pytest
import torch
from cuda_host import GXX, ROOT, Guarded, guarded_copy, point

from snnfast import dynamics, surrogate
from snnfast.backends import native, native_batch_norm, triton_batch_norm
from snnfast.backends.native_batch_norm import NormCall, Running
from snnfast.dynamics import DECAY_INPUT, DETACH_RESET, SOFT_RESET, Constants
from snnfast.fused import kernels
from snnfast.fused.ops import Connect

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(GXX is None, reason="g++ is not on PATH, so the CUDA kernels cannot be built for the CPU"),
    pytest.mark.skipif(native.missing(torch.device("cpu")) is not None, reason="the CPU kernels are not built"),
]

NEURONS = [n for n in dynamics.NEURONS if not n.own]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = ["run", "T", "N", "neuron", "surrogate", "flags", "dtype", "division", "channels", "inner", "groups"]
INTEGERS += ["batch_statistics", "weight_dtype", "bias_dtype", "connect", "running_dtype"]
REALS = ["threshold", "v_reset", "tau", "alpha", "gain", "v_init", "eps", "momentum"]
POINTERS = ["x", "v0", "decay", "mean", "var", "weight", "bias", "s", "v", "grad_s", "grad_v", "grad_x", "grad_v0"]
POINTERS += ["grad_weight", "grad_bias", "grad_decay", "workspace", "skip", "grad_skip", "running_mean", "running_var"]
STATISTICS, FORWARD, BACKWARD = range(3)
EPS, MOMENTUM = 1e-3, 0.3


class FlatBatchNorm(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in INTEGERS]
        + [(name, ctypes.c_double) for name in REALS]
        + [(name, ctypes.c_void_p) for name in POINTERS]
    )


def constants(neuron, flags=DECAY_INPUT, kind=1, tau=2.0):
    v_reset = 0.0 if flags & SOFT_RESET else 0.125
    alpha = surrogate.SURROGATES[kind]().alpha
    return Constants(neuron.id, kind, flags, 0.75, v_reset, tau, alpha, 1.25, 0.0, 0.0625)


def call(library, run, c, x, groups, given, outputs, *, batch_statistics=True, connect=Connect.NONE, shift=0):
    """One pass on guarded memory, in which nothing outside the outputs may change."""
    given = {k: guarded_copy(t, shift if t.shape == x.shape else 0) for k, t in given.items() if t is not None}
    for name, like in outputs.items():
        kept = Guarded(*like.shape, dtype=like.dtype, shift=shift if like.shape == x.shape else 0)
        outputs[name] = kept
        if name.startswith("running"):
            kept.tensor.copy_(like)
    T = x.shape[0]
    dtype_of = {k: native._DTYPE[t.tensor.dtype] for k, t in (given | outputs).items()}
    flat = FlatBatchNorm(
        run, T, x.numel() // T, c.neuron, c.surrogate, c.flags, native._DTYPE[x.dtype], 0, x.shape[2],
        native_batch_norm._inner(x), groups, batch_statistics,
        *(dtype_of.get(name, 0) for name in ("weight", "bias")), connect, dtype_of.get("running_mean", 0),
        c.threshold, c.v_reset, c.tau, c.alpha, c.gain, c.v_init, EPS, MOMENTUM,
    )  # fmt: skip
    flat_x = Guarded(T, x.numel() // T, dtype=x.dtype, shift=shift)
    flat_x.tensor.copy_(in_memory(x))
    point(flat, x=flat_x, **given, **outputs)
    size = library.shim_batch_norm_workspace(ctypes.byref(flat))
    workspace = torch.full((size // 8 + 64,), math.nan, dtype=torch.float64)
    flat.workspace = workspace.data_ptr() + -workspace.data_ptr() % 256
    guard = workspace[(flat.workspace - workspace.data_ptr() + size) // 8 :]
    assert library.shim_batch_norm(ctypes.byref(flat)) == b""
    for name, kept in outputs.items():
        kept.check(name)
    assert guard.isnan().all(), "the workspace is too small"
    return {name: kept.tensor for name, kept in outputs.items()}


def in_memory(t):
    """``[T, N]`` in the order in which the elements lie."""
    return t.as_strided((t.shape[0], t.numel() // t.shape[0]), (t.numel() // t.shape[0], 1))


def laid_out(t, x):
    return t.as_strided(x.shape, x.stride())


def run(library, c, x, weight, bias, v0, decay, skip, connect, grad_s, grad_v, *, per_step, given_statistics, shift=0):
    """Statistics, outputs and gradients, as the ops give them."""
    groups, channels = (x.shape[0] if per_step else 1), x.shape[2]
    state = dynamics.state_dtype(x.dtype)
    flat = {"v0": v0, "skip": skip, "grad_s": grad_s, "grad_v": grad_v}
    flat = {
        k: None if t is None else (in_memory(t) if t.dim() == x.dim() else in_memory(t[None])[0])
        for k, t in flat.items()
    }
    double = torch.empty(groups, channels, dtype=torch.float64)
    rows, row = torch.empty(x.shape[0], x.numel() // x.shape[0]), torch.empty(x.numel() // x.shape[0])
    statistics = given_statistics
    if statistics is None:
        found = call(library, STATISTICS, c, x, groups, {}, {"mean": double, "var": double}, shift=shift)
        statistics = found["mean"], found["var"]
    given = {"mean": statistics[0], "var": statistics[1], "weight": weight, "bias": bias, "decay": decay}
    given |= {"v0": flat["v0"], "skip": flat["skip"]}
    outputs = {"s": rows.to(x.dtype), "v": row.to(state)}
    forward = call(library, FORWARD, c, x, groups, given, outputs, connect=connect, shift=shift)
    given |= {"grad_s": flat["grad_s"], "grad_v": flat["grad_v"]}
    per_channel = torch.empty(channels, dtype=state)
    outputs = {"grad_x": rows.to(x.dtype), "grad_weight": per_channel, "grad_bias": per_channel}
    outputs |= {} if v0 is None else {"grad_v0": row.to(state)}
    outputs |= {} if decay is None else {"grad_decay": torch.empty((), dtype=state)}
    if connect in (Connect.CHARGE, Connect.AND, Connect.IAND) and (connect == Connect.CHARGE or grad_s is not None):
        outputs["grad_skip"] = rows.to(x.dtype)
    if connect == Connect.ADD:
        given["skip"] = None
    training = given_statistics is None
    backward = call(
        library, BACKWARD, c, x, groups, given, outputs, batch_statistics=training, connect=connect, shift=shift
    )
    return {"mean": statistics[0], "var": statistics[1], **forward, **backward}


def close(got, want, tolerance, name):
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-9)
    assert error <= tolerance, f"{name}: {float(error)}"


def random(shape, layout):
    """Normal numbers ``[T, B, C, *]`` in float64, as a permutation of the memory if ``layout`` is channels_last."""
    x = torch.randn(shape, dtype=torch.float64) * 1.7 + 0.5
    return x.movedim(2, -1).contiguous().movedim(-1, 2) if layout == "last" else x


def like(t, x, dtype):
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(t)


def check(
    library, neuron, dtype, shape, layout, index, *, connect=Connect.NONE, per_step=False, training=True, shift=0
):
    flags = [DECAY_INPUT, 0, DECAY_INPUT | SOFT_RESET, DETACH_RESET][index % 4]
    c = constants(neuron, flags, index % 8, [2.0, 3.0, 1.7][index % 3])
    state = dynamics.state_dtype(dtype)
    x = random(shape, layout).to(dtype)
    channels = shape[2]
    weight = (torch.rand(channels) + 0.5).to(DTYPES[index % 4] if index % 5 else state) if index % 3 else None
    bias = (torch.rand(channels) * 0.6).to(state) if index % 4 else None
    v0 = (torch.randn(x[0].shape) * 0.4).to(state) if index % 2 else None
    v0 = None if v0 is None else like(v0, x[0], state)
    decay = torch.tensor(0.375, dtype=state) if neuron.learnable else None
    skip = None
    if connect != Connect.NONE:
        skip = (torch.rand(shape) < 0.5) * 1.0 if connect != Connect.CHARGE else torch.randn(shape) * 0.5
        skip = like(skip, x, dtype)
    grad_s = like(torch.randn(shape), x, dtype) if index % 7 else None
    grad_v = like(torch.randn(x[0].shape), x[0], state) if index % 2 or grad_s is None else None
    groups = shape[0] if per_step else 1
    statistics = None
    if not training:
        statistics = torch.randn(groups, channels).double() * 0.3, torch.rand(groups, channels).double() + 1.0
    got = run(
        library, c, x, weight, bias, v0, decay, skip, connect, grad_s, grad_v, per_step=per_step,
        given_statistics=statistics, shift=shift,
    )  # fmt: skip

    mean, var = torch.ops.snnfast.bn_statistics(x, per_step) if training else statistics
    assert torch.allclose(got["mean"], mean, rtol=1e-12, atol=1e-12)
    assert torch.allclose(got["var"], var, rtol=1e-11, atol=0)
    rest = got["mean"], got["var"], weight, bias, v0, decay, skip, connect, EPS, *c
    s, v = torch.ops.snnfast.bn_multi_step(x, *rest)
    # The same bits; where a product or sum of constants per channel rounds otherwise, nearly.
    assert torch.equal(laid_out(got["s"], x), s)
    assert torch.equal(laid_out(got["v"], x[0]), v)
    grads = torch.ops.snnfast.bn_multi_step_backward(
        grad_s, grad_v, x, *rest[:6], None if connect == Connect.ADD else skip, *rest[7:], training
    )
    # Half-precision gradients are rounded twice, that of the normalised input first.
    rounded = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-5, torch.float64: 1e-11}[dtype]
    exact = 1e-11 if dtype == torch.float64 else 2e-5
    close(laid_out(got["grad_x"], x), grads[0], rounded, "grad_x")
    of_norm = rounded if per_step else exact  # sums of each step are made from rounded gradients
    close(got["grad_weight"], grads[1], of_norm, "grad_weight")
    close(got["grad_bias"], grads[2], of_norm, "grad_bias")
    if v0 is not None:
        close(laid_out(got["grad_v0"], x[0]), grads[3], exact, "grad_v0")
    if decay is not None:
        close(got["grad_decay"], grads[4], 10 * exact, "grad_decay")
    if "grad_skip" in got:
        close(laid_out(got["grad_skip"], x), grads[5], rounded / 2, "grad_skip")
    return s.double().clamp(0, 1).mean().item()


# Channels-first with runs of even and odd lengths, short ones, and one channel; channels-last with many and few
# channels, odd ones too; the outputs of linear layers.
SHAPES = [
    ((2, 16, 8, 8), "first"), ((2, 5, 6, 6), "first"), ((2, 7, 5, 3), "first"), ((2, 9, 2, 2), "first"),
    ((1, 1, 24, 24), "first"), ((1, 3, 34, 36), "first"), ((3, 16, 4, 4), "last"), ((1, 160, 3, 5), "last"),
    ((2, 7, 5, 3), "last"), ((33, 24), "first"), ((9, 37), "first"), ((1, 1032, 2, 1), "last"),
]  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)
def test_matches_the_cpu_kernels(cuda_host_kernels, neuron, dtype, training):
    rates = []
    shapes = SHAPES if dtype in (torch.float32, torch.bfloat16) else SHAPES[neuron.id % 2 :: 2]
    for index, (shape, layout) in enumerate(shapes, 5 * neuron.id + DTYPES.index(dtype)):
        T = (4, 1, 7, 4, 18)[index % 5]
        rates.append(check(cuda_host_kernels, neuron, dtype, (T, *shape), layout, index, training=training))
    assert 0.05 < sum(rates) / len(rates) < 0.95


@pytest.mark.parametrize("connect", [c for c in Connect if c], ids=lambda c: c.name)
@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)
def test_residual_connections(cuda_host_kernels, neuron, connect):
    index = neuron.id
    for (shape, layout), T in itertools.product([SHAPES[0], SHAPES[2], SHAPES[6]], (4, 5, 18)):
        index += 1
        dtype = DTYPES[(index // 2 + connect) % 4]
        training, per_step = bool(index % 3), index % 4 == 0
        check(
            cuda_host_kernels, neuron, dtype, (T, *shape), layout, index, connect=connect, training=training,
            per_step=per_step and training,
        )  # fmt: skip


@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)
def test_statistics_of_each_step(cuda_host_kernels, neuron):
    for index, (shape, layout) in enumerate(SHAPES[1:4] + SHAPES[6:9]):
        dtype, T = DTYPES[index % 2], (4, 3, 5)[(index + neuron.id) % 3]
        check(cuda_host_kernels, neuron, dtype, (T, *shape), layout, index, per_step=True)
    check(cuda_host_kernels, neuron, torch.float32, (18, 2, 8, 2, 2), "last", neuron.id + 1, per_step=True)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_unaligned_pointers(cuda_host_kernels, layout):
    for index, (neuron, dtype) in enumerate(itertools.product(NEURONS, DTYPES)):
        connect = Connect.CHARGE if index % 2 else Connect.NONE
        check(cuda_host_kernels, neuron, dtype, (4, 1, 16, 8, 8), layout, index, shift=1, connect=connect)


def test_long_time(cuda_host_kernels):
    for index, connect in enumerate((Connect.NONE, Connect.CHARGE, Connect.IAND)):
        for layout, T in (("first", 100), ("last", 33)):
            for dtype in (torch.float32, torch.bfloat16):
                neuron = NEURONS[index]
                check(cuda_host_kernels, neuron, dtype, (T, 2, 8, 4, 4), layout, 5 + index, connect=connect)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_many_blocks(cuda_host_kernels, layout):
    """More rows than blocks, so that a thread's sums are over many of them."""
    shape = (4, 200, 32, 6, 8) if layout == "last" else (4, 300, 8, 6, 8)
    check(cuda_host_kernels, NEURONS[2], torch.bfloat16, shape, layout, 5)


def test_an_outlier_as_first_element(cuda_host_kernels):
    """The sums are relative to it: float64 has room for that."""
    x = (torch.randn(4, 64, 20, 3, 3, dtype=torch.float64) * 0.5).float()
    x[0, 0] += 50
    double = torch.empty(1, 20, dtype=torch.float64)
    got = call(cuda_host_kernels, STATISTICS, constants(NEURONS[0]), x, 1, {}, {"mean": double, "var": double})
    var, mean = torch.var_mean(x.double(), (0, 1, 3, 4), unbiased=False)
    assert ((got["mean"] - mean).abs() <= 1e-10 * var.sqrt()).all()
    assert ((got["var"] - var).abs() <= 1e-10 * var).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_running_statistics(cuda_host_kernels, dtype, groups):
    x = random((4, 6, 10, 3, 3), "first")
    running = torch.randn(10).to(dtype), (torch.rand(10) + 0.5).to(dtype)
    double = torch.empty(groups, 10, dtype=torch.float64)
    outputs = {"mean": double, "var": double, "running_mean": running[0], "running_var": running[1]}
    got = call(cuda_host_kernels, STATISTICS, constants(NEURONS[0]), x, groups, {}, outputs)
    want = [t.double().clone() for t in running]
    native_batch_norm.move(Running(*want, MOMENTUM), got["mean"], got["var"], x.numel() // double.numel())
    for name, t, before in zip(("running_mean", "running_var"), want, running, strict=True):
        assert not torch.equal(got[name], before)
        close(got[name].double(), t, 4 * torch.finfo(dtype).eps, name)


def test_the_scale_is_that_of_the_cpu():
    """The kernels' constants per channel are Triton's too: x * scale + shift of the same rounding."""
    x = torch.randn(2, 3, 4)
    mean, var = torch.randn(1, 4).double(), torch.rand(1, 4).double() + 0.1
    call = NormCall(x, mean, var, *(None,) * 5, Connect.NONE, EPS, constants(NEURONS[0]))
    scale, shift = triton_batch_norm._scale_and_shift(call)
    assert torch.equal(scale, (1 / (var + EPS).sqrt()).float().double())
    assert torch.equal(shift, -(mean * scale))


# ---- from Python to the kernels ----
class HostKernels:
    """Stands for ``_C`` with CUDA: takes the arguments in the order in which bindings.cpp takes them."""

    def __init__(self, library):
        self.library = library
        text = (ROOT / "csrc" / "bindings.cpp").read_text()
        names = text[text.index("#define SNNFAST_NORM_NAMES") :].split("BatchNorm norm_of")[0]
        self.names = re.findall(r"\b(\w+)\b(?=,|\s*$)", names)

    def flat(self, workspace, arguments):
        c, *rest = arguments
        given = dict(zip(self.names[1:], rest, strict=True)) | {"workspace": workspace, "division": 0}
        given["run"] = given.pop("pass")
        given |= {name: getattr(c, name) for name in ("neuron", "surrogate", "flags", "threshold", "v_reset", "tau")}
        given |= {name: getattr(c, name) for name in ("alpha", "gain", "v_init")}
        return ctypes.byref(FlatBatchNorm(**given))

    def cpu_batch_norm(self, threads, *arguments):  # the tensors lie on the CPU
        workspace = torch.empty(self.library.shim_batch_norm_workspace(self.flat(0, arguments)), dtype=torch.uint8)
        assert self.library.shim_batch_norm(self.flat(workspace.data_ptr(), arguments)) == b""


@pytest.mark.parametrize("connect", Connect, ids=lambda c: c.name)
def test_the_ops_of_the_gpu(cuda_host_kernels, connect, monkeypatch):
    """kernels.py and native_batch_norm.py, up to the extension, on gradients and states of other layouts and dtypes."""
    for index, dtype in enumerate((torch.float32, torch.bfloat16)):
        c = constants(dynamics.PARAMETRIC_LIF)
        x = random((4, 2, 8, 6, 6), "last").to(dtype)
        weight, bias = torch.rand(8) + 0.5, (torch.rand(8) * 0.5).bfloat16() if index else None
        skip = None if connect == Connect.NONE else (torch.rand(x.shape) > 0.5).to(dtype)
        v0 = torch.randn(x.shape[1:]) * 0.3
        grads = torch.randn(x.shape).to(dtype), torch.randn(x.shape[1:]) if index else None
        found = []
        for ours in (True, False):
            with monkeypatch.context() as patch:
                if ours:
                    patch.setattr(native, "_C", HostKernels(cuda_host_kernels))
                    patch.setattr(native, "_config", lambda constants: constants)
                running = Running(torch.zeros(8), torch.ones(8), 0.25)
                mean, var = kernels.statistics(x, bool(index), running)
                rest = x, mean, var, weight, bias, v0, torch.tensor(0.375)
                s, v = kernels.multi_step(*rest, skip, connect, EPS, *c)
                kept = None if connect == Connect.ADD else skip
                grads_found = kernels.multi_step_backward(*grads, *rest, kept, connect, EPS, *c, True)
                found.append([mean, var, s, v, *grads_found, *running[:2]])
        for k, (got, want) in enumerate(zip(*found, strict=True)):
            assert got.shape == want.shape
            assert got.dtype == want.dtype
            assert got.numel() == 0 or got.stride() == want.stride()
            if k in (2, 3):
                assert torch.equal(got, want)
            else:
                rounded = dtype == torch.bfloat16 and k in (4, 5, 6, 9)
                close(got, want, 8e-3 if rounded else 2e-4 if k == 8 else 1e-5, k)  # the decay's is a sum that cancels
