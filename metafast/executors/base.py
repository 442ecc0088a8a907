"""Defines the functions that every executor offers, which all that is built on executors goes through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from metafast.executors.composition import Adjoints, Sets, evaluate, way_back
from metafast.kernels.contract.layer import Loss
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.program.interpreter import Pass
from metafast.tasks import Batch, TaskBatch, TaskShapes


class MetaGradient(NamedTuple):
    """Holds the query losses of a batch of T tasks, and the gradients of their *mean*.

    Attributes:
        losses: ``[T]``, the weighted sum over steps of each task's query losses.
        outputs: ``[T, m, ...]``, the model's outputs for the query samples after the last step.
        grads: one gradient for each tensor of parameters that was given, of its shape.
        rates_grad: the gradient of the rates, of their shape; ``None`` where the loop does not learn them.
    """

    losses: Tensor
    outputs: Tensor
    grads: Sequence[Tensor]
    rates_grad: Tensor | None


@dataclass(frozen=True)
class ExecutionPlan:
    """Says how batches of the same shapes are computed.

    Attributes:
        executor: the executor to call, in the precision that was asked for.
        layers: returns words for each node of the Program on how it is run.
        graph_obstacle: the reason why no CUDA graph can hold the computation; ``None`` where one can.
        memory: returns words on how a meta-gradient goes through memory and on the peak in bytes, or ``None`` where
            that is not planned. The call may take as long as a first step.
    """

    executor: Executor
    layers: Callable[[], tuple[str, ...]]
    graph_obstacle: str | None
    memory: Callable[[], str | None]


class Executor(ABC):
    """Runs a Program for T tasks at once.

    ``params`` are ``[P]``, shared by all tasks, or ``[T, P]``. ``rates`` are ``[1 or S, 1 or P]``, and under a rule
    ``[H, 1 or S, 1 or P]`` (see ``InnerLoop``). ``z`` is theta and, under a rule that has one, the state behind it,
    ``[T, (1 + K) P]``. Support sets may have an axis of steps (see ``Batch``). ``step`` is the inner step that a pass
    belongs to: ``per_step`` batch norm depends on it. The query pass after S steps is step S. Functions that take one
    batch run it under ``program.loss``, ``meta_gradient`` the query sets under ``program.query.loss``.
    """

    name: str
    """The name by which users ask for it."""
    proven = True
    """Whether it has been held to the truth on the devices that it runs on; ``auto`` takes no other."""
    precisions: ClassVar[Mapping[str, str]] = {"float32": "products and sums as exact as the model's own type"}
    """The precisions that users may ask for, each with words on what is rounded to what."""
    precision = "float32"
    """The name of the precision in which this executor computes."""
    remedy = ""
    """The command or machine that makes it available where something is missing that can be installed."""

    def plan(
        self, program: Program, loop: InnerLoop, shapes: TaskShapes, precision: str | None = None
    ) -> ExecutionPlan | str:
        """Says how it computes ``loop`` for batches of these ``shapes``, or in words why it cannot.

        ``precision`` is one of ``precisions``; ``None`` is the executor's own.
        """
        if precision is None:
            return self.plan_own(program, loop, shapes)
        if precision not in self.precisions:
            return f"it has no precision {precision!r}"
        return self.with_precision(precision).plan_own(program, loop, shapes)

    @abstractmethod
    def plan_own(self, program: Program, loop: InnerLoop, shapes: TaskShapes) -> ExecutionPlan | str:
        """Makes the ``plan`` in the executor's own precision."""

    @abstractmethod
    def predict(
        self, program: Program, params: Tensor, x: Tensor, step: int = 0, seeds: Tensor | None = None
    ) -> Tensor:
        """Computes the outputs ``[T, n, ...]`` for ``x [T, n, ...]``.

        ``seeds`` int64 ``[T]`` are those of a ``program`` that draws random numbers.
        """

    @abstractmethod
    def loss_and_grad(
        self, program: Program, params: Tensor, batch: Batch, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes ``losses [T]``, the gradients ``[T, P]`` of each in all parameters, and ``outputs [T, n, ...]``."""

    @abstractmethod
    def adapt(self, program: Program, loop: InnerLoop, params: Tensor, rates: Tensor, support: Batch) -> Tensor:
        """Takes the inner steps and returns the trajectory ``z_0 .. z_S``, ``[S+1, T, (1 + K) P]``.

        ``theta_{s+1} = theta_s - alpha_s grad L(theta_s)``, or what the rule says, on the adapted parameters; the
        others stay as they are. ``params`` are theta_0, or ``z_0`` where it goes on from a state.
        """

    @abstractmethod
    def adapt_vjp(
        self, program: Program, loop: InnerLoop, trajectory: Tensor, rates: Tensor, support: Batch, v: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the vector-Jacobian product of ``adapt``, by the recursion from the last step to the first

            (v, u) <- the adjoints of z_s and of g_s,    v <- v + H_s u

        where ``g_s`` and ``H_s`` are the gradient and the Hessian of the support loss at ``theta_s``. Without a rule
        ``u = -alpha_s v`` on the adapted parameters, and ``d alpha_s = -g_s v``. A first-order loop leaves ``H_s u``
        out.

        Args:
            trajectory: ``z_0 .. z_S`` as ``adapt`` returns them, ``[S+1, T, (1 + K) P]``.
            v: the adjoint of ``z_S``, ``[T, (1 + K) P]``, or of the whole trajectory, ``[S+1, T, (1 + K) P]``.

        Returns:
            The adjoint of ``z_0`` for each task, ``[T, (1 + K) P]``, and that of the rates, summed over tasks and of
            the shape of ``rates``; ``None`` where the loop does not learn them.
        """

    def hvp(self, program: Program, params: Tensor, batch: Batch, u: Tensor, step: int = 0) -> Tensor:
        """Computes ``H u [T, P]``, the Hessian of each task's loss times ``u [T, P]`` or ``[P]``.

        ``H`` has the rows of all parameters and the columns of the adapted ones. The default finds the product by
        ``adapt_vjp``.
        """
        return hvp_by_adapt_vjp(self, program, params, batch, u, step)

    @torch.no_grad()
    def outputs_vjp(self, program: Program, params: Tensor, batch: Batch, g: Tensor, step: int = 0) -> Tensor:
        """Computes the adjoints ``[T, P]`` of all parameters from the adjoint ``g [T, n, ...]`` of the outputs.

        The default takes one reference pass for all tasks together.
        """
        theta = params.expand(batch.x.shape[0], -1)
        run = Pass(program, theta, batch, step, (True,) * len(program.parameters))
        run.forward()
        return run.flat(run.vjp(g))

    def meta_gradient(
        self, program: Program, loop: InnerLoop, parameters: Sequence[Tensor], rates: Tensor, tasks: TaskBatch
    ) -> MetaGradient:
        """Computes the gradient of ``mean_t sum_s w_s L_query,t(theta_s)`` in the parameters and the rates.

        ``parameters`` are tensors that make up ``theta_0 [P]`` one after another: those of a module, or the flat vector
        alone. No graph is kept. The default calls the functions above; executors that compute all at once override it.
        """
        with torch.no_grad():
            theta, rates = _flatten_dense_tensors(parameters), rates.detach()
            sets = Sets(tasks.support, tasks.query)
            found = evaluate(self, program, loop, theta, rates, sets)
            adjoints = Adjoints(theta.new_full((len(tasks),), 1 / len(tasks)))
            grad, rates_grad = way_back(self, program, loop, rates, sets, (found.kept, found.query_grads), adjoints)
            grads = _unflatten_dense_tensors(grad[:, : program.size].sum(0), parameters)
            return MetaGradient(found.losses, found.outputs, grads, rates_grad)

    def with_precision(self, precision: str) -> Executor:
        """Returns the executor with the same settings in one of ``precisions``; it is made once and kept."""
        if precision == self.precision:
            return self
        if precision not in self._siblings:
            self._siblings[precision] = self.copy_with(precision)
        return self._siblings[precision]

    def copy_with(self, precision: str) -> Executor:
        """Makes an executor with the same settings in another of its ``precisions``."""
        raise NotImplementedError(f"executor {self.name!r} has the precision {self.precision!r} alone")

    def observed(self, wrap: Callable[[Program], Program]) -> Executor | None:
        """Returns an executor that runs ``wrap(program)`` in the place of each Program, so that layers can be watched.

        It returns ``None`` where the layers are not run one by one from Python. It may keep what ``wrap`` returns.
        """
        return None

    @cached_property
    def _siblings(self) -> dict[str, Executor]:
        """Holds the executors with the same settings in other precisions, by precision."""
        return {}


def losses_with_targets(program: Program, shapes: TaskShapes) -> tuple[tuple[str, Loss, torch.Size, torch.dtype], ...]:
    """Returns for support and query sets the name, shape and dtype of the targets, with the loss that reads them."""
    return (
        ("support_y", program.loss, shapes.support_y, shapes.dtypes[1]),
        ("query_y", program.query.loss, shapes.query_y, shapes.dtypes[3]),
    )


_TRIALS = 4
_LEAST_SHARE = 0.1
"""The least ratio of ``|a H u|`` to ``|u|``: below it, rounding in ``u - a H u`` costs ``H u`` more than one digit."""


def hvp_by_adapt_vjp(
    executor: Executor, program: Program, params: Tensor, batch: Batch, u: Tensor, step: int = 0
) -> Tensor:
    """Computes ``H u [T, P]`` by the way back of one inner step: at the rate ``a`` it turns ``u`` into ``u - a H u``.

    ``a`` is chosen anew until both terms are of similar size, so that neither is lost in the other's rounding.
    """
    tasks = batch.x.shape[0]
    u = u.expand(tasks, -1).contiguous()
    trajectory = params.expand(step + 2, tasks, -1).contiguous()
    loop = InnerLoop.judged_last(step + 1)
    rates = u.new_zeros(step + 1, 1)
    rates[step] = 1.0
    for _ in range(_TRIALS):
        back, _ = executor.adapt_vjp(program, loop, trajectory, rates, batch, u)
        product = (u - back) / rates[step]
        share = float((u - back).norm() / u.norm())
        if _LEAST_SHARE < share < 1 / _LEAST_SHARE:
            break
        rates[step] /= share if share > 0 else torch.finfo(u.dtype).eps
    return product
