"""What only a GPU can show: streams, device guards, graph capture, sizes beyond 2^31. Parity runs in test_parity.py."""

from __future__ import annotations

import pytest
import torch

import snnfast
from snnfast import backends, dynamics, functional, surrogate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture(params=["native", "triton"])
def backend(request):
    reason = backends.KERNELS[backends.NAMES.index(request.param) - 1].missing(torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def test_auto_takes_the_native_kernels():
    assert backends.choose("auto", torch.device("cuda", 0)) == backends.NATIVE


def test_the_current_stream_is_used(backend):
    x = torch.zeros(4, 1 << 22, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.fill_(2.0)  # seen only by work on the same stream
        s, _, _ = functional.if_multi_step(x, backend=backend)
    stream.synchronize()
    assert bool((s == 1).all())


def test_cuda_graph_capture(backend):
    x = torch.randn(4, 1000, device="cuda")
    v = torch.zeros(1000, device="cuda")
    functional.lif_multi_step(x, v, 3.0, backend=backend)  # warm up before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        s, v_last, _ = functional.lif_multi_step(x, v, 3.0, backend=backend)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        graph.replay()
        want = functional.lif_multi_step(x.cpu(), v.cpu(), 3.0, backend="reference")
        assert torch.equal(s.cpu(), want[0])
        assert torch.equal(v_last.cpu(), want[1])


def test_a_training_step_in_a_graph():
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), snnfast.LIFNode(step_mode="m")).cuda()
    x = torch.randn(4, 2, 8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            functional.reset_net(net)
            net.zero_grad()
            net(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    want = net[0].weight.grad.clone()
    graph = torch.cuda.CUDAGraph()
    functional.reset_net(net)
    net.zero_grad()
    with torch.cuda.graph(graph):
        net(x).sum().backward()
    graph.replay()
    assert torch.allclose(net[0].weight.grad, want, rtol=1e-4, atol=1e-5)


def test_the_plain_loop_compiles_whole():
    def loop(x):
        return dynamics.multi_step(dynamics.LIF, x, 0.0, dynamics.Parameters(1.0, 0.0, surrogate.ATan(), 3.0))[0]

    x = torch.randn(4, 64, device="cuda")
    assert torch.equal(torch.compile(loop, fullgraph=True, backend="eager")(x), loop(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_guard(backend):
    x = torch.randn(4, 100, device="cuda:1")
    with torch.cuda.device(0):
        s, _, _ = functional.if_multi_step(x, backend=backend)
    assert s.device == x.device
    assert torch.cuda.current_device() == 0
    assert torch.equal(s.cpu(), functional.if_multi_step(x.cpu(), backend="reference")[0])


def test_more_than_two_to_the_31_elements(backend):
    T, N = 3, (1 << 30) + 5
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    x = torch.empty(T, N, device="cuda", dtype=torch.bfloat16).fill_(0.375)
    s, v, _ = functional.if_multi_step(x, backend=backend)
    assert bool((s[2] == 1).all())
    assert not bool((s[:2] != 0).any())
    assert bool((v == 0).all())
