"""Draws the seeds from which the random numbers of a model follow."""

from __future__ import annotations

import torch
from torch import Tensor

from metafast.kernels.noise.counter import seeds_of
from metafast.program import Program


def drawn_seeds(program: Program, tasks: int, device: torch.device) -> Tensor | None:
    """Returns seeds ``[T, 2]`` for the support and the query sets, by one number of torch's default generator.

    Where ``program`` draws no random numbers it returns ``None``, and the generator stays as it is.
    """
    if not program.draws:
        return None
    base = int(torch.randint(-(1 << 63), (1 << 63) - 1, (), device="cpu"))
    return torch.stack([seeds_of(base, tasks, part, device) for part in (0, 1)], 1)
