"""The command ``metafast verify``."""

from __future__ import annotations

import json as encoder
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from metafast.cli import options

app = typer.Typer()


@app.command(epilog="Example:  metafast verify net.py:make --input-shape 1,28,28 --ways 5 --shots 1")
def verify(
    model: Annotated[str, typer.Argument(metavar="FILE.py:FACTORY", help="Your model: FACTORY() makes it.")],
    adapt: Annotated[
        list[str] | None, typer.Option(help="Module or parameter that the inner loop moves; may be repeated.")
    ] = None,
    bn: Annotated[
        str | None,
        typer.Option(help="Batch norm: task, per_step, frozen or running; by each module's own mode if not given."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the certificate to this file.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    input_shape: options.InputShape = "1,28,28",
    ways: options.Ways = 5,
    shots: options.Shots = 1,
    queries: options.Queries = 3,
    tasks: options.Tasks = 2,
    steps: options.Steps = 2,
    lr: options.InnerRate = 0.01,
) -> None:
    """Holds the gradients of your own model against plain autograd in float64; fails where they disagree."""
    import torch

    from metafast.bench.own import own_workload
    from metafast.files import check_writable
    from metafast.training.build import choose_device
    from metafast.verification.certificate import verify as examine

    if dtype not in ("float32", "float64"):
        raise ValueError(f"--dtype {dtype!r}: give float32 or float64")
    if json is not None:
        check_writable(json)
    own = own_workload(model, input_shape, ways, shots, queries, tasks, steps, lr)
    place, real = choose_device(device), getattr(torch, dtype)
    certificate = examine(
        own.network().to(place, real), own.draw().to(place).to(real), loss=own.loss, lr=lr, steps=steps,
        adapt=adapt or None, bn=bn, backend=backend,
    )  # fmt: skip
    certificate = replace(certificate, model=own.name)
    if json is not None:
        json.write_text(encoder.dumps(certificate.to_json(), indent=1) + "\n")
    typer.echo(str(certificate))
    if not certificate.passed:
        raise typer.Exit(1)
