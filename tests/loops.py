"""An executor's functions as tests call them: the loop's settings by keyword, gradients as flat vectors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from metafast.executors import ExecutionPlan
from metafast.program.inner_loop import InnerLoop
from metafast.tasks import TaskBatch, TaskShapes


class Found(NamedTuple):
    """A meta-gradient with ``grad [P]`` in one piece."""

    losses: Tensor
    outputs: Tensor
    grad: Tensor
    rates_grad: Tensor | None


def loop(steps, step_weights=None, first_order=False, learns_rates=True):
    """``step_weights``: ``w_0 .. w_S``; ``None`` puts all weight on the last step."""
    weights = (*[0.0] * steps, 1.0) if step_weights is None else tuple(step_weights)
    return InnerLoop(steps, weights, first_order, learns_rates)


def meta_gradient(executor, program, theta, rates, tasks, steps, **options):
    found = executor.meta_gradient(program, loop(steps, **options), (theta,), rates, tasks)
    return Found(found.losses, found.outputs, found.grads[0], found.rates_grad)


def adapt(executor, program, theta, rates, support, steps):
    return executor.adapt(program, loop(steps), theta, rates, support)


def adapt_vjp(executor, program, trajectory, rates, support, v, **options):
    return executor.adapt_vjp(program, loop(len(trajectory) - 1, **options), trajectory, rates, support, v)


def plan(executor, program, x, ragged=False, queries=None, steps=1, precision=None):
    """For ``tasks``, or for samples ``x [T, n, ...]`` and as many ``queries``."""
    shapes = x.shapes if isinstance(x, TaskBatch) else TaskShapes.of_samples(x)
    if queries is not None:
        shapes = shapes._replace(query_x=shapes.query_x[:1] + (queries,) + shapes.query_x[2:])
    if ragged:
        shapes = shapes._replace(ragged=True)
    return executor.plan(program, loop(steps), shapes, precision or executor.precision)


def refusal(executor, program, x, **options):
    """Why the executor has no plan; ``None`` where it has one."""
    found = plan(executor, program, x, **options)
    return found if isinstance(found, str) else None


def layers(executor, program, x, **options):
    """How each layer is run."""
    found = plan(executor, program, x, **options)
    assert isinstance(found, ExecutionPlan), found
    return found.layers()
