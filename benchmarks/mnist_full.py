"""All of MNIST at T = 4 with snnfast-train: an ANN teaches a spiking network its answers and features.

One run of the command with its default settings (optimiser, learning rate, schedule, augmentation, temperature and
weights) but for the networks, their epochs, the layer pairs and the memory layout. KDSNN (Xu et al., CVPR 2023) reports
99.37 % at T = 4 with a network of its own. What is reported is the last epoch of one seed.

It goes on from the last checkpoint in the output folder: start it anew after a stop.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snnfast.train import cli

from . import paired
from .measure import RESULTS, environment

PAPER = 0.9937
STUDENT, TEACHER = "channels=(48,96,96)", "channels=(64,128,128)"


def options(args: argparse.Namespace) -> list[str]:
    """What snnfast-train is given, but for its folders."""
    return [
        *("--data", "mnist", "--timesteps", "4", "--seed", str(args.seed)),
        *("--student", "benchmarks.networks:digits", "--model-args", STUDENT),
        *("--teacher", "benchmarks.networks:digits", "--teacher-args", TEACHER),
        *("--distill", "logit,feature", "--feature-pairs", "relu2=relu2", "relu3=relu3"),
        *("--epochs", str(args.epochs), "--teacher-epochs", str(args.teacher_epochs)),
        *("--channels-last", "--threads", str(args.threads), "--device", args.device),
        *([] if args.plain else ["--no-plain"]),
        *(["--train-samples", str(args.samples), "--test-samples", str(args.samples)] if args.samples else []),
    ]


def report(run: dict[str, Any], command: list[str], folder: Path) -> None:
    """The run's figures, with the paper's beside."""
    results, shown = run["results"], environment()
    head = ("network", "test accuracy", "epochs", "parameters", "firing rate", "MACs", "ACs", "energy (µJ)")
    rows = []
    for name, r in results.items():
        rate = "-" if r["firing_rate"] is None else f"{r['firing_rate']:.3f}"
        operations = r["operations"]
        counts = (f"{operations['macs'] / 1e6:.2f} M", f"{operations['acs'] / 1e6:.2f} M")
        used = f"{r['processor_seconds']:.0f} s ({r['seconds']:.0f} s)"
        row = (name, f"{r['test_accuracy']:.2%}", r["epochs"], f"{r['parameters']:,}", rate)
        rows.append((*row, *counts, f"{operations['energy_pj'] / 1e6:.2f}", used))
    curves = [
        f"- {name}: " + " ".join(f"{100 * entry['test_accuracy']:.2f}" for entry in r["history"])
        for name, r in results.items()
    ]
    small = run["data"]["training images"] < 60000
    text = (
        f"# MNIST at T = 4, {run['data']['training images']:,} training and {run['data']['test images']:,} test images"
        "\n\n"
        + ("**A small subset, to see that the command runs: these are no results.**\n\n" if small else "")
        + f"{paired.about(__doc__)}\n\n"
        f"{paired.table((*head, 'training, processor (clock)'), rows)}\n\n"
        "Energy is an estimate (4.6 pJ per MAC, 0.9 pJ per AC, Horowitz 2014). The clock's times are those of a "
        "machine that others use too.\n\nTest accuracy after each epoch, in percent (nothing was chosen by it):\n\n"
        + "\n".join(curves)
        + f"\n\nThe run was\n\n```\n{shlex.join(command)}\n```\n\n{paired.listed(shown)}\n"
    )
    figures = {"command": command, "paper": PAPER, "environment": shown, "run": run}
    paired.save(folder, "mnist_full", text, figures)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mnist_full",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="MNIST's four idx files")
    parser.add_argument("--epochs", type=int, default=12, help="passes of the student (12)")
    parser.add_argument("--teacher-epochs", type=int, default=8, help="passes of the teacher (8)")
    parser.add_argument("--plain", action="store_true", help="train the student without distillation too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, help="train and test on so many images, to see that everything runs")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist_full"), help="folder of checkpoints")
    parser.add_argument("--report", type=Path, default=RESULTS, help="folder of the report")
    args = parser.parse_args(argv)
    given = options(args)
    folders = ["--data-dir", str(args.data_dir), "--out", str(args.out), "--resume"]
    code = cli.main([*given, *folders])
    if code:
        sys.exit(code)
    command = ["python", "-m", "snnfast.train", *given, "--data-dir", "MNIST", "--out", "runs/mnist_full"]
    run = json.loads((args.out / "report.json").read_text())
    del run["options"]["data_dir"], run["options"]["out"]  # folders of this machine
    report(run, command, args.report)
    print(f"{args.report}/mnist_full.md and .json written")


if __name__ == "__main__":
    main()
