"""``metafast bench``: one meta-gradient against every peer that is installed. Check, then time."""

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
    """Files to write: the result, a Markdown table, a bar chart (PNG), a page (HTML). ``readme`` is there already and
    gets the table between its marks."""

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
        names: canonical workloads; none, and no ``own``: the standard ones.
        own: a workload of :func:`own_workload`.
        backends: executors of metafast to measure.
        chosen_peers: names of peers; none: all.
        settings: how long to measure.
        outputs: files to write.
        saved: show this result, of ``--json``, in the place of measuring.

    Raises:
        ValueError: an unknown name, or a model that cannot take its samples.
        OSError: a file cannot be written; found before anything is measured.
        KeyboardInterrupt, RuntimeError: Ctrl-C, or a workload without an oracle; what was measured before is shown and
            written.
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

        between_marks(outputs.readme.read_text(), "")  # what is wrong with it shows before anything is measured
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
    """The workloads on which an executor of metafast has no time: it disagrees, fails or takes too long."""
    from metafast.bench.table import is_own, measured

    rows = [(workload["name"], row) for workload in result["workloads"] for row in workload["rows"]]
    return [f"{row['name']} on {name}: {row['state']}" for name, row in rows if is_own(row) and not measured(row)]


def main_compare(old: Path, new: Path, threshold: float = 0.1) -> Comparison:
    """Prints what changed from one ``--json`` file to another; the caller fails if anything is ``worse``.

    Raises:
        ValueError: a file is no result of this version, or the two have no workload in common.
    """
    comparison = compare(read_result(old), read_result(new), threshold)
    from metafast.bench.table import print_comparison

    print_comparison(comparison)
    return comparison


def read_result(path: Path) -> dict[str, Any]:
    """A result that ``--json`` has written.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is something else.
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
    """What was measured until it had to stop; a README keeps its whole table."""
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
    """Progress, on standard error: in place on a terminal, as lines elsewhere but for the rounds."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text and ": round" not in text:
        print(text, file=sys.stderr, flush=True)
