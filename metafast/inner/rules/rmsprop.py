"""Steps along the gradient over the root of a mean of squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from metafast.inner.rates import Rate
from metafast.inner.rules.checks import check_bounds, check_flag, check_hyper, is_zero
from metafast.program.rule import Formula, Hyper, Rule, root


@dataclass(frozen=True, kw_only=True)
class RMSprop(Rule):
    """Steps as ``torch.optim.RMSprop`` does (Tieleman, Hinton 2012):

        g <- g + weight_decay theta,     s <- alpha s + (1 - alpha) g^2
        d = g / (sqrt(s) + eps),         theta <- theta - lr d

    With ``centered`` the mean ``a <- alpha a + (1 - alpha) g`` of gradients is taken off: ``sqrt(s - a^2)``. With
    momentum ``b <- momentum b + d`` takes the place of ``d``. Where the argument of the root is zero, or less by
    rounding, the root and its derivative are taken for zero, so that all gradients are finite. Every hyper-parameter is
    a number, or a :class:`~metafast.inner.rates.Rate`, which can be learned and told apart by step, layer or parameter.

    Args:
        alpha: from 0 up to, but not including, 1.
        eps: at least 0.
        weight_decay: at least 0.
        momentum: from 0 up to, but not including, 1.
        centered: whether the mean of gradients is taken off.
        max_norm: the norm to which each task's gradient is scaled down first; ``None``: it is not.
        max_value: the value to which each of its elements is clamped before that; ``None``: it is not.

    Raises:
        TypeError, ValueError: a hyper-parameter is out of its range; the text names it.
    """

    alpha: float | Rate = 0.99
    eps: float | Rate = 1e-8
    weight_decay: float | Rate = 0.0
    momentum: float | Rate = 0.0
    centered: bool = False
    max_norm: float | Rate | None = None
    max_value: float | Rate | None = None
    hyper: ClassVar[tuple[str, ...]] = ("alpha", "eps", "weight_decay", "momentum")

    def __post_init__(self) -> None:
        check_hyper("alpha", self.alpha, 1)
        check_hyper("eps", self.eps)
        check_hyper("weight_decay", self.weight_decay)
        check_hyper("momentum", self.momentum, 1)
        check_flag("centered", self.centered)
        check_bounds(self.max_norm, self.max_value)

    @property
    def formula(self) -> Formula | None:
        """Names the step, where a subclass has not made another of it."""
        return Formula("rmsprop", self.centered) if type(self) is RMSprop else None

    @property
    def states(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names the mean of squares, and with momentum or ``centered`` what these need."""
        velocity = () if is_zero(self.momentum) else ("momentum_buffer",)
        return ("square_avg", *velocity, *(("grad_avg",) if self.centered else ()))

    def step(
        self, theta: Tensor, gradient: Tensor, state: tuple[Tensor, ...], hyper: Hyper, count: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Steps as the class says."""
        before = dict(zip(self.states, state, strict=True))
        alpha = hyper["alpha"]
        gradient = gradient + hyper["weight_decay"] * theta
        after = {"square_avg": alpha * before["square_avg"] + (1 - alpha) * gradient.square()}
        spread = after["square_avg"]
        if self.centered:
            after["grad_avg"] = alpha * before["grad_avg"] + (1 - alpha) * gradient
            spread = spread - after["grad_avg"].square()
        direction = gradient / (root(spread) + hyper["eps"])
        if "momentum_buffer" in before:
            direction = hyper["momentum"] * before["momentum_buffer"] + direction
            after["momentum_buffer"] = direction
        return theta - hyper["lr"] * direction, tuple(after[name] for name in self.states)
