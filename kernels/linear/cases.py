"""Sizes at which linear is tested."""

from __future__ import annotations

import torch.nn.functional as F

from ..contract.case import Case, Shape
from .reference import Linear


def _case(name: str, x: Shape, outputs: int, bias: bool = True) -> Case:
    params: tuple[Shape, ...] = ((outputs, x[-1]), (outputs,))
    return Case(name, Linear(bias), lambda p, i: F.linear(i[0], *p), params if bias else params[:1], (x,))


CASES = [
    _case("odd sizes", (5, 3), 7),
    _case("no bias", (5, 3), 7, bias=False),
    _case("one sample", (1, 4), 3),
    _case("one input, one output", (6, 1), 1),
    _case("3-D input", (2, 3, 5), 4),
    _case("4-D input, no bias", (2, 1, 3, 5), 4, bias=False),
    _case("sinusoid hidden layer", (10, 40), 40),
    _case("Conv4 head", (75, 64), 5),
]
