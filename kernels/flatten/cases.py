"""Sizes at which flatten is tested."""

from __future__ import annotations

import torch

from ..contract.case import Case, Shape
from .reference import Flatten


def _case(name: str, x: Shape, start: int = 1, end: int = -1) -> Case:
    return Case(name, Flatten(start, end), lambda p, i: torch.flatten(i[0], start, end), (), (x,))


CASES = [
    _case("image", (3, 2, 4, 5)),
    _case("one sample", (1, 2, 3)),
    _case("already flat", (3, 4)),
    _case("last two axes", (2, 3, 4, 5), start=2),
    _case("middle axes", (2, 3, 4, 5), start=1, end=2),
    _case("one axis", (2, 3, 4), start=2, end=2),
]
