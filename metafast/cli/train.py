"""The command ``metafast train``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from metafast.cli import options
from metafast.cli.output import new_folder, show
from metafast.training.recipes import RECIPES, recipe

_TRAINING, _TASKS = "What is trained", "Tasks"

app = typer.Typer()


class ResumeAlone(TyperCommand):
    """Lets ``--resume`` stand alone, also before RECIPE: of all words that may follow, only ``auto`` belongs to it."""

    VALUE = "last"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = iter(enumerate(args))
        full = []
        for position, argument in given:
            if argument == "--resume" and args[position + 1 : position + 2] == ["auto"]:
                next(given)
                argument = "--resume=auto"
            elif argument == "--resume":
                argument = f"--resume={self.VALUE}"
            full.append(argument)
        return super().parse_args(ctx, full)


@app.command(
    cls=ResumeAlone,
    epilog="Examples:\n\n"
    "  metafast train sinusoid --out runs/sine\n\n"
    "  metafast train omniglot-5w1s --data omniglot --iterations 2000 --out runs/omniglot\n\n"
    "  metafast train omniglot-5w1s --data omniglot --iterations 2000 --out runs/omniglot --resume auto",
)
def train(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help=f"One of: {', '.join(RECIPES)}.")],
    algorithm: Annotated[str | None, typer.Option(help=options.ALGORITHM_HELP, rich_help_panel=_TRAINING)] = None,
    iterations: Annotated[int | None, typer.Option(help="Outer steps.", rich_help_panel=_TRAINING)] = None,
    lr: Annotated[float | None, typer.Option(help="Rate of the outer optimiser.", rich_help_panel=_TRAINING)] = None,
    inner_lr: Annotated[
        float | None, typer.Option(help="Rate of the inner steps, on the mean loss.", rich_help_panel=_TRAINING)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Inner steps in training.", rich_help_panel=_TRAINING)] = None,
    seed: Annotated[int, typer.Option(help="Of parameters and training tasks.", rich_help_panel=_TRAINING)] = 0,
    tasks: Annotated[int | None, typer.Option(help="Tasks in a meta-batch.", rich_help_panel=_TASKS)] = None,
    ways: Annotated[int | None, typer.Option(help="Classes in a task.", rich_help_panel=_TASKS)] = None,
    shots: Annotated[
        int | None, typer.Option(help="Support samples a class, in training and test.", rich_help_panel=_TASKS)
    ] = None,
    queries: Annotated[
        int | None, typer.Option(help="Query samples a class in training.", rich_help_panel=_TASKS)
    ] = None,
    data: options.Data = None,
    split: Annotated[str | None, typer.Option(help=options.SPLIT_HELP, rich_help_panel=_TASKS)] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(
            help="Iterations between validations; the best one is tested. 0: none, the last is tested.",
            rich_help_panel=options.WHERE,
        ),
    ] = None,
    test_tasks: options.TestTasks = 600,
    checkpoint_every: Annotated[
        int, typer.Option(help="Iterations between checkpoints.", rich_help_panel=options.WHERE)
    ] = 500,
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: a new one under runs/.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[auto]",
            help="Go on from the last checkpoint in --out; with auto: start where there is none yet.",
        ),
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's files too.")] = False,
    graph: Annotated[
        bool, typer.Option(help="On a GPU: launch an outer step as one CUDA graph where that is possible.")
    ] = True,
    as_json: options.Json = False,
) -> None:
    """Meta-trains a recipe, tests it on unseen tasks, and writes checkpoint, metrics, summary and pictures."""
    from metafast.training.progress import terminal
    from metafast.training.report import finish, table
    from metafast.training.run import Options, Training

    began = time.perf_counter()
    chosen = recipe(
        name, algorithm, iterations=iterations, lr=lr, inner_lr=inner_lr, steps=steps, tasks=tasks, ways=ways,
        shots=shots, queries=queries, split=split, eval_every=eval_every,
    )  # fmt: skip
    if out is None:
        if resume is not None:
            raise ValueError("--resume needs --out: the folder of the run to go on with")
        out = new_folder(f"{name}-{chosen.algorithm}")
    progress = terminal()
    resuming: Any = {None: False, ResumeAlone.VALUE: True}.get(resume, resume)
    settings = Options(out, data, device, backend, seed, resuming, checkpoint_every, tensorboard, graph)
    training = Training(chosen, settings)
    progress.note(f"{chosen.name}, {chosen.algorithm}, on {training.device}, in {out}")
    if classes := training.episodes.classes:
        progress.note(f"classes: {', '.join(f'{count} for {part}' for part, count in classes.items())}")
    training.run(progress)
    progress.note(f"testing on {test_tasks} tasks")
    summary = finish(training, test_tasks, time.perf_counter() - began)
    show(summary, as_json, f"{table(summary['tests'], summary['metric'])}\n{_outcome(summary, out)}")


def _outcome(summary: dict[str, Any], out: Path) -> str:
    """Says in two lines what a run has reached."""
    from metafast.training.report import measured

    tested, training = summary["tested"], summary["training"]
    return (
        f"{summary['metric']} {measured(summary['result'], summary['metric'])}, of iteration {tested['iteration']} "
        f"(chosen by {tested['chosen_by']}), queries: {summary['queries']}\n"
        f"{training['tasks_per_s']} tasks/s in training; everything is in {out}"
    )
