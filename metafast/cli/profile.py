"""The command ``metafast profile``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from metafast.cli import options

app = typer.Typer()


@app.command(epilog="Example:  metafast profile omni5w1s-1 --out profile")
def profile(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="WORKLOAD", help="A canonical workload, or --model.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of profile.json, trace.json and roofline.png.")] = Path("profile"),
    iterations: Annotated[int | None, typer.Option(help="To record. Default: two seconds of them.")] = None,
    backend: options.Backend = "auto",
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
) -> None:
    """Shows where the time of meta-training goes: by phase, by layer and rule, against the roofline; with a trace."""
    from metafast.bench.own import own_workload
    from metafast.bench.workloads import workload
    from metafast.executors import check_backend
    from metafast.profile import main_profile
    from metafast.training.build import choose_device

    if (name is None) == (model is None):
        raise ValueError("give a workload's name, such as omni5w1s-1, or --model FILE.py:FACTORY")
    if name is not None:
        options.refuse_of_own_model(context)
    check_backend(backend)
    chosen = workload(name) if name else own_workload(
        str(model), input_shape, ways, shots, queries, tasks, steps, lr
    )  # fmt: skip
    main_profile(
        chosen, out, sys.argv[2:], backend=backend, device=choose_device(device), threads=threads,
        iterations=iterations,
    )  # fmt: skip
