"""Adaptive average pooling, whose windows are all alike where the size of the result divides that of the image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..contract.layer import RuleContext
from ..contract.linear_map import LinearMap
from ..primitives.launch import channels_first, channels_last
from ..primitives.pooling import Pooling, pool, pool_transpose
from .reference import AdaptiveAvgPool2d


@dataclass(frozen=True)
class TritonAdaptiveAvgPool2d(LinearMap):
    """The rules of ``AdaptiveAvgPool2d``: by windows where the size divides the image's, else by PyTorch."""

    options: AdaptiveAvgPool2d
    kind = "adaptive_avg_pool2d"

    def apply(self, ctx: RuleContext, x: Tensor) -> Tensor:
        sizes = self._sizes(ctx)
        if sizes is None:
            return self.options.apply(ctx, x)
        return channels_first(pool(channels_last(x), sizes, "mean")[0])

    def transpose(self, ctx: RuleContext, g: Tensor) -> Tensor:
        sizes = self._sizes(ctx)
        if sizes is None:
            return self.options.transpose(ctx, g)
        return channels_first(pool_transpose(channels_last(g), sizes))

    def _sizes(self, ctx: RuleContext) -> Pooling | None:
        height, width = ctx.x.shape[3:]
        out_h, out_w = self.options.size
        if height % out_h or width % out_w:
            return None
        kernel = height // out_h, width // out_w
        return Pooling(height, width, out_h, out_w, *kernel, *kernel, 0, 0)


def lower(layer: AdaptiveAvgPool2d, precision: str) -> TritonAdaptiveAvgPool2d:
    """The rules of ``layer`` in Triton."""
    return TritonAdaptiveAvgPool2d(layer)
