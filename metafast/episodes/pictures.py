"""Image files: found in folders by class, and read with Pillow, with errors that name the file."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metafast.extras import require

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})


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


def folders_in(root: Path) -> list[Path]:
    """Its sub-folders by name, without hidden ones; none where there is no such folder."""
    if not root.is_dir():
        return []
    return sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith((".", "__")))


def images_in(folder: Path) -> list[Path]:
    """The files of the folder that are images by their names, in order."""
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))


def read_fitted(file: Path, size: int, channels: int) -> np.ndarray:
    """``uint8 [channels, size, size]``: upright, cropped to a square about its middle."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(decode(file.read_bytes(), str(file)))
    picture = picture.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC))
    return pixels.reshape(size, size, channels).transpose(2, 0, 1)


def decoder() -> tuple[bytes, str]:
    """The code of this file and Pillow's version, on which decoded pixels depend: a part of a cache's key."""
    return Path(__file__).read_bytes(), require("PIL", "train").__version__
