"""Runs the inner loop of one chunk of tasks, forward and back, and the whole meta-gradient made of both.

    forward     theta_{s+1} = theta_s - alpha_s g_s
    way back    d alpha_s = -g_s v,    v <- v - H_s (alpha_s v)

``g_s`` and ``H_s`` are the gradient and the Hessian of the support loss at ``theta_s``; ``v`` begins as the gradient of
the query loss at ``theta_S``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metafast.executors.base import MetaGradient
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop, rates_by_step, sum_to_rate
from metafast.program.interpreter import Pass
from metafast.tasks import Batch


class InnerLoopRun:
    """Runs the inner loop of T tasks on their support sets.

    Args:
        program: the model and its loss.
        loop: the number of steps, and what of the way back is computed.
        rates: ``alpha [1 or S, 1 or P]``.
        support: the support sets.
        keep: whether the passes of ``adapt`` stay in memory for ``reverse``. If not, ``reverse`` computes each again
            from ``theta_s``, and memory does not grow with the number of steps.

    Attributes:
        rates_grad: the gradient of the rates, of their shape; ``None`` where the loop does not learn them.
        adapted: for each parameter, whether the inner loop moves it.
        everything: true for each parameter.
        first: the pass that holds the part that no inner step changes; ``None`` where ``adapt`` keeps nothing.
        kept: the pass of each step and the gradient ``[T, P]`` at it, each only where ``reverse`` needs it.
    """

    def __init__(self, program: Program, loop: InnerLoop, rates: Tensor, support: Batch, keep: bool = False) -> None:
        self.program = program
        self.loop = loop
        self.rates = rates
        self.support = support
        self.keep = keep
        self.rates_grad = torch.zeros_like(rates) if loop.learns_rates else None
        self.adapted = tuple(p.adapted for p in program.parameters)
        self.everything = (True,) * len(program.parameters)
        self.first: Pass | None = None
        self.kept: list[tuple[Pass | None, Tensor | None]] = []

    def adapt(self, theta: Tensor) -> list[Tensor]:
        """Takes the steps and returns ``theta_0 .. theta_S``, each ``[T, P]``.

        Where autograd is enabled it records them, so that they can be differentiated to any order.
        """
        for_reverse = self.keep and not self.loop.first_order
        first = self._run_prefix(theta, self.everything if for_reverse else self.adapted)
        trajectory = [theta]
        for step, rate in enumerate(rates_by_step(self.rates, self.loop.steps)):
            run = self._pass(first, trajectory[-1], step)
            run.wanted = self.adapted
            gradient = run.flat(run.backward())
            trajectory.append(torch.addcmul(trajectory[-1], rate, gradient, value=-1))
            if self.keep:
                kept = None if self.rates_grad is None else gradient
                self.kept.append((None if self.loop.first_order else run, kept))
        return trajectory

    def reverse(self, trajectory: Sequence[Tensor], adjoints: Sequence[Tensor | None]) -> Tensor:
        """Returns the adjoint of ``theta_0``, ``[T, P]``, and adds to ``rates_grad``.

        ``trajectory`` holds ``theta_0 .. theta_S``, and ``adjoints`` the gradients of the query losses at each of them,
        all ``[T, P]``; ``None`` is a gradient of zero.
        """
        steps = len(trajectory) - 1
        first = self.first or self._run_prefix(trajectory[0], self.everything)
        carried = adjoints[steps]
        assert carried is not None  # the last step always has an adjoint
        for step in reversed(range(steps)):
            run, gradient = self.kept.pop() if self.kept else self._recompute(first, trajectory[step], step)
            row = min(step, self.rates.shape[0] - 1)
            if self.rates_grad is not None and gradient is not None:
                self.rates_grad[row] -= sum_to_rate(carried * gradient, self.rates.shape[1])
            if run is not None and not self.loop.first_order:
                run.wanted = self.everything
                if run.jvp(self.rates[row] * carried) is not None:
                    carried = carried - run.flat(run.hvp())
            of_step = adjoints[step]
            carried = carried if of_step is None else carried + of_step
        return carried - first.flat(first.backward_prefix()) if first.prefix.adjoint else carried

    def _run_prefix(self, theta: Tensor, wanted: tuple[bool, ...]) -> Pass:
        """Computes the part that no inner step changes; all passes start from it."""
        first = Pass(self.program, theta, self.support, 0, wanted)
        first.prefix = first.forward_prefix()
        if self.keep:
            self.first = first
        return first

    def _pass(self, first: Pass, theta: Tensor, step: int) -> Pass:
        """Runs the forward pass of one step, and its loss."""
        run = Pass(self.program, theta, self.support, step, first.wanted, first.prefix)
        run.forward()
        run.loss()
        return run

    def _recompute(self, first: Pass, theta: Tensor, step: int) -> tuple[Pass, Tensor | None]:
        """Computes again the pass of one step, with its gradient where the rates need it."""
        run = self._pass(first, theta, step)
        run.wanted = self.adapted if self.rates_grad is not None else (False,) * len(self.adapted)
        gradient = run.backward()
        return run, None if self.rates_grad is None else run.flat(gradient)


def meta_gradient(
    program: Program, loop: InnerLoop, theta: Tensor, rates: Tensor, batches: tuple[Batch, Batch],
    *, share: float, keep: bool,
) -> MetaGradient:  # fmt: skip
    """Computes the gradient of ``share * sum_t sum_s w_s L_query,t(theta_s)`` at ``theta [P]``, and that of the rates.

    Args:
        batches: the support sets and the query sets.
        share: the weight of each task in the gradients; the losses ``[T]`` do not have it.
        keep: whether activations are kept for the way back (see ``InnerLoopRun``).

    Returns:
        Losses, outputs and gradients; ``grads`` is the one tensor ``[P]``.
    """
    support, queries = batches
    # A first-order loop may always keep its passes: they hold nothing but the gradients of the steps.
    run = InnerLoopRun(program, loop, rates, support, keep or loop.first_order)
    trajectory = run.adapt(theta.expand(support.x.shape[0], -1))
    losses: Tensor | None = None
    adjoints: list[Tensor | None] = [None] * len(trajectory)
    for step, weight in loop.judged_steps:
        loss, grad, outputs = loss_and_grad(program.query, trajectory[step], queries, step)
        losses = weight * loss if losses is None else torch.add(losses, loss, alpha=weight)
        adjoints[step] = grad * (weight * share)
    grad = run.reverse(trajectory, adjoints)
    assert losses is not None  # the query loss after the last step is always computed
    return MetaGradient(losses, outputs, (grad.sum(0),), run.rates_grad)


def loss_and_grad(program: Program, theta: Tensor, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Computes ``losses [T]``, their gradients ``[T, P]`` in all parameters, and ``outputs [T, n, ...]``."""
    run = Pass(program, theta, batch, step, (True,) * len(program.parameters))
    outputs = run.forward()
    losses = run.loss()
    return losses, run.flat(run.backward()), outputs


def hvp(program: Program, theta: Tensor, batch: Batch, u: Tensor, step: int) -> Tensor:
    """Computes ``H u [T, P]`` of each task's loss at ``theta [T, P]``; of ``u [T, P]`` the adapted parameters count."""
    run = Pass(program, theta, batch, step, (True,) * len(program.parameters))
    run.forward()
    run.loss()
    run.backward()
    return run.flat({}) if run.jvp(u) is None else run.flat(run.hvp())
