"""The truth of a module's meta-gradient: the module itself, unrolled by autograd in float64, one task at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

import metafast as mf


def unrolled(
    model: nn.Module,
    tasks: mf.TaskBatch,
    loss: Callable[[Tensor, Tensor], Tensor],
    rates: float | Mapping[str, Tensor | float],
    steps: int,
    leaves: tuple[Tensor, ...] = (),
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """The mean query loss, its gradients by name, and those in further ``leaves``.

    ``rates`` are one number, or by name a tensor ``[S, *shape]`` or what broadcasts to it. Every parameter that
    requires a gradient moves.
    """
    named = dict(model.named_parameters())
    moved = [name for name, p in named.items() if p.requires_grad]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    losses = []
    for t in range(len(tasks)):
        fast = dict(named)
        for step in range(steps):
            outputs = functional_call(
                model, {**fast, **{n: b.clone() for n, b in buffers.items()}}, (tasks.support_x[t],)
            )
            inner = torch.autograd.grad(
                loss(outputs, tasks.support_y[t]), [fast[n] for n in moved], create_graph=True, allow_unused=True
            )
            for name, g in zip(moved, inner, strict=True):
                if g is not None:
                    rate = rates[name] if isinstance(rates, Mapping) else rates
                    rate = rate[min(step, len(rate) - 1)] if isinstance(rate, Tensor) else rate
                    fast[name] = fast[name] - rate * g
        outputs = functional_call(model, {**fast, **{n: b.clone() for n, b in buffers.items()}}, (tasks.query_x[t],))
        losses.append(loss(outputs, tasks.query_y[t]))
    total = torch.stack(losses).mean()
    wanted = [*(named[n] for n in moved), *leaves]
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]
    return total.detach(), dict(zip(moved, grads, strict=False)), grads[len(moved) :]


def check(
    learner: nn.Module, tasks: mf.TaskBatch, loss: Callable[[Tensor, Tensor], Tensor], rate: float, steps: int
) -> None:
    """Holds ``learner.backward`` to the truth of its module as it is now."""
    total, grads, _ = unrolled(learner.model, tasks, loss, rate, steps)
    learner.zero_grad()
    out = learner.backward(tasks)
    torch.testing.assert_close(out.loss, total, rtol=1e-10, atol=1e-12)
    for name, p in learner.model.named_parameters():
        found = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found, grads.get(name, torch.zeros_like(p)), rtol=1e-8, atol=1e-11, msg=name)
