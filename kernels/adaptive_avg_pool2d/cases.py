"""Sizes at which adaptive average pooling is tested."""

from __future__ import annotations

import torch.nn.functional as F

from ..contract.case import Case, Shape
from .reference import AdaptiveAvgPool2d


def _case(name: str, x: Shape, size: tuple[int, int]) -> Case:
    return Case(name, AdaptiveAvgPool2d(size), lambda p, i: F.adaptive_avg_pool2d(i[0], size), (), (x,))


CASES = [
    _case("global mean", (3, 2, 5, 4), (1, 1)),
    _case("whole windows", (2, 3, 6, 4), (3, 2)),
    _case("unequal windows", (2, 2, 7, 5), (3, 2)),
    _case("larger than the image", (1, 2, 2, 3), (3, 4)),
    _case("one pixel", (2, 3, 1, 1), (1, 1)),
    _case("Conv4-64 end", (5, 64, 2, 2), (1, 1)),
]
