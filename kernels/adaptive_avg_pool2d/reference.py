"""Average pooling to a given output size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contract.layer import RuleContext
from ..contract.linear_map import LinearMap
from ..contract.pattern import Pattern, pair


@dataclass(frozen=True)
class AdaptiveAvgPool2d(LinearMap):
    """``x [T,n,C,H,W] -> [T,n,C,h,w]``: cell ``i`` is the mean over ``floor(i H/h) .. ceil((i+1) H/h)``."""

    kind = "adaptive_avg_pool2d"
    keeps_channels = True
    input_rank = 3
    size: tuple[int, int] = (1, 1)

    def numbers(self, shapes: Sequence[tuple[int, ...]]) -> list[float]:
        """Height and width of the result."""
        return [*self.size]

    def apply(self, ctx: RuleContext, x: Tensor) -> Tensor:
        return torch.ops.aten._adaptive_avg_pool2d(x.flatten(0, 1), self.size).unflatten(0, x.shape[:2])

    def transpose(self, ctx: RuleContext, g: Tensor) -> Tensor:
        x = ctx.x
        g_x = torch.ops.aten._adaptive_avg_pool2d_backward(g.flatten(0, 1).contiguous(), x.flatten(0, 1))
        return g_x.reshape(x.shape)


def _read(input_shape: tuple[int, ...], output_size: Any) -> AdaptiveAvgPool2d | None:
    return AdaptiveAvgPool2d(pair(output_size)) if len(input_shape) == 4 else None


PATTERNS = (Pattern(_read, ("adaptive_avg_pool2d.default",)),)
