"""Steps along the gradient, with momentum or without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from metafast.inner.rates import Rate
from metafast.inner.rules.checks import check_bounds, check_flag, check_hyper, is_zero
from metafast.program.rule import Formula, Hyper, Rule


@dataclass(frozen=True, kw_only=True)
class SGD(Rule):
    """Steps as ``torch.optim.SGD`` does: ``theta <- theta - lr d``.

    ``g <- g + weight_decay theta``, ``v <- momentum v + (1 - dampening) g`` (``v = g`` in the first step), and ``d`` is
    ``v``, or ``g + momentum v`` with ``nesterov``. Each task begins with ``v = 0``. Every hyper-parameter is a number,
    or a :class:`~metafast.inner.rates.Rate`, which can be learned and told apart by step, layer or parameter.

    Args:
        momentum: from 0 up to, but not including, 1.
        dampening: at least 0; only with momentum.
        weight_decay: at least 0.
        nesterov: whether a step looks ahead; it needs a momentum, and no dampening.
        max_norm: the norm to which each task's gradient is scaled down first; ``None``: it is not.
        max_value: the value to which each of its elements is clamped before that; ``None``: it is not.

    Raises:
        TypeError, ValueError: a hyper-parameter is out of its range; the text names it.
    """

    momentum: float | Rate = 0.0
    dampening: float | Rate = 0.0
    weight_decay: float | Rate = 0.0
    nesterov: bool = False
    max_norm: float | Rate | None = None
    max_value: float | Rate | None = None
    hyper: ClassVar[tuple[str, ...]] = ("momentum", "dampening", "weight_decay")

    def __post_init__(self) -> None:
        check_hyper("momentum", self.momentum, 1)
        check_hyper("dampening", self.dampening)
        check_hyper("weight_decay", self.weight_decay)
        check_flag("nesterov", self.nesterov)
        check_bounds(self.max_norm, self.max_value)
        if self.nesterov and (is_zero(self.momentum) or not is_zero(self.dampening)):
            raise ValueError(f"nesterov={self.nesterov!r}: it needs a momentum above 0, and no dampening")

    @property
    def is_plain(self) -> bool:
        """Says whether a step goes along the gradient itself."""
        return not self.states and is_zero(self.weight_decay) and self.max_norm is None and self.max_value is None

    @property
    def formula(self) -> Formula | None:
        """Names the step, where a subclass has not made another of it."""
        return Formula("sgd", self.nesterov) if type(self) is SGD else None

    @property
    def states(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names the velocity, where there is one."""
        return () if is_zero(self.momentum) else ("momentum_buffer",)

    def step(
        self, theta: Tensor, gradient: Tensor, state: tuple[Tensor, ...], hyper: Hyper, count: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Steps as the class says."""
        gradient = gradient + hyper["weight_decay"] * theta
        if not state:
            return theta - hyper["lr"] * gradient, ()
        share = 1 if count == 1 else 1 - hyper["dampening"]
        velocity = hyper["momentum"] * state[0] + share * gradient
        direction = gradient + hyper["momentum"] * velocity if self.nesterov else velocity
        return theta - hyper["lr"] * direction, (velocity,)
