"""Max pooling: a gather by the index of the largest element, fixed by the forward pass; its transpose scatters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract.layer import RuleContext, Tensors
from ..contract.linear_map import LinearMap


@dataclass(frozen=True)
class MaxPool2d(LinearMap):
    """Maximum over windows of ``x [T,n,C,H,W]``; the first of equals wins. Linear once the winners are known."""

    kind = "max_pool2d"
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        x = inputs[0]
        y, winners = torch.nn.functional.max_pool2d(
            x.flatten(0, 1), self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode, True
        )
        ctx.shape, ctx.y_shape = x.shape, (*x.shape[:2], *y.shape[1:])
        ctx.winners = winners.reshape(*x.shape[:3], -1)
        return y.unflatten(0, x.shape[:2])

    def apply(self, ctx: RuleContext, x: Tensor) -> Tensor:
        return x.flatten(3).gather(3, ctx.winners).reshape(ctx.y_shape)

    def transpose(self, ctx: RuleContext, g: Tensor) -> Tensor:
        zeros = g.new_zeros(*ctx.shape[:3], ctx.shape[3] * ctx.shape[4])
        return zeros.scatter_add(3, ctx.winners, g.flatten(3)).reshape(ctx.shape)
