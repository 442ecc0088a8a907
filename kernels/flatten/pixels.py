"""Flattening of images whose memory is channels-last: a view, where ``Flatten`` would copy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..contract.layer import RuleContext
from ..contract.linear_map import LinearMap
from ..primitives.launch import channels_first, channels_last


@dataclass(frozen=True)
class FlattenPixels(LinearMap):
    """``[T,n,C,H,W]`` -> ``[T,n,H*W*C]``: pixel after pixel, where ``Flatten`` goes channel after channel."""

    kind = "flatten"

    def apply(self, ctx: RuleContext, x: Tensor) -> Tensor:
        return channels_last(x).flatten(2)

    def transpose(self, ctx: RuleContext, g: Tensor) -> Tensor:
        tasks, n, channels, *pixels = ctx.x.shape
        return channels_first(g.reshape(tasks, n, *pixels, channels))
