"""``metafast bench`` computes one meta-gradient with metafast and with every installed peer; it checks each result
before it times it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from metafast.bench.compare import Comparison, compare
from metafast.bench.own import own_workload
from metafast.bench.peers import peers
from metafast.bench.run import FORMAT, Settings, Stopped, contenders, measure
from metafast.bench.workloads import WORKLOADS, Workload, workload
from metafast.files import check_writable

__all__ = [
    "WORKLOADS",
    "Outputs",
    "Settings",
    "main_bench",
    "main_compare",
    "own_failures",
    "own_workload",
    "read_result",
]

STANDARD = ("sin25-1", "sin25-5", "sin1024-5", "omni5w1s-1", "omni5w1s-5", "omni20w1s-5", "mini5w1s-5")


@dataclass(frozen=True)
class Outputs:
    """The files that ``metafast bench`` writes; ``None`` leaves one out.

    Args:
        json: the whole result, which ``read_result`` reads again.
        markdown: a table.
        chart: a bar chart; its suffix says in which format.
        report: an HTML page.
        readme: a file that exists already; the table goes between its two marks.
    """

    json: Path | None = None
    markdown: Path | None = None
    chart: Path | None = None
    report: Path | None = None
    readme: Path | None = None


def main_bench(
    names: Sequence[str] = (),
    own: Workload | None = None,
    *,
    backends: Sequence[str] = ("auto",),
    chosen_peers: Sequence[str] = (),
    settings: Settings | None = None,
    outputs: Outputs | None = None,
    saved: Path | None = None,
) -> dict[str, Any]:
    """Measures, prints a table on the terminal, and writes what ``outputs`` names. Returns the result.

    Args:
        names: canonical workloads. Without names and without ``own`` the standard ones are measured.
        own: a workload that :func:`own_workload` has made.
        backends: the executors of metafast that are measured.
        chosen_peers: the names of the peers to measure, or how they begin; an empty sequence means all peers.
        settings: how long to measure.
        outputs: the files to write.
        saved: a file of ``--json``; its result is shown and nothing is measured.

    Raises:
        ValueError: a name is unknown, or a model cannot take its samples.
        OSError: a file cannot be written; this shows before anything is measured.
        KeyboardInterrupt, RuntimeError: Ctrl-C was pressed, or a workload has no oracle; what was measured until then
            is shown and written.
    """
    outputs = outputs or Outputs()
    for path in (outputs.json, outputs.markdown, outputs.chart, outputs.report):
        if path is not None:
            check_writable(path)
    if outputs.chart is not None:
        from metafast.bench.chart import check_kind

        check_kind(outputs.chart)
    if outputs.readme is not None:
        from metafast.bench.table import between_marks

        between_marks(outputs.readme.read_text(), "")  # a file without the marks is refused before anything is measured
    if saved is not None:
        result = read_result(saved)
    else:
        workloads = [workload(name) for name in names] + ([own] if own is not None else [])
        workloads = workloads or [workload(name) for name in STANDARD]
        wanted = contenders(backends, chosen_peers, peers())
        try:
            result = measure(workloads, wanted, settings or Settings(), _say)
        except Stopped as stop:
            _keep(stop.result, outputs)
            raise stop.reason from None
        _say("")
    _write(result, outputs)
    _show(result)
    return result


def own_failures(result: dict[str, Any]) -> list[str]:
    """Names the workloads on which an executor of metafast has no time, because it disagrees, fails or takes too
    long."""
    from metafast.bench.table import is_own, measured

    rows = [(workload["name"], row) for workload in result["workloads"] for row in workload["rows"]]
    return [f"{row['name']} on {name}: {row['state']}" for name, row in rows if is_own(row) and not measured(row)]


def main_compare(old: Path, new: Path, threshold: float = 0.1) -> Comparison:
    """Prints what changed from one ``--json`` file to another. The command exits with 1 if the answer has ``worse``
    rows.

    Raises:
        ValueError: a file is not a result of this format, or the two have no workload in common.
    """
    comparison = compare(read_result(old), read_result(new), threshold)
    from metafast.bench.table import print_comparison

    print_comparison(comparison)
    return comparison


def read_result(path: Path) -> dict[str, Any]:
    """Reads a result that ``--json`` has written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else.
    """
    try:
        result = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result of metafast bench --json: {error}") from error
    whole = isinstance(result, dict) and {"machine", "tolerances", "workloads"} <= set(result)
    if not whole or result.get("format") != FORMAT:
        raise ValueError(f"{path} is no result of metafast bench --json in format {FORMAT}; measure again")
    return result


def _keep(result: dict[str, Any], outputs: Outputs) -> None:
    """Writes and shows what was measured before the run had to stop. A README keeps the whole table that it has."""
    _say("")
    names = [workload["name"] for workload in result["workloads"]]
    if names:
        _write(result, replace(outputs, readme=None))
        _show(result)
    print(f"stopped early; measured before: {', '.join(names) or 'nothing'}", file=sys.stderr)


def _write(result: dict[str, Any], outputs: Outputs) -> None:
    if outputs.json is not None:
        outputs.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if outputs.markdown is not None:
        from metafast.bench.table import markdown

        outputs.markdown.write_text(markdown(result))
    if outputs.readme is not None:
        from metafast.bench.table import between_marks, markdown

        outputs.readme.write_text(between_marks(outputs.readme.read_text(), markdown(result)))
    if outputs.chart is not None:
        from metafast.bench.chart import draw

        draw(result, outputs.chart)
    if outputs.report is not None:
        from metafast.bench.page import page

        outputs.report.write_text(page(result))


def _show(result: dict[str, Any]) -> None:
    from metafast.bench.table import markdown, print_result

    if find_spec("rich") is None:  # a machine that only measures needs no more than torch
        print(markdown(result))
    else:
        print_result(result)


def _say(text: str) -> None:
    """Shows progress on standard error: a terminal overwrites its line, elsewhere each text is a line (rounds are left
    out)."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text and ": round" not in text:
        print(text, file=sys.stderr, flush=True)
