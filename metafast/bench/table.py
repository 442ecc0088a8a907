"""Shows results as a table: on the terminal, and in Markdown for a README."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from metafast.bench.compare import Comparison
from metafast.terminal import console, print_table

MARKS = ("<!-- metafast bench -->", "<!-- /metafast bench -->")
HEADINGS = (
    "median", "quartiles", "tasks/s", "over floor", "matrix share", "memory", "first call", "error", "speed-up over it"
)  # fmt: skip
# The columns that a narrow terminal leaves out, the first one first.
_SPARE = ("matrix share", "first call", "memory", "error", "quartiles", "tasks/s", "over floor")
_OWN = "bold green"


def print_result(result: dict[str, Any]) -> None:
    """Prints one table for each workload."""
    out = console()
    out.print(caption(result), style="dim")
    for workload in result["workloads"]:
        out.print(f"\n{title(workload)}", style="bold")
        lines = [([row["name"], *cells(row, workload)], _style(row)) for row in workload["rows"]]
        print_table(out, ("", *HEADINGS), lines, spare=_SPARE)
        ratio = best_ratio(workload)
        if ratio is not None:
            out.print(f"metafast is {times(ratio)} as fast as the best peer", style=_OWN)
        for line in memory(workload):
            out.print(line, style="dim")
        for line in remarks(workload):
            out.print(line, style="yellow")


def _style(row: dict[str, Any]) -> str | None:
    return "yellow" if not measured(row) else _OWN if is_own(row) else None


def print_comparison(comparison: Comparison) -> None:
    """Prints old and new medians, and what got worse."""
    out = console()
    for caveat in comparison.caveats:
        out.print(f"not the same: {caveat}", style="yellow")
    lines = []
    for change in comparison.changes:
        ratio = "" if change.ratio is None else f"{change.ratio:.2f}"
        old, new = ("" if s is None else duration(s) for s in (change.old_s, change.new_s))
        lines.append(([change.workload, change.name, old, new, ratio], "red" if change.worse else None))
    print_table(out, ("workload", "", "before", "now", "now/before"), lines, words=2)
    for change in comparison.worse:
        out.print(f"worse: {change.name} on {change.workload}: {change.worse}", style="red")


def markdown(result: dict[str, Any]) -> str:
    """Returns all workloads as one Markdown table of times, followed by the machine and by remarks on missing times."""
    names = list(dict.fromkeys(row["name"] for workload in result["workloads"] for row in workload["rows"]))
    lines = [
        f"| workload | {' | '.join(names)} | speed-up over the fastest peer | metafast over floor | its error |",
        f"|---|{'---:|' * (len(names) + 3)}",
    ]
    for workload in result["workloads"]:
        rows = {row["name"]: row for row in workload["rows"]}
        medians = [duration(rows[n]["median_s"]) if measured(rows.get(n)) else _absent(rows.get(n)) for n in names]
        own, ratio = own_row(workload), best_ratio(workload)
        last = ["–" if ratio is None else f"**{times(ratio)}**"]
        last += ["–", "–"] if own is None else [times(own["over_floor"]), error(own)]
        lines.append(f"| `{workload['name']}` | {' | '.join([*medians, *last])} |")
    notes = [f"{w['name']}: {line}" for w in result["workloads"] for line in (*memory(w), *remarks(w))]
    return "\n".join([*lines, "", caption(result) + ".", *(f"- {note}" for note in notes)]) + "\n"


def between_marks(text: str, table: str, marks: tuple[str, str] = MARKS) -> str:
    """Returns ``text`` with ``table`` between its two marks, in the place of what is there.

    Raises:
        ValueError: ``text`` does not have each mark once, in order.
    """
    begin, end = marks
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"there is no place for the table: put the lines {begin} and {end} where it belongs")
    return f"{text[: text.index(begin)]}{begin}\n{table}{text[text.index(end) :]}"


def caption(result: dict[str, Any]) -> str:
    """Returns machine, versions, date and commit in one line."""
    m = result["machine"]
    cpu = f"{m['cpu']}, {m['threads']} thread{'s' * (m['threads'] > 1)}, {m['instructions']}"
    device = cpu if m["device"] == "cpu" else m["device"]
    versions = {
        row["name"]: row["version"]
        for workload in result["workloads"]
        for row in workload["rows"]
        if row["version"] not in ("", m["torch"], m["metafast"])
    }
    others = "".join(f", {name} {version}" for name, version in versions.items())
    commit = f" at {m['commit']}" if m["commit"] else ""
    return (
        f"{device}; metafast {m['metafast']}{commit}, torch {m['torch']}{others}, Python {m['python']}; "
        f"{m['date'][:10]}; float32, median time of one second-order meta-gradient; "
        "the floor is what FLOPs and bytes allow"
    )


def title(workload: dict[str, Any]) -> str:
    """Returns the workload's sizes and floor in one line."""
    s, rates, floors = workload["sizes"], workload["rates"], workload["floors_s"]
    kind = f"{s['ways']}-way {s['shots']}-shot" if s["ways"] else f"{s['shots']}-shot regression"
    if s.get("each_step"):
        kind = f"{s['ways']} classes, {s['shots']} new samples a step"
    bound = max(floors, key=floors.__getitem__)
    return (
        f"{workload['name']}: {s['tasks']} task{'s' * (s['tasks'] > 1)}, {kind}, {s['queries']} "
        f"{'query' if s['queries'] == 1 else 'queries'}, {s['steps']} inner step{'s' * (s['steps'] > 1)}; "
        f"{workload['cost']['flops'] / 1e9:.3g} GFLOP at {rates['matrix'] / 1e9:.0f} "
        f"GFLOP/s, {rates['copy'] / 1e9:.0f} GB/s: floor {duration(floors[bound])} ({bound})"
    )


def cells(row: dict[str, Any], workload: dict[str, Any]) -> list[str]:
    """Returns the row's texts under ``HEADINGS``, after its name."""
    first = duration(row["first_call_s"]) if "first_call_s" in row else ""
    if not measured(row):
        return [row["state"], "", "", "", "", "", first, error(row), ""]
    return [
        duration(row["median_s"]),
        _range(row["q1_s"], row["q3_s"]),
        f"{row['tasks_per_s']:,.0f}" if row["tasks_per_s"] >= 100 else _figures(row["tasks_per_s"]),
        times(row["over_floor"]),
        f"{row['matrix_share']:.0%}",
        f"{row['peak_bytes'] / 1e6:,.0f} MB",
        first,
        error(row),
        _ratio(row, workload),
    ]


def error(row: dict[str, Any]) -> str:
    """Returns the relative distance of the gradient from the oracle's, with a ``!`` where it is larger than it should
    be."""
    found = row.get("agreement", {}).get("gradient")
    return "" if found is None else f"{found:.0e}{' !' * ('flag' in row)}"


def _ratio(row: dict[str, Any], workload: dict[str, Any]) -> str:
    own = own_row(workload)
    ratio = None if own is None else own.get("speedup_over", {}).get(row["name"])
    return "" if ratio is None else times(ratio)


def remarks(workload: dict[str, Any]) -> Iterator[str]:
    """Says of each row without a time, or without a ratio, why it has none."""
    for row in workload["rows"]:
        if "flag" in row:
            yield f"{row['name']}: {row['flag']}; it has no part in speed-ups"
        if row["state"] == "disagrees":
            yield f"{row['name']} gives another result than the oracle, so it is not timed: {row['note']}"
        elif row["state"] != "measured":
            yield f"{row['name']}: {row['state']}, {row['note']}"


def memory(workload: dict[str, Any]) -> Iterator[str]:
    """Says of a long loop, where memory decides what can run, how much each row needs beyond the samples."""
    rows = [row for row in workload["rows"] if "beyond_data_bytes" in row]
    if workload["sizes"].get("each_step") and rows:
        sizes = ", ".join(f"{row['name']} {row['beyond_data_bytes'] / 1e6:,.0f} MB" for row in rows)
        yield f"memory at the peak beyond samples and imports: {sizes}"


def is_own(row: dict[str, Any]) -> bool:
    """Tells whether the row is metafast's."""
    return row["name"].startswith("metafast")


def measured(row: dict[str, Any] | None) -> bool:
    """Tells whether the row has a time."""
    return row is not None and row["state"] == "measured"


def own_row(workload: dict[str, Any]) -> dict[str, Any] | None:
    """Returns metafast's first row with a time, which all ratios are about."""
    return next((row for row in workload["rows"] if is_own(row) and measured(row)), None)


def best_ratio(workload: dict[str, Any]) -> float | None:
    """Returns how many times faster metafast is than the fastest peer. ``None``: one of them has no time or is
    flagged."""
    own = own_row(workload)
    if own is None:
        return None
    peers = {row["name"] for row in workload["rows"] if not is_own(row)}
    return min((ratio for name, ratio in own.get("speedup_over", {}).items() if name in peers), default=None)


def duration(seconds: float) -> str:
    """Writes a time with three figures and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{_figures(seconds / scale)} {unit}"
    return f"{_figures(seconds * 1e6)} µs"


def _range(begin: float, end: float) -> str:
    """Writes two times, with the unit once where both have the same."""
    first, last = duration(begin), duration(end)
    number, unit = first.split()
    return f"{number if last.endswith(f' {unit}') else first} – {last}"


def times(ratio: float) -> str:
    """Writes a ratio with three figures."""
    return f"{_figures(ratio)}x"


def _figures(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _absent(row: dict[str, Any] | None) -> str:
    return "–" if row is None else row["state"]
