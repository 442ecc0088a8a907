"""Times of a call: from the host, as replays of a CUDA graph, and on the GPU alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from metafast.executors.cuda_graphs import CudaGraph

_FEWEST, _REPLAYS = 5, 20


def host_ms(call: Callable[[], object], device: str, seconds: float) -> float:
    """Median milliseconds from the call to its result, over calls for so long, at least five; one before them is not
    counted. ``seconds=0``: of one call."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    if seconds:
        call()
        wait()
    times: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times) < (_FEWEST if seconds else 1):
        start = time.perf_counter()
        call()
        wait()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def graph_ms(call: Callable[[], object], device: str, seconds: float) -> tuple[float, float]:
    """Median milliseconds of a replay, from the host; and of one among many back to back, by the GPU's own events.

    Where there are no graphs, of the call itself: twice the same.
    """
    if device == "cpu":
        plain = host_ms(call, device, seconds)
        return plain, plain
    graph = CudaGraph(call, torch.device("cuda", torch.cuda.current_device()))
    return host_ms(graph.replay, device, seconds), event_ms(graph.replay, seconds)


def event_ms(call: Callable[[], object], seconds: float) -> float:
    """Milliseconds of the GPU between the first and the last of calls that wait for nothing; the median of blocks."""
    times: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times) < _FEWEST:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(_REPLAYS):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / _REPLAYS)
    return statistics.median(times)
