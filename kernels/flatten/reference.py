"""Flatten: a change of shape."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..contract.layer import RuleContext
from ..contract.linear_map import LinearMap


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
