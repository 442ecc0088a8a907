"""Compares the speed of metafast with that of the loop that it replaces, after their gradients were compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from metafast.learners import MAML
from metafast.machine import timings
from metafast.tasks import TaskBatch
from metafast.verification import torch_loop
from metafast.verification.agreement import ONE_STEP, Answer, agreement

# A time is the median over at least this many calls and seconds.
CALLS, SECONDS = 5, 1.0


@dataclass(frozen=True)
class SpeedComparison:
    """The second-order meta-gradient of the same tensors by metafast and by a plain torch loop.

    Args:
        tasks: how many tasks the batch has.
        metafast: the median seconds of metafast.
        loop: the median seconds of the loop.
        difference: the norm of the difference of the two gradients, relative to the norm of the loop's.
    """

    tasks: int
    metafast: float
    loop: float
    difference: float

    @property
    def ratio(self) -> float:
        """Returns how many times faster than the loop metafast is."""
        return self.loop / self.metafast

    @property
    def agrees(self) -> bool:
        """Tells whether the difference is within its tolerance; only then does the ratio mean something."""
        return self.difference <= ONE_STEP.value

    def to_json(self) -> dict[str, float]:
        """Returns JSON values, with the speeds in tasks a second."""
        return {
            "metafast_tasks_per_s": self.tasks / self.metafast,
            "loop_tasks_per_s": self.tasks / self.loop,
            "difference": self.difference,
        }

    def __str__(self) -> str:
        if not self.agrees:
            return f"the meta-gradients differ by {self.difference:.1e} (relative): no comparison"
        return (
            f"{self.tasks / self.metafast:,.0f} tasks/s, plain torch loop {self.tasks / self.loop:,.0f} tasks/s: "
            f"{self.ratio:.1f} times (the meta-gradients agree to {self.difference:.0e})"
        )


def compare(learner: MAML, tasks: TaskBatch, lr: float) -> SpeedComparison:
    """Times one meta-gradient by ``learner``, whose inner rate is ``lr``, and by the loop, after comparing the two."""
    device = tasks.support_x.device.type
    loss = learner.loss.function

    def by_metafast() -> Tensor:
        learner.zero_grad()
        return learner.backward(tasks).losses

    def by_loop() -> tuple[Tensor, Mapping[str, Tensor]]:
        return torch_loop.meta_gradient(learner.model, loss, tasks, lr, learner.steps, learner.adapted_names)

    mean = by_metafast().mean()
    gradient = {name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None}
    difference = agreement(_answer(mean, gradient), _answer(*by_loop())).gradient
    metafast, loop = (median(timings(call, device, SECONDS, fewest=CALLS)) for call in (by_metafast, by_loop))
    learner.zero_grad()
    return SpeedComparison(len(tasks), metafast, loop, difference)


def _answer(loss: Tensor, gradient: Mapping[str, Tensor]) -> Answer:
    arrays = {name: value.detach().cpu().numpy() for name, value in gradient.items()}
    return loss.detach().cpu().numpy(), arrays
