"""Writes files whole or not at all, and finds out before the work whether its result can be written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def check_writable(path: Path) -> None:
    """Checks that a file can be written at ``path``; it is called before the work whose result the file is to hold.

    Raises:
        OSError: it cannot be written; the text says why.
    """
    folder = path.resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {folder}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a folder; name a file in it")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: you may not")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes ``content`` to ``path`` so that readers, and crashes at any moment, find the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically.

    Raises:
        ValueError: there is a number in ``value`` that JSON does not have, such as NaN.
    """
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
