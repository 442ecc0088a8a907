"""Any function of tensors as a layer: its four rules from torch.func.

    backward          (g_p, g_x) = vjp f (p, x) (g_y)
    tangent_forward   yd = jvp f (p, x) (pd, xd)
    tangent_backward  (gd_p, gd_x) = jvp [ (p, x, g) -> vjp f (p, x) (g) ] (pd, xd, gd_y)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from ..layer import Context, Layer, Tangents, Tensors

Function = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]


@dataclass(frozen=True)
class Derived(Layer):
    """``y = function(params, inputs)`` for one task, mapped over the task axis. ``label`` names it to people."""

    stem = "derived"
    function: Function
    label: str

    def forward(self, ctx: Context, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        ctx.p, ctx.x = tuple(params), tuple(inputs)
        return self._over_tasks(ctx.p, ctx.x)

    def backward(self, ctx: Context, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        ctx.g = g_y
        g_p, g_x = self._pull(ctx.p, ctx.x, g_y)
        return self._wanted(ctx, g_p, g_x)

    def tangent_forward(self, ctx: Context, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        ctx.d = _zeros_for_none(ctx.p, d_params), _zeros_for_none(ctx.x, d_inputs)
        return jvp(self._over_tasks, (ctx.p, ctx.x), ctx.d)[1]

    def tangent_backward(
        self, ctx: Context, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        _, (gd_p, gd_x) = jvp(self._pull, (ctx.p, ctx.x, ctx.g), (*ctx.d, gd_y))
        return self._wanted(ctx, gd_p, gd_x)

    def _over_tasks(self, params: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Tensor:
        return vmap(self.function)(params, inputs)

    def _pull(
        self, params: tuple[Tensor, ...], inputs: tuple[Tensor, ...], g: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return vjp(self._over_tasks, params, inputs)[1](g)  # type: ignore[no-any-return]

    @staticmethod
    def _wanted(ctx: Context, g_p: Tensors, g_x: Tensors) -> tuple[Tangents, Tangents]:
        return (
            tuple(g if needed else None for g, needed in zip(g_x, ctx.needs_inputs, strict=True)),
            tuple(g if needed else None for g, needed in zip(g_p, ctx.needs_params, strict=True)),
        )


def _zeros_for_none(primals: Tensors, tangents: Tangents) -> tuple[Tensor, ...]:
    return tuple(
        torch.zeros_like(p) if t is None else t.expand_as(p) for p, t in zip(primals, tangents, strict=True)
    )
