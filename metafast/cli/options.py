"""Options that several commands share, each with one help text; and a check for options that nothing would read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from metafast import learners
from metafast.episodes import sources
from metafast.training.recipes import RECIPES

WHERE, _OWN = "Where and how it runs", "Your own model"

ALGORITHM_HELP = f"One of: {', '.join(learners.names())}."
# The help names the data sets in the order of the recipes.
_SOURCES = [sources.find(name) for name in dict.fromkeys(recipe.data for recipe in RECIPES.values())]
_WITH_FOLDER = " and ".join(source.name for source in _SOURCES if source.folder is not None)
SPLIT_HELP = " ".join(
    f"{source.name.capitalize()}'s classes: {source.division or ', or '.join(source.splits.values())}."
    for source in _SOURCES
    if source.splits or source.division
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on standard output.")]
Data = Annotated[Path | None, typer.Option(help=f"Folder of the data, for {_WITH_FOLDER} recipes.")]
Run = Annotated[Path, typer.Argument(help="Folder of a run that `metafast train` wrote.", show_default=False)]
TestTasks = Annotated[int, typer.Option(help="Tasks in the final test.")]

Device = Annotated[
    str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:INDEX.", rich_help_panel=WHERE)
]
Backend = Annotated[
    str,
    typer.Option(help="Executor: auto (the fastest that can), or one that `doctor` lists.", rich_help_panel=WHERE),
]
Threads = Annotated[
    int | None, typer.Option(help="Threads on the CPU. Default: as many as torch takes.", rich_help_panel=WHERE)
]

Model = Annotated[str | None, typer.Option(help="FILE.py:FACTORY, where FACTORY() makes it.", rich_help_panel=_OWN)]
InputShape = Annotated[str, typer.Option(help="Of a sample, such as 1,28,28.", rich_help_panel=_OWN)]
Ways = Annotated[int, typer.Option(help="Classes in a task; 0: regression.", rich_help_panel=_OWN)]
Shots = Annotated[int, typer.Option(help="Support samples a class.", rich_help_panel=_OWN)]
Queries = Annotated[int, typer.Option(help="Query samples a class.", rich_help_panel=_OWN)]
Tasks = Annotated[int, typer.Option(help="Tasks in a batch.", rich_help_panel=_OWN)]
Steps = Annotated[int, typer.Option(help="Inner steps.", rich_help_panel=_OWN)]
InnerRate = Annotated[float, typer.Option(help="Inner rate; a gentle one.", rich_help_panel=_OWN)]
OF_OWN_MODEL = ("input_shape", "ways", "shots", "queries", "tasks", "steps", "lr")


def refuse_typed(context: typer.Context, names: Collection[str], reason: str) -> None:
    """Raises ValueError with ``reason`` if a parameter of these names was typed, since nothing would read it."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            option = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
            raise ValueError(f"{option} {reason}")


def refuse_of_own_model(context: typer.Context) -> None:
    """Raises ValueError if options of an own model were typed although the workload is a canonical one."""
    refuse_typed(context, OF_OWN_MODEL, "goes with --model FILE.py:FACTORY; a canonical workload has its own")
