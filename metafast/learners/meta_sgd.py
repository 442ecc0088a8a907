"""Meta-SGD is MAML that learns a rate for every parameter."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from metafast.inner.rates import Rate
from metafast.learners.maml import MAML
from metafast.program.losses import LossLike


class MetaSGD(MAML):
    """Meta-SGD (Li et al. 2017, 1707.09835) is MAML with a learned rate for every parameter.

    ``theta_{s+1} = theta_s - alpha * grad L(theta_s)`` elementwise, ``alpha [P]`` learned with ``theta``:
    ``dJ/dalpha = -sum_s v_{s+1} * g_s``. ``lr`` is the initial rate, or a pair to draw the rates from; ``options`` are
    those of :class:`MAML`.
    """

    name = "metasgd"
    paper = "Li, Zhou, Chen, Li 2017, 1707.09835"
    # The settings of the paper and of its public code.
    recipe_changes: ClassVar = {"classification": {"steps": 1, "test_steps": (0, 1), "iterations": 40_000}}

    def __init__(
        self, model: nn.Module, *, loss: LossLike, lr: float | tuple[float, float] = 0.1, steps: int = 1, **options: Any
    ) -> None:
        super().__init__(model, loss=loss, lr=Rate(lr, "parameter", learn=True), steps=steps, **options)
