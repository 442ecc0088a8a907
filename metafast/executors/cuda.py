"""The native executor on a GPU: one thread block runs a task's whole inner loop and its way back, in a single launch.

Parameters, activations and directions of a task lie in the block's shared memory; theta and the activations of each
inner step go through global memory where they do not all fit. Where one block is too small, a cluster of 2, 4 or 8 runs
the task: each has some of the columns of every weight, and all activations. The same code runs on the CPU, one thread
after another, as the twin that tests hold against the truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafast.executors.base import Executor, MetaGradient, query_weights
from metafast.executors.description import (
    FACTS,
    LOSSES,
    Model,
    Models,
    call,
    foreign,
    in_double,
    missing,
    ready,
    targets,
)
from metafast.program import Program
from metafast.tasks import Batch, TaskBatch

_BUILD = "METAFAST_CUDA=1 pip install --no-build-isolation -e ."
PRECISIONS = {
    "float32": "products in float32",
    "tf32x3": "three TF32 products for each, as exact as float32",
    "tf32": "operands of products rounded to 11 bits",
    "bf16": "operands of products rounded to 8 bits",
}


@dataclass(frozen=True)
class BlockLimits:
    """What runs blocks: bytes of shared memory that a block can have, and processors that run blocks side by side.

    ``threads`` fixes the threads of a block (32 .. 256 in steps of 32); 0 chooses them by the widest layer.
    ``clusters``: numbers of blocks that may run a task together; the first is taken whose memory is enough.
    """

    shared: int
    processors: int
    threads: int = 0
    clusters: tuple[int, ...] = (1, 2, 4, 8)


class Launch(NamedTuple):
    """A meta-gradient of a batch of tasks: ``threads`` in a block, ``blocks``, of which ``cluster`` run a task
    together, bytes of ``shared`` memory in each, and bytes of a ``record`` that each writes to global memory after an
    inner step and reads on the way back; zero: all steps stay in shared memory."""

    threads: int
    blocks: int
    cluster: int
    shared: int
    record: int


class NativeCudaExecutor(Executor):
    """CUDA C++ in float32.

    Args:
        twin: stands in for the GPU: its tasks are on the CPU, in float32 or float64.
        threads: as of a ``BlockLimits``, on a GPU.
        clusters: likewise; before compute capability 9.0 a block is always alone.
        precision: of the operands of products. All but ``float32`` use tensor cores where a layer fills at least half
            of their tiles; sums are float32 always. TF32 and bf16 put a meta-gradient of several steps off by several
            per cent and more.

    Raises:
        ValueError: ``precision`` is unknown.
    """

    name = "native-cuda"
    proven = False

    def __init__(
        self,
        twin: BlockLimits | None = None,
        threads: int = 0,
        clusters: tuple[int, ...] = (1, 2, 4, 8),
        precision: str = "float32",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} is unknown; choose from {list(PRECISIONS)}")
        self.twin, self.threads, self.clusters, self.precision = twin, threads, clusters, precision
        self._models = Models(_Model)
        self._others: dict[str, NativeCudaExecutor] = {precision: self}

    def at(self, precision: str) -> NativeCudaExecutor | None:
        if precision not in PRECISIONS:
            return None
        if precision not in self._others:
            self._others[precision] = NativeCudaExecutor(self.twin, self.threads, self.clusters, precision)
        return self._others[precision]

    def refuses(self, program: Program, x: Tensor, masked: bool = False, queries: int | None = None) -> str | None:
        if missing is not None:
            return missing
        reason = self._wrong_place(x)
        if reason is not None:
            return reason
        if masked:
            return "tasks of different sizes (sample masks)"
        if program.loss.stem not in LOSSES:
            return f"loss {program.loss.stem!r}: it has {' and '.join(LOSSES)}"
        reason = foreign(program, x)
        if reason is not None:
            return reason
        try:
            cluster, needed = self.shared_memory(program, x, x.shape[1] if queries is None else queries)
        except ValueError as error:
            return str(error)
        return _wrong_size(cluster, needed, self._machine(x))

    def unrecordable(self, program: Program) -> str | None:
        return None

    def explain(self, program: Program, x: Tensor) -> list[str]:
        cluster, needed = self.shared_memory(program, x, x.shape[1])
        blocks = "one block a task" if cluster == 1 else f"a cluster of {cluster} blocks for each task"
        where = f"CUDA C++, {blocks}, {needed / 1024:.0f} KiB of shared memory{' in each' * (cluster > 1)}"
        if self.precision != "float32":
            where += f"; {PRECISIONS[self.precision]}, on tensor cores where they are filled"
        return [where for _ in program.nodes]

    def shared_memory(self, program: Program, x: Tensor, queries: int) -> tuple[int, int]:
        """The blocks for each task with samples ``x [T, n, ...]``, and the bytes of shared memory that its
        meta-gradient takes at least in each of them: more than a block has, where no number of blocks is enough.

        Raises:
            ValueError: a block cannot run the model; the text says which layer.
        """
        return self._models.of(program, x).fit(self._machine(x), (x.shape[1], queries, False), x.dtype)

    def launch(
        self, program: Program, tasks: TaskBatch, steps: int, *, count: int | None = None, first_order: bool = False,
        needs_lr: bool = True,
    ) -> Launch:  # fmt: skip
        """How the meta-gradient of ``tasks`` is launched, or that of ``count`` tasks like these.

        Raises:
            ValueError: blocks cannot run it; the text says why.
        """
        x, m = tasks.support_x, tasks.query_x.shape[1]
        model = self._models.of(program, x)
        numbers = self._numbers(model, x, (x.shape[1], m, False))
        threads, blocks, shared, record = call(
            torch.ops.metafast.cuda_launch, model.description, x.dtype == torch.float64, numbers,
            len(tasks) if count is None else count, x.shape[1], m, steps, first_order, needs_lr,
        )  # fmt: skip
        cluster, _ = model.fit(self._machine(x), (x.shape[1], m, False), x.dtype)
        return Launch(threads, blocks, cluster, shared, record)

    def predict(self, program: Program, params: Tensor, x: Tensor, step: int = 0) -> Tensor:
        model = self._models.of(program, x)
        head = self._head(model, x, 0, x.shape[1], predicts=True)
        out = call(torch.ops.metafast.cuda_predict, *head, ready(params), ready(x), step)
        return model.shaped(out)

    def loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        model = self._models.of(program, batch.x)
        losses, grads, outputs = call(
            torch.ops.metafast.cuda_loss_and_grad, *self._head(model, batch.x, 0, batch.x.shape[1]),
            ready(params), *_samples(program, batch), step,
        )  # fmt: skip
        return losses, grads, model.shaped(outputs)

    def adapt(self, program: Program, params: Tensor, lr: Tensor, support: Batch, steps: int) -> Tensor:
        head = self._head(self._models.of(program, support.x), support.x, support.x.shape[1], 0)
        trajectory: Tensor = call(
            torch.ops.metafast.cuda_adapt, *head, ready(params), ready(lr.to(params.dtype)),
            *_samples(program, support), steps,
        )  # fmt: skip
        return trajectory

    def adapt_vjp(
        self,
        program: Program,
        trajectory: Tensor,
        lr: Tensor,
        support: Batch,
        v: Tensor,
        *,
        first_order: bool = False,
        needs_lr: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        head = self._head(self._models.of(program, support.x), support.x, support.x.shape[1], 0)
        grads, lr_grad = call(
            torch.ops.metafast.cuda_adapt_vjp, *head, ready(trajectory),
            ready(lr.to(trajectory.dtype)), *_samples(program, support), ready(v),
            first_order, needs_lr,
        )  # fmt: skip
        return grads, lr_grad if needs_lr else None

    def meta_gradient(
        self,
        program: Program,
        params: Tensor,
        lr: Tensor,
        tasks: TaskBatch,
        steps: int,
        *,
        step_weights: list[float] | None = None,
        first_order: bool = False,
        needs_lr: bool = True,
    ) -> MetaGradient:
        x, m = tasks.support_x, tasks.query_x.shape[1]
        model = self._models.of(program, x)
        weights = query_weights(step_weights, steps)
        losses, outputs, grad, lr_grad = call(
            torch.ops.metafast.cuda_meta_gradient, *self._head(model, x, x.shape[1], m), ready(params),
            ready(lr.to(params.dtype)), *_samples(program, tasks.support),
            *_samples(program, tasks.query), in_double(weights, x.device), first_order, needs_lr,
        )  # fmt: skip
        return MetaGradient(losses, model.shaped(outputs), grad, lr_grad if needs_lr else None)

    def _wrong_place(self, x: Tensor) -> str | None:
        if self.precision != "float32" and x.dtype != torch.float32:
            return f"dtype {x.dtype}: precision={self.precision!r} is of float32"
        if self.twin is not None:
            real = x.dtype in (torch.float32, torch.float64)
            return None if x.device.type == "cpu" and real else f"{x.dtype} on {x.device}: the twin runs on the CPU"
        if x.device.type != "cuda":
            return f"device {x.device}: it runs on NVIDIA GPUs"
        if not torch.ops.metafast.cuda_built():
            return f"the extension is built without CUDA; with nvcc on PATH: {_BUILD}"
        if x.dtype != torch.float32:
            return f"dtype {x.dtype}: it runs float32"
        if (capability := torch.cuda.get_device_capability(x.device)) < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]}: it runs on 8.0 and later"
        return None

    def _machine(self, x: Tensor) -> BlockLimits:
        return self.twin if self.twin is not None else _gpu(x.device.index, self.threads, self.clusters)

    def _numbers(self, model: _Model, x: Tensor, samples: tuple[int, int, bool]) -> list[int]:
        """Where and how a call runs, in the order in which C++ reads it."""
        machine = self._machine(x)
        settings = {
            "shared": machine.shared,
            "processors": machine.processors,
            "threads": machine.threads,
            "cluster": model.fit(machine, samples, x.dtype)[0],
            "precision": FACTS["precisions"].index(self.precision),
            "stream": 0 if self.twin is not None else torch.cuda.current_stream(x.device).cuda_stream,
        }
        return [settings[name] for name in FACTS["launch_settings"]]

    def _head(self, model: _Model, x: Tensor, support: int, query: int, predicts: bool = False) -> tuple[Any, ...]:
        samples = (support, query, predicts)
        numbers = self._numbers(model, x, samples)
        cluster, stream = (numbers[FACTS["launch_settings"].index(name)] for name in ("cluster", "stream"))
        key = (*samples, cluster, x.dtype, x.device)
        if key not in model.tables:
            if self.twin is None and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("CUDA: tasks of these shapes are new: run them once before a graph captures them")
            make = torch.ops.metafast.cuda_tables
            model.tables[key] = call(make, model.description, x, *samples, cluster, stream)
        _, head = model.tables[key]
        return model.description, head, numbers


class _Model(Model):
    """And its tables on each device with what points to them, by the numbers of samples and of blocks."""

    def __init__(self, program: Program, sample: tuple[int, ...]) -> None:
        super().__init__(program, sample)
        self.tables: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._fits: dict[tuple[Any, ...], tuple[int, int]] = {}

    def fit(self, machine: BlockLimits, samples: tuple[int, int, bool], dtype: torch.dtype) -> tuple[int, int]:
        """Blocks for each task of ``samples``: of the support set, of the query set, and whether these are only
        predicted; with the bytes that each block takes."""
        key = (machine, samples, dtype)
        if key not in self._fits:
            for cluster in machine.clusters:
                needs = torch.ops.metafast.cuda_needs
                needed = int(call(needs, self.description, dtype == torch.float64, *samples, cluster))
                self._fits[key] = cluster, needed
                if needed <= machine.shared or needed > machine.shared * machine.clusters[-1]:
                    break
        return self._fits[key]


def _samples(program: Program, batch: Batch) -> tuple[Tensor, Tensor]:
    return ready(batch.x), ready(targets(program, batch))


def _wrong_size(cluster: int, needed: int, machine: BlockLimits) -> str | None:
    if needed <= machine.shared:
        return None
    where = "" if cluster == 1 else f" in each of {cluster} blocks"
    only = "" if len(machine.clusters) > 1 else "; clusters of blocks need compute capability 9.0"
    taken, given = (f"{count / 1024:.0f} KiB" for count in (needed, machine.shared))
    return f"a task takes {taken} of shared memory{where} and a block has {given}{only}"


@lru_cache
def _gpu(index: int, threads: int, clusters: tuple[int, ...]) -> BlockLimits:
    properties = torch.cuda.get_device_properties(index)
    reserved = 1024  # by the system, of what a processor has for its blocks
    shared = properties.shared_memory_per_multiprocessor - reserved
    known = clusters if properties.major >= 9 else (1,)
    return BlockLimits(shared, properties.multi_processor_count, threads, known)
