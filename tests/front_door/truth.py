"""The truth of the front door: the user's own module under unrolled autograd, one task at a time.

It knows a module, its tasks and its loss, and nothing of metafast: whatever the module does when it is called, it does
here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

LOSSES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
Named = dict[str, Tensor]
Step = Callable[[Named, Named, Named], Named]


@dataclass(frozen=True)
class Truth:
    """The mean query loss, and its gradients by the name of the parameter or of the further leaf."""

    loss: Tensor
    grads: Named


@dataclass(frozen=True)
class Unrolled:
    """The inner loop of one module.

    Args:
        model: the module as the user holds it; its parameters are the leaves, its buffers stay untouched.
        loss: a name or a callable for one task.
        steps: S.
        lr: the inner rate.
        moved: names that the inner loop changes; ``None``: all that require a gradient.
        first_order: stop the gradient through each inner gradient.
        rule: ``(parameters, gradients, state) -> parameters``, another rule than SGD; it may fill ``state``.
        answer: picks what the loss reads from what the module returns.
    """

    model: nn.Module
    loss: str | Callable[..., Tensor]
    steps: int
    lr: float
    moved: Sequence[str] | None = None
    first_order: bool = False
    rule: Step | None = None
    answer: Callable[[Any], Tensor] = lambda returned: returned

    def gradient(self, tasks: Any, **leaves: Tensor) -> Truth:
        """Differentiates the mean query loss in all parameters that require it and in ``leaves``."""
        parameters = dict(self.model.named_parameters())
        wanted = {**{n: p for n, p in parameters.items() if p.requires_grad}, **leaves}
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            losses = [self._task(parameters, tasks, t) for t in range(len(tasks))]
            loss = torch.stack(losses).mean()
            grads = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
        return Truth(loss.detach(), dict(zip(wanted, grads, strict=True)))

    def _task(self, theta: Named, tasks: Any, t: int) -> Tensor:
        moved = [n for n, p in theta.items() if p.requires_grad] if self.moved is None else list(self.moved)
        state: Named = {}
        for _ in range(self.steps):
            loss = self._loss(theta, tasks.support_x, tasks.support_y, tasks.support_mask, t)
            found = torch.autograd.grad(
                loss, [theta[n] for n in moved], create_graph=not self.first_order, allow_unused=True
            )
            grads = {n: g for n, g in zip(moved, found, strict=True) if g is not None}
            if self.rule is None:
                theta = {**theta, **{n: theta[n] - self.lr * g for n, g in grads.items()}}
            else:
                theta = {**theta, **self.rule({n: theta[n] for n in grads}, grads, state)}
        return self._loss(theta, tasks.query_x, tasks.query_y, tasks.query_mask, t)

    def _loss(self, theta: Named, x: Any, y: Tensor, mask: Tensor | None, t: int) -> Tensor:
        # Samples of several tensors keep them in parts, which may have names.
        inputs = [part[t] if mask is None else part[t][mask[t]] for part in getattr(x, "parts", (x,))]
        names = getattr(x, "names", None)
        targets = y[t] if mask is None else y[t][mask[t]]
        # Each call finds the buffers as the user left them: what one call writes, the next does not see.
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        positional, named = (inputs, {}) if names is None else ((), dict(zip(names, inputs, strict=True)))
        returned = functional_call(self.model, {**theta, **buffers}, tuple(positional), named)
        loss = LOSSES[self.loss] if isinstance(self.loss, str) else self.loss
        return loss(self.answer(returned), targets)
