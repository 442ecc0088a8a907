"""Average pooling to a given output size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.layer import RuleContext
from ..contract.linear_map import LinearMap
from ..contract.pattern import Pattern


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


def _read(input: Any, output_size: Any) -> AdaptiveAvgPool2d | None:
    size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    return AdaptiveAvgPool2d(size) if all(isinstance(extent, int) for extent in size) else None


PATTERNS = (
    Pattern(_read, modules=(nn.AdaptiveAvgPool2d,), functions=(nn.functional.adaptive_avg_pool2d,)),
)
