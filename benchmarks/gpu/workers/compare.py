"""Runs ``metafast bench`` on one workload, with the oracle from its file and all first calls at the same time."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from metafast.bench import Outputs, Settings, main_bench, own_failures, read_result
from metafast.bench.table import best_ratio, own_row

from ..results import Results
from ..subjects import executor
from .setting import parser, setting

SETTINGS = Settings(rounds=6, budget=2.0, limit=10.0, first_limit=36.0, side_by_side=True)
REHEARSED = Settings(rounds=1, turn=0.01, limit=60.0, first_limit=100.0, side_by_side=True, threads=1)


def main() -> int:
    """Measures and adds the results. Returns 0 if metafast has a time."""
    options = parser(__doc__)
    options.add_argument("workload")
    options.add_argument("--json", type=Path, required=True)
    options.add_argument("--peers", nargs="+", required=True)
    given = options.parse_args()
    where = setting(given)
    settings = replace(REHEARSED if given.rehearse else SETTINGS, device=given.device, oracle=given.oracles)
    backend = "auto" if given.rehearse else executor(given.workload)
    chosen = where.workload(given.workload)
    where.oracle(chosen)  # it must exist, since computing it takes longer than all peers together
    try:
        main_bench(
            [], chosen, backends=[backend], chosen_peers=given.peers, settings=settings,
            outputs=Outputs(json=given.json),
        )  # fmt: skip
    finally:  # also when its time is up, for the file has what was measured until then
        if given.json.exists():
            result = read_result(given.json)
            add_rows(result, where.results)
    return 1 if own_failures(result) else 0


def add_rows(result: dict[str, Any], results: Results) -> None:
    """Adds every row to the results, and how metafast compares with the best peer."""
    for workload in result["workloads"]:
        for row in workload["rows"]:
            median = row.get("median_s")
            numbers = {
                "median_ms": median and 1000 * median, "gradient_error": row.get("agreement", {}).get("gradient"),
                "first_call_s": row.get("first_call_s"), "peak_mb": row.get("peak_bytes", 0) / 1e6 or None,
            }  # fmt: skip
            known = {key: value for key, value in numbers.items() if value is not None}
            notes = {key: row[key] for key in ("note", "flag") if row.get(key)}
            results.add(workload["name"], contender=row["name"], state=row["state"], **known, **notes)
        own, ratio = own_row(workload), best_ratio(workload)
        if own is not None:
            over = own.get("speedup_over", {})
            best = next((name for name, value in over.items() if value == ratio), None)
            results.add(workload["name"], speedup=ratio, best_peer=best, over_floor=own["over_floor"])


if __name__ == "__main__":
    sys.exit(main())
