"""Distillation on real MNIST digits, then the time of a training step with and without snnfast.

One function makes every network. With ReLU and more channels it is the teacher, an ordinary ANN. With fewer channels
and ``snnfast.to_spiking``, which puts a spiking neuron in place of each ReLU, it is the student. The student is trained
four times from the same weights, on the same images in the same order:

    plain SNN     with the labels alone
    response KD   and with the teacher's softened answers         (KDSNN, Xu et al., CVPR 2023)
    feature KD    and with the teacher's features                 (the same paper)
    TSSD          and with itself: with twice the time steps, and from a classifier on an inner layer, both of which are
                  gone at inference                               (Zuo et al., arXiv 2406.07862)

Every student has TSSD's neuron: LIF whose input does not decay, soft reset, rectangular surrogate.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mnist_data
import torch
import torch.nn.functional as F
from mnist_data import Batch
from torch import Tensor, nn

import snnfast
from snnfast import analysis, surrogate
from snnfast.distill import DistillationLoss, Distiller, FeatureKD, LogitKD, SpatialSelfKD, TemporalSelfKD

try:
    import mnist_timing
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
except ImportError as error:
    sys.exit(f"the demo also needs matplotlib and rich ({error}): pip install matplotlib rich")

NETWORK = "3 x (conv 3 x 3, batch norm, ReLU or neuron) at 28 x 28, 14 x 14, 7 x 7; linear to 10"
TEACHER, STUDENT = (64, 32, 64), (32, 16, 32)  # channels of the three
TEACHER_NAME = "teacher (ANN)"
NEURON = {"decay_input": False, "v_reset": None, "surrogate_function": surrogate.Rect(), "detach_reset": True}
LossAndLogits = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # images and digits -> loss, logits [B, 10]


# ---- the networks, and what the student learns from ----
def network(channels: Sequence[int]) -> nn.Sequential:
    """An ANN: images ``[B, 1, 28, 28]`` -> logits ``[B, 10]``."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (before, after) in enumerate(zip((1, *channels), channels, strict=False)):
        conv = nn.Conv2d(before, after, 3, padding=1, stride=1 if i == 0 else 2, bias=False)
        parts[f"block{i + 1}"] = nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())
    parts["head"] = nn.Sequential(nn.Flatten(), nn.Linear(channels[-1] * 7 * 7, mnist_data.CLASSES))
    return nn.Sequential(parts)


def new_student(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """An SNN: images ``[B, 1, 28, 28]`` -> logits ``[T, B, 10]``; the same weights for the same seed."""
    torch.manual_seed(args.seed)
    return snnfast.to_spiking(network(STUDENT), args.timesteps, snnfast.LIFNode, **NEURON).to(device)


def methods(timesteps: int) -> dict[str, tuple[list[DistillationLoss], float]]:
    """The losses of each training, and the weight of the labels' cross-entropy beside them."""
    return {
        "plain SNN": ([], 1.0),
        "response KD": ([LogitKD(temperature=4.0, weight=0.7)], 0.3),
        "feature KD": ([FeatureKD({"block2": "block2", "block3": "block3"}, weight=1.0)], 1.0),
        "TSSD": (
            [
                TemporalSelfKD(2 * timesteps, timesteps, temperature=2.0, weight=1.0),
                SpatialSelfKD({"block2": mnist_data.CLASSES}, temperature=2.0, weight=0.1),
            ],
            1.0,
        ),
    }


def from_labels(ann: nn.Module) -> LossAndLogits:
    """The loss of the teacher's own training."""

    def loss_of(images: Tensor, digits: Tensor) -> tuple[Tensor, Tensor]:
        logits = ann(images)
        return F.cross_entropy(logits, digits), logits

    return loss_of


def distilled(distiller: Distiller) -> LossAndLogits:
    """The loss of a student's training."""

    def loss_of(images: Tensor, digits: Tensor) -> tuple[Tensor, Tensor]:
        result = distiller(images, digits)
        return result.loss, result.logits

    return loss_of


# ---- training and testing ----
class Training:
    """A loss with its optimiser and schedule; one call is one step."""

    def __init__(
        self, loss_of: LossAndLogits, parameters: Iterable[Tensor], steps: int, learning_rate: float = 1e-2
    ) -> None:
        self.loss_of = loss_of
        self.optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=1e-2)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, learning_rate, steps)

    def __call__(self, images: Tensor, digits: Tensor) -> tuple[Tensor, Tensor]:
        """One step on a batch; returns its loss and its share of right answers."""
        loss, logits = self.loss_of(images, digits)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach(), (logits.argmax(1) == digits).float().mean()


def plain_training(net: nn.Module, steps: int) -> Training:
    """Without any distillation: what the plain loop and snnfast are timed with."""
    distiller = Distiller(net)
    return Training(distilled(distiller), distiller.parameters(), steps)


def train(
    name: str,
    trained: nn.Module,
    loss_of: LossAndLogits,
    tested: nn.Module,
    data: tuple[Batch, Batch],
    args: argparse.Namespace,
    console: Console,
) -> dict[str, Any]:
    """Train the parameters of ``trained``, test ``tested`` after each epoch; returns accuracies and seconds."""
    train_data, test_data = data
    per_epoch = len(train_data[0]) // args.batch_size
    step = Training(loss_of, trained.parameters(), args.epochs * per_epoch)
    generator = torch.Generator().manual_seed(args.seed)  # the same order and shifts of images for every network
    history: dict[str, Any] = {"loss": [], "train accuracy": [], "test accuracy": []}
    seconds = 0.0
    with Progress(console=console) as progress:
        bar = progress.add_task(name, total=args.epochs * per_epoch)
        for epoch in range(args.epochs):
            started = time.perf_counter()
            trained.train()
            sums = torch.zeros(2, device=train_data[0].device)  # of losses and of the shares of right answers
            for batch in mnist_data.batches(train_data, args.batch_size, generator, shift=1):
                sums += torch.stack(step(*batch))
                progress.advance(bar)
            figures = (sums / per_epoch).tolist()
            seconds += time.perf_counter() - started
            right = answers(tested, test_data)
            for values, figure in zip(history.values(), (*figures, right.float().mean().item()), strict=True):
                values.append(figure)
            shown = "loss {:.4f}, training accuracy {:.1%}, test accuracy {:.1%}".format(*figures, right.float().mean())
            progress.console.print(f"  epoch {epoch + 1}/{args.epochs}: {shown}")
    return history | {"training seconds": seconds, "right": right}


@torch.no_grad()
def answers(net: nn.Module, data: Batch, size: int = 200) -> Tensor:
    """Whether each image is answered right, ``[N]``; an SNN's answer is its mean over time."""
    net.eval()
    logits = [net(images) for images in data[0].split(size)]
    return torch.cat([y if y.dim() == 2 else y.mean(0) for y in logits]).argmax(1) == data[1]


def costs(net: nn.Module, data: Batch, size: int = 200) -> dict[str, Any]:
    """Parameters and, per test image, operations; of an SNN its firing rates too (spikes per neuron and time step)."""
    found: dict[str, Any] = {"parameters": analysis.parameter_table(net).parameters}
    if isinstance(net, snnfast.convert.SpikingNetwork):
        with analysis.FiringRateMonitor(net) as monitor:
            report = analysis.count_synops(net, data[0].split(size))
        found |= {"firing rate": monitor.mean(), "firing rates": monitor.rates()}
    else:
        report = analysis.count_synops(net, data[0].split(size))
    return found | {key: report.to_dict()[key] for key in ("macs", "acs", "dense", "energy_pj", "energy_source")}


# ---- the report ----
def print_table(networks: dict[str, dict[str, Any]], console: Console) -> None:
    """Accuracy beside cost."""
    table = Table(pad_edge=False, title="One training each; operations of one test image")
    table.add_column("network", no_wrap=True)
    for head in ("test\naccuracy", "against\nplain", "firing\nrate", "MACs\n(10⁶)", "ACs\n(10⁶)", "params", "time"):
        table.add_column(head, justify="right")
    for name, n in networks.items():
        spiking = "firing rate" in n
        table.add_row(
            name,
            f"{n['test accuracy'][-1]:.1%}",
            "+{} -{}".format(*n["against plain"]) if name != "plain SNN" else "",
            f"{n['firing rate']:.3f}" if spiking else "",
            f"{(n['macs'] if spiking else n['dense']) / 1e6:.2f}",
            f"{n['acs'] / 1e6:.2f}" if spiking else "",
            f"{n['parameters']:,}",
            f"{n['training seconds']:.0f} s",
        )
    console.print(table)


def print_reading(networks: dict[str, dict[str, Any]], tests: int, console: Console) -> None:
    """What the table means, and what it does not show."""
    teacher, plain = networks[TEACHER_NAME], networks["plain SNN"]
    low, high = analysis.wilson_interval(plain["test accuracy"][-1], tests)
    lines = (
        f"against plain: of {tests} test images, +those only this network and -those only the plain SNN answers right",
        "MAC: a multiplication, where a layer sees grey values or activations; of the teacher's, "
        f"{1 - teacher['macs'] / teacher['dense']:.0%} meet a zero",
        "AC: an addition, a synaptic operation: a spike meets a weight; all time steps together",
        f"as an ANN, the student's network would take {plain['ann macs'] / 1e6:.2f} million MACs",
        f"One seed and {tests} test images: the 95 % interval of the plain SNN's accuracy alone is {low:.1%} to "
        f"{high:.1%}. A difference of some tenths of a point is noise, whichever way it goes:",
    )
    console.print(*lines, sep="\n")
    for name, n in networks.items():
        if name not in (TEACHER_NAME, "plain SNN"):
            points = 100 * (n["test accuracy"][-1] - plain["test accuracy"][-1])
            # Were both equally good, each image that only one gets right would be a coin toss: an exact sign test.
            p = sign_test(*n["against plain"])
            verdict = "beyond" if p < 0.05 else "within"
            console.print(
                f"  {name}: {points:+.1f} points, {verdict} the noise of the test images (sign test, p = {p:.2f})"
            )
    console.print("Another seed adds its own noise; python -m benchmarks.distillation compares over several.\n")


def sign_test(gained: int, lost: int) -> float:
    """Probability of so uneven a split, or a more uneven one, if both were equally likely (two-sided, exact)."""
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy by epoch, operations of one image, and a bar for each backend: neurons and the rest of a step."""
    figure = Figure(figsize=(13, 3.8), dpi=150, layout="constrained")
    accuracy, operations, step_time = figure.subplots(1, 3)
    networks = result["networks"]
    for name, n in networks.items():
        style = "ko--" if name == TEACHER_NAME else "o-"
        epochs = range(1, len(n["test accuracy"]) + 1)
        accuracy.plot(epochs, [100 * a for a in n["test accuracy"]], style, markersize=4, label=name)
    accuracy.set(xlabel="epoch", ylabel="test accuracy (%)", xticks=epochs, title="5,000 MNIST images, one seed")
    accuracy.legend(loc="lower right")

    macs = [(n["macs"] if "firing rate" in n else n["dense"]) / 1e6 for n in networks.values()]
    acs = [n["acs"] / 1e6 if "firing rate" in n else 0.0 for n in networks.values()]
    operations.barh(list(networks), macs, color="0.7", label="multiplications (MACs)")
    operations.barh(list(networks), acs, left=macs, color="tab:blue", label="additions (ACs)")
    operations.invert_yaxis()
    operations.set(
        xlabel="million operations for one image",
        xlim=(0, 1.05 * max(macs)),
        title=f"inference, T = {result['timesteps']}",
    )
    operations.legend(loc="lower right")

    times = result["milliseconds"]
    backends = list(mnist_timing.BACKENDS)
    neurons, steps = ([times[f"{part}, {name}"] for name in backends] for part in ("neurons", "step"))
    rest = [s - n for s, n in zip(steps, neurons, strict=True)]
    step_time.bar(backends, rest, 0.5, label="everything else", color="0.7")
    bars = step_time.bar(backends, neurons, 0.5, bottom=rest, label="neurons", color="tab:orange")
    step_time.bar_label(bars, [f"{t:.0f} ms" for t in steps], padding=2)
    step_time.set(ylabel="training step (ms)", ylim=(0, 1.15 * max(steps)), title=f"{result['speedup']:.1f} × faster")
    step_time.legend()
    figure.savefig(path)


# ---- the command ----
def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--epochs", type=int, default=6, help="passes over the training images (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a training step (default %(default)s)")
    parser.add_argument("--timesteps", type=int, default=4, help="T, for which an image is shown (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and order of images (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="for mnist.png and mnist.json (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="five steps of each training, to see that everything runs")
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, args.timesteps) < 1:
        parser.error("--epochs, --batch-size and --timesteps must be at least 1")
    args.epochs = 1 if args.quick else args.epochs
    return args


def train_all(args: argparse.Namespace, data: tuple[Batch, Batch], console: Console) -> dict[str, dict[str, Any]]:
    """The teacher, then each student; returns what was measured of each, by name."""
    device = data[0][0].device
    torch.manual_seed(args.seed)
    teacher = network(TEACHER).to(device)
    networks = {TEACHER_NAME: train(TEACHER_NAME, teacher, from_labels(teacher), teacher, data, args, console)}
    networks[TEACHER_NAME] |= costs(teacher, data[1])
    for name, (losses, task_weight) in methods(args.timesteps).items():
        student = new_student(args, device)
        distiller = Distiller(student, teacher, losses, task_weight=task_weight, example_inputs=data[0][0][:8])
        networks[name] = train(name, distiller, distilled(distiller), student, data, args, console)
        networks[name] |= costs(student, data[1])
    plain = networks["plain SNN"]["right"]
    for n in networks.values():
        right = n.pop("right")
        n["against plain"] = [int((right & ~plain).sum()), int((plain & ~right).sum())]
    networks["plain SNN"]["ann macs"] = analysis.count_synops(network(STUDENT).to(device), data[1][0][:1]).dense
    return networks


def run(args: argparse.Namespace, console: Console) -> int:
    """The whole demo; returns the exit code, 1 where the losses of both backends disagree."""
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = mnist_data.tensors(args.seed, device, 5 * args.batch_size if args.quick else None)
    images = len(data[0][0])
    if args.batch_size > images:
        raise ValueError(f"--batch-size must be at most {images} (all images), got {args.batch_size}")
    result = {"snnfast": snnfast.__version__, "torch": torch.__version__, "device": str(device)}
    result |= {"threads": torch.get_num_threads(), **vars(args), "out": str(args.out)}
    result |= {"network": NETWORK, "teacher channels": TEACHER, "student channels": STUDENT}
    result["student neuron"] = " ".join(repr(snnfast.LIFNode(timesteps=args.timesteps, **NEURON)).split())
    console.print(*(f"{name}: {value}" for name, value in result.items()), sep="\n")

    result["networks"] = networks = train_all(args, data, console)
    print_table(networks, console)
    print_reading(networks, len(data[1][0]), console)
    generator = torch.Generator().manual_seed(args.seed)
    first = list(mnist_data.batches(data[0], args.batch_size, generator))[:5]
    repetitions = 2 if args.quick else 11
    result |= mnist_timing.compare(new_student(args, device), first, plain_training, repetitions, console)

    args.out.mkdir(parents=True, exist_ok=True)
    plot(result, args.out / "mnist.png")
    accuracy = networks["plain SNN"]["test accuracy"][-1]
    reached = {"test accuracy of the plain SNN": (accuracy, 0.96), "speedup": (result["speedup"], 1.7)}
    for name, (value, target) in reached.items() if not args.quick else ():
        verdict = "reached" if value >= target else "MISSED (is another program busy? see also python -m snnfast)"
        console.print(f"{name} {value:.3g}, target {target}: {verdict}")
    result["wall seconds"] = time.perf_counter() - started
    (args.out / "mnist.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"{args.out}/mnist.png and mnist.json written; {result['wall seconds']:.0f} s in all")
    if not result["loss difference"] < mnist_timing.LOSS_TOLERANCE:
        console.print("snnfast and the plain loop must give the same losses; this is a bug: please report it")
        return 1
    return 0


if __name__ == "__main__":
    if not torch.cuda.is_available():
        snnfast.keep_freed_memory()  # loop and snnfast alike; 100 s for the whole demo, 178 without, on two cores
    try:
        sys.exit(run(parse(), Console(highlight=False)))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
