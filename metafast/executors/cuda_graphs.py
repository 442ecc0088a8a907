"""Records computations of fixed shapes as CUDA graphs, which the host launches at once instead of kernel by kernel."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Results = tuple[Tensor, ...]
"""The tensors that a computation returns."""
Result = TypeVar("Result")


class CudaGraph(Generic[Result]):
    """Records what ``function()`` launches on ``device``, without running it; each ``replay`` runs it.

    ``function`` must not read a tensor's value on the host. It must have run before, because a graph can hold neither
    the compilation of a kernel nor a copy from the host.

    Attributes:
        result: what ``function`` returned; each replay writes its tensors anew.
    """

    def __init__(self, function: Callable[[], Result], device: torch.device, pool: Any = None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(self._graph, pool=pool, stream=_stream(device)):
            self.result = function()

    def replay(self) -> None:
        """Launches the graph on the current stream."""
        self._graph.replay()


@functools.lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the one stream on which all graphs of a device are recorded, as graphs that share memory must be."""
    return torch.cuda.Stream(device)


@dataclass
class _Kept:
    """Holds a graph and the tensors that it reads; their values are replaced before each replay."""

    graph: CudaGraph[Results]
    inputs: list[Tensor]


class Graphs:
    """Keeps the graphs of the last ``limit`` computations.

    A computation runs without a graph the first time, is recorded the second time, and is replayed from then on. While
    a larger graph is being recorded, computations become a part of that one. The graphs share their memory, so that one
    runs at a time, and its results are copied before the next.
    """

    def __init__(self, limit: int = 8) -> None:
        self.limit = limit
        self.pool: Any = None
        self.kept: OrderedDict[Hashable, _Kept | None] = OrderedDict()

    def run(self, key: Hashable, function: Callable[..., Results], inputs: Sequence[Tensor]) -> Results:
        """Returns what ``function(*inputs)`` returns on the current device.

        Args:
            key: tells computations apart, with all that decides them but the inputs.
            function: reads no tensor's value on the host, and nothing that changes between calls but ``inputs``.
            inputs: the tensors that a call reads.
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
        """Records the computation on copies of its inputs, which stay at their addresses."""
        held = [x.detach().clone() for x in inputs]
        function(*held)  # kernels that are compiled for these addresses are compiled now: a graph cannot hold that
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        return _Kept(CudaGraph(lambda: function(*held), inputs[0].device, self.pool), held)
