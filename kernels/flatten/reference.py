"""Flatten: a change of shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..contract.layer import RuleContext
from ..contract.linear_map import LinearMap
from ..contract.pattern import Pattern


@dataclass(frozen=True)
class Flatten(LinearMap):
    """Merges the axes ``start..end`` of a task's ``[n, ...]``, ``1 <= start``, as ``torch.flatten`` does."""

    kind = "flatten"
    start: int = 1
    end: int = -1

    def apply(self, ctx: RuleContext, x: Tensor) -> Tensor:
        return x.flatten(self.start + 1, self.end + 1 if self.end >= 0 else self.end)

    def transpose(self, ctx: RuleContext, g: Tensor) -> Tensor:
        return g.reshape(ctx.x.shape)


def _read(input_shape: tuple[int, ...], start_dim: int, end_dim: int) -> Flatten | None:
    start, end = (axis % len(input_shape) for axis in (start_dim, end_dim))
    if not 1 <= start < end:
        return None
    return Flatten(start, -1 if end == len(input_shape) - 1 else end)


def _read_view(input_shape: tuple[int, ...], size: Any) -> Flatten | None:
    """``x.view(x.size(0), -1)``, or with the number of features written out."""
    features = math.prod(input_shape[1:])
    if len(size) != 2 or len(input_shape) < 3:
        return None
    return Flatten() if size[0] in (input_shape[0], -1) and size[1] in (features, -1) else None


PATTERNS = (
    Pattern(_read, ("flatten.using_ints",)),
    Pattern(_read_view, ("view.default",)),
    Pattern(lambda input_shape, shape: _read_view(input_shape, shape), ("reshape.default",)),
)
