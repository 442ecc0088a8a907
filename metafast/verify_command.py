"""The command ``metafast verify``."""

from __future__ import annotations

import json as encoder
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

_TASKS, _HOW = "The tasks", "How it is run"


def verify(
    model: Annotated[str, typer.Argument(metavar="FILE.py:FACTORY", help="Your model: FACTORY() makes it.")],
    input_shape: Annotated[str, typer.Option(help="Of a sample, such as 1,28,28.", rich_help_panel=_TASKS)] = "1,28,28",
    ways: Annotated[int, typer.Option(help="Classes in a task; 0: regression.", rich_help_panel=_TASKS)] = 5,
    shots: Annotated[int, typer.Option(help="Support samples a class.", rich_help_panel=_TASKS)] = 1,
    queries: Annotated[int, typer.Option(help="Query samples a class.", rich_help_panel=_TASKS)] = 3,
    tasks: Annotated[int, typer.Option(help="Tasks in the batch.", rich_help_panel=_TASKS)] = 2,
    steps: Annotated[int, typer.Option(help="Inner steps.", rich_help_panel=_HOW)] = 2,
    lr: Annotated[float, typer.Option(help="Inner rate.", rich_help_panel=_HOW)] = 0.01,
    adapt: Annotated[
        list[str] | None, typer.Option(help="Module or parameter that the inner loop moves; may be repeated.",
                                       rich_help_panel=_HOW)
    ] = None,
    bn: Annotated[
        str, typer.Option(help="Batch norm: task, per_step, frozen or running.", rich_help_panel=_HOW)
    ] = "task",
    dtype: Annotated[str, typer.Option(help="float32 or float64.", rich_help_panel=_HOW)] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.", rich_help_panel=_HOW)] = "auto",
    backend: Annotated[str, typer.Option(help="Executor to verify, or auto.", rich_help_panel=_HOW)] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the certificate to this file.")] = None,
) -> None:  # fmt: skip
    """Holds the gradients of your own model against plain autograd in float64; fails where they disagree."""
    from metafast.bench.own import own_workload
    from metafast.build import choose_device
    from metafast.certificate import verify as examine

    if dtype not in ("float32", "float64"):
        raise ValueError(f"--dtype {dtype!r}: give float32 or float64")
    if json is not None and not json.resolve().parent.is_dir():
        raise FileNotFoundError(f"{json} cannot be written: there is no folder {json.resolve().parent}")
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
