"""The command ``metafast bench``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

_OWN, _HOW, _OUT = "Your own model", "How it is measured", "What is written"


def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[WORKLOAD]...", help="Canonical workloads; none: the standard seven.")
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Executors of metafast; may be repeated.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Only these peers; may be repeated. Default: all.")] = None,
    learn2learn: Annotated[
        Path | None, typer.Option(help="Unpacked source of learn2learn: the folder that holds learn2learn/algorithms.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:INDEX.", rich_help_panel=_HOW)] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of each process.", rich_help_panel=_HOW)] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each peer: A B C A B C.", rich_help_panel=_HOW)] = 10,
    budget: Annotated[float, typer.Option(help="Seconds a peer and workload.", rich_help_panel=_HOW)] = 6.0,
    limit: Annotated[float, typer.Option(help="Seconds for a call; slower: cut off.", rich_help_panel=_HOW)] = 30,
    first_limit: Annotated[float, typer.Option(help="The same for the first call.", rich_help_panel=_HOW)] = 120,
    model: Annotated[str | None, typer.Option(help="FILE.py:FACTORY of your own model.", rich_help_panel=_OWN)] = None,
    input_shape: Annotated[str, typer.Option(help="Of a sample, such as 1,28,28.", rich_help_panel=_OWN)] = "1,28,28",
    ways: Annotated[int, typer.Option(help="Classes in a task; 0: regression.", rich_help_panel=_OWN)] = 5,
    shots: Annotated[int, typer.Option(help="Support samples a class.", rich_help_panel=_OWN)] = 1,
    queries: Annotated[int, typer.Option(help="Query samples a class.", rich_help_panel=_OWN)] = 15,
    tasks: Annotated[int, typer.Option(help="Tasks in a batch.", rich_help_panel=_OWN)] = 8,
    steps: Annotated[int, typer.Option(help="Inner steps.", rich_help_panel=_OWN)] = 5,
    lr: Annotated[float, typer.Option(help="Inner rate; a gentle one.", rich_help_panel=_OWN)] = 0.01,
    json: Annotated[Path | None, typer.Option(help="The whole result.", rich_help_panel=_OUT)] = None,
    markdown: Annotated[Path | None, typer.Option(help="A table.", rich_help_panel=_OUT)] = None,
    chart: Annotated[Path | None, typer.Option(help="A bar chart, .png.", rich_help_panel=_OUT)] = None,
    report: Annotated[Path | None, typer.Option(help="A page, .html.", rich_help_panel=_OUT)] = None,
    readme: Annotated[
        Path | None, typer.Option(help="Put the table between the marks of this file.", rich_help_panel=_OUT)
    ] = None,
    load: Annotated[Path | None, typer.Option(help="Show a saved --json result; measure nothing.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A.json B.json", help="What changed; fails past --threshold.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="Share of the time that counts as slower.")] = 0.1,
) -> None:  # fmt: skip
    """Times one meta-gradient against every peer that is installed, after checking that all agree."""
    from metafast import bench as harness
    from metafast.benchmarks.peers import LEARN2LEARN

    if compare is not None:
        if harness.main_compare(*compare, threshold).worse:
            raise typer.Exit(1)
        return
    if learn2learn is not None:
        os.environ[LEARN2LEARN] = str(learn2learn)
    own = None
    if model is not None:
        own = harness.own_workload(model, input_shape, ways, shots, queries, tasks, steps, lr)
    harness.main_bench(
        names or (),
        own,
        backends=backend or ("auto",),
        chosen_peers=peer or (),
        settings=harness.Settings(
            device=device, threads=threads, rounds=rounds, budget=budget, limit=limit, first_limit=first_limit
        ),
        outputs=harness.Outputs(json, markdown, chart, report, readme),
        saved=load,
    )
