"""Reads the notes that the CPU executor takes by itself: each task's phases and each layer's rules, by thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from metafast.executors.native.encode import extension
from metafast.profile.spans import LOSS, Span
from metafast.program import Program

# As laid out in csrc/core/trace.h.
_NUMBERS = ("what", "index", "task", "tasks", "thread", "unused")
_SPAN = np.dtype([("begin", "<i8"), ("end", "<i8"), *((name, "<i4") for name in _NUMBERS)])
_WHATS = (
    "load", "inner step", "query", "reverse step", "forward", "backward", "tangent_forward", "tangent_backward"
)  # fmt: skip
_PHASES = 4


@contextmanager
def recorded(program: Program, phases: list[Span], rules: list[Span]) -> Iterator[None]:
    """Adds to ``phases`` and ``rules`` what the CPU executor does within the block."""
    assert extension is not None
    extension.trace(True)
    try:
        yield
    finally:
        notes = np.frombuffer(extension.trace(False), _SPAN)
        _tell(program, notes, phases, rules)


def _tell(program: Program, notes: np.ndarray, phases: list[Span], rules: list[Span]) -> None:
    """A thread's notes come in a row, in the order in which they begin: a rule belongs to the phase before it."""
    phase = ""
    for note in notes:
        name = _WHATS[note["what"]]
        if note["what"] < _PHASES:
            phase = f"{name} {note['index'] + 1}" if name.endswith("step") else name
            phases.append(_span(phase, note))
        else:
            layer = LOSS if note["index"] < 0 else program.nodes[note["index"]].name
            rules.append(_span(name, note, phase, layer))


def _span(name: str, note: np.void, phase: str = "", layer: str = "") -> Span:
    begin, end = (int(note[key]) * 1e-9 for key in ("begin", "end"))
    return Span(name, begin, end, int(note["thread"]), phase, layer, int(note["task"]), int(note["tasks"]))
