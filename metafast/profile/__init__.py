"""``metafast profile``: where the time of a workload goes, by phase and by layer and rule."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metafast.bench.workloads import Workload
from metafast.executors import Choice, CpuExecutor, CudaExecutor, Executor, TritonExecutor
from metafast.files import check_writable
from metafast.learners import MAML
from metafast.machine import describe, rates
from metafast.profile import gpu
from metafast.profile.costs import layer_costs
from metafast.profile.layered import Notes, Timed
from metafast.profile.native import noted
from metafast.profile.result import Profile, phases, rows
from metafast.profile.spans import LOSS, Span, Timeline, around, undisturbed
from metafast.program import Program
from metafast.tasks import TaskBatch

if TYPE_CHECKING:
    from metafast.executors.triton.lowering import Lowered

__all__ = ["Profile", "Timeline", "main_profile", "profile"]

_WARM_UP = 2
_FEWEST, _MOST = 4, 50  # iterations, where no number is asked for
_CALL = "meta-gradient"


def main_profile(workload: Workload, out: Path, arguments: list[str], **options: Any) -> Profile:
    """Profiles, prints tables and a verdict, and writes ``profile.json``, ``trace.json`` and ``roofline.png`` (on a GPU
    ``memory.pickle`` too) into the folder ``out``. ``arguments`` are those of the command, to be repeated under Nsight.

    Raises:
        ValueError, RuntimeError: as :func:`profile`.
        OSError: ``out`` cannot be made; found before anything is run.
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
    """Meta-trains ``workload`` for ``iterations`` iterations (tasks drawn, meta-gradient, outer step), recorded;
    ``None``: for about two seconds.

    As many run before and after without being recorded, so that what recording costs is known. Of both the faster half
    counts.

    Raises:
        ValueError: an option that cannot be; the text names it.
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
    plain = run.several(iterations)
    timeline = run.record(iterations)
    plain += run.several(iterations)
    unrecorded = sorted(end - begin for begin, end in plain)[:iterations]
    machine = rates(device)
    tasks = workload.draw()
    leads = {span.layer for span in timeline.rules} - {LOSS}
    costs = layer_costs(run.learner.program, leads, tasks.support_x[0], tasks.query_x.shape[1])
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
    """A workload being meta-trained."""

    def __init__(self, workload: Workload, backend: str, device: torch.device) -> None:
        self.workload, self.device = workload, device
        model = workload.network().to(device, torch.float32)
        self.learner = _Watched(model, loss=workload.loss, lr=workload.lr, steps=workload.steps, backend=backend)
        self.optimizer = torch.optim.Adam(self.learner.parameters(), lr=1e-5)
        self.host: list[Span] | None = None

    @property
    def executor(self) -> Executor:
        """The one that runs, once a batch has been seen."""
        assert self.learner.executor is not None
        return self.learner.executor

    def iterate(self, seed: int) -> None:
        """One iteration; on a GPU each part of it is waited for while it is recorded."""
        tasks = self._timed("sample", lambda: self.workload.draw(seed).to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        self._timed(_CALL, lambda: self.learner.backward(tasks))
        self._timed("outer step", self.optimizer.step)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def several(self, iterations: int) -> list[tuple[float, float]]:
        """Begin and end of each."""
        moments = [time.perf_counter()]
        for i in range(iterations):
            self.iterate(i)
            moments.append(time.perf_counter())
        return list(pairwise(moments))

    def record(self, iterations: int) -> Timeline:
        """Some iterations with all that they do, after one to warm up."""
        found: list[Span] = []
        rules: list[Span] = []
        self.learner.recorded = True
        self.iterate(0)
        self.host = []
        with self._noted(found, rules):
            moments = self.several(iterations)
        calls = [span for span in self.host if span.name == _CALL]
        threads = len({span.thread for span in found}) or 1
        host = self.host
        if found:
            edges, waits = around(calls, found)
            found += waits
            host = sorted([span for span in host if span.name != _CALL] + edges, key=lambda span: span.begin)
        self.host, self.learner.recorded = None, False
        everything = Timeline(iterations, 0.0, tuple(host), tuple(found), tuple(rules), threads)
        return undisturbed(everything, moments)

    @contextlib.contextmanager
    def _noted(self, found: list[Span], rules: list[Span]) -> Iterator[None]:
        executor = self.learner.watched
        if isinstance(executor, CpuExecutor):
            with noted(self.learner.program, found, rules):
                yield
        elif isinstance(executor, Timed):
            executor.notes = notes = Notes(self.device)
            yield
            executor.notes = None
            notes.tell(found, rules)
        else:
            yield

    def _timed(self, name: str, call: Callable[[], Any]) -> Any:
        if self.host is None:
            return call()
        begin = time.perf_counter()
        result = call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.host.append(Span(name, begin, time.perf_counter()))
        return result


class _Watched(MAML):
    """MAML that changes to an executor with timed layers while it is recorded; ``cpu`` notes its times by itself."""

    executor: Executor | None = None
    watched: Executor | None = None
    recorded = False

    def _choice_for(self, tasks: TaskBatch) -> Choice:
        choice = super()._choice_for(tasks)
        if self.watched is None:
            self.executor, self.watched = choice.executor, _watched(choice.executor)
        return replace(choice, executor=self.watched) if self.recorded else choice


def _watched(executor: Executor) -> Executor:
    if isinstance(executor, CpuExecutor | CudaExecutor):
        return executor
    return _TimedTriton(executor) if isinstance(executor, TritonExecutor) else Timed(executor)


class _TimedTriton(Timed):
    """Triton's layers are timed behind its lowering: one function of the executor after the other, without the CUDA
    graph that hides them from the host."""

    def __init__(self, inner: TritonExecutor) -> None:
        super().__init__(_Lowering(inner, super()._timed))

    def _timed(self, program: Program) -> Program:
        return program


class _Lowering(TritonExecutor):
    def __init__(self, like: TritonExecutor, timed: Callable[[Program], Program]) -> None:
        super().__init__(like.precision, like.interpreted, like.budget)
        self.timed = timed

    def _lowered(self, program: Program, x: Tensor) -> Lowered:
        lowered = super()._lowered(program, x)
        return replace(lowered, program=self.timed(lowered.program))
