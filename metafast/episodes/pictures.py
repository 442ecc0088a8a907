"""Finds image files in folders and reads them with Pillow. Errors name the file."""

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
    """Decodes a picture; ``name`` says in an error which one it is.

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
    """Returns path, size and time of change of each file, which identify a tree of files without reading it."""
    return [(f.relative_to(root).as_posix(), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]


def folders_in(root: Path) -> list[Path]:
    """Lists the sub-folders by name, without hidden ones. A folder that does not exist has none."""
    if not root.is_dir():
        return []
    return sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith((".", "__")))


def images_in(folder: Path) -> list[Path]:
    """Lists the files of the folder that have an image's suffix, by name."""
    found = (f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    return sorted(f for f in found if not f.is_dir())


def read_fitted(file: Path, size: int, channels: int) -> np.ndarray:
    """Reads a picture as uint8 ``[channels, size, size]``: turned upright and cropped to a square about its middle."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(decode(file.read_bytes(), str(file)))
    picture = picture.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC))
    return pixels.reshape(size, size, channels).transpose(2, 0, 1)


def decoder() -> tuple[bytes, str]:
    """Returns the code of this file and Pillow's version. Decoded pixels depend on both, so cache keys hold them."""
    return Path(__file__).read_bytes(), require("PIL", "train").__version__
