"""The reference executor: plain PyTorch, any device, float32 or float64. The truth and the fallback.

Tasks go through in chunks that fit a memory budget. The reverse sweep keeps only ``theta_s`` and computes the
activations of a step again when it gets there, so memory does not grow with the number of inner steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from metafast.executors.base import Executor, rows, sum_to_rate
from metafast.executors.passes import Pass
from metafast.program import Program
from metafast.tasks import Batch

_BUDGET = 2 << 30
_COPIES = 12  # values, saved quantities, adjoints and their tangents alive at once, in units of one pass's values


class ReferenceExecutor(Executor):
    """Every layer, every loss, every device; ``budget`` bounds the bytes of activations alive at once."""

    name = "reference"

    def __init__(self, budget: int = _BUDGET) -> None:
        self.budget = budget

    def refuses(self, program: Program, x: Tensor, masked: bool = False) -> str | None:
        if x.dtype not in (torch.float32, torch.float64):
            return f"dtype {x.dtype}: it runs float32 and float64"
        return None

    def explain(self, program: Program, x: Tensor) -> list[str]:
        return [
            "rules derived by torch.func" if node.layer.stem == "derived" else "hand-written rules in PyTorch"
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
        everything = (True,) * len(program.parameters)
        parts = []
        for chunk in self._chunks(program, batch.x):
            run = Pass(program, theta[chunk], batch.tasks(chunk), step, everything)
            outputs = run.forward()
            losses = run.loss()
            parts.append((losses, run.flat(run.backward()), outputs))
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
            sweep = _ReverseSweep(program, lr, support.tasks(chunk), first_order)
            parts.append(sweep.run(trajectory[:, chunk], v[:, chunk], lr_grad))
        return torch.cat(parts), lr_grad

    def _chunks(self, program: Program, x: Tensor) -> Iterator[slice]:
        tasks = x.shape[0]
        elements = _COPIES * _elements(program, tuple(x.shape[1:]), x.dtype, x.device) + 4 * program.size
        size = max(1, self.budget // (x.element_size() * elements))
        for start in range(0, tasks, size):
            yield slice(start, min(tasks, start + size))



def unrolled(program: Program, theta: Tensor, lr: Tensor, support: Batch, steps: int) -> list[Tensor]:
    """``theta_0 .. theta_S``, each ``[T, P]``. With gradients enabled autograd records it, to any order."""
    wanted = tuple(p.adapted for p in program.parameters)
    stem = Pass(program, theta, support, 0, wanted).forward_stem()
    trajectory = [theta]
    for step, rate in enumerate(rows(lr, steps)):
        run = Pass(program, trajectory[-1], support, step, wanted, stem)
        run.forward()
        run.loss()
        trajectory.append(trajectory[-1] - rate * run.flat(run.backward()))
    return trajectory


class _ReverseSweep:
    """``v <- v - H_s (lr_s v)`` from the last step to the first, for one chunk of tasks."""

    def __init__(self, program: Program, lr: Tensor, support: Batch, first_order: bool) -> None:
        self.program, self.lr, self.support, self.first_order = program, lr, support, first_order
        self.adapted = _adapted(program, lr.device)

    def run(self, trajectory: Tensor, v: Tensor, lr_grad: Tensor | None) -> Tensor:
        """The adjoint of ``theta_0``, ``[T, P]``; adds to ``lr_grad``."""
        program, steps = self.program, trajectory.shape[0] - 1
        everything = (True,) * len(program.parameters)
        first = Pass(program, trajectory[0], self.support, 0, everything)
        stem = first.stem = first.forward_stem()
        adapted = tuple(p.adapted for p in program.parameters)
        carried = v[steps]
        for step in reversed(range(steps)):
            row = min(step, self.lr.shape[0] - 1)
            run = Pass(program, trajectory[step], self.support, step, everything, stem)
            run.forward()
            run.loss()
            run.wanted = adapted if lr_grad is not None else (False,) * len(adapted)
            gradient = run.backward()
            run.wanted = everything
            if lr_grad is not None:
                lr_grad[row] -= sum_to_rate(carried * run.flat(gradient), self.lr.shape[1])
            if not self.first_order and run.push(self.lr[row] * carried * self.adapted) is not None:
                carried = carried - run.flat(run.tangent_backward())
            carried = carried + v[step]
        return carried - first.flat(first.pull_stem()) if stem.adjoint else carried


@functools.lru_cache(maxsize=64)
def _adapted(program: Program, device: torch.device) -> Tensor:
    return program.adapted.to(device)


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
