"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake et al., Science 2015).

Read from the two official archives or from the folders packed in them; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from metafast.episodes.cache import Arrays, cached
from metafast.episodes.counter import Counter
from metafast.episodes.dataset import ImageDataset, Splits
from metafast.episodes.pictures import decode, decoder, listing
from metafast.episodes.source import Parts, Source

SIZE = 28
DRAWINGS = 20
BACKGROUND, EVALUATION = "images_background", "images_evaluation"
MAML_TRAINING = 1200  # characters that Finn et al. (ICML 2017) train on, after Santoro et al. (ICML 2016)
RELEASE = "the Omniglot release at https://github.com/brendenlake/omniglot (folder python)"


def load_omniglot(path: str | Path, split: str = "background", validation: int = 0, seed: int = 0) -> Splits:
    """Reads the characters as 28x28 images, 20 drawings each: 105x105 resized with Lanczos, ink 255 on 0.

    Instance i of a character is drawing i + 1. They are decoded on the first call, then read from the user's
    cache folder. Rotations as new classes: ``load_omniglot(path).with_rotations()``.

    Args:
        path: folder that holds ``images_background`` and ``images_evaluation``, each as a zip or extracted.
        split: "background": trains on the 964 characters of the background alphabets and tests on the 659 of
            the evaluation alphabets. "maml": of all characters in random order the first 1,200 are for
            training and the other 423 for the test, as in the MAML paper (whose own order was not published).
        validation: held out of the training part: so many random alphabets ("background") or characters
            ("maml"; the MAML code takes 100). 0: no validation part.
        seed: of the random choices above.

    Returns:
        Splits with images uint8 ``[classes, 20, 1, 28, 28]``; a class is named "alphabet/character".

    Raises:
        FileNotFoundError: nothing at the path, or no Omniglot there; says what was looked for.
        ValueError: an unknown split, too large a validation part, a broken archive or image (named), or a
            character without 20 drawings.
        ModuleNotFoundError: Pillow is missing; names the extra that brings it.
    """
    if split not in ("background", "maml"):
        raise ValueError(f"split is {split!r}; it must be 'background' or 'maml'")
    if validation < 0:
        raise ValueError(f"validation is {validation}; it must be 0 or more")
    halves = [_find(Path(path), half) for half in (BACKGROUND, EVALUATION)]
    depends_on = (Path(__file__).read_bytes(), decoder(), [_identity(half) for half in halves])
    arrays = cached("omniglot", depends_on, lambda: _decode_all(halves))
    characters = ImageDataset(torch.from_numpy(arrays["images"]), tuple(arrays["names"].tolist()))
    background = int(arrays["background"])
    if split == "background":
        return _by_alphabet(characters, background, validation, seed)
    return _at_random(characters, validation, seed)


def _by_alphabet(characters: ImageDataset, background: int, validation: int, seed: int) -> Splits:
    alphabet = [name.partition("/")[0] for name in characters.class_names[:background]]
    alphabets = sorted(set(alphabet))
    if validation >= len(alphabets):
        raise ValueError(f"validation is {validation} alphabets; the background has {len(alphabets)} in all")
    order = Counter(seed, "omniglot alphabets").permutation(len(alphabets))
    held_out = {alphabets[i] for i in order[:validation]}
    return Splits(
        characters.select([i for i in range(background) if alphabet[i] not in held_out]),
        characters.select([i for i in range(background) if alphabet[i] in held_out]) if held_out else None,
        characters.select(range(background, len(characters))),
    )


def _at_random(characters: ImageDataset, validation: int, seed: int) -> Splits:
    if len(characters) <= MAML_TRAINING:
        raise ValueError(
            f"split 'maml' trains on {MAML_TRAINING} characters, but only {len(characters)} are there; "
            f"get all of {RELEASE}"
        )
    if validation >= MAML_TRAINING:
        raise ValueError(f"validation is {validation} characters; the training part has {MAML_TRAINING} in all")
    order = Counter(seed, "omniglot characters").permutation(len(characters))
    train = MAML_TRAINING - validation
    return Splits(
        characters.select(sorted(order[:train])),
        characters.select(sorted(order[train:MAML_TRAINING])) if validation else None,
        characters.select(sorted(order[MAML_TRAINING:])),
    )


def _find(root: Path, half: str) -> Path:
    """Finds the archive or the folder of one half of the data."""
    if not root.exists():
        raise FileNotFoundError(
            f"{root} does not exist; pass the folder that holds {BACKGROUND}.zip and {EVALUATION}.zip"
        )
    for found in (root / f"{half}.zip", root / half):
        if found.exists():
            return found
    raise FileNotFoundError(
        f"{root} holds neither {half}.zip nor a folder {half}; pass the folder that holds {BACKGROUND} and "
        f"{EVALUATION} (zipped or extracted) from {RELEASE}"
    )


def _identity(half: Path) -> object:
    if half.is_dir():
        return str(half.resolve()), listing(half, sorted(half.glob("*/*/*.png")))
    return hashlib.sha256(half.read_bytes()).hexdigest()


def _decode_all(halves: list[Path]) -> Arrays:
    names: list[str] = []
    images: list[np.ndarray] = []
    sizes = []
    for half in halves:
        characters = _drawings(half)
        for name, drawings in sorted(characters.items()):
            if len(drawings) != DRAWINGS:
                raise ValueError(
                    f"{half} has {len(drawings)} drawings of {name}, not {DRAWINGS}; it is incomplete or not "
                    f"Omniglot: get it again from {RELEASE}"
                )
            names.append(name)
            images += [drawings[k] for k in sorted(drawings)]
        sizes.append(len(characters))
    stacked = np.stack(images).reshape(len(names), DRAWINGS, 1, SIZE, SIZE)
    return {"images": stacked, "names": np.array(names), "background": np.array(sizes[0])}


def _drawings(half: Path) -> dict[str, dict[str, np.ndarray]]:
    """Reads the drawings, uint8 ``[28, 28]``, by ``alphabet/character`` and then by file name."""
    characters: dict[str, dict[str, np.ndarray]] = {}
    for path, data in _files(half):
        alphabet, character, file = path.split("/")
        image = _shrink(data, f"{path} in {half}")
        characters.setdefault(f"{alphabet}/{character}", {})[file] = image
    if not characters:
        raise FileNotFoundError(
            f"{half} has no <alphabet>/<character>/<drawing>.png in it; get it again from {RELEASE}"
        )
    return characters


def _files(half: Path) -> Iterator[tuple[str, bytes]]:
    """Yields ``<alphabet>/<character>/<drawing>.png`` and the bytes of each drawing."""
    if half.is_dir():
        for file in sorted(half.glob("*/*/*.png")):
            yield file.relative_to(half).as_posix(), file.read_bytes()
        return
    pattern = re.compile(rf"{half.stem}/([^/]+/[^/]+/[^/]+\.png)")
    try:
        with zipfile.ZipFile(half) as archive:
            for member in archive.namelist():
                if match := pattern.fullmatch(member):
                    yield match[1], archive.read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{half} is a broken zip archive ({error}); get it again from {RELEASE}") from error


def _shrink(data: bytes, name: str) -> np.ndarray:
    from PIL import Image, ImageOps

    ink = ImageOps.invert(decode(data, name).convert("L"))
    return np.asarray(ink.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


# Recipes hold out so many training alphabets, or characters (as in the code of Finn et al. 2017), for validation.
HELD_OUT = {"background": 3, "maml": 100}


def _open(folder: Path, split: str, device: str) -> Parts:
    splits = load_omniglot(folder, split=split, validation=HELD_OUT[split])
    return Parts.of_images(splits.with_rotations().to(device))


SOURCE = Source(
    name="omniglot",
    sample=(1, SIZE, SIZE),
    open=_open,
    folder="the folder that holds images_background.zip and images_evaluation.zip",
    splits={"background": "background alphabets to evaluation alphabets", "maml": "maml (random)"},
    ink_on_black=True,
)
