"""Train a small spiking network on real MNIST digits, then time its training step with and without snnfast.

The network is an ordinary convolutional one in which every ``nn.ReLU()`` became a ``LIFNode(timesteps=T)``. The plain
loop that it is timed against is the very same modules with ``backend="reference"``: PyTorch operations, step by step.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mnist_data
import numpy as np
import torch
import torch.nn.functional as F
from mnist_data import Batch
from torch import Tensor, nn

import snnfast
from snnfast import functional, surrogate
from snnfast.neuron import BaseNode as Neuron

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
except ImportError as error:
    sys.exit(f"the demo also needs matplotlib and rich ({error}): pip install matplotlib rich")

NETWORK = "3 x (conv 3 x 3, batch norm, LIF): 32 channels at 28 x 28, 16 at 14 x 14, 32 at 7 x 7; linear to 10"
LOSS_TOLERANCE = 1e-4  # relative: gradients agree to float rounding, which a few optimiser steps amplify a little
BACKENDS = {"plain loop": "reference", "snnfast": "auto"}


class Repeat(nn.Module):
    """``[B, *]`` -> ``[T * B, *]``, time first. What comes before it sees a constant input, so once is enough."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(self.timesteps, *[1] * (x.dim() - 1))


def network(timesteps: int) -> nn.Sequential:
    """Images ``[B, 1, 28, 28]`` -> logits ``[T * B, 10]``. With ``nn.ReLU()`` and no Repeat it is the usual ANN."""

    def spiking() -> nn.Module:
        return snnfast.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True, timesteps=timesteps)

    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), Repeat(timesteps), spiking()),  # 28 x 28
        *(nn.Conv2d(32, 16, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(16), spiking()),  # 14 x 14
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), spiking()),  # 7 x 7
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


def predict(net: nn.Sequential, images: Tensor) -> Tensor:
    """Logits ``[B, 10]``, averaged over time, from a fresh membrane."""
    functional.reset_net(net)
    return net(images).unflatten(0, (-1, len(images))).mean(0)


class Training:
    """A network with its optimiser and schedule; one call is one step."""

    def __init__(self, net: nn.Sequential, total_steps: int, learning_rate: float = 1e-2) -> None:
        self.net = net
        self.optimizer = torch.optim.AdamW(net.parameters(), learning_rate, weight_decay=1e-2)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, learning_rate, total_steps)

    def step(self, images: Tensor, digits: Tensor) -> tuple[Tensor, Tensor]:
        """One step on a batch; returns its loss and its share of right answers."""
        logits = predict(self.net, images)
        loss = F.cross_entropy(logits, digits)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach(), (logits.argmax(1) == digits).float().mean()


def first_losses(initial: nn.Sequential, data: Sequence[Batch], total_steps: int) -> dict[str, list[float]]:
    """Losses of the first steps with each backend: same weights, same batches."""
    losses = {}
    for name, backend in BACKENDS.items():
        net = copy.deepcopy(initial)
        functional.set_backend(net, backend)
        training = Training(net, total_steps)
        losses[name] = [training.step(*batch)[0].item() for batch in data]
    return losses


def train(initial: nn.Sequential, train_data: Batch, test_data: Batch, args: Any, console: Console) -> dict[str, Any]:
    """Train ``initial`` in place; returns accuracies by epoch and the seconds that it took."""
    per_epoch = len(train_data[0]) // args.batch_size
    training = Training(initial, args.epochs * per_epoch)
    generator = torch.Generator().manual_seed(args.seed)
    history: dict[str, Any] = {"loss": [], "train accuracy": [], "test accuracy": []}
    started = time.perf_counter()
    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=args.epochs * per_epoch)
        for epoch in range(args.epochs):
            initial.train()
            sums = torch.zeros(2, device=train_data[0].device)  # of losses and of the shares of right answers
            for batch in mnist_data.batches(train_data, args.batch_size, generator, shift=1):
                sums += torch.stack(training.step(*batch))
                progress.advance(bar)
            figures = (*(sums / per_epoch).tolist(), evaluate(initial, test_data)[0])
            for values, figure in zip(history.values(), figures, strict=True):
                values.append(figure)
            shown = "loss {:.4f}, training accuracy {:.1%}, test accuracy {:.1%}".format(*figures)
            progress.console.print(f"  epoch {epoch + 1}/{args.epochs}: {shown}")
    return history | {"training seconds": time.perf_counter() - started}


@torch.no_grad()
def evaluate(net: nn.Sequential, data: Batch, size: int = 200) -> tuple[float, list[float]]:
    """Accuracy, and the firing rate of each layer of neurons (spikes per neuron and time step)."""
    nodes = [m for m in net if isinstance(m, Neuron)]
    rates: dict[nn.Module, list[float]] = {node: [] for node in nodes}
    hooks = [node.register_forward_hook(lambda m, _, s: rates[m].append(s.mean().item())) for node in nodes]
    net.eval()
    right = 0
    for images, digits in zip(*(part.split(size) for part in data), strict=True):
        right += (predict(net, images).argmax(1) == digits).sum().item()
    for hook in hooks:
        hook.remove()
    return right / len(data[0]), [statistics.fmean(rate) for rate in rates.values()]


def modules_alone(net: nn.Sequential, images: Tensor, kind: type) -> Callable[[], None]:
    """Forward and backward of only the modules of one kind, on the inputs that they see in the network."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Only the images need no gradient.
        x = inputs[0].detach().clone().requires_grad_(inputs[0].requires_grad)
        calls.append((module, x, torch.randn_like(output)))

    hooks = [m.register_forward_hook(record) for m in net.modules() if isinstance(m, kind)]
    predict(net, images)
    for hook in hooks:
        hook.remove()

    def run() -> None:
        functional.reset_net(net)
        net.zero_grad()
        for module, x, gradient in calls:
            x.grad = None
            module(x).backward(gradient)

    return run


def measure(net: nn.Sequential, batch: Batch, repetitions: int) -> dict[str, float]:
    """Median milliseconds of each part; all are measured in turn, so that a busy machine disturbs them alike."""
    parts: dict[str, Callable[[], Any]] = {}
    for name, backend in BACKENDS.items():
        own = copy.deepcopy(net).train()
        functional.set_backend(own, backend)
        training = Training(own, repetitions + 2)
        parts[f"step, {name}"] = lambda training=training: training.step(*batch)
        parts[f"neurons, {name}"] = modules_alone(copy.deepcopy(own), batch[0], Neuron)
    for name, kind in (("convolutions", nn.Conv2d), ("batch norms", nn.BatchNorm2d)):
        parts[name] = modules_alone(copy.deepcopy(net).train(), batch[0], kind)
    synchronize = torch.cuda.synchronize if batch[0].is_cuda else lambda: None
    times: dict[str, list[float]] = {name: [] for name in parts}
    for repetition in range(repetitions + 2):
        for name, part in parts.items():
            synchronize()
            started = time.perf_counter()
            part()
            synchronize()
            if repetition >= 2:  # the first two warm up
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def print_losses(losses: dict[str, list[float]], difference: float, console: Console) -> None:
    table = Table("training step", *losses, "difference", title="Losses of the first steps, from the same weights")
    for i, (a, b) in enumerate(zip(*losses.values(), strict=True)):
        table.add_row(str(i + 1), f"{a:.7f}", f"{b:.7f}", f"{abs(a - b):.1e}")
    console.print(table)
    console.print(f"largest relative difference {difference:.1e}, allowed {LOSS_TOLERANCE:.0e}\n")


def print_times(times: dict[str, float], batch_size: int, repetitions: int, console: Console) -> None:
    title = f"One training step, batch {batch_size}: medians of {repetitions} interleaved repetitions"
    table = Table("milliseconds", *BACKENDS, "loop / snnfast", title=title)
    neurons, step = ([times[f"{part}, {name}"] for name in BACKENDS] for part in ("neurons", "step"))
    table.add_row("neurons, forward and backward", *(f"{t:.1f}" for t in neurons), f"{neurons[0] / neurons[1]:.2f} x")
    table.add_row("everything else", *(f"{s - n:.1f}" for s, n in zip(step, neurons, strict=True)), "")
    table.add_row("whole step", *(f"{t:.1f}" for t in step), f"{step[0] / step[1]:.2f} x", style="bold")
    console.print(table)
    alone = "convolutions {convolutions:.1f}, batch norms {batch norms:.1f}".format(**times)
    console.print(f"of everything else, measured alone (ms): {alone}\n")


def plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy by epoch, and a bar for each backend: neurons and the rest of a step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    epochs = range(1, len(result["test accuracy"]) + 1)
    for name, style in (("train accuracy", "o--"), ("test accuracy", "o-")):
        left.plot(epochs, 100 * np.array(result[name]), style, label=name.split()[0])
    left.set(
        xlabel="epoch", ylabel="accuracy (%)", xticks=epochs, title="5,000 MNIST images, 1,000 of them for the test"
    )
    left.legend(loc="lower right")
    times = result["milliseconds"]
    neurons, step = (np.array([times[f"{part}, {name}"] for name in BACKENDS]) for part in ("neurons", "step"))
    right.bar(list(BACKENDS), step - neurons, 0.5, label="everything else", color="0.7")
    bars = right.bar(list(BACKENDS), neurons, 0.5, bottom=step - neurons, label="neurons", color="tab:orange")
    right.bar_label(bars, [f"{t:.0f} ms" for t in step], padding=2)
    right.set(ylabel="training step (ms)", ylim=(0, 1.15 * step.max()), title=f"{step[0] / step[1]:.1f} × faster")
    right.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a training step")
    parser.add_argument("--timesteps", type=int, default=4, help="time steps T for which an image is shown")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order of images")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for mnist.png and mnist.json")
    parser.add_argument("--quick", action="store_true", help="five training steps only, to see that everything runs")
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, args.timesteps) < 1:
        parser.error("--epochs, --batch-size and --timesteps must be at least 1")
    args.epochs = 1 if args.quick else args.epochs
    return args


def run(args: argparse.Namespace, console: Console) -> int:
    """The whole demo; returns the exit code, 1 where the losses disagree."""
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_data, test_data = mnist_data.tensors(args.seed, device, 5 * args.batch_size if args.quick else None)
    if args.batch_size > len(train_data[0]):
        raise ValueError(f"--batch-size must be at most {len(train_data[0])} (all images), got {args.batch_size}")
    torch.manual_seed(args.seed)
    net = network(args.timesteps).to(device)
    result = {"snnfast": snnfast.__version__, "torch": torch.__version__, "device": str(device)}
    result |= {"threads": torch.get_num_threads(), **vars(args), "out": str(args.out), "network": NETWORK}
    result["parameters"] = sum(p.numel() for p in net.parameters())
    console.print(*(f"{name}: {value}" for name, value in result.items()), sep="\n")

    total_steps = args.epochs * (len(train_data[0]) // args.batch_size)
    first = list(mnist_data.batches(train_data, args.batch_size, torch.Generator().manual_seed(args.seed)))[:5]
    losses = first_losses(net, first, max(total_steps, 5))
    difference = max(abs(a - b) / abs(a) for a, b in zip(*losses.values(), strict=True))
    print_losses(losses, difference, console)
    if not difference < LOSS_TOLERANCE:
        console.print("snnfast and the plain loop must give the same losses; this is a bug: please report it")
        return 1

    result |= {"losses": losses, "loss difference": difference}
    result |= train(net, train_data, test_data, args, console)
    _, result["firing rates"] = evaluate(net, test_data)
    rates = ", ".join(f"{rate:.3f}" for rate in result["firing rates"])
    console.print(f"firing rates by layer: {rates} spikes per neuron and time step\n")
    repetitions = 2 if args.quick else 11
    times = result["milliseconds"] = measure(net, first[0], repetitions)
    print_times(times, args.batch_size, repetitions, console)

    args.out.mkdir(parents=True, exist_ok=True)
    plot(result, args.out / "mnist.png")
    result["speedup"] = times["step, plain loop"] / times["step, snnfast"]
    reached = {"test accuracy": (result["test accuracy"][-1], 0.96), "speedup": (result["speedup"], 1.7)}
    for name, (value, target) in reached.items() if not args.quick else ():
        verdict = "reached" if value >= target else "MISSED (is another program busy? see also python -m snnfast)"
        console.print(f"{name} {value:.3g}, target {target}: {verdict}")
    result["wall seconds"] = time.perf_counter() - started
    (args.out / "mnist.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"{args.out}/mnist.png and mnist.json written; {result['wall seconds']:.0f} s in all")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run(parse(), Console(highlight=False)))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
