"""The time that a plan has used: the machine's own, or a made-up one that shows what would happen."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Clock:
    """Seconds since it was made."""

    real = True

    def __init__(self) -> None:
        self._began = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._began

    def spend(self, name: str, expected: float, granted: float) -> None:
        """A step has ended. Its time has passed by itself."""


class FakeClock(Clock):
    """Each step takes the time that is expected of it, whatever it takes here.

    ``factors``: how many times longer the steps of these names take; they are cut off at what they are granted.
    """

    real = False

    def __init__(self, factors: Mapping[str, float] | None = None) -> None:
        self._passed, self._factors = 0.0, dict(factors or {})

    def elapsed(self) -> float:
        return self._passed

    def spend(self, name: str, expected: float, granted: float) -> None:
        self._passed += min(expected * self._factors.get(name, 1.0), granted)
