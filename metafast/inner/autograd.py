"""The inner loop in autograd: two thin Functions, each differentiable once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafast.executors import Executor
from metafast.executors.reference.inner_loop import unrolled
from metafast.program import Program
from metafast.program.interpreter import Pass
from metafast.tasks import Batch, TaskBatch

_ONCE = (
    "a meta-gradient of metafast can be differentiated once: it is computed by a sweep that records no graph. "
    "For higher orders call learner(tasks, create_graph=True): it records the reference path, which has every order"
)
_MOVED = (
    "the running statistics of batch norm have changed since learner(tasks) was called; call loss.backward() before "
    "the next batch, or use learner.backward(tasks), which does both"
)


class _Once(torch.autograd.Function):
    """Identity on a gradient; differentiating it raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_ONCE)


def _once(gradient: Tensor | None, *sources: Tensor) -> Tensor | None:
    """Ties a gradient to what it depends on, so that a second differentiation raises instead of finding nothing."""
    if gradient is None or not torch.is_grad_enabled():
        return gradient
    return _Once.apply(gradient, *sources)


def _versions(program: Program) -> list[int]:
    return [constant._version for node in program.nodes for constant in node.constants]


class Adapt(torch.autograd.Function):
    """``theta_0 [P], lr -> theta_1 .. theta_S``, each ``[T, P]``: ``theta_{s+1} = theta_s - lr_s grad L(theta_s)``."""

    @staticmethod
    def forward(
        ctx: Any, params: Tensor, lr: Tensor, executor: Executor, program: Program, support: Batch, steps: int,
        first_order: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        trajectory = executor.adapt(program, params.detach(), lr.detach(), support, steps)
        ctx.save_for_backward(params, lr, trajectory)
        ctx.versions = _versions(program)
        ctx.executor, ctx.program, ctx.support, ctx.first_order = executor, program, support, first_order
        ctx.set_materialize_grads(False)
        return trajectory.unbind(0)[1:]

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor | None) -> Any:
        params, lr, trajectory = ctx.saved_tensors
        if ctx.versions != _versions(ctx.program):
            raise RuntimeError(_MOVED)
        v = torch.zeros_like(trajectory)
        for step, adjoint in enumerate(adjoints):
            if adjoint is not None:
                v[step + 1] = adjoint.detach()
        needs_lr = ctx.needs_input_grad[1]
        grad, lr_grad = ctx.executor.adapt_vjp(
            ctx.program, trajectory, lr.detach(), ctx.support, v, first_order=ctx.first_order, needs_lr=needs_lr
        )
        sources = (params, lr, *(a for a in adjoints if a is not None))
        return _once(grad.sum(0), *sources), _once(lr_grad, *sources), None, None, None, None, None


class TaskLoss(torch.autograd.Function):
    """``theta [T, P] -> losses [T], outputs [T, m, ...]`` on the query batch. The outputs carry no gradient."""

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
    program: Program, params: Tensor, lr: Tensor, tasks: TaskBatch, steps: int, weights: list[float]
) -> tuple[Tensor, Tensor]:
    """Losses ``[T]`` and outputs, with the unrolled computation recorded by autograd: every order of derivative."""
    trajectory = unrolled(program, params.expand(len(tasks), -1), lr, tasks.support, steps)
    nothing = (False,) * len(program.parameters)
    losses, outputs = params.new_zeros(len(tasks)), None
    for step, weight in enumerate(weights):
        if weight != 0 or step == steps:
            run = Pass(program, trajectory[step], tasks.query, step, nothing)
            outputs = run.forward()
            losses = losses + weight * run.loss()
    assert outputs is not None  # the last step always runs
    return losses, outputs
