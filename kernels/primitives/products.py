"""Launchers of the contractions: convolution, data gradient and weight gradient of one or two terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from .contraction import metafast_add_slices, metafast_gather_product, metafast_weight_gradient
from .launch import REACH, TILES, block, by_task, cdiv, empty, launch, processors, within_reach
from .product_blocks import choose_blocks

Term = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Gather:
    """Which pixels of a source each pixel of the result reads, and how weights lie in memory.

    Along each axis ``source = (scale * row + offset + step * tap) / divide``, where that is a whole number inside of
    the source.

    Rows whose index leaves the same residue modulo ``classes`` use the same taps, each ``classes``-th from the first,
    which is ``(residue + offset) * inverse mod classes``. There are no more classes than rows: none is empty.
    """

    rows_h: int
    rows_w: int
    outputs: int
    source_h: int
    source_w: int
    channels: int
    groups: int
    taps_h: int
    taps_w: int
    scale_h: int
    scale_w: int
    offset_h: int
    offset_w: int
    step_h: int
    step_w: int
    divide_h: int
    divide_w: int
    classes_h: int
    classes_w: int
    inverse_h: int
    inverse_w: int
    output_stride: int
    tap_stride: int
    channel_stride: int
    weights_per_group: int


@dataclass(frozen=True)
class Convolution:
    """Sizes of a convolution of ``[T,n,height,width,channels]`` with ``[T,outputs,kh,kw,channels/groups]``."""

    height: int
    width: int
    channels: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        extents = zip((self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        out = [(e + 2 * p - d * (k - 1) - 1) // s + 1 for e, k, s, p, d in extents]
        if min(out) < 1:
            raise ValueError(f"a kernel of {self.kernel} does not fit into {self.height}x{self.width} pixels")
        return out[0], out[1]

    def forward(self) -> Gather:
        """The convolution."""
        c, o = self.channels // self.groups, self.outputs // self.groups
        taps = self.kernel[0] * self.kernel[1]
        return Gather(
            *self.size, o, self.height, self.width, c, self.groups, *self.kernel, *self.stride,
            *(-p for p in self.padding), *self.dilation, 1, 1, 1, 1, 0, 0, taps * c, c, 1, taps * c * o,
        )  # fmt: skip

    def data_gradient(self) -> Gather:
        """Its transpose in the data."""
        c, o = self.channels // self.groups, self.outputs // self.groups
        taps = self.kernel[0] * self.kernel[1]
        axes = zip((self.height, self.width), self.stride, self.dilation, strict=True)
        classes = [s if gcd(s, d) == 1 and s <= extent else 1 for extent, s, d in axes]
        inverse = [pow(d, -1, k) if k > 1 else 0 for d, k in zip(self.dilation, classes, strict=True)]
        return Gather(
            self.height, self.width, c, *self.size, o, self.groups, *self.kernel, 1, 1, *self.padding,
            *(-d for d in self.dilation), *self.stride, *classes, *inverse, 1, c, taps * c, taps * c * o,
        )  # fmt: skip


def gather_product(
    terms: Sequence[Term],
    gather: Gather,
    precision: str,
    bias: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | bool = False,
) -> tuple[Tensor, Tensor | None, int]:
    """Returns ``sum_i A_i * W_i + bias``, ``[T,n,rows_h,rows_w,outputs]``, partial sums over it, and the rows in each.

    Partial sums are ``[T, tiles, 2, outputs]``. With ``statistics=True`` they are the mean and the sum of squared
    deviations of each tile; with ``(z, stat)`` they are the sums of the result and of its product with ``zh = (z -
    mean) r``. Where none are wanted, tasks that share their weights run as one task with the samples of all: its
    tiles are full.
    """
    s, source = gather, terms[0][0]
    tasks, n = source.shape[:2]
    (a0, w0), (a1, w1) = (*terms, (None, None))[:2]
    w0, w0_stride = by_task(w0)
    w1, w1_stride = (None, 0) if w1 is None else by_task(w1)
    bias, bias_stride = (None, 0) if bias is None else by_task(bias)
    width = s.outputs * s.groups
    y = empty(source, tasks, n, s.rows_h, s.rows_w, width)
    within_reach(y)
    if not (statistics or w0_stride or w1_stride or bias_stride):
        together = _together(tasks, max(source[0].numel(), y[0].numel()))
        tasks, n = tasks // together, n * together
    rows = n * cdiv(s.rows_h, s.classes_h) * cdiv(s.rows_w, s.classes_w)
    taps, layers = s.taps_h * s.taps_w, tasks * s.groups * s.classes_h * s.classes_w
    runs, length = (taps, s.channels) if s.channels >= 16 else (1, taps * s.channels)
    b = choose_blocks(rows, s.outputs, len(terms) * runs, length, layers, processors(y.device))
    grid = (
        cdiv(rows, b.rows) * cdiv(s.outputs, b.columns), tasks * s.groups, s.classes_h * s.classes_w * b.slices
    )  # fmt: skip
    # Taps that are found for each element, and strides in a block of four warps, need a few registers more.
    loose = s.channels < 16 or (b.warps == 4 and s.classes_h * s.classes_w > 1)
    registers = None if loose else b.registers
    options = {"S": s, "PRECISION": precision, "BM": b.rows, "BN": b.columns, "BK": b.depth,
               "warps": b.warps, "registers": registers}  # fmt: skip
    inputs = a0, w0, a1, w1
    if b.slices > 1:
        added = empty(y, b.slices, *y.shape, dtype=torch.float32)
        launch(metafast_gather_product, grid, added, None, None, None, None, *inputs, 0, w0_stride, w1_stride, n,
               b.slices, **options)  # fmt: skip
        return _add_slices(y, added, bias, bias_stride, statistics)
    parts = empty(y, tasks, cdiv(rows, b.rows), 2, width, dtype=torch.float32) if statistics else None
    z, stat = statistics if isinstance(statistics, tuple) else (None, None)
    launch(metafast_gather_product, grid, y, bias, parts, z, stat, *inputs, bias_stride, w0_stride, w1_stride, n, 1,
           **options)  # fmt: skip
    return y, parts, b.rows


def weight_gradient(terms: Sequence[Term], gather: Gather, precision: str) -> Tensor:
    """``sum_i g_i (x) x_i``, ``[T, outputs, taps_h, taps_w, channels]``, for terms ``(g, x)``."""
    s, (g0, x0) = gather, terms[0]
    g1, x1 = terms[1] if len(terms) == 2 else (None, None)
    tasks, n = x0.shape[:2]
    pixels, columns, width = n * s.rows_h * s.rows_w, s.taps_h * s.taps_w * s.channels, s.outputs * s.groups
    b = choose_blocks(s.outputs, columns, len(terms), pixels, tasks * s.groups, processors(x0.device))
    tiles = cdiv(s.outputs, b.rows) * cdiv(columns, b.columns)
    parts = empty(x0, b.slices, tasks, width, columns, dtype=torch.float32)
    launch(
        metafast_weight_gradient, (tiles, tasks * s.groups, b.slices), parts, g0, x0, g1, x1, n, b.slices,
        S=s, PRECISION=precision, BM=b.rows, BN=b.columns, BK=b.depth, warps=b.warps, registers=b.registers,
    )  # fmt: skip
    out = parts[0] if b.slices == 1 else _add_slices(empty(parts, *parts.shape[1:]), parts)[0]
    return out.view(tasks, width, s.taps_h, s.taps_w, s.channels)


def _add_slices(
    y: Tensor,
    added: Tensor,
    bias: Tensor | None = None,
    bias_stride: int = 0,
    statistics: tuple[Tensor, Tensor] | bool = False,
) -> tuple[Tensor, Tensor | None, int]:
    """Makes ``y[T, ..., columns]`` the sum of ``added[slice, ...]``; the rest is as in ``gather_product``."""
    tasks, width = y.shape[0], y.shape[-1]
    rows, bc = y[0].numel() // width, block(width, 16, 64)
    br = TILES.elements // bc
    tiles = cdiv(rows, br)
    parts = empty(added, tasks, tiles, 2, width) if statistics else None
    z, stat = statistics if isinstance(statistics, tuple) else (None, None)
    launch(
        metafast_add_slices, (tiles * cdiv(width, bc), tasks), y, bias, parts, z, stat, added, bias_stride, rows, width,
        added.shape[0], BR=br, BC=bc, warps=8,
    )  # fmt: skip
    return y, parts, br


def _together(tasks: int, elements: int) -> int:
    """How many tasks of so many elements run as one: as many as 32 bits reach and divide ``tasks``."""
    limit = min(tasks, max(1, REACH // elements))
    return next(count for count in range(limit, 0, -1) if tasks % count == 0)
