"""``metafast profile`` measures where the time of a workload goes: by phase, and by layer and rule."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from metafast.bench.workloads import Workload
from metafast.executors import Executor, choose
from metafast.files import check_writable
from metafast.learners import MAML
from metafast.machine import describe, rates
from metafast.profile import gpu
from metafast.profile.costs import layer_costs
from metafast.profile.cpu import recorded
from metafast.profile.layered import SpanRecorder, TimedExecutor
from metafast.profile.result import Profile, phases, rows
from metafast.profile.spans import LOSS, Span, Timeline, around, undisturbed

__all__ = ["Profile", "Timeline", "main_profile", "profile"]

_WARM_UP = 2
# Without --iterations at least and at most so many are recorded.
_FEWEST = 4
_MOST = 50
_CALL = "meta-gradient"


def main_profile(workload: Workload, out: Path, arguments: list[str], **options: Any) -> Profile:
    """Profiles, prints tables and a verdict, and writes the files.

    Args:
        workload: the workload to profile.
        out: the folder for ``profile.json``, ``trace.json`` and ``roofline.png``, and on a GPU ``memory.pickle``.
        arguments: the arguments of the command, which the command lines of Nsight repeat.
        options: those of :func:`profile`.

    Raises:
        ValueError, RuntimeError: as :func:`profile`.
        OSError: ``out`` cannot be made; this shows before anything is run.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out} is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("profile.json", "trace.json", "roofline.png"):
        check_writable(out / name)
    found, timeline = profile(workload, snapshot=out / "memory.pickle", **options)
    if found.machine["device"] != "cpu":
        found = replace(found, commands=gpu.commands(arguments, out))
    from metafast.profile.roofline import draw
    from metafast.profile.table import print_profile
    from metafast.profile.timeline import write_trace

    (out / "profile.json").write_text(json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n")
    write_trace(timeline, f"{found.workload} on {found.executor}", out / "trace.json")
    draw(found, out / "roofline.png")
    print_profile(found)
    return found


def profile(
    workload: Workload,
    *,
    backend: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    iterations: int | None = None,
    snapshot: Path | None = None,
) -> tuple[Profile, Timeline]:
    """Meta-trains ``workload`` and records what happens. An iteration draws tasks, takes a meta-gradient and an outer
    step.

    As many iterations run before and after without being recorded, which shows what recording costs. Of both kinds
    only the faster half counts.

    Args:
        workload: the workload to profile.
        backend: the executor.
        device: the device.
        threads: the threads of torch; ``None`` leaves them as they are.
        iterations: how many iterations are recorded; ``None``: as many as take about two seconds.
        snapshot: the file for a snapshot of a GPU's memory.

    Raises:
        ValueError: an option has an impossible value; the text names it.
        RuntimeError: ``backend`` cannot run the workload.
    """
    for option, value in (("iterations", iterations), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"--{option} {value}: must be at least 1")
    if threads is not None:
        torch.set_num_threads(threads)
    run = _Run(workload, backend, torch.device(device))
    begin, end = run.several(_WARM_UP)[-1]
    if iterations is None:
        iterations = min(_MOST, max(_FEWEST, int(2 / (end - begin))))
    moments = run.several(iterations)
    timeline = run.record(iterations)
    moments += run.several(iterations)
    unrecorded = sorted(end - begin for begin, end in moments)[:iterations]
    machine = rates(device)
    tasks = workload.draw()
    leads = {span.layer for span in timeline.rules} - {LOSS}
    costs = layer_costs(run.learner.program, leads, tasks.support.at(0).x[0], tasks.query_x.shape[1])
    kernels: tuple[dict[str, Any], ...] = ()
    if run.device.type == "cuda":
        kernels = gpu.kernels(lambda: run.iterate(0), iterations)
        if snapshot is not None:
            gpu.snapshot(lambda: run.iterate(0), snapshot)
    result = Profile(
        workload.name,
        run.executor.name,
        describe(device, torch.get_num_threads()),
        machine,
        wall=timeline.wall / timeline.iterations,
        unrecorded=sum(unrecorded) / len(unrecorded),
        threads=timeline.threads,
        phases=phases(timeline),
        rows=rows(timeline, costs, machine),
        kernels=kernels,
    )
    return result, timeline


class _Run:
    """Meta-trains a workload. ``host`` collects the spans of Python's thread while iterations are recorded."""

    def __init__(self, workload: Workload, backend: str, device: torch.device) -> None:
        self.workload, self.device = workload, device
        self.model = workload.network().to(device, torch.float32)
        self.learner = self._learner(backend)
        tasks = workload.draw().to(device)
        self.learner.prepare(tasks)
        self.executor = choose(self.learner.program, self.learner.loop, tasks.shapes, backend).executor
        self.optimizer = torch.optim.Adam(self.learner.parameters(), lr=1e-5)
        self.host: list[Span] | None = None

    def _learner(self, backend: str | Executor) -> MAML:
        return self.workload.learner(self.model, backend=backend)

    def iterate(self, seed: int) -> None:
        """Runs one iteration. While it is recorded on a GPU, each of its parts waits for the GPU."""
        tasks = self._timed("sample", lambda: self.workload.draw(seed).to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        self._timed(_CALL, lambda: self.learner.backward(tasks))
        self._timed("outer step", self.optimizer.step)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def several(self, iterations: int) -> list[tuple[float, float]]:
        """Runs ``iterations`` iterations and returns when each began and ended."""
        moments = [time.perf_counter()]
        for i in range(iterations):
            self.iterate(i)
            moments.append(time.perf_counter())
        return list(pairwise(moments))

    def record(self, iterations: int) -> Timeline:
        """Records ``iterations`` iterations, after one to warm up."""
        found: list[Span] = []
        rules: list[Span] = []
        unrecorded = self.learner
        timed = TimedExecutor(self.executor) if self.executor.observed(lambda program: program) else None
        self.learner = self._learner(timed or self.executor)
        self.iterate(0)
        self.host = []
        with self._recorded(timed, found, rules):
            moments = self.several(iterations)
        calls = [span for span in self.host if span.name == _CALL]
        threads = len({span.thread for span in found}) or 1
        host = self.host
        if found:
            edges, waits = around(calls, found)
            found += waits
            host = sorted([span for span in host if span.name != _CALL] + edges, key=lambda span: span.begin)
        self.host, self.learner = None, unrecorded
        everything = Timeline(iterations, 0.0, tuple(host), tuple(found), tuple(rules), threads)
        return undisturbed(everything, moments)

    @contextlib.contextmanager
    def _recorded(self, timed: TimedExecutor | None, phases: list[Span], rules: list[Span]) -> Iterator[None]:
        """Fills both lists with what the executor does within the block; ``timed`` is ``None`` for the executors in
        C++."""
        if timed is None:
            with recorded(self.learner.program, phases, rules):
                yield
            return
        timed.recorder = recorder = SpanRecorder(self.device)
        yield
        timed.recorder = None
        recorder.add_spans(phases, rules)

    def _timed(self, name: str, call: Callable[[], Any]) -> Any:
        if self.host is None:
            return call()
        begin = time.perf_counter()
        result = call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.host.append(Span(name, begin, time.perf_counter()))
        return result
