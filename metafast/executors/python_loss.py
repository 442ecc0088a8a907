"""Wraps an executor so that it runs the inner loop under a loss that only Python can compute.

The wrapped executor runs the passes through the model, and Python the loss, once a pass for all tasks. Python gets the
outputs and hands back ``g``, the gradient of the loss in them. On the way back it also gets ``yd``, the tangent of the
outputs along a direction ``u``, and hands back ``gd``, the Hessian of the loss in the outputs times ``yd``. From ``g``
and ``gd`` the wrapped executor computes ``H u``. The loss, which is small beside the model, runs on one thread, so that
its bits do not depend on their number.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from metafast.executors import steps
from metafast.executors.base import ExecutionPlan, Executor
from metafast.kernels.contract.layer import RuleContext
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.program.interpreter import without_padding
from metafast.program.one_thread import one_thread
from metafast.tasks import Batch, TaskShapes


class OutputDerivatives(Protocol):
    """Computes a model's outputs ``[T, n, ...]`` and their derivatives, whatever the loss is.

    ``params`` are ``[P]`` or ``[T, P]``; ``g`` and ``gd`` have the shape of the outputs.
    """

    name: str

    def plan_own(self, program: Program, loop: InnerLoop, shapes: TaskShapes) -> ExecutionPlan | str:
        """Makes the plan, as ``Executor.plan_own`` does."""

    def outputs(self, program: Program, params: Tensor, batch: Batch, step: int) -> Tensor:
        """Computes the outputs ``[T, n, ...]``."""

    def outputs_vjp(self, program: Program, params: Tensor, batch: Batch, g: Tensor, step: int) -> Tensor:
        """Computes the adjoints ``[T, P]`` of all parameters from the adjoint ``g`` of the outputs."""

    def outputs_jvp(
        self, program: Program, params: Tensor, batch: Batch, u: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Computes the outputs and their tangent along ``u [T, P]``, both ``[T, n, ...]``."""

    def outputs_hvp(
        self, program: Program, params: Tensor, batch: Batch, u: Tensor, g: Tensor, gd: Tensor, step: int
    ) -> Tensor:
        """Computes the tangents along ``u`` of the adjoints of all parameters, ``[T, P]``.

        They follow from the adjoint ``g`` of the outputs and its tangent ``gd``.
        """


class PythonLoss(Executor):
    """Runs every loss, with the layers of ``inner`` and under the name of ``inner``."""

    def __init__(self, inner: OutputDerivatives) -> None:
        self.inner = inner
        self.name = inner.name

    def plan_own(self, program: Program, loop: InnerLoop, shapes: TaskShapes) -> ExecutionPlan | str:
        return self.inner.plan_own(program, loop, shapes)

    def predict(
        self, program: Program, params: Tensor, x: Tensor, step: int = 0, seeds: Tensor | None = None
    ) -> Tensor:
        return self.inner.outputs(program, params, Batch(x, x), step)

    @torch.no_grad()
    def loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch = without_padding(batch)
        outputs = self.inner.outputs(program, params, batch, step)
        context = RuleContext(step, batch.mask, (True,), ())
        with one_thread():
            losses = program.loss.forward(context, outputs, batch.y)
            g = program.loss.backward(context)
        return losses, self.inner.outputs_vjp(program, params, batch, g, step), outputs

    def adapt(self, program: Program, loop: InnerLoop, params: Tensor, rates: Tensor, support: Batch) -> Tensor:
        return steps.adapt(self, program, loop, params, rates, support)

    def adapt_vjp(
        self, program: Program, loop: InnerLoop, trajectory: Tensor, rates: Tensor, support: Batch, v: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        return steps.adapt_vjp(self, program, loop, trajectory, rates, support, v)

    @torch.no_grad()
    def hvp(self, program: Program, params: Tensor, batch: Batch, u: Tensor, step: int = 0) -> Tensor:
        u = u.expand(batch.x.shape[0], -1) * program.adapted
        batch = without_padding(batch)
        outputs, tangent = self.inner.outputs_jvp(program, params, batch, u, step)
        context = RuleContext(step, batch.mask, (True,), ())
        with one_thread():
            program.loss.forward(context, outputs, batch.y)
            g = program.loss.backward(context)
            gd = program.loss.tangent_backward(context, tangent)
        return self.inner.outputs_hvp(program, params, batch, u, g, gd, step)

    def outputs_vjp(self, program: Program, params: Tensor, batch: Batch, g: Tensor, step: int = 0) -> Tensor:
        return self.inner.outputs_vjp(program, params, batch, g, step)
