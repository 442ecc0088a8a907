"""How classes are divided into a part to train on, one to choose by and one to report on."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from metafast.episodes.counter import Counter

PARTS = ("train", "validation", "test")
# A division as it is typed or given: shares or counts, files that list names, or the names themselves.
Split = str | Sequence[float] | Mapping[str, Sequence[str]]
FORMS = (
    "TRAIN/VALIDATION/TEST in percent or in classes, such as 64/16/20, or files of class names, one a line, "
    "train.txt,validation.txt,test.txt; the validation part may be left out of either"
)


def by_fractions(count: int, fractions: Sequence[float], seed: int) -> dict[str, list[int]]:
    """Divides the positions of ``count`` classes at random: their order is ``Counter(seed, "split").permutation``."""
    order = Counter(seed, "split").permutation(count)
    validation, test = (round(f * count) for f in fractions[1:])
    train = max(0, count - validation - test)
    cuts = (0, train, train + validation, count)
    return {name: sorted(order[cuts[i] : cuts[i + 1]]) for i, name in enumerate(PARTS)}


def divide(names: Sequence[str], split: Split, seed: int, where: Path) -> dict[str, list[str]]:
    """Divides class names by whatever says how. What lists do not name is left out.

    Args:
        names: of all classes; shares and counts are drawn from them in this order.
        split: see ``Split``; numbers are counts if they sum to the number of classes, else shares of 100 or of 1.
        seed: of the random order that shares and counts are drawn in; lists have no use for it.
        where: the folder of the classes, for errors.

    Returns:
        The names of each of ``PARTS``, sorted; only the validation part may be empty.

    Raises:
        ValueError: it cannot be understood, or a part has no class, or a name is unknown or named twice.
        FileNotFoundError: a list is not there.
    """
    if isinstance(split, Mapping):
        listed = {_part(name): [(f"the {name} list", each) for each in group] for name, group in split.items()}
        return _by_names(names, listed, where)
    if isinstance(split, str):
        if files := list_files(split):
            return _by_names(names, {part: read_list(file) for part, file in files.items()}, where)
        numbers = _numbers(split)
    else:
        try:
            numbers, split = [float(number) for number in split], "/".join(f"{number:g}" for number in split)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"split is {split!r}; it must be three numbers, names by part ({', '.join(PARTS)}), or a text: {FORMS}"
            ) from error
    parts = {part: [names[i] for i in found] for part, found in _by_numbers(len(names), numbers, split, seed).items()}
    wanted = dict(zip(PARTS, _three(numbers), strict=True))
    if empty := [part for part in PARTS if not parts[part] and (wanted[part] or part != "validation")]:
        raise ValueError(
            f"{where} has {len(names)} classes, of which split {split} makes "
            f"{', '.join(f'{len(group)} {part}' for part, group in parts.items())}: none for {empty[0]}; "
            "divide them in another way, or use more classes"
        )
    return parts


def list_files(split: str) -> dict[str, Path]:
    """Returns the list of each part if ``split`` names such files, else nothing."""
    if "," not in split:
        return {}
    files = [text.strip() for text in split.split(",")]
    if len(files) not in (2, 3) or "" in files or all(_is_number(text) for text in files):
        raise ValueError(f"split is {split!r}; it must be {FORMS}")
    return {part: Path(file) for part, file in zip(PARTS if len(files) == 3 else PARTS[::2], files, strict=True)}


def absolute(split: str) -> str:
    """Returns a division that means the same in any working folder: the paths of lists become absolute."""
    return ",".join(str(file.resolve()) for file in list_files(split).values()) or split


def identity(split: str) -> str:
    """Returns a text that differs where divisions do: for lists it is of the names in them, wherever they lie."""
    files = list_files(split)
    if not files:
        return split
    names = {part: sorted(name for _, name in read_list(file)) for part, file in files.items()}
    return f"lists {hashlib.sha256(repr(names).encode()).hexdigest()[:16]}"


def read_list(file: Path) -> list[tuple[str, str]]:
    """Reads a list of class names, one a line: each with the place where it stands.

    Byte-order marks, Windows line ends, blank lines, and blanks about a name do not count.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no list of class names at {file}")
    content = file.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error.reason} at byte {error.start}); save it so") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(f"{file}, line {number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def _by_names(
    names: Sequence[str], listed: Mapping[str, Sequence[tuple[str, str]]], where: Path
) -> dict[str, list[str]]:
    known = {_plain(name): name for name in names} | {name: name for name in names}
    placed: dict[str, str] = {}
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for part, group in listed.items():
        for place, written in group:
            name = known.get(written) or known.get(_plain(written))
            if name is None:
                raise ValueError(f"{place} names {written!r}, which is no class of {where}; it has {_some(names)}")
            if name in placed:
                raise ValueError(f"{place} names {name!r}, which {placed[name]} names already; name each class once")
            placed[name] = place
            parts[part].append(name)
    if empty := [part for part in PARTS if not parts[part] and (part in listed or part != "validation")]:
        raise ValueError(
            f"no list names a class of {where} for {empty[0]}; only validation can be left out, with its list"
        )
    return {part: sorted(group) for part, group in parts.items()}


def _by_numbers(count: int, numbers: Sequence[float], written: str, seed: int) -> dict[str, list[int]]:
    if len(numbers) not in (2, 3) or not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError(f"split is {written!r}; it must be {FORMS}")
    total = sum(numbers)
    if total == count and all(number == int(number) for number in numbers):
        whole: float = count
    elif abs(total - 100) < 1e-4 or abs(total - 1) < 1e-6:
        whole = total
    else:
        raise ValueError(
            f"split is {written}, which sums to {total:g}; shares must sum to 100 (or to 1), numbers of classes to "
            f"the {count} that there are"
        )
    return by_fractions(count, [number / whole for number in _three(numbers)], seed)


def _three(numbers: Sequence[float]) -> Sequence[float]:
    return numbers if len(numbers) == 3 else (numbers[0], 0.0, numbers[1])


def _numbers(split: str) -> list[float]:
    texts = split.split("/")
    if not all(_is_number(text) for text in texts):
        raise ValueError(f"split is {split!r}; it must be {FORMS}")
    return [float(text) for text in texts]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _part(name: str) -> str:
    part = "validation" if name in ("val", "valid") else name
    if part not in PARTS:
        raise ValueError(f"split has a part {name!r}; the parts are {', '.join(PARTS)}")
    return part


def _plain(name: str) -> str:
    """Writes a class's name as every system would: one may write ``a\\b`` for ``a/b``, or an accent as a sign."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./").strip("/")


def _some(names: Sequence[str]) -> str:
    more = "" if len(names) <= 3 else f" and {len(names) - 3} more"
    return ", ".join(repr(name) for name in names[:3]) + more
