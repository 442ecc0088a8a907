"""The native executor's own notes: each task's phases and each layer's rules, by the thread that ran them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from metafast.executors.native.encode import FACTS, extension
from metafast.profile.spans import LOSS, Span
from metafast.program import Program


@contextmanager
def noted(program: Program, phases: list[Span], rules: list[Span]) -> Iterator[None]:
    """Adds what the native executor does meanwhile."""
    assert extension is not None
    extension.trace(True)
    try:
        yield
    finally:
        notes = np.frombuffer(extension.trace(False), np.dtype(FACTS["spans"]["record"]))
        _tell(program, notes, phases, rules)


def _tell(program: Program, notes: np.ndarray, phases: list[Span], rules: list[Span]) -> None:
    """A thread's notes come in a row, in the order in which they begin: a rule belongs to the phase before it."""
    phases_known, rules_known = FACTS["spans"]["phases"], FACTS["spans"]["rules"]
    phase = ""
    for note in notes:
        if note["kind"] < len(phases_known):
            name = phases_known[note["kind"]].replace("_", " ")
            phase = f"{name} {note['index'] + 1}" if name.endswith("step") else name
            phases.append(_span(phase, note))
        else:
            name = rules_known[note["kind"] - len(phases_known)]
            layer = LOSS if note["index"] < 0 else program.nodes[note["index"]].name
            rules.append(_span(name, note, phase, layer))


def _span(name: str, note: np.void, phase: str = "", layer: str = "") -> Span:
    begin, end = (int(note[key]) * 1e-9 for key in ("begin", "end"))
    return Span(name, begin, end, int(note["thread"]), phase, layer, int(note["task"]), int(note["tasks"]))
