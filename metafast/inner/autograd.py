"""Puts the inner loop into autograd by two thin Functions: one goes forward, and its gradient is the other.

The second one cannot be differentiated, and says so: its way back records no graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from metafast.executors import Executor, composition
from metafast.executors.composition import Adjoints, Sets
from metafast.inner.autocast import in_own_dtype
from metafast.inner.recorded import recorded_vjp, standing_in
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.tasks import Batch, TaskBatch

ONLY_ONCE = (
    "a meta-gradient of metafast can be differentiated once: it is computed by a way back that records no graph. "
    "For higher orders call learner(tasks, create_graph=True): it records the reference path, which has every order"
)
STATISTICS_CHANGED = (
    "a buffer that the model reads, such as the running statistics of batch norm, has changed since learner(tasks) was "
    "called; call loss.backward() before the next batch, or use learner.backward(tasks), which does both"
)
_NO_FORWARD_MODE = (
    "a learner's loss has no derivative in forward mode: its inner loop is fused. Use reverse mode (torch.autograd, "
    "torch.func.grad or torch.func.vjp), or call learner(tasks, create_graph=True), which records plain operations"
)
NO_MAPPING = (
    "a learner's loss cannot be mapped over a further axis: all tasks of a batch are computed together already. Put "
    "what is to be mapped on the task axis of one TaskBatch, or call the learner in a loop"
)


evaluate = in_own_dtype(composition.evaluate)
way_back = in_own_dtype(composition.way_back)


def versions(program: Program) -> list[int]:
    """Lists how often each constant of the program has been written to."""
    return [constant._version for node in program.nodes for constant in node.constants]


def flattened(tasks: TaskBatch) -> tuple[Any, list[Any]]:
    """Returns the tensors of a batch, and how they belong together; ``None`` masks and seeds are among the tensors."""
    inputs = tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y
    fields = [*inputs, tasks.support_mask, tasks.query_mask, tasks.support.seeds, tasks.query.seeds]
    if isinstance(tasks.support_x, Tensor):
        return (None, tasks.each_step), fields
    leaves, spec = tree_flatten(fields)
    return (spec, tasks.each_step), leaves


def _sets(spec: Any, tensors: Sequence[Any]) -> Sets:
    """Undoes :func:`flattened`."""
    tree, each_step = spec
    support_x, support_y, query_x, query_y, *rest = tensors if tree is None else tree_unflatten(tensors, tree)
    return Sets(Batch(support_x, support_y, rest[0], rest[2], each_step), Batch(query_x, query_y, rest[1], rest[3]))


class _Fused(torch.autograd.Function):
    """Is what both Functions refuse: forward mode and a further axis."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(_NO_FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise RuntimeError(NO_MAPPING)


class MetaLoss(_Fused):
    """Computes an ``Evaluation``; gradients go from losses, outputs and final ``z`` to all tensors that it is given.

    ``theta``, which is theta_0 or ``z_0``, of one task for all or of each, and the rates get theirs by the fused way
    back. Where others require one, the tensors of the batch (see :func:`flattened`) or behind them the parameters of
    ``modules``, backward records each step again.

    Raises:
        RuntimeError: running statistics have changed before ``backward``.
    """

    @staticmethod
    def forward(
        theta: Tensor, rates: Tensor, executor: Executor, program: Program, loop: InnerLoop, spec: Any,
        modules: nn.ModuleList, *tensors: Tensor,
    ) -> Any:  # fmt: skip
        batch, of_loss = _divided(tensors, modules)
        with standing_in(modules, of_loss):
            return tuple(evaluate(executor, program, loop, theta.detach(), rates.detach(), _sets(spec, batch)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        theta, rates, ctx.executor, ctx.program, ctx.loop, ctx.spec, ctx.modules, *tensors = inputs
        *_, trajectory, query_grads = output
        ctx.mark_non_differentiable(trajectory, query_grads)
        ctx.save_for_backward(theta, rates, trajectory, query_grads, *tensors)
        ctx.versions = versions(ctx.program)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor | None) -> Any:
        if ctx.versions != versions(ctx.program):
            raise RuntimeError(STATISTICS_CHANGED)
        of_theta, of_rates, *_ = ctx.needs_input_grad
        of_tensors = ctx.needs_input_grad[7:]
        loop, g = ctx.loop._replace(learns_rates=of_rates), adjoints[:3]
        theta, rates, trajectory, query_grads, *tensors = ctx.saved_tensors
        settings = ctx.executor, ctx.program, loop, ctx.spec, ctx.modules
        if any(of_tensors):
            needed = of_theta, of_rates, *of_tensors
            grads = _RecordedWayBack.apply(*settings, needed, trajectory, *g, theta, rates, *tensors)
        else:
            grads = _WayBack.apply(*settings, *g, theta, rates, trajectory, query_grads, *tensors)
        nothing = (None,) * (len(tensors) - len(grads) + 2)
        return *grads[:2], None, None, None, None, None, *grads[2:], *nothing


class _WayBack(_Fused):
    """Computes the gradients of :class:`MetaLoss`; differentiating them raises an error.

    Without this tie to what they depend on autograd would take them for constants, and leave a term out silently.
    """

    @staticmethod
    def forward(
        executor: Executor, program: Program, loop: InnerLoop, spec: Any, modules: nn.ModuleList,
        g_losses: Tensor | None, g_outputs: Tensor | None, g_final: Tensor | None,
        theta: Tensor, rates: Tensor, trajectory: Tensor, query_grads: Tensor, *tensors: Tensor,
    ) -> Any:  # fmt: skip
        batch, of_loss = _divided(tensors, modules)
        found, adjoints = (trajectory, query_grads), Adjoints(g_losses, g_outputs, g_final)
        with standing_in(modules, of_loss):
            grad, rates_grad = way_back(executor, program, loop, rates.detach(), _sets(spec, batch), found, adjoints)
            grad = grad[:, : theta.shape[-1]]
            return grad.sum(0) if theta.dim() == 1 else grad, rates_grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps nothing."""

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor | None) -> Any:
        raise RuntimeError(ONLY_ONCE)


class _RecordedWayBack(_WayBack):
    """Does so for all tensors, by plain operations."""

    @staticmethod
    def forward(  # type: ignore[override]
        executor: Executor, program: Program, loop: InnerLoop, spec: Any, modules: nn.ModuleList,
        needed: tuple[bool, ...], kept: Tensor, g_losses: Tensor | None, g_outputs: Tensor | None,
        g_final: Tensor | None, *inputs: Tensor,
    ) -> Any:  # fmt: skip
        sets_of, adjoints = partial(_sets, spec), Adjoints(g_losses, g_outputs, g_final)
        return tuple(recorded_vjp(executor, program, loop, modules, sets_of, inputs, kept, adjoints, needed))


def _divided(tensors: Sequence[Tensor], modules: nn.ModuleList) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Returns the tensors of the batch, and behind them those that are parameters of ``modules``."""
    if not len(modules):
        return tensors, ()
    batch = len(tensors) - len(list(modules.parameters()))
    return tensors[:batch], tensors[batch:]
