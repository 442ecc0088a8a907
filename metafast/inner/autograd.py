"""Puts the inner loop into autograd by two thin Functions, each of which can be differentiated once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafast.executors import Executor
from metafast.executors.reference.inner_loop import InnerLoopRun
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.program.interpreter import Pass
from metafast.tasks import Batch, TaskBatch

_ONLY_ONCE = (
    "a meta-gradient of metafast can be differentiated once: it is computed by a way back that records no graph. "
    "For higher orders call learner(tasks, create_graph=True): it records the reference path, which has every order"
)
_STATISTICS_CHANGED = (
    "the running statistics of batch norm have changed since learner(tasks) was called; call loss.backward() before "
    "the next batch, or use learner.backward(tasks), which does both"
)


class _Once(torch.autograd.Function):
    """Returns a gradient unchanged; differentiating it raises an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_ONLY_ONCE)


def _once(gradient: Tensor | None, *sources: Tensor) -> Tensor | None:
    """Ties a gradient to the tensors that it depends on, so that differentiating it again raises an error.

    Without this tie autograd would take the gradient for a constant, and leave a term out silently.
    """
    if gradient is None or not torch.is_grad_enabled():
        return gradient
    return _Once.apply(gradient, *sources)


def _versions(program: Program) -> list[int]:
    """Lists how often each constant of the program has been written to."""
    return [constant._version for node in program.nodes for constant in node.constants]


class Adapt(torch.autograd.Function):
    """Takes the inner steps ``theta_{s+1} = theta_s - alpha_s grad L(theta_s)`` from ``theta_0 [P]``.

    It returns ``theta_1 .. theta_S``, each ``[T, P]``. Gradients go to ``theta_0`` and to the rates ``alpha``.

    Raises:
        RuntimeError: the gradient is differentiated again, or running statistics have changed before ``backward``.
    """

    @staticmethod
    def forward(
        ctx: Any, params: Tensor, rates: Tensor, executor: Executor, program: Program, loop: InnerLoop, support: Batch
    ) -> tuple[Tensor, ...]:
        trajectory = executor.adapt(program, loop, params.detach(), rates.detach(), support)
        ctx.save_for_backward(params, rates, trajectory)
        ctx.versions = _versions(program)
        ctx.executor = executor
        ctx.program = program
        ctx.loop = loop
        ctx.support = support
        ctx.set_materialize_grads(False)
        return trajectory.unbind(0)[1:]

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor | None) -> Any:
        params, rates, trajectory = ctx.saved_tensors
        if ctx.versions != _versions(ctx.program):
            raise RuntimeError(_STATISTICS_CHANGED)
        v = torch.zeros_like(trajectory)
        for step, adjoint in enumerate(adjoints):
            if adjoint is not None:
                v[step + 1] = adjoint.detach()
        loop = ctx.loop._replace(learns_rates=ctx.needs_input_grad[1])
        grad, rates_grad = ctx.executor.adapt_vjp(ctx.program, loop, trajectory, rates.detach(), ctx.support, v)
        sources = (params, rates, *(a for a in adjoints if a is not None))
        return _once(grad.sum(0), *sources), _once(rates_grad, *sources), None, None, None, None


class TaskLoss(torch.autograd.Function):
    """Computes ``losses [T]`` and ``outputs [T, m, ...]`` of the query sets at ``theta [T, P]``.

    Gradients go from the losses to ``theta``; the outputs carry none.

    Raises:
        RuntimeError: the gradient is differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, executor: Executor, program: Program, query: Batch, step: int
    ) -> tuple[Tensor, Tensor]:
        losses, grad, outputs = executor.loss_and_grad(program, theta.detach(), query, step)
        ctx.save_for_backward(theta, grad)
        ctx.mark_non_differentiable(outputs)
        return losses, outputs

    @staticmethod
    def backward(ctx: Any, g_losses: Tensor, g_outputs: Tensor) -> Any:
        theta, grad = ctx.saved_tensors
        return _once(grad * g_losses.detach()[:, None], theta, g_losses), None, None, None, None


def recorded(
    program: Program, loop: InnerLoop, params: Tensor, rates: Tensor, tasks: TaskBatch
) -> tuple[Tensor, Tensor]:
    """Computes losses ``[T]`` and outputs ``[T, m, ...]`` while autograd records every inner step.

    The results can be differentiated to any order. ``params`` are ``[P]``, ``rates [1 or S, 1 or P]``.
    """
    unrolled = loop._replace(first_order=True, learns_rates=False)  # autograd itself goes the way back
    trajectory = InnerLoopRun(program, unrolled, rates, tasks.support).adapt(params.expand(len(tasks), -1))
    nothing = (False,) * len(program.parameters)
    losses = params.new_zeros(len(tasks))
    for step, weight in loop.judged_steps:
        run = Pass(program.query, trajectory[step], tasks.query, step, nothing)
        outputs = run.forward()
        losses = losses + weight * run.loss()
    return losses, outputs
