"""Goes the way back of the inner loop by the graph of each gradient, for Programs with layers that have no rules.

    g_s = grad L(theta_s), recorded by autograd,    H_s' u = d <g_s, u> / d theta_s

This is what a plain loop in PyTorch computes, one step at a time. It serves where a Hessian need not be symmetric,
because a ``torch.autograd.Function`` has the derivative that its author wrote, and where forward mode has no number, as
at the zero of a norm.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from metafast.executors.reference.inner_loop import InnerLoopRun
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.program.interpreter import Pass
from metafast.tasks import Batch

_MISSING = re.compile(r"derivative for '?(?:aten::)?_*(\w+?)(?:_backward)?'? is not implemented")


class InnerLoopByAutograd(InnerLoopRun):
    """Runs the inner loop as ``InnerLoopRun`` does, and the way back by autograd."""

    def reverse(self, trajectory: Sequence[Tensor], adjoints: Sequence[Tensor | None]) -> Tensor:
        """Returns the adjoint of ``z_0``, and adds to the gradient of the rates (see ``InnerLoopRun``)."""
        steps = len(trajectory) - 1
        carried = self._last(trajectory[steps], adjoints[steps])
        for step in reversed(range(steps)):
            z = trajectory[step]
            gradient, leaf = self._gradient(self.steps.theta(z), step)
            carried, u = self.steps.back(z, gradient.detach(), carried, self.loop.first + step)
            if gradient.requires_grad:
                carried = self.steps.add(carried, self._product(gradient, leaf, u))
            carried = self._with(carried, adjoints[step])
        return carried

    def product(self, theta: Tensor, step: int, u: Tensor) -> Tensor:
        """Returns ``H' u`` at ``theta``, both ``[T, P]``."""
        gradient, leaf = self._gradient(theta, step)
        return self._product(gradient, leaf, u) if gradient.requires_grad else torch.zeros_like(theta)

    def _gradient(self, theta: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Returns the gradient ``[T, P]`` in the adapted parameters, with its graph, and the theta that it belongs to.

        A first-order loop has no use for the graph.
        """
        with torch.set_grad_enabled(not self.loop.first_order):
            leaf = theta.detach().requires_grad_(not self.loop.first_order)
            run = Pass(self.program, leaf, self.support.at(step), self.loop.first + step, self.adapted)
            run.forward()
            run.loss()
            return run.flat(run.backward()), leaf

    def _product(self, gradient: Tensor, leaf: Tensor, u: Tensor) -> Tensor:
        """Returns ``d <gradient, u> / d leaf``.

        Raises:
            ValueError: torch has no second derivative of some operation; the text names the node.
        """
        try:
            return torch.autograd.grad(gradient, leaf, u, materialize_grads=True)[0]
        except (RuntimeError, NotImplementedError) as error:
            raise _without_second_derivative(self.program, error) from error


def hvp(program: Program, theta: Tensor, batch: Batch, u: Tensor, step: int) -> Tensor:
    """Computes ``H' u [T, P]`` of each task's loss at ``theta [T, P]``; of ``u`` the adapted parameters count."""
    loop = InnerLoop.judged_last(1, first=step)
    return InnerLoopByAutograd(program, loop, theta.new_ones(1, 1), batch).product(theta, 0, u)


def _without_second_derivative(program: Program, error: Exception) -> Exception:
    """Makes the error that names the node whose gradient torch cannot differentiate."""
    missing = _MISSING.search(str(error))
    if missing is None:
        return error
    name = missing[1]
    nodes = [node for node in program.derived if name in str(getattr(node.layer, "operations", ""))]
    node = (nodes or program.derived)[0]
    where = f"at {node.line}" if node.line else f"in {node.name!r}"
    return ValueError(
        f"torch has no second derivative of {name} {where}; write it by other operations, or use first_order=True"
    )
