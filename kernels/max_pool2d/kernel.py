"""Max pooling: the forward pass keeps which tap of its window won; the other rules follow it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..contract.layer import RuleContext, Tensors
from ..contract.linear_map import LinearMap
from ..primitives.launch import channels_first, channels_last
from ..primitives.pooling import Pooling, pool, pool_transpose, pooled_size
from .reference import MaxPool2d


@dataclass(frozen=True)
class TritonMaxPool2d(LinearMap):
    """The rules of ``MaxPool2d``."""

    options: MaxPool2d
    kind = "max_pool2d"

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        o, x = self.options, channels_last(inputs[0])
        spans = [d * (k - 1) + 1 for d, k in zip(o.dilation, o.kernel, strict=True)]
        extents = zip(x.shape[2:4], spans, o.stride, o.padding, strict=True)
        size = [pooled_size(*extent, o.ceil_mode) for extent in extents]
        ctx.sizes = Pooling(*x.shape[2:4], *size, *o.kernel, *o.stride, *o.padding, *o.dilation)
        y, ctx.code = pool(x, ctx.sizes, "max")
        return channels_first(y)

    def apply(self, ctx: RuleContext, x: Tensor) -> Tensor:
        return channels_first(pool(channels_last(x), ctx.sizes, "pick", ctx.code)[0])

    def transpose(self, ctx: RuleContext, g: Tensor) -> Tensor:
        return channels_first(pool_transpose(channels_last(g), ctx.sizes, ctx.code))


def lower(layer: MaxPool2d, precision: str) -> TritonMaxPool2d:
    """The rules of ``layer`` in Triton."""
    return TritonMaxPool2d(layer)
