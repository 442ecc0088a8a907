"""Dropout: a value times random numbers, most of them the same and some of them zero."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..contract.layer import Layer, RuleContext, Tangents, Tensors
from ..contract.optional_sums import sum_present
from ..contract.pattern import Pattern


def dropped(input: Tensor, noise: Tensor) -> Tensor:
    """``input`` times ``noise``, whose axes are as many and may be 1: what a model that drops is recorded to call."""
    return input * noise


@dataclass(frozen=True)
class Dropout(Layer):
    """``y = x z``:  ``g_x = z g``, ``g_z = x g``,  ``yd = z xd + x zd``.

    In a Program ``z`` is noise, which has neither adjoint nor tangent; the rules hold for any ``z``.
    """

    kind = "dropout"

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        ctx.x, ctx.z = inputs
        return dropped(ctx.x, ctx.z)

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        ctx.g = g_y
        return self._products(ctx, g_y), ()

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        ctx.xd, ctx.zd = d_inputs
        return sum_present(
            None if ctx.xd is None else ctx.xd * ctx.z,
            None if ctx.zd is None else ctx.x * ctx.zd,
        )

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        gd_x, gd_z = self._products(ctx, gd_y)
        if gd_x is not None and ctx.zd is not None:
            gd_x = gd_x + (ctx.g * ctx.zd).sum_to_size(ctx.x.shape)
        if gd_z is not None and ctx.xd is not None:
            gd_z = gd_z + (ctx.g * ctx.xd).sum_to_size(ctx.z.shape)
        return (gd_x, gd_z), ()

    @staticmethod
    def _products(ctx: RuleContext, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        of_x, of_z = ctx.needs_inputs
        return (
            (g * ctx.z).sum_to_size(ctx.x.shape) if of_x else None,
            (g * ctx.x).sum_to_size(ctx.z.shape) if of_z else None,
        )


PATTERNS = (Pattern(Dropout, (dropped,), inputs=("input", "noise")),)
