"""Printed characters as few-shot classes: rendered from the fonts that come with matplotlib.

A class is a character, its instances are fonts and styles (sans, serif, mono, upright, oblique, bold, ...)
under a small random affine map and a random stroke weight. All randomness comes from numpy's Philox under
(seed, character), and the pixels from Pillow's own C code, so the same versions give the same bytes
everywhere.
"""

from __future__ import annotations

import hashlib
import unicodedata
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from metafast.episodes.cache import Arrays, cached
from metafast.episodes.dataset import ImageDataset, Splits
from metafast.episodes.source import Parts, Source
from metafast.extras import require

if TYPE_CHECKING:
    from PIL import Image, ImageFont

INSTANCES = 20
SIZE = 28
CANVAS = 3 * SIZE  # a glyph is drawn large, then averaged down
BOX = 2.3 * SIZE  # the longer side of a glyph on the canvas, before jitter
MINIMUM_FONTS = 8
SAME = 0.93  # two characters whose renderings without jitter have at least this cosine count as one

BASES = ("DejaVuSans", "DejaVuSerif")
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
# These have encodings of their own; only letters and digits are where Unicode has them.
TEX_FONTS = ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10")

# Box drawing, block elements, braille and private use are patterns, not characters; the mathematical
# alphabets are the Latin and Greek letters once more in other styles, and so would be second classes with the
# same images.
LEFT_OUT = ((0x2500, 0x259F), (0x2800, 0x28FF), (0xE000, 0xF8FF), (0x1D400, 0x1D7FF))


def load_glyphs(seed: int = 0) -> Splits:
    """Renders characters of many scripts, 28x28, 20 instances each, split 64:16:20 by character.

    Look-alikes (Latin A, Greek Alpha, Cyrillic A) are one class. They are rendered on the first call and
    then read from the user's cache folder. Turned by 90 degrees some characters become others (arrows, u and n): with
    rotations as new classes about one 5-way task in a thousand has two labels for one shape.

    Args:
        seed: of the jitter and of the split.

    Returns:
        Splits with images uint8 ``[classes, 20, 1, 28, 28]``, ink 255 on 0; a class is named by its
        character.

    Raises:
        ModuleNotFoundError: Pillow or matplotlib is missing; names the extra that brings them.
    """
    pillow = require("PIL", "train")
    folder = Path(require("matplotlib", "train").get_data_path()) / "fonts" / "ttf"
    digests = [hashlib.sha256(_file(folder, name).read_bytes()).hexdigest() for name in FONTS + TEX_FONTS]
    depends_on = (Path(__file__).read_bytes(), pillow.__version__, np.__version__, digests, seed)
    arrays = cached("glyphs", depends_on, lambda: _render_all(folder, seed))
    names = tuple(chr(c) for c in arrays["characters"].tolist())
    return ImageDataset(torch.from_numpy(arrays["images"]), names).split(seed=seed)


def _file(folder: Path, font: str) -> Path:
    return folder / f"{font}.ttf"


def _render_all(folder: Path, seed: int) -> Arrays:
    typefaces = [_Typeface(_file(folder, name)) for name in FONTS + TEX_FONTS]
    characters = _distinct(_candidates(typefaces), [t for t in typefaces if t.path.stem in BASES])
    images = np.zeros((len(characters), INSTANCES, 1, SIZE, SIZE), dtype=np.uint8)
    for position, character in enumerate(characters):
        images[position, :, 0] = _instances(character, typefaces, seed)
    return {"images": images, "characters": np.array(characters, dtype=np.int32)}


class _Typeface:
    """One font file: which characters it has, and a glyph of each cropped to its ink."""

    def __init__(self, path: Path) -> None:
        from matplotlib.ft2font import FT2Font

        self.path = path
        self.characters = frozenset(FT2Font(str(path)).get_charmap())
        if path.stem in TEX_FONTS:
            self.characters = frozenset(c for c in self.characters if c < 128 and chr(c).isalnum())
        self._sizes: dict[int, ImageFont.FreeTypeFont] = {}

    def _font(self, size: int) -> ImageFont.FreeTypeFont:
        from PIL import ImageFont

        if size not in self._sizes:
            self._sizes[size] = ImageFont.truetype(self.path, size, layout_engine=ImageFont.Layout.BASIC)
        return self._sizes[size]

    def glyph(self, character: int) -> Image.Image | None:
        """Draws the character in about BOX pixels, cropped. None if the font lacks it or leaves it blank."""
        if character not in self.characters:
            return None
        size = 64
        ink = self._draw(character, size)
        while ink is not None and max(ink.size) < BOX / 2 and size < 512:
            size *= 2  # a dot or an accent, which would blur if it were blown up
            ink = self._draw(character, size)
        return ink

    def _draw(self, character: int, size: int) -> Image.Image | None:
        from PIL import Image, ImageDraw

        left, top, right, bottom = self._font(size).getbbox(chr(character))
        page = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
        ImageDraw.Draw(page).text((1 - left, 1 - top), chr(character), fill=255, font=self._font(size))
        box = page.getbbox()
        return None if box is None else page.crop(box)


def _candidates(typefaces: list[_Typeface]) -> list[int]:
    """Lists the letters, numbers, symbols and punctuation that the base font and enough others have."""
    base = next(t for t in typefaces if t.path.stem == BASES[0])
    return [
        c
        for c in sorted(base.characters)
        if unicodedata.category(chr(c))[0] in "LNSP"
        and not any(low <= c <= high for low, high in LEFT_OUT)
        and sum(c in t.characters for t in typefaces) >= MINIMUM_FONTS
    ]


def _distinct(characters: list[int], bases: list[_Typeface]) -> list[int]:
    """Leaves out blank characters and those that look like an earlier one in any of the base fonts."""
    same = np.zeros((len(characters), len(characters)), dtype=bool)
    blank = np.zeros(len(characters), dtype=bool)
    for base in bases:
        glyphs = [base.glyph(c) for c in characters]
        blank |= [g is None and c in base.characters for g, c in zip(glyphs, characters, strict=True)]
        pixels = np.stack([np.zeros(SIZE * SIZE) if g is None else np.ravel(_place(g)) for g in glyphs])
        # Integers below 2^53 throughout: the comparison comes out the same whatever order BLAS sums in.
        products = pixels.astype(np.float64) @ pixels.T.astype(np.float64)
        norms = np.diag(products)
        same |= (products**2 >= SAME**2 * np.outer(norms, norms)) & (products > 0)
    kept: list[int] = []
    for i in np.flatnonzero(~blank).tolist():
        if not same[i, kept].any():
            kept.append(i)
    return [characters[i] for i in kept]


def _instances(character: int, typefaces: list[_Typeface], seed: int) -> np.ndarray:
    """Draws uint8 ``[20, 28, 28]``: the fonts that have the character take turns, in random order."""
    random = np.random.Generator(np.random.Philox(key=[seed % 2**64, character]))
    glyphs = [g for g in (t.glyph(character) for t in typefaces) if g is not None]
    order = np.argsort(random.random(len(glyphs)))
    jitter = random.random((INSTANCES, 7)) * 2 - 1
    return np.stack([_place(glyphs[order[i % len(glyphs)]], *jitter[i]) for i in range(INSTANCES)])


def _place(
    glyph: Image.Image,
    scale: float = 0,
    stretch: float = 0,
    shear: float = 0,
    turn: float = 0,
    right: float = 0,
    down: float = 0,
    weight: float = 0,
) -> np.ndarray:
    """Puts the glyph on 28x28, centred and scaled to BOX, then changed by jitter: each number in [-1, 1]."""
    from PIL import Image, ImageFilter

    width, height = glyph.size
    unit = max(width, height) / BOX * (1.08 + 0.16 * scale)
    a, b = unit * (1 + 0.12 * stretch), unit * (0.18 * turn + 0.15 * shear)
    d, e = unit * -0.18 * turn, unit * (1 - 0.12 * stretch)
    x, y = CANVAS / 2 + 5 * right, CANVAS / 2 + 5 * down
    map_to_glyph = (a, b, width / 2 - a * x - b * y, d, e, height / 2 - d * x - e * y)
    page = glyph.transform((CANVAS, CANVAS), Image.Transform.AFFINE, map_to_glyph, Image.Resampling.BILINEAR)
    inked = page.filter(ImageFilter.BoxBlur(2)).point(_contrast(round(75 - 35 * weight)))
    return np.asarray(inked.reduce(3))


@cache
def _contrast(threshold: int) -> list[int]:
    """Sharpens grey values around a threshold: on a blurred glyph a low one thickens the strokes."""
    return [min(max((v - threshold) * 4 + 128, 0), 255) for v in range(256)]


def _open(folder: None, split: str, device: str) -> Parts:
    return Parts.of_images(load_glyphs().with_rotations().to(device))


SOURCE = Source(name="glyphs", sample=(1, SIZE, SIZE), open=_open, makes="renders", ink_on_black=True)
