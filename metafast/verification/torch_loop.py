"""MAML as one writes it by hand, which metafast replaces: a loop over tasks that autograd records and
differentiates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metafast.tasks import TaskBatch

LossFunction = Callable[[Tensor, Tensor], Tensor]


def task_loss(
    model: nn.Module,
    loss: LossFunction,
    start: Mapping[str, Tensor],
    tasks: TaskBatch,
    t: int,
    lr: float,
    steps: int,
    adapted: Collection[str],
) -> Tensor:
    """Returns the query loss of task ``t`` after ``steps`` inner steps ``theta - lr * grad`` from ``start``.

    Only the parameters in ``adapted`` move. Autograd can differentiate the loss with respect to ``start``.
    """
    fast = dict(start)
    for _ in range(steps):
        support = loss(functional_call(model, fast, tasks.support_x[t]), tasks.support_y[t])
        moved = {name: fast[name] for name in adapted}
        grads = torch.autograd.grad(support, list(moved.values()), create_graph=True)
        fast = fast | {name: p - lr * g for (name, p), g in zip(moved.items(), grads, strict=True)}
    return loss(functional_call(model, fast, tasks.query_x[t]), tasks.query_y[t])


def meta_gradient(
    model: nn.Module, loss: LossFunction, tasks: TaskBatch, lr: float, steps: int, adapted: Collection[str]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Returns the mean query loss of all tasks, and its exact gradient in all parameters, by name."""
    start: dict[str, Tensor] = dict(model.named_parameters())
    total = torch.zeros((), device=tasks.support_x.device)
    for t in range(len(tasks)):
        total = total + task_loss(model, loss, start, tasks, t, lr, steps, adapted)
    mean = total / len(tasks)
    return mean.detach(), dict(zip(start, torch.autograd.grad(mean, list(start.values())), strict=True))
