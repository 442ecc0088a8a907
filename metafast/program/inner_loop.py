"""Describes as data what is done to a task, from its first inner step to the query losses that judge it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from metafast.program.one_thread import one_thread


class InnerLoop(NamedTuple):
    """Describes S steps ``theta_{s+1} = theta_s - alpha_s grad L_support(theta_s)`` and ``sum_s w_s L_query(theta_s)``.

    It holds no tensor: executors take the rates ``alpha [1 or S, 1 or P]`` beside the parameters. Equal loops are
    computed alike, and so serve as the key of a cache.

    Attributes:
        steps: the number S of inner steps.
        step_weights: ``w_0 .. w_S``, the weights of the query losses after 0 .. S steps.
        first_order: whether the Hessian terms of the way back are dropped.
        learns_rates: whether the gradient in the rates is computed.
    """

    steps: int
    step_weights: tuple[float, ...]
    first_order: bool = False
    learns_rates: bool = False

    @classmethod
    def judged_last(cls, steps: int, first_order: bool = False, learns_rates: bool = False) -> InnerLoop:
        """Makes the loop whose query loss counts after the last step only."""
        return cls(steps, (*[0.0] * steps, 1.0), first_order, learns_rates)

    @property
    def judged_steps(self) -> list[tuple[int, float]]:
        """Lists the steps whose query loss is computed, with their weights: those that count, and always the last."""
        return [(s, w) for s, w in enumerate(self.step_weights) if w != 0 or s == self.steps]


def rates_by_step(rates: Tensor, steps: int) -> list[Tensor]:
    """Returns a row ``[1 or P]`` of ``rates [1 or S, 1 or P]`` for each step; the last row serves all later steps."""
    return [rates[min(s, rates.shape[0] - 1)] for s in range(steps)]


def sum_to_rate(products: Tensor, width: int) -> Tensor:
    """Sums ``products [..., P]`` to one row of rates, ``[width]``, where ``width`` is P or 1."""
    total = products.flatten(0, -2).sum(0) if products.dim() > 1 else products
    if width > 1:
        return total
    with one_thread():
        return total.sum(0, keepdim=True)
