"""Writes spans as a Chrome trace, which https://ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metafast.profile.spans import HOST, Span, Timeline

_PROCESS = 1


def write_trace(timeline: Timeline, title: str, path: Path) -> None:
    """Writes the last iteration, with one row for Python and one for each thread of the executor."""
    began = max(span.begin for span in timeline.host if span.name == "sample")
    spans = [span for span in (*timeline.host, *timeline.phases, *timeline.rules) if span.begin >= began]
    threads = sorted({span.thread for span in spans})
    events: list[dict[str, Any]] = [_label("process_name", _row(HOST), f"metafast: {title}")]
    events += [_label("thread_name", _row(thread), _name(thread)) for thread in threads]
    events += [_event(span, began) for span in sorted(spans, key=lambda span: (span.thread, span.begin, -span.end))]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _event(span: Span, began: float) -> dict[str, Any]:
    """Returns the span as an event, with times in microseconds. They are rounded to whole nanoseconds, as they were
    measured, so that a span stays inside the one around it."""
    begin, end = (round(1e9 * (moment - began)) for moment in (span.begin, span.end))
    event = {"ph": "X", "pid": _PROCESS, "tid": _row(span.thread), "ts": begin / 1e3, "dur": (end - begin) / 1e3}
    if not span.layer:
        return {**event, "name": span.name, "cat": "phase", "args": {"task": span.task}}
    arguments = {"layer": span.layer, "rule": span.name, "task": span.task, "tasks": span.tasks}
    return {**event, "name": f"{span.layer}.{span.name}", "cat": span.name, "args": arguments}


def _label(kind: str, row: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": _PROCESS, "tid": row, "name": kind, "args": {"name": name}}


def _row(thread: int) -> int:
    """Numbers the rows from 1, Python's, because viewers take row 0 for the idle thread."""
    return thread - HOST + _PROCESS


def _name(thread: int) -> str:
    return "python" if thread == HOST else f"executor thread {thread}"
