"""Sinusoid regression (Finn et al., ICML 2017, section 5.1): every task is a wave y = A sin(x - phase)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafast.episodes.counter import local_tasks, uniform
from metafast.episodes.sampler import Sampler
from metafast.episodes.source import Parts, Source
from metafast.tasks import TaskBatch

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, math.pi)
INPUT = (-5.0, 5.0)


@dataclass(frozen=True)
class Sinusoids:
    """The waves ``y = A sin(x - phase)`` of T tasks; ``amplitude``, ``phase`` are float64 ``[T, 1, 1]``."""

    amplitude: Tensor
    phase: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the true y at ``x [T, n, 1]`` (or anything that broadcasts), in the dtype of ``x``.

        It is evaluated in float64 and rounded once, so that a device's own sine hardly ever shows in float32.
        """
        return (self.amplitude * torch.sin(x.double() - self.phase)).to(x.dtype)


class SinusoidSampler(Sampler):
    """Draws K-shot regression on sinusoids: A uniform in [0.1, 5], phase in [0, pi], x in [-5, 5], as in the paper.

    Stateless like :class:`~metafast.episodes.ClassificationSampler`: a batch is a function of (seed, stream,
    step, task). From the words of a task are drawn: draw 0 the amplitude, draw 1 the phase, draw ``2 + i``
    the input of sample i, support samples first.

    Args:
        shots: support points a task.
        queries: query points a task.
        tasks: T, the tasks of the global batch.
        seed: any integer.
        stream: name of the stream, e.g. "train" or "test"; streams are unrelated.
        device: where batches come out.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(
        self,
        shots: int,
        queries: int,
        tasks: int,
        seed: int = 0,
        stream: str = "train",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(shots, queries, tasks, seed, stream)
        self.device = torch.device(device)

    @property
    def settings(self) -> dict[str, Any]:
        numbers = {k: getattr(self, k) for k in ("shots", "queries", "tasks", "seed", "stream")}
        return {"kind": "sinusoid", **numbers}

    def batch(self, step: int | Tensor, rank: int = 0, world: int = 1) -> TaskBatch:
        """Draws the tasks of a step.

        Returns:
            ``support_x``, ``support_y`` float32 ``[T / world, shots, 1]``; ``query_x``, ``query_y`` likewise.

        Raises:
            ValueError: world does not divide T, or rank or step is out of range.
        """
        words = self._words(step, rank, world)
        x = _between(INPUT, words[:, 2:])[..., None].float()
        y = _waves(words)(x)
        return TaskBatch(x[:, : self.shots], y[:, : self.shots], x[:, self.shots :], y[:, self.shots :])

    def truth(self, step: int | Tensor, rank: int = 0, world: int = 1) -> Sinusoids:
        """Returns the waves behind ``batch(step, rank, world)``, e.g. to draw them."""
        return _waves(self._words(step, rank, world))

    def _words(self, step: int | Tensor, rank: int, world: int) -> Tensor:
        tasks = local_tasks(self.tasks, step, rank, world)
        return self._counter.words(step, tasks, 2 + self.shots + self.queries, self.device)


def _waves(words: Tensor) -> Sinusoids:
    return Sinusoids(_between(AMPLITUDE, words[:, 0, None, None]), _between(PHASE, words[:, 1, None, None]))


def _between(limits: tuple[float, float], words: Tensor) -> Tensor:
    low, high = limits
    return uniform(words) * (high - low) + low


def _open(folder: None, split: str, device: str) -> Parts:
    def make(ways: int, shots: int, queries: int, tasks: int, seed: int, stream: str) -> SinusoidSampler:
        return SinusoidSampler(shots, queries, tasks, seed, stream, device)

    return Parts(make, make, make)


SOURCE = Source(name="sinusoid", sample=(1,), open=_open, curve=INPUT)
