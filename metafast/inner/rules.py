"""Says what an inner step makes of the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from torch import Tensor


@dataclass(frozen=True)
class SGD:
    """Steps ``theta <- theta - alpha d`` where ``d`` is made of the gradient as ``torch.optim.SGD`` makes it.

    ``g <- g + weight_decay theta``, ``v <- momentum v + g`` from ``v = 0`` for each task, and ``d`` is ``v``, or
    ``g + momentum v`` with ``nesterov``. Without arguments ``d`` is the gradient itself, which every executor takes;
    anything else is recorded by autograd.

    Raises:
        ValueError: ``momentum`` is not in [0, 1), ``weight_decay`` is negative, or ``nesterov`` goes without momentum.
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.momentum, Real) or not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum!r}: give a number from 0 up to, but not including, 1")
        if not isinstance(self.weight_decay, Real) or not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay={self.weight_decay!r}: give a finite number of at least 0")
        if not isinstance(self.nesterov, bool) or (self.nesterov and self.momentum == 0):
            raise ValueError(f"nesterov={self.nesterov!r}: give True or False; True needs a momentum above 0")

    @property
    def is_plain(self) -> bool:
        """Says whether a step goes along the gradient itself."""
        return self.momentum == 0 and self.weight_decay == 0

    def direction(
        self, theta: Tensor, gradient: Tensor, velocity: Tensor | None, moved: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns ``d`` and the velocity that the next step starts from, both ``[T, P]``.

        ``moved`` is true ``[P]`` where the inner loop moves the parameter; ``velocity`` is ``None`` in the first step.
        """
        if self.weight_decay:
            gradient = gradient + self.weight_decay * (theta * moved)
        velocity = gradient if velocity is None else self.momentum * velocity + gradient
        return (gradient + self.momentum * velocity if self.nesterov else velocity), velocity


PLAIN = SGD()
"""Goes along the gradient itself."""
