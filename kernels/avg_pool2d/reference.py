"""Average pooling."""

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
class AvgPool2d(LinearMap):
    """Mean over windows of ``x [T,n,C,H,W]``, with the options of ``torch.nn.AvgPool2d``."""

    kind = "avg_pool2d"
    keeps_channels = True
    input_rank = 3
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None

    def numbers(self, shapes: Sequence[tuple[int, ...]]) -> list[float]:
        """Size, stride and padding of a window along both axes, ``ceil_mode``, ``count_include_pad``, and the divisor,
        zero where pixels are counted."""
        window = [*self.kernel, *self.stride, *self.padding]
        return [*window, self.ceil_mode, self.count_include_pad, self.divisor or 0]

    def apply(self, ctx: RuleContext, x: Tensor) -> Tensor:
        y = torch.nn.functional.avg_pool2d(x.flatten(0, 1), *self._options())
        return y.unflatten(0, x.shape[:2])

    def transpose(self, ctx: RuleContext, g: Tensor) -> Tensor:
        x = ctx.x
        g_x = torch.ops.aten.avg_pool2d_backward(g.flatten(0, 1), x.flatten(0, 1), *self._options())
        return g_x.reshape(x.shape)

    def _options(self) -> tuple[object, ...]:
        return self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor


def _read(
    input_shape: tuple[int, ...], kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool,
    divisor_override: int | None,
) -> AvgPool2d | None:  # fmt: skip
    if len(input_shape) != 4:
        return None
    window = pair(kernel_size), pair(stride or kernel_size), pair(padding)
    return AvgPool2d(*window, ceil_mode, count_include_pad, divisor_override)


PATTERNS = (Pattern(_read, ("avg_pool2d.default",)),)
