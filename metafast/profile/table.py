"""Prints a profile on the terminal."""

from __future__ import annotations

from metafast.bench.table import duration
from metafast.profile.result import Profile, Row
from metafast.terminal import Line, console, print_table

_ROWS = 15
_HEADINGS = ("layer", "rule", "phase", "wall time", "share", "calls", "GFLOP/s", "GB/s", "of roofline")
# The columns that a narrow terminal leaves out, the first one first.
_SPARE = ("calls", "GB/s", "GFLOP/s", "of roofline")


def print_profile(profile: Profile) -> None:
    """Prints the phases, the longest rules and the verdict."""
    out = console()
    out.print(f"{profile.workload} on {profile.executor}: an iteration by phase", style="bold")
    phases: list[Line] = [([name, duration(s), f"{s / profile.wall:.1%}"], None) for name, s in profile.phases.items()]
    phases.append((["all", duration(profile.wall), f"{profile.accounted:.1%} accounted for"], "bold"))
    print_table(out, ("phase", "wall time", "share"), phases)
    if profile.rows:
        out.print(
            f"\nthe longest {_ROWS} rules; FLOPs of direct arithmetic, bytes of each operand moved once", style="bold"
        )
        print_table(out, _HEADINGS, [(_cells(row, profile), None) for row in profile.rows[:_ROWS]],
                    spare=_SPARE, words=3)  # fmt: skip
    for kernel in profile.kernels[:_ROWS]:
        out.print(f"  {duration(kernel['seconds']):>8}  {kernel['calls']:>6g} calls  {kernel['name']}")
    recorded = profile.wall / profile.unrecorded - 1
    out.print(f"\nrecorded: {duration(profile.wall)} an iteration, {recorded:+.1%} on an unrecorded one")
    for command in profile.commands:
        out.print(f"deeper: {command}", soft_wrap=True)
    out.print(f"verdict: {profile.verdict}", style="bold")


def _cells(row: Row, profile: Profile) -> list[str]:
    share = row.of_roofline
    return [
        row.layer, row.rule, row.phase, duration(row.seconds), f"{row.seconds / profile.wall:.1%}", f"{row.calls:g}",
        f"{row.flops / row.seconds / 1e9:.1f}" if row.flops else "",
        f"{row.bytes / row.seconds / 1e9:.1f}" if row.bytes else "",
        "" if share is None else f"{share:.0%}",
    ]  # fmt: skip
