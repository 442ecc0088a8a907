"""Keeps rendered or decoded images on disk, so that a data set is prepared once a machine."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]


def cache_folder() -> Path:
    """Returns METAFAST_CACHE if it is set, else ``metafast`` in XDG_CACHE_HOME, else ``~/.cache/metafast``."""
    own = os.environ.get("METAFAST_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metafast"


def cached(name: str, depends_on: object, build: Callable[[], Arrays]) -> Arrays:
    """Returns what ``build`` makes, and reads it from disk if it was made before.

    Args:
        name: first part of the file name.
        depends_on: everything that decides the arrays; its ``repr`` is hashed into the file name. The
            source file of ``build`` belongs to it, so that no change of code leaves old pixels behind.
        build: makes named arrays; called when the file is missing or damaged.

    The file is an uncompressed ``.npz``: ``.npy`` arrays read without pickle, each under a CRC-32. It appears
    whole or not at all. A folder that cannot be written costs a warning and the time to build again.
    """
    key = hashlib.sha256(repr(depends_on).encode()).hexdigest()
    path = cache_folder() / f"{name}-{key[:24]}.npz"
    found = _read(path)
    if found is not None:
        return found
    arrays = build()
    try:
        _write(path, arrays)
    except OSError as error:
        warnings.warn(
            f"{name} could not be kept in {path.parent} ({error}), so it is prepared anew each time; "
            "set METAFAST_CACHE to a folder that can be written",
            stacklevel=3,
        )
    return arrays


def _read(path: Path) -> Arrays | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error):
        return None


def _write(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
        try:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
