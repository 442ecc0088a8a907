"""InnerLoop: what is done to a task, from its first inner step to the losses that judge it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class InnerLoop(NamedTuple):
    """S steps ``theta_{s+1} = theta_s - alpha_s grad L_support(theta_s)``, judged by ``sum_s w_s L_query(theta_s)``.

    It says how a computation goes and holds no tensor: the rates ``alpha [1 or S, 1 or P]`` go through the executors
    beside the parameters. Two equal ones are one key of a cache.
    """

    steps: int
    """S."""
    step_weights: tuple[float, ...]
    """``w_0 .. w_S``, the weights of the query losses after 0 .. S steps."""
    first_order: bool = False
    """Whether the Hessian terms of the way back are dropped."""
    learns_rates: bool = False
    """Whether the gradient of the rates is wanted."""

    @classmethod
    def judged_last(cls, steps: int, first_order: bool = False, learns_rates: bool = False) -> InnerLoop:
        """The loop whose query loss counts after the last step only."""
        return cls(steps, (*[0.0] * steps, 1.0), first_order, learns_rates)

    @property
    def judged_steps(self) -> list[tuple[int, float]]:
        """The steps whose query loss is computed, with their weights: those that count, and always the last."""
        return [(s, w) for s, w in enumerate(self.step_weights) if w != 0 or s == self.steps]


def rates_by_step(rates: Tensor, steps: int) -> list[Tensor]:
    """One row of ``rates [1 or S, 1 or P]`` for each inner step; the last row serves all later steps."""
    return [rates[min(s, rates.shape[0] - 1)] for s in range(steps)]


def sum_to_rate(products: Tensor, width: int) -> Tensor:
    """``[..., P]`` summed to one row of rates: ``[width]``, ``width`` either P or 1."""
    total = products.flatten(0, -2).sum(0) if products.dim() > 1 else products
    return total.sum(0, keepdim=True) if width == 1 else total
