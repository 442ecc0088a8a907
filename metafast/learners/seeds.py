"""Draws the seeds from which the random numbers of a model follow."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from metafast.kernels.noise.counter import seeds_of
from metafast.program import Program
from metafast.tasks import TaskBatch


def drawn_seeds(program: Program, tasks: int, device: torch.device) -> Tensor | None:
    """Returns seeds ``[T, 2]`` for the support and the query sets, by one number of torch's default generator.

    Where ``program`` draws no random numbers it returns ``None``, and the generator stays as it is.
    """
    if not program.draws:
        return None
    base = int(torch.randint(-(1 << 63), (1 << 63) - 1, (), device="cpu"))
    return torch.stack([seeds_of(base, tasks, part, device) for part in (0, 1)], 1)


def with_seeds(program: Program, tasks: TaskBatch) -> TaskBatch:
    """Gives the tasks seeds, where ``program`` draws random numbers and they have none."""
    if not program.draws or tasks.seeds is not None:
        return tasks
    return replace(tasks, seeds=drawn_seeds(program, len(tasks), tasks.support_x.device))
