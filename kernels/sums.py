"""Sums and moments over the rows of each task, in a fixed order: tiles first, then the tiles one after another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import block, cdiv, empty, launch

ROWS = 128  # of a tile


@triton.jit
def metafast_row_sums(parts, x, rows, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, MOMENTS: tl.constexpr):
    """Of each tile of rows: the sums, or mean and sum of squared deviations. Grid (row tile x column tile, task)."""
    tile, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns: tl.constexpr = (C + BC - 1) // BC
    row = tile // columns * BR + tl.arange(0, BR)
    c = tile % columns * BC + tl.arange(0, BC)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    at = task * rows * C + row[:, None] * C + c[None, :]
    v = tl.load(x + at, inside, 0.0).to(tl.float32)
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
def metafast_add_tiles(out, parts, tiles, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """``out[task, c] = sum_tile parts[task, tile, c]``. Grid (column tile, task)."""
    task = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros((BC,), dtype=tl.float32)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        at = (task * tiles + t)[:, None] * C + c[None, :]
        total += tl.sum(tl.load(parts + at, (t < tiles)[:, None] & (c < C)[None, :], 0.0), 0)
    tl.store(out + task * C + c, total, c < C)


@triton.jit
def metafast_merge_moments(
    stat, parts, tiles, rows, eps, C: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    """``stat[task] = (mean, (var + eps)^-1/2)`` from moments of tiles of ``ROWS`` rows. Grid (column tile, task)."""
    task = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    parts += task * tiles * 2 * C + c
    mean = tl.zeros((BC,), dtype=tl.float32)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        inside = (t < tiles)[:, None] & (c < C)[None, :]
        count = tl.minimum(ROWS, rows - t * ROWS).to(tl.float32)[:, None]
        mean += tl.sum(tl.load(parts[None, :] + t[:, None] * 2 * C, inside, 0.0) * count, 0)
    mean /= rows
    squares = tl.zeros((BC,), dtype=tl.float32)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        inside = (t < tiles)[:, None] & (c < C)[None, :]
        count = tl.minimum(ROWS, rows - t * ROWS).to(tl.float32)[:, None]
        at = parts[None, :] + t[:, None] * 2 * C
        apart = tl.load(at, inside, 0.0) - mean[None, :]
        squares += tl.sum(tl.where(inside, tl.load(at + C, inside, 0.0) + count * apart * apart, 0.0), 0)
    stat += task * 2 * C + c
    tl.store(stat, mean, c < C)
    tl.store(stat + C, 1.0 / tl.sqrt(squares / rows + eps), c < C)


def column_sums(x: Tensor) -> Tensor:
    """``[T, ..., C]`` summed over all axes between: ``[T, C]``."""
    tasks, columns = x.shape[0], x.shape[-1]
    rows = x[0].numel() // columns
    tiles, bc = cdiv(rows, ROWS), block(columns, 16, 32)
    parts = empty(x, tasks, tiles, columns, dtype=torch.float32)
    grid = (tiles * cdiv(columns, bc), tasks)
    launch(metafast_row_sums, grid, parts, x, rows, C=columns, BR=ROWS, BC=bc, MOMENTS=False)
    return add_tiles(parts)


def moments(x: Tensor) -> Tensor:
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
    launch(metafast_add_tiles, (cdiv(columns, bc), tasks), out, parts, tiles, C=columns, BT=32, BC=bc)
    return out


def merge_moments(parts: Tensor, tile_rows: int, rows: int, eps: float) -> Tensor:
    """``[T, 2, C]``, mean and ``(var + eps)^-1/2``, from moments of tiles of ``tile_rows`` of ``rows`` rows."""
    tasks, tiles, _, columns = parts.shape
    stat, bc = empty(parts, tasks, 2, columns), block(columns, 16, 64)
    launch(
        metafast_merge_moments, (cdiv(columns, bc), tasks), stat, parts, tiles, rows, eps,
        C=columns, ROWS=tile_rows, BT=32, BC=bc,
    )  # fmt: skip
    return stat
