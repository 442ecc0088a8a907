"""Functions without rules of their own at which the derived rules are tested."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract.case import Case, Shape
from .reference import Derived, Function


def _case(name: str, function: Function, params: tuple[Shape, ...], *inputs: Shape) -> Case:
    return Case(name, Derived(function, name), function, params, inputs, (), 0, 1e-5, "a chain of rounded operations")


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


CASES = [
    _case("group norm", _group_norm, ((4,), (4,)), (3, 4, 5)),
    _case("prelu", _prelu, ((3,),), (4, 3, 2)),
    _case("attention", _attention, (), (2, 4, 3), (2, 5, 3), (2, 5, 2)),
    _case("gate of two inputs", _gate, (), (3, 4), (3, 4)),
    _case("scalar parameter, one sample", _scale, ((),), (1, 3)),
]
