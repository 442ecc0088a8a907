"""Batch norm with the ReLU and the max-pool behind it, each rule in one pass; formulas in ``normalise``.

The forward pass keeps for each value of the result a code: which pixel of its window won, or none where ReLU cut it
off; and where windows have more than one pixel the winners' ``xh``, a tangent pass their ``xhd``. The sums over an
adjoint, zero elsewhere, then read as much as the result is large. With

    g_x  = r (gh - mean gh - xh b),  b = mean(gh xh)
    yd   = gamma xhd + gammad xh + betad,  xhd = r (xd - mean xd - xh c),  c = mean(xh xd)
    gd_x = r (ghd - mean ghd - xh bd - xhd b) - r c g_x,  ghd = gamma gd + gammad g,  bd = mean(ghd xh + gh xhd)

need of each channel two sums a rule: (g, g xh), (xd, xd xh) and (gd, gd xh + g xhd).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import TILES, block, by_task, cdiv, channels_first, channels_last, empty, launch
from ..layer import Context, Layer, Tangents, Tensors
from ..sums import ROWS, add_tiles, merge_moments, moments
from .reference import BatchNorm


@dataclass(frozen=True)
class Image:
    """Sizes of a pass: images of ``height x width x channels``, cut into windows without overlap."""

    height: int
    width: int
    channels: int
    window_h: int = 1
    window_w: int = 1
    relu: bool = False
    given: bool = False

    @property
    def out_h(self) -> int:
        """Height of the result."""
        return self.height // self.window_h

    @property
    def out_w(self) -> int:
        """Width of the result."""
        return self.width // self.window_w

    @property
    def window(self) -> int:
        """Pixels of a window; also the code of a value that ReLU cut off."""
        return self.window_h * self.window_w

    @property
    def coded(self) -> bool:
        """Is there anything to remember?"""
        return self.relu or self.window > 1


@triton.jit
def _channel(p, task, stride, c, C: tl.constexpr, absent: tl.constexpr):
    """A parameter's values of channels ``c``, as a row."""
    if p is None:
        return tl.full((1, c.shape[0]), absent, tl.float32)
    else:
        return tl.load(p + task * stride + c, c < C, 0.0)[None, :]


@triton.jit
def _pair(p, task, c, C: tl.constexpr):
    """Both values of each channel of ``[T, 2, C]``, as rows; zero where there is none."""
    if p is None:
        zero = tl.zeros((1, c.shape[0]), tl.float32)
        return zero, zero
    else:
        p += task * 2 * C + c
        return tl.load(p, c < C, 0.0)[None, :], tl.load(p + C, c < C, 0.0)[None, :]


@triton.jit
def _winners(code, n, row, c, S: tl.constexpr, task):
    """The values of the result's rows, which pixel of its window each is, and which of them ReLU let through."""
    rows = n * (S.out_h * S.out_w)
    at = task * rows * S.channels + row[:, None] * S.channels + c[None, :]
    alive = (row < rows)[:, None] & (c < S.channels)[None, :]
    won = tl.zeros(at.shape, tl.int32)
    if S.coded:
        won = tl.load(code + at, alive, S.window).to(tl.int32)
        alive = alive & (won < S.window)
    return at, won, alive


@triton.jit
def _standard(x, at, alive, mean, r, S: tl.constexpr):
    """``xh`` of the result's values: as it was kept, or where every pixel is a value from ``x``."""
    v = tl.load(x + at, alive, 0.0).to(tl.float32)
    if S.window > 1:
        return v
    else:
        return (v - mean) * r


@triton.jit
def metafast_norm_forward(
    y, code, won_xh, x, stat, gamma, beta, gamma_stride, beta_stride, n,
    S: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``y``, the codes and the winners' ``xh``. Grid (row tile x column tile, task), as of all kernels here."""
    columns: tl.constexpr = (S.channels + BC - 1) // BC
    tile, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, c = tile // columns * BR + tl.arange(0, BR), tile % columns * BC + tl.arange(0, BC)
    rows = n * (S.out_h * S.out_w)
    inside = (row < rows)[:, None] & (c < S.channels)[None, :]
    mean, r = _pair(stat, task, c, S.channels)
    scale = _channel(gamma, task, gamma_stride, c, S.channels, 1.0)
    shift = _channel(beta, task, beta_stride, c, S.channels, 0.0)
    sample, h, w = row // (S.out_h * S.out_w), row // S.out_w % S.out_h * S.window_h, row % S.out_w * S.window_w
    corner = ((sample * S.height + h) * S.width + w)[:, None] * S.channels + c[None, :]
    x += task * n * (S.height * S.width * S.channels)
    best = tl.zeros((BR, BC), tl.float32)
    best_xh = best
    won = tl.zeros((BR, BC), tl.int32)
    window: tl.constexpr = S.window
    for i in tl.static_range(window):
        at = corner + (i // S.window_w * S.width + i % S.window_w) * S.channels
        xh = (tl.load(x + at, inside, 0.0).to(tl.float32) - mean) * r
        v = scale * xh + shift
        if i == 0:
            best, best_xh = v, xh
        else:
            better = (v > best) | (v != v)
            best, best_xh = tl.where(better, v, best), tl.where(better, xh, best_xh)
            won = tl.where(better, i, won)
    at = task * rows * S.channels + row[:, None] * S.channels + c[None, :]
    if S.relu:
        won = tl.where(best > 0, won, S.window)
        best = tl.where(best <= 0, 0.0, best)
    tl.store(y + at, best, inside)
    if S.coded:
        tl.store(code + at, won.to(tl.int8), inside)
    if S.window > 1:
        tl.store(won_xh + at, best_xh, inside)


@triton.jit
def metafast_norm_sums(
    parts, x, code, g, stat, xd, gd, xd_mean, n, S: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """Of each tile the sums of ``(g, g xh)``, or with ``gd`` of ``(gd, gd xh + g xhd)``: ``[T, tiles, 2, C]``.

    Where windows have more than one pixel, ``x`` and ``xd`` are the winners' ``xh`` and ``xhd``.
    """
    columns: tl.constexpr = (S.channels + BC - 1) // BC
    tile, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, c = tile // columns * BR + tl.arange(0, BR), tile % columns * BC + tl.arange(0, BC)
    at, _won, alive = _winners(code, n, row, c, S, task)
    mean, r = _pair(stat, task, c, S.channels)
    xh = _standard(x, at, alive, mean, r, S)
    if gd is None:
        u = tl.load(g + at, alive, 0.0).to(tl.float32)
        products = u * xh
    else:
        u = tl.load(gd + at, alive, 0.0).to(tl.float32)
        products = u * xh
        if xd is not None:
            level, slope = _pair(xd_mean, task, c, S.channels)
            xhd = tl.load(xd + at, alive, 0.0).to(tl.float32)
            if S.window == 1:
                xhd = r * (xhd - level - xh * slope)
            products += tl.load(g + at, alive, 0.0).to(tl.float32) * xhd
    tiles = tl.num_programs(0) // columns
    parts += (task * tiles + tile // columns) * 2 * S.channels + c
    tl.store(parts, tl.sum(u, 0), c < S.channels)
    tl.store(parts + S.channels, tl.sum(products, 0), c < S.channels)


@triton.jit
def metafast_norm_backward(
    out, x, code, g, stat, gamma, g_mean, xd, gd, gammad, xd_mean, gd_mean, gamma_stride, gammad_stride, n,
    S: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``g_x``, or with ``gd`` its tangent."""
    columns: tl.constexpr = (S.channels + BC - 1) // BC
    tile, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, c = tile // columns * BR + tl.arange(0, BR), tile % columns * BC + tl.arange(0, BC)
    rows = n * (S.height * S.width)
    inside = (row < rows)[:, None] & (c < S.channels)[None, :]
    pixel = task * rows * S.channels + row[:, None] * S.channels + c[None, :]
    sample, h, w = row // (S.height * S.width), row // S.width % S.height, row % S.width
    oh, ow = h // S.window_h, w // S.window_w
    at = ((sample * S.out_h + oh) * S.out_w + ow)[:, None] * S.channels + c[None, :]
    at += task * n * (S.out_h * S.out_w * S.channels)
    alive = inside & ((oh < S.out_h) & (ow < S.out_w))[:, None]
    if S.coded:
        place = h % S.window_h * S.window_w + w % S.window_w
        alive = alive & (tl.load(code + at, alive, S.window).to(tl.int32) == place[:, None])
    mean, r = _pair(stat, task, c, S.channels)
    scale = _channel(gamma, task, gamma_stride, c, S.channels, 1.0)
    xh = (tl.load(x + pixel, inside, 0.0).to(tl.float32) - mean) * r
    gz = tl.load(g + at, alive, 0.0).to(tl.float32)
    level, slope = _pair(g_mean, task, c, S.channels)
    g_x = r * (scale * (gz - level - xh * slope))
    if gd is None:
        tl.store(out + pixel, g_x, inside)
    else:
        scaled = _channel(gammad, task, gammad_stride, c, S.channels, 0.0)
        leveld, sloped = _pair(gd_mean, task, c, S.channels)
        ghd = scale * tl.load(gd + at, alive, 0.0).to(tl.float32) + scaled * gz
        gd_x = r * (ghd - (scale * leveld + scaled * level) - xh * (scale * sloped + scaled * slope))
        if xd is not None and not S.given:
            xd_level, xd_slope = _pair(xd_mean, task, c, S.channels)
            xhd = r * (tl.load(xd + pixel, inside, 0.0).to(tl.float32) - xd_level - xh * xd_slope)
            gd_x -= r * (xhd * scale * slope + xd_slope * g_x)
        tl.store(out + pixel, gd_x, inside)


@triton.jit
def metafast_norm_tangent(
    yd, won_xhd, x, code, stat, gamma, xd, xd_mean, gammad, betad, gamma_stride, gammad_stride, betad_stride, n,
    S: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``yd`` and the winners' ``xhd``. Where windows have more than one pixel, ``x`` is the winners' ``xh``."""
    columns: tl.constexpr = (S.channels + BC - 1) // BC
    tile, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, c = tile // columns * BR + tl.arange(0, BR), tile % columns * BC + tl.arange(0, BC)
    at, won, alive = _winners(code, n, row, c, S, task)
    inside = (row < n * (S.out_h * S.out_w))[:, None] & (c < S.channels)[None, :]
    mean, r = _pair(stat, task, c, S.channels)
    xh = _standard(x, at, alive, mean, r, S)
    value = _channel(gammad, task, gammad_stride, c, S.channels, 0.0) * xh
    value += _channel(betad, task, betad_stride, c, S.channels, 0.0)
    if xd is not None:
        level, slope = _pair(xd_mean, task, c, S.channels)
        sample, h, w = row // (S.out_h * S.out_w), row // S.out_w % S.out_h * S.window_h, row % S.out_w * S.window_w
        pixel = ((sample * S.height + h) * S.width + w)[:, None] + won // S.window_w * S.width + won % S.window_w
        xd += task * n * (S.height * S.width * S.channels)
        xhd = r * (tl.load(xd + pixel * S.channels + c[None, :], alive, 0.0).to(tl.float32) - level - xh * slope)
        value += _channel(gamma, task, gamma_stride, c, S.channels, 1.0) * xhd
        if S.window > 1:
            tl.store(won_xhd + at, xhd, alive)
    tl.store(yd + at, tl.where(alive, value, 0.0), inside)


@dataclass(frozen=True)
class TritonBatchNorm(Layer):
    """``maxpool(relu(batch_norm(x)))`` as one layer, with or without the last two.

    ``ctx.moments`` may bring what a convolution has found of its result: ``(parts, rows of a part)``; and before
    ``tangent_forward`` ``ctx.tangent_parts``, the sums of ``(xd, xd xh)``.
    """

    options: BatchNorm
    relu: bool = False
    window: tuple[int, int] = (1, 1)
    stem = "batch_norm"

    def forward(self, ctx: Context, params: Tensors, inputs: Tensors, constants: Tensors = ()) -> Tensor:
        ctx.x = x = channels_last(inputs[0])
        tasks, n, *spatial, channels = x.shape
        height, width = spatial if len(spatial) == 2 else (1, x[0, 0].numel() // channels)
        ctx.s = s = Image(height, width, channels, *self.window, self.relu, self.options.given)
        ctx.count = n * height * width
        if s.given:
            mean, var = (c.to(x.device, torch.float32) for c in constants)
            ctx.stat = torch.stack([mean, torch.rsqrt(var + self.options.eps)]).expand(tasks, -1, -1).contiguous()
        else:
            parts, rows = ctx.__dict__.get("moments") or (moments(x), ROWS)
            ctx.stat = merge_moments(parts, rows, ctx.count, self.options.eps)
        size = (s.out_h, s.out_w) if s.window > 1 else tuple(spatial)
        ctx.y_shape = (tasks, n, *size, channels)
        y = empty(x, *ctx.y_shape)
        ctx.code = empty(x, *ctx.y_shape, dtype=torch.int8) if s.coded else None
        ctx.xh = empty(x, *ctx.y_shape) if s.window > 1 else None
        (gamma, gamma_stride), (beta, beta_stride) = self._affine(ctx, params)
        self._run(metafast_norm_forward, ctx, n * s.out_h * s.out_w, y, ctx.code, ctx.xh, x, ctx.stat, gamma,
                  beta, gamma_stride, beta_stride, n)  # fmt: skip
        return channels_first(y)

    def backward(self, ctx: Context, params: Tensors, g_y: Tensor) -> tuple[Tangents, Tangents]:
        ctx.g, ctx.g_sums, ctx.g_mean = channels_last(g_y), None, None
        if any(ctx.needs_params) or (ctx.needs_inputs[0] and not ctx.s.given):
            ctx.g_sums = self._sums(ctx, None)
            ctx.g_mean = None if ctx.s.given else ctx.g_sums / ctx.count
        g_x = self._pull(ctx, params, None, (), None) if ctx.needs_inputs[0] else None
        return (g_x,), self._adjoints(ctx, params, ctx.g_sums)

    def tangent_forward(self, ctx: Context, params: Tensors, d_params: Tangents, d_inputs: Tangents) -> Tensor:
        s, n = ctx.s, ctx.x.shape[1]
        ctx.xd, ctx.xd_mean, ctx.xhd = None, None, None
        if d_inputs[0] is not None:
            ctx.xd = channels_last(d_inputs[0])
            ctx.xhd = ctx.xd if ctx.xh is None else empty(ctx.x, *ctx.y_shape)
            if not s.given:
                parts = ctx.__dict__.get("tangent_parts")
                ctx.xd_mean = (self._tangent_sums(ctx) if parts is None else add_tiles(parts)) / ctx.count
        yd = empty(ctx.x, *ctx.y_shape)
        (gamma, gamma_stride), _ = self._affine(ctx, params)
        (gammad, gammad_stride), (betad, betad_stride) = self._affine(ctx, d_params)
        x = ctx.x if ctx.xh is None else ctx.xh
        self._run(metafast_norm_tangent, ctx, n * s.out_h * s.out_w, yd, ctx.xhd, x, ctx.code, ctx.stat, gamma, ctx.xd,
                  ctx.xd_mean, gammad, betad, gamma_stride, gammad_stride, betad_stride, n)  # fmt: skip
        return channels_first(yd)

    def tangent_backward(
        self, ctx: Context, params: Tensors, d_params: Tangents, gd_y: Tensor
    ) -> tuple[Tangents, Tangents]:
        gd, sums = channels_last(gd_y), None
        if any(ctx.needs_params) or (ctx.needs_inputs[0] and not ctx.s.given):
            sums = self._sums(ctx, gd)
        gd_x = self._pull(ctx, params, gd, d_params, sums) if ctx.needs_inputs[0] else None
        return (gd_x,), self._adjoints(ctx, params, sums)

    def _sums(self, ctx: Context, gd: Tensor | None) -> Tensor:
        """``[T, 2, C]``."""
        s, (tasks, n) = ctx.s, ctx.x.shape[:2]
        rows = n * s.out_h * s.out_w
        parts = empty(ctx.stat, tasks, cdiv(rows, self._rows(ctx)), 2, s.channels)
        x = ctx.x if ctx.xh is None else ctx.xh
        xd, xd_mean = (None, None) if gd is None else (ctx.xhd, ctx.xd_mean)
        self._run(metafast_norm_sums, ctx, rows, parts, x, ctx.code, ctx.g, ctx.stat, xd, gd, xd_mean, n)
        return add_tiles(parts)

    def _tangent_sums(self, ctx: Context) -> Tensor:
        """Sums of ``(xd, xd xh)``: those of an adjoint that reaches every pixel."""
        s, (tasks, n) = ctx.s, ctx.x.shape[:2]
        whole = Image(s.height, s.width, s.channels)
        rows = n * s.height * s.width
        parts = empty(ctx.stat, tasks, cdiv(rows, self._rows(ctx)), 2, s.channels)
        self._run(metafast_norm_sums, ctx, rows, parts, ctx.x, None, ctx.xd, ctx.stat, None, None, None, n, image=whole)
        return add_tiles(parts)

    def _pull(
        self, ctx: Context, params: Tensors, gd: Tensor | None, d_params: Tangents, sums: Tensor | None
    ) -> Tensor:
        out, n = torch.empty_like(ctx.x), ctx.x.shape[1]
        (gamma, gamma_stride), _ = self._affine(ctx, params)
        (gammad, gammad_stride), _ = ((None, 0), None) if gd is None else self._affine(ctx, d_params)
        xd, xd_mean = (None, None) if gd is None else (ctx.xd, ctx.xd_mean)
        gd_mean = None if sums is None or ctx.s.given else sums / ctx.count
        self._run(metafast_norm_backward, ctx, n * ctx.s.height * ctx.s.width, out, ctx.x, ctx.code, ctx.g, ctx.stat,
                  gamma, ctx.g_mean, xd, gd, gammad, xd_mean, gd_mean, gamma_stride, gammad_stride, n)  # fmt: skip
        return channels_first(out)

    def _run(self, kernel: object, ctx: Context, rows: int, *args: object, image: Image | None = None) -> None:
        s, bc, br = ctx.s, self._columns(ctx), self._rows(ctx)
        grid = (cdiv(rows, br) * cdiv(s.channels, bc), ctx.x.shape[0])
        launch(kernel, grid, *args, warps=8, S=image or s, BR=br, BC=bc)

    @staticmethod
    def _columns(ctx: Context) -> int:
        return block(ctx.s.channels, 16, 64)

    def _rows(self, ctx: Context) -> int:
        return TILES.elements // self._columns(ctx)

    def _affine(self, ctx: Context, params: Tangents) -> list[tuple[Tensor | None, int]]:
        """Scale and shift (or their directions) of the inner step at hand, with the stride from task to task."""
        rest = list(params)
        found: list[tuple[Tensor | None, int]] = []
        for present in (self.options.scale, self.options.shift):
            parameter = rest.pop(0) if present else None
            if parameter is not None and self.options.varies:
                parameter = parameter[:, self._row(ctx, parameter)]
            found.append((None, 0) if parameter is None else by_task(parameter))
        return found

    def _adjoints(self, ctx: Context, params: Tensors, sums: Tensor | None) -> Tangents:
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
    def _row(ctx: Context, parameter: Tensor) -> int:
        return min(ctx.step, parameter.shape[1] - 1)
