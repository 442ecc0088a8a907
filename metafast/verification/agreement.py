"""Holds losses and gradients against the oracle's. Only where they agree is a time worth comparing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """The largest relative error that counts as agreement, with the reason for this value."""

    value: float
    reason: str


LOSSES = Tolerance(
    1e-4, "float32 rounding of a few inner steps at a gentle rate stays below 1e-5; the rest is a margin"
)
GRADIENT = Tolerance(
    1e-2,
    "float32 puts some activation on the other side of a ReLU or another pixel first in a max-pool; on the canonical "
    "workloads these jumps move the gradient by up to 4e-3, in every library, while a missing Hessian term moves it by "
    "0.15 and more, and operands in TF32 by 0.07 and more",
)
EXACT = Tolerance(
    1e-4,
    "without convolution, batch norm and pooling nothing amplifies what rounding does: on the canonical workloads of "
    "that kind every library stays below 2e-6; more is a defect, small as it is, and is flagged",
)
ONE_STEP = Tolerance(
    1e-3, "float32 sums in another order, through one inner step; a wrong rule moves the gradient by far more"
)
PARAMETER = Tolerance(5e-2, "as for the whole, but a single jump is a larger part of one parameter: 1.5e-2 was seen")
# A parameter with a smaller share of the gradient's norm is judged as if it had this share.
_SMALLEST = 0.01


@dataclass(frozen=True)
class Agreement:
    """The relative errors against the oracle: of the losses ``[T]``, of the whole gradient, and of the worst
    parameter."""

    losses: float
    gradient: float
    parameter: str
    parameter_error: float

    @property
    def agrees(self) -> bool:
        """Tells whether all errors are within their tolerances. An error that is not a number is not."""
        return (
            self.losses <= LOSSES.value and self.gradient <= GRADIENT.value and self.parameter_error <= PARAMETER.value
        )

    @property
    def exact(self) -> bool:
        """Tells whether losses and gradient are as close as they are where nothing amplifies rounding errors."""
        return self.losses <= EXACT.value and self.gradient <= EXACT.value

    def __str__(self) -> str:
        return f"losses differ by {self.losses:.0e}, the gradient of {self.parameter} by {self.parameter_error:.0e}"

    def to_json(self) -> dict[str, float | str | bool | None]:
        """Returns JSON values; an error that is not finite becomes ``null``."""
        numbers = {
            "losses": self.losses, "gradient": self.gradient, "parameter_error": self.parameter_error
        }  # fmt: skip
        finite = {key: float(value) if np.isfinite(value) else None for key, value in numbers.items()}
        return {**finite, "parameter": self.parameter, "agrees": bool(self.agrees)}


Answer = tuple[np.ndarray, Mapping[str, np.ndarray]]
"""The losses ``[T]``, and the gradient of their mean by parameter name."""


def agreement(answer: Answer, oracle: Answer) -> Agreement:
    """Returns the errors, as ratios of norms. A parameter that only one of the two has counts as zero in the other."""
    losses, gradient = answer
    true_losses, true_gradient = oracle
    if losses.shape != true_losses.shape:
        return Agreement(float("inf"), float("inf"), f"shape {losses.shape}", float("inf"))
    whole = float(np.sqrt(sum(_norm(g) ** 2 for g in true_gradient.values())))
    off = {}
    for name in [*true_gradient, *(name for name in gradient if name not in true_gradient)]:
        wanted = true_gradient.get(name, np.zeros(1))
        found = gradient.get(name, np.zeros_like(wanted))
        off[name] = _norm(found - wanted) if found.shape == wanted.shape else float("inf")
    relative = {
        name: error / max(_norm(true_gradient.get(name, np.zeros(1))), _SMALLEST * whole) for name, error in off.items()
    }
    worst = max(relative, key=lambda name: np.nan_to_num(relative[name], nan=np.inf))
    total = float(np.sqrt(sum(error**2 for error in off.values()))) / whole
    return Agreement(_norm(losses - true_losses) / _norm(true_losses), total, worst, relative[worst])


def _norm(values: np.ndarray) -> float:
    return float(np.linalg.norm(values.astype(np.float64).ravel()))
