"""Functions of one number, applied element by element: each comes with its first two derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract.layer import RuleContext
from ..contract.pattern import Pattern
from ..contract.pointwise import Pointwise


@dataclass(frozen=True)
class ReLU(Pointwise):
    """``max(x, 0)``; its derivative at 0 is 0."""

    kind = "relu"

    def value(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def derivative(self, ctx: RuleContext) -> Tensor:
        return ctx.x > 0


@dataclass(frozen=True)
class LeakyReLU(Pointwise):
    """``x`` where positive, ``negative_slope * x`` elsewhere."""

    kind = "leaky_relu"
    negative_slope: float = 0.01

    def numbers(self, shapes: Sequence[tuple[int, ...]]) -> list[float]:
        """The slope."""
        return [self.negative_slope]

    def value(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope)

    def derivative(self, ctx: RuleContext) -> Tensor:
        return torch.full_like(ctx.x, self.negative_slope).masked_fill(ctx.x > 0, 1.0)


@dataclass(frozen=True)
class Tanh(Pointwise):
    """``tanh x``: ``f' = 1 - y^2``, ``f'' = -2 y (1 - y^2)``."""

    kind = "tanh"

    def value(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def derivative(self, ctx: RuleContext) -> Tensor:
        return 1 - ctx.y * ctx.y

    def second_derivative(self, ctx: RuleContext) -> Tensor:
        return -2 * ctx.y * (1 - ctx.y * ctx.y)


@dataclass(frozen=True)
class Sigmoid(Pointwise):
    """``1 / (1 + e^-x)``: ``f' = y (1 - y)``, ``f'' = f' (1 - 2 y)``."""

    kind = "sigmoid"

    def value(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def derivative(self, ctx: RuleContext) -> Tensor:
        return ctx.y * (1 - ctx.y)

    def second_derivative(self, ctx: RuleContext) -> Tensor:
        return ctx.y * (1 - ctx.y) * (1 - 2 * ctx.y)


@dataclass(frozen=True)
class GELU(Pointwise):
    """``x Phi(x)`` with the normal distribution: ``f' = Phi + x phi``, ``f'' = phi (2 - x^2)`` (1606.08415)."""

    kind = "gelu"

    def value(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def derivative(self, ctx: RuleContext) -> Tensor:
        return 0.5 * (1 + torch.erf(ctx.x / math.sqrt(2))) + ctx.x * self._density(ctx.x)

    def second_derivative(self, ctx: RuleContext) -> Tensor:
        return self._density(ctx.x) * (2 - ctx.x * ctx.x)

    @staticmethod
    def _density(x: Tensor) -> Tensor:
        return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


PATTERNS = (
    Pattern(ReLU, ("relu.default",)),
    Pattern(lambda negative_slope: LeakyReLU(negative_slope), ("leaky_relu.default",)),
    Pattern(Tanh, ("tanh.default",)),
    Pattern(Sigmoid, ("sigmoid.default",)),
    Pattern(lambda approximate: GELU() if approximate == "none" else None, ("gelu.default",)),
)
