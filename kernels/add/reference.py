"""The sum of two values: residual connections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..contract.layer import Layer, RuleContext, Tangents, Tensors
from ..contract.optional_sums import sum_present
from ..contract.pattern import Pattern


@dataclass(frozen=True)
class Add(Layer):
    """``y = a + b`` with torch's broadcasting within a task: ``g_a = g``, ``g_b = g``, summed to their shapes."""

    kind = "add"

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        ctx.shapes = [x.shape for x in inputs]
        axes = max(x.dim() for x in inputs)
        ctx.full = [(shape[0], *(1,) * (axes - len(shape)), *shape[1:]) for shape in ctx.shapes]
        a, b = self._aligned(ctx, inputs)
        y = a + b
        ctx.y_shape = y.shape
        return y

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        places = zip(ctx.shapes, ctx.full, ctx.needs_inputs, strict=True)
        return tuple(g_y.sum_to_size(full).reshape(shape) if needed else None for shape, full, needed in places), ()

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        return sum_present(*self._aligned(ctx, d_inputs)).expand(ctx.y_shape)

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        return self.backward(ctx, params, gd_y)

    @staticmethod
    def _aligned(ctx: RuleContext, values: Tangents) -> list[Tensor | None]:
        """Axes of length one behind the task axis, as broadcasting within a task would put in front."""
        return [None if v is None else v.reshape(full) for v, full in zip(values, ctx.full, strict=True)]


def _read(alpha: Any) -> Add | None:
    return Add() if alpha == 1 else None


PATTERNS = (Pattern(_read, ("add.Tensor",), inputs=("input", "other")),)
