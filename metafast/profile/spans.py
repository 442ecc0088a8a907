"""What was done from when to when: the common form in which every executor's time is told."""

from __future__ import annotations

from bisect import bisect, bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

RULES = ("forward", "backward", "tangent_forward", "tangent_backward")
LOSS = "loss"
HOST = -1
"""The thread that Python runs on; executors' threads are numbered from 0."""


@dataclass(frozen=True)
class Span:
    """``begin`` and ``end`` in seconds of ``time.perf_counter``.

    A phase (``layer`` empty) is named as people see it: ``"inner step 1"``. A rule carries the phase that it ran in,
    the ``layer`` (its node's name, or ``"loss"``) and for how many ``tasks`` at once it ran, ``task`` being the first.
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
        """How long it took."""
        return self.end - self.begin


@dataclass(frozen=True)
class Timeline:
    """Some iterations: spans on the host follow one another without overlap; those of ``threads`` executor threads lie
    side by side within the host's ``meta-gradient`` and are divided by their number to become wall time."""

    iterations: int
    wall: float
    host: tuple[Span, ...]
    phases: tuple[Span, ...]
    rules: tuple[Span, ...]
    threads: int


def undisturbed(timeline: Timeline, iterations: Sequence[tuple[float, float]]) -> Timeline:
    """The faster half of the ``iterations``, given by begin and end: on a shared machine others hold up the rest."""
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
    """What a call does besides: on the host, ``prepare`` before the first span of ``inside`` and ``collect`` behind the
    last; on the threads, ``wait`` where one starts late or is done before the others."""
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
