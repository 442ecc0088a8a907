"""The command ``metafast eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from metafast.cli import options
from metafast.cli.output import show

app = typer.Typer()


@app.command(name="eval", epilog="Example:  metafast eval runs/sine --tasks 2000 --shots 20 --steps 0 --steps 1")
def evaluate(
    run: options.Run,
    tasks: options.TestTasks = 600,
    shots: Annotated[list[int] | None, typer.Option(help="Support samples a class; may be repeated.")] = None,
    queries: Annotated[int | None, typer.Option(help="Query samples a class.")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Inner steps; may be repeated.")] = None,
    data: options.Data = None,
    split: Annotated[str | None, typer.Option(help="As in `train`, of other data or where the lists lie now.")] = None,
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    as_json: options.Json = False,
) -> None:
    """Tests a trained run again: on more tasks, with other shots, queries or inner steps."""
    from metafast.training.report import table
    from metafast.training.saved_run import open_run, retest

    result = retest(open_run(run, device, backend), data, tasks, shots, queries, steps, split)
    show(result, as_json, table(result["tests"], result["metric"]))
