"""Convolution by implicit matrix products. Weights are ``[T,O,kh,kw,C/groups]`` here: channels last, as activations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..contract.layer import Layer, RuleContext, Tangents, Tensors
from ..primitives.launch import channels_first, channels_last
from ..primitives.products import Convolution, gather_product, weight_gradient
from ..primitives.row_reductions import column_sums
from .reference import Conv2d


@dataclass(frozen=True)
class TritonConv2d(Layer):
    """The rules of ``Conv2d`` as one product of one or two terms each.

    Where ``ctx.statistics`` is set, ``forward`` keeps ``ctx.parts``, partial moments of its result for the batch norm
    behind it, and ``tangent_forward`` those of the tangent against ``ctx.standard``, the ``(z, stat)`` of that norm.
    """

    options: Conv2d
    precision: str = "float32"
    kind = "conv2d"

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        ctx.x, o = channels_last(inputs[0]), self.options
        outputs, kernel = params[0].shape[1], (params[0].shape[2], params[0].shape[3])
        ctx.sizes = Convolution(*ctx.x.shape[2:], outputs, kernel, o.stride, o.padding, o.dilation, o.groups)
        bias = params[1] if o.bias else None
        wanted = ctx.__dict__.get("statistics", False)
        y, ctx.parts, ctx.rows = gather_product(
            [(ctx.x, params[0])], ctx.sizes.forward(), self.precision, bias, statistics=wanted
        )
        return channels_first(y)

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        ctx.g = channels_last(g_y)
        return self._adjoints(ctx, [(ctx.g, params[0])], [(ctx.g, ctx.x)], ctx.g)

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        ctx.xd = None if d_inputs[0] is None else channels_last(d_inputs[0])
        bd = d_params[1] if self.options.bias else None
        terms = [] if ctx.xd is None else [(ctx.xd, params[0])]
        terms += [] if d_params[0] is None else [(ctx.x, d_params[0])]
        if not terms:
            assert bd is not None  # the only tangent there is
            ctx.parts, size = None, (*ctx.x.shape[:2], bd.shape[1], *ctx.sizes.size)
            return bd[:, None, :, None, None].expand(size).to(ctx.x.dtype)
        standard = ctx.__dict__.get("standard", False)
        y, ctx.parts, ctx.rows = gather_product(terms, ctx.sizes.forward(), self.precision, bd, statistics=standard)
        return channels_first(y)

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        gd, wd = channels_last(gd_y), d_params[0]
        data = [(gd, params[0])] if wd is None else [(gd, params[0]), (ctx.g, wd)]
        weights = [(gd, ctx.x)] if ctx.xd is None else [(gd, ctx.x), (ctx.g, ctx.xd)]
        return self._adjoints(ctx, data, weights, gd)

    def _adjoints(
        self, ctx: RuleContext, data: list[tuple[Tensor, Tensor]], weights: list[tuple[Tensor, Tensor]], g: Tensor
    ) -> tuple[Tangents, Tangents]:
        g_x = None
        if ctx.needs_inputs[0]:
            g_x = channels_first(gather_product(data, ctx.sizes.data_gradient(), self.precision)[0])
        found: list[Tensor | None] = [None] * len(ctx.needs_params)
        if ctx.needs_params[0]:
            found[0] = weight_gradient(weights, ctx.sizes.forward(), self.precision)
        if self.options.bias and ctx.needs_params[1]:
            found[1] = column_sums(g)
        return (g_x,), found


def lower(layer: Conv2d, precision: str) -> TritonConv2d:
    """The rules of ``layer`` in Triton."""
    return TritonConv2d(layer, precision)
