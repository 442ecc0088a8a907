"""MAML as one writes it by hand, which metafast replaces: a loop over tasks that autograd records and
differentiates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metafast.inner.rules import SGD
from metafast.tasks import TaskBatch
from metafast.verification.inner_updates import InnerUpdate

LossFunction = Callable[[Tensor, Tensor], Tensor]


def task_loss(
    model: nn.Module,
    loss: LossFunction,
    start: Mapping[str, Tensor],
    tasks: TaskBatch,
    t: int,
    update: InnerUpdate,
    steps: int,
    adapted: Collection[str],
) -> Tensor:
    """Returns the query loss of task ``t`` after ``steps`` inner steps from ``start``, each as ``update`` takes it.

    Only the parameters in ``adapted`` move. Autograd can differentiate the loss with respect to ``start`` and the rate.
    """
    fast = dict(start)
    state = update.start({name: fast[name] for name in adapted})
    for s in range(steps):
        support = tasks.support.at(s)
        value = loss(functional_call(model, fast, support.x[t]), support.y[t])
        moved = {name: fast[name] for name in adapted}
        grads = torch.autograd.grad(value, list(moved.values()), create_graph=True)
        moved, state = update(moved, dict(zip(moved, grads, strict=True)), state, s + 1)
        fast = fast | moved
    return loss(functional_call(model, fast, tasks.query_x[t]), tasks.query_y[t])


def meta_gradient(
    model: nn.Module, loss: LossFunction, tasks: TaskBatch, lr: float, steps: int, adapted: Collection[str]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Returns the mean query loss of all tasks, and its exact gradient in all parameters, by name.

    Inner steps go along the gradient, ``theta - lr * grad``.
    """
    start: dict[str, Tensor] = dict(model.named_parameters())
    update = InnerUpdate(SGD(), lr, torch)
    total = torch.zeros((), device=tasks.support_x.device)
    for t in range(len(tasks)):
        total = total + task_loss(model, loss, start, tasks, t, update, steps, adapted)
    mean = total / len(tasks)
    return mean.detach(), dict(zip(start, torch.autograd.grad(mean, list(start.values())), strict=True))
