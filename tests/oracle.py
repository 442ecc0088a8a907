"""The slow truth: one task at a time, unrolled torch.autograd on the user's own module, in float64.

    theta_{s+1} = theta_s - alpha_s * grad L_support(theta_s),   J = mean_t sum_s w_s L_query(theta_s)

It knows a module and a batch of tasks and nothing of how metafast computes. Ragged tasks are cut to their samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

# The losses are named and the inner loop is written here once more: the oracle shares nothing with what it judges.
LOSSES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Truth:
    """Losses ``[T]``, each task's query outputs, and the gradients of the mean loss by name."""

    losses: Tensor
    outputs: list[Tensor]
    grads: Parameters


class Oracle:
    """The unrolled inner loop of one model.

    Args:
        model: the user's module; a copy of it in ``dtype`` is used.
        loss: a name or a callable for one task.
        steps: S.
        adapted: names of the parameters that the inner loop moves; ``None``: all.
        first_order: stop the gradient through each inner gradient.
        weights: ``w_1 .. w_S``; ``None``: the last alone.
        query_loss: the loss of the query sets, likewise; ``None``: the same.
        bn: ``task``, ``per_step`` (a row of the affine map for each of the steps ``0..S``), ``frozen`` or ``running``.
        dtype: another one than float64 is no truth: it shows what rounding does to it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | Callable[[Tensor, Tensor], Tensor],
        steps: int,
        *,
        adapted: Iterable[str] | None = None,
        first_order: bool = False,
        weights: Sequence[float] | None = None,
        query_loss: str | Callable[[Tensor, Tensor], Tensor] | None = None,
        bn: str = "task",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.model, self.dtype = copy.deepcopy(model).to(dtype), dtype
        self.loss = LOSSES[loss] if isinstance(loss, str) else loss
        self.query_loss = LOSSES[query_loss] if isinstance(query_loss, str) else query_loss or self.loss
        self.steps, self.first_order = steps, first_order
        self.weights = [0.0] * (steps - 1) + [1.0] if weights is None else list(weights)
        self.parameters = {n: p.detach().clone().requires_grad_() for n, p in self.model.named_parameters()}
        self.adapted = set(self.parameters) if adapted is None else set(adapted)
        self.by_step: set[str] = set()
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm):
                self._set_mode(name, module, bn)

    def _set_mode(self, name: str, module: _BatchNorm, bn: str) -> None:
        module.forward = partial(_batch_norm, module, bn in ("frozen", "running"))
        if bn == "per_step":
            for key in (f"{name}.{p}" for p, _ in module.named_parameters()):
                rows = self.parameters[key].detach().expand(self.steps + 1, -1).clone()
                self.parameters[key] = rows.requires_grad_()
                self.by_step.add(key)

    def predict(self, parameters: Mapping[str, Tensor], x: Tensor, step: int = 0) -> Tensor:
        """Outputs ``[n, ...]`` of one task."""
        at_step = {n: p[step] if n in self.by_step else p for n, p in parameters.items()}
        return functional_call(self.model, at_step, (x,))

    def support_loss(self, parameters: Mapping[str, Tensor], x: Tensor, y: Tensor, step: int = 0) -> Tensor:
        """The loss of one task."""
        return self.loss(self.predict(parameters, x, step), y)

    def adapt(self, parameters: Parameters, rates: Mapping[str, Tensor], x: Tensor, y: Tensor) -> list[Parameters]:
        """``theta_0 .. theta_S`` of one task, differentiable in ``parameters`` and ``rates`` to any order."""
        trajectory = [parameters]
        for step in range(self.steps):
            theta = trajectory[-1]
            moved = [n for n in theta if n in self.adapted]
            # A leaf of its own for each parameter, where the caller's are no part of a graph.
            theta = {n: p if p.requires_grad else p.detach().requires_grad_() for n, p in theta.items()}
            loss = self.support_loss(theta, x, y, step)
            grads = torch.autograd.grad(loss, [theta[n] for n in moved], create_graph=True, materialize_grads=True)
            if self.first_order:
                grads = [g.detach() for g in grads]
            new = {n: theta[n] - rates[n][step] * g for n, g in zip(moved, grads, strict=True)}
            trajectory.append({**theta, **new})
        return trajectory

    def losses(self, tasks, rates: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Weighted query losses ``[T]``, with their graph, and the outputs of each task at the last step."""
        losses, outputs = [], []
        for t in range(len(tasks)):
            x, y = self._samples(tasks.support_x[t], tasks.support_y[t], tasks.support_mask, t)
            qx, qy = self._samples(tasks.query_x[t], tasks.query_y[t], tasks.query_mask, t)
            trajectory = self.adapt(self.parameters, rates, x, y)
            total = torch.zeros((), dtype=self.dtype)
            for step, weight in enumerate(self.weights, start=1):
                out = self.predict(trajectory[step], qx, step)
                total = total + weight * self.query_loss(out, qy)
            losses.append(total)
            outputs.append(out.detach())
        return torch.stack(losses), outputs

    def gradient(self, tasks, rates: Mapping[str, Tensor], **leaves: Tensor) -> Truth:
        """Gradients of the mean loss in all parameters and in ``leaves``, tensors that ``rates`` were made from."""
        losses, outputs = self.losses(tasks, rates)
        wanted = {**self.parameters, **leaves}
        grads = torch.autograd.grad(losses.mean(), list(wanted.values()), materialize_grads=True)
        return Truth(losses.detach(), outputs, dict(zip(wanted, grads, strict=True)))

    def hessian_vector(self, x: Tensor, y: Tensor, direction: Mapping[str, Tensor], step: int = 0) -> Parameters:
        """``H u`` of one task's loss at the parameters, ``u`` by name (absent: zero)."""
        names = list(self.parameters)
        loss = self.support_loss(self.parameters, *self._samples(x, y, None, 0), step)
        grads = torch.autograd.grad(
            loss, [self.parameters[n] for n in names], create_graph=True, materialize_grads=True
        )
        along = sum((g * direction[n]).sum() for n, g in zip(names, grads, strict=True) if n in direction)
        return dict(
            zip(names, torch.autograd.grad(along, list(self.parameters.values()), materialize_grads=True), strict=True)
        )

    def _samples(self, x: Tensor, y: Tensor, mask: Tensor | None, t: int) -> tuple[Tensor, Tensor]:
        x, y = x.to(self.dtype), y.to(self.dtype) if y.is_floating_point() else y
        return (x, y) if mask is None else (x[mask[t]], y[mask[t]])


def _batch_norm(module: _BatchNorm, given: bool, x: Tensor) -> Tensor:
    """F.batch_norm written out: torch's own is wrong from the third derivative on."""
    shape = (1, -1, *(1,) * (x.dim() - 2))
    axes = (0, *range(2, x.dim()))
    mean = module.running_mean if given else x.mean(axes)
    variance = module.running_var if given else x.var(axes, unbiased=False)
    y = (x - mean.view(shape)) / torch.sqrt(variance.view(shape) + module.eps)
    return y * module.weight.view(shape) + module.bias.view(shape) if module.affine else y


def directional_derivative(function: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor, h: float = 1e-6):
    """``d/de function(at + e direction)`` by a central difference."""
    return (function(at + h * direction) - function(at - h * direction)) / (2 * h)
