"""Describes as data what is done to a task, from its first inner step to the query losses that judge it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from metafast.program.one_thread import one_thread
from metafast.program.rule import Rule


class InnerLoop(NamedTuple):
    """Describes S steps ``theta_{s+1} = theta_s - alpha_s grad L_support(theta_s)`` and ``sum_s w_s L_query(theta_s)``.

    It holds no tensor: executors take the rates ``alpha [1 or S, 1 or P]`` beside the parameters. Under a ``rule``
    these are the rates and the rule's hyper-parameters, ``[H, 1 or S, 1 or P]`` in float64, in the order of its
    ``hyper_names``. Equal loops are computed alike, and so serve as the key of a cache.

    Attributes:
        steps: the number S of inner steps.
        step_weights: ``w_0 .. w_S``, the weights of the query losses after 0 .. S steps.
        first_order: whether the Hessian terms of the way back are dropped.
        learns_rates: whether the gradient in the rates is computed.
        one_rate: whether a step has the same rate for all parameters, so that plain ``rates`` are ``[1 or S, 1]``.
        rule: what a step makes of the gradient; ``None``: the step above.
        first: the number of the first step, where others have gone before; steps are numbered from there.
        truncate: the way back of ``meta_gradient`` goes through the last so many steps, and takes what lies before for
            constants, but for theta_0 itself; ``None``: through all.
        memory: the most bytes that ``z`` of the steps may take that are kept for the way back; ``None``: 1 GiB, and
            more where no plan needs less.
    """

    steps: int
    step_weights: tuple[float, ...]
    first_order: bool = False
    learns_rates: bool = False
    one_rate: bool = False
    rule: Rule | None = None
    first: int = 0
    truncate: int | None = None
    memory: int | None = None

    @classmethod
    def judged_last(
        cls, steps: int, first_order: bool = False, learns_rates: bool = False, rule: Rule | None = None, first: int = 0
    ) -> InnerLoop:
        """Makes the loop whose query loss counts after the last step only."""
        weights = (*[0.0] * steps, 1.0)
        return cls(steps, weights, first_order, learns_rates, rule=rule, first=first)

    @property
    def judged_steps(self) -> list[tuple[int, float]]:
        """Lists the steps whose query loss is computed, with their weights: those that count, and always the last."""
        return [(s, w) for s, w in enumerate(self.step_weights) if w != 0 or s == self.steps]

    @property
    def numbers(self) -> range:
        """Returns the numbers of the steps."""
        return range(self.first, self.first + self.steps)

    @property
    def is_plain(self) -> bool:
        """Says whether it is S steps along the gradient, from the first, and the way back through all of them."""
        return self.rule is None and self.first == 0 and self.truncate is None and self.memory is None

    @property
    def states(self) -> int:
        """Returns the number K of vectors that the rule carries from step to step, beside theta."""
        return 0 if self.rule is None else len(self.rule.states)

    def part(self, begin: int, end: int) -> InnerLoop:
        """Returns the steps ``begin .. end - 1`` of this loop, judged after the last of them."""
        weights = (*[0.0] * (end - begin), 1.0)
        return self._replace(steps=end - begin, step_weights=weights, first=self.first + begin, truncate=None)


def row_of_step(rates: Tensor, step: int) -> Tensor:
    """Returns the row ``[1 or P]`` of ``rates [1 or S, 1 or P]`` for a step; the last row serves all later steps."""
    return rates[min(step, rates.shape[0] - 1)]


def sum_to_rate(products: Tensor, width: int) -> Tensor:
    """Sums ``products [..., P]`` to one row of rates, ``[width]``, where ``width`` is P or 1."""
    total = products.flatten(0, -2).sum(0) if products.dim() > 1 else products
    if width > 1:
        return total
    with one_thread():
        return total.sum(0, keepdim=True)
