"""Checks everything that only a GPU can show; benchmarks/gpu/plans.py lists the steps."""

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
    """Runs the check or its rehearsal. Returns 0 if every step passed, else 1."""
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__)
    parser.add_argument("--plan", choices=PLANS, help="default: first; a rehearsal runs both")
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files: results, report, logs")
    parser.add_argument("--pack", type=Path, help="folder that make gpu-pack has filled; default: gpu-pack")
    parser.add_argument("--seconds", type=float, help="limit of the whole run in seconds; default: the plan's")
    parser.add_argument("--only", default="", help="run only these steps or groups of steps: smoke,tests")
    parser.add_argument("--rehearse", action="store_true", help="run without a GPU: tiny sizes and a fake clock")
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
