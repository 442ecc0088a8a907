"""Functions without rules of their own at which the derived rules are tested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract.case import Case, Shape
from .reference import Derived

Function = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]


def _case(name: str, function: Function, params: tuple[Shape, ...], *inputs: Shape) -> Case:
    layer = Derived(lambda p, i, constants: function(p, i), name)
    return Case(name, layer, function, params, inputs, (), 0, 1e-5, "a chain of rounded operations")


def _group_norm(p: tuple[Tensor, ...], i: tuple[Tensor, ...]) -> Tensor:
    return F.group_norm(i[0], 2, *p)


def _prelu(p: tuple[Tensor, ...], i: tuple[Tensor, ...]) -> Tensor:
    return F.prelu(i[0], p[0])


def _attention(p: tuple[Tensor, ...], i: tuple[Tensor, ...]) -> Tensor:
    query, key, value = i
    return torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, -1) @ value


def _gate(p: tuple[Tensor, ...], i: tuple[Tensor, ...]) -> Tensor:
    return i[0] * torch.sigmoid(i[1])


def _scale(p: tuple[Tensor, ...], i: tuple[Tensor, ...]) -> Tensor:
    return p[0] * torch.sin(i[0])


def _unmappable(p: tuple[Tensor, ...], i: tuple[Tensor, ...]) -> Tensor:
    """``torch.vmap`` refuses it, because it reads a number of a tensor."""
    return torch.tanh(i[0] @ p[0]) * (1.0 if float(i[0].detach().sum()) < 1e9 else 2.0)


def _partly_detached(p: tuple[Tensor, ...], i: tuple[Tensor, ...]) -> Tensor:
    return i[0].sin() * p[0] * (i[0] * p[0]).detach().cos()


class _Cube(torch.autograd.Function):
    """Has no derivative in forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g[0]


def _cube(p: tuple[Tensor, ...], i: tuple[Tensor, ...]) -> Tensor:
    return _Cube.apply(i[0] * p[0])  # type: ignore[no-any-return]


_BUFFER = torch.linspace(-1, 1, 4, dtype=torch.float64)

CASES = [
    _case("group norm", _group_norm, ((4,), (4,)), (3, 4, 5)),
    _case("prelu", _prelu, ((3,),), (4, 3, 2)),
    _case("attention", _attention, (), (2, 4, 3), (2, 5, 3), (2, 5, 2)),
    _case("gate of two inputs", _gate, (), (3, 4), (3, 4)),
    _case("scalar parameter, one sample", _scale, ((),), (1, 3)),
    _case("a function that vmap cannot map", _unmappable, ((3, 2),), (4, 3)),
    _case("a part without a gradient", _partly_detached, ((3,),), (4, 3)),
    Case(
        "an autograd.Function", Derived(lambda p, i, c: _cube(p, i), "cube", reverse_only=True), _cube, ((3,),),
        ((4, 3),), (), 0, 1e-5, "third powers",
    ),
    Case(
        "a constant", Derived(lambda p, i, c: torch.sin(i[0] * p[0] + c[0].to(i[0].dtype)), "buffer"),
        lambda p, i: torch.sin(i[0] * p[0] + _BUFFER.to(i[0].dtype)), ((4,),), ((3, 4),), (_BUFFER,), 0, 1e-5,
        "a chain of rounded operations",
    ),
]  # fmt: skip
