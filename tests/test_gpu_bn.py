"""Batch norm and neuron in one on a GPU, by both backends: against the CPU kernels, and what only a GPU can show."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import snnfast
from snnfast import backends, dynamics
from snnfast.dynamics import DECAY_INPUT, SOFT_RESET, Constants
from snnfast.fused import BatchNormNode, fuse
from snnfast.fused.ops import Connect

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.skipif(
        backends.native.missing(torch.device("cpu")) is not None, reason="the compiled extension is not built here"
    ),
]
NEURONS = [n for n in dynamics.NEURONS if not n.own]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [
    ((4, 6, 64, 16, 16), True), ((4, 6, 64, 16, 16), False), ((4, 3, 17, 7, 9), True), ((7, 3, 17, 7, 9), False),
    ((4, 100, 30), False), ((33, 4, 16, 4, 4), True), ((4, 70, 512, 7, 7), True), ((4, 300, 32, 8, 8), False),
]  # fmt: skip


@pytest.fixture(params=["native", "triton"], autouse=True)
def backend(request, monkeypatch):
    reason = backends.KERNELS[backends.NAMES.index(request.param) - 1].missing(torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    monkeypatch.setenv("SNNFAST_BACKEND", request.param)
    backends.forget_choices()
    # The CPU stays with its kernels.
    backends._chosen["auto", torch.device("cpu")] = backends.NATIVE
    yield request.param
    backends.forget_choices()


def laid_out(t, last):
    return t.movedim(2, -1).contiguous().movedim(-1, 2) if last else t


def close(got, want, tolerance):
    want = want.double()
    return (got.cpu().double() - want).norm() <= tolerance * want.norm() + 1e-9


def on_gpu(values):
    return [t.cuda() if isinstance(t, torch.Tensor) else t for t in values]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)
def test_matches_the_cpu_kernels(backend, neuron, dtype, training):
    state = dynamics.state_dtype(dtype)
    for index, (shape, last) in enumerate(SHAPES):
        flags = (DECAY_INPUT, 0, DECAY_INPUT | SOFT_RESET)[index % 3]
        c = Constants(neuron.id, index % 8, flags, 0.75, 0.0, (2.0, 3.0)[index % 2], 2.0, 1.25, 0.0, 0.0)
        connect, per_step = Connect((index + neuron.id) % 5), training and index % 4 == 3
        x = laid_out(torch.randn(shape) * 1.7 + 0.5, last).to(dtype)
        weight, bias = torch.rand(shape[2]) + 0.5, torch.rand(shape[2]) * 0.5
        skip = None if connect == Connect.NONE else laid_out(torch.rand(shape) > 0.5, last).to(dtype)
        v0 = laid_out(torch.randn(shape) * 0.3, last)[0].to(state) if index % 2 else None
        decay = torch.tensor(0.375, dtype=state) if neuron.learnable else None
        grads = laid_out(torch.randn(shape), last).to(dtype), laid_out(torch.randn(shape), last)[0].to(state)
        groups = shape[0] if per_step else 1
        if training:
            mean, var = torch.ops.snnfast.bn_statistics(x, per_step)
            found = torch.ops.snnfast.bn_statistics(x.cuda(), per_step)
            assert torch.allclose(found[0].cpu(), mean, rtol=1e-11, atol=1e-11)
            assert torch.allclose(found[1].cpu(), var, rtol=1e-10, atol=0)
        else:
            mean, var = torch.randn(groups, shape[2]).double(), torch.rand(groups, shape[2]).double() + 1.0
        rest = x, mean, var, weight, bias, v0, decay, skip, connect, 1e-5, *c
        s, v = torch.ops.snnfast.bn_multi_step(*rest)
        got = torch.ops.snnfast.bn_multi_step(*on_gpu(rest))
        assert got[0].stride() == s.stride()
        if backend == "native":
            assert torch.equal(got[0].cpu(), s)
            assert torch.equal(got[1].cpu(), v)
        else:  # torch makes the constants there, and may round 1 / sqrt otherwise
            assert (got[0].cpu() != s).double().mean() < 1e-4
        if connect == Connect.ADD:
            rest = *rest[:7], None, *rest[8:]
        want = torch.ops.snnfast.bn_multi_step_backward(*grads, *rest, training)
        first, again = (torch.ops.snnfast.bn_multi_step_backward(*on_gpu((*grads, *rest)), training) for _ in range(2))
        rounded = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 5e-5, torch.float64: 1e-10}[dtype]
        exact = 1e-10 if dtype == torch.float64 else 1e-4
        for k, (g, a, w) in enumerate(zip(first, again, want, strict=True)):
            assert torch.equal(g, a), "the same call gave other bits"
            assert g.shape == w.shape
            of_norm = max(rounded, exact) if per_step else exact  # sums of each step are made from rounded gradients
            tolerance = rounded if k in (0, 5) else of_norm if k in (1, 2) else exact
            assert close(g, w, tolerance), (k, shape, connect)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("connect", [None, "CHARGE", "IAND"])
def test_modules(connect, memory_format, count_fused):
    x = (torch.randn(4 * 6, 32, 10, 10) + 0.7).contiguous(memory_format=memory_format)
    skip = (torch.rand_like(x) > 0.5).float()
    node = BatchNormNode(nn.BatchNorm2d(32), snnfast.ParametricLIFNode(timesteps=4), connect=connect)
    found = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(node).to(device)
        given = [t.detach().to(device).requires_grad_() for t in ([x, skip] if connect else [x])]
        s = model(*given)
        (s * torch.linspace(-1, 1, s.numel(), device=device).view(s.shape)).sum().backward()
        found.append([s, *(t.grad for t in given), *(p.grad for p in model.parameters()), *model.buffers()])
    assert len(count_fused) == 2
    assert (found[0][0] != found[1][0].cpu()).float().mean() < 1e-4
    assert all(close(g, w, 1e-3) for w, g in zip(*found, strict=True))


def test_a_fused_network_in_a_graph():
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), snnfast.LIFNode(timesteps=4), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8),
        snnfast.LIFNode(timesteps=4),
    ).cuda()  # fmt: skip
    assert len(fuse(net).fused) == 2
    x = torch.randn(4 * 2, 3, 12, 12, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            snnfast.functional.reset_net(net)
            net.zero_grad()
            net(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    want = [p.grad.clone() for p in net.parameters()]
    graph = torch.cuda.CUDAGraph()
    snnfast.functional.reset_net(net)
    net.zero_grad()
    with torch.cuda.graph(graph):
        net(x).sum().backward()
    graph.replay()
    assert all(torch.allclose(p.grad, w, rtol=1e-3, atol=1e-4) for p, w in zip(net.parameters(), want, strict=True))


def test_the_current_stream_is_used():
    x = torch.zeros(4 * 64, 64, 32, 32, device="cuda")
    node = BatchNormNode(nn.BatchNorm2d(64), snnfast.IFNode(timesteps=4)).cuda().eval()
    node(x)
    snnfast.functional.reset_net(node)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(200_000_000)
        x.fill_(2.0)  # seen only by work on the same stream
        s = node(x)
    stream.synchronize()
    assert bool((s == 1).all())


def test_more_than_two_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GiB of GPU memory")
    x = torch.empty(4, 2**9 + 1, 2**8, 2**6, 2**6, device="cuda", dtype=torch.bfloat16).fill_(0.5)
    x[0, 0, :, 0, 0] = 1.5
    mean, var = torch.ops.snnfast.bn_statistics(x, False)
    count = x.numel() // 2**8
    assert torch.allclose(mean.cpu(), torch.full((1, 2**8), 0.5 + 1 / count, dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(var.cpu(), torch.full((1, 2**8), (1 - 1 / count) / count, dtype=torch.float64), rtol=1e-6)
    c = Constants(0, 1, 0, 1.75, 0.0, 2.0, 2.0, 1.0, 0.0, 0.0)
    s, v = torch.ops.snnfast.bn_multi_step(
        x, torch.zeros_like(mean), torch.ones_like(var), None, None, None, None, None, 0, 0.0, *c
    )
    assert not bool(s[:2, 1:].any())
    assert bool((s[3, 1:] == 1).all())
    assert bool((v[1:] == 0).all())
