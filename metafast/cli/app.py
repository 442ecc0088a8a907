"""The application ``metafast``. It has no command of its own: each of them lies in a file of this folder."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

# The files of the commands, in the order in which the help lists them. Each has an ``app`` with one command, which
# names itself: that of ``evaluate`` is ``eval``.
COMMANDS = ("train", "evaluate", "adapt", "explain", "bench", "profile", "verify", "doctor", "demo")

app = typer.Typer(
    name="metafast",
    help="Exact second-order meta-gradients for a whole batch of tasks. Start with: metafast demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    """Declares the options that every command has; ``main`` has read them already."""


for name in COMMANDS:
    app.add_typer(import_module(f"metafast.cli.{name}").app)
