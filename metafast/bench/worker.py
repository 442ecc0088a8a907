"""Runs each peer in a process of its own, so that its memory can be measured by itself and a call can be cut off."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metafast.bench.peers import Peer
from metafast.bench.workloads import Workload
from metafast.verification.agreement import Answer


class CutOff(Exception):
    """The peer took longer than its limit."""


class Failed(Exception):
    """The peer raised, or its process died; the text says how."""


class Worker:
    """Controls the process of one peer. Every wait has a limit in seconds; past it the process is killed and CutOff
    raised."""

    def __init__(
        self, peer: Peer, workload: Workload, device: str, threads: int, dtype: torch.dtype = torch.float32
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, peer, workload, device, threads, dtype)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        with _children_ignore_ctrl_c():
            self._process.start()
        theirs.close()
        self.version = ""  # known after the first call
        self._began: float | None = None

    def begin(self) -> None:
        """Starts the first call without waiting for it, so that other peers' first calls can run at the same time."""
        self._began = time.monotonic()
        with contextlib.suppress(ConnectionError):  # first() reports a process that has died
            self._connection.send(("first",))

    def first(self, limit: float) -> tuple[float, Answer]:
        """Prepares the peer and calls it once. Returns the seconds of that, with compilation, and the answer."""
        if self._began is None:
            self.begin()
        assert self._began is not None
        left = limit - (time.monotonic() - self._began)
        self.version, seconds, answer = self._answer(max(0.0, left))
        return seconds, answer

    def turn(self, seconds: float, limit: float) -> tuple[list[float], dict[str, int]]:
        """Calls again and again for ``seconds``, at least once.

        Returns the seconds of each call, and the peak memory of the process in bytes since its tasks were drawn:
        ``host`` and, on a GPU, ``device``; and ``beyond_data``, what it holds at that peak beyond the tasks and its
        imports, where the system can tell.
        """
        with contextlib.suppress(ConnectionError):
            self._connection.send(("turn", seconds))
        return self._answer(limit)

    def close(self) -> None:
        """Kills the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _answer(self, limit: float) -> Any:
        try:
            if not self._connection.poll(limit):
                self.close()
                raise CutOff
            kind, value = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(5)
            raise Failed(f"its process ended (exit code {self._process.exitcode}); out of memory?") from error
        if kind == "error":
            raise Failed(value)
        return value


@contextlib.contextmanager
def _children_ignore_ctrl_c() -> Iterator[None]:
    """Processes that are started in this block ignore Ctrl-C from their first line on, since the parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(
    connection: Connection, peer: Peer, workload: Workload, device: str, threads: int, dtype: torch.dtype
) -> None:
    if hasattr(os, "sched_setaffinity"):  # not every library has a setting for threads, but all keep to their cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        _serve_calls(connection, peer, workload, device, dtype)


def _serve_calls(connection: Connection, peer: Peer, workload: Workload, device: str, dtype: torch.dtype) -> None:
    call: Callable[[], Any] = lambda: None  # noqa: E731
    held: int | None = None
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        try:
            if message[0] == "first":
                peer.load()
                tasks = workload.draw().to(device).to(dtype)
                held = restart_peak(device)
                began = time.perf_counter()
                call = _synchronised(peer.prepare(workload, tasks), device)
                losses, gradient = call()
                seconds = time.perf_counter() - began
                answer = _array(losses), {name: _array(value) for name, value in gradient.items()}
                connection.send(("done", (peer.version(), seconds, answer)))
            else:
                connection.send(("done", (_turn(call, message[1]), _peak(device, held))))
        except Exception as error:
            last = traceback.format_exception_only(error)[-1].strip()
            connection.send(("error", last[:300]))


def _synchronised(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    if device == "cpu":
        return call

    def synchronised() -> Any:
        answer = call()
        torch.cuda.synchronize()
        return answer

    return synchronised


def _turn(call: Callable[[], Any], seconds: float) -> list[float]:
    """Returns the seconds of each call. Other peers have filled the caches meanwhile, so the first call is not counted
    where it takes less than half of the turn."""
    times: list[float] = []
    began = time.perf_counter()
    warming = True
    while not times or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        if not warming or took > seconds / 2:
            times.append(took)
        warming = False
    return times


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    return np.asarray(value, dtype=np.float64)


def _peak(device: str, held: int | None) -> dict[str, int]:
    peak = {"host": peak_bytes()}
    if device != "cpu":
        peak["device"] = torch.cuda.max_memory_allocated()
    if held is not None:
        peak["beyond_data"] = max(0, peak.get("device", peak["host"]) - held)
    return peak


def restart_peak(device: str) -> int | None:
    """Lets the peak begin anew from the memory that the process holds now, and returns that in bytes.

    It returns ``None`` where the system cannot let the peak of a process begin anew; Linux can.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return peak_bytes()


def peak_bytes() -> int:
    """Returns the peak memory of this process in bytes.

    On Linux this is not ``ru_maxrss``, which a new program inherits from its parent there.
    """
    if sys.platform == "linux":
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
