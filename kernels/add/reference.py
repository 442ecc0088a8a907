"""The sum of two values: residual connections."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..layer import Context, Layer, Tangents, Tensors
from ..terms import total


@dataclass(frozen=True)
class Add(Layer):
    """``y = a + b``, axes of length one broadcast: ``g_a = g``, ``g_b = g``, summed to their shapes."""

    stem = "add"

    def forward(self, ctx: Context, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        a, b = inputs
        if a.dim() != b.dim():
            raise ValueError(
                f"the model adds values of shapes {tuple(a.shape[1:])} and {tuple(b.shape[1:])}; with the task axis in "
                "front they need the same number of axes: insert axes of length one with unsqueeze"
            )
        ctx.shapes = a.shape, b.shape
        y = a + b
        ctx.y_shape = y.shape
        return y

    def backward(self, ctx: Context, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        needs = zip(ctx.shapes, ctx.needs_inputs, strict=True)
        return tuple(g_y.sum_to_size(shape) if needed else None for shape, needed in needs), ()

    def tangent_forward(self, ctx: Context, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        return total(*d_inputs).expand(ctx.y_shape)

    def tangent_backward(
        self, ctx: Context, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        return self.backward(ctx, params, gd_y)
