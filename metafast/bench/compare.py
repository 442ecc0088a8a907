"""Compares two results: which rows got faster, slower or lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """One row in both results, with its median times in seconds. ``worse`` says why the new one is worse; it is empty
    where it is not."""

    workload: str
    name: str
    old_s: float | None
    new_s: float | None
    worse: str = ""

    @property
    def ratio(self) -> float | None:
        """Returns the new time over the old one, or ``None`` where one of them is missing."""
        return None if self.old_s is None or self.new_s is None else self.new_s / self.old_s


@dataclass(frozen=True)
class Comparison:
    """Holds all changes, and in ``caveats`` what differs between the two machines."""

    changes: tuple[Change, ...]
    caveats: tuple[str, ...]

    @property
    def worse(self) -> tuple[Change, ...]:
        """Returns the changes for the worse."""
        return tuple(change for change in self.changes if change.worse)


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float) -> Comparison:
    """Compares the rows of ``old`` with those of ``new``.

    Only metafast's own rows can be worse: they are more than ``threshold`` slower (0.1 is 10%), or they had a time and
    have none now. The peers' rows show what else changed on the machine.

    Raises:
        ValueError: the threshold is negative, or the two have no workload in common.
    """
    if threshold < 0:
        raise ValueError(f"--threshold {threshold:g}: give how much slower is too slow, 0.1 for 10%")
    before, after = _rows(old), _rows(new)
    shared = {workload for workload, _ in before} & {workload for workload, _ in after}
    if not shared:
        raise ValueError("the two results have no workload in common")
    changes = [
        _change(key, before.get(key), after.get(key), threshold)
        for key in dict.fromkeys([*before, *after])
        if key[0] in shared
    ]
    kept = ("cpu", "device", "threads", "torch")
    caveats = [
        f"{key}: {old['machine'][key]} before, {new['machine'][key]} now"
        for key in kept
        if old["machine"][key] != new["machine"][key]
    ]
    return Comparison(tuple(change for change in changes if change is not None), tuple(caveats))


def _change(
    key: tuple[str, str], old: dict[str, Any] | None, new: dict[str, Any] | None, threshold: float
) -> Change | None:
    old_s, new_s = ((row or {}).get("median_s") for row in (old, new))
    if old_s is None and new_s is None:
        return None
    worse = ""
    if key[1].startswith("metafast") and old_s is not None:
        if new_s is None:
            worse = f"{new['state']}: {new['note']}" if new else "not in the new result"
        elif new_s > old_s * (1 + threshold):
            worse = f"{new_s / old_s - 1:.0%} slower"
    return Change(*key, old_s, new_s, worse)


def _rows(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(w["name"], row["name"]): row for w in result["workloads"] for row in w["rows"]}
