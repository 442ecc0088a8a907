"""Average pooling."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..contract.layer import RuleContext
from ..contract.linear_map import LinearMap
from ..primitives.launch import channels_first, channels_last
from ..primitives.pooling import Pooling, pool, pool_transpose, pooled_size
from .reference import AvgPool2d


@dataclass(frozen=True)
class TritonAvgPool2d(LinearMap):
    """The rules of ``AvgPool2d``."""

    options: AvgPool2d
    kind = "avg_pool2d"

    def apply(self, ctx: RuleContext, x: Tensor) -> Tensor:
        return channels_first(pool(channels_last(x), self._sizes(ctx), "mean")[0])

    def transpose(self, ctx: RuleContext, g: Tensor) -> Tensor:
        return channels_first(pool_transpose(channels_last(g), self._sizes(ctx)))

    def _sizes(self, ctx: RuleContext) -> Pooling:
        o, extents = self.options, ctx.x.shape[3:]
        axes = zip(extents, o.kernel, o.stride, o.padding, strict=True)
        size = [pooled_size(*axis, o.ceil_mode) for axis in axes]
        return Pooling(
            *extents, *size, *o.kernel, *o.stride, *o.padding, divisor=o.divisor or 0, padded=o.count_include_pad
        )


def lower(layer: AvgPool2d, precision: str) -> TritonAvgPool2d:
    """The rules of ``layer`` in Triton."""
    return TritonAvgPool2d(layer)
