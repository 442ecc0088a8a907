"""Shows how a run goes on: by a bar on a terminal, by plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from metafast.extras import require

# A log that nobody watches gets a line at most this often, in seconds.
LINE_EVERY = 5.0


class Progress:
    """Shows nothing; it is the base of those that show something."""

    def start(self, done: int, total: int) -> None:
        """Is called when the run begins, or goes on, at iteration ``done``."""

    def step(self, done: int) -> None:
        """Is called when an iteration has been launched."""

    def report(self, done: int, values: dict[str, float], left: float) -> None:
        """Shows what the iterations up to ``done`` measured; ``left`` is the time left in seconds."""

    def note(self, text: str) -> None:
        """Shows something worth saying once."""

    def close(self) -> None:
        """Is called when the iterations are over."""


class Lines(Progress):
    """Shows plain lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = 0.0
        self._total = 0

    def start(self, done: int, total: int) -> None:
        self._total = total

    def report(self, done: int, values: dict[str, float], left: float) -> None:
        if time.monotonic() - self._last >= LINE_EVERY or done == self._total:
            self._last = time.monotonic()
            self.note(f"iteration {done}/{self._total}  {describe(values)}  {clock(left)} left")

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class Bar(Progress):
    """Shows a bar that stays on one line."""

    def __init__(self, stream: TextIO) -> None:
        progress, console = require("rich.progress"), require("rich.console")
        self._bar = progress.Progress(
            progress.TextColumn("{task.completed}/{task.total}"),
            progress.BarColumn(),
            progress.TextColumn("{task.description}"),
            console=console.Console(file=stream, highlight=False),
        )
        self._task: Any = None

    def start(self, done: int, total: int) -> None:
        self._task = self._bar.add_task("starting", total=total, completed=done)
        self._bar.start()

    def step(self, done: int) -> None:
        self._bar.update(self._task, completed=done)

    def report(self, done: int, values: dict[str, float], left: float) -> None:
        self._bar.update(self._task, completed=done, description=f"{describe(values)}  {clock(left)} left")

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False)

    def close(self) -> None:
        self._bar.stop()


def terminal() -> Progress:
    """Returns a bar when standard error is a terminal, else lines."""
    return Bar(sys.stderr) if sys.stderr.isatty() else Lines(sys.stderr)


def describe(values: dict[str, float]) -> str:
    """Writes ``loss 0.1234  accuracy 97.5%  310 tasks/s``."""
    parts = [f"loss {values['loss']:.4f}"]
    if "accuracy" in values:
        parts.append(f"accuracy {values['accuracy']:.1%}")
    return "  ".join([*parts, f"{values['tasks_per_s']:.4g} tasks/s"])


def clock(seconds: float) -> str:
    """Writes hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
