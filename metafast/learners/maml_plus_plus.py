"""MAML++ adds to MAML what makes it train well with many steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn

from metafast.inner.rates import Rate
from metafast.learners.adapted_parameters import without_batch_norm
from metafast.learners.batch_norm import BatchNormMode
from metafast.learners.maml import MAML
from metafast.learners.settings import check_whole
from metafast.program.losses import LossLike

# A training is divided into this many epochs (Antoniou et al. 2019).
EPOCHS = 100


class MAMLPlusPlus(MAML):
    """MAML++ (Antoniou, Edwards, Storkey 2019, 1810.09502) is a set of settings of MAML.

    They are: learned rates for each layer and step, batch norm parameters for each step (not adapted), and, moved by
    :meth:`at_epoch`, a multi-step loss that fades into the last step's, and first order before second order. The cosine
    rate of the outer optimiser is torch's ``CosineAnnealingLR``.

    Args:
        multi_step_epochs: epochs until the loss weights have settled on the last step.
        second_order_from: the epoch from which second-order gradients are used.
        **options: those of :class:`MAML`.

    Raises:
        ValueError: ``multi_step_epochs`` is below 1, or ``second_order_from`` below 0.
    """

    name = "maml++"
    paper = "Antoniou, Edwards, Storkey 2019, 1810.09502"
    # The Omniglot configuration of the paper's code.
    recipe_changes: ClassVar = {
        "classification": {
            "network": "conv4-pool", "steps": 5, "inner_lr": 0.1, "tasks": 8, "iterations": 50_000,
            "lr": 1e-3, "schedule": "cosine", "final_lr": 1e-5, "test_steps": (0, 5),
        },
        "regression": {"steps": 5, "schedule": "cosine", "final_lr": 1e-5, "test_steps": (0, 1, 5)},
    }  # fmt: skip

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: LossLike,
        lr: float | tuple[float, float] = 0.1,
        steps: int = 5,
        multi_step_epochs: int = 10,
        second_order_from: int = 0,
        bn: BatchNormMode = "per_step",
        adapt: Iterable[str | nn.Module] | str | nn.Module | None = None,
        **options: Any,
    ) -> None:
        moved = without_batch_norm(model) if adapt is None else adapt
        rate = Rate(lr, ("layer", "step"), learn=True)
        super().__init__(model, loss=loss, lr=rate, steps=steps, bn=bn, adapt=moved, **options)
        self._epoch = 0
        self._set_epochs(multi_step_epochs, second_order_from)

    @property
    def multi_step_epochs(self) -> int:
        """Epochs until the loss weights have settled on the last step."""
        return self._multi_step_epochs

    @multi_step_epochs.setter
    def multi_step_epochs(self, epochs: int) -> None:
        self._set_epochs(epochs, self.second_order_from)

    @property
    def second_order_from(self) -> int:
        """The epoch from which second-order gradients are used."""
        return self._second_order_from

    @second_order_from.setter
    def second_order_from(self, epoch: int) -> None:
        self._set_epochs(self.multi_step_epochs, epoch)

    def _set_epochs(self, multi_step: int, second_order: int) -> None:
        """Sets both, and what follows from them for the epoch of now."""
        check_whole("multi_step_epochs", multi_step, 1, "the epochs in which the loss weights fade are counted from 1")
        check_whole("second_order_from", second_order, 0, "epochs are whole numbers")
        self._multi_step_epochs, self._second_order_from = multi_step, second_order
        self.at_epoch(self._epoch)

    def schedule(self, iteration: int, iterations: int) -> tuple[object, ...]:
        """Goes to the iteration's epoch, of the ``EPOCHS`` that a training has."""
        self.at_epoch(EPOCHS * iteration // iterations)
        return super().schedule(iteration, iterations)

    def at_epoch(self, epoch: int) -> None:
        """Sets the loss weights and the order of differentiation for an epoch, counted from 0."""
        self.step_weights = multi_step_weights(epoch, self.steps, self.multi_step_epochs)
        self.first_order = epoch < self.second_order_from
        self._epoch = epoch


def multi_step_weights(epoch: int, steps: int, horizon: int) -> list[float]:
    """Returns ``w_1 .. w_S`` of MAML++: all ``1/S`` at epoch 0, nearly all on the last step from ``horizon`` epochs on.

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
