"""The command ``metafast profile``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from metafast.options import (
    OF_OWN_MODEL,
    Backend,
    Device,
    InnerRate,
    InputShape,
    Model,
    Queries,
    Shots,
    Steps,
    Tasks,
    Threads,
    Ways,
    refuse_typed,
)


def profile(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="WORKLOAD", help="A canonical workload, or --model.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of profile.json, trace.json and roofline.png.")] = Path("profile"),
    iterations: Annotated[int | None, typer.Option(help="To record. Default: two seconds of them.")] = None,
    backend: Backend = "auto",
    device: Device = "auto",
    threads: Threads = None,
    model: Model = None,
    input_shape: InputShape = "1,28,28",
    ways: Ways = 5,
    shots: Shots = 1,
    queries: Queries = 15,
    tasks: Tasks = 8,
    steps: Steps = 5,
    lr: InnerRate = 0.01,
) -> None:
    """Shows where the time of meta-training goes: by phase, by layer and rule, against the roofline; with a trace."""
    from metafast.bench.own import own_workload
    from metafast.benchmarks.workloads import workload
    from metafast.build import choose_device
    from metafast.executors import check_backend
    from metafast.profile import main_profile

    if (name is None) == (model is None):
        raise ValueError("give a workload's name, such as omni5w1s-1, or --model FILE.py:FACTORY")
    if name is not None:
        refuse_typed(context, OF_OWN_MODEL, "goes with --model FILE.py:FACTORY; a canonical workload has its own")
    check_backend(backend)
    chosen = workload(name) if name else own_workload(
        str(model), input_shape, ways, shots, queries, tasks, steps, lr
    )  # fmt: skip
    main_profile(
        chosen, out, sys.argv[2:], backend=backend, device=choose_device(device), threads=threads,
        iterations=iterations,
    )  # fmt: skip
