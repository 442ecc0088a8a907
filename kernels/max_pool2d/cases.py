"""Sizes at which max pooling is tested."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from ..contract.case import Case, Shape
from .reference import MaxPool2d


def _case(name: str, x: Shape, kernel: tuple[int, int], stride: tuple[int, int], **options: Any) -> Case:
    layer = MaxPool2d(kernel, stride, **options)
    return Case(
        name,
        layer,
        lambda p, i: F.max_pool2d(i[0], kernel, stride, layer.padding, layer.dilation, layer.ceil_mode),
        (),
        (x,),
    )


CASES = [
    _case("2x2", (3, 2, 6, 4), (2, 2), (2, 2)),
    _case("2x2, one row and column left over", (2, 3, 7, 5), (2, 2), (2, 2)),
    _case("2x2, ceil keeps the rest", (2, 3, 7, 5), (2, 2), (2, 2), ceil_mode=True),
    _case("3x3, overlapping", (2, 2, 7, 7), (3, 3), (2, 2)),
    _case("3x3, overlapping, padded, ceil", (2, 2, 6, 8), (3, 3), (2, 2), padding=(1, 1), ceil_mode=True),
    _case("3x3, stride 1", (1, 2, 5, 4), (3, 3), (1, 1), padding=(1, 1)),
    _case("unequal window and stride", (2, 1, 6, 9), (1, 3), (2, 2)),
    _case("gaps between windows", (2, 2, 8, 8), (2, 2), (3, 3)),
    _case("dilation 2", (2, 2, 7, 6), (2, 2), (1, 2), dilation=(2, 2)),
    _case("whole image", (1, 3, 4, 3), (4, 3), (1, 1)),
    _case("Conv4-64 at 14x14", (5, 64, 14, 14), (2, 2), (2, 2)),
]
