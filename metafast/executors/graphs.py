"""CUDA graphs: a computation of fixed shapes is launched as one, without the host between its kernels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Results = tuple[Tensor, ...]


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    results: Results


class Graphs:
    """The graphs of the last ``limit`` computations. They share their memory: one runs at a time, and its results are
    copied out before the next.

    A computation runs as it is the first time, is recorded the second time, and replayed from then on.
    """

    def __init__(self, limit: int = 8) -> None:
        self.limit = limit
        self.pool: Any = None
        self.recorded: OrderedDict[Hashable, _Recorded | None] = OrderedDict()

    def run(self, key: Hashable, function: Callable[..., Results], inputs: Sequence[Tensor]) -> Results:
        """``function(*inputs)``, for which ``key`` stands with all its options.

        It may not read a tensor's value on the host, and its ``inputs`` are all that changes from call to call.
        """
        key = (key, *((x.shape, x.dtype, x.device) for x in inputs))
        if key not in self.recorded:
            self.recorded[key] = None
            if len(self.recorded) > self.limit:
                self.recorded.popitem(last=False)
            return function(*inputs)
        self.recorded.move_to_end(key)
        recorded = self.recorded[key] or self._record(function, inputs)
        self.recorded[key] = recorded
        for place, x in zip(recorded.inputs, inputs, strict=True):
            place.copy_(x)
        recorded.graph.replay()
        return tuple(result.clone() for result in recorded.results)

    def _record(self, function: Callable[..., Results], inputs: Sequence[Tensor]) -> _Recorded:
        held = [x.detach().clone() for x in inputs]
        function(*held)  # compiles what is special to these addresses, which a recording must not
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool):
            results = function(*held)
        return _Recorded(graph, held, results)
