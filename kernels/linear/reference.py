"""y = x W' + b, per task.

Bilinear: each rule is a sum of products, one term in the plain passes and two in the tangent ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contract.layer import Layer, RuleContext, Tangents, Tensors
from ..contract.optional_sums import add_optional, sum_present
from ..contract.pattern import Pattern


@dataclass(frozen=True)
class Linear(Layer):
    """``y[t,n,o] = sum_i x[t,n,i] W[t,o,i] + b[t,o]``; parameters ``W [T,O,I]`` and, with ``bias``, ``b [T,O]``.

    Axes between ``n`` and the features are samples too, as in ``torch.nn.Linear``.
    """

    kind = "linear"
    input_rank = 1
    bias: bool = True

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.bias else ("weight",)

    def numbers(self, shapes: Sequence[tuple[int, ...]]) -> list[float]:
        """``O, I``."""
        return [*shapes[0]]

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        x = inputs[0]
        ctx.shape = x.shape
        ctx.x = x.flatten(1, -2)
        y = self._product(ctx.x, params[0], params[1] if self.bias else None)
        return y.unflatten(1, ctx.shape[1:-1])

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        ctx.g = g_y.flatten(1, -2)
        g_x = (ctx.g @ params[0]).reshape(ctx.shape) if ctx.needs_inputs[0] else None
        return (g_x,), self._parameter_adjoints(ctx, [(ctx.g, ctx.x)], ctx.g)

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        xd = d_inputs[0]
        ctx.xd = None if xd is None else xd.flatten(1, -2)
        bd = d_params[1] if self.bias else None
        yd = sum_present(
            None if ctx.xd is None else self._product(ctx.xd, params[0], None),
            None if d_params[0] is None else self._product(ctx.x, d_params[0], None),
            None if bd is None else bd[:, None].expand(*ctx.x.shape[:2], -1),
        )
        return yd.unflatten(1, ctx.shape[1:-1])

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        gd = gd_y.flatten(1, -2)
        gd_x = None
        if ctx.needs_inputs[0]:
            gd_x = add_optional(gd @ params[0], None if d_params[0] is None else ctx.g @ d_params[0]).reshape(ctx.shape)
        terms = [(gd, ctx.x)] if ctx.xd is None else [(gd, ctx.x), (ctx.g, ctx.xd)]
        return (gd_x,), self._parameter_adjoints(ctx, terms, gd)

    @staticmethod
    def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = x @ weight.transpose(1, 2)
        return y if bias is None else y + bias[:, None]

    def _parameter_adjoints(self, ctx: RuleContext, terms: list[tuple[Tensor, Tensor]], g: Tensor) -> Tangents:
        needs = ctx.needs_params
        g_w = sum_present(*(a.transpose(1, 2) @ b for a, b in terms)) if needs[0] else None
        if not self.bias:
            return (g_w,)
        return g_w, torch.sum(g, 1) if needs[1] else None


def _read(input_shape: tuple[int, ...], bias: Any) -> Linear | None:
    return Linear(bias is not None) if len(input_shape) >= 2 else None


PATTERNS = (Pattern(_read, ("linear.default",)),)
