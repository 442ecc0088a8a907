"""Average pooling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract.layer import RuleContext
from ..contract.linear_map import LinearMap


@dataclass(frozen=True)
class AvgPool2d(LinearMap):
    """Mean over windows of ``x [T,n,C,H,W]``, with the options of ``torch.nn.AvgPool2d``."""

    kind = "avg_pool2d"
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None

    def apply(self, ctx: RuleContext, x: Tensor) -> Tensor:
        y = torch.nn.functional.avg_pool2d(x.flatten(0, 1), *self._options())
        return y.unflatten(0, x.shape[:2])

    def transpose(self, ctx: RuleContext, g: Tensor) -> Tensor:
        x = ctx.x
        g_x = torch.ops.aten.avg_pool2d_backward(g.flatten(0, 1), x.flatten(0, 1), *self._options())
        return g_x.reshape(x.shape)

    def _options(self) -> tuple[object, ...]:
        return self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor
