"""Any function of tensors as a layer: its four rules from torch.func, in reverse mode alone.

    backward          (g_p, g_x) = vjp_f(p, x, g_y) = vjp f (p, x) (g_y)
    tangent_forward   yd = vjp [ g -> vjp_f(p, x, g) ] (pd, xd)
    tangent_backward  (gd_p, gd_x) = vjp [ (p, x) -> vjp_f(p, x, g_y) ] (pd, xd) + vjp_f(p, x, gd_y)

The second holds because ``vjp_f`` is linear in ``g``, the third because its Jacobian in ``(p, x)`` is the Hessian of
``<f, g_y>``, which is symmetric. Forward mode would cost less, but torch's gradient functions often lack it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vjp, vmap

from ..contract.layer import Layer, RuleContext, Tangents, Tensors

Function = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]


@dataclass(frozen=True)
class Derived(Layer):
    """``y = function(params, inputs)`` for one task, mapped over the task axis. ``label`` names it to people."""

    kind = "derived"
    function: Function
    label: str

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        ctx.p, ctx.x = tuple(params), tuple(inputs)
        return self._over_tasks(ctx.p, ctx.x)

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        ctx.g = g_y
        g_p, g_x = self._vjp(ctx.p, ctx.x, g_y)
        return self._wanted(ctx, g_p, g_x)

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        ctx.d = _zeros_for_none(ctx.p, d_params), _zeros_for_none(ctx.x, d_inputs)
        return vjp(lambda g: self._vjp(ctx.p, ctx.x, g), ctx.g)[1](ctx.d)[0]  # type: ignore[no-any-return]

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        curved = vjp(lambda p, x: self._vjp(p, x, ctx.g), ctx.p, ctx.x)[1](ctx.d)
        plain = self._vjp(ctx.p, ctx.x, gd_y)
        gd_p, gd_x = (tuple(a + b for a, b in zip(*pair, strict=True)) for pair in zip(curved, plain, strict=True))
        return self._wanted(ctx, gd_p, gd_x)

    def _over_tasks(self, params: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Tensor:
        return vmap(self.function)(params, inputs)

    def _vjp(
        self, params: tuple[Tensor, ...], inputs: tuple[Tensor, ...], g: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return vjp(self._over_tasks, params, inputs)[1](g)  # type: ignore[no-any-return]

    @staticmethod
    def _wanted(ctx: RuleContext, g_p: Tensors, g_x: Tensors) -> tuple[Tangents, Tangents]:
        return (
            tuple(g if needed else None for g, needed in zip(g_x, ctx.needs_inputs, strict=True)),
            tuple(g if needed else None for g, needed in zip(g_p, ctx.needs_params, strict=True)),
        )


def _zeros_for_none(primals: Tensors, tangents: Tangents) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(p) if t is None else t.expand_as(p) for p, t in zip(primals, tangents, strict=True))
