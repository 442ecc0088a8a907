"""Rehearses the plans without a GPU: every step runs, on tiny sizes, and a fake clock shows whether the plans fit.

The CUDA executor's twin and Triton's interpreter stand in for the GPU. A tool that is not installed is left out of its
command, and the results say so. A rehearsal judges no bars and measures nothing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from .clock import FakeClock
from .job import ROOT, WORKERS, Job
from .report import Report
from .runner import SPARE, Plan, heed_signals, run_plan


def rehearse(
    plans: Sequence[Plan], out: Path, only: Collection[str] = (), factors: Mapping[str, float] | None = None
) -> bool:
    """Runs each plan into a folder of its own under ``out`` and prints its timetable.

    ``factors`` says how many times longer than expected some steps take. Tells whether all steps passed, with time to
    spare.
    """
    good = True
    print("A rehearsal: its numbers are of tiny sizes without a GPU and measure nothing.")
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "gpu-pack"
        command = [sys.executable, "-m", f"{WORKERS}.tiny_pack", str(pack)]
        subprocess.run(command, cwd=ROOT, check=True)
        for plan in plans:
            heed_signals()
            clock = FakeClock(factors)
            job = Job(Report(out / plan.name, plan.name, clock, rehearsal=True), clock, pack, rehearsal=True)
            good = run_plan(plan, job, only) and good
            print(timetable(plan, job))
            good = good and (bool(only) or plan.limit - clock.elapsed() >= SPARE)
            if str(job.report.content["end"]).startswith("stopped"):
                return False
    return good


def timetable(plan: Plan, job: Job) -> str:
    """Lists when each step began, how long it was expected to take, how long it was granted, and how it ended."""
    lines = [f"plan {plan.name}: limit {plan.limit:g} s", "  begins  expected   granted  step"]
    for name, found in job.report.content["steps"].items():
        row = f"{found['began']:8.0f} {found['expected']:9.0f} {found['granted']:9.0f}  {name}: {found['state']}"
        lines.append(row)
    lines.append(f"{job.clock.elapsed():8.0f}  end; {plan.limit - job.clock.elapsed():.0f} s to spare")
    return "\n".join(lines)
