"""Average pooling to a given output size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract.layer import RuleContext
from ..contract.linear_map import LinearMap


@dataclass(frozen=True)
class AdaptiveAvgPool2d(LinearMap):
    """``x [T,n,C,H,W] -> [T,n,C,h,w]``: cell ``i`` is the mean over ``floor(i H/h) .. ceil((i+1) H/h)``."""

    kind = "adaptive_avg_pool2d"
    size: tuple[int, int] = (1, 1)

    def apply(self, ctx: RuleContext, x: Tensor) -> Tensor:
        return torch.ops.aten._adaptive_avg_pool2d(x.flatten(0, 1), self.size).unflatten(0, x.shape[:2])

    def transpose(self, ctx: RuleContext, g: Tensor) -> Tensor:
        x = ctx.x
        g_x = torch.ops.aten._adaptive_avg_pool2d_backward(g.flatten(0, 1).contiguous(), x.flatten(0, 1))
        return g_x.reshape(x.shape)
