"""How everything here is measured: medians of blocks, on an idle machine, with the environment written beside."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import snnfast
from snnfast import backends

RESULTS = Path(__file__).parent / "results"
PEERS = ("spikingjelly", "snntorch", "norse", "sinabs")


def synchronize(device: torch.device | str = "cpu") -> None:
    """Wait for the device, so that a clock reads finished work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def compare(
    contenders: dict[str, Callable[[], Any]], device: str = "cpu", seconds: float = 0.25, rounds: int = 5
) -> dict[str, float]:
    """Median seconds of each contender.

    Each runs in blocks of its own (a rival's streaming stores would evict its buffers) and the blocks take turns, so
    that a slow minute of the machine meets all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    counts = {}
    for name, call in contenders.items():
        call()
        call()
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        once = max(time.perf_counter() - start, 1e-7)
        counts[name] = max(3, min(200, int(seconds / rounds / once)))
    for _ in range(rounds):
        for name, call in contenders.items():
            call()
            for _ in range(counts[name]):
                synchronize(device)
                start = time.perf_counter()
                call()
                synchronize(device)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def take_turns(contenders: dict[str, Callable[[], Any]], device: str = "cpu", rounds: int = 5) -> dict[str, float]:
    """Median seconds of each contender where one call is long enough to stand alone: a call each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(once(call, device))
    return {name: statistics.median(t) for name, t in times.items()}


def once(call: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def per_call(call: Callable[[], Any], calls: int = 5000, rounds: int = 7) -> float:
    """Median seconds of one call where a call is too short to time alone."""
    for _ in range(calls // 5):
        call()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls)
    return statistics.median(found)


def busy_share(seconds: float = 1.0) -> float | None:
    """The share of all cores that others use, or None where the system does not tell."""

    def read() -> tuple[int, int]:
        numbers = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(numbers), numbers[3] + numbers[4]

    try:
        before = read()
        time.sleep(seconds)
        after = read()
    except OSError:
        return None
    return 1 - (after[1] - before[1]) / max(1, after[0] - before[0])


def environment() -> dict[str, Any]:
    """Device, versions, date and commit: what every result file records."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        except OSError:
            return ""

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    found: dict[str, Any] = {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "backend on cpu": backends.native.served(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "snnfast": snnfast.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": output("git", "rev-parse", "--short", "HEAD")
        + ("+changes" if output("git", "status", "--porcelain") else ""),
        "busy before": busy_share(),
    }
    for peer in PEERS:
        try:
            found[peer] = importlib.metadata.version(peer)
        except importlib.metadata.PackageNotFoundError:
            found[peer] = "not installed"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["cuda of torch"] = torch.version.cuda
    return found


def refuse_unless_idle(force: bool) -> None:
    """With a neighbour on the cores every ratio is wrong: stop, unless forced."""
    busy = busy_share()
    if busy is not None and busy > 0.1 and not force:
        sys.exit(f"the machine is not idle ({busy:.0%} of the cores busy): nothing recorded. Wait, or pass --force.")


def where_memory_is_kept(module: str, *arguments: str) -> Any:
    """What ``python -m benchmarks.MODULE --kept`` prints as JSON in its last line: a process of its own, which keeps
    the memory it has freed (``snnfast.keep_freed_memory``), as no process can unlearn that.

    Raises:
        RuntimeError: it did not end well; the message is its last line.
    """
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--kept"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        cwd=root,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def keep_memory() -> None:
    """In such a process; SystemExit where it cannot."""
    if not snnfast.keep_freed_memory():
        raise SystemExit("keep_freed_memory() does nothing here: malloc is not glibc's")
