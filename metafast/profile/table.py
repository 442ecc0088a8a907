"""A profile on the terminal."""

from __future__ import annotations

from metafast.bench.table import duration
from metafast.extras import require
from metafast.profile.result import Profile, Row

_ROWS = 15
_WIDTH = 116  # of the table of rules; a terminal that is narrower wraps its lines


def print_profile(profile: Profile) -> None:
    """Phases, the longest rules, the verdict."""
    console = require("rich.console").Console()
    console.width = max(console.width, _WIDTH)
    table = require("rich.table").Table
    phases = table(title=f"{profile.workload} on {profile.executor}: an iteration by phase", title_justify="left")
    phases.add_column("phase")
    for heading in ("wall time", "share"):
        phases.add_column(heading, justify="right")
    for name, seconds in profile.phases.items():
        phases.add_row(name, duration(seconds), f"{seconds / profile.wall:.1%}")
    phases.add_row("all", duration(profile.wall), f"{profile.accounted:.1%} accounted for", style="bold")
    console.print(phases)
    if profile.rows:
        rules = table(
            title=f"the longest {_ROWS} rules; FLOPs of direct arithmetic, bytes of each operand moved once",
            title_justify="left",
        )
        for heading in ("layer", "rule", "phase"):
            rules.add_column(heading, no_wrap=heading != "layer")
        for heading in ("wall time", "share", "calls", "GFLOP/s", "GB/s", "of roofline"):
            rules.add_column(heading, justify="right")
        for row in profile.rows[:_ROWS]:
            rules.add_row(*_cells(row, profile))
        console.print(rules)
    for kernel in profile.kernels[:_ROWS]:
        console.print(
            f"  {duration(kernel['seconds']):>8}  {kernel['calls']:>6g} calls  {kernel['name']}", highlight=False
        )
    recorded = profile.wall / profile.unrecorded - 1
    console.print(
        f"recorded: {duration(profile.wall)} an iteration, {recorded:+.1%} on what it takes without recording"
    )
    for command in profile.commands:
        console.print(f"deeper: {command}", highlight=False, soft_wrap=True)
    console.print(f"verdict: {profile.verdict}", style="bold", highlight=False)


def _cells(row: Row, profile: Profile) -> list[str]:
    share = row.of_roofline
    return [
        row.layer, row.rule, row.phase, duration(row.seconds), f"{row.seconds / profile.wall:.1%}", f"{row.calls:g}",
        f"{row.flops / row.seconds / 1e9:.1f}" if row.flops else "",
        f"{row.bytes / row.seconds / 1e9:.1f}" if row.bytes else "",
        "" if share is None else f"{share:.0%}",
    ]  # fmt: skip
