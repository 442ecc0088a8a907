"""What a data set is to all that use one: a record, with which the data set's own file ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from metafast.episodes.dataset import Splits
from metafast.episodes.sampler import ClassificationSampler, Sampler


class MakeSampler(Protocol):
    """Makes the sampler of one part of a data set; where tasks have no classes, ``ways`` is 0 and has no effect."""

    def __call__(self, ways: int, shots: int, queries: int, tasks: int, seed: int, stream: str) -> Sampler:
        """The arguments are those of :class:`ClassificationSampler`."""


@dataclass(frozen=True)
class Parts:
    """An opened data set: a part to train on, one to choose by (``None``: there is none) and one to report on.

    ``classes`` has the number of classes of each part by its name, where there are classes.
    """

    train: MakeSampler
    validation: MakeSampler | None
    test: MakeSampler
    classes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_images(cls, splits: Splits) -> Parts:
        """Makes parts whose tasks are N-way K-shot, drawn from images on the device where those are."""
        held_out = splits.validation
        return cls(
            partial(ClassificationSampler, splits.train),
            None if held_out is None else partial(ClassificationSampler, held_out),
            partial(ClassificationSampler, splits.test),
            {name: 0 if part is None else len(part) for name, part in vars(splits).items()},
        )


@dataclass(frozen=True)
class Source:
    """A data set: what recipes call it, what its samples are, and how it is opened.

    Args:
        name: the name in recipes and errors.
        sample: the shape of one sample, (C, H, W) of a picture or (1,) of a point.
        open: ``(folder, split, device) -> Parts``. ``folder`` is a ``Path`` if the data set needs one, else ``None``;
            ``split`` is one of ``splits`` if there are any, else what ``division`` says or empty.
        folder: what the folder holds that ``--data`` names, in words for an error; ``None``: the data set makes its
            own data and takes no folder.
        makes: the verb for how it makes its own data.
        splits: ways to divide its classes, each with the words of the help for it; empty: there is only one.
        division: what a user may write to divide the classes in a way of their own, in words for help and errors.
        ink_on_black: the pictures are bright ink on a black ground, so a user's dark ink on paper is inverted.
        curve: the interval of x over which a task is drawn, for regression whose samplers have a ``truth``.
    """

    name: str
    sample: tuple[int, ...]
    open: Callable[[Any, str, str], Parts]
    folder: str | None = None
    makes: str = "draws"
    splits: Mapping[str, str] = field(default_factory=dict)
    division: str | None = None
    ink_on_black: bool = False
    curve: tuple[float, float] | None = None
