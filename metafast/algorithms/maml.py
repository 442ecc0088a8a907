"""MAML and the learners that are settings of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from metafast.algorithms.learner import Learner, LearnerOutput, finite_weights
from metafast.inner import Adapt, TaskLoss, recorded
from metafast.losses import LossLike
from metafast.rates import Rate
from metafast.tasks import TaskBatch


class MAML(Learner):
    """Model-agnostic meta-learning (Finn, Abbeel, Levine 2017, 1703.03400), with its exact second-order gradient.

    ``theta_{s+1} = theta_s - alpha grad L_support(theta_s)``, ``s = 0..S-1``; the meta-loss is
    ``mean_t L_query(theta_S)``, or ``mean_t sum_s w_s L_query(theta_s)`` with ``step_weights``.

    Args:
        first_order: drop the Hessian terms (FOMAML). May be changed at any time.
        step_weights: ``w_1 .. w_S``; ``None`` puts all weight on the last step. May be changed at any time.
        **options: see :class:`Learner`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: LossLike,
        lr: float | Rate,
        steps: int = 1,
        first_order: bool = False,
        step_weights: Iterable[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, loss=loss, lr=lr, steps=steps, **options)
        self.first_order = first_order
        self.step_weights = step_weights

    @property
    def step_weights(self) -> list[float]:
        """Weights of the query losses after steps ``0..S``."""
        return self._weights

    @step_weights.setter
    def step_weights(self, weights: Iterable[float] | None) -> None:
        self._weights = finite_weights(weights, self.steps)

    def forward(self, tasks: TaskBatch, create_graph: bool = False) -> LearnerOutput:
        """Adapts to each task and judges it on its query set; ``.loss.backward()`` gives the exact meta-gradient.

        ``create_graph=True`` records the unrolled computation through the reference path instead: slower and larger,
        but differentiable any number of times.
        """
        choice = self._prepare(tasks)
        if torch.is_grad_enabled():
            self._track(tasks)
        theta, rate = self.flat_parameters(), self.rate()
        if create_graph:
            if self.first_order:
                raise ValueError("create_graph=True records the exact gradient; it has no first-order form")
            losses, outputs = recorded(self.program, theta, rate, tasks, self.steps, self.step_weights)
        else:
            recording = torch.is_grad_enabled() and (theta.requires_grad or rate.requires_grad)
            if not recording:
                theta, rate = theta.detach(), rate.detach()
            steps = Adapt.apply(theta, rate, choice.executor, self.program, tasks.support, self.steps, self.first_order)
            weighted = [(s, w) for s, w in enumerate(self.step_weights) if s and (w or s == self.steps)]
            losses = theta.new_zeros(len(tasks))
            for step, weight in weighted:
                loss, outputs = TaskLoss.apply(steps[step - 1], choice.executor, self.program, tasks.query, step)
                losses = losses + weight * loss
        return LearnerOutput(losses, outputs)

    def backward(self, tasks: TaskBatch) -> LearnerOutput:
        """Adds the meta-gradient of the mean loss to ``.grad`` of all meta-parameters, in one call of the executor."""
        choice = self._prepare(tasks)
        self._track(tasks)
        rate = self._rates()
        losses, outputs, gradients, rate_gradient = choice.executor.gradients(
            self.program,
            self._sources,
            rate,
            tasks,
            self.steps,
            step_weights=self.step_weights,
            first_order=self.first_order,
            needs_lr=rate.requires_grad,
        )
        self._add_gradients(gradients)
        if rate.requires_grad:
            rate.backward(rate_gradient)
        return LearnerOutput(losses, outputs)


class FOMAML(MAML):
    """First-order MAML: the Hessian terms of the meta-gradient are dropped (1703.03400, section 5.2)."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, first_order=True, **options)


class MetaSGD(MAML):
    """Meta-SGD (Li et al. 2017, 1707.09835): MAML with a learned rate for every parameter.

    ``theta_{s+1} = theta_s - alpha * grad L(theta_s)`` elementwise, ``alpha [P]`` learned with ``theta``:
    ``dJ/dalpha = -sum_s v_{s+1} * g_s``. ``lr`` is the initial rate, or a pair to draw the rates from.
    """

    def __init__(
        self, model: nn.Module, *, loss: LossLike, lr: float | tuple[float, float] = 0.1, steps: int = 1, **options: Any
    ) -> None:
        super().__init__(model, loss=loss, lr=Rate(lr, "parameter", learn=True), steps=steps, **options)


class ANIL(MAML):
    """Almost no inner loop (Raghu et al. 2020, 1909.09157): the inner loop moves only ``head``.

    The features of the support set do not change, so they are computed once; the body still gets its exact gradient,
    through the query loss and through the mixed second derivatives.
    """

    def __init__(self, model: nn.Module, *, head: str | nn.Module | Iterable[str | nn.Module], **options: Any) -> None:
        super().__init__(model, adapt=head, **options)


class MAMLPlusPlus(MAML):
    """MAML++ (Antoniou, Edwards, Storkey 2019, 1810.09502), as settings of MAML.

    Learned rates for each layer and step, batch norm parameters for each step (not adapted), and, moved by
    :meth:`at_epoch`, a multi-step loss that fades into the last step's and first order before second order. The cosine
    rate of the outer optimiser is torch's ``CosineAnnealingLR``.

    Args:
        multi_step_epochs: epochs until the loss weights have settled on the last step.
        second_order_from: the epoch from which second-order gradients are used.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: LossLike,
        lr: float = 0.1,
        steps: int = 5,
        multi_step_epochs: int = 10,
        second_order_from: int = 0,
        bn: str = "per_step",
        adapt: Iterable[str | nn.Module] | str | nn.Module | None = None,
        **options: Any,
    ) -> None:
        moved = without_batch_norm(model) if adapt is None else adapt
        rate = Rate(lr, ("layer", "step"), learn=True)
        super().__init__(model, loss=loss, lr=rate, steps=steps, bn=bn, adapt=moved, **options)
        self.multi_step_epochs, self.second_order_from = multi_step_epochs, second_order_from
        self.at_epoch(0)

    def at_epoch(self, epoch: int) -> None:
        """Sets the loss weights and the order of differentiation for an epoch, counted from 0."""
        self.step_weights = multi_step_weights(epoch, self.steps, self.multi_step_epochs)
        self.first_order = epoch < self.second_order_from


def multi_step_weights(epoch: int, steps: int, horizon: int) -> list[float]:
    """``w_1 .. w_S`` of MAML++: all ``1/S`` at epoch 0, nearly all on the last step from ``horizon`` epochs on.

    ``w_s = max(1/S - e/(S h), 0.03/S)`` for ``s < S`` and ``w_S = min(1/S + e (S-1)/(S h), 1 - (S-1) 0.03/S)``.

    Raises:
        ValueError: a negative epoch, or fewer than one step or one epoch of fading.
    """
    if epoch < 0 or steps < 1 or horizon < 1:
        raise ValueError(
            f"epoch={epoch}, steps={steps}, multi_step_epochs={horizon}: epochs count from 0, the others from 1"
        )
    faded = max(1 / steps - epoch / (steps * horizon), 0.03 / steps)
    last = min(1 / steps + epoch * (steps - 1) / (steps * horizon), 1 - (steps - 1) * 0.03 / steps)
    return [faded] * (steps - 1) + [last]


def without_batch_norm(model: nn.Module) -> list[str]:
    """Names of all parameters but those of batch norms: what the MAML papers adapt."""
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [name for name, _ in model.named_parameters() if not any(name.startswith(norm + ".") for norm in norms)]


__all__ = ["ANIL", "FOMAML", "MAML", "MAMLPlusPlus", "MetaSGD", "multi_step_weights", "without_batch_norm"]
