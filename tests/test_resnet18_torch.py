"""The spiking ResNet-18 under torch.compile, autocast, torch.export, DDP, checkpointing and CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint as torch_checkpoint

import snnfast
from snnfast import models
from snnfast.checkpoint import checkpoint
from snnfast.models.resnet import BasicBlock

pytestmark = pytest.mark.usefixtures("one_thread")

T, B = 2, 4


def resnet(width=4, **kwargs):
    torch.manual_seed(0)
    return models.resnet18(timesteps=kwargs.pop("timesteps", T), width=width, v_threshold=0.3, **kwargs)


def data(batch=B):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 16, 16, generator=generator), torch.arange(batch) % 10


def loss_of(net, x, y):
    return F.cross_entropy(net(x).mean(0), y)


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in net.parameters()]


def check_close(got, want, rtol=1e-4):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, rtol=rtol, atol=rtol * w.abs().max().item())


# ---- torch.compile ----
def test_compile_fullgraph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net, (x, y) = resnet(), data()
    loss = loss_of(net, x, y)
    want = gradients(net, loss)
    assert all(g.abs().sum() > 0 for g in want)
    snnfast.functional.reset_net(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    counted = torch._dynamo.utils.counters["stats"]
    for _ in range(2):
        got = loss_of(compiled, x, y)
        assert torch.allclose(got, loss)
        check_close(gradients(net, got), want)
        graphs = counted["unique_graphs"]
    assert graphs == 1  # the state that a call leaves does not compile it again


@pytest.mark.slow
def test_compile_with_inductor():
    """One block: a compiler takes minutes for the whole network, whose graph the test above looks at."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, x = snnfast.to_spiking(BasicBlock(3, 3, 1), T, v_threshold=0.3).eval(), data()[0]
    with torch.no_grad():
        want = net(x)
        assert 0 < want.mean() < 1
        assert torch.allclose(torch.compile(net, fullgraph=True)(x), want, atol=1e-5)


# ---- autocast ----
def test_autocast_bfloat16():
    net, (x, y) = resnet(), data()
    seen = []
    neurons = [m for m in net.modules() if isinstance(m, snnfast.LIFNode)]
    for m in neurons:
        m.register_forward_hook(lambda m, i, o: seen.append((i[0].dtype, o.dtype, m.v.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(net, x, y)
    assert seen == [(torch.bfloat16, torch.bfloat16, torch.float32)] * len(neurons)
    assert abs(loss.item() - loss_of(net, x, y).item()) < 0.2
    grads = gradients(net, loss)
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.abs().sum() > 0 for g in grads)


# ---- torch.export ----
@pytest.mark.parametrize("width", [4, 64], ids=["narrow", "full"])
def test_export_for_any_batch_size(width, tmp_path):
    net = resnet(width, timesteps=4).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(net, (data(3)[0],), dynamic_shapes={"x": {0: batch}})
    assert sum("snnfast.multi_step" in str(n.target) for n in program.graph.nodes) == 17
    torch.export.save(program, tmp_path / "resnet18.pt2")
    loaded = torch.export.load(tmp_path / "resnet18.pt2").module()
    with torch.no_grad():
        for size in (2, 5):
            x = torch.randn(size, 3, 16, 16)
            assert torch.equal(loaded(x), net(x))
            assert torch.equal(loaded(x), net(x))  # and has no state


# ---- DDP ----
def train(net, batches, wrapped):
    """Two steps of SGD; ``batches`` are the halves of the batch that this process sees."""
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        mean = sum(loss_of(wrapped, *half) for half in batches) / len(batches)
        mean.backward()
        losses.append(mean.item())
        optimizer.step()
    return losses


def ddp_process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net = resnet()
    x, y = data()
    half = slice(rank * B // 2, (rank + 1) * B // 2)
    losses = train(net, [(x[half], y[half])], nn.parallel.DistributedDataParallel(net))
    torch.save((losses, [p.detach() for p in net.parameters()]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no torch.distributed")
def test_two_ddp_processes_train_as_one(tmp_path):
    torch.multiprocessing.spawn(ddp_process, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    net = resnet()
    x, y = data()
    # Each process has batch statistics of its own half: so does this one.
    losses = train(net, [(x[: B // 2], y[: B // 2]), (x[B // 2 :], y[B // 2 :])], net)
    assert losses == pytest.approx([(a + b) / 2 for a, b in zip(found[0][0], found[1][0], strict=True)], rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    for _, parameters in found:
        check_close(parameters, [p.detach() for p in net.parameters()])


# ---- gradient checkpointing ----
class Checkpointed(nn.Module):
    """A stage that is computed again in backward."""

    def __init__(self, stage, how):
        super().__init__()
        self.stage, self.how = stage, how

    def forward(self, x):
        return self.how(self.stage, x)


def plainly(stage, x):
    return torch_checkpoint.checkpoint(stage, x, use_reentrant=False)


def checkpointed(net, how):
    net = copy.deepcopy(net)
    for i, stage in enumerate(net.layers):
        net.layers[i] = Checkpointed(stage, how)
    return net


@pytest.mark.parametrize("how", [plainly, checkpoint], ids=["torch", "snnfast"])
def test_checkpointing_stages(how):
    net, (x, y) = resnet(), data()
    other = checkpointed(net, how)
    calls = []
    other.layers[0].stage.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, again = loss_of(net, x, y), loss_of(other, x, y)
    assert torch.equal(loss, again)
    check_close(gradients(other, again), gradients(net, loss), rtol=1e-6)
    assert len(calls) == 2  # it was computed again
    same = [torch.equal(a, b) for a, b in zip(other.buffers(), net.buffers(), strict=True)]
    assert all(same) == (how is checkpoint)  # torch's updates running statistics twice


def test_checkpointing_spikingjelly_neurons():
    theirs = pytest.importorskip("spikingjelly.activation_based", reason="spikingjelly is not installed")
    from spikingjelly.activation_based import functional, neuron

    assert theirs
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), neuron.LIFNode(step_mode="m")), 3 * torch.randn(5, 2, 3)
    found = []
    for run in (net, lambda x: checkpoint(net, x)):
        functional.reset_net(net)
        loss = run(x).sum() + run(x + 1).sum()  # the second call goes on from the first one's state
        found.append([*gradients(net, loss), net[1].v.detach().clone()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][0].abs().sum() > 0


def test_checkpointing_with_state_across_forwards():
    net, (x, y) = resnet(), data()
    net.auto_reset = False
    other = checkpointed(net, checkpoint)
    for _ in range(2):  # the second forward goes on from the first one's state
        loss, again = loss_of(net, x, y), loss_of(other, x, y)
        assert torch.equal(loss, again)
        check_close(gradients(other, again), gradients(net, loss), rtol=1e-6)
        states = [[m.v for m in n.modules() if isinstance(m, snnfast.LIFNode)] for n in (net, other)]
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
        for n in (net, other):
            snnfast.functional.detach_net(n)
    wrong = checkpointed(net, plainly)
    loss = loss_of(wrong, x, y)
    with pytest.raises(RuntimeError, match=r"auto_reset=False was called again by torch.utils.checkpoint"):
        loss.backward()
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got function"):
        checkpoint(plainly, x)


# ---- CUDA graphs ----
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_graph_replays_the_forward():
    net, (x, _) = resnet().cuda().eval(), data()
    static = x.cuda()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            net(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = net(static)
        other = torch.randn_like(static)
        static.copy_(other)
        graph.replay()
        assert torch.equal(out, net(other))
        graph.replay()
        assert torch.equal(out, net(other))
