"""Offers the derivatives of each task's loss at given parameters: gradients, and products with the Hessian."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metafast.executors import Executor
from metafast.inner.autocast import in_own_dtype
from metafast.program import Program
from metafast.tasks import Batch

Vector = Tensor | Mapping[str, Tensor]
"""A vector of parameters: ``[T, P]``, ``[P]`` for all tasks, or tensors by the names of the parameters."""


@dataclass(frozen=True)
class TaskLoss:
    """Is the loss ``L_t(theta_t)`` of each of T tasks at the parameters ``at [T, P]``; ``learner.task_loss`` makes it.

    Vectors go in as ``[T, P]``, ``[P]``, or as a dict by the names of parameters, where those that are missing are
    zero; they come out as ``[T, P]`` in the order of :meth:`by_name`. All parameters count, those too that no inner
    loop moves. ``step`` is the number of inner steps that led to ``at``, which ``per_step`` batch norm depends on. No
    graph is kept. With conjugate gradients on :meth:`hvp` it gives the implicit gradient of iMAML (Rajeswaran et al.
    2019, 1909.04630) and influence functions.
    """

    program: Program
    executor: Executor
    at: Tensor
    batch: Batch
    step: int = 0

    @in_own_dtype
    def value(self) -> Tensor:
        """Returns the losses ``[T]``."""
        return self.executor.loss_and_grad(self.program, self.at, self.batch, self.step)[0]

    @in_own_dtype
    def grad(self) -> Tensor:
        """Returns the gradients ``g_t = dL_t/dtheta_t``, ``[T, P]``."""
        return self.executor.loss_and_grad(self.program, self.at, self.batch, self.step)[1]

    @in_own_dtype
    def jvp(self, u: Vector) -> Tensor:
        """Returns the derivatives ``<g_t, u_t>`` of the losses along ``u``, ``[T]``."""
        return (self.grad().double() * self.vector(u)).sum(1).to(self.at.dtype)

    @in_own_dtype
    def hvp(self, u: Vector) -> Tensor:
        """Returns the products ``H_t u_t`` with the Hessians ``H_t = d^2 L_t/dtheta_t^2``, ``[T, P]``."""
        return self.executor.hvp(self.program, self.at, self.batch, self.vector(u), self.step)

    def vector(self, u: Vector) -> Tensor:
        """Returns ``u`` as ``[T, P]``.

        Raises:
            ValueError: its shape is another, or a name is no parameter's.
        """
        tasks, size = self.at.shape
        if isinstance(u, Mapping):
            u = self._joined(u)
        if not isinstance(u, Tensor) or u.shape not in ((size,), (tasks, size)):
            what = f"a vector of shape {list(u.shape)}" if isinstance(u, Tensor) else f"a {type(u).__name__}"
            raise ValueError(
                f"{what}: give one of [{tasks}, {size}], of [{size}] for all tasks, or a "
                "dict of tensors by the names of the parameters"
            )
        return u.detach().to(self.at).expand(tasks, -1).contiguous()

    def by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """Splits a vector ``[..., P]`` into tensors ``[..., *shape]`` by the names of the parameters."""
        return self.program.by_name(vector)

    def _joined(self, u: Mapping[str, Tensor]) -> Tensor:
        """Joins tensors ``[*shape]`` or ``[T, *shape]``, given by name, into ``[T, P]``."""
        known = {p.name: p for p in self.program.parameters}
        tasks = self.at.shape[0]
        joined = torch.zeros_like(self.at)
        for name, tensor in u.items():
            parameter = known.get(name)
            if parameter is None or tuple(tensor.shape) not in (parameter.shape, (tasks, *parameter.shape)):
                wanted = f"one of {list(known)}" if parameter is None else f"of shape {list(parameter.shape)}"
                raise ValueError(
                    f"{name!r} of shape {list(tensor.shape)}: the parameter is {wanted}, with or without an axis of "
                    f"{tasks} tasks before"
                )
            place = slice(parameter.offset, parameter.offset + parameter.size)
            joined[:, place] = tensor.reshape(-1, parameter.size)
        return joined
