"""The command ``metafast profile``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

_OWN, _HOW = "Your own model", "How it is run"


def profile(
    name: Annotated[str | None, typer.Argument(metavar="[WORKLOAD]", help="A canonical workload, or --model.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of profile.json, trace.json and roofline.png.")] = Path("profile"),
    backend: Annotated[str, typer.Option(help="Executor, or auto.", rich_help_panel=_HOW)] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.", rich_help_panel=_HOW)] = "auto",
    threads: Annotated[int | None, typer.Option(help="Default: as torch takes.", rich_help_panel=_HOW)] = None,
    iterations: Annotated[
        int | None, typer.Option(help="To record. Default: two seconds of them.", rich_help_panel=_HOW)
    ] = None,
    model: Annotated[str | None, typer.Option(help="FILE.py:FACTORY of your own model.", rich_help_panel=_OWN)] = None,
    input_shape: Annotated[str, typer.Option(help="Of a sample, such as 1,28,28.", rich_help_panel=_OWN)] = "1,28,28",
    ways: Annotated[int, typer.Option(help="Classes in a task; 0: regression.", rich_help_panel=_OWN)] = 5,
    shots: Annotated[int, typer.Option(help="Support samples a class.", rich_help_panel=_OWN)] = 1,
    queries: Annotated[int, typer.Option(help="Query samples a class.", rich_help_panel=_OWN)] = 15,
    tasks: Annotated[int, typer.Option(help="Tasks in a batch.", rich_help_panel=_OWN)] = 8,
    steps: Annotated[int, typer.Option(help="Inner steps.", rich_help_panel=_OWN)] = 5,
    lr: Annotated[float, typer.Option(help="Inner rate.", rich_help_panel=_OWN)] = 0.01,
) -> None:  # fmt: skip
    """Shows where the time of meta-training goes: by phase, by layer and rule, against the roofline; with a trace."""
    from metafast.bench.own import own_workload
    from metafast.benchmarks.workloads import workload
    from metafast.build import choose_device
    from metafast.executors import check_backend
    from metafast.profile import main_profile

    if (name is None) == (model is None):
        raise ValueError("give a workload's name, such as omni5w1s-1, or --model FILE.py:FACTORY")
    check_backend(backend)
    chosen = workload(name) if name else own_workload(
        str(model), input_shape, ways, shots, queries, tasks, steps, lr
    )  # fmt: skip
    main_profile(
        chosen, out, sys.argv[2:], backend=backend, device=choose_device(device), threads=threads,
        iterations=iterations,
    )  # fmt: skip
