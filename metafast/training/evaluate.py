"""Judging a learner on tasks that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from metafast.learners import Learner
from metafast.tasks import TaskBatch
from metafast.training.data import Episodes, fixed_list
from metafast.training.recipes import Recipe


def task_scores(outputs: Tensor, targets: Tensor, classification: bool) -> Tensor:
    """One score a task, ``[T]``: the share of right answers, or the mean squared error."""
    if classification:
        return (outputs.argmax(-1) == targets).flatten(1).float().mean(1)
    return (outputs - targets).square().flatten(1).mean(1)


def scores(learner: Learner, tasks: Iterable[TaskBatch], steps: int, classification: bool) -> Tensor:
    """Scores ``[number of tasks]`` after adapting to each support set by ``steps`` inner steps (0: not at all)."""
    found = []
    for batch in tasks:
        fast = learner.adapt(batch.support_x, batch.support_y, steps=steps)
        found.append(task_scores(fast(batch.query_x), batch.query_y, classification))
    return torch.cat(found).double().cpu()


def interval(values: Tensor) -> tuple[float, float]:
    """The mean over tasks and half the width of its 95% confidence interval, ``1.96 s / sqrt(n)``."""
    mean = float(values.mean())
    return mean, (1.96 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan)


def final_test(learner: Learner, recipe: Recipe, episodes: Episodes, tasks: int) -> list[dict[str, Any]]:
    """The final test: one row for each shot and number of inner steps, over the first ``tasks`` test tasks.

    Raises:
        ValueError: fewer than two tasks, which have no confidence interval.
    """
    if tasks < 2:
        raise ValueError(f"the number of test tasks is {tasks}; a confidence interval needs at least 2")
    rows = []
    for shots in recipe.test_shots:
        for steps in recipe.test_steps:
            found = scores(learner, fixed_list(episodes.test[shots], tasks), steps, recipe.classification)
            mean, half = interval(found)
            rows.append({"shots": shots, "steps": steps, recipe.metric: mean, "ci95": half, "tasks": tasks})
    return rows


def headline(recipe: Recipe, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row that a run is known by: the first of the shots with the last of the steps."""
    wanted = (recipe.test_shots[0], recipe.test_steps[-1])
    return next(row for row in rows if (row["shots"], row["steps"]) == wanted)
