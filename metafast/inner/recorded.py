"""Computes a learner's losses by plain operations that autograd records: every order, and every tensor that is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metafast.inner.autocast import in_own_dtype
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop, rates_by_step
from metafast.program.interpreter import Pass
from metafast.tasks import Batch, TaskBatch


class OwnParameter(NamedTuple):
    """Names a parameter that the loss reads by itself, beside the outputs.

    Attributes:
        number: its number in the Program.
        tensor: the tensor that the loss reads; ``theta_0`` is made of it.
    """

    number: int
    tensor: Tensor


@in_own_dtype
def recorded(
    program: Program, loop: InnerLoop, params: Tensor, rates: Tensor, tasks: TaskBatch,
    own: Sequence[OwnParameter] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes losses ``[T]`` and outputs ``[T, m, ...]`` while autograd records every inner step.

    The results can be differentiated to any order, in all that they are made of. ``params`` are ``[P]``,
    ``rates [1 or S, 1 or P]``.
    """
    trajectory = recorded_adapt(program, loop, params, rates, tasks.support, own)
    nothing = (False,) * len(program.parameters)
    losses = params.new_zeros(len(tasks))
    for step, weight in loop.judged_steps:
        run = Pass(program.query, trajectory[step], tasks.query, step, nothing)
        outputs = run.forward()
        losses = losses + weight * run.loss()
    return losses, outputs


@in_own_dtype
def recorded_adapt(
    program: Program, loop: InnerLoop, params: Tensor, rates: Tensor, support: Batch, own: Sequence[OwnParameter] = ()
) -> list[Tensor]:
    """Takes the inner steps from ``params [P]`` and returns ``theta_0 .. theta_S``, each ``[T, P]``."""
    adapted = tuple(p.adapted for p in program.parameters)
    theta = params.expand(support.x.shape[0], -1)
    trajectory = [theta]
    prefix = Pass(program, theta, support, 0, adapted).forward_prefix()
    for step, rate in enumerate(rates_by_step(rates, loop.steps)):
        run = Pass(program, trajectory[-1], support, step, adapted, prefix)
        run.forward()
        losses = run.loss()
        gradient = run.flat(run.backward())
        if step == 0 and own:
            gradient = _with_own(program, gradient, losses, own)
        if loop.first_order:
            gradient = gradient.detach()
        trajectory.append(torch.addcmul(trajectory[-1], rate, gradient, value=-1))
    return trajectory


def _with_own(program: Program, gradient: Tensor, losses: Tensor, own: Sequence[OwnParameter]) -> Tensor:
    """Puts the whole derivatives of ``losses [T]`` in the parameters that the loss reads itself into ``gradient``.

    Before the first step the task's weights are these very parameters, so that what the loss makes of them counts.
    Later they are others, and for the inner loop the parameters are constants.
    """
    tensors = [o.tensor for o in own]
    of_task = [torch.autograd.grad(loss, tensors, create_graph=True) for loss in losses]
    pieces = list(gradient.split([p.size for p in program.parameters], 1))
    for o, of_tasks in zip(own, zip(*of_task, strict=True), strict=True):
        if program.parameters[o.number].adapted:
            pieces[o.number] = torch.stack(of_tasks).flatten(1)
    return torch.cat(pieces, 1)
