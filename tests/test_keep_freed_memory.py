"""snnfast.keep_freed_memory: each in a process of its own, for it holds for a whole process."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys, torch
from snnfast import keep_freed_memory

def step():  # 48 MiB, more than glibc takes from its heap by itself
    torch.ones(12 << 20)

torch.set_num_threads(1)
took_effect = keep_freed_memory() if sys.argv[1] == "keep" else None
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(took_effect, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""


def pages_faulted_in(mode, **environment):
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", PROGRAM, mode]
    given = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=given)
    took_effect, pages = done.stdout.split()
    return took_effect, int(pages)


GLIBC = tuple(map(int, platform.libc_ver()[1].split("."))) if platform.libc_ver()[0] == "glibc" else (0, 0)


@pytest.mark.skipif(GLIBC < (2, 35), reason="no glibc, or one whose heap takes no blocks of this size")
@pytest.mark.skipif(bool(os.environ.get("LD_PRELOAD")), reason="LD_PRELOAD may hold another malloc")
def test_a_step_uses_the_memory_of_the_last_one():
    plain, kept = pages_faulted_in("plain"), pages_faulted_in("keep")
    assert kept[0] == "True"
    assert kept[1] < 100
    # Pages of 4 KiB; fewer where the system gives large ones.
    assert plain[1] > 10_000 or "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()


def test_it_says_where_it_does_nothing(monkeypatch):
    import snnfast

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert snnfast.keep_freed_memory() is False
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert snnfast.keep_freed_memory() is False
