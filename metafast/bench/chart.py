"""Draws results as a bar chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metafast.bench.table import caption, duration, is_own, measured
from metafast.extras import require

OWN, PEER, FLOOR = "#0f766e", "#94a3b8", "#dc2626"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws one panel for each workload: median times with their quartiles on a logarithmic axis, and the floor."""
    workloads = result["workloads"]
    shown = [[row for row in workload["rows"] if measured(row)] for workload in workloads]
    height = sum(len(rows) for rows in shown) * 0.3 + 0.8 * len(workloads) + 0.6
    figure = require("matplotlib.figure").Figure(figsize=(9, height), layout="constrained")
    ratios = [len(rows) + 2 for rows in shown]
    panels = figure.subplots(len(workloads), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    for axes, workload, rows in zip(panels, workloads, shown, strict=True):
        _panel(axes, workload, rows)
    figure.supxlabel(caption(result), fontsize=6, wrap=True)
    figure.savefig(path, dpi=150)


def check_kind(path: Path) -> None:
    """Raises ValueError if matplotlib cannot write a picture with the suffix of ``path``."""
    kinds = require("matplotlib.figure").Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"{path}: a chart is one of {', '.join(f'.{kind}' for kind in kinds)}")


def _panel(axes: Any, workload: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    medians = [row["median_s"] for row in rows]
    spread = [
        [max(0.0, row["median_s"] - row["q1_s"]) for row in rows],
        [max(0.0, row["q3_s"] - row["median_s"]) for row in rows],
    ]
    colours = [OWN if is_own(row) else PEER for row in rows]
    floor = max(workload["floors_s"].values())
    axes.barh([row["name"] for row in rows], medians, xerr=spread, color=colours, height=0.7, ecolor="#475569")
    axes.axvline(floor, color=FLOOR, linewidth=1, linestyle="--", label=f"floor {duration(floor)}")
    for i, row in enumerate(rows):
        axes.annotate(
            duration(row["median_s"]), (row["q3_s"], i), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
    axes.set_xscale("log")
    shortest, longest = floor / 2, 4 * max([floor, *medians])
    axes.set_xlim(shortest, longest)
    ticker = require("matplotlib.ticker")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if longest < 300 * shortest else (1,)))
    axes.xaxis.set_major_formatter(lambda seconds, _: duration(seconds))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.invert_yaxis()
    axes.set_title(workload["name"], loc="left", fontsize=10, fontweight="bold")
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
