"""Reads the notes that the CPU executor takes by itself: each task's phases and each layer's rules, by thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from metafast.executors.native.encode import FACTS, extension
from metafast.profile.spans import LOSS, Span
from metafast.program import Program


@contextmanager
def recorded(program: Program, phases: list[Span], rules: list[Span]) -> Iterator[None]:
    """Adds to ``phases`` and ``rules`` what the CPU executor does within the block."""
    assert extension is not None
    extension.trace(True)
    try:
        yield
    finally:
        notes = np.frombuffer(extension.trace(False), np.dtype(FACTS["spans"]["record"]))
        _add_spans(program, notes, phases, rules)


def _add_spans(program: Program, notes: np.ndarray, phases: list[Span], rules: list[Span]) -> None:
    """Converts the notes. Those of one thread follow each other in the order in which they begin, so a rule belongs to
    the phase before it."""
    phase_names = FACTS["spans"]["phases"]
    rule_names = FACTS["spans"]["rules"]
    phase = ""
    for note in notes:
        if note["kind"] < len(phase_names):
            name = phase_names[note["kind"]].replace("_", " ")
            phase = f"{name} {note['index'] + 1}" if name.endswith("step") else name
            phases.append(_span(phase, note))
        else:
            name = rule_names[note["kind"] - len(phase_names)]
            layer = LOSS if note["index"] < 0 else program.nodes[note["index"]].name
            rules.append(_span(name, note, phase, layer))


def _span(name: str, note: np.void, phase: str = "", layer: str = "") -> Span:
    begin, end = (int(note[key]) * 1e-9 for key in ("begin", "end"))
    return Span(name, begin, end, int(note["thread"]), phase, layer, int(note["task"]), int(note["tasks"]))
