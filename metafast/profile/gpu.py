"""Measures what only a GPU has: times of single kernels and a snapshot of its memory; and writes Nsight's commands."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def kernels(iterate: Callable[[], None], iterations: int) -> tuple[dict[str, Any], ...]:
    """Returns the seconds and calls of each kernel in one iteration, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(iterations):
            iterate()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    found = [
        {"name": e.key, "seconds": e.self_device_time_total * 1e-6 / iterations, "calls": e.count / iterations}
        for e in events
    ]
    return tuple(sorted(found, key=lambda kernel: -kernel["seconds"]))


def snapshot(iterate: Callable[[], None], path: Path) -> None:
    """Writes the allocations of one iteration, which https://pytorch.org/memory_viz shows."""
    torch.cuda.memory._record_memory_history()
    try:
        iterate()
        torch.cuda.synchronize()
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def commands(arguments: list[str], out: Path) -> tuple[str, ...]:
    """Returns the commands of Nsight that look at the same run. Its ranges are called ``metafast ...`` and its kernels
    ``metafast_*``."""
    run = shlex.join(["metafast", "profile", *arguments])
    nsys, ncu = shlex.quote(str(out / "nsys")), shlex.quote(str(out / "ncu"))
    return (
        f"nsys profile --trace=cuda,nvtx -o {nsys} {run}",
        f"ncu --kernel-name regex:metafast_ --launch-skip 50 --launch-count 20 --set full -o {ncu} {run}",
    )
