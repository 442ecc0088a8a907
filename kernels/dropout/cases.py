"""Sizes at which dropout is tested."""

from __future__ import annotations

from ..contract.case import Case, Shape
from .reference import Dropout


def _case(name: str, x: Shape, noise: Shape) -> Case:
    return Case(name, Dropout(), lambda p, i: i[0] * i[1], (), (x, noise))


CASES = [
    _case("each element", (5, 7), (5, 7)),
    _case("whole channels", (2, 3, 4, 5), (2, 3, 1, 1)),
    _case("one sample", (1, 3), (1, 3)),
]
