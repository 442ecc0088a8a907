"""Sizes and modes at which batch norm is tested."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract.case import Case, Shape
from .reference import BatchNorm


def _case(
    name: str, x: Shape, mode: str = "task", scale: bool = True, shift: bool = True, step: int = 0, rows: int = 3
) -> Case:
    layer = BatchNorm(mode, 1e-3, scale, shift)
    channels = x[1]
    constants: tuple[Tensor, ...] = ()
    if layer.fixed_statistics:
        constants = torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels)

    def function(p: tuple[Tensor, ...], i: tuple[Tensor, ...]) -> Tensor:
        affine = [parameter[min(step, rows - 1)] if layer.varies else parameter for parameter in p]
        beta = affine.pop() if shift else None
        # torch cannot differentiate a batch norm twice that has a shift and no scale.
        gamma = affine.pop() if scale else None if beta is None else torch.ones_like(beta)
        mean, var = (c.to(i[0].dtype) for c in constants) if constants else (None, None)
        return F.batch_norm(i[0], mean, var, gamma, beta, training=not layer.fixed_statistics, eps=layer.eps)

    parameter = (rows, channels) if layer.varies else (channels,)
    return Case(
        name, layer, function, (parameter,) * (scale + shift), (x,), constants, step, 1e-5,
        "variances and means are differences of nearly equal sums",
    )  # fmt: skip


CASES = [
    _case("2d, odd sizes", (3, 4, 5, 3)),
    _case("one sample", (1, 2, 3, 4)),
    _case("1d", (5, 3)),
    _case("two samples of 1d", (2, 4)),
    _case("1d over a sequence", (3, 2, 7)),
    _case("3d", (2, 3, 2, 3, 2)),
    _case("no affine map", (3, 2, 3, 3), scale=False, shift=False),
    _case("scale alone", (3, 2, 3, 3), shift=False),
    _case("shift alone", (3, 2, 3, 3), scale=False),
    _case("per step, first", (3, 4, 3, 3), "per_step", step=0),
    _case("per step, last row", (3, 4, 3, 3), "per_step", step=2),
    _case("per step, past the last row", (4, 3), "per_step", step=5),
    _case("per step, shift alone", (4, 3), "per_step", scale=False, step=1),
    _case("frozen", (3, 4, 5, 3), "frozen"),
    _case("frozen, one sample of 1d", (1, 3), "frozen"),
    _case("frozen, no affine map", (3, 2, 3), "frozen", scale=False, shift=False),
    _case("running", (3, 4, 2, 2), "running"),
    _case("Conv4-64 at 14x14", (5, 64, 14, 14)),
]
