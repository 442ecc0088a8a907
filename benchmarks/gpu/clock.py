"""Clocks say how much time a plan has used: the real one, or a fake one that shows what would happen."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Clock:
    """Counts seconds from its creation."""

    real = True

    def __init__(self) -> None:
        self._began = time.monotonic()

    def elapsed(self) -> float:
        """Returns the seconds since the run began."""
        return time.monotonic() - self._began

    def spend(self, name: str, expected: float, granted: float) -> None:
        """Is called when a step has ended. A real clock has nothing to do: the time has passed."""


class FakeClock(Clock):
    """Lets each step take its expected time, whatever it really takes.

    Args:
        factors: by the name of a step, how many times longer it takes; it is cut off at the time that it was granted.
    """

    real = False

    def __init__(self, factors: Mapping[str, float] | None = None) -> None:
        self._passed, self._factors = 0.0, dict(factors or {})

    def elapsed(self) -> float:
        return self._passed

    def spend(self, name: str, expected: float, granted: float) -> None:
        self._passed += min(expected * self._factors.get(name, 1.0), granted)
