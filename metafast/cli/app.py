"""The commands of ``metafast``."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from metafast import learners
from metafast.cli.bench import bench
from metafast.cli.demo import run_demo
from metafast.cli.options import Backend, Device
from metafast.cli.profile import profile
from metafast.cli.verify import verify
from metafast.training.progress import terminal
from metafast.training.recipes import RECIPES, recipe
from metafast.training.report import finish, measured, table
from metafast.training.run import Options, Training
from metafast.training.saved_run import explain_recipe, open_run, predict, retest
from metafast.verification import doctor as examination

app = typer.Typer(
    name="metafast",
    help="Exact second-order meta-gradients for a whole batch of tasks. Start with: metafast demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on standard output.")]
Data = Annotated[Path | None, typer.Option(help="Folder of the data, for omniglot and folder recipes.")]
Run = Annotated[Path, typer.Argument(help="Folder of a run that `metafast train` wrote.", show_default=False)]
TestTasks = Annotated[int, typer.Option(help="Tasks in the final test.")]
_TRAINING, _TASKS, _RUN = "What is trained", "Tasks", "Where and how it runs"


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    """Options of every command."""


@app.command(
    epilog="Examples:\n\n"
    "  metafast train sinusoid --out runs/sine\n\n"
    "  metafast train omniglot-5w1s --data omniglot --iterations 2000 --out runs/omniglot\n\n"
    "  metafast train omniglot-5w1s --data omniglot --iterations 2000 --out runs/omniglot --resume"
)
def train(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help=f"One of: {', '.join(RECIPES)}.")],
    algorithm: Annotated[
        str | None, typer.Option(help=f"One of: {', '.join(learners.names())}.", rich_help_panel=_TRAINING)
    ] = None,
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
    data: Data = None,
    split: Annotated[
        str | None,
        typer.Option(help="Omniglot's classes: background alphabets to evaluation alphabets, or maml (random).",
                     rich_help_panel=_TASKS),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Iterations between validations; the best one is tested. 0: none, the last is tested.",
                     rich_help_panel=_RUN),
    ] = None,
    test_tasks: TestTasks = 600,
    checkpoint_every: Annotated[
        int, typer.Option(help="Iterations between checkpoints.", rich_help_panel=_RUN)
    ] = 500,
    device: Device = "auto",
    backend: Backend = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: a new one under runs/.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's files too.")] = False,
    graph: Annotated[
        bool, typer.Option(help="On a GPU: launch an outer step as one CUDA graph where that is possible.")
    ] = True,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Meta-trains a recipe, tests it on unseen tasks, and writes checkpoint, metrics, summary and pictures."""
    began = time.perf_counter()
    chosen = recipe(
        name, algorithm, iterations=iterations, lr=lr, inner_lr=inner_lr, steps=steps, tasks=tasks, ways=ways,
        shots=shots, queries=queries, split=split, eval_every=eval_every,
    )  # fmt: skip
    if out is None:
        if resume:
            raise ValueError("--resume needs --out: the folder of the run to go on with")
        out = _new_folder(f"{name}-{chosen.algorithm}")
    progress = terminal()
    options = Options(out, data, device, backend, seed, resume, checkpoint_every, tensorboard, graph)
    training = Training(chosen, options)
    progress.note(f"{chosen.name}, {chosen.algorithm}, on {training.device}, in {out}")
    training.run(progress)
    progress.note(f"testing on {test_tasks} tasks")
    summary = finish(training, test_tasks, time.perf_counter() - began)
    _show(summary, as_json, f"{table(summary['tests'], summary['metric'])}\n{_told(summary, out)}")


@app.command(name="eval", epilog="Example:  metafast eval runs/sine --tasks 2000 --shots 20 --steps 0 --steps 1")
def evaluate(
    run: Run,
    tasks: TestTasks = 600,
    shots: Annotated[list[int] | None, typer.Option(help="Support samples a class; may be repeated.")] = None,
    queries: Annotated[int | None, typer.Option(help="Query samples a class.")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Inner steps; may be repeated.")] = None,
    data: Data = None,
    device: Device = "auto",
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Tests a trained run again: on more tasks, with other shots, queries or inner steps."""
    trained = open_run(run, device, backend)
    result = retest(trained, data, tasks, shots, queries, steps)
    _show(result, as_json, table(result["tests"], result["metric"]))


@app.command(
    epilog="Examples:\n\n  metafast adapt runs/omniglot --support my/labelled --query my/unlabelled\n\n"
    "  metafast adapt runs/sine --support points.csv --query where.csv --out fit.csv"
)
def adapt(
    run: Run,
    support: Annotated[
        Path,
        typer.Option(help="Pictures, one sub-folder a class; in regression, a CSV file of x,y.", show_default=False),
    ],
    query: Annotated[
        Path, typer.Option(help="A picture, a folder of pictures, or a CSV file of x.", show_default=False)
    ],
    steps: Annotated[int | None, typer.Option(help="Inner steps. Default: those of the run's test.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write them to this .csv, or draw a fit in this .png.")] = None,
    device: Device = "auto",
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Adapts a trained run to your own few samples and predicts the rest."""
    rows = predict(open_run(run, device, backend), support, query, steps, out)
    columns = list(rows[0])
    lines = ["  ".join(columns), *("  ".join(_cell(row[c]) for c in columns) for row in rows)]
    _show(rows, as_json, "\n".join(lines))


@app.command(epilog="Example:  metafast explain omniglot-5w1s")
def explain(
    what: Annotated[str, typer.Argument(metavar="RECIPE|DIR", help="A recipe's name or a run's folder.")],
    algorithm: Annotated[str | None, typer.Option(help=f"One of: {', '.join(learners.names())}.")] = None,
    device: Device = "auto",
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Shows a recipe's settings and which executor runs each layer, and why."""
    if Path(what).is_dir():
        chosen = open_run(Path(what), device, backend).recipe
    else:
        chosen = recipe(what, algorithm)
    layers = explain_recipe(chosen, device, backend)
    settings = chosen.to_json()
    text = "\n".join([chosen.note, "", *(f"{k}: {v}" for k, v in settings.items() if k != "note"), "", layers])
    _show({"settings": settings, "layers": layers.splitlines()}, as_json, text)


app.command(epilog="Example:  metafast bench sin25-5 omni5w1s-1 --json out.json")(bench)
app.command(epilog="Example:  metafast profile omni5w1s-1 --out profile")(profile)
app.command(epilog="Example:  metafast verify net.py:make --input-shape 1,28,28 --ways 5 --shots 1")(verify)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Checks this machine: versions, devices, executors, what is missing and how to mend it; then a gradient."""
    findings = examination.examine()
    _show(findings.to_json(), as_json, str(findings))
    if not findings.healthy:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Folder of the results. Default: a new one under runs/.")] = None,
    device: Device = "auto",
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Trains two small recipes in a few minutes and compares the speed with a plain torch loop over tasks."""
    result = run_demo(out or _new_folder("demo"), device, backend, terminal())
    _show(result.to_json(), as_json, str(result))
    if not result.reached:
        raise typer.Exit(1)


def _new_folder(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _show(value: Any, as_json: bool, text: str) -> None:
    typer.echo(json.dumps(value, indent=2) if as_json else text)


def _told(summary: dict[str, Any], out: Path) -> str:
    tested, training = summary["tested"], summary["training"]
    return (
        f"{summary['metric']} {measured(summary['result'], summary['metric'])}, of iteration {tested['iteration']} "
        f"(chosen by {tested['chosen_by']}), queries: {summary['queries']}\n"
        f"{training['tasks_per_s']} tasks/s in training; everything is in {out}"
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
