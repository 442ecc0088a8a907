"""The command line: runs a command and turns what goes wrong into one readable line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from metafast.extras import require


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 0, 1 (something failed), 2 (bad usage) or 130 (interrupted; a checkpoint was written)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        require("typer")
        from metafast.cli.app import app
        from metafast.training.run import Interrupted

        try:
            app(args=[argument for argument in given if argument != "--debug"], prog_name="metafast")
        except Interrupted as stop:
            _fail(str(stop), 130)
    except (ValueError, OSError, RuntimeError, ImportError, TypeError) as error:
        if debug:
            raise
        _fail(str(error), 2 if isinstance(error, ValueError) else 1)


def _fail(text: str, code: int) -> None:
    print(f"metafast: {text}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
