"""Runs a plan. Here are the rules of time: how long each step may take, and when it is skipped."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from .job import Job

RESERVE = 8.0  # seconds at the end of a plan to kill what runs and to write the report
SPARE = 60.0  # seconds of its limit that a plan leaves if every step takes its expected time
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Step:
    """One part of a plan.

    Args:
        name: its name, with its group before a colon.
        expected: the seconds that it should take.
        limit: the seconds that it may take.
        run: does the step, and returns its ``state`` and what it found.
        vital: whether the run ends if this step does not pass.
    """

    name: str
    expected: float
    limit: float
    run: Callable[[Job], dict[str, Any]]
    vital: bool = False

    @property
    def group(self) -> str:
        """Returns the part of the name before the colon."""
        return self.name.partition(":")[0]


@dataclass(frozen=True)
class Plan:
    """Steps in their order. ``limit`` is in seconds, for all of them and the writing of the report."""

    name: str
    limit: float
    steps: tuple[Step, ...]

    def chosen(self, names: Collection[str]) -> tuple[Step, ...]:
        """Returns the steps with these names or groups (``peers`` is all of ``peers:...``), or all steps if there are
        none."""
        return tuple(step for step in self.steps if not names or {step.name, step.group} & set(names))


class Stopped(BaseException):
    """A signal has come; the text is its name."""


def heed_signals() -> None:
    """Lets the first SIGTERM, SIGINT or SIGHUP raise Stopped. Later ones are ignored, so that the report is written."""

    def stop(number: int, frame: object) -> None:
        ignore_signals()
        raise Stopped(signal.Signals(number).name)

    for each in _SIGNALS:
        signal.signal(each, stop)


def ignore_signals() -> None:
    """Ignores signals from now on."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def run_plan(plan: Plan, job: Job, only: Collection[str] = (), seconds: float | None = None) -> bool:
    """Runs the steps and writes the report, whatever happens. Tells whether all steps passed.

    A step gets its limit, or the time that is left if that is less. If less than half of its expected time is left, it
    is skipped. So nothing runs past ``plan.limit``, or past ``seconds`` if that is given.
    """
    limit, report, end = seconds or plan.limit, job.report, "complete"
    try:
        for step in plan.chosen(only):
            if _run_step(step, job, limit - RESERVE - job.clock.elapsed()) or not step.vital:
                continue
            end = f"ended: without {step.name} there is nothing to check"
            break
    except Stopped as stop:
        end = f"stopped by {stop}"
    except BaseException as error:
        end = f"ended by {type(error).__name__}: {error}"
        raise
    finally:
        ignore_signals()
        report.close(end)
    steps = report.content["steps"].values()
    return end == "complete" and all(found["state"] == "passed" for found in steps)


def _run_step(step: Step, job: Job, left: float) -> bool:
    """Runs one step with ``left`` seconds in the plan. Tells whether it passed."""
    granted, began = min(step.limit, left), job.clock.elapsed()
    times = {"began": round(began, 1), "expected": step.expected, "granted": round(max(granted, 0.0), 1)}
    if granted < step.expected / 2:
        end = f"{max(left, 0):.0f} s are left and it is expected to take {step.expected:.0f}"
        job.report.step(step.name, {"state": "skipped", "seconds": 0.0, **times, "end": end})
        return False
    shorter = f", shortened from {step.limit:.0f}: no more is left" if granted < step.limit else ""
    job.report.say(f"{step.name}: at most {granted:.0f} s{shorter}")
    stopped: Stopped | None = None
    try:
        found = job.do(step.name, granted, step.run)
    except Stopped as stop:
        found, stopped = {"state": "stopped", "end": f"{stop} came"}, stop
    except Exception as error:  # the results of the other steps must not be lost
        found = {"state": "failed", "end": f"{type(error).__name__}: {error}"}
    job.clock.spend(step.name, step.expected, granted)
    found = {**found, "seconds": round(job.clock.elapsed() - began, 1), **times}
    job.report.step(step.name, found)
    if stopped is not None:
        raise stopped
    return bool(found["state"] == "passed")
