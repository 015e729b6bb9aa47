"""The spiking ResNet-18 with PyTorch's own tools, a few lines for each.

    python examples/resnet18_torch.py compile | autocast | export | ddp | checkpoint | cuda-graph [--width 64]

A network of snnfast.models, as any that snnfast.to_spiking makes, starts each forward from the initial state: there is
no reset to remember inside a compiled, exported or captured program.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snnfast import models
from snnfast.checkpoint import checkpoint

T, BATCH = 4, 8


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return models.resnet18(timesteps=T, width=width, v_threshold=0.5)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))


def with_compile(width: int) -> None:
    net, (x, y) = network(width), data()
    compiled = torch.compile(net, fullgraph=True)  # one graph, the fused neurons are nodes of it
    loss = F.cross_entropy(compiled(x).mean(0), y)
    loss.backward()
    print(f"loss {loss.item():.4f}, eager {F.cross_entropy(net(x).mean(0), y).item():.4f}")


def with_autocast(width: int) -> None:
    net, (x, y) = network(width), data()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # spikes in bfloat16, potentials in float32
        loss = F.cross_entropy(net(x).mean(0).float(), y)
    loss.backward()
    print(f"loss {loss.item():.4f}, in float32 {F.cross_entropy(net(x).mean(0), y).item():.4f}")


def with_export(width: int) -> None:
    net, (x, _) = network(width).eval(), data()
    batch = torch.export.Dim("batch", min=2, max=1024)
    with torch.no_grad():  # for inference: the neurons are plain ops of the program
        program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: batch}})
    with tempfile.NamedTemporaryFile(suffix=".pt2") as file:
        torch.export.save(program, file.name)
        loaded = torch.export.load(file.name).module()  # needs `import snnfast`, which registers the op
    difference = (loaded(x[:3]) - net(x[:3])).abs().max().item()
    print(f"{len(program.graph.nodes)} nodes; largest difference from the network: {difference}")


def ddp_process(rank: int, width: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    net = nn.parallel.DistributedDataParallel(network(width))
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    torch.manual_seed(rank)  # each process its own data
    x, y = data()
    for step in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x).mean(0), y)
        loss.backward()
        optimizer.step()
        print(f"process {rank}, step {step}: loss {loss.item():.4f}", flush=True)
    torch.distributed.destroy_process_group()


def with_ddp(width: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(ddp_process, (width, f"{folder}/store"), nprocs=2)


class Checkpointed(nn.Module):
    """A stage whose activations are computed again in backward instead of kept."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.stage, x)


def with_checkpoint(width: int) -> None:
    def step(net: nn.Module) -> tuple[float, float]:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            loss = F.cross_entropy(net(x).mean(0), y)
        loss.backward()
        return loss.item(), sum(kept) / 2**20

    (x, y), net = data(), network(width)
    loss, memory = step(net)
    net.layers = nn.ModuleList(map(Checkpointed, net.layers))
    again, less = step(net)
    print(f"loss {loss:.4f} keeping {memory:.1f} MiB; checkpointed {again:.4f} keeping {less:.1f} MiB")


def with_cuda_graph(width: int) -> None:
    if not torch.cuda.is_available():
        print("skipped: no CUDA device here")
        return
    net, x = network(width).cuda().eval(), data()[0].cuda()
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            net(x)  # kernels are chosen and loaded before the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = net(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        print(f"largest difference from the network: {(logits - net(x)).abs().max().item()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tools = {
        name.removeprefix("with_").replace("_", "-"): f for name, f in globals().items() if name.startswith("with_")
    }
    parser.add_argument("tool", choices=tools)
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage; 64 is ResNet-18")
    arguments = parser.parse_args()
    tools[arguments.tool](arguments.width)


if __name__ == "__main__":
    main()
