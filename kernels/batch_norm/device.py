"""Batch norm with the ReLU and the max-pool behind it, as it runs on the device; ``kernel`` has the formulas.

The projection of an image ``u`` on ``xh`` is ``mean(u xh)`` over a channel. With the mean of ``u`` it says what the
derivative of ``xh`` takes away from ``u``.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..primitives.row_reductions import moments_of_tiles, sum_of_tiles


@dataclass(frozen=True)
class Image:
    """Sizes of a pass: images of ``height x width x channels``, cut into windows without overlap."""

    height: int
    width: int
    channels: int
    window_h: int = 1
    window_w: int = 1
    relu: bool = False
    fixed_statistics: bool = False

    @property
    def out_h(self) -> int:
        """Height of the result."""
        return self.height // self.window_h

    @property
    def out_w(self) -> int:
        """Width of the result."""
        return self.width // self.window_w

    def pixels(self, n: int) -> int:
        """The pixels of ``n`` images."""
        return n * self.height * self.width

    def values(self, n: int) -> int:
        """The values of a channel in the results of ``n`` images."""
        return n * self.out_h * self.out_w

    @property
    def window(self) -> int:
        """The pixels of a window. A value that ReLU cut off has this number as its code."""
        return self.window_h * self.window_w

    @property
    def coded(self) -> bool:
        """Does the forward pass keep a code for each value?"""
        return self.relu or self.window > 1


@triton.jit
def _channel(p, task, stride, c, C: tl.constexpr, absent: tl.constexpr):
    """A row of the values that a parameter has in channels ``c``."""
    if p is None:
        return tl.full((1, c.shape[0]), absent, tl.float32)
    else:
        return tl.load(p + task * stride + c, c < C, 0.0)[None, :]


@triton.jit
def _pair(p, task, c, C: tl.constexpr):
    """Two rows, of both values that ``[T, 2, C]`` has of each channel; zeros where there is none."""
    if p is None:
        zero = tl.zeros((1, c.shape[0]), tl.float32)
        return zero, zero
    else:
        p += task * 2 * C + c
        return tl.load(p, c < C, 0.0)[None, :], tl.load(p + C, c < C, 0.0)[None, :]


@triton.jit
def _keep(p, a, b, task, c, row_tile, C: tl.constexpr):
    """The first program of each channel writes both its values to ``[T, 2, C]``."""
    p += task * 2 * C + c
    written = c < tl.where(row_tile == 0, C, 0)
    tl.store(p, a, written)
    tl.store(p + C, b, written)


@triton.jit
def _means(sums, parts, tiles, task, c, row_tile, n, S: tl.constexpr, BT: tl.constexpr):
    """The mean of an image in each channel and its projection on ``xh``, as rows.

    They come from ``sums``, of the image and of its product with ``xh``; where there are ``parts`` the sums are found
    first. Both are zero where statistics are fixed.
    """
    if parts is None:
        mean, projection = _pair(sums, task, c, S.channels)
    else:
        parts += task * tiles * 2 * S.channels + c
        a = sum_of_tiles(parts, tiles, c < S.channels, 2 * S.channels, BT)
        b = sum_of_tiles(parts + S.channels, tiles, c < S.channels, 2 * S.channels, BT)
        _keep(sums, a, b, task, c, row_tile, S.channels)
        mean, projection = a[None, :], b[None, :]
    if S.fixed_statistics:
        mean, projection = _pair(None, task, c, S.channels)
    count = n * (S.height * S.width)
    return mean / count, projection / count


@triton.jit
def _winners(code, n, row, c, S: tl.constexpr, task):
    """Where the values of the result's rows lie, which pixel of its window each is, and whether ReLU let it through."""
    rows = n * (S.out_h * S.out_w)
    offset = task * rows * S.channels + row[:, None] * S.channels + c[None, :]
    alive = (row < rows)[:, None] & (c < S.channels)[None, :]
    won = tl.zeros(offset.shape, tl.int32)
    if S.coded:
        won = tl.load(code + offset, alive, S.window).to(tl.int32)
        alive = alive & (won < S.window)
    return offset, won, alive


@triton.jit
def _standard(x, offset, alive, mean, r, S: tl.constexpr):
    """``xh`` of the result's values. It was kept where windows have several pixels, and else follows from ``x``."""
    v = tl.load(x + offset, alive, 0.0).to(tl.float32)
    if S.window > 1:
        return v
    else:
        return (v - mean) * r


@triton.jit(do_not_specialize=["tiles", "tile_rows"])
def metafast_norm_forward(
    y, code, won_xh, x, stat, parts, tiles, tile_rows, eps, gamma, beta, gamma_stride, beta_stride, n,
    S: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Writes ``y``, the codes and the winners' ``xh``.

    From ``parts``, the moments of tiles of ``x``, it also finds ``stat``: the mean and ``(var + eps)^-1/2``. Its grid
    is (row tile x column tile, task), as that of all kernels here.
    """
    columns: tl.constexpr = (S.channels + BC - 1) // BC
    tile, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, c = tile // columns * BR + tl.arange(0, BR), tile % columns * BC + tl.arange(0, BC)
    rows = n * (S.out_h * S.out_w)
    inside = (row < rows)[:, None] & (c < S.channels)[None, :]
    if parts is None:
        mean, r = _pair(stat, task, c, S.channels)
    else:
        parts += task * tiles * 2 * S.channels + c
        count = n * (S.height * S.width)
        channel_mean, squares = moments_of_tiles(parts, tiles, tile_rows, count, c < S.channels, S.channels, BT)
        channel_r = 1.0 / tl.sqrt(squares / count + eps)
        _keep(stat, channel_mean, channel_r, task, c, tile // columns, S.channels)
        mean, r = channel_mean[None, :], channel_r[None, :]
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
        offset = corner + (i // S.window_w * S.width + i % S.window_w) * S.channels
        xh = (tl.load(x + offset, inside, 0.0).to(tl.float32) - mean) * r
        v = scale * xh + shift
        if i == 0:
            best, best_xh = v, xh
        else:
            better = (v > best) | (v != v)
            best, best_xh = tl.where(better, v, best), tl.where(better, xh, best_xh)
            won = tl.where(better, i, won)
    offset = task * rows * S.channels + row[:, None] * S.channels + c[None, :]
    if S.relu:
        won = tl.where(best > 0, won, S.window)
        best = tl.where(best <= 0, 0.0, best)
    tl.store(y + offset, best, inside)
    if S.coded:
        tl.store(code + offset, won.to(tl.int8), inside)
    if S.window > 1:
        tl.store(won_xh + offset, best_xh, inside)


@triton.jit
def metafast_norm_sums(
    parts, x, code, g, stat, xd, gd, xd_sums, n,
    S: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Sums each tile of ``(g, g xh)``, or with ``gd`` of ``(gd, gd xh + g xhd)``, to ``[T, tiles, 2, C]``.

    Where windows have more than one pixel, ``x`` and ``xd`` are the winners' ``xh`` and ``xhd``.
    """
    columns: tl.constexpr = (S.channels + BC - 1) // BC
    tile, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, c = tile // columns * BR + tl.arange(0, BR), tile % columns * BC + tl.arange(0, BC)
    offset, _won, alive = _winners(code, n, row, c, S, task)
    mean, r = _pair(stat, task, c, S.channels)
    xh = _standard(x, offset, alive, mean, r, S)
    if gd is None:
        u = tl.load(g + offset, alive, 0.0).to(tl.float32)
        products = u * xh
    else:
        u = tl.load(gd + offset, alive, 0.0).to(tl.float32)
        products = u * xh
        if xd is not None:
            xd_mean, xd_projection = _means(xd_sums, None, 0, task, c, 0, n, S, BT)
            xhd = tl.load(xd + offset, alive, 0.0).to(tl.float32)
            if S.window == 1:
                xhd = r * (xhd - xd_mean - xh * xd_projection)
            products += tl.load(g + offset, alive, 0.0).to(tl.float32) * xhd
    tiles = tl.num_programs(0) // columns
    parts += (task * tiles + tile // columns) * 2 * S.channels + c
    tl.store(parts, tl.sum(u, 0), c < S.channels)
    tl.store(parts + S.channels, tl.sum(products, 0), c < S.channels)


@triton.jit(do_not_specialize=["tiles"])
def metafast_norm_backward(
    out, sums, parts, tiles, x, code, g, stat, gamma, xd, gd, gammad, xd_sums, g_sums, gamma_stride, gammad_stride, n,
    S: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Writes ``g_x``, or with ``gd`` its tangent, and the ``sums`` of the rule's ``parts``."""
    columns: tl.constexpr = (S.channels + BC - 1) // BC
    tile, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, c = tile // columns * BR + tl.arange(0, BR), tile % columns * BC + tl.arange(0, BC)
    rows = n * (S.height * S.width)
    inside = (row < rows)[:, None] & (c < S.channels)[None, :]
    pixel = task * rows * S.channels + row[:, None] * S.channels + c[None, :]
    sample, h, w = row // (S.height * S.width), row // S.width % S.height, row % S.width
    oh, ow = h // S.window_h, w // S.window_w
    offset = ((sample * S.out_h + oh) * S.out_w + ow)[:, None] * S.channels + c[None, :]
    offset += task * n * (S.out_h * S.out_w * S.channels)
    alive = inside & ((oh < S.out_h) & (ow < S.out_w))[:, None]
    if S.coded:
        place = h % S.window_h * S.window_w + w % S.window_w
        alive = alive & (tl.load(code + offset, alive, S.window).to(tl.int32) == place[:, None])
    mean, r = _pair(stat, task, c, S.channels)
    scale = _channel(gamma, task, gamma_stride, c, S.channels, 1.0)
    xh = (tl.load(x + pixel, inside, 0.0).to(tl.float32) - mean) * r
    gz = tl.load(g + offset, alive, 0.0).to(tl.float32)
    g_mean, g_projection = _means(sums, parts, tiles, task, c, tile // columns, n, S, BT)
    if gd is not None:
        gd_mean, gd_projection = g_mean, g_projection  # then the sums were those of gd
        g_mean, g_projection = _means(g_sums, None, 0, task, c, 0, n, S, BT)
    g_x = r * (scale * (gz - g_mean - xh * g_projection))
    if gd is None:
        tl.store(out + pixel, g_x, inside)
    else:
        d_scale = _channel(gammad, task, gammad_stride, c, S.channels, 0.0)
        ghd = scale * tl.load(gd + offset, alive, 0.0).to(tl.float32) + d_scale * gz
        gd_x = r * (ghd - (scale * gd_mean + d_scale * g_mean) - xh * (scale * gd_projection + d_scale * g_projection))
        if xd is not None and not S.fixed_statistics:
            xd_mean, xd_projection = _means(xd_sums, None, 0, task, c, 0, n, S, BT)
            xhd = r * (tl.load(xd + pixel, inside, 0.0).to(tl.float32) - xd_mean - xh * xd_projection)
            gd_x -= r * (xhd * scale * g_projection + xd_projection * g_x)
        tl.store(out + pixel, gd_x, inside)


@triton.jit(do_not_specialize=["tiles"])
def metafast_norm_tangent(
    yd, won_xhd, xd_sums, parts, tiles, x, code, stat, gamma, xd, gammad, betad, gamma_stride, gammad_stride,
    betad_stride, n, S: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Writes ``yd``, the winners' ``xhd``, and ``xd_sums`` from their ``parts``.

    Where windows have more than one pixel, ``x`` is the winners' ``xh``.
    """
    columns: tl.constexpr = (S.channels + BC - 1) // BC
    tile, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, c = tile // columns * BR + tl.arange(0, BR), tile % columns * BC + tl.arange(0, BC)
    offset, won, alive = _winners(code, n, row, c, S, task)
    inside = (row < n * (S.out_h * S.out_w))[:, None] & (c < S.channels)[None, :]
    mean, r = _pair(stat, task, c, S.channels)
    xh = _standard(x, offset, alive, mean, r, S)
    value = _channel(gammad, task, gammad_stride, c, S.channels, 0.0) * xh
    value += _channel(betad, task, betad_stride, c, S.channels, 0.0)
    if xd is not None:
        xd_mean, xd_projection = _means(xd_sums, parts, tiles, task, c, tile // columns, n, S, BT)
        sample, h, w = row // (S.out_h * S.out_w), row // S.out_w % S.out_h * S.window_h, row % S.out_w * S.window_w
        pixel = ((sample * S.height + h) * S.width + w)[:, None] + won // S.window_w * S.width + won % S.window_w
        xd += task * n * (S.height * S.width * S.channels)
        u = tl.load(xd + pixel * S.channels + c[None, :], alive, 0.0).to(tl.float32)
        xhd = r * (u - xd_mean - xh * xd_projection)
        value += _channel(gamma, task, gamma_stride, c, S.channels, 1.0) * xhd
        if S.window > 1:
            tl.store(won_xhd + offset, xhd, alive)
    tl.store(yd + offset, tl.where(alive, value, 0.0), inside)
