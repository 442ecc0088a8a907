"""Sizes at which layer norm is tested."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..contract.case import Case, Shape
from .reference import LayerNorm


def _case(name: str, x: Shape, axes: int, scale: bool = True, shift: bool = True) -> Case:
    layer = LayerNorm(axes, 1e-3, scale, shift)
    shape = x[-axes:]

    def function(p: tuple[Tensor, ...], i: tuple[Tensor, ...]) -> Tensor:
        return F.layer_norm(i[0], shape, p[0] if scale else None, p[-1] if shift else None, layer.eps)

    return Case(
        name, layer, function, (shape,) * (scale + shift), (x,), (), 0, 1e-5,
        "variances and means are differences of nearly equal sums",
    )  # fmt: skip


CASES = [
    _case("one axis", (5, 7), 1),
    _case("one axis of two features", (3, 2), 1),
    _case("one axis of a sequence", (3, 4, 5), 1),
    _case("two axes", (3, 4, 5), 2),
    _case("two of three axes", (2, 3, 4, 5), 2),
    _case("three axes, one sample", (1, 2, 3, 5), 3),
    _case("no affine map", (4, 6), 1, scale=False, shift=False),
    _case("scale alone", (4, 2, 3), 2, shift=False),
    _case("wide", (10, 256), 1),
]
