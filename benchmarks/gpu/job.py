"""A job is what a step works with: its time, the pack, the report, and a way to run processes."""

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
    """A run of the check.

    Args:
        report: the files that the run leaves.
        clock: says how much time is used.
        pack: the folder that ``make gpu-pack`` has filled, if there is one.
        rehearsal: whether it runs without a GPU, on tiny sizes.
        environment: environment variables of all processes that start from now on.
        step: the name of the current step.
        began: when the current step began, in seconds of the clock.
        granted: how many seconds the current step has.
    """

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
        """Returns the device of the tensors."""
        return "cpu" if self.rehearsal else "cuda"

    @property
    def oracles(self) -> Path | None:
        """Returns the folder of float64 oracles."""
        return None if self.pack is None else self.pack / "oracles"

    @property
    def left(self) -> float:
        """Returns the seconds that a process of this step may take."""
        return self.began + self.granted - self.clock.elapsed() if self.clock.real else _REHEARSED

    @property
    def results(self) -> Results:
        """Returns the object that the step adds its results to."""
        return self.report.results(self.step)

    def do(self, step: str, granted: float, work: Callable[[Job], dict[str, Any]]) -> dict[str, Any]:
        """Calls ``work`` as the step of that name. A result counts the kernels that Triton had to compile meanwhile."""
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
        """Runs ``command`` within the step's time, with more ``environment``; its output goes into ``<log or
        step>.log``."""
        file = self.report.logs / f"{(log or self.step).replace(':', '-')}.log"
        variables = {"PYTHONUNBUFFERED": "1", **self.environment, **self.results.environment(), **(environment or {})}
        return run(command, max(self.left, 0.1), file, variables, ROOT, self.report.show)

    def worker(self, name: str, *arguments: str, tool: Sequence[str] = ()) -> dict[str, Any]:
        """Runs a program of ``workers/`` with the options that all of them have, under ``tool`` if that is given."""
        options = ["--device", self.device]
        options += ["--rehearse"] if self.rehearsal else []
        options += ["--oracles", str(self.oracles)] if self.oracles else []
        variables = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if self.rehearsal else {}
        return self.run([*tool, sys.executable, "-m", f"{WORKERS}.{name}", *options, *arguments], environment=variables)

    def _compiled(self) -> set[tuple[str, str]] | None:
        """Returns folder and name of each kernel in Triton's cache; ``None`` before there is a cache."""
        cache = self.environment.get("TRITON_CACHE_DIR")
        return None if cache is None else {(file.parent.name, file.stem) for file in Path(cache).glob("*/*.cubin")}


def read_json(file: Path) -> Any:
    """Reads a JSON file that a process has written; ``None`` if it is missing or incomplete."""
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return None
