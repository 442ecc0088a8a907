"""The command ``metafast explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metafast.cli import options
from metafast.cli.output import show
from metafast.training.recipes import recipe

app = typer.Typer()


@app.command(epilog="Example:  metafast explain omniglot-5w1s")
def explain(
    what: Annotated[str, typer.Argument(metavar="RECIPE|DIR", help="A recipe's name or a run's folder.")],
    algorithm: Annotated[str | None, typer.Option(help=options.ALGORITHM_HELP)] = None,
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    as_json: options.Json = False,
) -> None:
    """Shows a recipe's settings and which executor runs each layer, and why."""
    from metafast.training.saved_run import explain_recipe, open_run

    if Path(what).is_dir():
        chosen = open_run(Path(what), device, backend).recipe
    else:
        chosen = recipe(what, algorithm)
    layers = explain_recipe(chosen, device, backend)
    settings = chosen.to_json()
    text = "\n".join([chosen.note, "", *(f"{k}: {v}" for k, v in settings.items() if k != "note"), "", layers])
    show({"settings": settings, "layers": layers.splitlines()}, as_json, text)
