"""Layer norm: the formulas of ``normalise``, with means over the features of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..contract.layer import RuleContext
from ..contract.normalise import Normalise
from ..contract.pattern import Pattern


@dataclass(frozen=True)
class LayerNorm(Normalise):
    """``y = gamma (x - mean x) / sqrt(var x + eps) + beta`` over the last ``axes`` axes of each sample.

    Biased variance; ``gamma, beta [T, *normalised shape]`` (Ba, Kiros, Hinton 2016, 1607.06450).
    """

    kind = "layer_norm"
    fixed_statistics = False
    axes: int
    eps: float = 1e-5
    scale: bool = True
    shift: bool = True

    def numbers(self, shapes: Sequence[tuple[int, ...]]) -> list[float]:
        """``eps`` and the number of normalised axes."""
        return [self.eps, self.axes]

    def mean(self, ctx: RuleContext, u: Tensor) -> Tensor:
        return u.mean(tuple(range(-self.axes, 0)), keepdim=True)

    def view(self, ctx: RuleContext, parameter: Tensor) -> Tensor:
        ones = ctx.xh.dim() - 1 - self.axes
        return parameter.reshape(parameter.shape[0], *(1,) * ones, *parameter.shape[1:])

    def reduce(self, ctx: RuleContext, u: Tensor, parameter: Tensor) -> Tensor:
        return u.flatten(1, u.dim() - 1 - self.axes).sum(1)


def _read(input_shape: tuple[int, ...], normalized_shape: Any, weight: Any, bias: Any, eps: float) -> LayerNorm | None:
    if len(input_shape) <= len(normalized_shape):
        return None
    return LayerNorm(len(normalized_shape), eps, weight is not None, bias is not None)


PATTERNS = (Pattern(_read, ("layer_norm.default",)),)
