"""Pretends that there is an H100: code runs as it would there, but Triton kernels are compiled and not launched.

Every tensor claims to be on the GPU and lies in the CPU's memory. No kernel writes its results, so values mean nothing.
Shapes, strides and alignments, and so the kernels that are compiled, are those of a run on the GPU. If the environment
has the variable NOTES, each kernel that is asked for goes as a line into a file in the folder that it names.

It runs as ``python -m benchmarks.gpu.pretended WORKLOAD ...``, ``... micro`` or ``... train ARGUMENTS``, or as a plugin
of pytest (``-p``). With pytest, ``--assert=plain`` and PYTHONOPTIMIZE=1 keep assertions from ending a test before its
last launch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .triton_cache import Kernel, count_misses, triton_key

NOTES = "METAFAST_KERNEL_NOTES"
GPU = torch.device("cuda", 0)
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=81559 << 20,
    shared_memory_per_multiprocessor=228 << 10,
)  # fmt: skip
CALLS = 3  # the first runs as it is, the second is recorded as a CUDA graph, the third replayed
_SMALL = 1 << 18  # new tensors with at most so many values are set to zero, so that the host reads numbers from them


class OnGpu(TorchFunctionMode):
    """Lets tensors say that they are on the GPU, and makes on the CPU what is asked for on the GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attribute = getattr(function, "__self__", None)
        if attribute is Tensor.is_cuda:
            return not args[0].is_meta
        if function is torch.device:
            return function(*args, **kwargs or {})
        name = getattr(function, "__name__", "")
        if name == "cuda":
            return args[0].clone()
        result = function(*map(_here, args), **{name: _here(value) for name, value in (kwargs or {}).items()})
        if attribute is Tensor.device:
            return GPU if result.type == "cpu" else result
        if name == "to" and any(_on_gpu(value) for value in (*args[1:], *(kwargs or {}).values())):
            return result.clone()  # a copy from the CPU has memory of its own
        if name in ("empty", "empty_like", "new_empty") and not result.is_meta and result.numel() <= _SMALL:
            result.zero_()
        return result


def _on_gpu(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.startswith("cuda")


def _here(value: Any) -> Any:
    return torch.device("cpu") if _on_gpu(value) else value


class _Driver:
    """Answers what Triton asks the driver of a GPU."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * PROPERTIES.major + PROPERTIES.minor, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return GPU


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class _Event:
    """A CUDA event that measures nothing."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    record = synchronize = _nothing

    def elapsed_time(self, end: _Event) -> float:
        return 1.0


class _Graph:
    """A CUDA graph whose replay does nothing. Kernels are compiled while it is recorded, as at any other time."""

    recording = False

    def replay(self) -> None:
        pass

    @classmethod
    @contextlib.contextmanager
    def record(cls, *args: Any, **kwargs: Any) -> Iterator[None]:
        cls.recording = True
        try:
            yield
        finally:
            cls.recording = False


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def pretend() -> None:
    """Pretends that there is a GPU, from here to the end of the process."""
    import triton
    from triton.runtime.jit import JITFunction

    stream = types.SimpleNamespace(cuda_stream=0, wait_stream=_nothing, synchronize=_nothing)
    stand_ins = {
        "is_available": _always(True), "device_count": _always(1), "current_device": _always(0),
        "get_device_name": _always(PROPERTIES.name), "get_device_properties": _always(PROPERTIES),
        "get_device_capability": _always((PROPERTIES.major, PROPERTIES.minor)),
        "mem_get_info": _always((PROPERTIES.total_memory, PROPERTIES.total_memory)),
        "synchronize": _nothing, "graph_pool_handle": _nothing, "reset_peak_memory_stats": _nothing,
        "device": contextlib.nullcontext, "stream": contextlib.nullcontext, "graph": _Graph.record, "CUDAGraph": _Graph,
        "Event": _Event, "Stream": _always(stream), "current_stream": _always(stream),
        "is_current_stream_capturing": lambda: _Graph.recording, "max_memory_allocated": _always(0),
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    torch.testing.assert_close = _nothing
    triton.runtime.driver.set_active(_Driver())
    run = JITFunction.run
    JITFunction.run = lambda self, *args, warmup, **kwargs: run(self, *args, warmup=True, **kwargs)
    if NOTES in os.environ:
        _note(Path(os.environ[NOTES]) / f"{os.getpid()}.jsonl")
    OnGpu().__enter__()


def _note(file: Path) -> None:
    """Writes a line into ``file`` for each kernel that is asked for, whether it has to be compiled or not."""
    from triton.compiler import compiler

    key_of, length = compiler.get_cache_key, len(triton_key()) + 1
    file.parent.mkdir(parents=True, exist_ok=True)

    def noted(src: Any, *args: Any, **kwargs: Any) -> str:
        key: str = key_of(src, *args, **kwargs)
        with file.open("a") as lines:
            lines.write(json.dumps([src.name, key[length:]]) + "\n")
        return key

    compiler.get_cache_key = noted


def kernels(folder: Path) -> set[Kernel]:
    """Returns the kernels that processes with NOTES set to ``folder`` have asked for."""
    lines = (line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines())
    return {Kernel(*json.loads(line)) for line in lines}


def run_workload(name: str) -> None:
    """Takes its meta-gradient on the Triton executor, so often that its kernels are launched in every way."""
    from metafast.bench.peers import Metafast
    from metafast.bench.workloads import workload

    chosen = workload(name)
    call = Metafast("triton").prepare(chosen, chosen.draw().to("cuda"))
    for _ in range(CALLS):
        call()


def run_micro() -> None:
    """Runs the micro-benchmarks that launch Triton kernels."""
    from .results import Results
    from .workers import micro
    from .workers.setting import Setting

    where = Setting("cuda", False, None, Results(Path(os.devnull), 0.0, "micro"))
    micro.nodes(where)
    micro.tiles(where)


def pytest_load_initial_conftests() -> None:
    """Makes the machine look like one with a GPU before anything of the tests is imported."""
    pretend()


def pytest_sessionfinish(session: Any) -> None:
    """Ignores whether tests failed, which means nothing here; an error of pytest itself counts."""
    if session.exitstatus in (0, 1):
        session.exitstatus = 0


def main(arguments: list[str]) -> None:
    """Runs workloads or a training, and prints how many kernels were in the cache and which were compiled."""
    pretend()
    with count_misses() as found:
        if arguments[0] == "train":
            from metafast.cli.main import main as command

            sys.argv[1:] = arguments
            with contextlib.suppress(SystemExit):
                command()
        elif arguments == ["micro"]:
            run_micro()
        else:
            for name in arguments:
                run_workload(name)
    print(found)


if __name__ == "__main__":
    main(sys.argv[1:])
