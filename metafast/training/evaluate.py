"""Judges a learner on tasks that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metafast.learners import Learner
from metafast.tasks import TaskBatch
from metafast.training.data import Episodes, fixed_list
from metafast.training.recipes import Recipe


def task_scores(outputs: Tensor, targets: Tensor, classification: bool) -> Tensor:
    """Scores each task, ``[T]``, by the share of right answers, or by the mean squared error."""
    if classification:
        return (outputs.argmax(-1) == targets).flatten(1).float().mean(1)
    return (outputs - targets).square().flatten(1).mean(1)


@torch.no_grad()
def scores(learner: Learner, tasks: Iterable[TaskBatch], settings: Mapping[str, Any], classification: bool) -> Tensor:
    """Returns the scores ``[number of tasks]``; ``settings`` are arguments of the learner's ``adapt``."""
    found = []
    for batch in tasks:
        fast = learner.adapt(batch.support_x, batch.support_y, **settings)
        found.append(task_scores(fast(batch.query_x), batch.query_y, classification))
    return torch.cat(found).double().cpu()


def interval(values: Tensor) -> tuple[float, float]:
    """Returns the mean over tasks and half the width of its 95% confidence interval, ``1.96 s / sqrt(n)``."""
    mean = float(values.mean())
    return mean, (1.96 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan)


def final_test(learner: Learner, recipe: Recipe, episodes: Episodes, tasks: int) -> list[dict[str, Any]]:
    """Runs the final test over the first ``tasks`` test tasks: a row for each shot and each of the learner's settings.

    A row names its settings: a learner that takes inner steps says how many.

    Raises:
        ValueError: fewer than two tasks, which have no confidence interval.
    """
    if tasks < 2:
        raise ValueError(f"the number of test tasks is {tasks}; a confidence interval needs at least 2")
    rows = []
    for shots in recipe.test_shots:
        for settings in learner.test_settings(recipe):
            found = scores(learner, fixed_list(episodes.test[shots], tasks), settings, recipe.classification)
            mean, half = interval(found)
            rows.append({"shots": shots, **settings, recipe.metric: mean, "ci95": half, "tasks": tasks})
    return rows


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the row that a run is known by: the first of the shots under the last of the settings."""
    return [row for row in rows if row["shots"] == rows[0]["shots"]][-1]
