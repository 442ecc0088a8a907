"""The command ``metafast adapt``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from metafast.cli import options
from metafast.cli.output import show

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n  metafast adapt runs/omniglot --support my/labelled --query my/unlabelled\n\n"
    "  metafast adapt runs/sine --support points.csv --query where.csv --out fit.csv"
)
def adapt(
    run: options.Run,
    support: Annotated[
        Path,
        typer.Option(help="Pictures, one sub-folder a class; in regression, a CSV file of x,y.", show_default=False),
    ],
    query: Annotated[
        Path, typer.Option(help="A picture, a folder of pictures, or a CSV file of x.", show_default=False)
    ],
    steps: Annotated[int | None, typer.Option(help="Inner steps. Default: those of the run's test.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write them to this .csv, or draw a fit in this .png.")] = None,
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    as_json: options.Json = False,
) -> None:
    """Adapts a trained run to your own few samples and predicts the rest."""
    from metafast.training.saved_run import open_run, predict

    rows = predict(open_run(run, device, backend), support, query, steps, out)
    columns = list(rows[0])
    lines = ["  ".join(columns), *("  ".join(_cell(row[column]) for column in columns) for row in rows)]
    show(rows, as_json, "\n".join(lines))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
