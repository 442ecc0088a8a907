"""The activations, element by element: ``f``, ``f' u`` and ``f' gd + f'' xd g``, each from ``x`` in one pass."""

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

KINDS = ("relu", "leaky_relu", "tanh", "sigmoid", "gelu")


@triton.jit
def _tanh(x):
    """Near zero by its series, where the quotient would cancel."""
    t = tl.exp(-2 * tl.abs(x))
    far = (1 - t) / (1 + t)
    s = x * x
    near = x * (1 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315))))
    return tl.where(tl.abs(x) < 0.15, near, tl.where(x < 0, -far, far))


@triton.jit
def _value(x, KIND: tl.constexpr, SLOPE: tl.constexpr):
    if KIND == "relu":
        return tl.where(x <= 0, 0.0, x)
    elif KIND == "leaky_relu":
        return tl.where(x <= 0, SLOPE * x, x)
    elif KIND == "tanh":
        return _tanh(x)
    elif KIND == "sigmoid":
        return 1 / (1 + tl.exp(-x))
    else:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _slope(x, KIND: tl.constexpr, SLOPE: tl.constexpr):
    if KIND == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif KIND == "leaky_relu":
        return tl.where(x > 0, 1.0, SLOPE)
    elif KIND == "tanh":
        y = _tanh(x)
        return 1 - y * y
    elif KIND == "sigmoid":
        y = 1 / (1 + tl.exp(-x))
        return y * (1 - y)
    else:
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _curve(x, KIND: tl.constexpr):
    if KIND == "tanh":
        y = _tanh(x)
        return -2 * y * (1 - y * y)
    elif KIND == "sigmoid":
        y = 1 / (1 + tl.exp(-x))
        return y * (1 - y) * (1 - 2 * y)
    else:
        return 0.3989422804014327 * tl.exp(-0.5 * x * x) * (2 - x * x)


@triton.jit
def metafast_pointwise(out, x, u, xd, g, size, KIND: tl.constexpr, SLOPE: tl.constexpr, B: tl.constexpr):
    """``f(x)``; with ``u`` ``f'(x) u``; with ``xd`` also ``+ f''(x) xd g``. Grid (tile,)."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = i < size
    v = tl.load(x + i, inside, 0.0).to(tl.float32)
    if u is None:
        result = _value(v, KIND, SLOPE)
    else:
        result = _slope(v, KIND, SLOPE) * tl.load(u + i, inside, 0.0).to(tl.float32)
        if xd is not None:
            bent = tl.load(xd + i, inside, 0.0).to(tl.float32) * tl.load(g + i, inside, 0.0).to(tl.float32)
            result += _curve(v, KIND) * bent
    tl.store(out + i, result, inside)


@dataclass(frozen=True)
class TritonActivation(Layer):
    """The rules of a ``Pointwise`` layer whose kind is among ``KINDS``."""

    options: Pointwise
    kind = "activation"

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
        straight = self.options.kind in ("relu", "leaky_relu")
        bent = (None, None) if straight else (ctx.xd, ctx.g)
        return (self._run(ctx, pixels_last(gd_y), *bent),), ()

    def _run(self, ctx: RuleContext, u: Tensor | None, xd: Tensor | None = None, g: Tensor | None = None) -> Tensor:
        out, size = torch.empty_like(ctx.x), ctx.x.numel()
        slope = self.options.negative_slope if isinstance(self.options, LeakyReLU) else 0.0
        launch(
            metafast_pointwise, (cdiv(size, TILES.elements),), out, ctx.x, u, xd, g, size,
            KIND=self.options.kind, SLOPE=slope, B=TILES.elements,
        )  # fmt: skip
        return out
