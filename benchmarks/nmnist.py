"""Does self-distillation help on event data? N-MNIST, T = 8, TSSD against plain training, cross-validated in pairs.

Recordings are cut into 8 spans of time and counted on 17 x 17 pixels; the temporal teacher runs 16 steps, the 8 frames
played twice. In the variants named ``half`` they are cut into 16 spans, of which the student sees the first 8 and the
temporal teacher all: here it knows more. Every recording is tested once, by a network that was trained on the other
four fifths; plain training and each method start from the same weights and see the same recordings in the same order.
What is compared is the last epoch. The numbers of the losses are the library's defaults, none was tuned on these
recordings.

Every finished (variant, fold) is a JSON file in the output folder and is not run again: start it anew to go on.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import snnfast
from snnfast import analysis, functional, surrogate
from snnfast.distill import DistillationLoss, Distiller, SpatialSelfKD, TemporalSelfKD
from snnfast.train import formats
from snnfast.train.objective import repeated

from . import paired
from .measure import RESULTS, environment

T, T_TEACHER, CLASSES, SIDE = 8, 16, 10, 17
BATCH, LEARNING_RATE, WEIGHT_DECAY = 40, 5e-3, 1e-2
CHANNELS = (16, 32, 32)  # at 9 x 9, 9 x 9, 5 x 5
FOLDS = 5
OPERATIONS_SAMPLES = 100


def network() -> nn.Sequential:
    """Event counts ``[T, B, 2, 17, 17]`` -> logits ``[T * B, 10]``, with TSSD's LIF neuron."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(fold=nn.Flatten(0, 1))
    before = 2
    for i, (width, stride) in enumerate(zip(CHANNELS, (2, 1, 2), strict=True), 1):
        parts[f"conv{i}"] = nn.Conv2d(before, width, 3, padding=1, stride=stride, bias=False)
        parts[f"norm{i}"] = nn.BatchNorm2d(width)
        parts[f"spike{i}"] = snnfast.LIFNode(
            decay_input=False, v_reset=None, surrogate_function=surrogate.Rect(), timesteps=T
        )
        before = width
    parts["flatten"], parts["head"] = nn.Flatten(), nn.Linear(before * 25, CLASSES)
    return nn.Sequential(parts)


def variants() -> dict[str, list[DistillationLoss]]:
    temporal, spatial = TemporalSelfKD(T_TEACHER, T), SpatialSelfKD({"spike2": CLASSES})
    return {
        "plain": [],
        "tssd": [temporal, spatial],
        "temporal": [temporal],
        "spatial": [spatial],
        "half-plain": [],
        "half-tssd": [temporal, spatial],
        "half-temporal": [temporal],
    }


def plain_of(name: str) -> str:
    """The variant that ``name`` is compared with."""
    return "half-plain" if name.startswith("half") else "plain"


# ---- data ----
def load(folder: Path) -> tuple[Tensor, Tensor]:
    """All recordings of both splits as counts ``[N, 16, 2, 17, 17]``, and their digits ``[N]``."""
    frames, digits = [], []
    for train in (True, False):
        for name, digit, content in formats.recordings(folder, train):
            events = formats.read_nmnist_events(content, name)
            frames.append(formats.events_to_frames(events, T_TEACHER, (SIDE, SIDE), (34, 34)))
            digits.append(digit)
    return torch.from_numpy(np.stack(frames)).float(), torch.tensor(digits)


def seen(name: str, frames: Tensor) -> tuple[Tensor, Tensor]:
    """What the student sees of recordings ``[N, 16, *]``, ``[N, 8, *]``, and what it sees with the temporal teacher."""
    if name.startswith("half"):
        return frames[:, :T], frames
    whole = frames.unflatten(1, (T, -1)).sum(2)  # two spans of sixteen are one of eight
    return whole, repeated(whole.transpose(0, 1), T_TEACHER).transpose(0, 1)


def folds(digits: Tensor) -> Tensor:
    """The fold ``[N]`` in which each recording is tested; every fold has nearly as many of each digit."""
    rng = np.random.default_rng(0)
    fold = np.empty(len(digits), np.int64)
    for digit in range(CLASSES):
        members = rng.permutation(np.flatnonzero(digits.numpy() == digit))
        fold[members] = (np.arange(len(members)) + digit) % FOLDS
    return torch.from_numpy(fold)


# ---- training ----
def train(
    net: nn.Module, losses: list[DistillationLoss], frames: Tensor, digits: Tensor, seed: int, epochs: int
) -> Any:
    """Train ``net`` on ``frames`` ``[N, T, 2, H, W]``; the same order and shifts for the same seed."""

    def batch(chosen: Tensor) -> Tensor:
        return frames[chosen].transpose(0, 1).contiguous()

    distiller = Distiller(net, None, losses, example_inputs=batch(torch.arange(5)))
    optimizer = torch.optim.AdamW(distiller.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, epochs * (len(frames) // BATCH))
    generator = torch.Generator().manual_seed(seed)
    clock = paired.Clock()
    for _ in range(epochs):
        order = torch.randperm(len(frames), generator=generator)
        for chosen in order.split(BATCH)[: len(frames) // BATCH]:
            dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
            result = distiller(batch(chosen).roll((dy, dx), (3, 4)), digits[chosen])
            optimizer.zero_grad()
            result.loss.backward()
            optimizer.step()
            schedule.step()
    return clock.read() | {"terms of the last batch": {k: v.item() for k, v in result.terms.items()}}


@torch.no_grad()
def hits(net: nn.Module, frames: Tensor, digits: Tensor) -> list[int]:
    """For each recording whether the mean of the logits over T steps names its digit."""
    net.eval()
    found = []
    for x, y in zip(frames.split(100), digits.split(100), strict=True):
        functional.reset_net(net)
        logits = net(x.transpose(0, 1)).unflatten(0, (T, -1)).mean(0)
        found += (logits.argmax(1) == y).int().tolist()
    functional.reset_net(net)
    return found


def run(name: str, fold: int, data: tuple[Tensor, Tensor], epochs: int) -> dict[str, Any]:
    """One network: the paired start of its fold, trained with its losses, tested on the fold after the last epoch."""
    frames, digits = data
    tested = folds(digits) == fold
    torch.manual_seed(fold)
    net = network()
    losses = variants()[name]
    temporal = any(isinstance(loss, TemporalSelfKD) for loss in losses)
    short, long = seen(name, frames)
    result = train(net, losses, (long if temporal else short)[~tested], digits[~tested], fold, epochs)
    right = hits(net, short[tested], digits[tested])
    x = short[tested][:OPERATIONS_SAMPLES].transpose(0, 1).contiguous()
    with torch.no_grad(), analysis.FiringRateMonitor(net) as monitor:
        net(x)
    functional.reset_net(net)
    operations = analysis.count_synops(net, x, samples=x.shape[1]).to_dict()
    return {
        **{"variant": name, "fold": fold, "accuracy": statistics.fmean(right), "right": right},
        **{"firing rates": monitor.rates(), "synaptic operations": operations["synops"]},
        **result,
    }


# ---- report ----
def compare(own: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Paired differences of the folds with the interval of t, and of all recordings with the normal one."""
    differences = [a["accuracy"] - b["accuracy"] for a, b in zip(own, plain, strict=True)]
    mean, half = paired.interval(differences)
    single = [a - b for o, p in zip(own, plain, strict=True) for a, b in zip(o["right"], p["right"], strict=True)]
    spread = 1.96 * statistics.stdev(single) / math.sqrt(len(single))
    return {
        **{"differences of folds": differences, "difference": mean, "half interval of folds": half},
        **{"difference of recordings": statistics.fmean(single), "half interval of recordings": spread},
        **{"only this is right": single.count(1), "only plain is right": single.count(-1)},
    }


def report(results: dict[str, list[dict[str, Any]]], settings: dict[str, Any], folder: Path) -> None:
    rows = []
    for name, own in results.items():
        row: dict[str, Any] = {"variant": name, "folds": len(own)}
        row["accuracies of folds"] = [r["accuracy"] for r in own]
        row["accuracy"] = statistics.fmean(x for r in own for x in r["right"])
        row["firing rates"] = {k: statistics.fmean(r["firing rates"][k] for r in own) for k in own[0]["firing rates"]}
        for key in ("synaptic operations", "seconds", "processor seconds"):
            row[key] = statistics.fmean(r[key] for r in own)
        if name != plain_of(name):
            row |= compare(own, results[plain_of(name)][: len(own)])
        rows.append(row)
    head = ("variant", "folds", "test accuracy", "difference over folds, 95 % (points)", "", "over recordings, 95 %")
    head += (
        "only this right : only plain",
        "firing rates by layer",
        "synaptic operations",
        "training, processor (clock)",
    )
    cells = []
    for row in rows:
        cell = [row["variant"], row["folds"], f"{row['accuracy']:.2%}", "-", "", "-", "-"]
        if "difference" in row:
            mean, half = row["difference"], row["half interval of folds"]
            cell[3:5] = paired.points(mean, half), paired.verdict(mean, half)
            cell[5] = paired.points(row["difference of recordings"], row["half interval of recordings"])
            cell[6] = f"{row['only this is right']} : {row['only plain is right']}"
        cell.append(" ".join(f"{rate:.3f}" for rate in row["firing rates"].values()))
        cell.append(f"{row['synaptic operations'] / 1e6:.3f} M")
        cell.append(f"{row['processor seconds']:.0f} s ({row['seconds']:.0f} s)")
        cells.append(cell)
    shown = environment()
    losses = {
        name: ", ".join(f"{type(x).__name__}" for x in made) or "cross-entropy alone"
        for name, made in variants().items()
    }
    text = (
        f"# Self-distillation on N-MNIST\n\n{paired.about(__doc__)}\n\n"
        f"{paired.listed(settings)}\n\n{paired.table(head, cells)}\n\n"
        "The interval over folds is Student's t of the paired differences of the folds, whose training sets overlap; "
        "the one over recordings takes the networks as they are. Seeds: the fold's number. The clock is that of a "
        f"machine that others use too.\n\n{paired.listed({k: v for k, v in losses.items() if k in results})}\n\n"
        f"{paired.listed(shown)}\n"
    )
    runs = [{k: v for k, v in r.items() if k != "settings"} for own in results.values() for r in own]
    paired.save(folder, "nmnist", text, {"settings": settings, "environment": shown, "rows": rows, "runs": runs})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.nmnist",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("variants", nargs="*", metavar="variant", help=f"some of {', '.join(variants())}; all if none")
    parser.add_argument("--data-dir", type=Path, required=True, help="N-MNIST recordings, official or SLAYER's")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training recordings (30)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (1)")
    parser.add_argument("--out", type=Path, default=Path("runs/nmnist"), help="folder of finished runs")
    parser.add_argument("--report", type=Path, default=RESULTS, help="folder of the report")
    args = parser.parse_args(argv)
    unknown = set(args.variants) - set(variants())
    if unknown:
        parser.error(f"unknown variants {sorted(unknown)}; there are {', '.join(variants())}")
    if min(args.epochs, args.threads) < 1:
        parser.error("--epochs and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    data = load(args.data_dir)
    if len(data[1]) < FOLDS * BATCH:
        parser.error(f"--data-dir must hold at least {FOLDS * BATCH} recordings, found {len(data[1])}")
    settings = {
        **{"recordings": len(data[1]), "T": T, "T of the temporal teacher": T_TEACHER, "folds": FOLDS},
        **{"epochs": args.epochs, "batch": BATCH, "learning rate": LEARNING_RATE, "weight decay": WEIGHT_DECAY},
        **{"shift": "up to a pixel of 17, each batch alike", "channels": CHANNELS},
        "parameters": sum(p.numel() for p in network().parameters()),
    }
    wanted = {*args.variants, *map(plain_of, args.variants)} if args.variants else set(variants())
    chosen = [name for name in variants() if name in wanted]
    results: dict[str, list[dict[str, Any]]] = {}
    for name in chosen:
        for fold in range(FOLDS):
            path = args.out / f"{name}-fold{fold}.json"
            fresh = not path.exists()
            result = paired.once(path, settings, lambda n=name, f=fold: run(n, f, data, args.epochs))
            results.setdefault(name, []).append(result)
            if fresh:
                used = f"{result['processor seconds']:.0f} s of processor"
                print(f"fold {fold}, {name}: {result['accuracy']:.2%}, {used}", flush=True)
        report(results, settings, args.report)
    print(f"{args.report}/nmnist.md and .json written")


if __name__ == "__main__":
    main()
