"""From a recipe to its episodes: one sampler to train on, one to validate on, one a shot to test on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from metafast.episodes import (
    ClassificationSampler,
    ImageDataset,
    SinusoidSampler,
    Splits,
    load_folder,
    load_glyphs,
    load_omniglot,
)
from metafast.tasks import TaskBatch
from metafast.training.recipes import Recipe

# Tests and validations always draw in batches of this size, so their list of tasks depends on nothing else.
TEST_BATCH = 25
# Held out of the training classes for validation: alphabets, or characters (as in the code of Finn et al. 2017).
OMNIGLOT_VALIDATION = {"background": 3, "maml": 100}

# (C, H, W) of the pictures of each kind of data.
IMAGE = {"glyphs": (1, 28, 28), "omniglot": (1, 28, 28), "folder": (3, 84, 84)}


class Sampler(Protocol):
    """Episodes by counter: the same step gives the same tasks."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that the episodes depend on, as JSON values."""

    def batch(self, step: int | Tensor, rank: int = 0, world: int = 1) -> TaskBatch:
        """The tasks of an outer step, or of several in a row; a tensor ``step`` stays on its device."""


@dataclass(frozen=True)
class Episodes:
    """The samplers of one run."""

    train: Sampler
    validation: Sampler | None
    test: Mapping[int, Sampler]


def fixed_list(sampler: Sampler, tasks: int) -> Iterator[TaskBatch]:
    """The first ``tasks`` tasks of a sampler that draws ``TEST_BATCH`` at a time."""
    for start in range(0, tasks, TEST_BATCH):
        batch = sampler.batch(start // TEST_BATCH)
        yield batch if tasks - start >= TEST_BATCH else batch.tasks(slice(0, tasks - start))


def open_episodes(recipe: Recipe, path: Path | None, seed: int, device: str) -> Episodes:
    """Opens a recipe's data. Only the training stream depends on ``seed``: every run is judged on the same tasks.

    Raises:
        ValueError: the recipe needs a folder (``--data``) and none was given, or takes none, or it has too few
            classes or samples.
        FileNotFoundError: nothing is there.
    """
    if recipe.data == "sinusoid":
        if path is not None:
            raise ValueError(f"recipe {recipe.name} draws its own data; leave out --data {path}")

        def regression(shots: int, queries: int, tasks: int, seed: int, stream: str) -> Sampler:
            return SinusoidSampler(shots, queries, tasks, seed=seed, stream=stream, device=device)

        return Episodes(
            regression(recipe.shots, recipe.queries, recipe.tasks, seed, "train"),
            regression(recipe.shots, recipe.test_queries, TEST_BATCH, 0, "validation"),
            {k: regression(k, recipe.test_queries, TEST_BATCH, 0, "test") for k in recipe.test_shots},
        )
    splits = _open_images(recipe, path).to(device)

    def sampler(part: ImageDataset, shots: int, queries: int, tasks: int, seed: int, stream: str) -> Sampler:
        return ClassificationSampler(part, recipe.ways, shots, queries, tasks, seed=seed, stream=stream)

    held_out = splits.validation
    return Episodes(
        sampler(splits.train, recipe.shots, recipe.queries, recipe.tasks, seed, "train"),
        None
        if held_out is None
        else sampler(held_out, recipe.test_shots[0], recipe.test_queries, TEST_BATCH, 0, "validation"),
        {k: sampler(splits.test, k, recipe.test_queries, TEST_BATCH, 0, "test") for k in recipe.test_shots},
    )


def _open_images(recipe: Recipe, path: Path | None) -> Splits:
    if recipe.data == "glyphs":
        if path is not None:
            raise ValueError(f"recipe {recipe.name} renders its own data; leave out --data {path}")
        return load_glyphs().with_rotations()
    if path is None:
        hint = {
            "omniglot": "the folder that holds images_background.zip and images_evaluation.zip",
            "folder": "a folder with one sub-folder of pictures a class",
        }[recipe.data]
        raise ValueError(f"recipe {recipe.name} needs --data: {hint}")
    if recipe.data == "omniglot":
        if recipe.split not in OMNIGLOT_VALIDATION:
            raise ValueError(f"--split is {recipe.split!r}; it must be one of {', '.join(OMNIGLOT_VALIDATION)}")
        held_out = OMNIGLOT_VALIDATION[recipe.split]
        return load_omniglot(path, split=recipe.split, validation=held_out).with_rotations()
    channels, size, _ = IMAGE["folder"]
    return load_folder(path, size=size, channels=channels)
