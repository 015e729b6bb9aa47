"""KDSNN's pairs on CIFAR-10 at T = 4, with snnfast-train: the paper's figures beside what is measured here.

For every pair of teacher and student (IF neurons) and every seed, one run of the command trains the student plain,
with response distillation and with feature distillation, from the same weights. A teacher is trained once, in its first
run. What is compared is the last epoch.

It is for a GPU; each call works for at most ``--minutes`` and leaves checkpoints: start it anew until all is done.

``--subset N`` takes N training and N test images, to see on any machine that everything runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from snnfast.train import cli

from . import paired
from .measure import RESULTS, environment

PAIRS = ("pyramidnet18:wrn16_2", "pyramidnet18:resnet18", "resnet18:wrn16_2", "wrn28_4:wrn16_2")
# Of Xu et al., CVPR 2023: accuracy, and points over the same student without distillation.
PAPER = {
    ("pyramidnet18:wrn16_2", "distilled-logit"): "+0.77",
    ("pyramidnet18:wrn16_2", "distilled-feature"): "+1.76 (92.10 %)",
    ("pyramidnet18:resnet18", "distilled-feature"): "93.41 %",
}
STUDENTS = {"plain": "plain", "distilled-logit": "response", "distilled-feature": "feature"}


def options(pair: str, seed: int, args: argparse.Namespace) -> list[str]:
    """What snnfast-train is given for one run, but for its folders and the teacher's weights."""
    teacher, student = pair.split(":")
    precision = ["--precision", "bf16-mixed"] if args.device == "cuda" else []
    small = ["--train-samples", str(args.subset), "--test-samples", str(args.subset)] if args.subset else []
    return [
        *("--data", "cifar10", "--timesteps", "4", "--seed", str(seed), "--neuron", "if"),
        *("--teacher", teacher, "--student", student, "--distill", "logit", "feature"),
        *("--epochs", str(args.epochs), "--batch-size", str(args.batch_size)),
        *("--optimizer", "sgd", "--lr", "0.1", "--weight-decay", "5e-4", "--warmup", "1"),
        *("--channels-last", "--device", args.device, *precision, *small),
        *(["--threads", str(args.threads)] if args.threads else []),
        *("--robustness-samples", "0", "--no-tensorboard"),
    ]


def teacher_of(pair: str, args: argparse.Namespace) -> Path:
    """Where the teacher's weights are once its first run has trained it."""
    teacher = pair.split(":")[0]
    first = next(p for p in args.pairs if p.split(":")[0] == teacher)
    return args.out / f"{first.replace(':', '-')}-seed0" / "teacher" / "model.safetensors"


@contextlib.contextmanager
def stopped_after(minutes: float) -> Iterator[None]:
    """Ask this process to stop if it is not done by then, as Ctrl-C would: the trainer writes a checkpoint first."""
    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---- report ----
def report(runs: dict[tuple[str, int], dict[str, Any]], args: argparse.Namespace) -> None:
    """A row for each pair and student: accuracy, paired difference over the seeds, and the paper's."""
    shown, rows, figures = environment(), [], []
    for pair in args.pairs:
        own = [runs[pair, seed]["results"] for seed in range(args.seeds) if (pair, seed) in runs]
        if not own:
            continue
        for name, title in STUDENTS.items():
            mean, half = paired.interval([r[name]["test_accuracy"] - r["plain"]["test_accuracy"] for r in own])
            accuracy = sum(r[name]["test_accuracy"] for r in own) / len(own)
            figure = {
                **{"pair": pair, "student": title, "seeds": len(own), "accuracy": accuracy},
                "teacher accuracy": own[0]["teacher"]["test_accuracy"],
                **{"difference": mean, "half interval": half, "paper": PAPER.get((pair, name))},
                **{key: own[0][name][key] for key in ("parameters", "firing_rate", "operations", "epochs")},
                **{key: own[0][name][key] for key in ("seconds", "processor_seconds", "peak_memory")},
            }
            figures.append(figure)
            used = figure["processor_seconds"] if args.device == "cpu" else figure["seconds"]
            memory = figure["peak_memory"]
            rows.append(
                (
                    *(
                        pair.replace(":", " → "),
                        f"{figure['teacher accuracy']:.2%}",
                        title,
                        len(own),
                        f"{accuracy:.2%}",
                    ),
                    "-" if name == "plain" else paired.points(mean, half),
                    figure["paper"] or "-",
                    *(f"{figure['parameters']:,}", f"{figure['firing_rate']:.3f}"),
                    f"{figure['operations']['energy_pj'] / 1e6:.1f} µJ",
                    f"{used:.0f} s" + ("" if memory is None else f", {memory / 2**20:,.0f} MiB"),
                )
            )
    head = ("teacher → student", "teacher", "distillation", "seeds", "test accuracy", "to plain, 95 % (points)")
    head += ("the paper's", "parameters", "firing rate", "energy an image (estimate)", "training, memory")
    replaced = sorted(args.data_dir.glob("*substituted_indices.txt"))
    count = len(replaced[0].read_text().split()) if replaced else 0
    note = f"{count} of the test images here were rebuilt from JPEG and are not exact.\n\n" if count else ""
    if args.subset:
        warning = (
            f"**A run on {args.subset} class-balanced training images for {args.epochs} epochs, tested on as many, to "
            "see that the command works: its accuracies say nothing of the method or the paper.**\n\n"
        )
        head = tuple("the paper's, on all images" if h == "the paper's" else h for h in head)
    else:
        warning = ""
    given = shlex.join(options(args.pairs[0], 0, args))
    claims = "; ".join(f"{pair}, {STUDENTS[name]}, {claim}" for (pair, name), claim in PAPER.items())
    clock = "Seconds are the process's on the processor.\n\n" if args.device == "cpu" else ""
    text = (
        f"# CIFAR-10, T = 4: {'does the command run' if args.subset else 'KDSNN pairs'}\n\n{warning}"
        f"{paired.about(__doc__)}\n\n{paired.table(head, rows)}\n\n"
        f"The paper's figures (Xu et al., CVPR 2023, trained on all images): {claims}.\n\n"
        f"Parameters, rates, energy and times are those of the first seed. {clock}{note}"
        f"The first run was\n\n```\npython -m snnfast.train {given}\n```\n\n{paired.listed(shown)}\n"
    )
    name = "cifar10_subset" if args.subset else "cifar10"
    kept = [{"pair": pair, "seed": seed, "results": run["results"]} for (pair, seed), run in runs.items()]
    paired.save(args.report, name, text, {"environment": shown, "options": given, "rows": figures, "runs": kept})
    print(f"{args.report}/{name}.md and .json written")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cifar10",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pairs", nargs="*", metavar="TEACHER:STUDENT", help=f"networks of snnfast.models; {PAIRS}")
    parser.add_argument("--data-dir", type=Path, required=True, help="CIFAR-10's batches, binary or python")
    parser.add_argument("--seeds", type=int, default=3, help="number of paired seeds, from 0 (3)")
    parser.add_argument("--epochs", type=int, default=100, help="passes of every network (100)")
    parser.add_argument("--batch-size", type=int, default=128, help="images of a step (128)")
    parser.add_argument("--subset", type=int, metavar="N", help="train and test on N images, to see that it runs")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop with a checkpoint after so long (9)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="of PyTorch, on the CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"), help="folder of the runs")
    parser.add_argument("--report", type=Path, default=RESULTS, help="folder of the report")
    args = parser.parse_args(argv)
    args.pairs = args.pairs or list(PAIRS)
    if any(pair.count(":") != 1 for pair in args.pairs):
        parser.error(f"pairs must be TEACHER:STUDENT, such as {PAIRS[0]}, got {args.pairs}")
    if min(args.seeds, args.epochs, args.batch_size, args.subset or 1) < 1 or args.minutes <= 0:
        parser.error("all numbers must be at least 1, and --minutes positive")
    with stopped_after(args.minutes):
        train_all(args)
    print("all is done")


def train_all(args: argparse.Namespace) -> None:
    """Every pair and seed that is not done yet, with a report after each."""
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in range(args.seeds):
        for pair in args.pairs:
            folder = args.out / f"{pair.replace(':', '-')}-seed{seed}"
            if not (folder / "report.json").is_file():
                weights = teacher_of(pair, args)
                given = [*options(pair, seed, args), "--data-dir", str(args.data_dir)]
                given += ["--out", str(folder), "--resume"]
                if not weights.is_relative_to(folder):
                    given += ["--teacher-checkpoint", str(weights)]
                code = cli.main(given)
                if code == 130:
                    print("time is up: start the same command again to go on")
                if code:
                    sys.exit(code)
            runs[pair, seed] = json.loads((folder / "report.json").read_text())
            report(runs, args)


if __name__ == "__main__":
    main()
