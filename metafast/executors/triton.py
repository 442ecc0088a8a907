"""The Triton executor: the shared sweep over layers that run as kernels over (task, tile) on an NVIDIA GPU.

For networks too large for one thread block. Parameters and images are put into the kernels' memory order on the way
in and back on the way out; in between the sweep is that of the reference executor.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metafast.executors.base import Executor, MetaGradient
from metafast.executors.graphs import Graphs, Results
from metafast.executors.reference import ReferenceExecutor
from metafast.kernels.batch_norm import BatchNorm
from metafast.program import Program
from metafast.tasks import Batch, TaskBatch

if TYPE_CHECKING:
    from metafast.executors.lowering import Lowered

PRECISIONS = {
    "float32": "three TF32 products for each, as exact as float32",
    "tf32": "operands of products rounded to 11 bits",
    "bf16": "operands of products rounded to 8 bits",
}


class TritonExecutor(Executor):
    """Every model, layer by layer; layers without kernels of their own run by their PyTorch rules.

    Args:
        precision: of the operands of products; sums are float32 always. TF32 and bf16 put a meta-gradient of several
            steps off by several per cent and more.
        interpreted: take batches on the CPU too, where kernels run one program after another, to be tested. That
            needs TRITON_INTERPRET=1 in the environment before Triton is imported.
    """

    name = "triton"
    proven = False

    def __init__(self, precision: str = "float32", interpreted: bool = False) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} is unknown; choose from {list(PRECISIONS)}")
        self.precision, self.interpreted = precision, interpreted
        self.graphs = Graphs()

    def refuses(self, program: Program, x: Tensor, masked: bool = False) -> str | None:
        if x.dtype != torch.float32:
            return f"dtype {x.dtype}: it runs float32"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install triton"
        if not x.is_cuda and not self.interpreted:
            return f"the batch is on {x.device}: it needs an NVIDIA GPU"
        if masked and any(isinstance(n.layer, BatchNorm) and not n.layer.given for n in program.nodes):
            return "ragged tasks in a batch norm that measures its statistics"
        return None

    def explain(self, program: Program, x: Tensor) -> list[str]:
        return [f"{note} ({self.precision})" for note in self._lowered(program, x).notes]

    def predict(self, program: Program, params: Tensor, x: Tensor, step: int = 0) -> Tensor:
        lowered = self._lowered(program, x)
        return _sweep(x.device).predict(lowered.program, lowered.pack(params), _pixels_last(x), step)

    def loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        lowered = self._lowered(program, batch.x)
        packed, sweep = lowered.pack(params), _sweep(batch.x.device)
        losses, grad, outputs = sweep.loss_and_grad(lowered.program, packed, _enter(batch), step)
        return losses, lowered.unpack(grad), outputs

    def adapt(self, program: Program, params: Tensor, lr: Tensor, support: Batch, steps: int) -> Tensor:
        lowered = self._lowered(program, support.x)
        packed, rates, sweep = lowered.pack(params), _pack_rates(lowered, lr), _sweep(support.x.device)
        return lowered.unpack(sweep.adapt(lowered.program, packed, rates, _enter(support), steps))

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
        grad, lr_grad = _sweep(support.x.device).adapt_vjp(
            lowered.program, lowered.pack(trajectory), _pack_rates(lowered, lr), _enter(support), lowered.pack(v),
            first_order=first_order, needs_lr=needs_lr,
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

        def compute(params: Tensor, lr: Tensor, tasks: TaskBatch) -> MetaGradient:
            found = _sweep(params.device).meta_gradient(
                lowered.program, lowered.pack(params), _pack_rates(lowered, lr), _enter_all(tasks), steps,
                step_weights=step_weights, first_order=first_order, needs_lr=needs_lr,
            )  # fmt: skip
            lr_grad = _unpack_rates(lowered, found.lr_grad)
            return MetaGradient(found.losses, found.outputs, lowered.unpack(found.grad), lr_grad)

        if not _recordable(lowered.program, tasks):
            return compute(params, lr, tasks)

        def on_tensors(params: Tensor, lr: Tensor, *parts: Tensor) -> Results:
            found = compute(params, lr, TaskBatch(*parts))
            return (found.losses, found.outputs, found.grad) + (() if found.lr_grad is None else (found.lr_grad,))

        key = (program, steps, None if step_weights is None else tuple(step_weights), first_order, needs_lr)
        parts = (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)
        losses, outputs, grad, *lr_grad = self.graphs.run(key, on_tensors, (params, lr, *parts))
        return MetaGradient(losses, outputs, grad, lr_grad[0] if lr_grad else None)

    def _lowered(self, program: Program, x: Tensor) -> Lowered:
        from metafast.executors.lowering import lower

        return lower(program, self.precision, x.device)


@functools.lru_cache
def _sweep(device: torch.device) -> ReferenceExecutor:
    """The sweep, with half of the GPU's memory for the activations of the tasks that go through at once."""
    if device.type != "cuda":
        return ReferenceExecutor()
    return ReferenceExecutor(torch.cuda.get_device_properties(device).total_memory // 2)


def _recordable(program: Program, tasks: TaskBatch) -> bool:
    """Does the meta-step run on a GPU by kernels alone, whose addresses stay what they are?"""
    if not tasks.support_x.is_cuda or tasks.support_mask is not None or tasks.query_mask is not None:
        return False
    derived = any(node.layer.stem == "derived" for node in program.nodes) or program.loss.stem == "custom_loss"
    return not derived and not any(node.constants for node in program.nodes)


def _pixels_last(x: Tensor) -> Tensor:
    """Images ``[T,n,C,H,W]`` with their memory in the order ``[T,n,H,W,C]``."""
    return x.movedim(2, -1).contiguous().movedim(-1, 2) if x.dim() == 5 else x


def _enter(batch: Batch) -> Batch:
    return Batch(_pixels_last(batch.x), batch.y, batch.mask)


def _enter_all(tasks: TaskBatch) -> TaskBatch:
    support_x, query_x = _pixels_last(tasks.support_x), _pixels_last(tasks.query_x)
    return replace(tasks, support_x=support_x, query_x=query_x)


def _pack_rates(lowered: Lowered, lr: Tensor) -> Tensor:
    return lr if lr.shape[-1] == 1 else lowered.pack(lr)


def _unpack_rates(lowered: Lowered, lr_grad: Tensor | None) -> Tensor | None:
    return lr_grad if lr_grad is None or lr_grad.shape[-1] == 1 else lowered.unpack(lr_grad)
