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
from metafast.program.inner_loop import InnerLoop, sum_to_rate
from metafast.program.interpreter import Pass
from metafast.tasks import Batch

_MISSING = re.compile(r"derivative for '?(?:aten::)?_*(\w+?)(?:_backward)?'? is not implemented")


class InnerLoopByAutograd(InnerLoopRun):
    """Runs the inner loop as ``InnerLoopRun`` does, and the way back by autograd."""

    def reverse(self, trajectory: Sequence[Tensor], adjoints: Sequence[Tensor | None]) -> Tensor:
        """Returns the adjoint of ``theta_0``, ``[T, P]``, and adds to ``rates_grad`` (see ``InnerLoopRun``)."""
        steps = len(trajectory) - 1
        carried = adjoints[steps]
        assert carried is not None  # the last step always has an adjoint
        for step in reversed(range(steps)):
            row = min(step, self.rates.shape[0] - 1)
            gradient, product = self.step_back(trajectory[step], step, self.rates[row] * carried)
            if self.rates_grad is not None:
                self.rates_grad[row] -= sum_to_rate(carried * gradient, self.rates.shape[1])
            of_step = adjoints[step]
            carried = carried - product if of_step is None else carried - product + of_step
        return carried

    def step_back(self, theta: Tensor, step: int, u: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradient at ``theta [T, P]`` in the adapted parameters, and ``H' u``; zero in a first-order loop.

        Raises:
            ValueError: torch has no second derivative of some operation; the text names the node.
        """
        with torch.set_grad_enabled(not self.loop.first_order):
            leaf = theta.detach().requires_grad_(not self.loop.first_order)
            run = Pass(self.program, leaf, self.support, step, self.adapted)
            run.forward()
            run.loss()
            gradient = run.flat(run.backward())
        if not gradient.requires_grad:
            return gradient, torch.zeros_like(theta)
        try:
            (product,) = torch.autograd.grad(gradient, leaf, u, materialize_grads=True)
        except (RuntimeError, NotImplementedError) as error:
            raise _without_second_derivative(self.program, error) from error
        return gradient.detach(), product


def hvp(program: Program, theta: Tensor, batch: Batch, u: Tensor, step: int) -> Tensor:
    """Computes ``H' u [T, P]`` of each task's loss at ``theta [T, P]``; of ``u`` the adapted parameters count."""
    loop = InnerLoop.judged_last(step + 1)
    return InnerLoopByAutograd(program, loop, theta.new_ones(1, 1), batch).step_back(theta, step, u)[1]


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
