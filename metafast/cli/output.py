"""Where commands write: a result goes to standard output, a run into a folder."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import typer


def new_folder(name: str) -> Path:
    """Names a folder under ``runs/`` by the time, so that it is new."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def show(value: Any, as_json: bool, text: str) -> None:
    """Prints ``text`` for people, or ``value`` as JSON for programs."""
    typer.echo(json.dumps(value, indent=2) if as_json else text)
