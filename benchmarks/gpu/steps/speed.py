"""Steps that measure: the papers' trainings, hardware counters of the hot kernels, micro-benchmarks, peers."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from ..job import Job, read_json
from .correctness import find_tool

TRAIN = "from metafast.cli.main import main; main()"
# What ncu measures: workloads, a pattern for the names of kernels, how many launches it skips and how many it measures.
# For the convolutions this is a part of the first way forward and back, where the three kernels have several shapes.
HOT = {
    "blocks": (("sin25-5", "sin4096-5"), "metafast_inner_loop", 0, 2),
    "triton": (("omni5w1s-5",), "metafast_(gather_product|weight_gradient|norm_backward)", 2, 12),
}
# The metrics of ncu that go into the results.
METRICS = (
    "Duration", "Registers Per Thread", "Achieved Occupancy", "Compute (SM) Throughput", "Memory Throughput",
    "L2 Cache Throughput", "Issue Slots Busy", "Executed Ipc Active",
)  # fmt: skip
MOST_TASKS = 32  # peers that run one task after the other need minutes for more
_TOGETHER, _SEQUENTIAL = ("torch.func", "JAX"), ("torch loop", "learn2learn", "higher")


def train(job: Job, recipe: str, backend: str, split: str | None = None) -> dict[str, Any]:
    """Runs ``metafast train`` from the start to its test. If it is cut off, the results say how far it came."""
    folder = job.report.scratch / recipe
    chosen, backend = recipe, "auto" if job.rehearsal else backend
    options = ["--split", split] if split else []
    if recipe.startswith("omniglot"):
        data = job.pack and job.pack / "omniglot"
        if data is not None and data.is_dir():
            options += ["--data", str(data)]
        elif job.rehearsal:  # rendered characters stand in for those that need a download
            chosen, options = "glyphs-5w1s", ["--tasks", "2", "--eval-every", "0"]
        else:
            return {"state": "failed", "end": "there is no Omniglot: give --pack a folder that has omniglot/*.zip"}
    if job.rehearsal:
        options += ["--iterations", "4", "--test-tasks", "2"]
    command = [sys.executable, "-c", TRAIN, "train", chosen, "--out", str(folder), *options]
    found = job.run([*command, "--device", job.device, "--backend", backend])
    summary = read_json(folder / "summary.json")
    for name in ("summary.json", "metrics.jsonl"):
        if (folder / name).exists():
            shutil.copy(folder / name, job.report.logs / f"{recipe}-{name}")
    if summary is None:
        job.results.add(recipe, state=found["state"], came_to=_last_line(folder / "metrics.jsonl"))
        return found
    training, result = summary["training"], summary["result"]
    numbers = {key: training[key] for key in ("iterations", "seconds", "tasks_per_s")}
    instead = {"stand_in": chosen} if chosen != recipe else {}
    job.results.add(
        recipe, **numbers, wall_seconds=summary["wall_seconds"], result=result[summary["metric"]],
        metric=summary["metric"], outer_step=summary["outer_step"], **instead,
    )  # fmt: skip
    return {**found, "summary": summary}


def _last_line(file: Path) -> Any:
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1]) if lines else None


def counters(job: Job, executor: str) -> dict[str, Any]:
    """Reads hardware counters of an executor's hot kernels in one meta-gradient of each workload, without fixed
    clocks."""
    workloads, kernels, skip, count = HOT[executor]
    program, instead = find_tool("ncu")
    tool = [program, "--clock-control", "none", "--set", "full", "--csv", "--page", "details"] if program else []
    tool += ["-k", f"regex:{kernels}", "--launch-skip", str(skip), "--launch-count", str(count)] if program else []
    if not (program or job.rehearsal):
        return {"state": "failed", "end": instead}
    found = job.worker("once", *workloads, tool=tool)
    log = job.report.logs / f"{job.step.replace(':', '-')}.log"
    launches = read_counters(log.read_text(errors="replace"))
    for kernel, values in launches:
        job.results.add(executor, kernel=kernel, **values)
    if program and found["state"] == "passed" and not launches:
        return {**found, "state": "failed", "end": f"ncu saw no launch of {kernels}: {found['end']}"}
    if not program:
        job.results.add(executor, state=found["state"], stand_in=f"{instead}; the process ran alone")
    return found


def read_counters(text: str) -> list[tuple[str, dict[str, str]]]:
    """Picks the kernel and the metrics of each launch from the output of ``ncu --csv --page details``."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, tuple[str, dict[str, str]]] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        values = launches.setdefault(str(row["ID"]), (f"{row['Kernel Name']} {row.get('Grid Size', '')}", {}))[1]
        if row.get("Metric Name") in METRICS:
            values.setdefault(str(row["Metric Name"]), f"{row['Metric Value']} {row['Metric Unit']}".strip())
    return list(launches.values())


def micro(job: Job) -> dict[str, Any]:
    """Measures what a launch, a barrier, a copy, a product and a tile cost."""
    return job.worker("micro")


def peers(job: Job, workload: str, tasks: int) -> dict[str, Any]:
    """Compares metafast with every peer that can be ready in time, on a workload that has ``tasks`` tasks."""
    chosen = list(_TOGETHER)
    if workload.startswith("sin"):
        chosen.append("torch.compile")  # it needs minutes for five steps of a convolutional network
    if tasks <= MOST_TASKS:
        chosen += _SEQUENTIAL
    if job.rehearsal:
        chosen = ["torch loop"]
    file = job.report.scratch / f"peers-{workload}.json"
    found = job.worker("compare", workload, "--json", str(file), "--peers", *chosen)
    return {**found, "bench": read_json(file)}
