"""Everything that only a GPU can show, in one command: ``python3 benchmarks/gpu_check.py --out DIR``.

It needs nvcc and a python3 with torch, setuptools 77 and pytest: no make, no virtual environment, no network. Each step
runs in processes of its own with a time limit; one that fails or runs long leaves the results of the others alone. All
goes into ``DIR/gpu_check.json`` after every step: device, versions, commit, and of each step its state and findings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# With the executor that is meant for each; -tN: N tasks in place of the workload's own number.
WORKLOADS = {
    **dict.fromkeys(("sin25-1", "sin25-5", "sin1024-5", "sin4096-5"), "native-cuda"),
    **dict.fromkeys(("omni5w1s-1", "omni5w1s-5", "omni20w1s-5", "mini5w1s-5", "mini5w5s-5"), "triton"),
    **dict.fromkeys(("mini5w1s-5-t32", "mini5w5s-5-t32"), "triton"),
    **dict.fromkeys(("wide5w1s-5", "wide5w1s-5-t1024"), "native-cuda"),  # clusters of eight blocks
}
# Of so many tasks one after another takes minutes.
AT_ONCE = dict.fromkeys(("sin4096-5", "wide5w1s-5-t1024"), ("torch.func", "torch.compile", "JAX"))
ROUNDED = ("sin4096-5", "wide5w1s-5")
PROFILED = ("sin1024-5", "wide5w1s-5", "omni5w1s-1", "mini5w1s-5")
SETTINGS = {"device": "cuda", "budget": 4, "limit": 60, "first_limit": 60}  # of metafast.bench, in seconds
GRACE = 10  # seconds that a process has to write down what it knows when its time is up
CHOSEN = """
import json, sys
from dataclasses import replace
from pathlib import Path
from metafast.benchmarks.workloads import workload
name, _, tasks = sys.argv[1].partition("-t")
chosen = workload(name)
if tasks:
    chosen = replace(chosen, name=sys.argv[1], tasks=int(tasks))
options = json.loads(sys.argv[3])
settings, backends = options["settings"], options["backends"].split(",")
"""
BENCH = f"""{CHOSEN}
from metafast.bench import Outputs, Settings, main_bench
main_bench(
    [], chosen, backends=backends, chosen_peers=options["peers"], settings=Settings(**settings),
    outputs=Outputs(json=Path(sys.argv[2])),
)
"""
PROFILE = f"""{CHOSEN}
from metafast import MAML
from metafast.profile.gpu import kernels
tasks, model = chosen.draw().to(settings["device"]), chosen.network().to(settings["device"])
learner = MAML(model, loss=chosen.loss, lr=chosen.lr, steps=chosen.steps, backend=backends[0])
for _ in range(4):
    learner.backward(tasks)
Path(sys.argv[2]).write_text(json.dumps(kernels(lambda: learner.backward(tasks), 10)[:40]))
"""
PRECISION = f"""{CHOSEN}
import torch
from torch.utils.benchmark import Timer
from metafast import MAML
from metafast.executors.cuda import PRECISIONS
device, tasks = settings["device"], chosen.draw().to(settings["device"])

def learner(backend, precision="float32", dtype=torch.float32):
    model, rules = chosen.network().to(device, dtype), {{"lr": chosen.lr, "steps": chosen.steps}}
    return MAML(model, loss=chosen.loss, backend=backend, precision=precision, **rules)

def gradient(learner, tasks):
    learner.backward(tasks)
    return torch.cat([p.grad.flatten().double() for p in learner.model.parameters()])

truth, found = gradient(learner("reference", dtype=torch.float64), tasks.to(torch.float64)), {{}}
for precision in PRECISIONS:
    one = learner(backends[0], precision)
    error = float((gradient(one, tasks) - truth).norm() / truth.norm())
    timer = Timer("one.backward(tasks)", globals={{"one": one, "tasks": tasks}})
    seconds = timer.blocked_autorange(min_run_time=settings["budget"] / 4).median
    found[precision] = {{"ms": 1000 * seconds, "error": error}}
    Path(sys.argv[2]).write_text(json.dumps(found))
"""
TRAIN = "from metafast.cli import main; main()"
# Each in a process of its own: after one illegal access all that follows in a process fails.
TESTS = {
    "blocks": "tests/test_gpu.py",
    "training": "tests/test_gpu_train.py tests/test_sampler.py",
    "triton": "tests/test_triton.py tests/test_triton_shared.py tests/test_triton_executor.py",
}
BLOCKS = ("tests/test_gpu.py", "float32 and (classifier or norm)")
SANITIZED = {  # tool, files, tests: networks of blocks, with sums in warps and without, and kernels with small blocks
    "memcheck": ("memcheck", *BLOCKS),
    "racecheck": ("racecheck", *BLOCKS),
    "synccheck": ("synccheck", *BLOCKS),
    "memcheck, triton": ("memcheck", "tests/test_triton.py", "small"),
}


@dataclass(frozen=True)
class Job:
    """Where results go, what is measured, when the time is up.

    ``backends``: executors in place of those meant for the workloads. ``peers``: none: all. ``omniglot``: the folder of
    its two zips.
    """

    out: Path
    end: float
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    backends: str | None = None
    peers: tuple[str, ...] = ()
    omniglot: Path | None = None

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


def run(command: list[str], limit: float, log: Path, **environment: str) -> dict[str, Any]:
    """Runs ``command`` for at most ``limit`` seconds, its output in ``log``; then it is interrupted, soon killed."""
    began = time.monotonic()
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **environment}  # JAX would take 3/4 of a GPU
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        try:
            state = "passed" if process.wait(max(1.0, limit)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "cut off"
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    seconds = round(time.monotonic() - began, 1)
    return {"state": state, "seconds": seconds, "end": log.read_text(errors="replace")[-1500:]}


def build(job: Job) -> dict[str, Any]:
    """The package, in place; without its kernels there is nothing to check."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
    return run(command, min(150, job.left), job.out / "build.log", METAFAST_CPU="1", METAFAST_CUDA="1")


def test(job: Job) -> dict[str, Any]:
    """Everything marked ``gpu``. Where tests fail, the first of them runs again, each launch waited for."""
    results: dict[str, Any] = {}
    for name, files in TESTS.items():
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-vv", "-o", "faulthandler_timeout=60", *files.split()]
        options = ["--maxfail=20", "--durations=10"]
        results[name] = run([*command, *options], min(120, job.left), job.out / f"test-{name}.log")
        if results[name]["state"] == "failed":
            log = job.out / f"test-{name}-again.log"
            again = run([*command, "--lf", "-x"], min(60, job.left), log, CUDA_LAUNCH_BLOCKING="1")
            results[name]["again"] = again
    return _together("files", results)


def bench(job: Job) -> dict[str, Any]:
    """The workloads against every peer that is there, each in a process of its own."""
    return _each(job.workloads, job, "bench", BENCH, 150)


def profile(job: Job) -> dict[str, Any]:
    """Time by kernel of one meta-gradient."""
    return _each([name for name in PROFILED if name in job.workloads], job, "profile", PROFILE, 90)


def precision(job: Job) -> dict[str, Any]:
    """Time of a meta-gradient with each precision of products, and its error against float64."""
    return _each([name for name in ROUNDED if name in job.workloads], job, "precision", PRECISION, 60)


def sanitize(job: Job) -> dict[str, Any]:
    """Small cases under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"state": "skipped", "end": "compute-sanitizer is not installed"}
    results = {}
    for name, (kind, files, chosen) in SANITIZED.items():
        command = [tool, "--tool", kind, "--error-exitcode", "9"]
        command += [sys.executable, "-m", "pytest", "-vv", *files.split(), "-k", chosen]
        log = job.out / f"{name.replace(', ', '-')}.log"
        results[name] = run(command, min(120, job.left), log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return _together("tools", results)


def sinusoid(job: Job) -> dict[str, Any]:
    """The paper's run: 70,000 iterations, 25 tasks."""
    return _train(job, "sinusoid", "native-cuda", 90)


def omniglot5(job: Job) -> dict[str, Any]:
    """The paper's run on random characters, 5-way 1-shot: 60,000 iterations."""
    return _train(job, "omniglot-5w1s", "triton", 480, "--split", "maml")


def omniglot20(job: Job) -> dict[str, Any]:
    """Likewise, 20-way 1-shot."""
    return _train(job, "omniglot-20w1s", "triton", 480, "--split", "maml")


def _train(job: Job, recipe: str, backend: str, limit: float, *options: str) -> dict[str, Any]:
    """``metafast train`` from the start, with its summary."""
    folder = job.out / recipe
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-c", TRAIN, "train", recipe, "--out", str(folder), *options]
    command += ["--device", SETTINGS["device"], "--backend", job.backends or backend]
    if job.omniglot is not None and recipe.startswith("omniglot"):
        command += ["--data", str(job.omniglot.resolve())]
    found = run(command, min(limit, job.left), job.out / f"{recipe}.log")
    return {**found, "result": _read(folder / "summary.json")}


def _each(names: Iterable[str], job: Job, step: str, code: str, limit: float) -> dict[str, Any]:
    """``code`` for each workload in a process of its own, with what it has written into its file."""
    results: dict[str, Any] = {}
    for name in names:
        if job.left < 15:
            results[name] = {"state": "skipped", "end": "no time left"}
            continue
        file = job.out / f"{step}-{name}.json"
        file.unlink(missing_ok=True)
        peers = job.peers or AT_ONCE.get(name, ())
        options = {"settings": SETTINGS, "backends": job.backends or WORKLOADS[name], "peers": peers}
        command = [sys.executable, "-c", code, name, str(file), json.dumps(options)]
        results[name] = run(command, min(limit, job.left), job.out / f"{step}-{name}.log")
        results[name]["result"] = _read(file)
    return _together("workloads", results)


def _read(file: Path) -> Any:
    """What a process has left; ``None`` where that is nothing whole."""
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return None


def _together(key: str, results: dict[str, Any]) -> dict[str, Any]:
    """A step of several parts: their common state, and how those ended that did not pass."""
    states = {found["state"] for found in results.values()}
    ends = [f"{name}: {found['end'][-500:]}" for name, found in results.items() if found["state"] != "passed"]
    return {"state": states.pop() if len(states) == 1 else "partly", key: results, "end": "\n".join(ends)}


STEPS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "build": build, "test": test, "sinusoid": sinusoid, "profile": profile, "precision": precision,
    "bench": bench, "sanitize": sanitize, "omniglot5": omniglot5, "omniglot20": omniglot20,
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
    parser.add_argument("--only", help=f"steps, of {', '.join(STEPS)}; default: all for which there are data")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="to measure; default: %(default)s")
    parser.add_argument("--backends", help="executors to measure, with commas between; default: each workload's own")
    parser.add_argument("--peers", help="of them, with commas between; default: all that are there")
    parser.add_argument("--omniglot", type=Path, help="folder of the two zips of Omniglot")
    parser.add_argument("--seconds", type=float, default=530, help="for everything")
    options = parser.parse_args()
    possible = [step for step in STEPS if options.omniglot is not None or not step.startswith("omniglot")]
    steps = possible if options.only is None else options.only.split(",")
    workloads = tuple(options.workloads.split(","))
    for option, names, known in (("--only", steps, STEPS), ("--workloads", workloads, WORKLOADS)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"{option}: {unknown[0]!r} is unknown; choose from {', '.join(known)}")
    if missing := [step for step in steps if step in STEPS and step not in possible]:
        parser.error(f"step {missing[0]} needs --omniglot: the folder of its two zips")
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    peers = tuple(options.peers.split(",")) if options.peers else ()
    job = Job(options.out.resolve(), end, workloads, options.backends, peers, options.omniglot)
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
