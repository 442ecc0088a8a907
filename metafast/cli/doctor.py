"""The command ``metafast doctor``."""

from __future__ import annotations

import typer

from metafast.cli import options
from metafast.cli.output import show

app = typer.Typer()


@app.command()
def doctor(as_json: options.Json = False) -> None:
    """Checks this machine: versions, devices, executors, what is missing and how to mend it; then a gradient."""
    from metafast.verification.doctor import examine

    findings = examine()
    show(findings.to_json(), as_json, str(findings))
    if not findings.healthy:
        raise typer.Exit(1)
