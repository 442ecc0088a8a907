"""The command ``metafast bench``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from metafast.cli import options

_HOW, _OUT = "How it is measured", "What is written"
_MEASURING = (
    "names", "backend", "peer", "learn2learn", "device", "threads", "rounds", "budget", "limit", "first_limit",
    "oracle", "model", *options.OF_OWN_MODEL,
)  # fmt: skip
_WRITTEN = ("json", "markdown", "chart", "report", "readme", "load")

app = typer.Typer()


@app.command(epilog="Example:  metafast bench sin25-5 omni5w1s-1 --json out.json")
def bench(
    context: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="WORKLOAD", help="Canonical workloads; none: the standard seven.")
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Executors of metafast; may be repeated.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Only these peers; may be repeated. Default: all.")] = None,
    learn2learn: Annotated[
        Path | None, typer.Option(help="Unpacked source of learn2learn: the folder that holds learn2learn/algorithms.")
    ] = None,
    load: Annotated[Path | None, typer.Option(help="Show a saved --json result; measure nothing.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A.json B.json", help="What changed; fails past --threshold.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="Share of the time that counts as slower.")] = 0.1,
    rounds: Annotated[int, typer.Option(help="Turns of each peer: A B C A B C.", rich_help_panel=_HOW)] = 10,
    budget: Annotated[float, typer.Option(help="Seconds a peer and workload.", rich_help_panel=_HOW)] = 6.0,
    limit: Annotated[float, typer.Option(help="Seconds for a call; slower: cut off.", rich_help_panel=_HOW)] = 30,
    first_limit: Annotated[float, typer.Option(help="The same for the first call.", rich_help_panel=_HOW)] = 120,
    oracle: Annotated[
        Path | None, typer.Option(help="Folder of float64 oracles, as make gpu-pack writes.", rich_help_panel=_HOW)
    ] = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    model: options.Model = None,
    input_shape: options.InputShape = "1,28,28",
    ways: options.Ways = 5,
    shots: options.Shots = 1,
    queries: options.Queries = 15,
    tasks: options.Tasks = 8,
    steps: options.Steps = 5,
    lr: options.InnerRate = 0.01,
    json: Annotated[Path | None, typer.Option(help="The whole result.", rich_help_panel=_OUT)] = None,
    markdown: Annotated[Path | None, typer.Option(help="A table.", rich_help_panel=_OUT)] = None,
    chart: Annotated[Path | None, typer.Option(help="A bar chart, .png.", rich_help_panel=_OUT)] = None,
    report: Annotated[Path | None, typer.Option(help="A page, .html.", rich_help_panel=_OUT)] = None,
    readme: Annotated[
        Path | None, typer.Option(help="Put the table between the marks of this file.", rich_help_panel=_OUT)
    ] = None,
) -> None:
    """Times one meta-gradient against every peer that is installed, after checking that all agree; fails where metafast
    has no time."""
    import metafast.bench as harness
    from metafast.bench.peers import LEARN2LEARN
    from metafast.training.build import choose_device

    if compare is not None:
        options.refuse_typed(context, (*_MEASURING, *_WRITTEN), "has no use with --compare, which reads two results")
        if harness.main_compare(*compare, threshold).worse:
            raise typer.Exit(1)
        return
    options.refuse_typed(context, ["threshold"], "goes with --compare A.json B.json")
    if load is not None:
        options.refuse_typed(context, _MEASURING, "has no use with --load, which measures nothing")
    own = None
    if model is not None:
        own = harness.own_workload(model, input_shape, ways, shots, queries, tasks, steps, lr)
    else:
        options.refuse_of_own_model(context)
    if learn2learn is not None:
        os.environ[LEARN2LEARN] = str(learn2learn)
    result = harness.main_bench(
        names or (),
        own,
        backends=backend or ("auto",),
        chosen_peers=peer or (),
        settings=harness.Settings(
            device=choose_device(device),
            threads=threads,
            rounds=rounds,
            budget=budget,
            limit=limit,
            first_limit=first_limit,
            oracle=oracle,
        ),
        outputs=harness.Outputs(json, markdown, chart, report, readme),
        saved=load,
    )
    if load is None and any(harness.own_failures(result)):
        raise typer.Exit(1)
