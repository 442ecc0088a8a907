"""The rules of time: what each step of a plan is given, and when it is left out."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from .job import Job

RESERVE = 8.0  # seconds at the end of a plan for killing what runs and writing what is known
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SPARE = 60.0  # seconds of its limit that a plan leaves where every step takes what is expected


@dataclass(frozen=True)
class Step:
    """One part of a plan. ``run`` does it and returns its ``state`` and findings.

    ``expected`` and ``limit`` are seconds: what it should take, and what it gets at most. Without a ``vital`` step
    there is nothing to check, and the run ends.
    """

    name: str
    expected: float
    limit: float
    run: Callable[[Job], dict[str, Any]]
    vital: bool = False

    @property
    def group(self) -> str:
        """The part of the name before the colon."""
        return self.name.partition(":")[0]


@dataclass(frozen=True)
class Plan:
    """Steps in their order; ``limit``: seconds for all of them together, with the writing of the report."""

    name: str
    limit: float
    steps: tuple[Step, ...]

    def chosen(self, names: Collection[str]) -> tuple[Step, ...]:
        """The steps of these names or groups: ``peers`` is all of ``peers:...``. No names: all steps."""
        return tuple(step for step in self.steps if not names or {step.name, step.group} & set(names))


class Stopped(BaseException):
    """A signal came; the text is its name."""


def heed_signals() -> None:
    """SIGTERM, SIGINT and SIGHUP raise Stopped, once: what comes later cannot disturb the writing of the report."""

    def stop(number: int, frame: object) -> None:
        ignore_signals()
        raise Stopped(signal.Signals(number).name)

    for each in _SIGNALS:
        signal.signal(each, stop)


def ignore_signals() -> None:
    """From now on what is at hand is finished."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def run_plan(plan: Plan, job: Job, only: Collection[str] = (), seconds: float | None = None) -> bool:
    """Runs the steps and writes the report, whatever happens. Did all of them pass?

    A step gets its limit, or what is left where that is less; with less than half of what is expected it is skipped.
    So nothing runs past ``plan.limit``, or past ``seconds`` in its place.
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
    """Did it pass?"""
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
    except Exception as error:  # the results of the other steps must not go with it
        found = {"state": "failed", "end": f"{type(error).__name__}: {error}"}
    job.clock.spend(step.name, step.expected, granted)
    found = {**found, "seconds": round(job.clock.elapsed() - began, 1), **times}
    job.report.step(step.name, found)
    if stopped is not None:
        raise stopped
    return bool(found["state"] == "passed")
