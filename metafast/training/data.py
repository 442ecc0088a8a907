"""From a recipe to its episodes: one sampler to train on, one to validate on, one a shot to test on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from metafast.episodes import Sampler, sources
from metafast.episodes.source import MakeSampler, Parts
from metafast.tasks import TaskBatch
from metafast.training.recipes import Recipe

# Tests and validations always draw in batches of this size, so their list of tasks depends on nothing else.
TEST_BATCH = 25


@dataclass(frozen=True)
class Episodes:
    """The samplers of one run."""

    train: Sampler
    validation: Sampler | None
    test: Mapping[int, Sampler]


def fixed_list(sampler: Sampler, tasks: int) -> Iterator[TaskBatch]:
    """Yields the first ``tasks`` tasks of a sampler that draws ``TEST_BATCH`` at a time."""
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
    parts = _open(recipe, path, device)

    def judging(make: MakeSampler, shots: int, stream: str) -> Sampler:
        return make(recipe.ways, shots, recipe.test_queries, TEST_BATCH, 0, stream)

    return Episodes(
        parts.train(recipe.ways, recipe.shots, recipe.queries, recipe.tasks, seed, "train"),
        None if parts.validation is None else judging(parts.validation, recipe.test_shots[0], "validation"),
        {shots: judging(parts.test, shots, "test") for shots in recipe.test_shots},
    )


def _open(recipe: Recipe, path: Path | None, device: str) -> Parts:
    source = sources.find(recipe.data)
    if source.folder is None and path is not None:
        raise ValueError(f"recipe {recipe.name} {source.makes} its own data; leave out --data {path}")
    if source.folder is not None and path is None:
        raise ValueError(f"recipe {recipe.name} needs --data: {source.folder}")
    if source.splits and recipe.split not in source.splits:
        raise ValueError(f"--split is {recipe.split!r}; it must be one of {', '.join(source.splits)}")
    return source.open(path, recipe.split, device)
