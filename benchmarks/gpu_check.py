"""Everything that only a GPU can show, in one command: ``python3 benchmarks/gpu_check.py --out DIR``.

It needs the python3 that holds torch and nothing else: no make, no virtual environment, no network. Each step runs in
processes of its own with a time limit; one that fails or runs long leaves the results of the others alone. All goes
into ``DIR/gpu_check.json`` after every step: device, versions, commit, and of each step its state and findings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKLOADS = ("omni5w1s-1", "omni5w1s-5", "omni20w1s-5", "mini5w1s-5", "mini5w5s-5", "sin25-5", "sin1024-5")
BENCH = """
import sys
from pathlib import Path
from metafast.bench import Outputs, Settings, main_bench
settings = Settings(device="cuda", budget=4, limit=20, first_limit=60)
main_bench([sys.argv[1]], backends=sys.argv[3].split(","), settings=settings, outputs=Outputs(json=Path(sys.argv[2])))
"""
PROFILE = """
import json, sys, torch
from metafast import MAML
from metafast.benchmarks.workloads import workload
found = workload(sys.argv[1])
tasks = found.draw().to("cuda")
learner = MAML(found.network().cuda(), loss=found.loss, lr=found.lr, steps=found.steps, backend=sys.argv[3])
for _ in range(4):
    learner.backward(tasks)
torch.cuda.synchronize()
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
    learner.backward(tasks)
    torch.cuda.synchronize()
rows = [{"kernel": e.key[:80], "calls": e.count, "us": e.self_device_time_total} for e in profile.key_averages()]
json.dump(sorted(rows, key=lambda r: -r["us"])[:40], open(sys.argv[2], "w"))
"""


@dataclass(frozen=True)
class Job:
    """Where results go, which executors are measured, and when the time is up."""

    out: Path
    backends: str
    end: float

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


def run(command: list[str], limit: float, log: Path, **environment: str) -> dict[str, Any]:
    """Runs ``command`` for at most ``limit`` seconds, its output in ``log``."""
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment},
            start_new_session=True,
        )  # fmt: skip
        try:
            state = "passed" if process.wait(max(1.0, limit)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            state = "cut off"
    seconds = round(time.monotonic() - began, 1)
    return {"state": state, "seconds": seconds, "end": log.read_text(errors="replace")[-1500:]}


def build(job: Job) -> dict[str, Any]:
    """The package, in place."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
    return run(command, min(150, job.left), job.out / "build.log")


def test(job: Job) -> dict[str, Any]:
    """Everything marked ``gpu``."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--maxfail=20", "--durations=10"]
    return run(command, min(180, job.left), job.out / "test.log")


def bench(job: Job) -> dict[str, Any]:
    """The workloads against every peer that is there, each in a process of its own."""

    def one(name: str, file: Path) -> dict[str, Any]:
        command = [sys.executable, "-c", BENCH, name, str(file), job.backends]
        return run(command, min(150, job.left), job.out / f"bench-{name}.log")

    return _each(WORKLOADS, job, "bench", one)


def profile(job: Job) -> dict[str, Any]:
    """Time by kernel of one meta-step."""

    def one(name: str, file: Path) -> dict[str, Any]:
        command = [sys.executable, "-c", PROFILE, name, str(file), job.backends.split(",")[0]]
        return run(command, min(90, job.left), job.out / f"profile-{name}.log")

    return _each(("omni5w1s-1", "mini5w1s-5"), job, "profile", one)


def sanitize(job: Job) -> dict[str, Any]:
    """The kernels at small blocks under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"state": "skipped", "end": "compute-sanitizer is not installed"}
    tests = [sys.executable, "-m", "pytest", "-q", "tests/test_triton.py", "-k", "small"]
    command = [tool, "--error-exitcode", "9", *tests]
    return run(command, min(120, job.left), job.out / "sanitize.log", PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def _each(
    names: Iterable[str], job: Job, step: str, one: Callable[[str, Path], dict[str, Any]]
) -> dict[str, Any]:
    """``one`` for each workload, with what it has written into its file."""
    results: dict[str, Any] = {}
    for name in names:
        if job.left < 15:
            results[name] = {"state": "skipped", "end": "no time left"}
            continue
        file = job.out / f"{step}-{name}.json"
        file.unlink(missing_ok=True)
        results[name] = one(name, file)
        try:
            results[name]["result"] = json.loads(file.read_text())
        except (OSError, json.JSONDecodeError):
            results[name]["result"] = None
    states = {r["state"] for r in results.values()}
    return {"state": states.pop() if len(states) == 1 else "partly", "workloads": results}


STEPS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "build": build, "test": test, "bench": bench, "profile": profile, "sanitize": sanitize,
}  # fmt: skip


def describe() -> dict[str, Any]:
    """Device, versions, commit."""
    import torch

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return ""

    gpu = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else 0
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": output("git", "rev-parse", "HEAD") + ("+changes" if output("git", "status", "--porcelain") else ""),
        "device": torch.cuda.get_device_name(0) if gpu else None,
        "memory": memory,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("torch", "triton", "jax", "learn2learn", "higher")},
    }


def main() -> int:
    """0 where every step passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--only", default=",".join(STEPS), help=f"steps, of {', '.join(STEPS)}")
    parser.add_argument("--backends", default="triton", help="executors to measure, with commas between")
    parser.add_argument("--seconds", type=float, default=530, help="for everything")
    options = parser.parse_args()
    steps = options.only.split(",")
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        parser.error(f"--only: {unknown[0]!r} is unknown; choose from {', '.join(STEPS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    job = Job(options.out.resolve(), options.backends, time.monotonic() + options.seconds)
    report = {**describe(), "steps": {}}
    if report["device"] is None:
        print("There is no GPU here: torch.cuda.is_available() is false. Nothing was run.")
        return 2
    for step in steps:
        print(f"{step} ...", flush=True)
        try:
            report["steps"][step] = STEPS[step](job)
        except Exception as error:  # the results of the other steps must not go with it
            report["steps"][step] = {"state": "failed", "end": f"{type(error).__name__}: {error}"}
        found = report["steps"][step]
        why = "" if found["state"] == "passed" else f"\n{found.get('end', '')}"
        print(f"{step}: {found['state']}{why}", flush=True)
        (job.out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(found["state"] == "passed" for found in report["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
