"""The machine: what it is and what it can do."""

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
# The parent's own way to read a peak, in a process that has imported torch and nothing else.
_BARE = "import torch; print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"


@dataclass(frozen=True)
class MachineRates:
    """What the machine reaches in float32: FLOP/s of a large matrix product, bytes/s (read and written) of a copy."""

    matrix: float
    copy: float


def rates(device: str, seconds: float = 0.5) -> MachineRates:
    """Measures both; the best of the calls that fit into ``seconds`` each."""
    side, length = (2048, 1 << 26) if device == "cpu" else (8192, 1 << 28)
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    out = torch.empty_like(a)
    matrix = 2 * side**3 / min(timings(lambda: torch.mm(a, b, out=out), device, seconds))
    source = torch.ones(length, device=device)
    target = torch.empty_like(source)
    return MachineRates(matrix, 2 * source.nbytes / min(timings(lambda: target.copy_(source), device, seconds)))


def timings(call: Callable[[], object], device: str, seconds: float, fewest: int = 1) -> list[float]:
    """Calls until ``seconds`` have passed, and ``fewest`` times at least.

    Returns:
        The seconds of each call. On a GPU they end when it has done its work.
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
    """Peak memory of a process that imports torch and does nothing."""
    if sys.platform != "linux":
        return 0
    run = subprocess.run([sys.executable, "-c", _BARE], capture_output=True, text=True, check=True)
    return int(run.stdout) * 1024


def describe(device: str, threads: int) -> dict[str, str | int]:
    """Machine, versions, date and commit."""
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
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """Of the checkout that metafast runs from, marked where files differ from it; empty where there is none."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return ""
    if head.returncode != 0:
        return ""
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")
