"""What the first measurement has to reach, as one table, and the verdict on each bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .subjects import BLOCKS, TRITON

Line = dict[str, Any]
SANITIZERS = ("racecheck", "synccheck", "memcheck:blocks", "memcheck:triton")


@dataclass(frozen=True)
class Bar:
    """``found`` gives the value of each of ``parts`` that the results have; ``good`` is asked of all of them."""

    text: str
    parts: tuple[str, ...]
    found: Callable[[Sequence[Line]], dict[str, Any]]
    good: Callable[[Any], bool]


def _values(key: str, step: str) -> Callable[[Sequence[Line]], dict[str, Any]]:
    """What the lines of a step, or of a group of steps, have under ``key``: by workload, the last one counts. Of one
    that ended in an error it is ``None``."""

    def found(lines: Sequence[Line]) -> dict[str, Any]:
        there = [line for line in lines if line["step"].partition(":")[0] == step]
        return {line["of"]: line.get(key) for line in there if key in line or "error" in line}

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
    # Pooled networks amplify what float32 rounds, in every library: `agreement` says why they have 1e-2.
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
    """Each bar's ``text`` and ``verdict``, reached, missed or not measured, and what was ``found``: the parts that
    miss it, else those that nobody has measured, else all. One part that misses is enough; all must be there to reach
    it."""
    judged = []
    for bar in BARS:
        found = {part: value for part, value in bar.found(lines).items() if part in bar.parts}
        missed = [part for part, value in found.items() if not bar.good(value)]
        absent = [part for part in bar.parts if part not in found]
        verdict = "missed" if missed else "not measured" if absent else "reached"
        told = [f"{part} {_short(found[part])}" for part in (missed or ([] if absent else found))]
        if not missed and absent and found:
            told = [f"{', '.join(absent)} not measured"]
        judged.append({"text": bar.text, "verdict": verdict, "found": ", ".join(told)})
    return judged


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
