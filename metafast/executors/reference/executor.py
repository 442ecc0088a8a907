"""The reference executor: plain PyTorch, any device, float32 or float64. The truth and the fallback.

Tasks go through in chunks that fit a memory budget. The reverse sweep keeps only ``theta_s`` and computes the
activations of a step again when it gets there, so memory does not grow with the number of inner steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from metafast.executors.base import Executor
from metafast.executors.reference.inner_loop import InnerLoopRun, query, unrolled
from metafast.program import Program
from metafast.program.interpreter import Pass
from metafast.tasks import Batch

_BUDGET = 2 << 30
_COPIES = 12  # values, saved quantities, adjoints and their tangents alive at once, in units of one pass's values


class ReferenceExecutor(Executor):
    """Every layer, every loss, every device; ``budget`` bounds the bytes of activations alive at once, ``most`` the
    tasks."""

    name = "reference"

    def __init__(self, budget: int = _BUDGET, most: int | None = None) -> None:
        self.budget, self.most = budget, most

    def refuses(self, program: Program, x: Tensor, masked: bool = False, queries: int | None = None) -> str | None:
        if x.dtype not in (torch.float32, torch.float64):
            return f"dtype {x.dtype}: it runs float32 and float64"
        return None

    def explain(self, program: Program, x: Tensor) -> list[str]:
        return [
            "rules derived by torch.func" if node.layer.kind == "derived" else "hand-written rules in PyTorch"
            for node in program.nodes
        ]

    @torch.no_grad()
    def predict(self, program: Program, params: Tensor, x: Tensor, step: int = 0) -> Tensor:
        theta = _by_task(params, x)
        nothing = (False,) * len(program.parameters)
        parts = []
        for chunk in self._chunks(program, x):
            batch = Batch(x[chunk], x[chunk])
            parts.append(Pass(program, theta[chunk], batch, step, nothing).forward())
        return torch.cat(parts)

    @torch.no_grad()
    def loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        theta = _by_task(params, batch.x)
        parts = []
        for chunk in self._chunks(program, batch.x):
            parts.append(query(program, theta[chunk], batch.tasks(chunk), step))
        losses, grads, outputs = (torch.cat(part) for part in zip(*parts, strict=True))
        return losses, grads, outputs

    @torch.no_grad()
    def adapt(self, program: Program, params: Tensor, lr: Tensor, support: Batch, steps: int) -> Tensor:
        theta = _by_task(params, support.x)
        chunks = [
            torch.stack(unrolled(program, theta[chunk], lr, support.tasks(chunk), steps))
            for chunk in self._chunks(program, support.x)
        ]
        return torch.cat(chunks, 1)

    @torch.no_grad()
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
        if v.dim() == 2:
            v = torch.cat([v.new_zeros(trajectory.shape[0] - 1, *v.shape), v[None]])
        if first_order and not needs_lr:
            return v.sum(0), None
        lr_grad = torch.zeros_like(lr) if needs_lr else None
        parts = []
        for chunk in self._chunks(program, support.x):
            sweep = InnerLoopRun(program, lr, support.tasks(chunk), first_order=first_order, needs_lr=needs_lr)
            parts.append(sweep.reverse(trajectory[:, chunk].unbind(0), v[:, chunk].unbind(0)))
            if lr_grad is not None and sweep.lr_grad is not None:
                lr_grad += sweep.lr_grad
        return torch.cat(parts), lr_grad

    def _chunks(self, program: Program, x: Tensor) -> Iterator[slice]:
        tasks = x.shape[0]
        elements = _COPIES * _elements(program, tuple(x.shape[1:]), x.dtype, x.device) + 4 * program.size
        size = min(max(1, self.budget // (x.element_size() * elements)), self.most or tasks)
        for start in range(0, tasks, size):
            yield slice(start, min(tasks, start + size))


@functools.lru_cache(maxsize=64)
def _elements(program: Program, sample: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> int:
    """Elements of all node outputs for one task's batch ``[n, ...]``, found by running one."""
    x = torch.zeros(1, *sample, dtype=dtype, device=device)
    theta = torch.zeros(1, program.size, dtype=dtype, device=device)
    run = Pass(program, theta, Batch(x, x), 0, (False,) * len(program.parameters))
    run.forward()
    return sum(value.numel() for value in run.values.values())


def _by_task(params: Tensor, x: Tensor) -> Tensor:
    return params.expand(x.shape[0], -1) if params.dim() == 1 else params
