"""Runs of the GPU check for its tests."""

from __future__ import annotations

import json

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.job import Job
from benchmarks.gpu.report import REPORT, Report

PASSED = {"state": "passed", "end": ""}


def make_job(folder, clock=None, **options):
    """A run whose files are in ``folder/out``."""
    clock = clock or Clock()
    return Job(Report(folder / "out", "test", clock), clock, **options)


def written(folder):
    """Its report."""
    return json.loads((folder / "out" / REPORT).read_text())


def states(folder):
    """What became of each of its steps."""
    return {name: found["state"] for name, found in written(folder)["steps"].items()}
