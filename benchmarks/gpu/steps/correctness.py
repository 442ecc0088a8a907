"""Steps that check whether results are right: workloads against their oracles, tests, sanitizers, precisions."""

from __future__ import annotations

import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..job import Job
from ..subjects import TESTS

_REHEARSED_TESTS = ("tests/test_cuda_twin.py", "-k", "test_float32 and sinusoid")
_FIRST_FAILURES = 12  # the results name so many; the log has all


def smoke(job: Job, workloads: Sequence[str]) -> dict[str, Any]:
    """Holds each workload against its oracle, then times it, all in one process, which stops at an illegal access."""
    return job.worker("smoke", *workloads)


def tests(job: Job) -> dict[str, Any]:
    """Runs all tests marked ``gpu`` in parallel. The first that fails runs again, waiting for each launch."""
    junit = job.report.logs / "tests.xml"
    chosen = _REHEARSED_TESTS if job.rehearsal else ("-m", "gpu", *TESTS)
    command = [sys.executable, "-m", "pytest", "-W", "default", "-o", "faulthandler_timeout=60"]
    side_by_side = ["-n", "2" if job.rehearsal else "14", "--maxfail=30", f"--junitxml={junit}"]
    found = job.run([*command, *side_by_side, *chosen])
    counts, failures = read_junit(junit)
    job.results.add("pytest", state=found["state"], **counts, failures=failures[:_FIRST_FAILURES])
    if failures:
        again = job.run([*command, "-vv", failures[0]], "tests-again", {"CUDA_LAUNCH_BLOCKING": "1"})
        job.results.add("launch by launch", test=failures[0], state=again["state"], end=again["end"][-600:])
    return {**found, **counts, "failures": failures}


def read_junit(file: Path) -> tuple[dict[str, int], list[str]]:
    """Returns how many tests passed, failed and were skipped, and the failures in the form that pytest accepts."""
    try:
        cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {}, []
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            failures.append(f"{_place(case.get('classname', ''))}::{case.get('name')}")
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    return counts, failures


def _place(classname: str) -> str:
    """Converts ``tests.test_a.TestB`` to the form that pytest accepts: ``tests/test_a.py::TestB``."""
    parts = classname.split(".")
    modules = [part for part in parts if not part.startswith("Test")]
    return "::".join(["/".join(modules) + ".py", *parts[len(modules) :]])


def sanitize(job: Job, tool: str, files: str, chosen: str) -> dict[str, Any]:
    """Runs small tests under a tool of compute-sanitizer."""
    program, instead = find_tool("compute-sanitizer")
    watched = [program, "--tool", tool, "--error-exitcode", "9"] if program else []
    command = [sys.executable, "-m", "pytest", "-W", "default", "-x"]
    command += _REHEARSED_TESTS if job.rehearsal else (files, "-k", chosen)
    if not (program or job.rehearsal):
        return {"state": "failed", "end": instead}
    found = job.run([*watched, *command], environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    job.results.add(tool, tests=files, state=found["state"], **({"stand_in": instead} if not program else {}))
    return found


def precision(job: Job, workloads: Sequence[str]) -> dict[str, Any]:
    """Measures time and error of a meta-gradient with each precision of products."""
    return job.worker("precision", *workloads)


def find_tool(name: str) -> tuple[str | None, str]:
    """Returns the path of a tool, and a text for the case that it is not installed."""
    path = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    return path, "" if path else f"{name} is not installed"
