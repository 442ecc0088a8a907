"""The command ``metafast demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metafast.cli import options
from metafast.cli.output import new_folder, show

app = typer.Typer()


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Folder of the results. Default: a new one under runs/.")] = None,
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    as_json: options.Json = False,
) -> None:
    """Trains two small recipes in a few minutes and compares the speed with a plain torch loop over tasks."""
    from metafast.training.progress import terminal
    from metafast.verification.demonstration import demonstrate

    result = demonstrate(out or new_folder("demo"), device, backend, terminal())
    show(result.to_json(), as_json, str(result))
    if not result.reached:
        raise typer.Exit(1)
