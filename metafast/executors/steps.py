"""Takes the inner steps one by one, and goes back through each, whatever computes gradients and Hessian products.

    forward     z_{s+1} = step(z_s, g_s)
    way back    (v, u) <- the adjoints of z_s and of g_s,    v <- v + H_s u

``z = (theta, state)`` is ``[T, (1 + K) P]``. Without a rule ``z`` is theta, the step is ``theta - alpha g``, and so
``u = -alpha v``.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from metafast.executors.by_program import ByProgram
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop, row_of_step, sum_to_rate
from metafast.program.rule import hyper_rows, is_of_the_user, started
from metafast.tasks import Batch

_MOVED: ByProgram[Tensor] = ByProgram()
"""Which parameters move, on each device: what is copied there while a CUDA graph is recorded would be lost."""


class Derivatives(Protocol):
    """Computes the derivatives of a loss at theta, as an executor does."""

    def loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes ``losses [T]``, gradients ``[T, P]`` and outputs."""

    def hvp(self, program: Program, params: Tensor, batch: Batch, u: Tensor, step: int = 0) -> Tensor:
        """Computes ``H u [T, P]``."""


class Steps:
    """Knows how the steps of a loop follow from their gradients, and the way back through a step.

    Args:
        program: the model and its loss.
        loop: the inner loop.
        rates: the rates ``[1 or S, 1 or P]``, or under a rule ``[H, 1 or S, 1 or P]``.

    Attributes:
        rates_grad: the gradient of ``rates``, of their shape, as far as :meth:`back` has come; ``None`` where the loop
            does not learn them.
        needs_gradient: whether the way back through a step reads the gradient that the step took.
    """

    def __init__(self, program: Program, loop: InnerLoop, rates: Tensor) -> None:
        self.loop, self.rates, self.size = loop, rates, program.size
        self.moved = _MOVED.of(program, rates.device, lambda program, device: program.adapted.to(device))
        self.rates_grad = torch.zeros_like(rates) if loop.learns_rates else None
        self.needs_gradient = loop.learns_rates or loop.rule is not None

    @cached_property
    def _downhill(self) -> Tensor:
        """Returns ``-alpha``, so that a step of the way back has one multiplication alone."""
        return -self.rates

    def start(self, params: Tensor, tasks: int) -> Tensor:
        """Returns ``z_0 [T, (1 + K) P]``; ``params`` are theta_0 or z_0, of one task for all or of each."""
        z = started(self.loop.rule, params, self.size)
        return z.expand(tasks, -1) if z.dim() == 1 else z

    def theta(self, z: Tensor) -> Tensor:
        """Returns the parameters ``[T, P]`` of ``z``."""
        return z if z.shape[-1] == self.size else z[..., : self.size]

    def advance(self, z: Tensor, gradient: Tensor, step: int) -> Tensor:
        """Takes the step of that number. ``gradient [T, P]`` is zero where a parameter is not adapted."""
        rule = self.loop.rule
        if rule is None:
            return torch.addcmul(z, row_of_step(self.rates, step), gradient, value=-1)
        return rule.advance(z, gradient, hyper_rows(self.rates, step), step + 1, self.moved)

    def back(self, z: Tensor, gradient: Tensor | None, v: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Takes the adjoint ``v`` of ``z_{s+1}`` to those of ``z_s`` and of the gradient; adds to ``rates_grad``."""
        rule = self.loop.rule
        if rule is None:
            if self.rates_grad is not None and gradient is not None:
                row = row_of_step(self.rates_grad, step)
                row -= sum_to_rate(v * gradient, self.rates.shape[1])
            return v, row_of_step(self._downhill, step) * v
        assert gradient is not None
        rows = hyper_rows(self.rates, step)
        found = rule.advance_vjp(z, gradient, rows, step + 1, self.moved, v, self.loop.learns_rates)
        if self.rates_grad is not None and found.hyper is not None:
            hyper_rows(self.rates_grad, step).add_(found.hyper)
        return found.z, found.gradient

    def of_theta(self, v: Tensor) -> Tensor:
        """Returns ``v [T, (1 + K) P]`` with zeros in the place of the state."""
        return v if v.shape[-1] == self.size else self.add(torch.zeros_like(v), v[..., : self.size])

    def add(self, v: Tensor, product: Tensor) -> Tensor:
        """Adds ``H u [T, P]`` to the part of ``v [T, (1 + K) P]`` that is theta's."""
        if v.shape[-1] == product.shape[-1]:
            return v + product
        return torch.cat([v[..., : self.size] + product, v[..., self.size :]], -1)


def unknown_rule(loop: InnerLoop) -> str | None:
    """Says of a rule that is not one of metafast's own that its step may read values, as no CUDA graph can."""
    return f"{loop.rule}: a rule of the user's, whose step may read values" if is_of_the_user(loop.rule) else None


@torch.no_grad()
def adapt(
    derivatives: Derivatives, program: Program, loop: InnerLoop, params: Tensor, rates: Tensor, support: Batch
) -> Tensor:
    """Computes the trajectory as ``Executor.adapt`` does, a call of ``derivatives`` for each step."""
    steps = Steps(program, loop, rates)
    z = steps.start(params, support.at(0).x.shape[0])
    trajectory = z.new_empty(loop.steps + 1, *z.shape)
    trajectory[0] = z
    for s, number in enumerate(loop.numbers):
        _, gradient, _ = derivatives.loss_and_grad(program, steps.theta(trajectory[s]), support.at(s), number)
        trajectory[s + 1] = steps.advance(trajectory[s], gradient * steps.moved, number)
    return trajectory


@torch.no_grad()
def adapt_vjp(
    derivatives: Derivatives, program: Program, loop: InnerLoop, trajectory: Tensor, rates: Tensor, support: Batch,
    v: Tensor,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Goes the way back as ``Executor.adapt_vjp`` does, one or two calls of ``derivatives`` for each step."""
    steps = Steps(program, loop, rates)
    carried = v[-1] if v.dim() == 3 else v
    for s, number in reversed(list(enumerate(loop.numbers))):
        z, batch = trajectory[s], support.at(s)
        theta, gradient = steps.theta(z), None
        if steps.needs_gradient:
            gradient = derivatives.loss_and_grad(program, theta, batch, number)[1] * steps.moved
        carried, u = steps.back(z, gradient, carried, number)
        if not loop.first_order:
            carried = steps.add(carried, derivatives.hvp(program, theta, batch, u, number))
        carried = carried + v[s] if v.dim() == 3 else carried
    return carried, steps.rates_grad
