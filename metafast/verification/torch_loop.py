"""What metafast replaces: MAML as one writes it by hand, a loop over tasks that autograd records and differentiates."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metafast.tasks import TaskBatch


def meta_gradient(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    tasks: TaskBatch,
    lr: float,
    steps: int,
    adapted: set[str],
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The mean query loss after ``steps`` inner steps on the parameters in ``adapted``, and its exact gradient."""
    start: dict[str, Tensor] = dict(model.named_parameters())
    total = torch.zeros((), device=tasks.support_x.device)
    for t in range(len(tasks)):
        fast = start
        for _ in range(steps):
            support = loss(functional_call(model, fast, tasks.support_x[t]), tasks.support_y[t])
            moved = {name: fast[name] for name in adapted}
            grads = torch.autograd.grad(support, list(moved.values()), create_graph=True)
            fast = fast | {name: p - lr * g for (name, p), g in zip(moved.items(), grads, strict=True)}
        total = total + loss(functional_call(model, fast, tasks.query_x[t]), tasks.query_y[t])
    mean = total / len(tasks)
    return mean.detach(), dict(zip(start, torch.autograd.grad(mean, list(start.values())), strict=True))
