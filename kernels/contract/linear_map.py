"""Linear maps without parameters: a tangent goes forward as the value does, an adjoint's tangent back as it does."""

from __future__ import annotations

from torch import Tensor

from .layer import Layer, RuleContext, Tangents, Tensors


class LinearMap(Layer):
    """``y = A x`` for a fixed ``A``: ``yd = A xd``, ``g_x = A' g``, ``gd_x = A' gd``."""

    def apply(self, ctx: RuleContext, x: Tensor) -> Tensor:
        """``A x``; ``ctx.x`` is the value that the layer was given."""
        raise NotImplementedError

    def transpose(self, ctx: RuleContext, g: Tensor) -> Tensor:
        """``A' g``."""
        raise NotImplementedError

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        ctx.x = inputs[0]
        return self.apply(ctx, ctx.x)

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        return (self.transpose(ctx, g_y) if ctx.needs_inputs[0] else None,), ()

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        assert d_inputs[0] is not None  # the only tangent there is
        return self.apply(ctx, d_inputs[0])

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        return self.backward(ctx, params, gd_y)
