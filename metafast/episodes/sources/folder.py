"""A user's own images: a folder a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from metafast.episodes.cache import Arrays, cached
from metafast.episodes.counter import check_positive
from metafast.episodes.dataset import ImageDataset, Splits
from metafast.episodes.division import FORMS, PARTS, Split, divide
from metafast.episodes.pictures import SUFFIXES, decoder, folders_in, images_in, listing, read_fitted
from metafast.episodes.source import Parts, Source

VALIDATION_NAMES = ("validation", "valid", "val")
DEFAULT_SPLIT = "64/16/20"


def load_folder(
    path: str | Path,
    size: int = 84,
    channels: int = 3,
    split: Split | None = None,
    seed: int = 0,
) -> Splits:
    """Reads images of any size, cropped to a centred square and resized. A class is a folder that directly holds some.

    Its name is its path below ``path``, so folders may be nested: ``Greek/alpha``. Classes may differ in size. Pictures
    that lie at the top, files without an image suffix and hidden files are passed over. The decoded images are kept in
    the user's cache folder until a file changes, or another division takes other classes.

    Args:
        path: the folder. If it holds folders train and test, and perhaps val (or valid, validation), each with class
            folders in it, then these are the parts.
        size: height and width of the images in pixels.
        channels: 1 for grayscale, 3 for RGB.
        split: how the classes are divided where no folders do it. Three numbers, or two for no validation part, are
            shares that sum to 100 or 1, or numbers of classes that sum to all; 64/16/20 unless given. Names are given
            as ``{"train": [...], "validation": [...], "test": [...]}``; classes without mention are left out. A text
            is what ``--split`` takes: ``"64/16/20"``, or the files of such names, ``"train.txt,val.txt,test.txt"``.
        seed: of the random order of the sorted names in which shares and numbers take classes; the command line
            leaves it at 0. So a folder is divided the same way each time.

    Returns:
        Splits with images uint8 ``[classes, instances, channels, size, size]``, the classes of each sorted by name.

    Raises:
        FileNotFoundError: nothing at the path, or no class folder in it, or no such list.
        ValueError: a single class, a class with fewer than 2 images, a class in two splits, an unreadable image, or a
            division that does not fit; the text names it.
        ModuleNotFoundError: Pillow is missing; names the extra that brings it.
    """
    check_positive(size=size)
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; it must be 1 (grayscale) or 3 (RGB)")
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; pass the folder that holds one sub-folder of images a class")
    folders = _split_folders(root)
    if folders is None:
        return _divided(root, _classes_in(root), DEFAULT_SPLIT if split is None else split, seed, size, channels)
    if split is not None:
        names = ", ".join(f"{folder.name}/" for folder in folders.values())
        raise ValueError(
            f"split {split!r} has no use: {root} is divided already, by its folders {names}; leave it out, or put all "
            "classes side by side"
        )
    classes = {part: _classes_in(folder) for part, folder in folders.items()}
    _check_disjoint(folders, classes)
    read = {part: _read(folder, classes[part], size, channels) for part, folder in folders.items()}
    return Splits(read["train"], read.get("validation"), read["test"])


def _split_folders(root: Path) -> dict[str, Path] | None:
    """Returns the folders of the parts; ``None`` if the folder is not divided, but holds the classes side by side."""
    found: dict[str, list[Path]] = {}
    for folder in folders_in(root):
        name = folder.name.lower()
        part = "validation" if name in VALIDATION_NAMES else name
        if part in PARTS:
            found.setdefault(part, []).append(folder)
    # A class may be called train: it holds pictures, and no folders.
    if not any(folders_in(folder) and not images_in(folder) for group in found.values() for folder in group):
        return None
    for part, group in found.items():
        if len(group) > 1:
            raise ValueError(f"{root} has {group[0].name}/ and {group[1].name}/, both for {part}; make one of them")
    if missing := [part for part in PARTS[::2] if part not in found]:
        there = [group[0] for group in found.values()]
        raise ValueError(
            f"{root} has {', '.join(f'{folder.name}/' for folder in there)} but no {missing[0]}/; add it, or pass "
            f"{there[0]} alone to have its classes divided"
        )
    return {part: found[part][0] for part in PARTS if part in found}


def _check_disjoint(folders: dict[str, Path], classes: dict[str, dict[str, list[Path]]]) -> None:
    seen: dict[str, Path] = {}
    for part, folder in folders.items():
        for name in classes[part]:
            if name in seen:
                raise ValueError(
                    f"class {name!r} is both in {seen[name]} and in {folder}; few-shot splits "
                    "share no class: move it into one, or put all classes side by side to have them divided"
                )
            seen[name] = folder


def _classes_in(root: Path) -> dict[str, list[Path]]:
    """Returns the pictures of each class, by its path below ``root``.

    A folder without pictures in it or below it, which no class holds, is returned too: it was meant to be a class.
    """
    classes: dict[str, list[Path]] = {}

    def visit(folder: Path, above: tuple[Path, ...], in_class: bool) -> None:
        real = folder.resolve()
        if real in above:
            raise ValueError(f"{folder} leads back to {real}, which it lies in; take that link away")
        files = images_in(folder) if above else []
        below = folders_in(folder)
        if files or (above and not below and not in_class):
            classes[folder.relative_to(root).as_posix()] = files
        for found in below:
            visit(found, (*above, real), in_class or bool(files))

    visit(root, (), False)
    return {name: classes[name] for name in sorted(classes)}


def _divided(root: Path, classes: dict[str, list[Path]], split: Split, seed: int, size: int, channels: int) -> Splits:
    _check_classes(root, classes)
    parts = divide(tuple(classes), split, seed, root)
    chosen = sorted(name for group in parts.values() for name in group)
    data = _read(root, {name: classes[name] for name in chosen}, size, channels)
    place = {name: position for position, name in enumerate(chosen)}
    read = {part: data.select([place[name] for name in group]) for part, group in parts.items() if group}
    return Splits(read["train"], read.get("validation"), read["test"])


def _check_classes(root: Path, classes: dict[str, list[Path]]) -> None:
    if not classes:
        loose = images_in(root)
        but = f" but {len(loose)} images" if loose else ""
        raise FileNotFoundError(f"{root} has no sub-folders{but}; it must hold one sub-folder of images a class")
    if len(classes) == 1:
        raise ValueError(f"{root} has a single class, {next(iter(classes))!r}; a task needs at least 2")


def _read(root: Path, classes: dict[str, list[Path]], size: int, channels: int) -> ImageDataset:
    _check_classes(root, classes)
    for name, files in classes.items():
        if len(files) < 2:
            raise ValueError(
                f"class {name!r} in {root} has {len(files)} images; it needs at least 2, one for the support "
                f"and one for the query set (suffixes read: {', '.join(sorted(SUFFIXES))})"
            )
    # The division decides which classes are here, so it is in the key by the files of these.
    found = listing(root, (f for group in classes.values() for f in group))
    depends_on = (Path(__file__).read_bytes(), decoder(), size, channels, str(root.resolve()), tuple(classes), found)
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
    return Parts.of_images(load_folder(folder, size=size, channels=channels, split=split or None).to(device))


SOURCE = Source(
    name="folder",
    sample=(3, 84, 84),
    open=_open,
    folder="a folder with one sub-folder of pictures a class",
    division=FORMS,
)
