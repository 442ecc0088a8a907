"""The machine's own measures."""

from __future__ import annotations

import time

from metafast.machine import timings


def test_calls_are_timed_until_the_seconds_have_passed():
    began = time.perf_counter()
    found = timings(lambda: time.sleep(0.01), "cpu", 0.05)
    assert 1 <= len(found) <= 5
    assert all(seconds >= 0.01 for seconds in found)
    assert time.perf_counter() - began >= 0.05


def test_there_are_as_many_calls_as_are_wanted_at_the_least():
    calls: list[int] = []
    assert len(timings(lambda: calls.append(1), "cpu", 0.0, fewest=3)) == len(calls) == 3
    assert len(timings(lambda: time.sleep(0.02), "cpu", 0.01)) == 1
