"""Pooling of images ``[T,n,H,W,C]`` by maximum or mean, and its transposes as gathers, free of atomics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import TILES, block, cdiv, empty, launch, within_reach


@dataclass(frozen=True)
class Pooling:
    """Window ``(i, j)`` covers the pixels ``i stride - padding + tap dilation``.

    A mean is a sum over ``divisor``. Where that is zero the pixels of each window are counted, those of the padding
    with them where ``padded``.
    """

    height: int
    width: int
    out_h: int
    out_w: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int = 1
    dilation_w: int = 1
    divisor: int = 0
    padded: bool = True

    @property
    def taps(self) -> int:
        """Pixels of a window."""
        return self.kernel_h * self.kernel_w


@triton.jit
def _extent(
    i, STRIDE: tl.constexpr, PADDING: tl.constexpr, KERNEL: tl.constexpr, END: tl.constexpr, PADDED: tl.constexpr
):
    """How many pixels of an axis a window counts."""
    start = i * STRIDE - PADDING
    if PADDED:
        return tl.minimum(start + KERNEL, END + PADDING) - start
    else:
        return tl.minimum(start + KERNEL, END) - tl.maximum(start, 0)


@triton.jit
def _count(h, w, S: tl.constexpr):
    """What the sum over a window is divided by."""
    if S.divisor > 0:
        return tl.full(h.shape, S.divisor, tl.float32)
    else:
        across = _extent(w, S.stride_w, S.padding_w, S.kernel_w, S.width, S.padded)
        return (_extent(h, S.stride_h, S.padding_h, S.kernel_h, S.height, S.padded) * across).to(tl.float32)


@triton.jit
def metafast_pool(
    y, code, x, n, C: tl.constexpr, RULE: tl.constexpr, S: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """``RULE``: "max" writes the winning taps to ``code`` too, "pick" reads them, "mean". Grid (tile, task)."""
    columns: tl.constexpr = (C + BC - 1) // BC
    tile, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x += task * n * (S.height * S.width * C)
    y += task * n * (S.out_h * S.out_w * C)
    if code is not None:
        code += task * n * (S.out_h * S.out_w * C)
    row, c = tile // columns * BR + tl.arange(0, BR), tile % columns * BC + tl.arange(0, BC)
    inside = (row < n * (S.out_h * S.out_w))[:, None] & (c < C)[None, :]
    h, w = row // S.out_w % S.out_h, row % S.out_w
    offset = row[:, None] * C + c[None, :]
    start = row // (S.out_h * S.out_w) * (S.height * S.width)
    if RULE == "pick":
        tap = tl.load(code + offset, inside, 0).to(tl.int32)
        ih = h[:, None] * S.stride_h - S.padding_h + tap // S.kernel_w * S.dilation_h
        iw = w[:, None] * S.stride_w - S.padding_w + tap % S.kernel_w * S.dilation_w
        v = tl.load(x + (start[:, None] + ih * S.width + iw) * C + c[None, :], inside & (tap >= 0), 0.0)
        tl.store(y + offset, v, inside)
    else:
        best = tl.full((BR, BC), float("-inf") if RULE == "max" else 0.0, tl.float32)
        won = tl.full((BR, BC), -1, tl.int32)
        for tap in range(S.taps):
            ih = h * S.stride_h - S.padding_h + tap // S.kernel_w * S.dilation_h
            iw = w * S.stride_w - S.padding_w + tap % S.kernel_w * S.dilation_w
            inside_image = inside & ((ih >= 0) & (ih < S.height) & (iw >= 0) & (iw < S.width))[:, None]
            v = tl.load(x + (start + ih * S.width + iw)[:, None] * C + c[None, :], inside_image, 0.0).to(tl.float32)
            if RULE == "max":
                better = inside_image & ((v > best) | (v != v) | (won < 0))
                best, won = tl.where(better, v, best), tl.where(better, tap, won)
            else:
                best += v
        if RULE == "max":
            tl.store(code + offset, won.to(tl.int16), inside)
        else:
            best = best / _count(h, w, S)[:, None]
        tl.store(y + offset, best, inside)


@triton.jit
def metafast_pool_transpose(g_x, code, g, n, C: tl.constexpr, S: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Each pixel sums what the windows around it send back: all, or with ``code`` those it won. Grid (tile, task)."""
    columns: tl.constexpr = (C + BC - 1) // BC
    tile, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    g_x += task * n * (S.height * S.width * C)
    g += task * n * (S.out_h * S.out_w * C)
    if code is not None:
        code += task * n * (S.out_h * S.out_w * C)
    row, c = tile // columns * BR + tl.arange(0, BR), tile % columns * BC + tl.arange(0, BC)
    inside = (row < n * (S.height * S.width))[:, None] & (c < C)[None, :]
    h, w = row // S.width % S.height, row % S.width
    start = row // (S.height * S.width) * (S.out_h * S.out_w)
    total = tl.zeros((BR, BC), tl.float32)
    for tap in range(S.taps):
        sh = h + S.padding_h - tap // S.kernel_w * S.dilation_h
        sw = w + S.padding_w - tap % S.kernel_w * S.dilation_w
        oh, ow = sh // S.stride_h, sw // S.stride_w
        meets = (sh >= 0) & (sw >= 0) & (oh < S.out_h) & (ow < S.out_w)
        meets = meets & (sh % S.stride_h == 0) & (sw % S.stride_w == 0)
        inside_result = inside & meets[:, None]
        offset = (start + oh * S.out_w + ow)[:, None] * C + c[None, :]
        adjoint = tl.load(g + offset, inside_result, 0.0).to(tl.float32)
        if code is None:
            total += adjoint / tl.where(meets, _count(oh, ow, S), 1.0)[:, None]
        else:
            total += tl.where(tl.load(code + offset, inside_result, -1).to(tl.int32) == tap, adjoint, 0.0)
    tl.store(g_x + row[:, None] * C + c[None, :], total, inside)


def pool(x: Tensor, sizes: Pooling, rule: str, code: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Turns ``[T,n,H,W,C]`` into ``[T,n,out_h,out_w,C]`` by ``rule``; returns the winners' taps where it knows them."""
    tasks, n, _, _, channels = x.shape
    y = empty(x, tasks, n, sizes.out_h, sizes.out_w, channels)
    within_reach(y)
    if rule == "max":
        code = torch.empty_like(y, dtype=torch.int16)
    bc = block(channels, 16, 64)
    br = TILES.elements // bc
    grid = (cdiv(n * sizes.out_h * sizes.out_w, br) * cdiv(channels, bc), tasks)
    launch(metafast_pool, grid, y, code, x, n, C=channels, RULE=rule, S=sizes, BR=br, BC=bc)
    return y, code


def pool_transpose(g: Tensor, sizes: Pooling, code: Tensor | None = None) -> Tensor:
    """Turns an adjoint ``[T,n,out_h,out_w,C]`` into that of the input, ``[T,n,H,W,C]``."""
    tasks, n, _, _, channels = g.shape
    g_x = empty(g, tasks, n, sizes.height, sizes.width, channels)
    bc = block(channels, 16, 64)
    br = TILES.elements // bc
    grid = (cdiv(n * sizes.height * sizes.width, br) * cdiv(channels, bc), tasks)
    launch(metafast_pool_transpose, grid, g_x, code, g, n, C=channels, S=sizes, BR=br, BC=bc)
    return g_x


def pooled_size(extent: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """The number of windows along an axis by torch's rule: with ``ceil_mode`` the last may hang over the edge, if it
    begins inside."""
    span = extent + 2 * padding - kernel
    count = (cdiv(span, stride) if ceil_mode else span // stride) + 1
    if ceil_mode and (count - 1) * stride >= extent + padding:
        count -= 1
    if count < 1:
        raise ValueError(f"a window of {kernel} pixels does not fit into {extent} with a padding of {padding}")
    return count
