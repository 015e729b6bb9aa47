"""``python -m benchmarks [SUB ...]``: every benchmark, or those that are named; see README.md beside this file.

Tables in the terminal; JSON, Markdown and figures in results/; all of them collected in REPORT.md.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .measure import RESULTS, environment, refuse_unless_idle
from .report import collect, markdown, shown, write  # noqa: F401 (benchmarks.gpu has markdown from here)
from .rows import Point, Row, Settings

Found = Iterator[Row | Point]
REPORT = "REPORT.md"
ABSENT_MEMORY = "benchmarks/memory.py is not here"


# ---- the benchmarks that are older than this suite, or have a command of their own ----
def neuron(settings: Settings) -> Found:
    from . import cpu_targets, gpu

    if settings.device == "cuda":
        if not settings.present:
            yield settings.absent("forward, every neuron, float32 and bf16", "copy bandwidth", 90, unit="%")
            yield settings.absent("backward, every neuron, float32 and bf16", "copy bandwidth", 85, unit="%")
            return
        ceiling = gpu.copy_bandwidth()
        yield Row("copy bandwidth, read + write", "1 GB", ceiling / 1e12, None, True, "TB/s")
        cases = [case for backend in ("native", "triton") for case in gpu.bandwidth(ceiling, backend)]
        for case in (*cases, gpu.against_peers, gpu.overhead):
            yield from case()
        return
    if settings.quick:
        cpu_targets.LARGE, cpu_targets.MIDDLE = (4, 8192), ((4, 8192),)
    for name, group in cpu_targets.GROUPS.items():
        if not settings.quick or name not in ("loops", "readers", "long"):  # these have sizes of their own
            yield from group()


def bn_neuron(settings: Settings) -> Found:
    from . import bn_neuron as module

    if settings.quick:
        module.B, module.SIZE = 4, 8
    yield from module.rows()


def peers(settings: Settings) -> Found:
    from . import peers as module

    for group in module.GROUPS.values():
        yield from group(settings.quick)


def suite(name: str) -> Callable[[Settings], Found]:
    """A benchmark of this folder with ``measure(settings)``."""

    def measure(settings: Settings) -> Found:
        yield from importlib.import_module(f"benchmarks.{name}").measure(settings)

    return measure


@dataclass
class Sub:
    title: str
    run: Callable[[Settings], Found]
    stems: dict[str, str]  # device: name of the result files


SUBS = {
    "neuron": Sub("Neuron: targets", neuron, {"cpu": "cpu", "cuda": "gpu"}),
    "bn_neuron": Sub("Batch norm and neuron", bn_neuron, {"cpu": "bn_neuron"}),
    "peers": Sub("Peers' models", peers, {"cpu": "peers"}),
    **{
        name: Sub(title, suite(name), {"cpu": name, "cuda": f"{name}-cuda"})
        for name, title in {
            "network": "Whole training steps of networks",
            "memory": "Memory",
            "overhead": "Host time of tiny calls",
            "scaling": "Scaling in T and N",
            "inference": "Inference: latency and throughput",
            "open_neuromorphic": "open-neuromorphic's workload: Linear(n, n) + LIF",
        }.items()
    },
}
WORDS = {"cpu": "CPU", "cuda": "GPU"}
TITLES = {"cpu": "CPU targets", "gpu": "GPU targets"}


def title_of(sub: Sub, device: str) -> str:
    return TITLES.get(sub.stems[device], f"{sub.title} ({WORDS[device]})")


# ---- running ----
def run(name: str, device: str, arguments: argparse.Namespace) -> bool:
    """One benchmark on one device; whether it came to its end."""
    sub, present = SUBS[name], device == "cpu" or torch.cuda.is_available()
    stem, title = sub.stems[device], title_of(sub, device)
    print(f"\n== {name}, {WORDS[device]}: {title}", flush=True)
    torch.manual_seed(0)
    if name == "memory" and not hasattr(memory_module(), "measure"):
        return memory(device, arguments)
    machine = environment()
    if arguments.quick:
        machine["label"] = "--quick: small shapes and few runs, these figures mean nothing"
    elif arguments.force:
        machine["label"] = "--force: the machine may have been busy, do not quote"
    rows: list[Row] = []
    points: list[Point] = []
    start, ended, stopped = time.perf_counter(), True, False
    try:
        for found in sub.run(Settings(device, present, arguments.quick)):
            if isinstance(found, Point):
                points.append(found)
                continue
            rows.append(found)
            print("  ".join(shown(found)), flush=True)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        # One benchmark's error shall not lose the others, nor a time limit what was measured within it.
        ended, stopped = False, isinstance(error, KeyboardInterrupt)
        traceback.print_exc()
        machine["ended early"] = f"{type(error).__name__}: {error}"
    machine["seconds"] = round(time.perf_counter() - start)
    show(title, rows)
    if present and rows and arguments.out is not None:
        write(arguments.out, stem, title, machine, rows, points)
        print(f"{sum(r.met is True for r in rows)} targets met; written to {arguments.out / stem}.json, .md, .png")
    if stopped:
        raise KeyboardInterrupt
    return ended


def memory_module() -> Any:
    try:
        return importlib.import_module("benchmarks.memory")
    except ModuleNotFoundError as error:
        if error.name != "benchmarks.memory":
            raise
        return None


def memory(device: str, arguments: argparse.Namespace) -> bool:
    """``python -m benchmarks.memory`` where it writes its files itself."""
    if memory_module() is None:
        print(f"not measured: {ABSENT_MEMORY}")
        return True
    if device != "cpu" or arguments.out is None:  # its own command decides what it measures
        return True
    command = [sys.executable, "-m", "benchmarks.memory", "--out", str(arguments.out)]
    command += ["--force"] if arguments.force else []
    return subprocess.run(command, cwd=Path(__file__).parents[1]).returncode == 0


def show(title: str, rows: list[Row]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # each row has been printed
        return

    table = Table("work", "against", "measured", "target", "", "", title=title)
    for row in rows:
        table.add_row(*shown(row), style="red" if row.met is False else None)
    Console(width=160).print(table)


def report(out: Path) -> Path:
    """REPORT.md of everything that ``out`` has results of."""
    sections, commands = {}, {}
    for name, sub in SUBS.items():
        for device, stem in sub.stems.items():
            missing = "no result file here yet"
            if name == "memory" and memory_module() is None:
                missing = ABSENT_MEMORY
            elif device == "cuda":
                missing = "no GPU has run it yet"
            sections[stem] = title_of(sub, device), missing
            commands[stem] = f"python -m benchmarks {name}"
    path = out.parent / REPORT if out == RESULTS else out / REPORT
    collect(out, path, sections, commands)
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("subs", nargs="*", metavar="SUB", help=f"some of {', '.join(SUBS)}; all where none is named")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="one device only; both where none is named")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too (the result says so)")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it works; kept only with --out")
    parser.add_argument("--out", type=Path, help=f"folder of the result files, by default {RESULTS}")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.subs) - set(SUBS)
    if unknown:
        parser.error(f"unknown benchmarks {sorted(unknown)}; there are {', '.join(SUBS)}")
    if arguments.out is None and not arguments.quick:
        arguments.out = RESULTS
    refuse_unless_idle(arguments.force or arguments.quick)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|spikingjelly|snntorch|sinabs")
    failed = []
    for name in arguments.subs or SUBS:
        for device in SUBS[name].stems:
            if arguments.device in (None, device) and not run(name, device, arguments):
                failed.append(f"{name} ({device})")
    if arguments.out is not None:
        print(f"collected in {report(arguments.out)}")
    if failed:
        print(f"ended early: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
