"""Elementwise layers: ``f``, ``f' u`` and ``f' gd + f'' xd g`` are each worked out from ``x`` in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract.layer import Layer, RuleContext, Tangents, Tensors
from ..contract.pointwise import Pointwise
from ..primitives.launch import TILES, cdiv, launch, pixels_last
from .reference import LeakyReLU

_KINDS = ("relu", "leaky_relu", "tanh", "sigmoid", "gelu")


@triton.jit
def _tanh(x):
    """Near zero its series takes the place of the quotient, which would cancel there."""
    t = tl.exp(-2 * tl.abs(x))
    quotient = (1 - t) / (1 + t)
    s = x * x
    series = x * (1 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315))))
    return tl.where(tl.abs(x) < 0.15, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _value(x, KIND: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr):
    if KIND == "relu":
        return tl.where(x <= 0, 0.0, x)
    elif KIND == "leaky_relu":
        return tl.where(x <= 0, NEGATIVE_SLOPE * x, x)
    elif KIND == "tanh":
        return _tanh(x)
    elif KIND == "sigmoid":
        return 1 / (1 + tl.exp(-x))
    else:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _derivative(x, KIND: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr):
    if KIND == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif KIND == "leaky_relu":
        return tl.where(x > 0, 1.0, NEGATIVE_SLOPE)
    elif KIND == "tanh":
        y = _tanh(x)
        return 1 - y * y
    elif KIND == "sigmoid":
        y = 1 / (1 + tl.exp(-x))
        return y * (1 - y)
    else:
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _second_derivative(x, KIND: tl.constexpr):
    if KIND == "tanh":
        y = _tanh(x)
        return -2 * y * (1 - y * y)
    elif KIND == "sigmoid":
        y = 1 / (1 + tl.exp(-x))
        return y * (1 - y) * (1 - 2 * y)
    else:
        return 0.3989422804014327 * tl.exp(-0.5 * x * x) * (2 - x * x)


@triton.jit
def metafast_pointwise(out, x, u, xd, g, size, KIND: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr, B: tl.constexpr):
    """``f(x)``; with ``u`` ``f'(x) u``; with ``xd`` also ``+ f''(x) xd g``. Grid (tile,)."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = i < size
    v = tl.load(x + i, inside, 0.0).to(tl.float32)
    if u is None:
        result = _value(v, KIND, NEGATIVE_SLOPE)
    else:
        result = _derivative(v, KIND, NEGATIVE_SLOPE) * tl.load(u + i, inside, 0.0).to(tl.float32)
        if xd is not None:
            xd_g = tl.load(xd + i, inside, 0.0).to(tl.float32) * tl.load(g + i, inside, 0.0).to(tl.float32)
            result += _second_derivative(v, KIND) * xd_g
    tl.store(out + i, result, inside)


@dataclass(frozen=True)
class TritonPointwise(Layer):
    """The rules of a ``Pointwise`` layer whose kind is among those of this file."""

    options: Pointwise
    kind = "pointwise"

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        ctx.x = pixels_last(inputs[0])
        return self._run(ctx, None)

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        ctx.g = pixels_last(g_y)
        return (self._run(ctx, ctx.g) if ctx.needs_inputs[0] else None,), ()

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        assert d_inputs[0] is not None  # the only tangent there is
        ctx.xd = pixels_last(d_inputs[0])
        return self._run(ctx, ctx.xd)

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        if not ctx.needs_inputs[0]:
            return (None,), ()
        # A layer without a second derivative of its own has the one that is zero.
        straight = type(self.options).second_derivative is Pointwise.second_derivative
        tangent = (None, None) if straight else (ctx.xd, ctx.g)
        return (self._run(ctx, pixels_last(gd_y), *tangent),), ()

    def _run(self, ctx: RuleContext, u: Tensor | None, xd: Tensor | None = None, g: Tensor | None = None) -> Tensor:
        out, size = torch.empty_like(ctx.x), ctx.x.numel()
        negative_slope = self.options.negative_slope if isinstance(self.options, LeakyReLU) else 0.0
        launch(
            metafast_pointwise, (cdiv(size, TILES.elements),), out, ctx.x, u, xd, g, size,
            KIND=self.options.kind, NEGATIVE_SLOPE=negative_slope, B=TILES.elements,
        )  # fmt: skip
        return out


def lower(layer: Pointwise, precision: str) -> TritonPointwise | None:
    """The rules of ``layer`` in Triton, where this file has its function."""
    return TritonPointwise(layer) if layer.kind in _KINDS else None
