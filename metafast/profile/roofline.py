"""Draws the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metafast.extras import require
from metafast.profile.result import Profile, Row
from metafast.profile.spans import RULES

COLOURS = dict(zip(RULES, ("#0f766e", "#2563eb", "#d97706", "#dc2626"), strict=True))
_SMALLEST = 0.002  # share of the time below which a rule is not drawn


def draw(profile: Profile, path: Path) -> None:
    """Draws two panels: rules with products under the machine's roof on the left; on the right the bytes a second that
    all other rules move, against the copy rate."""
    shown = [row for row in profile.rows if row.seconds > _SMALLEST * profile.wall]
    figure = require("matplotlib.figure").Figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [3, 2]})
    _products(left, profile, [row for row in shown if row.flops])
    _movers(right, profile, [row for row in shown if not row.flops and row.bytes][:16])
    figure.suptitle(f"{profile.workload} on {profile.executor}: {profile.verdict}", fontsize=11)
    figure.savefig(path, dpi=130)


def _products(axes: Any, profile: Profile, rows: list[Row]) -> None:
    matrix, copy = profile.rates.matrix, profile.rates.copy
    intensities = [row.flops / row.bytes for row in rows] or [matrix / copy]
    low, high = min([*intensities, matrix / copy]) / 3, max([*intensities, matrix / copy]) * 3
    roof = [low, matrix / copy, high]
    axes.plot(roof, [min(matrix, x * copy) / 1e9 for x in roof], color="#334155", linewidth=1.5)
    axes.annotate(f"{matrix / 1e9:.0f} GFLOP/s, a large matrix product", (high, matrix / 1e9), ha="right", va="bottom",
                  fontsize=8, xytext=(0, 3), textcoords="offset points")  # fmt: skip
    axes.annotate(f"{copy / 1e9:.0f} GB/s, a large copy", (low, low * copy / 1e9), ha="left", va="bottom", fontsize=8,
                  xytext=(6, 6), textcoords="offset points")  # fmt: skip
    for row in rows:
        size = 20 + 1500 * row.seconds / profile.wall
        axes.scatter(row.flops / row.bytes, row.flops / row.seconds / 1e9, s=size, color=COLOURS[row.rule], alpha=0.6,
                     edgecolors="white", linewidths=0.5)  # fmt: skip
    longest = {row.layer: row for row in reversed(rows)}
    for row in longest.values():
        axes.annotate(row.layer, (row.flops / row.bytes, row.flops / row.seconds / 1e9), fontsize=8, ha="right",
                      xytext=(-9, 5), textcoords="offset points")  # fmt: skip
    for rule, colour in COLOURS.items():
        axes.scatter([], [], s=40, color=colour, alpha=0.6, label=rule)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte, each operand moved once", ylabel="GFLOP/s")
    ticker = require("matplotlib.ticker")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.set_title("convolutions and matrix products; area: share of the time", fontsize=9, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)


def _movers(axes: Any, profile: Profile, rows: list[Row]) -> None:
    names = [f"{row.layer}\n{row.rule}, {row.phase}" for row in rows]
    axes.barh(range(len(rows)), [row.bytes / row.seconds / 1e9 for row in rows],
              color=[COLOURS[row.rule] for row in rows], alpha=0.75)  # fmt: skip
    axes.axvline(profile.rates.copy / 1e9, color="#334155", linewidth=1.5)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s; the line: a large copy")
    axes.set_title("layers without products, the longest first", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
