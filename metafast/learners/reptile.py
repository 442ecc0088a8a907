"""Reptile moves towards where the tasks' own training leads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metafast.executors import Choice, Executor
from metafast.inner.autocast import in_own_dtype
from metafast.inner.rates import Rate
from metafast.inner.rules import Adam
from metafast.learners.base import LearnerOutput, LearnerRecipe, rate_beside
from metafast.learners.checks import check_steps
from metafast.learners.gradient import GradientLearner
from metafast.learners.outside_gradients import NOTHING, Outside, refuse
from metafast.learners.seeds import with_seeds
from metafast.learners.settings import check_whole
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.program.losses import LossLike
from metafast.program.rule import Rule
from metafast.tasks import Batch, TaskBatch, each_part, each_stacked


class Reptile(GradientLearner):
    """Reptile (Nichol, Achiam, Schulman 2018, 1803.02999) does ``theta <- theta + eps mean_t (theta_S,t - theta)``.

    :meth:`backward` gives the "gradient" ``theta - mean_t theta_S,t``, so an outer ``torch.optim.SGD`` with ``lr=eps``
    is Reptile. One task a batch is the serial form, many tasks the batched one.

    Args:
        optimizer: the inner optimiser: ``"sgd"``, or ``"adam"`` with ``beta1=0`` as in the paper's code:
            ``m <- 0.999 m + 0.001 g^2``, ``theta <- theta - lr g / (sqrt(m / (1 - 0.999^k)) + 1e-8)``, fresh by task.
        batch_size: samples of the support set that each inner step sees, in a fixed shuffled order that starts again
            where it ends; ``None``: all.
        **options: ``query_loss``, which only judges, ``adapt``, ``bn``, ``output``, ``backend`` and ``precision`` of
            :class:`~metafast.learners.gradient.GradientLearner`.

    Raises:
        ValueError: an unknown optimiser, a ``batch_size`` below 1, or rates that are to be learned.
    """

    name = "reptile"
    paper = "Nichol, Achiam, Schulman 2018, 1803.02999"
    # The Omniglot command lines of the paper's code.
    recipe_changes: ClassVar = {
        "classification": {
            "shots": 10, "queries": 1, "steps": 5, "inner_optimizer": "adam", "inner_lr": 1e-3, "tasks": 5,
            "iterations": 100_000, "lr": 1.0, "schedule": "linear", "test_steps": (0, 5, 50),
        },
        "regression": {
            "steps": 10, "inner_lr": 0.02, "tasks": 5, "lr": 1.0, "schedule": "linear", "test_steps": (0, 1, 10, 32),
        },
    }  # fmt: skip
    inner_optimizers = ("sgd", "adam")

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: LossLike,
        lr: float | Rate,
        steps: int = 5,
        optimizer: str = "sgd",
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, loss=loss, lr=lr, steps=steps, **options)
        if any(p.requires_grad for p in self.rate.parameters()):
            raise ValueError(
                f"lr={lr!r}: Reptile's update has no gradient for inner rates; use learn=False, or MetaSGD"
            )
        self.optimizer, self.batch_size = optimizer, batch_size

    @property
    def optimizer(self) -> str:
        """The inner optimiser."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: str) -> None:
        if optimizer not in self.inner_optimizers:
            raise ValueError(f"optimizer={optimizer!r} is unknown; Reptile's inner optimiser is 'sgd' or 'adam'")
        self._optimizer = optimizer

    @property
    def batch_size(self) -> int | None:
        """The samples of the support set that each inner step sees; ``None``: all."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int | None) -> None:
        if batch_size is not None:
            check_whole("batch_size", batch_size, 1, "an inner step takes a whole number of samples")
        self._batch_size = batch_size

    @classmethod
    def recipe_options(cls, recipe: LearnerRecipe, model: nn.Module) -> dict[str, Any]:
        """Takes the recipe's inner optimiser; all parameters move, those of batch norm too."""
        return {"optimizer": recipe.inner_optimizer}

    def outer_optimizer(self, lr: float) -> torch.optim.Optimizer:
        """Makes plain SGD: the "gradient" is the way to go itself, and ``lr`` is ``eps``."""
        parameters = list(self.parameters())
        return torch.optim.SGD(parameters, lr=rate_beside(parameters[0], lr), fused=True)

    def graph_obstacle(self, tasks: TaskBatch) -> str | None:
        """Says what it says of any gradient-based learner, and that the inner Adam waits for the host."""
        if self.optimizer == "adam":
            return "Reptile's inner Adam takes its mask from the host"
        return super().graph_obstacle(tasks)

    @in_own_dtype
    def forward(self, tasks: TaskBatch) -> LearnerOutput:
        """Judges the adapted models on the query sets. Reptile has no meta-loss: train it with :meth:`backward`.

        Raises:
            ValueError: something beside the parameters requires a gradient.
        """
        choice = self._known_for(tasks).choice
        tasks = with_seeds(self.program, tasks)
        if torch.is_grad_enabled():
            refuse("Reptile", self._outside(choice, tasks))
        with torch.no_grad():
            return self._on_queries(choice, self._theta(choice, tasks), tasks)

    @in_own_dtype
    @torch.no_grad()
    def backward(self, tasks: TaskBatch) -> LearnerOutput:
        """Adds ``theta - mean_t theta_S,t`` to ``.grad``; returns the query losses of the adapted models."""
        choice = self._known_for(tasks).choice
        tasks = with_seeds(self.program, tasks)
        refuse("Reptile", self._outside(choice, tasks))
        self._track_statistics(tasks)
        adapted = self._theta(choice, tasks)
        self._add_gradients(self.program.unflatten(self.flat_parameters() - adapted.mean(0)))
        return self._on_queries(choice, adapted, tasks)

    def _on_queries(self, choice: Choice, adapted: Tensor, tasks: TaskBatch) -> LearnerOutput:
        losses, _, outputs = choice.executor.loss_and_grad(self.program.query, adapted, tasks.query, self.steps)
        return LearnerOutput(losses, outputs)

    @property
    def _rule(self) -> Rule | None:
        return Adam(betas=(0.0, 0.999)) if self.optimizer == "adam" else None

    def _theta(self, choice: Choice, tasks: TaskBatch) -> Tensor:
        """Returns the adapted parameters ``[T, P]``."""
        check_steps(tasks, self.steps)
        return self._adapted(choice, tasks.support, self.steps, NOTHING)[:, : self.program.size]

    def _adapted(
        self, choice: Choice, support: Batch, steps: int, outside: Outside, start: Tensor | None = None, first: int = 0
    ) -> Tensor:
        if outside.own:
            refuse("Reptile", outside)
        if self.batch_size is None or support.each_step or steps == 0:
            return super()._adapted(choice, support, steps, outside, start, first)
        program, executor = self._of_minibatches(choice, support)
        loop, rates = InnerLoop.judged_last(steps, rule=self._rule, first=first), self.inner_rates()
        theta = self.flat_parameters() if start is None else start
        batches = [self._minibatch(support, first + step) for step in range(steps)]
        x, y = each_stacked([batch.x for batch in batches]), torch.stack([batch.y for batch in batches])
        masks = [batch.mask for batch in batches if batch.mask is not None]
        of_steps = Batch(x, y, torch.stack(masks) if masks else None, support.seeds, True)
        return executor.adapt(program, loop, theta, rates, of_steps)[-1]

    def _of_minibatches(self, choice: Choice, support: Batch) -> tuple[Program, Executor]:
        """Returns what minibatches are computed by: a model may do something else with fewer samples."""
        x, y, mask, *_ = self._minibatch(support, 0)
        program = self.captures.extended(self.program, x)
        if program is self.program:
            return program, choice.executor
        return program, self._choose(program, TaskBatch(x, y, x, y, mask, mask).shapes).executor

    def _minibatch(self, support: Batch, step: int) -> Batch:
        n = support.x.shape[1]
        if self.batch_size is None or self.batch_size >= n:
            return support
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        chosen = order[(torch.arange(self.batch_size) + step * self.batch_size) % n].to(support.x.device)
        mask = None if support.mask is None else support.mask[:, chosen]
        return Batch(each_part(lambda part: part[:, chosen], support.x), support.y[:, chosen], mask, support.seeds)
