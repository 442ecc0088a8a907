"""Makes the README's GPU table from reports: ``python3 -m benchmarks.gpu.table A.json B.json --readme FILE``.

It runs from the repository's root. Without ``--readme`` it prints the table. All figures come from the reports; a
rehearsal has none.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metafast.bench.table import between_marks, duration, times

from .bars import judge
from .report import FORMAT
from .subjects import BLOCKS, TRITON, executor

MARKS = ("<!-- metafast gpu -->", "<!-- /metafast gpu -->")
HEAD = ("workload", "executor", "error", "a call", "as a CUDA graph", "on the GPU", "memory", "best peer", "speed-up")


def read_report(file: Path) -> dict[str, Any]:
    """Reads a report of the GPU check.

    Raises:
        ValueError: the file is something else, or the report of a rehearsal or of a machine without a GPU.
    """
    try:
        found = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no report of the GPU check: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or "plan" not in found:
        raise ValueError(f"{file} is no report of the GPU check in format {FORMAT}")
    if found["rehearsal"] or not found["machine"].get("gpu"):
        raise ValueError(f"{file} is of a rehearsal or of a machine without a GPU: it has no figures")
    return found


def markdown(reports: Sequence[dict[str, Any]]) -> str:
    """Returns the table of workloads, with the trainings and the bars. Of two reports with the same figure the later
    wins.

    Raises:
        ValueError: the reports are of different GPUs.
    """
    gpus = {report["machine"]["gpu"] for report in reports}
    if len(gpus) != 1:
        raise ValueError(f"reports of different GPUs have no common table: {', '.join(sorted(gpus))}")
    lines = [line for report in sorted(reports, key=lambda r: str(r["date"])) for line in report["results"]]
    rows = [_row(name, _of(lines, name)) for name in (*BLOCKS, *TRITON) if _of(lines, name)]
    table = [
        f"| {' | '.join(HEAD)} |",
        f"|---|---|{'---:|' * (len(HEAD) - 2)}",
        *(f"| {' | '.join(r)} |" for r in rows),
    ]
    runs = [text for name in ("sinusoid", "omniglot-5w1s") if (text := _run(name, _of(lines, name)))]
    bars = [f"- {bar['verdict']}: {bar['text']}{_why(bar)}" for bar in judge(lines)]
    return "\n".join([*table, "", _caption(reports) + ".", *runs, "", *bars]) + "\n"


def _why(bar: dict[str, str]) -> str:
    return f" ({bar['found']})" if bar["found"] else ""


def _of(lines: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Merges the lines of smoke, peers and training about a workload or recipe; lines of single contenders are left
    out."""
    steps = ("smoke", "peers", "sinusoid", "omniglot")
    found: dict[str, Any] = {}
    for line in lines:
        if line["of"] == name and line["step"].partition(":")[0] in steps and "contender" not in line:
            found |= line
    return found


def _row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    def ms(key: str) -> str:
        return "–" if found.get(key) is None else duration(found[key] / 1000)

    error, peak, ratio = found.get("gradient_error"), found.get("peak_mb"), found.get("speedup")
    with_adam = f" ({ms('with_adam_ms')} with Adam)" if "with_adam_ms" in found else ""
    return (
        f"`{name}`", executor(name), "–" if error is None else f"{error:.0e}", ms("eager_ms") + with_adam,
        ms("graph_ms"), ms("kernels_ms"), "–" if peak is None else f"{peak:,.0f} MB",
        str(found.get("best_peer") or "–"), "–" if ratio is None else f"**{times(ratio)}**",
    )  # fmt: skip


def _run(name: str, found: dict[str, Any]) -> str:
    if "wall_seconds" not in found:
        return ""
    value = f"{found['result']:.2%}" if found["metric"] == "accuracy" else f"{found['result']:.3g}"
    return f"\n`metafast train {name}`: {found['iterations']:,} iterations and the final test in " + (
        f"{found['wall_seconds']:.1f} s, {found['metric']} {value}."
    )


def _caption(reports: Sequence[dict[str, Any]]) -> str:
    """Returns the GPU, the versions, and each report's plan, commit and date."""
    machine = reports[-1]["machine"]
    versions = machine["versions"]
    runs = "; ".join(f"plan {r['plan']} at {str(r['machine'].get('commit'))[:12]}, {r['date'][:10]}" for r in reports)
    return (
        f"{machine['gpu']}, torch {versions.get('torch')}, Triton {versions.get('triton')}; {runs}; one second-order "
        "meta-gradient in float32; the error is that of its gradient against float64"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, or puts it into a README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", type=Path, nargs="+", help="gpu_check.json of one or more runs")
    parser.add_argument("--readme", type=Path, help=f"file with the marks {MARKS[0]} and {MARKS[1]}")
    options = parser.parse_args(arguments)
    try:
        table = markdown([read_report(file) for file in options.reports])
        if options.readme is None:
            print(table, end="")
        else:
            options.readme.write_text(between_marks(options.readme.read_text(), table, MARKS))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
