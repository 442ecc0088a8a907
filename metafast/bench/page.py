"""Writes results as one HTML page that needs no script, no font and no other file."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from metafast.bench.table import (
    HEADINGS,
    best_ratio,
    caption,
    cells,
    duration,
    is_own,
    measured,
    memory,
    remarks,
    times,
    title,
)

_STYLE = """
:root { color-scheme: light dark; --page: #f8fafc; --card: #fff; --ink: #0f172a; --soft: #64748b; --line: #e2e8f0;
  --own: #0f766e; --peer: #b6c2d1; --floor: #dc2626; --warn: #b45309; }
@media (prefers-color-scheme: dark) { :root { --page: #0b1120; --card: #131c31; --ink: #e2e8f0; --soft: #94a3b8;
  --line: #24304a; --own: #2dd4bf; --peer: #475569; --floor: #f87171; --warn: #fbbf24; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; letter-spacing: -.02em; }
h2 { margin: 0; white-space: nowrap; font-size: 1.15rem; font-family: ui-monospace, "SF Mono", Menlo, monospace; }
p { margin: .3rem 0; } .soft { color: var(--soft); font-size: .87rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; padding: 1.25rem 1.5rem;
  margin-top: 1.25rem; }
header.row { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 1rem; align-items: baseline; }
.ratio { color: var(--own); font-weight: 650; font-size: 1.15rem; white-space: nowrap; }
.chart { position: relative; margin: 1rem 0 1.2rem; }
.bar { display: grid; grid-template-columns: 9.5rem 1fr; align-items: center; height: 1.75rem; }
.bar > span:first-child { font-size: .87rem; } .track { position: relative; height: 1.1rem; margin-right: 4.5rem; }
.fill { position: absolute; inset: 0 auto 0 0; background: var(--peer); border-radius: 0 .2rem .2rem 0; }
.own .fill { background: var(--own); } .own > span:first-child { font-weight: 650; }
.value { position: absolute; left: 100%; margin-left: .2rem; padding: 0 .3rem; z-index: 1; background: var(--card);
  white-space: nowrap; font-size: .82rem; line-height: 1.1rem; font-variant-numeric: tabular-nums; }
.floor { position: absolute; top: -.35rem; bottom: -.35rem; border-left: 2px dashed var(--floor); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .84rem; }
th { color: var(--soft); font-weight: 500; } th, td { text-align: right; padding: .3rem .5rem; white-space: nowrap;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } tr.own td { color: var(--own); font-weight: 600; }
td.absent { color: var(--warn); text-align: left; }
.warn { color: var(--warn); font-size: .87rem; } .key { color: var(--floor); }
@media (max-width: 32rem) { section { padding: 1rem; } .bar { grid-template-columns: 7.6rem 1fr; } }
"""


def page(result: dict[str, Any]) -> str:
    """Returns the page. It is light or dark, as the reader's system is."""
    sections = "".join(_section(workload) for workload in result["workloads"])
    tolerances = "".join(
        f"<p class=soft>Agreement of {escape(name)}: within {tolerance['value']:g}. {escape(tolerance['reason'])}.</p>"
        for name, tolerance in result["tolerances"].items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>metafast benchmark</title><style>{_STYLE}</style></head><body><h1>metafast benchmark</h1>"
        f"<p class=soft>{escape(caption(result))}</p>"
        "<p class=soft>Bars are medians on a logarithmic scale. "
        "<span class=key>The dashed line</span> is the floor: the FLOPs of direct arithmetic, or the bytes that must "
        "move, at the rates of a large matrix product and a large copy measured in the same run. Winograd convolutions "
        "do fewer products and can be below it. All gradients were checked against float64 autograd first; what "
        "disagrees is not timed.</p>"
        f"{sections}<section>{tolerances}</section></body></html>\n"
    )


def _section(workload: dict[str, Any]) -> str:
    name, _, sizes = title(workload).partition(": ")
    ratio = best_ratio(workload)
    verdict = "" if ratio is None else f"<span class=ratio>{times(ratio)} as fast as the best peer</span>"
    needs = "".join(f"<p class=soft>{escape(line)}</p>" for line in memory(workload))
    warnings = "".join(f"<p class=warn>{escape(line)}</p>" for line in remarks(workload))
    head = "".join(f"<th>{escape(heading)}</th>" for heading in ("", *HEADINGS))
    body = "".join(_table_row(row, workload) for row in workload["rows"])
    return (
        f"<section><header class=row><h2>{escape(name)}</h2>{verdict}</header><p class=soft>{escape(sizes)}</p>"
        f"{_chart(workload)}<div class=wide><table><tr>{head}</tr>{body}</table></div>{needs}{warnings}</section>"
    )


def _table_row(row: dict[str, Any], workload: dict[str, Any]) -> str:
    if not measured(row):
        absent = f"<td class=absent colspan={len(HEADINGS)}>{escape(row['state'])}</td>"
        return f"<tr><td>{escape(row['name'])}</td>{absent}</tr>"
    own = " class=own" if is_own(row) else ""
    return f"<tr{own}>{''.join(f'<td>{escape(cell)}</td>' for cell in [row['name'], *cells(row, workload)])}</tr>"


def _chart(workload: dict[str, Any]) -> str:
    rows = [row for row in workload["rows"] if measured(row)]
    if not rows:
        return ""
    floor = max(workload["floors_s"].values())
    times = [row["median_s"] for row in rows]
    low, high = math.log(min([floor, *times]) / 2), math.log(max([floor, *times]))
    mark = f"<span class=floor style='left:{_percent(floor, low, high)}'></span>"
    bars = "".join(
        f"<div class='bar{' own' * is_own(row)}'><span>{escape(row['name'])}</span><span class=track>"
        f"<span class=fill style='width:{_percent(row['median_s'], low, high)}'>"
        f"<span class=value>{escape(duration(row['median_s']))}</span></span>{mark}</span></div>"
        for row in rows
    )
    return f"<div class=chart>{bars}</div>"


def _percent(seconds: float, low: float, high: float) -> str:
    return f"{100 * (math.log(seconds) - low) / (high - low):.2f}%"
