"""Runs the reference executor's inner loop over layers that are Triton kernels over (task, tile) on an NVIDIA GPU.

It serves networks that are too large for one thread block. Parameters and images are put into the kernels' memory
order before the inner loop, and results back into the user's order after it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from metafast.executors.base import ExecutionPlan, Executor, MetaGradient, losses_with_targets
from metafast.executors.composition import segments_of
from metafast.executors.cuda_graphs import Graphs, Results
from metafast.executors.memory import MemoryPlan, choose_memory_plan, peak_bytes
from metafast.executors.reference.executor import ReferenceExecutor
from metafast.executors.reference.inner_loop import meta_gradient
from metafast.executors.steps import unknown_rule
from metafast.kernels.batch_norm import BatchNorm
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.tasks import Batch, TaskBatch, TaskShapes

if TYPE_CHECKING:
    from metafast.executors.triton.lowering import Lowered

PRECISIONS = {
    "float32": "three TF32 products for each, as exact as float32",
    "tf32": "operands of products rounded to 11 bits",
    "bf16": "activations and operands of products rounded to 8 bits",
}
_BUDGET = 2 << 30  # bytes where there is no GPU
_PLANS = 64  # the most memory plans that are kept


class TritonExecutor(Executor):
    """Runs every model layer by layer; layers that have no kernels run by their rules in PyTorch.

    Args:
        precision: the precision of the operands of products, and with ``bf16`` of the activations in memory too;
            parameters, statistics and sums are always float32. With TF32 and bf16 the error of a meta-gradient of
            several steps is several per cent and more.
        interpreted: whether it also takes batches on the CPU, where Triton interprets the kernels, for tests. That
            needs TRITON_INTERPRET=1 in the environment before Triton is imported.
        budget: the bytes of activations that may be in use at once; ``None`` means half of the GPU's memory.
        wrap: returns the Program to run in the place of a lowered one (see ``Executor.observed``). No CUDA graph is
            then recorded, because the host must run every layer. ``None`` runs the lowered Program itself.

    Attributes:
        graphs: the CUDA graphs of whole meta-gradients.
        memory_plans: how meta-gradients go through memory, by Program, loop and shapes.

    Raises:
        ValueError: ``precision`` is unknown.
    """

    name = "triton"
    proven = False
    precisions = PRECISIONS
    remedy = "a machine with an NVIDIA GPU: pip install 'metafast[triton]'"

    def __init__(
        self,
        precision: str = "float32",
        interpreted: bool = False,
        budget: int | None = None,
        wrap: Callable[[Program], Program] | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} is unknown; choose from {list(PRECISIONS)}")
        self.precision = precision
        self.interpreted = interpreted
        self.budget = budget
        self.wrap = wrap
        self.graphs = Graphs()
        self.memory_plans: dict[tuple[object, ...], MemoryPlan] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has recorded and planned nothing yet."""
        return TritonExecutor, (self.precision, self.interpreted, self.budget, self.wrap)

    def copy_with(self, precision: str) -> TritonExecutor:
        return TritonExecutor(precision, self.interpreted, self.budget, self.wrap)

    def observed(self, wrap: Callable[[Program], Program]) -> TritonExecutor:
        return TritonExecutor(self.precision, self.interpreted, self.budget, wrap)

    def plan_own(self, program: Program, loop: InnerLoop, shapes: TaskShapes) -> ExecutionPlan | str:
        if shapes.dtype != torch.float32:
            return f"dtype {shapes.dtype}: it runs float32"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 'metafast[triton]'"
        if shapes.device.type != "cuda" and not self.interpreted:
            return f"the batch is on {shapes.device}: it needs an NVIDIA GPU"
        if program.draws:
            return "random numbers: only the reference draws them"
        norms = [node.layer for node in program.nodes if isinstance(node.layer, BatchNorm)]
        if shapes.ragged and not all(norm.fixed_statistics for norm in norms):
            return "ragged tasks in a batch norm that measures its statistics"
        if program.by_samples:
            return "what it computes depends on the number of samples"
        reverse = [node.name for node in program.derived if getattr(node.layer, "reverse_only", False)]
        if reverse:
            return f"{reverse[0]}: its second derivative is to be had by autograd alone"
        derived = _unknown_function(program)
        usual = all(loss.of_kind_alone(shape, dtype) for _, loss, shape, dtype in losses_with_targets(program, shapes))
        if self.precision == "bf16" and (derived or not usual):
            return f"precision='bf16' needs kernels for every layer and the loss, and {derived or 'loss'!r} has none"

        def layers() -> tuple[str, ...]:
            return tuple(f"{note} ({self.precision})" for note in self._lowered(program, shapes.device).notes)

        obstacle = derived and f"{derived}: a function of PyTorch's or the user's that may read values"
        obstacle = obstacle or unknown_rule(loop)
        return ExecutionPlan(self, layers, obstacle, lambda: self._describe_memory(program, loop, shapes))

    def predict(
        self, program: Program, params: Tensor, x: Tensor, step: int = 0, seeds: Tensor | None = None
    ) -> Tensor:
        lowered = self._lowered(program, x.device)
        inner = self._layered(program, x.device)
        with _on_device(x.device):
            return inner.predict(lowered.program, lowered.pack(params), self._reorder(x), step).float()

    def loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = batch.x.device
        lowered = self._lowered(program, device)
        inner = self._layered(program, device)
        with _on_device(device):
            found = inner.loss_and_grad(lowered.program, lowered.pack(params), self._reordered(batch), step)
        losses, grad, outputs = found
        return losses, lowered.unpack(grad), outputs.float()

    def adapt(self, program: Program, loop: InnerLoop, params: Tensor, rates: Tensor, support: Batch) -> Tensor:
        device = support.x.device
        lowered = self._lowered(program, device)
        inner = self._layered(program, device)
        packed = lowered.pack(params)
        packed_rates = lowered.pack_rates(rates)
        with _on_device(device):
            found = inner.adapt(lowered.program, _lowered_loop(loop), packed, packed_rates, self._reordered(support))
            return lowered.unpack(found)

    def adapt_vjp(
        self, program: Program, loop: InnerLoop, trajectory: Tensor, rates: Tensor, support: Batch, v: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        device = support.x.device
        lowered = self._lowered(program, device)
        inner = self._layered(program, device)
        with _on_device(device):
            grad, rates_grad = inner.adapt_vjp(
                lowered.program, _lowered_loop(loop), lowered.pack(trajectory), lowered.pack_rates(rates),
                self._reordered(support), lowered.pack(v),
            )  # fmt: skip
        return lowered.unpack(grad), lowered.unpack_rates(rates_grad)

    def hvp(self, program: Program, params: Tensor, batch: Batch, u: Tensor, step: int = 0) -> Tensor:
        device = batch.x.device
        lowered = self._lowered(program, device)
        inner = self._layered(program, device)
        packed = lowered.pack(params)
        packed_u = lowered.pack(u)
        with _on_device(device):
            return lowered.unpack(inner.hvp(lowered.program, packed, self._reordered(batch), packed_u, step))

    @torch.no_grad()
    def meta_gradient(
        self, program: Program, loop: InnerLoop, parameters: Sequence[Tensor], rates: Tensor, tasks: TaskBatch
    ) -> MetaGradient:
        if self.wrap is not None:
            return super().meta_gradient(program, loop, parameters, rates, tasks)
        device = tasks.support_x.device
        lowered = self._lowered(program, device)
        theta = _flatten_dense_tensors(parameters)
        plan = None if _in_segments(lowered, loop, len(tasks)) else self._memory_plan(lowered, loop, rates, tasks)

        def compute(theta: Tensor, rates: Tensor, *parts: Any) -> Results:
            packed, packed_rates = lowered.pack(theta), lowered.pack_rates(rates)
            batch = TaskBatch(*parts, each_step=tasks.each_step)
            if plan is None:
                inner, batch = self._layered(program, device), self._reordered_tasks(batch)
                found = inner.meta_gradient(lowered.program, _lowered_loop(loop), (packed,), packed_rates, batch)
            else:
                found = self._in_chunks(lowered.program, loop, plan, packed, packed_rates, batch)
            rates_grad = lowered.unpack_rates(found.rates_grad)
            results = found.losses, found.outputs.float(), lowered.unpack(found.grads[0])
            return results if rates_grad is None else (*results, rates_grad)

        parts = (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)
        with _on_device(device):
            if _recordable(lowered.program, loop, tasks):
                key = lowered.program, loop, plan, tasks.each_step
                found = self.graphs.run(key, compute, (theta, rates, *parts))
            else:
                found = compute(theta, rates, *parts, tasks.support_mask, tasks.query_mask)
        losses, outputs, grad, *rates_grad = found
        grads = _unflatten_dense_tensors(grad, parameters)
        return MetaGradient(losses, outputs, grads, rates_grad[0] if rates_grad else None)

    def _in_chunks(
        self, program: Program, loop: InnerLoop, plan: MemoryPlan, theta: Tensor, rates: Tensor, tasks: TaskBatch
    ) -> MetaGradient:
        """Computes the meta-gradient as many tasks at a time as the plan says, and adds up the chunks' gradients."""
        parts, loop = [], _lowered_loop(loop)
        for chunk in plan.chunks(len(tasks)):
            some = tasks.tasks(chunk)
            batches = self._reordered(some.support), self._reordered(some.query)
            parts.append(meta_gradient(program, loop, theta, rates, batches, share=1 / len(tasks), keep=plan.keep))
        if len(parts) == 1:
            return parts[0]
        losses, outputs = (torch.cat([getattr(p, name) for p in parts]) for name in ("losses", "outputs"))
        grad = torch.stack([p.grads[0] for p in parts]).sum(0)
        rates_grads = [p.rates_grad for p in parts if p.rates_grad is not None]
        return MetaGradient(losses, outputs, (grad,), torch.stack(rates_grads).sum(0) if rates_grads else None)

    def _describe_memory(self, program: Program, loop: InnerLoop, shapes: TaskShapes) -> str | None:
        if _unknown_function(program):
            return "measured on one task when the first batch comes"
        lowered = self._lowered(program, shapes.device)
        if _in_segments(lowered, loop, shapes.tasks):
            return None
        rates = torch.empty(1, 1, device=shapes.device)
        if loop.rule is not None:
            rates = rates.double().expand(len(loop.rule.hyper_names), 1, 1)
        return str(self._memory_plan(lowered, loop, rates, _without_memory(shapes)))

    def _memory_plan(self, lowered: Lowered, loop: InnerLoop, rates: Tensor, tasks: TaskBatch) -> MemoryPlan:
        """Returns the memory plan for batches of these shapes; it is made once."""
        device = rates.device
        counted = loop._replace(step_weights=tuple(float(w != 0) for w in loop.step_weights))
        key = (lowered.program, counted, tasks.shapes._replace(devices=(device, device)), rates.shape)
        if key not in self.memory_plans:
            if len(self.memory_plans) >= _PLANS:
                self.memory_plans.clear()
            with torch.no_grad(), _on_device(device):
                peak = functools.partial(self._peak, lowered.program, loop, rates, tasks)
                plan = choose_memory_plan(peak, len(tasks), self._budget(device), lowered.max_tasks)
                self.memory_plans[key] = plan
        return self.memory_plans[key]

    def _peak(self, program: Program, loop: InnerLoop, rates: Tensor, tasks: TaskBatch, chunk: int, keep: bool) -> int:
        """Returns the bytes at the peak for ``chunk`` tasks, found by a run on tensors that have no memory.

        Rules derived by torch.autograd and a user's own loss may look at values. Where there are any, the first task is
        run with its values, and its bytes are multiplied by ``chunk``.
        """
        if _unknown_function(program):
            some = tasks.tasks(slice(0, 1))
            rates = rates.detach()
            copies = chunk
        else:
            some = _without_memory(tasks.shapes, chunk)
            rates = torch.empty_like(rates, device="meta")
            copies = 1
        theta = torch.zeros(program.size, device=rates.device)
        rates = rates if rates.shape[-1] == 1 else rates[..., :1].expand(*rates.shape[:-1], program.size)
        batches = self._reordered(some.support), self._reordered(some.query)
        run = functools.partial(
            meta_gradient, program, _lowered_loop(loop), theta, rates, batches, share=1.0, keep=keep
        )
        return copies * peak_bytes(run)

    def _budget(self, device: torch.device) -> int:
        """Returns the bytes of activations that may be in use at once on ``device``."""
        if self.budget is not None:
            return self.budget
        return torch.cuda.get_device_properties(device).total_memory // 2 if device.type == "cuda" else _BUDGET

    def _layered(self, program: Program, device: torch.device) -> ReferenceExecutor:
        """Returns the executor that runs the lowered Program layer by layer."""
        inner = ReferenceExecutor(self._budget(device), self._lowered(program, device).max_tasks, autograd=False)
        return inner if self.wrap is None else inner.observed(self.wrap)

    def _lowered(self, program: Program, device: torch.device) -> Lowered:
        from metafast.executors.triton.lowering import lower

        return lower(program, self.precision, device)

    def _reorder(self, x: Tensor, each_step: bool = False) -> Tensor:
        """Puts images ``[T, n, C, H, W]`` into memory of the order ``[T, n, H, W, C]`` and the activations' dtype.

        With ``each_step`` the axis of steps is in front.
        """
        x = x.to(torch.bfloat16) if self.precision == "bf16" else x
        return x.movedim(-3, -1).contiguous().movedim(-1, -3) if x.dim() == 5 + each_step else x

    def _reordered(self, batch: Batch) -> Batch:
        """Returns the batch with its images in the kernels' memory order."""
        return batch._replace(x=self._reorder(batch.x, batch.each_step))

    def _reordered_tasks(self, tasks: TaskBatch) -> TaskBatch:
        """Returns the tasks with their images in the kernels' memory order."""
        return replace(tasks, support_x=self._reordered(tasks.support).x, query_x=self._reordered(tasks.query).x)


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Makes ``device`` the current device, on which kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _unknown_function(program: Program) -> str | None:
    """Names the first node, or the loss, that runs a function of PyTorch's or the user's which may look at values."""
    names = [node.name for node in program.nodes if node.layer.kind == "derived"]
    custom = "custom_loss" in (program.loss.kind, program.query.loss.kind)
    return next(iter(names), "loss" if custom else None)


def _lowered_loop(loop: InnerLoop) -> InnerLoop:
    """Returns the loop with kernels for its rule, where there are any."""
    from metafast.executors.triton.rules import lower_rule

    return loop if loop.rule is None else loop._replace(rule=lower_rule(loop.rule))


def _in_segments(lowered: Lowered, loop: InnerLoop, tasks: int) -> bool:
    """Says whether the way back leaves out some of the steps, or takes some of them again."""
    if loop.is_plain:
        return False
    width = (1 + loop.states) * lowered.program.size
    return loop.truncate is not None or not segments_of(loop, tasks, width, torch.float32.itemsize).keeps_all


def _recordable(program: Program, loop: InnerLoop, tasks: TaskBatch) -> bool:
    """Says whether the meta-gradient runs on a GPU by kernels alone, which read the same addresses every time."""
    if not tasks.support_x.is_cuda or tasks.support_mask is not None or tasks.query_mask is not None:
        return False
    if unknown_rule(loop) is not None:
        return False
    return _unknown_function(program) is None and not any(node.constants for node in program.nodes)


def _without_memory(shapes: TaskShapes, count: int | None = None) -> TaskBatch:
    """Makes tasks of these shapes, or only ``count`` of them, that have no memory and no padding."""
    steps, count = ((shapes.step_sets,) if shapes.step_sets else ()), count or shapes.tasks
    sizes = [(*steps, count, *size[1:]) for size in (shapes.support_x, shapes.support_y)]
    sizes += [(count, *size[1:]) for size in (shapes.query_x, shapes.query_y)]
    parts = (torch.empty(s, dtype=d, device="meta") for s, d in zip(sizes, shapes.dtypes, strict=True))
    return TaskBatch(*parts, each_step=bool(steps))
