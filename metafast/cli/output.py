"""Where commands write: their result on standard output, a run in a folder."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import typer


def new_folder(name: str) -> Path:
    """A folder under ``runs/`` that bears the time and so is new."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def show(value: Any, as_json: bool, text: str) -> None:
    """Prints ``text`` for people, or ``value`` as JSON for programs."""
    typer.echo(json.dumps(value, indent=2) if as_json else text)
