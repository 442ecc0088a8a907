"""Steps along the gradient over the root of the sum of all squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from metafast.inner.rates import Rate
from metafast.inner.rules.checks import check_bounds, check_hyper
from metafast.program.rule import Formula, Hyper, Rule, root


@dataclass(frozen=True, kw_only=True)
class Adagrad(Rule):
    """Steps as ``torch.optim.Adagrad`` does (Duchi, Hazan, Singer 2011), in the k-th step

        g <- g + weight_decay theta,     s <- s + g^2
        theta <- theta - lr / (1 + (k - 1) lr_decay) g / (sqrt(s) + eps)

    Where ``s`` is zero the derivative of its root is taken for zero, so that all gradients are finite. Every
    hyper-parameter is a number, or a :class:`~metafast.inner.rates.Rate`, which can be learned and told apart by step,
    layer or parameter.

    Args:
        lr_decay: at least 0.
        weight_decay: at least 0.
        initial_accumulator_value: ``s`` before the first step, a number of at least 0.
        eps: at least 0.
        max_norm: the norm to which each task's gradient is scaled down first; ``None``: it is not.
        max_value: the value to which each of its elements is clamped before that; ``None``: it is not.

    Raises:
        TypeError, ValueError: a hyper-parameter is out of its range; the text names it.
    """

    lr_decay: float | Rate = 0.0
    weight_decay: float | Rate = 0.0
    initial_accumulator_value: float = 0.0
    eps: float | Rate = 1e-10
    max_norm: float | Rate | None = None
    max_value: float | Rate | None = None
    hyper: ClassVar[tuple[str, ...]] = ("lr_decay", "weight_decay", "eps")

    def __post_init__(self) -> None:
        check_hyper("lr_decay", self.lr_decay)
        check_hyper("weight_decay", self.weight_decay)
        check_hyper("initial_accumulator_value", self.initial_accumulator_value)
        if isinstance(self.initial_accumulator_value, Rate):
            raise TypeError(f"initial_accumulator_value={self.initial_accumulator_value!r}: give a number")
        check_hyper("eps", self.eps)
        check_bounds(self.max_norm, self.max_value)

    @property
    def formula(self) -> Formula | None:
        """Names the step, where a subclass has not made another of it."""
        return Formula("adagrad") if type(self) is Adagrad else None

    @property
    def states(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names the sum of squares."""
        return ("sum",)

    def start(self, name: str) -> float:
        """Returns ``initial_accumulator_value``."""
        return self.initial_accumulator_value

    def step(
        self, theta: Tensor, gradient: Tensor, state: tuple[Tensor, ...], hyper: Hyper, count: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Steps as the class says."""
        gradient = gradient + hyper["weight_decay"] * theta
        squares = state[0] + gradient.square()
        rate = hyper["lr"] / (1 + (count - 1) * hyper["lr_decay"])
        return theta - rate * (gradient / (root(squares) + hyper["eps"])), (squares,)
