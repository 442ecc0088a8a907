"""A user's own images: one folder a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from metafast.episodes.cache import Arrays, cached
from metafast.episodes.counter import check_positive
from metafast.episodes.dataset import ImageDataset, Splits
from metafast.episodes.pictures import SUFFIXES, decoder, folders_in, images_in, listing, read_fitted
from metafast.episodes.source import Parts, Source

VALIDATION_NAMES = ("validation", "valid", "val")


def load_folder(
    path: str | Path,
    size: int = 84,
    channels: int = 3,
    fractions: tuple[float, float, float] = (0.64, 0.16, 0.2),
    seed: int = 0,
) -> Splits:
    """Reads images of any size from one folder a class, cropped to a centred square and resized.

    The layout is either ``path/<class>/<image>``, whose classes are divided at random by ``fractions`` and
    ``seed``, or ``path/{train,val,test}/<class>/<image>`` (val, valid or validation, which may be missing).
    Files without an image suffix and hidden files are passed over. Classes may differ in size. The decoded
    images are kept in the user's cache folder until a file changes.

    Args:
        path: the folder.
        size: height and width of the images in pixels.
        channels: 1 for grayscale, 3 for RGB.
        fractions: train, validation and test part of the classes, summing to 1; of no effect with split
        folders.
        seed: of the division.

    Returns:
        Splits with images uint8 ``[classes, instances, channels, size, size]``.

    Raises:
        FileNotFoundError: nothing at the path, or no class folder in it.
        ValueError: a single class, a class with fewer than 2 images, a class in two splits, or an unreadable
            image; the text names it.
        ModuleNotFoundError: Pillow is missing; names the extra that brings it.
    """
    check_positive(size=size)
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; it must be 1 (grayscale) or 3 (RGB)")
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; pass the folder that holds one sub-folder of images a class")
    parts = _split_folders(root)
    if parts is None:
        return _read(root, size, channels).split(fractions, seed)
    _check_disjoint(parts)
    train, validation, test = parts
    return Splits(
        _read(train, size, channels),
        None if validation is None else _read(validation, size, channels),
        _read(test, size, channels),
    )


def _split_folders(root: Path) -> tuple[Path, Path | None, Path] | None:
    train, test = root / "train", root / "test"
    if not (folders_in(train) and folders_in(test)):
        return None
    validation = next((root / name for name in VALIDATION_NAMES if (root / name).is_dir()), None)
    return train, validation, test


def _check_disjoint(parts: tuple[Path | None, ...]) -> None:
    seen: dict[str, Path] = {}
    for part in parts:
        for folder in folders_in(part) if part else []:
            if folder.name in seen:
                raise ValueError(
                    f"class {folder.name!r} is both in {seen[folder.name]} and in {part}; few-shot splits "
                    "share no class: move it into one, or put all classes side by side to have them divided"
                )
            seen[folder.name] = folder.parent


def _read(root: Path, size: int, channels: int) -> ImageDataset:
    classes = {folder.name: images_in(folder) for folder in folders_in(root)}
    if not classes:
        raise FileNotFoundError(f"{root} has no sub-folders; it must hold one sub-folder of images a class")
    if len(classes) == 1:
        raise ValueError(f"{root} has a single class, {next(iter(classes))!r}; a task needs at least 2")
    for name, files in classes.items():
        if len(files) < 2:
            raise ValueError(
                f"class {name!r} in {root} has {len(files)} images; it needs at least 2, one for the support "
                f"and one for the query set (suffixes read: {', '.join(sorted(SUFFIXES))})"
            )
    found = listing(root, (f for group in classes.values() for f in group))
    depends_on = (Path(__file__).read_bytes(), decoder(), size, channels, str(root.resolve()), found)
    arrays = cached("folder", depends_on, lambda: _decode_all(classes, size, channels))
    counts = torch.tensor([len(group) for group in classes.values()])
    ragged = bool((counts != counts[0]).any())
    return ImageDataset(torch.from_numpy(arrays["images"]), tuple(classes), counts if ragged else None)


def _decode_all(classes: dict[str, list[Path]], size: int, channels: int) -> Arrays:
    most = max(len(files) for files in classes.values())
    images = np.zeros((len(classes), most, channels, size, size), dtype=np.uint8)
    for position, files in enumerate(classes.values()):
        for instance, file in enumerate(files):
            images[position, instance] = read_fitted(file, size, channels)
    return {"images": images}


def _open(folder: Path, split: str, device: str) -> Parts:
    channels, size, _ = SOURCE.sample
    return Parts.of_images(load_folder(folder, size=size, channels=channels).to(device))


SOURCE = Source(
    name="folder",
    sample=(3, 84, 84),
    open=_open,
    folder="a folder with one sub-folder of pictures a class",
)
