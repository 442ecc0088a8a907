"""Max pooling: a gather by the index of the largest element, fixed by the forward pass; its transpose scatters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contract.layer import RuleContext, Tensors
from ..contract.linear_map import LinearMap
from ..contract.pattern import Pattern, pair


@dataclass(frozen=True)
class MaxPool2d(LinearMap):
    """Maximum over windows of ``x [T,n,C,H,W]``; the first of equals wins. Linear once the winners are known."""

    kind = "max_pool2d"
    keeps_channels = True
    input_rank = 3
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    def numbers(self, shapes: Sequence[tuple[int, ...]]) -> list[float]:
        """Size, stride, padding and dilation of a window along both axes, then ``ceil_mode``."""
        return [*self.kernel, *self.stride, *self.padding, *self.dilation, self.ceil_mode]

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        x = inputs[0]
        y, winners = torch.nn.functional.max_pool2d(
            x.flatten(0, 1), self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode, True
        )
        self._check_windows(x.shape[3:], y.shape[2:])
        ctx.shape, ctx.y_shape = x.shape, (*x.shape[:2], *y.shape[1:])
        ctx.winners = winners.reshape(*x.shape[:3], -1)
        return y.unflatten(0, x.shape[:2])

    def _check_windows(self, pixels: Sequence[int], windows: Sequence[int]) -> None:
        """Raises ValueError where a window holds padding alone: torch's -inf has no pixel to send a gradient to."""
        for size, count, kernel, stride, padding, dilation in zip(
            pixels, windows, self.kernel, self.stride, self.padding, self.dilation, strict=True
        ):
            if padding == 0 or dilation == 1:
                continue
            for start in range(-padding, count * stride - padding, stride):
                if not any(0 <= start + tap * dilation < size for tap in range(kernel)):
                    raise ValueError(
                        f"a window of {kernel} pixels, each {dilation} from the next, lies on the padding alone where "
                        f"the image has {size}; its largest pixel is -inf. Use a smaller dilation, or no padding"
                    )

    def apply(self, ctx: RuleContext, x: Tensor) -> Tensor:
        return x.flatten(3).gather(3, ctx.winners).reshape(ctx.y_shape)

    def transpose(self, ctx: RuleContext, g: Tensor) -> Tensor:
        zeros = g.new_zeros(*ctx.shape[:3], ctx.shape[3] * ctx.shape[4])
        return zeros.scatter_add(3, ctx.winners, g.flatten(3)).reshape(ctx.shape)


def _read(
    input_shape: tuple[int, ...], kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> MaxPool2d | None:
    if len(input_shape) != 4:
        return None
    return MaxPool2d(pair(kernel_size), pair(stride or kernel_size), pair(padding), pair(dilation), ceil_mode)


PATTERNS = (Pattern(_read, ("max_pool2d.default",)),)
