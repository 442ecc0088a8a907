"""The inner loop of one chunk of tasks, forward and back, and the whole meta-step made of both.

theta_{s+1} = theta_s - lr_s g_s          d lr_s = -g_s v,  v <- v - H_s (lr_s v)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metafast.executors.base import MetaGradient, rows, sum_to_rate
from metafast.program import Program
from metafast.program.interpreter import Pass
from metafast.tasks import Batch


class InnerLoopRun:
    """T tasks on their support sets.

    With ``keep`` the passes of ``forward`` stay in memory for ``reverse``; without, ``reverse`` computes each again
    from ``theta_s``, so that memory does not grow with the number of steps.
    """

    def __init__(
        self, program: Program, lr: Tensor, support: Batch, *, first_order: bool, needs_lr: bool, keep: bool = False
    ) -> None:
        self.program, self.lr, self.support = program, lr, support
        self.first_order, self.keep = first_order, keep
        self.lr_grad = torch.zeros_like(lr) if needs_lr else None
        self.adapted = tuple(p.adapted for p in program.parameters)
        self.everything = (True,) * len(program.parameters)
        self.first: Pass | None = None
        self.kept: list[tuple[Pass | None, Tensor | None]] = []

    def forward(self, theta: Tensor, steps: int) -> list[Tensor]:
        """``theta_0 .. theta_S``, each ``[T, P]``. With gradients enabled autograd records it, to any order."""
        for_reverse = self.keep and not self.first_order
        first = self._first(theta, self.everything if for_reverse else self.adapted)
        trajectory = [theta]
        for step, rate in enumerate(rows(self.lr, steps)):
            run = self._pass(first, trajectory[-1], step)
            run.wanted = self.adapted
            gradient = run.flat(run.backward())
            trajectory.append(torch.addcmul(trajectory[-1], rate, gradient, value=-1))
            if self.keep:
                kept = None if self.lr_grad is None else gradient
                self.kept.append((None if self.first_order else run, kept))
        return trajectory

    def reverse(self, trajectory: Sequence[Tensor], adjoints: Sequence[Tensor | None]) -> Tensor:
        """The adjoint of ``theta_0``, ``[T, P]``, of those of ``theta_0 .. theta_S``; adds to ``lr_grad``."""
        steps = len(trajectory) - 1
        first = self.first or self._first(trajectory[0], self.everything)
        carried = adjoints[steps]
        assert carried is not None  # the last step is always asked for
        for step in reversed(range(steps)):
            run, gradient = self.kept.pop() if self.kept else self._again(first, trajectory[step], step)
            row = min(step, self.lr.shape[0] - 1)
            if self.lr_grad is not None and gradient is not None:
                self.lr_grad[row] -= sum_to_rate(carried * gradient, self.lr.shape[1])
            if run is not None and not self.first_order:
                run.wanted = self.everything
                if run.jvp(self.lr[row] * carried) is not None:
                    carried = carried - run.flat(run.hvp())
            of_step = adjoints[step]
            carried = carried if of_step is None else carried + of_step
        return carried - first.flat(first.backward_prefix()) if first.prefix.adjoint else carried

    def _first(self, theta: Tensor, wanted: tuple[bool, ...]) -> Pass:
        """The part that no inner step changes, which all passes start from."""
        first = Pass(self.program, theta, self.support, 0, wanted)
        first.prefix = first.forward_prefix()
        if self.keep:
            self.first = first
        return first

    def _pass(self, first: Pass, theta: Tensor, step: int) -> Pass:
        run = Pass(self.program, theta, self.support, step, first.wanted, first.prefix)
        run.forward()
        run.loss()
        return run

    def _again(self, first: Pass, theta: Tensor, step: int) -> tuple[Pass, Tensor | None]:
        run = self._pass(first, theta, step)
        run.wanted = self.adapted if self.lr_grad is not None else (False,) * len(self.adapted)
        gradient = run.backward()
        return run, None if self.lr_grad is None else run.flat(gradient)


def unrolled(program: Program, theta: Tensor, lr: Tensor, support: Batch, steps: int) -> list[Tensor]:
    """``theta_0 .. theta_S``, each ``[T, P]``. With gradients enabled autograd records it, to any order."""
    return InnerLoopRun(program, lr, support, first_order=True, needs_lr=False).forward(theta, steps)


@dataclass(frozen=True)
class MetaStep:
    """The gradient of ``sum_t sum_s w_s Lq_t(theta_s)`` in ``theta_0`` and the rates; ``weights``: ``w_0 .. w_S``."""

    program: Program
    steps: int
    weights: tuple[float, ...]
    first_order: bool
    needs_lr: bool

    def run(
        self, params: Tensor, lr: Tensor, support: Batch, queries: Batch, *, share: float, keep: bool
    ) -> MetaGradient:
        """At ``params [P]``. Each task counts ``share`` in the gradients."""
        keep = keep or self.first_order  # what first order keeps is at most the gradients
        sweep = InnerLoopRun(self.program, lr, support, first_order=self.first_order, needs_lr=self.needs_lr, keep=keep)
        count = support.x.shape[0]
        trajectory = sweep.forward(params.expand(count, -1), self.steps)
        losses, outputs = None, None
        adjoints: list[Tensor | None] = [None] * len(trajectory)
        for step, weight in enumerate(self.weights):
            if weight != 0 or step == self.steps:
                loss, grad, outputs = query(self.program, trajectory[step], queries, step)
                losses = weight * loss if losses is None else torch.add(losses, loss, alpha=weight)
                adjoints[step] = grad * (weight * share)
        grad = sweep.reverse(trajectory, adjoints)
        assert losses is not None  # the last step always runs
        assert outputs is not None
        return MetaGradient(losses, outputs, grad.sum(0), sweep.lr_grad)


def query(program: Program, theta: Tensor, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """``losses [T]``, ``grad [T, P]`` in all parameters, ``outputs [T, n, ...]``."""
    run = Pass(program, theta, batch, step, (True,) * len(program.parameters))
    outputs = run.forward()
    losses = run.loss()
    return losses, run.flat(run.backward()), outputs
