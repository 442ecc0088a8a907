"""The narrow waist: what an executor offers to everything above it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from metafast.program import Program
from metafast.tasks import Batch, TaskBatch


class MetaGradient(NamedTuple):
    """Of a batch of T tasks: ``losses [T]``, ``outputs [T, m, ...]`` at the last step, and the gradients of the *mean*
    loss: ``grad [P]`` of the parameters, ``lr_grad`` of the shape of ``lr`` (``None`` where it was not wanted)."""

    losses: Tensor
    outputs: Tensor
    grad: Tensor
    lr_grad: Tensor | None


class Executor(ABC):
    """Runs a Program for T tasks at once.

    Shapes: ``params [P]`` (shared by all tasks) or ``[T, P]``; ``lr`` broadcasts to ``[S, P]``; ``step`` is the inner
    step that a pass belongs to (it matters to ``per_step`` batch norm; the query pass after S steps is step S).
    """

    name: str
    proven = True
    """Has it been held to the truth on the devices that it runs on? ``auto`` takes no other."""

    def at(self, precision: str) -> Executor | None:
        """The executor that does the same in ``precision``; ``None`` where there is none. ``float32``: products and
        sums as exact as the model's own type."""
        return self if precision == "float32" else None

    @abstractmethod
    def refuses(self, program: Program, x: Tensor, masked: bool = False, queries: int | None = None) -> str | None:
        """``None`` where it can run ``program`` on batches like ``x [T, n, ...]``, else the reason in words.

        ``masked``: are some samples padding? ``queries``: samples of a query set; ``None``: n.
        """

    def unrecordable(self, program: Program) -> str | None:
        """``None`` where a CUDA graph can hold what this executor does with ``program`` on tasks of one size, else the
        reason in words."""
        return f"executor {self.name!r} may wait for the host"

    @abstractmethod
    def explain(self, program: Program, x: Tensor) -> list[str]:
        """For each node, how it is run."""

    def memory_plan(self, program: Program, support_x: Tensor, query_x: Tensor, steps: int) -> str | None:
        """How a second-order meta-gradient of such batches goes through memory, with the predicted peak; ``None`` where
        that is not planned."""
        return None

    @abstractmethod
    def predict(self, program: Program, params: Tensor, x: Tensor, step: int = 0) -> Tensor:
        """Outputs ``[T, n, ...]``."""

    @abstractmethod
    def loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``losses [T]``, ``grad [T, P]`` of each task's loss in all its parameters, ``outputs [T, n, ...]``."""

    @abstractmethod
    def adapt(self, program: Program, params: Tensor, lr: Tensor, support: Batch, steps: int) -> Tensor:
        """``trajectory [S+1, T, P]``: ``theta_{s+1} = theta_s - lr_s grad L(theta_s)`` on the adapted parameters."""

    @abstractmethod
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
        """Pulls ``v`` back through ``adapt``.

        ``v [T, P]`` is the adjoint of ``theta_S``, or ``[S+1, T, P]`` of the whole trajectory. Returns the adjoint of
        ``theta_0`` for each task, ``[T, P]``, and that of ``lr``, of its shape (summed over tasks). The recursion, with
        ``u = lr_s v`` on the adapted parameters: ``d lr_s = -g_s v``, ``v <- v - H_s u``; first order drops ``H_s``.
        """

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
        """Gradient of ``mean_t sum_s w_s Lq_t(theta_s)`` in ``params [P]`` and ``lr``.

        ``step_weights`` are ``w_0 .. w_S``; ``None`` puts all weight on the last step.
        """
        count = len(tasks)
        weights = query_weights(step_weights, steps)
        trajectory = self.adapt(program, params, lr, tasks.support, steps)
        v = torch.zeros_like(trajectory)
        losses = params.new_zeros(count)
        outputs = None
        for step, weight in enumerate(weights):
            if weight != 0 or step == steps:
                loss, grad, outputs = self.loss_and_grad(program, trajectory[step], tasks.query, step)
                losses = losses + weight * loss
                v[step] = grad * (weight / count)
        grad, lr_grad = self.adapt_vjp(
            program, trajectory, lr, tasks.support, v, first_order=first_order, needs_lr=needs_lr
        )
        assert outputs is not None  # the last step always runs
        return MetaGradient(losses, outputs, grad.sum(0), lr_grad)

    @torch.no_grad()
    def gradients(
        self,
        program: Program,
        parameters: Sequence[Tensor],
        lr: Tensor,
        tasks: TaskBatch,
        steps: int,
        *,
        step_weights: list[float] | None = None,
        first_order: bool = False,
        needs_lr: bool = True,
    ) -> tuple[Tensor, Tensor, Sequence[Tensor], Tensor | None]:
        """``meta_gradient`` where a module holds the parameters: its losses and outputs, the gradient of each parameter
        and ``lr_grad``. No graph is kept."""
        losses, outputs, grad, lr_grad = self.meta_gradient(
            program, _flatten_dense_tensors(parameters), lr.detach(), tasks, steps,
            step_weights=step_weights, first_order=first_order, needs_lr=needs_lr,
        )  # fmt: skip
        return losses, outputs, _unflatten_dense_tensors(grad, parameters), lr_grad


def query_weights(step_weights: list[float] | None, steps: int) -> tuple[float, ...]:
    """``w_0 .. w_S``; ``None`` puts all weight on the last step."""
    return (*[0.0] * steps, 1.0) if step_weights is None else tuple(step_weights)


def rows(lr: Tensor, steps: int) -> list[Tensor]:
    """One row of rates for each inner step; the last row serves all later steps."""
    return [lr[min(s, lr.shape[0] - 1)] for s in range(steps)]


def sum_to_rate(products: Tensor, width: int) -> Tensor:
    """``[..., P]`` summed to one row of rates: ``[width]``, ``width`` either P or 1."""
    total = products.flatten(0, -2).sum(0) if products.dim() > 1 else products
    return total.sum(0, keepdim=True) if width == 1 else total
