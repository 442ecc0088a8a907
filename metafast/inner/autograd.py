"""Puts the inner loop into autograd by two thin Functions: one goes forward, and its gradient is the other.

The second one cannot be differentiated, and says so: its way back records no graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafast.executors import Executor
from metafast.inner.autocast import in_own_dtype
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.tasks import Samples, TaskBatch

ONLY_ONCE = (
    "a meta-gradient of metafast can be differentiated once: it is computed by a way back that records no graph. "
    "For higher orders call learner(tasks, create_graph=True): it records the reference path, which has every order"
)
STATISTICS_CHANGED = (
    "the running statistics of batch norm have changed since learner(tasks) was called; call loss.backward() before "
    "the next batch, or use learner.backward(tasks), which does both"
)
_NO_FORWARD_MODE = (
    "a learner's loss has no derivative in forward mode: its inner loop is fused. Use reverse mode (torch.autograd, "
    "torch.func.grad or torch.func.vjp), or call learner(tasks, create_graph=True), which records plain operations"
)
NO_MAPPING = (
    "a learner's loss cannot be mapped over a further axis: all tasks of a batch are computed together already. Put "
    "what is to be mapped on the task axis of one TaskBatch, or call the learner in a loop"
)


class Evaluation(NamedTuple):
    """Holds what the way forward computes, and what the way back needs of it.

    Attributes:
        losses: ``[T]``, the weighted sum over steps of each task's query losses.
        outputs: ``[T, m, ...]``, of the query sets after the last step.
        trajectory: ``theta_0 .. theta_S``, ``[S+1, T, P]``.
        query_grads: ``[J, T, P]``, the gradients of the query losses at the J steps that are judged.
    """

    losses: Tensor
    outputs: Tensor
    trajectory: Tensor
    query_grads: Tensor


@in_own_dtype
def evaluate(
    executor: Executor, program: Program, loop: InnerLoop, theta: Tensor, rates: Tensor, tasks: TaskBatch
) -> Evaluation:
    """Adapts from ``theta [P]`` at the rates ``[1 or S, 1 or P]``, and judges on the query sets; no graph is kept."""
    trajectory = executor.adapt(program, loop, theta.detach(), rates.detach(), tasks.support)
    losses = theta.new_zeros(len(tasks))
    grads = []
    for step, weight in loop.judged_steps:
        loss, grad, outputs = executor.loss_and_grad(program.query, trajectory[step], tasks.query, step)
        losses = losses + weight * loss
        grads.append(grad)
    return Evaluation(losses.detach(), outputs.detach(), trajectory, torch.stack(grads))


@in_own_dtype
def way_back(
    executor: Executor,
    program: Program,
    loop: InnerLoop,
    rates: Tensor,
    tasks: TaskBatch,
    found: tuple[Tensor, Tensor],
    adjoints: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor | None]:
    """Computes the adjoints of ``theta [P]`` and of the rates, ``None`` where the loop does not learn them.

    ``found`` are the trajectory and the query gradients of an ``Evaluation``, and ``adjoints`` those of its losses and
    of its outputs; ``None`` is zero.
    """
    trajectory, query_grads = found
    g_losses, g_outputs = adjoints
    v = torch.zeros_like(trajectory)
    if g_losses is not None:
        for (step, weight), grad in zip(loop.judged_steps, query_grads, strict=True):
            v[step] = grad * (weight * g_losses)[:, None]
    if g_outputs is not None:
        v[-1] += executor.outputs_vjp(program.query, trajectory[-1], tasks.query, g_outputs, loop.steps)
    grad, rates_grad = executor.adapt_vjp(program, loop, trajectory, rates.detach(), tasks.support, v)
    return grad.sum(0), rates_grad


def versions(program: Program) -> list[int]:
    """Lists how often each constant of the program has been written to."""
    return [constant._version for node in program.nodes for constant in node.constants]


def parts(tasks: TaskBatch) -> tuple[Any, ...]:
    """Returns the tensors of a batch in the order in which :class:`MetaLoss` takes them.

    Where samples consist of several tensors it is the batch itself, of which no tensor then requires a gradient.
    """
    if isinstance(tasks.support_x, Samples):
        return (tasks,)
    inputs = tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y
    return *inputs, tasks.support_mask, tasks.query_mask, tasks.seeds


def batch_of(parts: tuple[Any, ...]) -> TaskBatch:
    """Makes a batch of what ``parts`` returned."""
    return parts[0] if isinstance(parts[0], TaskBatch) else TaskBatch(*parts)


class _Fused(torch.autograd.Function):
    """Is what both Functions refuse: forward mode and a further axis."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(_NO_FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise RuntimeError(NO_MAPPING)


class MetaLoss(_Fused):
    """Computes an :class:`Evaluation`; gradients go from its losses and outputs to ``theta [P]`` and to the rates.

    The tensors of the batch get none: where one of them requires a gradient the computation has to be recorded.

    Raises:
        RuntimeError: running statistics have changed before ``backward``.
    """

    @staticmethod
    def forward(
        theta: Tensor, rates: Tensor, executor: Executor, program: Program, loop: InnerLoop, *batch: Any
    ) -> Any:
        return tuple(evaluate(executor, program, loop, theta, rates, batch_of(batch)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        theta, rates, ctx.executor, ctx.program, ctx.loop, *batch = inputs
        _, _, trajectory, query_grads = output
        ctx.mark_non_differentiable(trajectory, query_grads)
        ctx.tasks = batch if isinstance(batch[0], TaskBatch) else ()
        ctx.save_for_backward(theta, rates, trajectory, query_grads, *(() if ctx.tasks else batch))
        ctx.versions = versions(ctx.program)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor | None) -> Any:
        g_losses, g_outputs = adjoints[:2]
        if any(ctx.needs_input_grad[5:]):
            raise RuntimeError("a gradient of the batch's tensors was asked of the path that has none")
        if ctx.versions != versions(ctx.program):
            raise RuntimeError(STATISTICS_CHANGED)
        loop = ctx.loop._replace(learns_rates=ctx.needs_input_grad[1])
        grads = _WayBack.apply(ctx.executor, ctx.program, loop, g_losses, g_outputs, *ctx.saved_tensors, *ctx.tasks)
        return *grads, *(None,) * (len(ctx.needs_input_grad) - 2)


class _WayBack(_Fused):
    """Computes the gradients of :class:`MetaLoss`; differentiating them raises an error.

    Without this tie to what they depend on autograd would take them for constants, and leave a term out silently.
    """

    @staticmethod
    def forward(
        executor: Executor, program: Program, loop: InnerLoop, g_losses: Tensor | None, g_outputs: Tensor | None,
        theta: Tensor, rates: Tensor, trajectory: Tensor, query_grads: Tensor, *batch: Any,
    ) -> Any:  # fmt: skip
        found, adjoints = (trajectory, query_grads), (g_losses, g_outputs)
        return way_back(executor, program, loop, rates, batch_of(batch), found, adjoints)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps nothing."""

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor | None) -> Any:
        raise RuntimeError(ONLY_ONCE)
