"""A span is something that was done from one moment to another. The times of all executors have this form."""

from __future__ import annotations

from bisect import bisect, bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

RULES = ("forward", "backward", "tangent_forward", "tangent_backward")
LOSS = "loss"
HOST = -1
"""The number of Python's thread; the threads of executors are numbered from 0."""


@dataclass(frozen=True)
class Span:
    """A phase or a rule of a layer; ``begin`` and ``end`` are seconds of ``time.perf_counter``.

    A phase has no ``layer``, and a name for people: ``"inner step 1"``. A rule has the ``phase`` that it ran in, its
    ``layer`` (a node's name, or ``"loss"``), and the number of ``tasks`` that it ran for at once, the first of which is
    ``task``.
    """

    name: str
    begin: float
    end: float
    thread: int = HOST
    phase: str = ""
    layer: str = ""
    task: int = 0
    tasks: int = 1

    @property
    def seconds(self) -> float:
        """Returns how long it took."""
        return self.end - self.begin


@dataclass(frozen=True)
class Timeline:
    """What ``iterations`` iterations did, which took ``wall`` seconds together.

    Spans in ``host`` do not overlap. ``phases`` and ``rules`` ran on ``threads`` threads side by side, within the
    host's ``meta-gradient``; divided by the number of threads, their seconds are wall time.
    """

    iterations: int
    wall: float
    host: tuple[Span, ...]
    phases: tuple[Span, ...]
    rules: tuple[Span, ...]
    threads: int


def undisturbed(timeline: Timeline, iterations: Sequence[tuple[float, float]]) -> Timeline:
    """Keeps the faster half of the ``iterations``, which are pairs of begin and end. On a shared machine other work
    slows down the rest."""
    typical = median(end - begin for begin, end in iterations)
    kept = [(begin, end) for begin, end in iterations if end - begin <= typical]
    begins = [begin for begin, _ in kept]

    def inside(spans: tuple[Span, ...]) -> tuple[Span, ...]:
        found = []
        for span in spans:
            i = bisect(begins, span.begin) - 1
            if i >= 0 and span.end <= kept[i][1]:
                found.append(span)
        return tuple(found)

    wall = sum(end - begin for begin, end in kept)
    host, phases, rules = (inside(spans) for spans in (timeline.host, timeline.phases, timeline.rules))
    return replace(timeline, iterations=len(kept), wall=wall, host=host, phases=phases, rules=rules)


def around(calls: Iterable[Span], inside: Iterable[Span]) -> tuple[list[Span], list[Span]]:
    """Names the time that the ``calls`` spend around the spans ``inside`` them. Returns spans on the host and on
    threads.

    On the host this is ``prepare`` before the first span and ``collect`` after the last. A thread that starts later or
    ends earlier than the others has a ``wait``.
    """
    ordered = sorted(inside, key=lambda span: span.begin)
    begins = [span.begin for span in ordered]
    host, waits = [], []
    for call in calls:
        within = ordered[bisect_left(begins, call.begin) : bisect(begins, call.end)]
        if not within:
            continue
        first, last = within[0].begin, max(span.end for span in within)
        host += [Span("prepare", call.begin, first), Span("collect", last, call.end)]
        for thread in {span.thread for span in within}:
            own = [span for span in within if span.thread == thread]
            begin, end = own[0].begin, max(span.end for span in own)
            edges = [Span("wait", first, begin, thread), Span("wait", end, last, thread)]
            waits += [edge for edge in edges if edge.seconds > 0]
    return host, waits
