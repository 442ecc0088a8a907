"""Batch norm with the ReLU and the max-pool behind it, each rule in one pass, by the formulas of ``normalise``.

The forward pass keeps for each value of the result a code: which pixel of its window won, or none where ReLU cut it
off; and where windows have more than one pixel the winners' ``xh``, a tangent pass their ``xhd``. The sums over an
adjoint, zero elsewhere, then read as much as the result is large. With

    g_x  = r (gh - mean gh - xh b),  b = mean(gh xh)
    yd   = gamma xhd + gammad xh + betad,  xhd = r (xd - mean xd - xh c),  c = mean(xh xd)
    gd_x = r (ghd - mean ghd - xh bd - xhd b) - r c g_x,  ghd = gamma gd + gammad g,  bd = mean(ghd xh + gh xhd)

need of each channel two sums a rule: (g, g xh), (xd, xd xh) and (gd, gd xh + g xhd). They come in tiles, as the
moments of ``x`` do. The first kernel that reads them adds the tiles up, each program for its own channels and all in
the same order, and its first program of each channel writes the result for the kernels that come later.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract.layer import Layer, RuleContext, Tangents, Tensors
from ..primitives.launch import TILES, block, by_task, cdiv, channels_first, channels_last, empty, launch
from ..primitives.row_reductions import ROWS, TILES_AT_ONCE, add_tiles, readable_moments, readable_sums, tile_moments
from .device import Image, metafast_norm_backward, metafast_norm_forward, metafast_norm_sums, metafast_norm_tangent
from .reference import BatchNorm


def _count(parts: Tensor | None) -> int:
    """The number of tiles of ``[T, tiles, 2, C]``."""
    return 0 if parts is None else parts.shape[1]


@dataclass(frozen=True)
class TritonBatchNorm(Layer):
    """``maxpool(relu(batch_norm(x)))`` as one layer, with or without the last two.

    ``ctx.moments`` may bring what a convolution has found of its result: ``(parts, rows of a part)``; and before
    ``tangent_forward`` ``ctx.tangent_parts``, the sums of ``(xd, xd xh)``.
    """

    options: BatchNorm
    relu: bool = False
    window: tuple[int, int] = (1, 1)
    kind = "batch_norm"

    def forward(self, ctx: RuleContext, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        ctx.x = x = channels_last(inputs[0])
        tasks, n, *spatial, channels = x.shape
        height, width = spatial if len(spatial) == 2 else (1, x[0, 0].numel() // channels)
        ctx.s = s = Image(height, width, channels, *self.window, self.relu, self.options.fixed_statistics)
        if s.fixed_statistics:
            mean, var = (c.to(x.device, torch.float32) for c in constants)
            ctx.stat = torch.stack([mean, torch.rsqrt(var + self.options.eps)]).expand(tasks, -1, -1).contiguous()
            parts, tile_rows = None, 0
        else:
            ctx.stat = empty(x, tasks, 2, channels, dtype=torch.float32)
            parts, tile_rows = ctx.__dict__.get("moments") or (tile_moments(x), ROWS)
            parts, tile_rows = readable_moments(self._tiles(ctx, s.values(n)), parts, tile_rows, s.pixels(n))
        size = (s.out_h, s.out_w) if s.window > 1 else tuple(spatial)
        ctx.y_shape = (tasks, n, *size, channels)
        y = empty(x, *ctx.y_shape)
        ctx.code = empty(x, *ctx.y_shape, dtype=torch.int8) if s.coded else None
        ctx.xh = empty(x, *ctx.y_shape) if s.window > 1 else None
        (gamma, gamma_stride), (beta, beta_stride) = self._affine(ctx, params)
        self._run(metafast_norm_forward, ctx, s.values(n), y, ctx.code, ctx.xh, x, ctx.stat, parts, _count(parts),
                  tile_rows, self.options.eps, gamma, beta, gamma_stride, beta_stride, n)  # fmt: skip
        return channels_first(y)

    def backward(self, ctx: RuleContext, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        ctx.g = channels_last(g_y)
        g_x, ctx.g_sums = self._backward(ctx, params, None, ())
        return (g_x,), self._adjoints(ctx, params, ctx.g_sums)

    def tangent_forward(self, ctx: RuleContext, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        s, n = ctx.s, ctx.x.shape[1]
        ctx.xd, ctx.xd_sums, ctx.xhd, parts = None, None, None, None
        if d_inputs[0] is not None:
            ctx.xd = channels_last(d_inputs[0])
            ctx.xhd = ctx.xd if ctx.xh is None else empty(ctx.x, *ctx.y_shape)
            if not s.fixed_statistics:
                parts = ctx.__dict__.get("tangent_parts")
                parts = self._tangent_parts(ctx) if parts is None else parts
                parts = readable_sums(self._tiles(ctx, s.values(n)), parts)
                ctx.xd_sums = torch.empty_like(ctx.stat)
        yd = empty(ctx.x, *ctx.y_shape)
        (gamma, gamma_stride), _ = self._affine(ctx, params)
        (gammad, gammad_stride), (betad, betad_stride) = self._affine(ctx, d_params)
        x = ctx.x if ctx.xh is None else ctx.xh
        self._run(metafast_norm_tangent, ctx, s.values(n), yd, ctx.xhd, ctx.xd_sums, parts, _count(parts), x, ctx.code,
                  ctx.stat, gamma, ctx.xd, gammad, betad, gamma_stride, gammad_stride, betad_stride, n)  # fmt: skip
        return channels_first(yd)

    def tangent_backward(
        self, ctx: RuleContext, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        gd_x, sums = self._backward(ctx, params, channels_last(gd_y), d_params)
        return (gd_x,), self._adjoints(ctx, params, sums)

    def _backward(
        self, ctx: RuleContext, params: Tensors, gd: Tensor | None, d_params: Tangents
    ) -> tuple[Tensor | None, Tensor | None]:
        """The adjoint of the input, or with ``gd`` its tangent, and the sums ``[T, 2, C]`` behind it, where wanted."""
        s, n, through = ctx.s, ctx.x.shape[1], ctx.needs_inputs[0]
        parts = self._parts(ctx, gd) if any(ctx.needs_params) or (through and not s.fixed_statistics) else None
        if not through:
            return None, None if parts is None else add_tiles(parts)
        parts = None if parts is None else readable_sums(self._tiles(ctx, s.pixels(n)), parts)
        out, sums = torch.empty_like(ctx.x), None if parts is None else torch.empty_like(ctx.stat)
        (gamma, gamma_stride), _ = self._affine(ctx, params)
        (gammad, gammad_stride), _ = ((None, 0), None) if gd is None else self._affine(ctx, d_params)
        xd, xd_sums, g_sums = (None, None, None) if gd is None else (ctx.xd, ctx.xd_sums, ctx.g_sums)
        self._run(metafast_norm_backward, ctx, s.pixels(n), out, sums, parts, _count(parts), ctx.x, ctx.code, ctx.g,
                  ctx.stat, gamma, xd, gd, gammad, xd_sums, g_sums, gamma_stride, gammad_stride, n)  # fmt: skip
        return channels_first(out), sums

    def _parts(self, ctx: RuleContext, gd: Tensor | None) -> Tensor:
        """Each tile's sums of ``(g, g xh)``, or with ``gd`` of ``(gd, gd xh + g xhd)``."""
        n, x = ctx.x.shape[1], ctx.x if ctx.xh is None else ctx.xh
        xd, xd_sums = (None, None) if gd is None else (ctx.xhd, ctx.xd_sums)
        return self._sum(ctx, ctx.s, ctx.s.values(n), x, ctx.code, ctx.g, ctx.stat, xd, gd, xd_sums, n)

    def _tangent_parts(self, ctx: RuleContext) -> Tensor:
        """Each tile's sums of ``(xd, xd xh)``: those of an adjoint that reaches every pixel."""
        s, n = ctx.s, ctx.x.shape[1]
        whole = Image(s.height, s.width, s.channels)
        return self._sum(ctx, whole, s.pixels(n), ctx.x, None, ctx.xd, ctx.stat, None, None, None, n)

    def _sum(self, ctx: RuleContext, image: Image, rows: int, *args: object) -> Tensor:
        """Launches the sums of each tile, ``[T, tiles, 2, C]``."""
        parts = empty(ctx.stat, ctx.x.shape[0], self._tiles(ctx, rows), 2, image.channels)
        self._run(metafast_norm_sums, ctx, rows, parts, *args, image=image)
        return parts

    def _run(self, kernel: object, ctx: RuleContext, rows: int, *args: object, image: Image | None = None) -> None:
        s, bc = ctx.s, self._columns(ctx)
        grid = (self._tiles(ctx, rows) * cdiv(s.channels, bc), ctx.x.shape[0])
        launch(kernel, grid, *args, warps=8, S=image or s, BR=TILES.elements // bc, BC=bc, BT=TILES_AT_ONCE)

    @staticmethod
    def _columns(ctx: RuleContext) -> int:
        return block(ctx.s.channels, 16, 64)

    def _tiles(self, ctx: RuleContext, rows: int) -> int:
        """How many programs go over the rows of a task for each block of channels."""
        return cdiv(rows, TILES.elements // self._columns(ctx))

    def _affine(self, ctx: RuleContext, params: Tangents) -> list[tuple[Tensor | None, int]]:
        """Scale and shift of this inner step, or their directions, each with its stride from task to task."""
        rest = list(params)
        found: list[tuple[Tensor | None, int]] = []
        for present in (self.options.scale, self.options.shift):
            parameter = rest.pop(0) if present else None
            if parameter is not None and self.options.varies:
                parameter = parameter[:, self._row(ctx, parameter)]
            found.append((None, 0) if parameter is None else by_task(parameter))
        return found

    def _adjoints(self, ctx: RuleContext, params: Tensors, sums: Tensor | None) -> Tangents:
        found: list[Tensor | None] = []
        for present, k in ((self.options.scale, 1), (self.options.shift, 0)):
            if not present:
                continue
            place = len(found)
            adjoint = sums[:, k] if sums is not None and ctx.needs_params[place] else None
            if adjoint is not None and self.options.varies:
                row, rows = self._row(ctx, params[place]), params[place].shape[1]
                adjoint = torch.nn.functional.pad(adjoint[:, None], (0, 0, row, rows - 1 - row))
            found.append(adjoint)
        return found

    @staticmethod
    def _row(ctx: RuleContext, parameter: Tensor) -> int:
        return min(ctx.step, parameter.shape[1] - 1)


def lower(layer: BatchNorm, precision: str) -> TritonBatchNorm:
    """The rules of ``layer`` in Triton."""
    return TritonBatchNorm(layer)
