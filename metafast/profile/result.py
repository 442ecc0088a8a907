"""Makes a profile of spans: the time by phase, and by layer and rule against the machine's roofline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from metafast.machine import MachineRates
from metafast.profile.costs import LayerCosts, RuleCost
from metafast.profile.spans import Timeline

FORMAT = 1
NOT_ACCOUNTED = "not accounted for"
_OVERHEAD = 0.25  # below this share of the roofline the calls take the time, not arithmetic or memory


@dataclass(frozen=True)
class Row:
    """A rule of a layer in one phase, over all steps: wall seconds, calls, FLOPs and bytes of one iteration.

    ``floor`` is the time at the machine's matrix rate or at its copy rate, whichever is longer.
    """

    layer: str
    kinds: tuple[str, ...]
    rule: str
    phase: str
    seconds: float
    calls: float
    flops: float
    bytes: float
    floor: float

    @property
    def of_roofline(self) -> float | None:
        """Returns ``floor / seconds``. It can exceed 1, since data in a cache moves faster than the copy rate."""
        return self.floor / self.seconds if self.floor else None


@dataclass(frozen=True)
class Profile:
    """The profile of a workload; all times are wall seconds of one iteration.

    ``wall`` was measured while recording and ``unrecorded`` without. ``phases`` has an entry for the time that belongs
    to no phase.
    """

    workload: str
    executor: str
    machine: dict[str, Any]
    rates: MachineRates
    wall: float
    unrecorded: float
    threads: int
    phases: Mapping[str, float]
    rows: tuple[Row, ...]
    kernels: tuple[dict[str, Any], ...] = ()
    commands: tuple[str, ...] = field(default=())

    @property
    def accounted(self) -> float:
        """Returns the share of the wall time that belongs to a phase."""
        return 1 - self.phases[NOT_ACCOUNTED] / self.wall

    @property
    def verdict(self) -> str:
        """Says in one line what limits the speed."""
        busy = sum(kernel["seconds"] for kernel in self.kernels)
        if self.kernels and busy < 0.5 * self.unrecorded:
            return f"launch-bound: the GPU is idle {1 - busy / self.unrecorded:.0%} of the time"
        outside = {k: self.phases.get(k, 0.0) for k in ("sample", "prepare", "collect", "outer step", NOT_ACCOUNTED)}
        if sum(outside.values()) > 0.5 * self.wall:
            worst = max(outside, key=outside.__getitem__)
            share = f"{sum(outside.values()) / self.wall:.0%} of the time"
            return f"host-bound: {share} is outside the layers, most of it in {worst!r}"
        kinds: dict[tuple[str, ...], list[Row]] = defaultdict(list)
        for row in self.rows:
            kinds[row.kinds].append(row)
        if not kinds:
            return "no layer has told its time"
        kind, rows = max(kinds.items(), key=lambda item: sum(row.seconds for row in item[1]))
        seconds, name = sum(row.seconds for row in rows), " + ".join(kind)
        share, flops = f"{seconds / self.wall:.0%} of the time", sum(row.flops for row in rows)
        floor, calls = sum(row.floor for row in rows), sum(row.calls for row in rows)
        if floor < _OVERHEAD * seconds:
            return (
                f"overhead-bound in {name}: {share}, in {calls:.0f} calls that take {seconds / max(floor, 1e-12):.0f} "
                "times as long as their FLOPs and bytes"
            )
        if flops and flops / self.rates.matrix >= 0.5 * floor:
            rate = f"{flops / seconds / self.rates.matrix:.0%} of the matrix rate"
            return f"compute-bound in {name}: {share}, at {rate} by direct FLOPs"
        moved = sum(row.bytes for row in rows) / seconds
        return f"memory-bound in {name}: {share}, at {moved / self.rates.copy:.0%} of the copy rate"

    def to_json(self) -> dict[str, Any]:
        """Returns the profile as JSON values."""
        return {
            "format": FORMAT,
            "workload": self.workload,
            "executor": self.executor,
            "verdict": self.verdict,
            "machine": self.machine,
            "rates": asdict(self.rates),
            "threads": self.threads,
            "wall_s": self.wall,
            "unrecorded_wall_s": self.unrecorded,
            "accounted": self.accounted,
            "phases_s": dict(self.phases),
            "rules": [{**asdict(row), "of_roofline": row.of_roofline} for row in self.rows],
            "kernels": list(self.kernels),
            "commands": list(self.commands),
        }


def phases(timeline: Timeline) -> dict[str, float]:
    """Returns the wall seconds of each phase in one iteration, in the order in which phases run, and the rest."""
    found: dict[str, float] = defaultdict(float)
    inside: dict[str, float] = defaultdict(float)
    for span in timeline.phases:
        inside[span.name] += span.seconds / timeline.threads / timeline.iterations
    for span in timeline.host:
        found[span.name] += span.seconds / timeline.iterations
        if span.name == "prepare":
            found |= inside
    if "prepare" not in found:
        found |= inside
    wall = timeline.wall / timeline.iterations
    return {**found, NOT_ACCOUNTED: wall - sum(found.values())}


def rows(timeline: Timeline, costs: Mapping[str, LayerCosts], rates: MachineRates) -> tuple[Row, ...]:
    """Sums the spans of each rule and returns the rows, the longest first."""
    seconds: dict[tuple[str, str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str, str], float] = defaultdict(float)
    tasks: dict[tuple[str, str, str], float] = defaultdict(float)
    for span in timeline.rules:
        key = (span.layer, span.name, span.phase.rstrip("0123456789 "))
        seconds[key] += span.seconds / timeline.threads / timeline.iterations
        calls[key] += 1 / timeline.iterations
        tasks[key] += span.tasks / timeline.iterations
    found = []
    for (layer, rule, phase), spent in seconds.items():
        cost = costs[layer].rules.get((phase, rule), RuleCost(0, 0))
        count = tasks[layer, rule, phase]
        flops, moved = count * cost.flops, count * cost.bytes
        floor = max(flops / rates.matrix, moved / rates.copy)
        found.append(
            Row(
                costs[layer].label,
                costs[layer].kinds,
                rule,
                phase,
                spent,
                calls[layer, rule, phase],
                flops,
                moved,
                floor,
            )
        )
    return tuple(sorted(found, key=lambda row: -row.seconds))
