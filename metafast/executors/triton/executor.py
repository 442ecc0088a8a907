"""The Triton executor: the shared sweep over layers that run as kernels over (task, tile) on an NVIDIA GPU.

For networks too large for one thread block. Parameters and images are put into the kernels' memory order on the way
in and back on the way out; in between the sweep is that of the reference executor.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metafast.executors.base import Executor, MetaGradient, query_weights
from metafast.executors.cuda_graphs import Graphs, Results
from metafast.executors.memory import Plan, choose_plan, peak_bytes
from metafast.executors.reference.executor import ReferenceExecutor
from metafast.executors.reference.inner_loop import MetaStep
from metafast.kernels.batch_norm import BatchNorm
from metafast.program import Program
from metafast.tasks import Batch, TaskBatch

if TYPE_CHECKING:
    from metafast.executors.triton.lowering import Lowered

PRECISIONS = {
    "float32": "three TF32 products for each, as exact as float32",
    "tf32": "operands of products rounded to 11 bits",
    "bf16": "activations and operands of products rounded to 8 bits",
}
_BUDGET = 2 << 30  # bytes, where there is no GPU to ask
_PLANS = 64  # that are remembered


class TritonExecutor(Executor):
    """Every model, layer by layer; layers without kernels of their own run by their PyTorch rules.

    Args:
        precision: of the operands of products, and with ``bf16`` of the activations in memory; parameters, statistics
            and sums are float32 always. TF32 and bf16 put a meta-gradient of several steps off by several per cent and
            more.
        interpreted: take batches on the CPU too, where kernels run one program after another, to be tested. That
            needs TRITON_INTERPRET=1 in the environment before Triton is imported.
        budget: bytes of activations alive at once; ``None``: half of the GPU's memory.
    """

    name = "triton"
    proven = False

    def __init__(self, precision: str = "float32", interpreted: bool = False, budget: int | None = None) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} is unknown; choose from {list(PRECISIONS)}")
        self.precision, self.interpreted, self.budget = precision, interpreted, budget
        self.graphs = Graphs()
        self.plans: dict[tuple[object, ...], Plan] = {}
        self.others: dict[str, TritonExecutor] = {precision: self}

    def at(self, precision: str) -> TritonExecutor | None:
        if precision not in PRECISIONS:
            return None
        if precision not in self.others:
            self.others[precision] = TritonExecutor(precision, self.interpreted, self.budget)
        return self.others[precision]

    def refuses(self, program: Program, x: Tensor, masked: bool = False, queries: int | None = None) -> str | None:
        if x.dtype != torch.float32:
            return f"dtype {x.dtype}: it runs float32"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 'metafast[triton]'"
        if not x.is_cuda and not self.interpreted:
            return f"the batch is on {x.device}: it needs an NVIDIA GPU"
        if masked and any(isinstance(n.layer, BatchNorm) and not n.layer.fixed_statistics for n in program.nodes):
            return "ragged tasks in a batch norm that measures its statistics"
        derived = _derived(program)
        if self.precision == "bf16" and derived:
            return f"precision='bf16' needs kernels for every layer and the loss, and {derived!r} has none"
        return None

    def unrecordable(self, program: Program) -> str | None:
        derived = _derived(program)
        return derived if derived is None else f"{derived}: a function of PyTorch's or the user's that may read values"

    def explain(self, program: Program, x: Tensor) -> list[str]:
        return [f"{note} ({self.precision})" for note in self._lowered(program, x).notes]

    def memory_plan(self, program: Program, support_x: Tensor, query_x: Tensor, steps: int) -> str:
        if _derived(program):
            return "measured on one task when the first batch comes"
        lowered = self._lowered(program, support_x)
        step = MetaStep(lowered.program, steps, query_weights(None, steps), first_order=False, needs_lr=False)
        parts = [(x, x.new_empty(x.shape[:2], dtype=torch.int64)) for x in (support_x, query_x)]
        return str(self._plan(step, lowered.max_tasks, support_x.new_empty(1, 1), TaskBatch(*parts[0], *parts[1])))

    def predict(self, program: Program, params: Tensor, x: Tensor, step: int = 0) -> Tensor:
        lowered = self._lowered(program, x)
        with _on(x):
            return self._sweep(lowered, x).predict(lowered.program, lowered.pack(params), self._enter(x), step).float()

    def loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        lowered = self._lowered(program, batch.x)
        packed, sweep = lowered.pack(params), self._sweep(lowered, batch.x)
        with _on(batch.x):
            losses, grad, outputs = sweep.loss_and_grad(lowered.program, packed, self._entered(batch), step)
        return losses, lowered.unpack(grad), outputs.float()

    def adapt(self, program: Program, params: Tensor, lr: Tensor, support: Batch, steps: int) -> Tensor:
        lowered = self._lowered(program, support.x)
        packed, rates, sweep = lowered.pack(params), _pack_rates(lowered, lr), self._sweep(lowered, support.x)
        with _on(support.x):
            return lowered.unpack(sweep.adapt(lowered.program, packed, rates, self._entered(support), steps))

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
        lowered = self._lowered(program, support.x)
        with _on(support.x):
            grad, lr_grad = self._sweep(lowered, support.x).adapt_vjp(
                lowered.program, lowered.pack(trajectory), _pack_rates(lowered, lr), self._entered(support),
                lowered.pack(v), first_order=first_order, needs_lr=needs_lr,
            )  # fmt: skip
        return lowered.unpack(grad), _unpack_rates(lowered, lr_grad)

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
        lowered = self._lowered(program, tasks.support_x)
        step = MetaStep(lowered.program, steps, query_weights(step_weights, steps), first_order, needs_lr)
        plan = self._plan(step, lowered.max_tasks, lr, tasks)

        def compute(params: Tensor, lr: Tensor, *parts: Any) -> Results:
            found = self._in_chunks(step, plan, lowered.pack(params), _pack_rates(lowered, lr), TaskBatch(*parts))
            lr_grad = _unpack_rates(lowered, found.lr_grad)
            results = found.losses, found.outputs.float(), lowered.unpack(found.grad)
            return results if lr_grad is None else (*results, lr_grad)

        parts = (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)
        with torch.no_grad(), _on(tasks.support_x):
            if _recordable(lowered.program, tasks):
                found = self.graphs.run((step, plan), compute, (params, lr, *parts))
            else:
                found = compute(params, lr, *parts, tasks.support_mask, tasks.query_mask)
        losses, outputs, grad, *lr_grad = found
        return MetaGradient(losses, outputs, grad, lr_grad[0] if lr_grad else None)

    def _in_chunks(self, step: MetaStep, plan: Plan, params: Tensor, lr: Tensor, tasks: TaskBatch) -> MetaGradient:
        parts = []
        for chunk in plan.chunks(len(tasks)):
            some = tasks.tasks(chunk)
            batches = self._entered(some.support), self._entered(some.query)
            parts.append(step.run(params, lr, *batches, share=1 / len(tasks), keep=plan.keep))
        if len(parts) == 1:
            return parts[0]
        losses, outputs = (torch.cat([getattr(p, name) for p in parts]) for name in ("losses", "outputs"))
        grad = torch.stack([p.grad for p in parts]).sum(0)
        lr_grads = [p.lr_grad for p in parts if p.lr_grad is not None]
        return MetaGradient(losses, outputs, grad, torch.stack(lr_grads).sum(0) if lr_grads else None)

    def _plan(self, step: MetaStep, most: int, lr: Tensor, tasks: TaskBatch) -> Plan:
        """The plan for batches of these shapes, with at most ``most`` tasks at once."""
        x, q = tasks.support_x, tasks.query_x
        shapes = (x.shape, q.shape, tasks.support_y.shape, tasks.query_y.shape, lr.shape, x.device)
        key = (step.program, step.steps, tuple(w != 0 for w in step.weights), step.first_order, step.needs_lr, shapes)
        if key not in self.plans:
            if len(self.plans) >= _PLANS:
                self.plans.clear()
            with torch.no_grad(), _on(x):
                peak = functools.partial(self._peak, step, lr, tasks)
                self.plans[key] = choose_plan(peak, len(tasks), self._budget(x), most)
        return self.plans[key]

    def _peak(self, step: MetaStep, lr: Tensor, tasks: TaskBatch, chunk: int, keep: bool) -> int:
        """Bytes at the peak for ``chunk`` tasks, from a run without memory; where rules derived by torch.func or a
        user's own loss might look at values, from a run of one task."""
        if _derived(step.program):
            some, lr, copies = tasks.tasks(slice(0, 1)), lr.detach(), chunk
        else:
            some, lr, copies = _shapes(tasks, chunk), torch.empty_like(lr, device="meta"), 1
        params = torch.zeros(step.program.size, device=lr.device)
        rates = lr if lr.shape[-1] == 1 else params.expand(*lr.shape[:-1], -1)
        batches = self._entered(some.support), self._entered(some.query)
        return copies * peak_bytes(lambda: step.run(params, rates, *batches, share=1.0, keep=keep))

    def _budget(self, x: Tensor) -> int:
        if self.budget is not None:
            return self.budget
        return torch.cuda.get_device_properties(x.device).total_memory // 2 if x.is_cuda else _BUDGET

    def _sweep(self, lowered: Lowered, x: Tensor) -> ReferenceExecutor:
        return ReferenceExecutor(self._budget(x), lowered.max_tasks)

    def _lowered(self, program: Program, x: Tensor) -> Lowered:
        from metafast.executors.triton.lowering import lower

        return lower(program, self.precision, x.device)

    def _enter(self, x: Tensor) -> Tensor:
        """Images ``[T,n,C,H,W]`` with their memory in the order ``[T,n,H,W,C]``, in the type that activations have."""
        x = x.to(torch.bfloat16) if self.precision == "bf16" else x
        return x.movedim(2, -1).contiguous().movedim(-1, 2) if x.dim() == 5 else x

    def _entered(self, batch: Batch) -> Batch:
        return Batch(self._enter(batch.x), batch.y, batch.mask)


def _on(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Kernels are launched on the current device: makes it that of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _derived(program: Program) -> str | None:
    """The first node, or the loss, whose rules run a function of PyTorch's or the user's that we do not know."""
    names = [node.name for node in program.nodes if node.layer.kind == "derived"]
    return next(iter(names), "loss" if program.loss.kind == "custom_loss" else None)


def _recordable(program: Program, tasks: TaskBatch) -> bool:
    """Does the meta-step run on a GPU by kernels alone, whose addresses stay what they are?"""
    if not tasks.support_x.is_cuda or tasks.support_mask is not None or tasks.query_mask is not None:
        return False
    return _derived(program) is None and not any(node.constants for node in program.nodes)


def _shapes(tasks: TaskBatch, count: int) -> TaskBatch:
    """``count`` tasks alike, without memory and padding."""
    parts = (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)
    return TaskBatch(*(torch.empty(count, *x.shape[1:], dtype=x.dtype, device="meta") for x in parts))


def _pack_rates(lowered: Lowered, lr: Tensor) -> Tensor:
    return lr if lr.shape[-1] == 1 else lowered.pack(lr)


def _unpack_rates(lowered: Lowered, lr_grad: Tensor | None) -> Tensor | None:
    return lr_grad if lr_grad is None or lr_grad.shape[-1] == 1 else lowered.unpack(lr_grad)
