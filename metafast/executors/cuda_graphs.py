"""CUDA graphs: a computation of fixed shapes is launched as one, without the host between its kernels."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Results = tuple[Tensor, ...]
Result = TypeVar("Result")


class CudaGraph(Generic[Result]):
    """What ``function()`` launches on ``device``; it is not done now, but by each ``replay``.

    ``function`` may not read a tensor's value on the host, and must have run before: a graph can hold no
    compilation and no copy from the host. ``result`` is what it returned; each replay writes its tensors anew.
    """

    def __init__(self, function: Callable[[], Result], device: torch.device, pool: Any = None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(self._graph, pool=pool, stream=_stream(device)):
            self.result = function()

    def replay(self) -> None:
        """Launches it on the current stream."""
        self._graph.replay()


@functools.lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings of a device: those that share memory must share it."""
    return torch.cuda.Stream(device)


@dataclass
class _Kept:
    graph: CudaGraph[Results]
    inputs: list[Tensor]


class Graphs:
    """The graphs of the last ``limit`` computations. They share their memory: one runs at a time, and its results are
    copied out before the next.

    A computation runs as it is the first time, is recorded the second time, and replayed from then on. One that is
    itself being recorded, as part of something larger, runs as it is.
    """

    def __init__(self, limit: int = 8) -> None:
        self.limit = limit
        self.pool: Any = None
        self.kept: OrderedDict[Hashable, _Kept | None] = OrderedDict()

    def run(self, key: Hashable, function: Callable[..., Results], inputs: Sequence[Tensor]) -> Results:
        """``function(*inputs)`` on the current device, for which ``key`` stands with all its options.

        It may not read a tensor's value on the host, and its ``inputs`` are all that changes from call to call.
        """
        if torch.cuda.is_current_stream_capturing():
            return function(*inputs)
        key = (key, *((x.shape, x.dtype, x.device) for x in inputs))
        if key not in self.kept:
            self.kept[key] = None
            if len(self.kept) > self.limit:
                self.kept.popitem(last=False)
            return function(*inputs)
        self.kept.move_to_end(key)
        kept = self.kept[key] = self.kept[key] or self._record(function, inputs)
        for place, x in zip(kept.inputs, inputs, strict=True):
            place.copy_(x)
        kept.graph.replay()
        return tuple(result.clone() for result in kept.graph.result)

    def _record(self, function: Callable[..., Results], inputs: Sequence[Tensor]) -> _Kept:
        held = [x.detach().clone() for x in inputs]
        function(*held)  # compiles what is special to these addresses, which a graph must not
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        return _Kept(CudaGraph(lambda: function(*held), inputs[0].device, self.pool), held)
