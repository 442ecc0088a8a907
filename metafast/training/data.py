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
    """The samplers of one run; ``classes`` has the number of classes of each part, where there are classes."""

    train: Sampler
    validation: Sampler | None
    test: Mapping[int, Sampler]
    classes: Mapping[str, int]


def fixed_list(sampler: Sampler, tasks: int) -> Iterator[TaskBatch]:
    """Yields the first ``tasks`` tasks of a sampler that draws ``TEST_BATCH`` at a time."""
    for start in range(0, tasks, TEST_BATCH):
        batch = sampler.batch(start // TEST_BATCH)
        yield batch if tasks - start >= TEST_BATCH else batch.tasks(slice(0, tasks - start))


def open_episodes(recipe: Recipe, path: Path | None, seed: int, device: str) -> Episodes:
    """Opens a recipe's data. Only the training stream depends on ``seed``: every run is judged on the same tasks.

    There is a sampler for validation where the data have classes for it, and where it is asked for.

    Raises:
        ValueError: the recipe needs a folder (``--data``) and none was given, or takes none, or it has too few
            classes or samples, or is divided in one way only and ``split`` names another.
        FileNotFoundError: nothing is there.
    """
    parts = _open(recipe, path, device)
    _check_classes(recipe, parts, path)

    def judging(make: MakeSampler, shots: int, stream: str) -> Sampler:
        return make(recipe.ways, shots, recipe.test_queries, TEST_BATCH, 0, stream)

    return Episodes(
        parts.train(recipe.ways, recipe.shots, recipe.queries, recipe.tasks, seed, "train"),
        None
        if parts.validation is None or not recipe.eval_every
        else judging(parts.validation, recipe.test_shots[0], "validation"),
        {shots: judging(parts.test, shots, "test") for shots in recipe.test_shots},
        parts.classes,
    )


def _open(recipe: Recipe, path: Path | None, device: str) -> Parts:
    source = sources.find(recipe.data)
    if source.folder is None and path is not None:
        raise ValueError(f"recipe {recipe.name} {source.makes} its own data; leave out --data {path}")
    if source.folder is not None and path is None:
        raise ValueError(f"recipe {recipe.name} needs --data: {source.folder}")
    if source.splits and recipe.split not in source.splits:
        raise ValueError(f"--split is {recipe.split!r}; it must be one of {', '.join(source.splits)}")
    if recipe.split and not source.splits and source.division is None:
        raise ValueError(
            f"recipe {recipe.name} {source.makes} its own data, in one way; leave out --split {recipe.split}"
        )
    return source.open(path, recipe.split, device)


def _check_classes(recipe: Recipe, parts: Parts, path: Path | None) -> None:
    """Checks that every part that tasks are drawn from has enough classes for them."""
    where = f"the data of {recipe.name}" if path is None else str(path)
    if recipe.validates and parts.validation is None:
        raise ValueError(
            f"{where} has no classes set aside for validation; give --eval-every 0, or set some aside "
            "(--split, or a folder val/)"
        )
    drawn = [part for part, count in parts.classes.items() if part != "validation" or recipe.validates]
    short = [part for part in drawn if parts.classes[part] < recipe.ways]
    if not short:
        return
    counts = ", ".join(f"{count} for {part}" for part, count in parts.classes.items())
    most = min(parts.classes[part] for part in drawn)
    remedies = [f"give --ways {most} or less"] if most >= 2 else []
    if sources.find(recipe.data).division is not None:
        remedies.append(_other_division(sum(parts.classes.values()), recipe.ways, len(drawn)))
    if short == ["validation"]:
        remedies.append("do without validation (--eval-every 0)")
    raise ValueError(
        f"a {recipe.ways}-way task needs {recipe.ways} classes, and {where} has {counts}, too few for "
        f"{' and '.join(short)}; {', or '.join(remedies)}"
    )


def _other_division(classes: int, ways: int, parts: int) -> str:
    if classes >= ways * parts:
        return "divide them otherwise (--split, or the folders train/, val/, test/)"
    if classes >= ways * 2:
        return "divide them without validation (--split TRAIN/TEST --eval-every 0)"
    return f"add classes, to {ways * parts} at least"
