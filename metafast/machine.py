"""Describes the machine and measures what it can do."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

VERSION = metadata.version("metafast")
# A process that has imported torch and nothing else prints its peak memory in KiB.
_BARE = "import torch; print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"


@dataclass(frozen=True)
class MachineRates:
    """Holds the rates that the machine reaches in float32.

    Attributes:
        matrix: the FLOP/s of a large matrix product.
        copy: the bytes/s of a large copy, where both reading and writing count.
    """

    matrix: float
    copy: float


def rates(device: str, seconds: float = 0.5) -> MachineRates:
    """Measures the rates of ``device``; each is the best of the calls that fit into ``seconds``."""
    side, length = (2048, 1 << 26) if device == "cpu" else (8192, 1 << 28)
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    out = torch.empty_like(a)
    matrix = 2 * side**3 / min(timings(lambda: torch.mm(a, b, out=out), device, seconds))
    source = torch.ones(length, device=device)
    target = torch.empty_like(source)
    return MachineRates(matrix, 2 * source.nbytes / min(timings(lambda: target.copy_(source), device, seconds)))


def timings(call: Callable[[], object], device: str, seconds: float, fewest: int = 1) -> list[float]:
    """Calls ``call`` until ``seconds`` have passed, and at least ``fewest`` times.

    Returns:
        The seconds that each call took; on a GPU a call ends when the GPU has done its work.
    """
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < fewest or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def bare_bytes() -> int:
    """Returns the bytes at the peak of a process that only imports torch; 0 where the system is not Linux."""
    if sys.platform != "linux":
        return 0
    run = subprocess.run([sys.executable, "-c", _BARE], capture_output=True, text=True, check=True)
    return int(run.stdout) * 1024


def describe(device: str, threads: int) -> dict[str, str | int]:
    """Describes the machine, the versions of the software, the date and the commit, for the record of a measurement."""
    found: dict[str, str | int] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": threads,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "metafast": VERSION,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return found


def _cpu() -> str:
    """Returns the model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """Returns the commit of the checkout that metafast runs from, or nothing where it is no checkout.

    The commit is marked with ``+changes`` where files differ from it.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return ""
    if head.returncode != 0:
        return ""
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")
