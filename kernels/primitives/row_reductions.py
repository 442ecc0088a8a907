"""Sums and moments over the rows of each task, in a fixed order: tiles first, then the tiles one after another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import block, cdiv, empty, launch

ROWS = 128  # that a tile has
TILES_AT_ONCE = 8  # that a program adds up; more of them would cost registers

# Programs that read partial results merge them themselves while all of them together read no more bytes for that: about
# what L2 delivers in the time of a launch, which this saves. The way through the tiles one after another is as long in
# a kernel of its own.
MAX_BYTES_READ = 8 << 20


@triton.jit
def metafast_row_sums(parts, x, rows, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, MOMENTS: tl.constexpr):
    """Sums each tile of rows, or finds its mean and sum of squared deviations. Grid (row tile x column tile, task)."""
    tile, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns: tl.constexpr = (C + BC - 1) // BC
    row = tile // columns * BR + tl.arange(0, BR)
    c = tile % columns * BC + tl.arange(0, BC)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    offset = task * rows * C + row[:, None] * C + c[None, :]
    v = tl.load(x + offset, inside, 0.0).to(tl.float32)
    total = tl.sum(v, 0)
    tiles = tl.num_programs(0) // columns
    if MOMENTS:
        mean = total / tl.minimum(BR, rows - tile // columns * BR)
        v = tl.where(inside, v - mean[None, :], 0.0)
        parts += (task * tiles + tile // columns) * 2 * C + c
        tl.store(parts, mean, c < C)
        tl.store(parts + C, tl.sum(v * v, 0), c < C)
    else:
        tl.store(parts + (task * tiles + tile // columns) * C + c, total, c < C)


@triton.jit
def sum_of_tiles(parts, tiles, inside, STRIDE: tl.constexpr, BT: tl.constexpr):
    """The sum over tiles at ``parts``, pointers into the first of them; from one tile to the next it is ``STRIDE``."""
    total = tl.zeros(inside.shape, dtype=tl.float32)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        pointers = parts[None, :] + t[:, None] * STRIDE
        total += tl.sum(tl.load(pointers, (t < tiles)[:, None] & inside[None, :], 0.0), 0)
    return total


@triton.jit
def moments_of_tiles(parts, tiles, tile_rows, rows, inside, C: tl.constexpr, BT: tl.constexpr):
    """Mean and sum of squared deviations of all ``rows`` from those of tiles of ``tile_rows``, by Chan's formula:
    ``sum_i (M2_i + n_i (mean_i - mean)^2)``. ``parts`` are pointers as in ``sum_of_tiles``."""
    mean = tl.zeros(inside.shape, dtype=tl.float32)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        present = (t < tiles)[:, None] & inside[None, :]
        share = tl.minimum(tile_rows, rows - t * tile_rows).to(tl.float32)[:, None] / rows
        mean += tl.sum(tl.load(parts[None, :] + t[:, None] * 2 * C, present, 0.0) * share, 0)
    squares = tl.zeros(inside.shape, dtype=tl.float32)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        present = (t < tiles)[:, None] & inside[None, :]
        count = tl.minimum(tile_rows, rows - t * tile_rows).to(tl.float32)[:, None]
        pointers = parts[None, :] + t[:, None] * 2 * C
        deviation = tl.load(pointers, present, 0.0) - mean[None, :]
        squared = tl.load(pointers + C, present, 0.0) + count * deviation * deviation
        squares += tl.sum(tl.where(present, squared, 0.0), 0)
    return mean, squares


@triton.jit(do_not_specialize=["tiles"])
def metafast_add_tiles(out, parts, tiles, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """``out[task, c] = sum_tile parts[task, tile, c]``. Grid (column tile, task)."""
    task = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    tl.store(out + task * C + c, sum_of_tiles(parts + task * tiles * C + c, tiles, c < C, C, BT), c < C)


@triton.jit(do_not_specialize=["tiles", "tile_rows"])
def metafast_merge_moments(out, parts, tiles, tile_rows, rows, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """``out[task]``: mean and sum of squared deviations of all tiles of ``parts``. Grid (column tile, task)."""
    task = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    first = parts + task * tiles * 2 * C + c
    mean, squares = moments_of_tiles(first, tiles, tile_rows, rows, c < C, C, BT)
    tl.store(out + task * 2 * C + c, mean, c < C)
    tl.store(out + task * 2 * C + C + c, squares, c < C)


def column_sums(x: Tensor) -> Tensor:
    """``[T, ..., C]`` summed over all axes between: ``[T, C]``."""
    tasks, columns = x.shape[0], x.shape[-1]
    rows = x[0].numel() // columns
    tiles, bc = cdiv(rows, ROWS), block(columns, 16, 32)
    parts = empty(x, tasks, tiles, columns, dtype=torch.float32)
    grid = (tiles * cdiv(columns, bc), tasks)
    launch(metafast_row_sums, grid, parts, x, rows, C=columns, BR=ROWS, BC=bc, MOMENTS=False)
    return add_tiles(parts)


def tile_moments(x: Tensor) -> Tensor:
    """Mean and sum of squared deviations of each tile of ``ROWS`` rows of ``[T, ..., C]``: ``[T, tiles, 2, C]``."""
    tasks, columns = x.shape[0], x.shape[-1]
    rows = x[0].numel() // columns
    tiles, bc = cdiv(rows, ROWS), block(columns, 16, 32)
    parts = empty(x, tasks, tiles, 2, columns, dtype=torch.float32)
    grid = (tiles * cdiv(columns, bc), tasks)
    launch(metafast_row_sums, grid, parts, x, rows, C=columns, BR=ROWS, BC=bc, MOMENTS=True)
    return parts


def add_tiles(parts: Tensor) -> Tensor:
    """``[T, tiles, ...]`` summed over tiles."""
    tasks, tiles = parts.shape[:2]
    if tiles == 1:
        return parts[:, 0]
    out = empty(parts, tasks, *parts.shape[2:])
    columns = out[0].numel()
    bc = block(columns, 16, 64)
    launch(metafast_add_tiles, (cdiv(columns, bc), tasks), out, parts, tiles, C=columns, BT=TILES_AT_ONCE, BC=bc)
    return out


def readable_sums(readers: int, parts: Tensor) -> Tensor:
    """``parts [T, tiles, ...]`` for ``readers`` programs of each task to add up, or their sum as a single tile."""
    return parts if _readable(readers, parts) else add_tiles(parts)[:, None]


def readable_moments(readers: int, parts: Tensor, tile_rows: int, rows: int) -> tuple[Tensor, int]:
    """Likewise the moments ``[T, tiles, 2, C]`` of tiles of ``tile_rows`` of ``rows`` rows, and the rows of a tile."""
    if _readable(readers, parts):
        return parts, tile_rows
    tasks, tiles, _, columns = parts.shape
    out, bc = empty(parts, tasks, 1, 2, columns), block(columns, 16, 64)
    launch(
        metafast_merge_moments, (cdiv(columns, bc), tasks), out, parts, tiles, tile_rows, rows,
        C=columns, BT=TILES_AT_ONCE, BC=bc,
    )  # fmt: skip
    return out, rows


def _readable(readers: int, parts: Tensor) -> bool:
    return parts.shape[1] == 1 or readers * 4 * parts.numel() <= MAX_BYTES_READ
