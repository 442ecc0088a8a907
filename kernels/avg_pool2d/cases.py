"""Sizes at which average pooling is tested."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from ..contract.case import Case, Shape
from .reference import AvgPool2d


def _case(name: str, x: Shape, kernel: tuple[int, int], stride: tuple[int, int], **options: Any) -> Case:
    layer = AvgPool2d(kernel, stride, **options)
    return Case(
        name,
        layer,
        lambda p, i: F.avg_pool2d(
            i[0], kernel, stride, layer.padding, layer.ceil_mode, layer.count_include_pad, layer.divisor
        ),
        (),
        (x,),
    )


CASES = [
    _case("2x2", (3, 2, 6, 4), (2, 2), (2, 2)),
    _case("2x2, one row and column left over", (2, 3, 7, 5), (2, 2), (2, 2)),
    _case("2x2, ceil keeps the rest", (2, 3, 7, 5), (2, 2), (2, 2), ceil_mode=True),
    _case("3x3, overlapping", (2, 2, 7, 7), (3, 3), (2, 2)),
    _case("padding counts", (2, 2, 5, 6), (3, 3), (2, 2), padding=(1, 1)),
    _case("padding does not count", (2, 2, 5, 6), (3, 3), (2, 2), padding=(1, 1), count_include_pad=False),
    _case("fixed divisor", (2, 2, 5, 6), (3, 2), (1, 2), divisor=4),
    _case("whole image, one sample", (1, 3, 4, 3), (4, 3), (1, 1)),
    _case("ResNet end", (5, 64, 7, 7), (7, 7), (7, 7)),
]
