"""y = f(x), element by element:  g_x = f' g,  yd = f' xd,  gd_x = f' gd + f'' xd g."""

from __future__ import annotations

from torch import Tensor

from .layer import Layer, RuleContext, Tangents, Tensors


class Pointwise(Layer):
    """A function with its first two derivatives; no parameters."""

    kind = "pointwise"
    keeps_channels = True

    def value(self, x: Tensor) -> Tensor:
        """``f(x)``."""
        raise NotImplementedError

    def derivative(self, ctx: RuleContext) -> Tensor:
        """``f'`` at ``ctx.x`` (``ctx.y`` is there too)."""
        raise NotImplementedError

    def second_derivative(self, ctx: RuleContext) -> Tensor | None:
        """``f''`` at ``ctx.x``; ``None`` where it is zero almost everywhere."""
        return None

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        ctx.x = inputs[0]
        ctx.y = self.value(ctx.x)
        return ctx.y

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        ctx.g = g_y
        return (g_y * self.derivative(ctx) if ctx.needs_inputs[0] else None,), ()

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        ctx.xd = d_inputs[0]
        return ctx.xd * self.derivative(ctx)  # type: ignore[no-any-return]

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        if not ctx.needs_inputs[0]:
            return (None,), ()
        gd_x = gd_y * self.derivative(ctx)
        second = self.second_derivative(ctx)
        return (gd_x if second is None else gd_x + second * ctx.xd * ctx.g,), ()
