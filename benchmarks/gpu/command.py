"""The command line of the GPU check."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .clock import Clock
from .job import ROOT, Job
from .plans import PLANS
from .rehearsal import rehearse
from .report import Report
from .runner import heed_signals, run_plan
from .steps.environment import pack_problem


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every step passed."""
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__)
    parser.add_argument("--plan", choices=PLANS, help="default: first; of a rehearsal: both")
    parser.add_argument("--out", type=Path, required=True, help="folder for three files: numbers, report, logs")
    parser.add_argument("--pack", type=Path, help="folder of make gpu-pack; default: gpu-pack, where it is there")
    parser.add_argument("--seconds", type=float, help="for everything, in the place of the plan's limit")
    parser.add_argument("--only", default="", help="steps, or groups of steps, with commas between")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: tiny sizes and a faked clock")
    options = parser.parse_args(arguments)
    names = [options.plan] if options.plan else list(PLANS) if options.rehearse else ["first"]
    plans, only = [PLANS[name] for name in names], [name for name in options.only.split(",") if name]
    pack = options.pack or (ROOT / "gpu-pack" if (ROOT / "gpu-pack").is_dir() else None)
    for name in only:
        if not any(plan.chosen([name]) for plan in plans):
            groups = dict.fromkeys(step.group for plan in plans for step in plan.steps)
            parser.error(f"--only: there is no step {name!r} in this plan; choose from {', '.join(groups)}")
    if options.rehearse:
        return 0 if rehearse(plans, options.out.resolve(), only) else 1
    if pack is not None and (problem := pack_problem(pack)):
        parser.error(problem)
    heed_signals()
    clock = Clock()
    job = Job(Report(options.out.resolve(), plans[0].name, clock), clock, pack and pack.resolve())
    return 0 if run_plan(plans[0], job, only, options.seconds) else 1
