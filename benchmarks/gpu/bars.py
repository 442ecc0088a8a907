"""The bars that the first measurement has to reach, in one table, and the verdict on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .subjects import BLOCKS, TRITON

Line = dict[str, Any]
SANITIZERS = ("racecheck", "synccheck", "memcheck:blocks", "memcheck:triton")


@dataclass(frozen=True)
class Bar:
    """A bar is reached if ``good`` holds for the values of all ``parts``; ``found`` picks those values from the
    results."""

    text: str
    parts: tuple[str, ...]
    found: Callable[[Sequence[Line]], dict[str, Any]]
    good: Callable[[Any], bool]


def _values(key: str, step: str) -> Callable[[Sequence[Line]], dict[str, Any]]:
    """Returns a function that picks the values under ``key``, by workload, from the lines of a step or group of steps.

    The last line of a workload counts. The value is ``None`` for a workload that ended in an error.
    """

    def found(lines: Sequence[Line]) -> dict[str, Any]:
        own = [line for line in lines if line["step"].partition(":")[0] == step]
        return {line["of"]: line.get(key) for line in own if key in line or "error" in line}

    return found


def _sanitizers(lines: Sequence[Line]) -> dict[str, Any]:
    return {line["step"]: line["state"] for line in lines if line["step"] in SANITIZERS and "state" in line}


def _speedup(workload: str, least: float) -> Bar:
    text = f"{workload} at least {least:g}x the best peer"
    return Bar(text, (workload,), _values("speedup", "peers"), lambda value: value is not None and value >= least)


BARS = (
    Bar(
        "every workload within 1e-4 of float64", (*BLOCKS, *TRITON), _values("gradient_error", "smoke"),
        lambda error: error is not None and error <= 1e-4,
    ),
    # Networks with pooling amplify float32's rounding errors in every library; verification/agreement.py says why 1e-2.
    Bar(
        "every workload as close to float64 as float32 comes", (*BLOCKS, *TRITON), _values("right", "smoke"),
        lambda right: right is True,
    ),
    Bar("the same bits twice", (*BLOCKS, *TRITON), _values("same_bits", "smoke"), lambda same: same is True),
    Bar("sanitizers clean", SANITIZERS, _sanitizers, lambda state: state == "passed"),
    _speedup("sin1024-5", 4),
    _speedup("omni5w1s-1", 5),
    _speedup("omni5w1s-5", 5),
    Bar(
        "the sinusoid run of the paper under 20 s", ("sinusoid",), _values("wall_seconds", "sinusoid"),
        lambda seconds: seconds < 20,
    ),
    Bar(
        "Omniglot's 60,000 iterations under 300 s", ("omniglot-5w1s",), _values("wall_seconds", "omniglot"),
        lambda seconds: seconds < 300,
    ),
    Bar(
        "98.7% on its maml split", ("omniglot-5w1s",), _values("result", "omniglot"),
        lambda accuracy: accuracy >= 0.987,
    ),
)  # fmt: skip


def judge(lines: Sequence[Line]) -> list[dict[str, str]]:
    """Returns the ``text`` of each bar, its ``verdict`` (reached, missed or not measured) and what was ``found``.

    One part that misses makes the bar missed; to reach it, all parts must be measured. ``found`` names the parts that
    miss it, else those that were not measured, else all.
    """
    judged = []
    for bar in BARS:
        found = {part: value for part, value in bar.found(lines).items() if part in bar.parts}
        missed = [part for part, value in found.items() if not bar.good(value)]
        absent = [part for part in bar.parts if part not in found]
        verdict = "missed" if missed else "not measured" if absent else "reached"
        shown = [f"{part} {_short(found[part])}" for part in (missed or ([] if absent else found))]
        if not missed and absent and found:
            shown = [f"{', '.join(absent)} not measured"]
        judged.append({"text": bar.text, "verdict": verdict, "found": ", ".join(shown)})
    return judged


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
