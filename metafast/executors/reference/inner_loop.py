"""Runs the inner loop of one chunk of tasks, forward and back, and the whole meta-gradient made of both.

    forward     z_{s+1} = step(z_s, g_s)
    way back    (v, u) <- the adjoints of z_s and of g_s,    v <- v + H_s u

``g_s`` and ``H_s`` are the gradient and the Hessian of the support loss at ``theta_s``; ``v`` begins as the gradient of
the query loss at ``theta_S``. What a step is stands in ``executors/steps.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from metafast.executors.base import MetaGradient
from metafast.executors.steps import Steps
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.program.interpreter import Pass
from metafast.tasks import Batch


class InnerLoopRun:
    """Runs the inner loop of T tasks on their support sets.

    Args:
        program: the model and its loss.
        loop: the number of steps, and what of the way back is computed.
        rates: the rates, as the loop says.
        support: the support sets.
        keep: whether the passes of ``adapt`` stay in memory for ``reverse``. If not, ``reverse`` computes each again
            from ``theta_s``, and memory does not grow with the number of steps.

    Attributes:
        steps: how a step follows from its gradient; it holds the gradient of the rates.
        adapted: for each parameter, whether the inner loop moves it.
        everything: true for each parameter.
        first: the pass that holds the part that no inner step changes; ``None`` where ``adapt`` keeps nothing.
        kept: the pass of each step and the gradient ``[T, P]`` at it, each only where ``reverse`` needs it.
    """

    def __init__(self, program: Program, loop: InnerLoop, rates: Tensor, support: Batch, keep: bool = False) -> None:
        self.program = program
        self.loop = loop
        self.support = support
        self.keep = keep
        self.steps = Steps(program, loop, rates)
        self.adapted = tuple(p.adapted for p in program.parameters)
        self.everything = (True,) * len(program.parameters)
        self.first: Pass | None = None
        self.kept: list[tuple[Pass | None, Tensor | None]] = []

    def adapt(self, start: Tensor) -> list[Tensor]:
        """Takes the steps from theta_0 or ``z_0``, and returns ``z_0 .. z_S``, each ``[T, (1 + K) P]``.

        Where autograd is enabled it records them, so that they can be differentiated to any order.
        """
        for_reverse = self.keep and not self.loop.first_order
        wanted = self.everything if for_reverse else self.adapted
        trajectory = [self.steps.start(start, self.support.at(0).x.shape[0])]
        first = self._run_prefix(self.steps.theta(trajectory[0]), wanted)
        for step in range(self.loop.steps):
            z = trajectory[-1]
            run = self._pass(first, self.steps.theta(z), step, wanted)
            run.wanted = self.adapted
            gradient = run.flat(run.backward())
            trajectory.append(self.steps.advance(z, gradient, self.loop.first + step))
            if self.keep:
                kept = gradient if self.steps.needs_gradient else None
                self.kept.append((None if self.loop.first_order else run, kept))
        return trajectory

    def reverse(self, trajectory: Sequence[Tensor], adjoints: Sequence[Tensor | None]) -> Tensor:
        """Returns the adjoint of ``z_0``, ``[T, (1 + K) P]``, and adds to the gradient of the rates.

        ``trajectory`` holds ``z_0 .. z_S``, and ``adjoints`` the gradients of the query losses at each of them, of the
        same shape or ``[T, P]``; ``None`` is a gradient of zero.
        """
        steps = len(trajectory) - 1
        first = self.first or self._run_prefix(self.steps.theta(trajectory[0]), self.everything)
        carried = self._last(trajectory[steps], adjoints[steps])
        for step in reversed(range(steps)):
            z = trajectory[step]
            run, gradient = self.kept.pop() if self.kept else self._recompute(first, self.steps.theta(z), step)
            carried, u = self.steps.back(z, gradient, carried, self.loop.first + step)
            if run is not None and not self.loop.first_order:
                run.wanted = self.everything
                if run.jvp(u) is not None:
                    carried = self.steps.add(carried, run.flat(run.hvp()))
            carried = self._with(carried, adjoints[step])
        return self.steps.add(carried, first.flat(first.backward_prefix())) if first.prefix.adjoint else carried

    def _last(self, z: Tensor, adjoint: Tensor | None) -> Tensor:
        """Returns the adjoint of ``z_S``, ``[T, (1 + K) P]``."""
        assert adjoint is not None  # the last step always has one
        return pad(adjoint, (0, z.shape[-1] - adjoint.shape[-1])) if adjoint.shape != z.shape else adjoint

    def _with(self, carried: Tensor, adjoint: Tensor | None) -> Tensor:
        """Adds an adjoint, ``[T, (1 + K) P]`` or ``[T, P]``."""
        if adjoint is None:
            return carried
        return carried + adjoint if adjoint.shape == carried.shape else self.steps.add(carried, adjoint)

    def _run_prefix(self, theta: Tensor, wanted: tuple[bool, ...]) -> Pass:
        """Computes the part that no inner step changes; all passes start from it.

        Where each step has samples of its own there is none.
        """
        first = Pass(self.program, theta, self.support.at(0), self.loop.first, wanted)
        if not self.support.each_step:
            first.prefix = first.forward_prefix()
        if self.keep:
            self.first = first
        return first

    def _pass(self, first: Pass, theta: Tensor, step: int, wanted: tuple[bool, ...]) -> Pass:
        """Runs the forward pass of one step, and its loss."""
        run = Pass(self.program, theta, self.support.at(step), self.loop.first + step, wanted, first.prefix)
        run.forward()
        run.loss()
        return run

    def _recompute(self, first: Pass, theta: Tensor, step: int) -> tuple[Pass, Tensor | None]:
        """Computes again the pass of one step, with its gradient where the way back needs it."""
        run = self._pass(first, theta, step, first.wanted)
        needs = self.steps.needs_gradient
        run.wanted = self.adapted if needs else (False,) * len(self.adapted)
        gradient = run.backward()
        return run, run.flat(gradient) if needs else None


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
    trajectory = run.adapt(theta)
    losses: Tensor | None = None
    adjoints: list[Tensor | None] = [None] * len(trajectory)
    for step, weight in loop.judged_steps:
        theta = run.steps.theta(trajectory[step])
        loss, grad, outputs = loss_and_grad(program.query, theta, queries, loop.first + step)
        losses = weight * loss if losses is None else torch.add(losses, loss, alpha=weight)
        adjoints[step] = grad * (weight * share)
    grad = run.steps.theta(run.reverse(trajectory, adjoints))
    assert losses is not None  # the query loss after the last step is always computed
    return MetaGradient(losses, outputs, (grad.sum(0),), run.steps.rates_grad)


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
