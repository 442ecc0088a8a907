"""Measures the time of a call: from the host, as replays of a CUDA graph, and on the GPU alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from metafast.executors.cuda_graphs import CudaGraph

_FEWEST, _REPLAYS = 5, 20


def host_ms(call: Callable[[], object], device: str, seconds: float) -> float:
    """Returns the median milliseconds from a call to its result.

    It calls for ``seconds``, at least five times, after one call that is not counted. With ``seconds=0`` it calls once.
    """
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
    """Records ``call`` as a CUDA graph and returns two medians in milliseconds of its replay.

    The first is that of a single replay, from the host; the second that of many replays back to back, by events of the
    GPU. A CPU has no graphs, so both are the time of the call there.
    """
    if device == "cpu":
        duration = host_ms(call, device, seconds)
        return duration, duration
    graph = CudaGraph(call, torch.device("cuda", torch.cuda.current_device()))
    return host_ms(graph.replay, device, seconds), event_ms(graph.replay, seconds)


def event_ms(call: Callable[[], object], seconds: float) -> float:
    """Returns the GPU's milliseconds for one of many calls back to back; it is the median over several such series."""
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
