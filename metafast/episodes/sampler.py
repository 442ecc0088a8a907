"""What a sampler of few-shot episodes is, and the one of classification: one gather from a data set on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from metafast.episodes.counter import Counter, check_positive, choose, local_tasks
from metafast.episodes.dataset import ImageDataset
from metafast.tasks import TaskBatch


class Sampler(ABC):
    """Draws episodes by counter: ``batch(step)`` is a function of ``(seed, stream, step, task)`` and has no state.

    Args:
        shots: support samples, of a class in classification, of a task in regression.
        queries: query samples, likewise.
        tasks: T, the tasks of the global batch.
        seed: any integer.
        stream: name of the stream, e.g. "train", "validation", "test"; streams are unrelated.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, shots: int, queries: int, tasks: int, seed: int, stream: str) -> None:
        check_positive(shots=shots, queries=queries, tasks=tasks)
        self.shots, self.queries, self.tasks = shots, queries, tasks
        self._counter = Counter(seed, stream)

    @property
    def seed(self) -> int:
        """The seed of the stream."""
        return self._counter.seed

    @property
    def stream(self) -> str:
        """The name of the stream."""
        return self._counter.stream

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that the episodes depend on, fit for JSON: samplers with equal settings draw the same tasks."""

    @abstractmethod
    def batch(self, step: int | Tensor, rank: int = 0, world: int = 1) -> TaskBatch:
        """Draws the tasks ``rank * T / world ... (rank + 1) * T / world`` of the global batch of a step.

        A tensor ``step`` stays on its device; if it is a row of steps, their tasks follow one another.

        Raises:
            ValueError: world does not divide T, or rank or step is out of range.
        """


class ClassificationSampler(Sampler):
    """Draws N-way K-shot episodes from an :class:`ImageDataset` (Vinyals et al., NeurIPS 2016).

    The sampler has no state: ``batch(step)`` is a function of ``(seed, stream, step, task)``, where ``task``
    is the index in the global batch of T tasks. So the episodes are the same for any number of processes and
    on any device, training resumes at any step at once, and a fixed list of evaluation episodes is
    ``batch(0), batch(1), ...`` of a sampler with a ``stream`` of its own.

    From the words of a task are drawn: draw ``w`` the class of label w (without replacement); draw
    ``ways + w * (shots + queries) + i`` the i-th sample of that class (without replacement), support samples
    first.

    Args:
        dataset: the images; batches come on its device.
        ways: classes in a task.
        shots: support samples a class.
        queries: query samples a class.
        tasks: T, the tasks of the global batch.
        seed: any integer.
        stream: name of the stream, e.g. "train", "validation", "test"; streams are unrelated.

    Raises:
        ValueError: a number below 1, more ways than classes, or a class with fewer than shots + queries
            instances (named with its count).
    """

    def __init__(
        self,
        dataset: ImageDataset,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        seed: int = 0,
        stream: str = "train",
    ) -> None:
        check_positive(ways=ways)
        super().__init__(shots, queries, tasks, seed, stream)
        if ways > len(dataset):
            raise ValueError(f"a {ways}-way task needs {ways} classes; the data set has {len(dataset)}")
        _check_instances(dataset, shots, queries)
        self.dataset, self.ways = dataset, ways
        self._labels = torch.arange(ways, device=dataset.device)

    @property
    def device(self) -> torch.device:
        """Where batches come out."""
        return self.dataset.device

    @property
    def settings(self) -> dict[str, Any]:
        numbers = {k: getattr(self, k) for k in ("ways", "shots", "queries", "tasks", "seed", "stream")}
        return {"kind": "classification", **numbers, "dataset": self.dataset.fingerprint}

    def batch(self, step: int | Tensor, rank: int = 0, world: int = 1) -> TaskBatch:
        """Draws the tasks of a step.

        Returns:
            ``support_x`` float32 ``[T / world, ways * shots, C, H, W]`` in [0, 1], ``support_y`` int64
            ``[T / world, ways * shots]`` in 0..ways-1, samples of a class side by side; the query set
            likewise.

        Raises:
            ValueError: world does not divide T, or rank or step is out of range.
        """
        tasks = local_tasks(self.tasks, step, rank, world)
        classes, instances = self._draw(step, tasks)
        raw = self.dataset.images[classes[..., None], instances]
        parts = []
        for part in (raw[:, :, : self.shots], raw[:, :, self.shots :]):
            labels = self._labels[:, None].expand(part.shape[:3]).flatten(1)
            parts += [part.float().mul_(1 / 255).flatten(1, 2), labels]
        return TaskBatch(*parts)

    def _draw(self, step: int | Tensor, tasks: range) -> tuple[Tensor, Tensor]:
        """Returns classes ``[T, ways]`` and their instances ``[T, ways, shots + queries]``, support first."""
        samples = self.shots + self.queries
        words = self._counter.words(step, tasks, self.ways * (1 + samples), self.device)
        classes = choose(words[:, : self.ways], len(self.dataset))
        counts = self.dataset.counts
        available = self.dataset.instances if counts is None else counts[classes][..., None]
        return classes, choose(words[:, self.ways :].unflatten(1, (self.ways, samples)), available)


def _check_instances(dataset: ImageDataset, shots: int, queries: int) -> None:
    if dataset.counts is None:
        smallest, name = dataset.instances, "each class"
    else:
        smallest, position = (int(v) for v in dataset.counts.min(dim=0))
        name = f"class {dataset.class_names[position]!r}"
    if smallest < shots + queries:
        raise ValueError(
            f"{name} has {smallest} instances, but {shots} shots and {queries} queries "
            f"take {shots + queries}; "
            "use fewer shots or queries, or leave the class out"
        )
