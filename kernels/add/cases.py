"""Sizes at which add is tested."""

from __future__ import annotations

from ..contract.case import Case, Shape
from .reference import Add


def _case(name: str, a: Shape, b: Shape) -> Case:
    return Case(name, Add(), lambda p, i: i[0] + i[1], (), (a, b))


CASES = [
    _case("residual", (3, 2, 4, 5), (3, 2, 4, 5)),
    _case("one sample", (1, 3), (1, 3)),
    _case("right broadcast over positions", (3, 2, 4, 5), (3, 2, 1, 1)),
    _case("left broadcast over samples", (1, 4), (3, 4)),
    _case("both broadcast", (3, 1, 5), (3, 4, 1)),
    _case("right without the sample axis", (3, 4), (4,)),
    _case("left a number", (), (3, 4)),
]
