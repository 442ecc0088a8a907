"""Files that are written: whole or not at all, and refused before the work whose result they are to hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def check_writable(path: Path) -> None:
    """Raises OSError where no file ``path`` can be written, before the work whose result it is to hold."""
    folder = path.resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {folder}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a folder; name a file in it")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: you may not")


def write_atomically(path: Path, content: bytes) -> None:
    """Puts ``content`` at ``path`` so that a reader, or a crash at any moment, finds the old file or the new one."""
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
    """``value`` as indented JSON, written atomically."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
