"""The inner loop under a loss that only Python can compute, around passes through the model that run elsewhere.

Outputs come to Python once a pass, all tasks at once, and go back as the gradient ``g`` of the loss in them. For the
way back their tangent ``yd`` along a direction ``u`` comes, and ``gd``, the Hessian of the loss in the outputs times
``yd``, goes back with ``g``: the two make the Hessian in the parameters times ``u``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from metafast.executors.base import rows, sum_to_rate
from metafast.kernels.contract.layer import RuleContext
from metafast.program import Program
from metafast.tasks import Batch


class Passes(ABC):
    """T tasks at ``params [P]`` or ``[T, P]``; ``g``, ``gd`` have the shape of the outputs ``[T, n, ...]``."""

    @abstractmethod
    def outputs(self, program: Program, params: Tensor, batch: Batch, step: int) -> Tensor:
        """``[T, n, ...]``."""

    @abstractmethod
    def vjp(self, program: Program, params: Tensor, batch: Batch, g: Tensor, step: int) -> Tensor:
        """``[T, P]``: the adjoints of all parameters where ``g`` is that of the outputs."""

    @abstractmethod
    def jvp(self, program: Program, params: Tensor, batch: Batch, u: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Outputs, and their tangent along ``u [T, P]``."""

    @abstractmethod
    def hvp(
        self, program: Program, params: Tensor, batch: Batch, u: Tensor, g: Tensor, gd: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """The adjoints of the adapted parameters, and the tangents of the adjoints of all along ``u``, both ``[T, P]``;
        ``gd`` is the tangent of ``g``."""


def loss_and_grad(
    passes: Passes, program: Program, params: Tensor, batch: Batch, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``Executor.loss_and_grad``."""
    outputs = passes.outputs(program, params, batch, step)
    context = RuleContext(step, batch.mask, (True,), ())
    losses = program.loss.forward(context, outputs, batch.y)
    return losses, passes.vjp(program, params, batch, program.loss.backward(context), step), outputs


def adapt(passes: Passes, program: Program, params: Tensor, lr: Tensor, support: Batch, steps: int) -> Tensor:
    """As ``Executor.adapt``."""
    trajectory = [params.expand(support.x.shape[0], -1)]
    for step, rate in enumerate(rows(lr, steps)):
        _, grad, _ = loss_and_grad(passes, program, trajectory[-1], support, step)
        trajectory.append(trajectory[-1] - rate * grad * program.adapted)
    return torch.stack(trajectory)


def adapt_vjp(
    passes: Passes,
    program: Program,
    trajectory: Tensor,
    lr: Tensor,
    support: Batch,
    v: Tensor,
    *,
    first_order: bool,
    needs_lr: bool,
) -> tuple[Tensor, Tensor | None]:
    """As ``Executor.adapt_vjp``."""
    steps = trajectory.shape[0] - 1
    rates, lr_grad = rows(lr, steps), torch.zeros_like(lr)
    carried = v[steps] if v.dim() == 3 else v
    for step in reversed(range(steps)):
        theta, product = trajectory[step], None
        if first_order and needs_lr:
            _, grad, _ = loss_and_grad(passes, program, theta, support, step)
        elif not first_order:
            u = rates[step] * carried * program.adapted
            outputs, tangent = passes.jvp(program, theta, support, u, step)
            context = RuleContext(step, support.mask, (True,), ())
            program.loss.forward(context, outputs, support.y)
            g, gd = program.loss.backward(context), program.loss.tangent_backward(context, tangent)
            grad, product = passes.hvp(program, theta, support, u, g, gd, step)
        if needs_lr:
            lr_grad[min(step, lr.shape[0] - 1)] -= sum_to_rate(carried * grad * program.adapted, lr.shape[1])
        carried = carried if product is None else carried - product
        carried = carried + v[step] if v.dim() == 3 else carried
    return carried, lr_grad if needs_lr else None
