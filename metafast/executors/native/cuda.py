"""Runs the inner loop of each task and its way back in one thread block on a GPU, all tasks in a single launch.

The block's shared memory holds the parameters, activations and directions of its task. Where it cannot hold ``theta_s``
and the activations of all inner steps, these go through global memory. Where one block is too small, a cluster of 2, 4
or 8 blocks runs the task: each block holds some of the columns of every weight, and all activations. The same code also
runs on the CPU, one thread after another, as the twin that tests hold against the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from metafast.executors import steps
from metafast.executors.base import ExecutionPlan, Executor, MetaGradient
from metafast.executors.native.encode import (
    FACTS,
    Model,
    Models,
    as_input,
    call_op,
    extension_error,
    in_double,
    targets,
    unsupported_layer,
    unsupported_loss,
)
from metafast.executors.native.inner_steps import BlockSteps, block_steps, loop_numbers, rule_numbers
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.program.rule import started
from metafast.tasks import Batch, TaskBatch, TaskShapes

_BUILD = "METAFAST_CUDA=1 pip install --no-build-isolation -e ."
PRECISIONS = {
    "float32": "products in float32",
    "tf32x3": "three TF32 products for each, as exact as float32",
    "tf32": "operands of products rounded to 11 bits",
    "bf16": "operands of products rounded to 8 bits",
}


@dataclass(frozen=True)
class BlockLimits:
    """Says what a GPU, or the twin, offers to thread blocks.

    Attributes:
        shared: the bytes of shared memory that one block can have.
        processors: the number of processors that run blocks side by side.
        threads: the number of threads of a block, 32 .. 256 in steps of 32; 0 chooses it by the widest layer.
        clusters: the numbers of blocks that may run a task together; the first whose memory is enough is taken.
    """

    shared: int
    processors: int
    threads: int = 0
    clusters: tuple[int, ...] = (1, 2, 4, 8)


class Launch(NamedTuple):
    """Says how the meta-gradient of a batch of tasks is launched.

    Attributes:
        threads: the number of threads of a block.
        blocks: the number of blocks.
        cluster: the number of blocks that run a task together.
        shared: the bytes of shared memory of each block.
        record: the bytes that each block writes to global memory after an inner step and reads on the way back; 0
            where all steps stay in shared memory.
    """

    threads: int
    blocks: int
    cluster: int
    shared: int
    record: int


class CudaExecutor(Executor):
    """Runs Programs by CUDA C++ in float32.

    Args:
        twin: the limits of a GPU that the CPU stands in for; tasks are then on the CPU, in float32 or float64.
        threads: ``BlockLimits.threads`` on a GPU.
        clusters: ``BlockLimits.clusters`` on a GPU; before compute capability 9.0 a block is always alone.
        precision: the precision of the operands of products. All but ``float32`` use tensor cores where a layer fills
            at least half of their tiles; sums are always float32. With TF32 and bf16 the error of a meta-gradient of
            several steps is several per cent and more.

    Raises:
        ValueError: ``precision`` is unknown.
    """

    name = "cuda"
    proven = False
    precisions = PRECISIONS
    remedy = f"a machine with an NVIDIA GPU and nvcc: {_BUILD}"

    def __init__(
        self,
        twin: BlockLimits | None = None,
        threads: int = 0,
        clusters: tuple[int, ...] = (1, 2, 4, 8),
        precision: str = "float32",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} is unknown; choose from {list(PRECISIONS)}")
        self.twin = twin
        self.threads = threads
        self.clusters = clusters
        self.precision = precision
        self._models = Models(_Model)

    def copy_with(self, precision: str) -> CudaExecutor:
        return CudaExecutor(self.twin, self.threads, self.clusters, precision)

    def plan_own(self, program: Program, loop: InnerLoop, shapes: TaskShapes) -> ExecutionPlan | str:
        if extension_error is not None:
            return extension_error
        reason = self._device_obstacle(shapes)
        if reason is not None:
            return reason
        if shapes.ragged:
            return "tasks of different sizes (sample masks)"
        reason = unsupported_loss(program, shapes) or unsupported_layer(program, shapes.sample)
        if reason is not None:
            return reason
        try:
            cluster, needed = self.shared_memory(program, shapes)
        except ValueError as error:
            return str(error)
        reason = _memory_obstacle(cluster, needed, self.limits(shapes.device))
        if reason is not None:
            return reason
        blocks = "one block a task" if cluster == 1 else f"a cluster of {cluster} blocks for each task"
        where = f"CUDA C++, {blocks}, {needed / 1024:.0f} KiB of shared memory{' in each' * (cluster > 1)}"
        if self.precision != "float32":
            where += f"; {PRECISIONS[self.precision]}, on tensor cores where they are filled"
        if rule_numbers(loop.rule) is None:
            where += "; a launch for each gradient and Hessian product of a step"
        return ExecutionPlan(self, lambda: tuple(where for _ in program.nodes), steps.unknown_rule(loop), lambda: None)

    def shared_memory(self, program: Program, shapes: TaskShapes) -> tuple[int, int]:
        """Returns the number of blocks for each task, and the bytes of shared memory that each of them needs at least.

        Where no number of blocks is enough, these are more bytes than a block has.

        Raises:
            ValueError: a block cannot run the model; the text says which layer.
        """
        model = self._models.of(program, shapes.sample)
        return model.fit(self.limits(shapes.device), (*shapes.samples, False), shapes.dtype)

    def launch(self, program: Program, loop: InnerLoop, shapes: TaskShapes) -> Launch:
        """Says how the meta-gradient of tasks of these shapes is launched.

        Raises:
            ValueError: blocks cannot run it; the text says why.
        """
        model = self._models.of(program, shapes.sample)
        samples = shapes.samples
        rule = rule_numbers(loop.rule) or ()
        numbers = self._numbers(model, shapes.device, shapes.dtype, (*samples, False), rule)
        threads, blocks, shared, record = call_op(
            torch.ops.metafast.cuda_launch, model.description, shapes.dtype == torch.float64, numbers,
            shapes.tasks, *samples, rule, loop_numbers(loop, bool(shapes.step_sets), 0),
        )  # fmt: skip
        cluster, _ = model.fit(self.limits(shapes.device), (*samples, False), shapes.dtype, rule)
        return Launch(threads, blocks, cluster, shared, record)

    def predict(
        self, program: Program, params: Tensor, x: Tensor, step: int = 0, seeds: Tensor | None = None
    ) -> Tensor:
        head = self._head(program, x, (0, x.shape[1], True))
        outputs = call_op(torch.ops.metafast.cuda_predict, *head, as_input(params), as_input(x), step)
        return self._models.of(program, x.shape[2:]).shaped(outputs)

    def loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, y = _samples(program, batch)
        losses, grads, outputs = call_op(
            torch.ops.metafast.cuda_loss_and_grad, *self._head(program, x, (0, x.shape[1], False)),
            as_input(params), x, y, step,
        )  # fmt: skip
        return losses, grads, self._models.of(program, x.shape[2:]).shaped(outputs)

    def adapt(self, program: Program, loop: InnerLoop, params: Tensor, rates: Tensor, support: Batch) -> Tensor:
        found = self._fused(program, loop, rates, support, params.dtype)
        if found is None:
            return steps.adapt(self, program, loop, params, rates, support)
        x, y = _samples(program, support)
        if loop.states and params.shape != (program.size,):
            params = started(loop.rule, params, program.size).expand(support.at(0).x.shape[0], -1)
        trajectory: Tensor = call_op(
            torch.ops.metafast.cuda_adapt, *self._head(program, x, (x.shape[1], 0, False), found.rule),
            as_input(params), *found, x, y, loop_numbers(loop, support.each_step, 0),
        )  # fmt: skip
        return trajectory

    def adapt_vjp(
        self, program: Program, loop: InnerLoop, trajectory: Tensor, rates: Tensor, support: Batch, v: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        found = self._fused(program, loop, rates, support, trajectory.dtype)
        if found is None:
            return steps.adapt_vjp(self, program, loop, trajectory, rates, support, v)
        x, y = _samples(program, support)
        grads, rates_grad = call_op(
            torch.ops.metafast.cuda_adapt_vjp, *self._head(program, x, (x.shape[1], 0, False), found.rule),
            as_input(trajectory), *found, x, y, as_input(v), loop_numbers(loop, support.each_step, 0),
        )  # fmt: skip
        return grads, found.gradient(rates_grad, rates, 1) if loop.learns_rates else None

    def hvp(self, program: Program, params: Tensor, batch: Batch, u: Tensor, step: int = 0) -> Tensor:
        x, y = _samples(program, batch)
        product: Tensor = call_op(
            torch.ops.metafast.cuda_hvp, *self._head(program, x, (x.shape[1], 0, False)), as_input(params),
            as_input(u.expand(len(x), -1)), x, y, step,
        )  # fmt: skip
        return product

    @torch.no_grad()
    def meta_gradient(
        self, program: Program, loop: InnerLoop, parameters: Sequence[Tensor], rates: Tensor, tasks: TaskBatch
    ) -> MetaGradient:
        theta, queries = _flatten_dense_tensors(parameters), tasks.query_x.shape[1]
        found = self._fused(program, loop, rates, tasks.support, theta.dtype, queries)
        whole = loop.truncate is None and loop.memory is None and program.query is program
        if found is None or not whole:
            return super().meta_gradient(program, loop, parameters, rates, tasks)
        x, y = _samples(program, tasks.support)
        losses, outputs, grad, rates_grad = call_op(
            torch.ops.metafast.cuda_meta_gradient, *self._head(program, x, (x.shape[1], queries, False), found.rule),
            as_input(theta), *found, x, y, *_samples(program, tasks.query), in_double(loop.step_weights, x.device),
            loop_numbers(loop, tasks.each_step, 0),
        )  # fmt: skip
        grads = _unflatten_dense_tensors(grad, parameters)
        of_rates = found.gradient(rates_grad, rates, 1 / len(tasks)) if loop.learns_rates else None
        return MetaGradient(losses, self._models.of(program, x.shape[2:]).shaped(outputs), grads, of_rates)

    def _device_obstacle(self, shapes: TaskShapes) -> str | None:
        """Says in words why batches of these dtypes cannot be computed on their device; ``None`` where they can."""
        if self.precision != "float32" and shapes.dtype != torch.float32:
            return f"dtype {shapes.dtype}: precision={self.precision!r} is of float32"
        if self.twin is not None:
            real = shapes.dtype in (torch.float32, torch.float64)
            where = f"{shapes.dtype} on {shapes.device}"
            return None if shapes.device.type == "cpu" and real else f"{where}: the twin runs on the CPU"
        if shapes.device.type != "cuda":
            return f"device {shapes.device}: it runs on NVIDIA GPUs"
        if not torch.ops.metafast.cuda_built():
            return f"the extension is built without CUDA; with nvcc on PATH: {_BUILD}"
        if shapes.dtype != torch.float32:
            return f"dtype {shapes.dtype}: it runs float32"
        if (capability := torch.cuda.get_device_capability(shapes.device)) < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]}: it runs on 8.0 and later"
        return None

    def limits(self, device: torch.device) -> BlockLimits:
        """Returns the limits of what runs the blocks: ``device``, or the twin."""
        return self.twin if self.twin is not None else _gpu_limits(device.index, self.threads, self.clusters)

    def _fused(
        self, program: Program, loop: InnerLoop, rates: Tensor, support: Batch, dtype: torch.dtype, queries: int = 0
    ) -> BlockSteps | None:
        """Returns the steps as blocks take all of them in one launch; ``None``: each gradient is a launch of its own.

        That is so under rules that blocks have no formula for, with numbers for each parameter, and where a block has
        no memory for the state.
        """
        found = block_steps(loop, support.each_step, rates, dtype)
        if found is None or not found.rule:
            return found
        x = support.at(0).x
        model, limits = self._models.of(program, x.shape[2:]), self.limits(x.device)
        fits = model.fit(limits, (x.shape[1], queries, False), dtype, found.rule)[1] <= limits.shared
        return found if fits else None

    def _numbers(
        self, model: _Model, device: torch.device, dtype: torch.dtype, samples: tuple[int, int, bool],
        rule: tuple[float, ...],
    ) -> list[int]:  # fmt: skip
        """Lists the numbers that say where and how a call runs, in the order in which C++ reads them."""
        limits = self.limits(device)
        settings = {
            "shared": limits.shared,
            "processors": limits.processors,
            "threads": limits.threads,
            "cluster": model.fit(limits, samples, dtype, rule)[0],
            "precision": FACTS["precisions"].index(self.precision),
            "stream": 0 if self.twin is not None else torch.cuda.current_stream(device).cuda_stream,
        }
        return [settings[name] for name in FACTS["launch_settings"]]

    def _head(
        self, program: Program, x: Tensor, samples: tuple[int, int, bool], rule: tuple[float, ...] = ()
    ) -> tuple[Any, ...]:
        """Returns the first arguments of an operator for tasks of samples like ``x``.

        ``samples`` are the numbers of support and of query samples, and whether the call only predicts. The tables that
        the kernel reads are made on the first call for these sizes, and kept.

        Raises:
            RuntimeError: they would have to be made while a CUDA graph is being recorded.
        """
        model = self._models.of(program, x.shape[2:])
        numbers = self._numbers(model, x.device, x.dtype, samples, rule)
        cluster, stream = (numbers[FACTS["launch_settings"].index(name)] for name in ("cluster", "stream"))
        key = (*samples, cluster, x.dtype, x.device)
        if key not in model.tables:
            if self.twin is None and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("CUDA: tasks of these shapes are new: run them once before a graph captures them")
            make = torch.ops.metafast.cuda_tables
            model.tables[key] = call_op(make, model.description, x, *samples, cluster, stream)
        _, head = model.tables[key]
        return model.description, head, numbers


class _Model(Model):
    """Adds to a model what kernels read of it.

    Attributes:
        tables: the tables on a device and the head that points to them, by the numbers of samples and blocks, dtype and
            device.
    """

    def __init__(self, program: Program, sample: tuple[int, ...]) -> None:
        super().__init__(program, sample)
        self.tables: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._fits: dict[tuple[Any, ...], tuple[int, int]] = {}

    def fit(
        self, limits: BlockLimits, samples: tuple[int, int, bool], dtype: torch.dtype, rule: tuple[float, ...] = ()
    ) -> tuple[int, int]:
        """Returns the number of blocks for each task, and the bytes of shared memory that each of them needs.

        ``samples`` are the numbers of support and of query samples, and whether the call only predicts. Steps by a
        ``rule``, given in numbers, need room for its state.
        """
        key = (limits, samples, dtype, rule)
        if key not in self._fits:
            for cluster in limits.clusters:
                needs = torch.ops.metafast.cuda_needs
                needed = int(call_op(needs, self.description, dtype == torch.float64, *samples, cluster, rule))
                self._fits[key] = cluster, needed
                if needed <= limits.shared or needed > limits.shared * limits.clusters[-1]:
                    break
        return self._fits[key]


def _samples(program: Program, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets as operators take them; those of steps lie one after another, ``[S T, n, ...]``."""
    x, y = batch.x, batch.y
    if batch.each_step:
        x, y = x.flatten(0, 1), y.flatten(0, 1)
    return as_input(x), as_input(targets(program.loss, y, x.dtype))


def _memory_obstacle(cluster: int, needed: int, limits: BlockLimits) -> str | None:
    """Says in words that the shared memory of ``cluster`` blocks does not hold a task; ``None`` where it does."""
    if needed <= limits.shared:
        return None
    where = "" if cluster == 1 else f" in each of {cluster} blocks"
    only = "" if len(limits.clusters) > 1 else "; clusters of blocks need compute capability 9.0"
    taken, available = (f"{count / 1024:.0f} KiB" for count in (needed, limits.shared))
    return f"a task takes {taken} of shared memory{where} and a block has {available}{only}"


@lru_cache
def _gpu_limits(index: int, threads: int, clusters: tuple[int, ...]) -> BlockLimits:
    """Returns the limits of the GPU ``index``."""
    properties = torch.cuda.get_device_properties(index)
    reserved = 1024  # bytes of a processor's shared memory that the system takes
    shared = properties.shared_memory_per_multiprocessor - reserved
    known = clusters if properties.major >= 9 else (1,)
    return BlockLimits(shared, properties.multi_processor_count, threads, known)
