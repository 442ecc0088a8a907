"""Layer norm by the formulas of ``normalise``: a program has a block of samples and goes over their features twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract.layer import Layer, RuleContext, Tangents, Tensors
from ..primitives.launch import TILES, block, by_task, cdiv, empty, launch
from ..primitives.row_reductions import add_tiles
from .reference import LayerNorm


@triton.jit
def _feature(p, task, stride, d, D, absent: tl.constexpr):
    """A row of the values that a parameter has in features ``d``."""
    if p is None:
        return tl.full((1, d.shape[0]), absent, tl.float32)
    else:
        return tl.load(p + task * stride + d, d < D, 0.0)[None, :]


@triton.jit
def _rows(p, task, row, rows):
    """Two columns, of both values that ``[T, rows, 2]`` has of each sample."""
    p += (task * rows + row) * 2
    return tl.load(p, row < rows, 0.0)[:, None], tl.load(p + 1, row < rows, 0.0)[:, None]


@triton.jit
def metafast_layer_norm(
    y, stat, x, gamma, beta, gamma_stride, beta_stride, rows, eps, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr
):
    """Writes ``y`` and ``stat [T, rows, 2]``: mean and ``(var + eps)^-1/2``. All grids here are (row tile, task)."""
    task, row = tl.program_id(1).to(tl.int64), tl.program_id(0) * BR + tl.arange(0, BR)
    base = (task * rows + row)[:, None] * D
    mean = tl.zeros((BR, 1), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        mean += tl.sum(tl.load(x + base + d[None, :], inside, 0.0).to(tl.float32), 1, keep_dims=True)
    mean /= D
    squares = tl.zeros((BR, 1), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        v = tl.where(inside, tl.load(x + base + d[None, :], inside, 0.0).to(tl.float32) - mean, 0.0)
        squares += tl.sum(v * v, 1, keep_dims=True)
    r = 1.0 / tl.sqrt(squares / D + eps)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        xh = (tl.load(x + base + d[None, :], inside, 0.0).to(tl.float32) - mean) * r
        v = _feature(gamma, task, gamma_stride, d, D, 1.0) * xh + _feature(beta, task, beta_stride, d, D, 0.0)
        tl.store(y + base + d[None, :], v, inside)
    pair = stat + ((task * rows + row) * 2)[:, None]
    tl.store(pair, mean, (row < rows)[:, None])
    tl.store(pair + 1, r, (row < rows)[:, None])


@triton.jit
def metafast_layer_norm_tangent(
    yd, xd_means, x, stat, gamma, xd, gammad, betad, gamma_stride, gammad_stride, betad_stride, rows,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes ``yd`` and ``xd_means [T, rows, 2]``: the mean of ``xd`` and its projection on ``xh``, ``mean(xd xh)``."""
    task, row = tl.program_id(1).to(tl.int64), tl.program_id(0) * BR + tl.arange(0, BR)
    base = (task * rows + row)[:, None] * D
    mean, r = _rows(stat, task, row, rows)
    xd_mean = tl.zeros((BR, 1), tl.float32)
    xd_projection = tl.zeros((BR, 1), tl.float32)
    if xd is not None:
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            inside = (row < rows)[:, None] & (d < D)[None, :]
            xh = (tl.load(x + base + d[None, :], inside, 0.0).to(tl.float32) - mean) * r
            u = tl.load(xd + base + d[None, :], inside, 0.0).to(tl.float32)
            xd_mean += tl.sum(u, 1, keep_dims=True)
            xd_projection += tl.sum(u * xh, 1, keep_dims=True)
        xd_mean /= D
        xd_projection /= D
        pair = xd_means + ((task * rows + row) * 2)[:, None]
        tl.store(pair, xd_mean, (row < rows)[:, None])
        tl.store(pair + 1, xd_projection, (row < rows)[:, None])
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        xh = (tl.load(x + base + d[None, :], inside, 0.0).to(tl.float32) - mean) * r
        v = _feature(gammad, task, gammad_stride, d, D, 0.0) * xh + _feature(betad, task, betad_stride, d, D, 0.0)
        if xd is not None:
            u = tl.load(xd + base + d[None, :], inside, 0.0).to(tl.float32)
            v += _feature(gamma, task, gamma_stride, d, D, 1.0) * (r * (u - xd_mean - xh * xd_projection))
        tl.store(yd + base + d[None, :], v, inside)


@triton.jit
def _summands(x, g, xd, gd, offset, inside, mean, r, scale, d_scale, xd_mean, xd_projection):
    """What is summed over a block of features: ``xh``, ``xhd``, ``gh``, ``ghd``, and the summands of the parameters'
    adjoints."""
    xh = (tl.load(x + offset, inside, 0.0).to(tl.float32) - mean) * r
    g0 = tl.load(g + offset, inside, 0.0).to(tl.float32)
    xhd, ghd, beta_summand, gamma_summand = xh * 0.0, xh * 0.0, g0, g0 * xh
    if gd is not None:
        beta_summand = tl.load(gd + offset, inside, 0.0).to(tl.float32)
        gamma_summand = beta_summand * xh
        if xd is not None:
            xhd = r * (tl.load(xd + offset, inside, 0.0).to(tl.float32) - xd_mean - xh * xd_projection)
            gamma_summand += g0 * xhd
        ghd = scale * beta_summand + d_scale * g0
    return xh, xhd, scale * g0, ghd, beta_summand, gamma_summand


@triton.jit
def metafast_layer_norm_backward(
    out, parts, x, stat, gamma, g, xd, gd, gammad, xd_means, gamma_stride, gammad_stride, rows,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes ``g_x`` or with ``gd`` its tangent, and each tile's sums for beta and gamma, ``[T, tiles, 2, D]``."""
    task, row = tl.program_id(1).to(tl.int64), tl.program_id(0) * BR + tl.arange(0, BR)
    base = (task * rows + row)[:, None] * D
    mean, r = _rows(stat, task, row, rows)
    xd_mean, xd_projection = mean * 0.0, mean * 0.0
    if xd is not None:
        xd_mean, xd_projection = _rows(xd_means, task, row, rows)
    gh_sum = tl.zeros((BR, 1), tl.float32)
    gh_xh_sum, ghd_sum, ghd_xh_sum = gh_sum, gh_sum, gh_sum
    parts += (task * tl.num_programs(0) + tl.program_id(0)) * 2 * D
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        scale = _feature(gamma, task, gamma_stride, d, D, 1.0)
        d_scale = _feature(gammad, task, gammad_stride, d, D, 0.0)
        xh, xhd, gh, ghd, beta_summand, gamma_summand = _summands(
            x, g, xd, gd, base + d[None, :], inside, mean, r, scale, d_scale, xd_mean, xd_projection
        )
        gh_sum += tl.sum(gh, 1, keep_dims=True)
        gh_xh_sum += tl.sum(gh * xh, 1, keep_dims=True)
        ghd_sum += tl.sum(ghd, 1, keep_dims=True)
        ghd_xh_sum += tl.sum(ghd * xh + gh * xhd, 1, keep_dims=True)
        tl.store(parts + d, tl.sum(beta_summand, 0), d < D)
        tl.store(parts + D + d, tl.sum(gamma_summand, 0), d < D)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        scale = _feature(gamma, task, gamma_stride, d, D, 1.0)
        d_scale = _feature(gammad, task, gammad_stride, d, D, 0.0)
        xh, xhd, gh, ghd, _beta_summand, _gamma_summand = _summands(
            x, g, xd, gd, base + d[None, :], inside, mean, r, scale, d_scale, xd_mean, xd_projection
        )
        g_x = r * (gh - gh_sum / D - xh * (gh_xh_sum / D))
        if gd is None:
            tl.store(out + base + d[None, :], g_x, inside)
        else:
            gd_x = r * (ghd - ghd_sum / D - xh * (ghd_xh_sum / D) - xhd * (gh_xh_sum / D) - xd_projection * g_x)
            tl.store(out + base + d[None, :], gd_x, inside)


@dataclass(frozen=True)
class TritonLayerNorm(Layer):
    """The rules of ``LayerNorm``."""

    options: LayerNorm
    kind = "layer_norm"

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        ctx.x = inputs[0].contiguous()
        ctx.features = ctx.x[(0,) * (ctx.x.dim() - self.options.axes)].numel()
        ctx.rows = ctx.x[0].numel() // ctx.features
        ctx.stat = empty(ctx.x, ctx.x.shape[0], ctx.rows, 2, dtype=torch.float32)
        y = torch.empty_like(ctx.x)
        (gamma, gamma_stride), (beta, beta_stride) = self._affine(params)
        self._run(metafast_layer_norm, ctx, y, ctx.stat, ctx.x, gamma, beta, gamma_stride, beta_stride, ctx.rows,
                  self.options.eps)  # fmt: skip
        return y

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        ctx.g = g_y.contiguous()
        return self._backward(ctx, params, None, ())

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        ctx.xd = None if d_inputs[0] is None else d_inputs[0].contiguous()
        ctx.xd_means = None if ctx.xd is None else torch.empty_like(ctx.stat)
        yd = torch.empty_like(ctx.x)
        (gamma, gamma_stride), _ = self._affine(params)
        (gammad, gammad_stride), (betad, betad_stride) = self._affine(d_params)
        self._run(metafast_layer_norm_tangent, ctx, yd, ctx.xd_means, ctx.x, ctx.stat, gamma, ctx.xd, gammad, betad,
                  gamma_stride, gammad_stride, betad_stride, ctx.rows)  # fmt: skip
        return yd

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        return self._backward(ctx, params, gd_y.contiguous(), d_params)

    def _backward(
        self, ctx: RuleContext, params: Tensors, gd: Tensor | None, d_params: Tangents
    ) -> tuple[Tangents, Tangents]:
        out = torch.empty_like(ctx.x)
        br, _ = self._block(ctx)
        parts = empty(ctx.stat, ctx.x.shape[0], cdiv(ctx.rows, br), 2, ctx.features)
        (gamma, gamma_stride), _ = self._affine(params)
        (gammad, gammad_stride), _ = ((None, 0), None) if gd is None else self._affine(d_params)
        xd, xd_means = (None, None) if gd is None else (ctx.xd, ctx.xd_means)
        self._run(metafast_layer_norm_backward, ctx, out, parts, ctx.x, ctx.stat, gamma, ctx.g, xd, gd, gammad,
                  xd_means, gamma_stride, gammad_stride, ctx.rows)  # fmt: skip
        wanted = [k for present, k in ((self.options.scale, 1), (self.options.shift, 0)) if present]
        found: list[Tensor | None] = [None] * len(wanted)
        if any(ctx.needs_params):
            sums = add_tiles(parts)
            for i, k in enumerate(wanted):
                found[i] = sums[:, k].reshape(params[i].shape) if ctx.needs_params[i] else None
        return (out if ctx.needs_inputs[0] else None,), found

    def _run(self, kernel: object, ctx: RuleContext, *args: object) -> None:
        br, bd = self._block(ctx)
        launch(kernel, (cdiv(ctx.rows, br), ctx.x.shape[0]), *args, D=ctx.features, BR=br, BD=bd)

    @staticmethod
    def _block(ctx: RuleContext) -> tuple[int, int]:
        bd = block(ctx.features, 16, min(1024, TILES.elements))
        return max(1, min(TILES.elements // bd, 128)), bd

    def _affine(self, params: Tangents) -> list[tuple[Tensor | None, int]]:
        """Scale and shift, or their directions, each with its stride from task to task."""
        rest = list(params)
        found = [rest.pop(0) if present else None for present in (self.options.scale, self.options.shift)]
        return [(None, 0) if p is None else by_task(p) for p in found]


def lower(layer: LayerNorm, precision: str) -> TritonLayerNorm:
    """The rules of ``layer`` in Triton."""
    return TritonLayerNorm(layer)
