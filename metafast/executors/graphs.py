"""CUDA graphs: a computation of fixed shapes is launched as one, without the host between its kernels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Results = tuple[Tensor, ...]


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    results: Results


class Graphs:
    """The graphs of the last ``limit`` computations; each keeps its own memory.

    A computation runs as it is the first time, which compiles its kernels, is recorded the second time, and replayed
    from then on.
    """

    def __init__(self, limit: int = 8) -> None:
        self.limit = limit
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

    @staticmethod
    def _record(function: Callable[..., Results], inputs: Sequence[Tensor]) -> _Recorded:
        held = [x.detach().clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function(*held)
        return _Recorded(graph, held, results)
