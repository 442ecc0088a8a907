"""Plans how a meta-gradient goes through memory: how many tasks run at once and what is kept for the way back.

The peak is not estimated: the computation runs on tensors that have shapes and no memory, and their bytes are counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class MemoryPlan:
    """Says how a meta-gradient goes through memory.

    Attributes:
        chunk: the number of tasks that are computed at a time.
        keep: whether the activations of all inner steps are kept for the way back, which else computes them again.
        peak: the most bytes of memory in use at any time, beside the tasks and the parameters.
        steps: words on the steps that the way back takes again, or does not go through; empty where there are none.
    """

    chunk: int
    keep: bool
    peak: int
    steps: str = ""

    def chunks(self, tasks: int) -> Iterator[slice]:
        """Yields the ranges of tasks that are computed one after another."""
        for start in range(0, tasks, self.chunk):
            yield slice(start, min(tasks, start + self.chunk))

    def __str__(self) -> str:
        how = "activations kept" if self.keep else "activations computed again on the way back"
        how += f", {self.steps}" if self.steps else ""
        return f"{self.chunk} task{'s' * (self.chunk > 1)} at a time, {how}, peak {self.peak / 2**20:,.0f} MiB"


def choose_memory_plan(peak: Callable[[int, bool], int], tasks: int, budget: int, max_tasks: int) -> MemoryPlan:
    """Finds the plan with the fewest chunks that stays within ``budget`` bytes.

    Activations are kept where at least one task fits with them. Where no plan fits, one task is computed at a time and
    nothing is kept.

    Args:
        peak: ``peak(chunk, keep)`` returns the bytes of a plan.
        tasks: the number of tasks of a batch.
        budget: the bytes that a plan may take.
        max_tasks: the largest chunk.
    """
    for keep in (True, False):
        count = -(-tasks // max_tasks)
        while count <= tasks:
            chunk = -(-tasks // count)
            needed = peak(chunk, keep)
            if needed <= budget:
                return MemoryPlan(chunk, keep, needed)
            likely = -(-tasks * needed // (chunk * budget))
            count = count + 1 if count == tasks else min(max(count + 1, likely), tasks)
    return MemoryPlan(1, False, peak(1, False))


def peak_bytes(function: Callable[[], Any]) -> int:
    """Runs ``function`` and returns the most bytes that tensors made by it hold at any time, its results among them."""
    with _Meter() as meter:
        function()
    return meter.peak


class _Meter(TorchDispatchMode):
    """Counts the memory of every tensor that an operation makes, until nothing refers to it any more.

    Attributes:
        alive: the bytes of each storage that is in use, by its address.
        peak: the largest sum of these bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage(x)._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (key := _storage(x)._cdata) not in known and key not in self.alive:
                self.alive[key] = _storage(x).nbytes()
                weakref.finalize(_storage(x), self.alive.pop, key)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def _storage(x: Tensor) -> torch.UntypedStorage:
    """Returns the memory of ``x``, which its views share."""
    return x.untyped_storage()
