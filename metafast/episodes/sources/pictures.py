"""Image files: read with Pillow, with errors that name the file; and what identifies a tree of them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from metafast.extras import require

if TYPE_CHECKING:
    from PIL import Image


def decode(data: bytes, name: str) -> Image.Image:
    """The decoded picture; ``name`` says in an error which it is.

    Raises:
        ValueError: the bytes are not a picture that Pillow can read, or it has more than 8 bits a channel.
    """
    image_module = require("PIL.Image", "train")
    try:
        picture = image_module.open(io.BytesIO(data))
        picture.load()
    except (OSError, SyntaxError, ValueError, EOFError, image_module.DecompressionBombError) as error:
        raise ValueError(f"{name} is not a readable image ({error}); replace it or take it away") from error
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"{name} has more than 8 bits a channel (mode {picture.mode}); save it with 8 bits")
    return picture


def listing(root: Path, files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of each file: what identifies a tree without reading it."""
    return [(f.relative_to(root).as_posix(), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
