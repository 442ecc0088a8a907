"""The narrow waist: what an executor offers to everything above it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.tasks import Batch, TaskBatch, TaskShapes


class MetaGradient(NamedTuple):
    """Of a batch of T tasks: ``losses [T]``, ``outputs [T, m, ...]`` at the last step, and the gradients of the *mean*
    loss: ``grads``, one for each of the parameters that were given, and ``rates_grad`` of the shape of the rates
    (``None`` where the loop does not learn them)."""

    losses: Tensor
    outputs: Tensor
    grads: Sequence[Tensor]
    rates_grad: Tensor | None


@dataclass(frozen=True)
class ExecutionPlan:
    """How batches of one kind are computed.

    Attributes:
        executor: the one to call, in the precision that was asked for.
        layers: for each node of the Program, how it is run.
        graph_obstacle: why no CUDA graph can hold the computation; ``None`` where one can.
        memory: says, when called, how a meta-gradient goes through memory and the peak that this leads to; ``None``
            where that is not planned. It may take as long as a first step.
    """

    executor: Executor
    layers: tuple[str, ...]
    graph_obstacle: str | None
    memory: Callable[[], str | None]


class Executor(ABC):
    """Runs a Program for T tasks at once.

    Shapes: ``params [P]`` (shared by all tasks) or ``[T, P]``; ``rates`` broadcasts to ``[S, P]``; ``step`` is the
    inner step that a pass belongs to (it matters to ``per_step`` batch norm; the query pass after S steps is step S).
    """

    name: str
    proven = True
    """Has it been held to the truth on the devices that it runs on? ``auto`` takes no other."""
    precisions: ClassVar[Mapping[str, str]] = {"float32": "products and sums as exact as the model's own type"}
    """What the operands of products may be rounded to, and what each name means."""
    precision = "float32"
    remedy = ""
    """What makes it available where it has no plan for want of something that can be installed."""

    def plan(
        self, program: Program, loop: InnerLoop, shapes: TaskShapes, precision: str = "float32"
    ) -> ExecutionPlan | str:
        """How it computes ``loop`` for batches of these ``shapes``, or in words why it does not."""
        if precision not in self.precisions:
            return f"it has no precision {precision!r}"
        return self.with_precision(precision).plan_own(program, loop, shapes)

    @abstractmethod
    def plan_own(self, program: Program, loop: InnerLoop, shapes: TaskShapes) -> ExecutionPlan | str:
        """``plan`` in the executor's own precision."""

    @abstractmethod
    def predict(self, program: Program, params: Tensor, x: Tensor, step: int = 0) -> Tensor:
        """Outputs ``[T, n, ...]``."""

    @abstractmethod
    def loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``losses [T]``, ``grad [T, P]`` of each task's loss in all its parameters, ``outputs [T, n, ...]``."""

    @abstractmethod
    def adapt(self, program: Program, loop: InnerLoop, params: Tensor, rates: Tensor, support: Batch) -> Tensor:
        """``trajectory [S+1, T, P]``: ``theta_{s+1} = theta_s - alpha_s grad L(theta_s)`` on the adapted parameters."""

    @abstractmethod
    def adapt_vjp(
        self, program: Program, loop: InnerLoop, trajectory: Tensor, rates: Tensor, support: Batch, v: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The vector-Jacobian product of ``adapt``.

        ``v [T, P]`` is the adjoint of ``theta_S``, or ``[S+1, T, P]`` of the whole trajectory. Returns the adjoint of
        ``theta_0`` for each task, ``[T, P]``, and that of the rates, of their shape (summed over tasks; ``None`` where
        the loop does not learn them). The recursion, with ``u = alpha_s v`` on the adapted parameters:
        ``d alpha_s = -g_s v``, ``v <- v - H_s u``; first order drops ``H_s``.
        """

    def hvp(self, program: Program, params: Tensor, batch: Batch, u: Tensor, step: int = 0) -> Tensor:
        """``H u [T, P]``: the Hessian of each task's loss times ``u [T, P]`` or ``[P]``, in the rows of all parameters
        and the columns of the adapted ones.

        By default by way of ``adapt_vjp``.
        """
        return hvp_by_adapt_vjp(self, program, params, batch, u, step)

    def meta_gradient(
        self, program: Program, loop: InnerLoop, parameters: Sequence[Tensor], rates: Tensor, tasks: TaskBatch
    ) -> MetaGradient:
        """Gradient of ``mean_t sum_s w_s L_query,t(theta_s)`` in the parameters and the rates; no graph is kept.

        ``parameters`` are tensors that make up ``theta_0 [P]`` one after another: a module's, or the flat vector alone.
        By default this is the composition of the functions above; executors that can do all of it at once override it.
        """
        with torch.no_grad():
            theta, rates = _flatten_dense_tensors(parameters), rates.detach()
            trajectory = self.adapt(program, loop, theta, rates, tasks.support)
            v = torch.zeros_like(trajectory)
            losses = theta.new_zeros(len(tasks))
            for step, weight in loop.judged_steps:
                loss, grad, outputs = self.loss_and_grad(program, trajectory[step], tasks.query, step)
                losses = losses + weight * loss
                v[step] = grad * (weight / len(tasks))
            grad, rates_grad = self.adapt_vjp(program, loop, trajectory, rates, tasks.support, v)
            return MetaGradient(losses, outputs, _unflatten_dense_tensors(grad.sum(0), parameters), rates_grad)

    def with_precision(self, precision: str) -> Executor:
        """The executor that does the same in one of ``precisions``."""
        if precision == self.precision:
            return self
        if precision not in self._siblings:
            self._siblings[precision] = self.copy_with(precision)
        return self._siblings[precision]

    def copy_with(self, precision: str) -> Executor:
        """A new one with the same settings in another of its ``precisions``."""
        raise NotImplementedError(f"executor {self.name!r} has the precision {self.precision!r} alone")

    def observed(self, wrap: Callable[[Program], Program]) -> Executor | None:
        """The executor that does the same with ``wrap(program)`` in the place of each Program as it is run, layer by
        layer, by Python; ``None`` where Python does not see the layers. It may keep ``wrap``'s answers."""
        return None

    @cached_property
    def _siblings(self) -> dict[str, Executor]:
        return {}


_TRIALS = 4
_LEAST_SHARE = 0.1  # of ``a H u`` in ``u``, below which rounding would cost it more than one digit


def hvp_by_adapt_vjp(
    executor: Executor, program: Program, params: Tensor, batch: Batch, u: Tensor, step: int = 0
) -> Tensor:
    """``H u [T, P]`` as the way back of an inner loop computes it: one step at the rate ``a`` gives ``u - a H u``.

    ``a`` is chosen anew until both terms are of one size, so that neither drowns in the other's rounding.
    """
    tasks = batch.x.shape[0]
    u = u.expand(tasks, -1).contiguous()
    trajectory = params.expand(step + 2, tasks, -1).contiguous()
    loop, rates = InnerLoop.judged_last(step + 1), u.new_zeros(step + 1, 1)
    rates[step] = 1.0
    for _ in range(_TRIALS):
        back, _ = executor.adapt_vjp(program, loop, trajectory, rates, batch, u)
        product = (u - back) / rates[step]
        share = float((u - back).norm() / u.norm())
        if _LEAST_SHARE < share < 1 / _LEAST_SHARE:
            break
        rates[step] /= share if share > 0 else torch.finfo(u.dtype).eps
    return product
