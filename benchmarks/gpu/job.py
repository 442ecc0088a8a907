"""What a step is given: a time, the pack, the report, and a way to run processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .clock import Clock
from .process import run
from .report import Report
from .results import Results

ROOT = Path(__file__).resolve().parents[2]
WORKERS = "benchmarks.gpu.workers"
_REHEARSED = 120.0  # seconds that a process has in a rehearsal, whose clock does not count them


@dataclass
class Job:
    """A run. ``pack``: the folder of ``make gpu-pack``, if there is one. ``rehearsal``: is it without a GPU, on tiny
    sizes? ``environment``: of all processes from now on; ``began`` and ``granted`` are of the step at hand."""

    report: Report
    clock: Clock
    pack: Path | None = None
    rehearsal: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    step: str = ""
    began: float = 0.0
    granted: float = 0.0

    @property
    def device(self) -> str:
        """Where tensors are."""
        return "cpu" if self.rehearsal else "cuda"

    @property
    def oracles(self) -> Path | None:
        """The folder of float64 oracles."""
        return None if self.pack is None else self.pack / "oracles"

    @property
    def left(self) -> float:
        """Seconds that a process of this step can have."""
        return self.began + self.granted - self.clock.elapsed() if self.clock.real else _REHEARSED

    @property
    def results(self) -> Results:
        """Where the step's numbers go."""
        return self.report.results(self.step)

    def do(self, step: str, granted: float, work: Callable[[Job], dict[str, Any]]) -> dict[str, Any]:
        """``work``, as the step of that name. Kernels that the pack should have had are counted."""
        self.step, self.began, self.granted = step, self.clock.elapsed(), granted
        before = self._compiled()
        found = work(self)
        missed = [] if before is None else [name for _, name in (self._compiled() or set()) - before]
        if missed:
            self.results.add("triton", compiled=len(missed), kernels=sorted(set(missed)))
        return found

    def run(
        self, command: Sequence[str], log: str | None = None, environment: Mapping[str, str] | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """``command`` within the step's time, with more ``environment``; its output in ``<step>.log``, or ``log``."""
        file = self.report.logs / f"{(log or self.step).replace(':', '-')}.log"
        variables = {"PYTHONUNBUFFERED": "1", **self.environment, **self.results.environment(), **(environment or {})}
        return run(command, max(self.left, 0.1), file, variables, ROOT, self.report.show)

    def worker(self, name: str, *arguments: str, tool: Sequence[str] = ()) -> dict[str, Any]:
        """A program of ``workers/``, with what all of them are told; ``tool``: what it runs under."""
        told = ["--device", self.device]
        told += ["--rehearse"] if self.rehearsal else []
        told += ["--oracles", str(self.oracles)] if self.oracles else []
        quiet = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if self.rehearsal else {}
        return self.run([*tool, sys.executable, "-m", f"{WORKERS}.{name}", *told, *arguments], environment=quiet)

    def _compiled(self) -> set[tuple[str, str]] | None:
        """The kernels in Triton's cache, folder and name; ``None`` before there is one."""
        cache = self.environment.get("TRITON_CACHE_DIR")
        return None if cache is None else {(file.parent.name, file.stem) for file in Path(cache).glob("*/*.cubin")}


def read_json(file: Path) -> Any:
    """What a process has left; ``None`` where that is nothing whole."""
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return None
