"""Data sets that live on one device: a uint8 tensor of images by class, and its division into splits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from metafast.episodes.division import by_fractions

ROTATIONS = (0, 90, 180, 270)


@dataclass(frozen=True)
class ImageDataset:
    """Holds images by class, all on one device.

    Args:
        images: uint8 ``[classes, instances, C, H, W]``.
        class_names: one name a class.
        counts: int64 ``[classes]``, how many instances of each class are real when classes differ in size
            (the rest is padding that no sampler draws); None when all are.

    Raises:
        TypeError, ValueError: a wrong dtype or shape; the text names it.
    """

    images: Tensor
    class_names: tuple[str, ...]
    counts: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.images, Tensor) or self.images.dtype != torch.uint8:
            found = self.images.dtype if isinstance(self.images, Tensor) else type(self.images).__name__
            raise TypeError(f"images is {found}; it must be a torch.uint8 tensor with values 0..255")
        if self.images.dim() != 5 or 0 in self.images.shape:
            raise ValueError(
                f"images has shape {tuple(self.images.shape)}; it must be [classes, instances, C, H, W], none empty"
            )
        if len(self.class_names) != len(self):
            raise ValueError(f"there are {len(self.class_names)} class names for {len(self)} classes")
        if self.counts is not None:
            if self.counts.dtype != torch.int64 or self.counts.shape != (len(self),):
                raise ValueError(
                    f"counts has dtype {self.counts.dtype} and shape {tuple(self.counts.shape)}; "
                    f"it must be torch.int64 of shape ({len(self)},)"
                )
            if not bool(((self.counts >= 1) & (self.counts <= self.instances)).all()):
                raise ValueError(f"counts must lie in 1..{self.instances}, the instances stored for a class")

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def instances(self) -> int:
        """Instances stored for each class, padding included."""
        return self.images.shape[1]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return tuple(self.images.shape[2:])

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of images, shape, class names and counts; the same on every device."""
        counts = None if self.counts is None else self.counts.tolist()
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.class_names, counts)).encode())
        digest.update(self.images.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> ImageDataset:
        """Returns the same data on another device."""
        counts = None if self.counts is None else self.counts.to(device)
        return replace(self, images=self.images.to(device), counts=counts)

    def select(self, classes: Sequence[int]) -> ImageDataset:
        """Returns the classes at the given positions, in that order.

        Raises:
            IndexError: a position is outside the data set.
        """
        for position in classes:
            if not 0 <= position < len(self):
                raise IndexError(f"class {position} is outside 0..{len(self) - 1}")
        chosen = torch.as_tensor(classes, dtype=torch.int64, device=self.device)
        return ImageDataset(
            self.images[chosen],
            tuple(self.class_names[i] for i in classes),
            None if self.counts is None else self.counts[chosen],
        )

    def split(self, fractions: tuple[float, float, float] = (0.64, 0.16, 0.2), seed: int = 0) -> Splits:
        """Divides the classes at random into train, validation and test.

        The order is ``Counter(seed, "split").permutation``. A validation fraction of 0 gives
        ``validation=None``.

        Raises:
            ValueError: the fractions do not sum to 1, or a part that should have classes would get none.
        """
        if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
            raise ValueError(f"fractions is {fractions}; it must be (train, validation, test), summing to 1")
        parts = by_fractions(len(self), fractions, seed)
        for (name, part), fraction in zip(parts.items(), fractions, strict=True):
            if not part and (fraction > 0 or name != "validation"):
                raise ValueError(
                    f"fractions {fractions} of {len(self)} classes leave the {name} split without a class; "
                    "use more classes or other fractions"
                )
        return Splits(
            self.select(parts["train"]),
            self.select(parts["validation"]) if parts["validation"] else None,
            self.select(parts["test"]),
        )

    def with_rotations(self) -> ImageDataset:
        """Makes four classes of each: turned by 0, 90, 180 and 270 degrees (Santoro et al., ICML 2016).

        Class ``k * classes + i`` is class ``i`` turned counter-clockwise by ``90 k`` degrees.

        Raises:
            ValueError: the images are not square.
        """
        if self.images.shape[-1] != self.images.shape[-2]:
            raise ValueError(
                f"images of {self.images.shape[-2]}x{self.images.shape[-1]} cannot be turned by 90 degrees; "
                "they must be square"
            )
        return ImageDataset(
            torch.cat([self.images.rot90(k, (-2, -1)) for k in range(len(ROTATIONS))]),
            tuple(f"{name} {turn}°" if turn else name for turn in ROTATIONS for name in self.class_names),
            None if self.counts is None else self.counts.repeat(len(ROTATIONS)),
        )


@dataclass(frozen=True)
class Splits:
    """Three data sets: one to train on, one to choose by and one to report on. No class is in two of them."""

    train: ImageDataset
    validation: ImageDataset | None
    test: ImageDataset

    def to(self, device: torch.device | str) -> Splits:
        """Returns the same data sets on another device."""
        validation = None if self.validation is None else self.validation.to(device)
        return Splits(self.train.to(device), validation, self.test.to(device))

    def with_rotations(self, test: bool = False) -> Splits:
        """Adds rotations as new classes for training; with ``test`` also for validation and test."""
        if not test:
            return replace(self, train=self.train.with_rotations())
        validation = None if self.validation is None else self.validation.with_rotations()
        return Splits(self.train.with_rotations(), validation, self.test.with_rotations())
