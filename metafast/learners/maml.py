"""MAML learns an initialisation from which a few gradient steps learn a task."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from metafast.executors import Choice
from metafast.inner.autocast import in_own_dtype
from metafast.inner.autograd import MetaLoss, flattened
from metafast.inner.rates import Rate
from metafast.inner.recorded import Sets, recorded, recorded_adapt
from metafast.inner.rules import PLAIN, SGD
from metafast.learners.adapted_parameters import without_batch_norm
from metafast.learners.base import LearnerOutput, LearnerRecipe
from metafast.learners.gradient import GradientLearner
from metafast.learners.outside_gradients import Outside
from metafast.learners.seeds import with_seeds
from metafast.program.inner_loop import InnerLoop
from metafast.program.losses import LossLike
from metafast.tasks import Batch, TaskBatch


class MAML(GradientLearner):
    """Model-agnostic meta-learning (Finn, Abbeel, Levine 2017, 1703.03400) takes its exact second-order gradient here.

    ``theta_{s+1} = theta_s - alpha grad L_support(theta_s)``, ``s = 0..S-1``; the meta-loss is
    ``mean_t L_query(theta_S)``, or ``mean_t sum_s w_s L_query(theta_s)`` with ``step_weights``.
    Its recipes move no parameter of a batch norm, as the MAML papers do.

    Args:
        first_order: drop the Hessian terms (FOMAML).
        step_weights: ``w_1 .. w_S``; ``None`` puts all weight on the last step.
        inner: what an inner step makes of the gradient: ``mf.SGD(momentum=0.9)``. All but plain steps are recorded by
            autograd, in the place of an executor's own way back: slower and larger, and as exact.
        **options: ``query_loss``, ``adapt``, ``bn``, ``output``, ``backend`` and ``precision`` of
            :class:`~metafast.learners.gradient.GradientLearner`, which raises its errors too.
    """

    name = "maml"
    paper = "Finn, Abbeel, Levine 2017, 1703.03400"

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: LossLike,
        lr: float | Rate,
        steps: int = 1,
        first_order: bool = False,
        step_weights: Iterable[float] | None = None,
        inner: SGD = PLAIN,
        **options: Any,
    ) -> None:
        super().__init__(model, loss=loss, lr=lr, steps=steps, **options)
        self.first_order = first_order
        self.step_weights = step_weights
        self.inner = inner

    @classmethod
    def recipe_options(cls, recipe: LearnerRecipe, model: nn.Module) -> dict[str, Any]:
        """Lets the inner loop of a recipe move all but batch norm."""
        return {"adapt": without_batch_norm(model)}

    @property
    def first_order(self) -> bool:
        """Whether the Hessian terms are dropped."""
        return self._first_order

    @first_order.setter
    def first_order(self, first_order: bool) -> None:
        if not isinstance(first_order, bool):
            raise TypeError(f"first_order={first_order!r}: give True, which drops the Hessian terms, or False")
        self._first_order = first_order

    @property
    def inner(self) -> SGD:
        """What an inner step makes of the gradient."""
        return self._inner

    @inner.setter
    def inner(self, inner: SGD) -> None:
        if not isinstance(inner, SGD):
            raise TypeError(f"inner={inner!r}: give an mf.SGD, such as mf.SGD(momentum=0.9)")
        self._inner = inner

    @property
    def step_weights(self) -> list[float]:
        """They are the weights of the query losses after steps ``0..S``; assign ``w_1 .. w_S`` to change them."""
        return list(self._weights)

    @step_weights.setter
    def step_weights(self, weights: Iterable[float] | None) -> None:
        self._weights, self._judged_last = tuple(finite_weights(weights, self.steps)), weights is None

    def _made_for_steps(self) -> list[tuple[str, str]]:
        found = super()._made_for_steps()
        if not self._judged_last:
            found.append(("there are step_weights", "set learner.step_weights = None first"))
        return found

    def _follow_steps(self) -> None:
        self.step_weights = None

    def schedule(self, iteration: int, iterations: int) -> tuple[object, ...]:
        """Changes nothing; a recording holds the weights of the query losses and the order of differentiation."""
        return self.step_weights, self.first_order

    @in_own_dtype
    def forward(self, tasks: TaskBatch, create_graph: bool = False) -> LearnerOutput:
        """Adapts to each task and judges it on its query set; ``.loss.backward()`` gives the exact meta-gradient.

        Gradients also go to tensors of the batch, and to what the loss reads, where they require one; the outputs can
        be differentiated too. ``create_graph=True`` records the unrolled computation through the reference path
        instead: slower and larger, but differentiable any number of times.

        Raises:
            TypeError, ValueError: the batch does not fit the model.
        """
        if torch.compiler.is_compiling():
            if not self._inner.is_plain:
                raise RuntimeError(f"{self._inner} is recorded by autograd; call the learner uncompiled for it")
            return self._compiled(tasks, self._weights, self.first_order, create_graph)
        known = self._known_for(tasks)
        tasks = with_seeds(known.program, tasks)
        if torch.is_grad_enabled():
            self._track_statistics(tasks)
        outside = self._outside(known.choice, tasks)
        if outside.own and not torch.is_grad_enabled():
            with torch.enable_grad():  # the first step differentiates the loss in these parameters
                return self._recorded(tasks, outside).detach()
        must = outside.must_be_recorded() or known.is_recorded
        if create_graph or outside.own or not self._inner.is_plain or (torch.is_grad_enabled() and must):
            out = self._recorded(tasks, outside)
        else:
            theta, rate, program = self.flat_parameters(), self.inner_rates(), self._held_program()
            spec, tensors = flattened(tasks)
            losses, outputs, *_ = MetaLoss.apply(
                theta, rate, known.choice.executor, program, self.loop, spec, self.loss_modules, *tensors,
                *self.loss_modules.parameters(),
            )  # fmt: skip
            out = LearnerOutput(losses, outputs)
        if torch.is_grad_enabled():
            self._leave_traces(tasks)
        return out

    def _recorded(self, tasks: TaskBatch, outside: Outside) -> LearnerOutput:
        theta, rate = self.flat_parameters(), self.inner_rates()
        sets = Sets(tasks.support, tasks.query)
        with self._recording():
            found = recorded(self._held_program(), self.loop, theta, rate, sets, outside.own, self._inner)
            return LearnerOutput(*found)

    def _adapted(self, choice: Choice, support: Batch, steps: int, outside: Outside) -> Tensor:
        if self._inner.is_plain:
            return super()._adapted(choice, support, steps, outside)
        loop, theta, rates = InnerLoop.judged_last(steps), self.flat_parameters(), self.inner_rates()
        with torch.set_grad_enabled(bool(outside.own)):
            return recorded_adapt(self.program, loop, theta, rates, support, outside.own, self._inner)[-1].detach()

    def explain(self, x: Tensor | None = None) -> str:
        """Says what it says of any gradient-based learner, and how inner steps that are not plain are computed."""
        said = super().explain(x)
        return said if self._inner.is_plain else f"{said}\n  inner steps: {self._inner}, recorded by autograd"

    def graph_obstacle(self, tasks: TaskBatch) -> str | None:
        """Says what it says of any gradient-based learner, and that autograd records inner steps that are not plain."""
        return super().graph_obstacle(tasks) if self._inner.is_plain else f"{self._inner} is recorded by autograd"

    @in_own_dtype
    def backward(self, tasks: TaskBatch) -> LearnerOutput:
        """Adds the meta-gradient of the mean loss to ``.grad`` of all meta-parameters, in one call of the executor.

        It goes through ``forward`` where a subclass has one of its own, or where hooks watch the learner.
        """
        known = self._known_for(tasks)
        if known.program.draws:
            tasks = with_seeds(known.program, tasks)
        watched = self._forward_hooks or self._forward_pre_hooks or type(self).forward is not MAML.forward
        if watched or self._outside(known.choice, tasks).names or known.is_recorded or not self._inner.is_plain:
            with torch.enable_grad():
                return super().backward(tasks)
        if known.tracks_statistics:
            self._track_statistics(tasks)
        rate = self.inner_rates()
        loop = self._loop(learns_rates=rate.requires_grad)
        found = known.choice.executor.meta_gradient(known.program, loop, known.parameters, rate, tasks)
        self._add_gradients(found.grads)
        if rate.requires_grad:
            rate.backward(found.rates_grad)
        if known.leaves_traces:
            self._leave_traces(tasks)
        return LearnerOutput(found.losses, found.outputs)

    @property
    def loop(self) -> InnerLoop:
        """The inner loop as the executors read it, by the settings of now."""
        return self._loop(learns_rates=self.rate.value.requires_grad)

    def _loop(self, learns_rates: bool) -> InnerLoop:
        return InnerLoop(self.steps, self._weights, self.first_order, learns_rates)


def finite_weights(weights: Iterable[float] | None, steps: int) -> list[float]:
    """Returns the weights of the query losses after steps ``0..S``; ``None`` puts all weight on the last.

    Raises:
        ValueError: not S numbers, one that is not finite, or nothing but zeros.
    """
    if weights is None:
        return [0.0] * steps + [1.0]
    try:
        values = [float(w) for w in weights]
    except (TypeError, ValueError):
        values = []
    if len(values) == steps + 1 and values[0] == 0:
        del values[0]  # as a learner tells them
    if len(values) != steps or not all(math.isfinite(w) for w in values) or not any(values):
        raise ValueError(
            f"step_weights={weights!r}: give {steps} finite numbers, not all zero, one for the query loss after each "
            "step"
        )
    return [0.0, *values]
