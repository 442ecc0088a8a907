"""Runs Programs by plain PyTorch on any device, in float32 or float64: the truth for the others, and the fallback.

Tasks are computed in chunks that fit a budget of memory. Of the inner steps only ``theta_s`` is kept; the way back
computes the activations of each step again, so that memory does not grow with the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from metafast.executors.base import ExecutionPlan, Executor
from metafast.executors.by_program import ByProgram
from metafast.executors.reference import by_autograd, inner_loop
from metafast.executors.reference.by_autograd import InnerLoopByAutograd
from metafast.executors.reference.inner_loop import InnerLoopRun
from metafast.executors.steps import Steps
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.program.interpreter import Pass, without_padding
from metafast.tasks import Batch, TaskShapes, parts_of

_BUDGET = 2 << 30  # bytes
_COPIES = 12
"""Memory in use at once, by values, what rules keep, adjoints and tangents, as a multiple of one pass's values."""

Found = TypeVar("Found")


def _as_it_is(program: Program) -> Program:
    return program


class ReferenceExecutor(Executor):
    """Runs every layer and every loss, on every device.

    Args:
        budget: the bytes of activations that may be in use at once.
        max_tasks: the most tasks that are computed at once; ``None`` means as many as the budget allows.
        autograd: whether layers without rules are differentiated twice by autograd rather than by tangents.
        wrap: returns the Program to run in the place of the one that it is given (see ``Executor.observed``).
    """

    name = "reference"

    def __init__(
        self,
        budget: int = _BUDGET,
        max_tasks: int | None = None,
        autograd: bool = True,
        wrap: Callable[[Program], Program] = _as_it_is,
    ) -> None:
        self.budget = budget
        self.max_tasks = max_tasks
        self.autograd = autograd
        self.wrap = wrap

    def observed(self, wrap: Callable[[Program], Program]) -> ReferenceExecutor:
        return ReferenceExecutor(self.budget, self.max_tasks, self.autograd, wrap)

    def plan_own(self, program: Program, loop: InnerLoop, shapes: TaskShapes) -> ExecutionPlan | str:
        if shapes.dtype.is_floating_point and shapes.dtype not in (torch.float32, torch.float64):
            return f"dtype {shapes.dtype}: it runs float32 and float64"
        layers = tuple(
            "differentiated by torch.autograd" if node.layer.kind == "derived" else "hand-written rules in PyTorch"
            for node in program.nodes
        )
        return ExecutionPlan(self, lambda: layers, f"executor {self.name!r} may wait for the host", lambda: None)

    @torch.no_grad()
    def predict(self, program: Program, params: Tensor, x: Any, step: int = 0, seeds: Tensor | None = None) -> Tensor:
        program = self.wrap(program)
        theta = _by_task(params, x)
        nothing = (False,) * len(program.parameters)
        batch = Batch(x, theta, None, seeds)

        def chunk(tasks: slice) -> Tensor:
            return Pass(program, theta[tasks], _samples(batch, tasks), step, nothing).forward()

        return torch.cat(self._in_chunks(program, theta, batch, chunk))

    @torch.no_grad()
    def loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        program = self.wrap(program)
        theta = _by_task(params, batch.x)

        def chunk(tasks: slice) -> tuple[Tensor, Tensor, Tensor]:
            return inner_loop.loss_and_grad(program, theta[tasks], _samples(batch, tasks), step)

        parts = self._in_chunks(program, theta, batch, chunk)
        losses, grads, outputs = (torch.cat(part) for part in zip(*parts, strict=True))
        return losses, grads, outputs

    @torch.no_grad()
    def adapt(self, program: Program, loop: InnerLoop, params: Tensor, rates: Tensor, support: Batch) -> Tensor:
        program = self.wrap(program)
        loop = loop._replace(first_order=True, learns_rates=False)  # so that nothing is kept for a way back
        start = Steps(program, loop, rates).start(params, support.at(0).x.shape[0])

        def chunk(tasks: slice) -> Tensor:
            return torch.stack(InnerLoopRun(program, loop, rates, _samples(support, tasks)).adapt(start[tasks]))

        return torch.cat(self._in_chunks(program, start[:, : program.size], support, chunk), 1)

    @torch.no_grad()
    def adapt_vjp(
        self, program: Program, loop: InnerLoop, trajectory: Tensor, rates: Tensor, support: Batch, v: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if loop.first_order and not loop.learns_rates and loop.rule is None:
            return v.sum(0) if v.dim() == 3 else v, None
        program = self.wrap(program)
        rates_grad = torch.zeros_like(rates) if loop.learns_rates else None
        way_back = InnerLoopByAutograd if self._by_autograd(program) else InnerLoopRun

        def chunk(tasks: slice) -> Tensor:
            run = way_back(program, loop, rates, _samples(support, tasks))
            adjoints = [None] * loop.steps + [v[tasks]] if v.dim() == 2 else v[:, tasks].unbind(0)
            grad = run.reverse(trajectory[:, tasks].unbind(0), adjoints)
            if rates_grad is not None and run.steps.rates_grad is not None:
                rates_grad.add_(run.steps.rates_grad)
            return grad

        return torch.cat(self._in_chunks(program, trajectory[0, :, : program.size], support, chunk)), rates_grad

    @torch.no_grad()
    def hvp(self, program: Program, params: Tensor, batch: Batch, u: Tensor, step: int = 0) -> Tensor:
        program = self.wrap(program)
        theta = _by_task(params, batch.x)
        u = _by_task(u, batch.x)
        hvp = by_autograd.hvp if self._by_autograd(program) else inner_loop.hvp

        def chunk(tasks: slice) -> Tensor:
            return hvp(program, theta[tasks], _samples(batch, tasks), u[tasks], step)

        return torch.cat(self._in_chunks(program, theta, batch, chunk))

    @torch.no_grad()
    def outputs_vjp(self, program: Program, params: Tensor, batch: Batch, g: Tensor, step: int = 0) -> Tensor:
        program = self.wrap(program)
        theta = _by_task(params, batch.x)
        compute = super().outputs_vjp

        def chunk(tasks: slice) -> Tensor:
            return compute(program, theta[tasks], _samples(batch, tasks), g[tasks], step)

        return torch.cat(self._in_chunks(program, theta, batch, chunk))

    def _by_autograd(self, program: Program) -> bool:
        """Says whether second derivatives come from the graph of the gradient, because some layer has no rules."""
        return self.autograd and bool(program.derived)

    def _in_chunks(
        self, program: Program, theta: Tensor, batch: Batch, compute: Callable[[slice], Found]
    ) -> list[Found]:
        """Calls ``compute`` for one range of tasks after another, and returns what it returns."""
        return [compute(tasks) for tasks in self._chunks(program, theta, batch)]

    def _chunks(self, program: Program, theta: Tensor, batch: Batch) -> Iterator[slice]:
        """Yields ranges of tasks that fit into the budget."""
        tasks = theta.shape[0]
        elements = _COPIES * _elements(program, theta, batch.at(0)) + 4 * program.size
        size = min(max(1, self.budget // (theta.element_size() * elements)), self.max_tasks or tasks)
        for start in range(0, tasks, size):
            yield slice(start, min(tasks, start + size))


_COUNTS: ByProgram[int] = ByProgram()


def _elements(program: Program, theta: Tensor, batch: Batch) -> int:
    """Counts the elements of all values of a pass on one task of ``batch`` at ``theta [T, P]``, by running one.

    It runs on numbers that the model is meant for: zeros are no ids that count from one, and have no inverse.
    """

    def count(program: Program, key: Any) -> int:
        one = slice(0, 1)
        run = Pass(program, theta[one], _samples(batch, one), 0, (False,) * len(program.parameters))
        run.forward()
        return sum(value.numel() for value in run.values.values() if isinstance(value, Tensor))

    key = (theta.dtype, theta.device, *((part.shape[1:], part.dtype) for part in parts_of(batch.x)))
    return _COUNTS.of(program, key, count)


def _by_task(params: Tensor, x: Any) -> Tensor:
    """Returns ``params [P]`` or ``[T, P]`` as ``[T, P]``, for the T tasks of ``x``."""
    return params.expand(x.shape[0], -1) if params.dim() == 1 else params


def _samples(batch: Batch, tasks: slice) -> Batch:
    """Returns the samples of a range of tasks, with nothing in the place of padding that could reach a result."""
    return without_padding(batch.tasks(tasks))
