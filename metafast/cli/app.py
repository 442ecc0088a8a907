"""``metafast`` as an application: it has no command of its own, each lies in a file of this folder."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

# The help lists the commands in this order. ``evaluate`` stands for the file ``evaluate.py``, whose ``app`` has one
# command; that names itself, and may do so in another way (``eval``).
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
    """Options of every command."""


for name in COMMANDS:
    app.add_typer(import_module(f"metafast.cli.{name}").app)
