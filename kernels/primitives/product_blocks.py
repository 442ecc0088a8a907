"""How a product is cut into blocks: by its shape, and by how many blocks it takes to fill the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from .launch import TILES, block, cdiv

_FULL = 2  # blocks for each multiprocessor: fewer, and a smaller block is worth its second read of an operand
_RESIDENT = 4  # blocks that share a multiprocessor, of 128 threads with 128 registers
_REGISTERS = 128  # of a thread, so that 16 warps share a multiprocessor
_UNFILLED = 168  # where a block has fewer rows than a warpgroup multiplies: without a bound the assembler stops at 128
_SHORT = 4  # steps of the shortest slice of K
_LONG = 16  # steps of slices that beat smaller blocks
_ADDING = 8  # steps that have to be saved, since a launch of its own adds the slices, as many for each block in a row


@dataclass(frozen=True)
class Blocks:
    """A block makes ``rows x columns`` of the result in steps of ``depth`` along K, by so many ``warps``, of whose
    threads each has at most so many ``registers``. K is cut into ``slices`` that run side by side."""

    rows: int
    columns: int
    depth: int
    slices: int
    warps: int
    registers: int


def choose_blocks(rows: int, columns: int, runs: int, length: int, layers: int, processors: int) -> Blocks:
    """For ``layers`` products of ``rows x columns``, whose K is ``runs`` times ``length``, on so many multiprocessors.

    Blocks shrink down to what one warpgroup of Hopper multiplies at once until they fill the GPU, and where they do not
    K is cut. All follows from sizes, none of it from timings: two runs on a device give the same bits.
    """
    bm, bn = block(rows, 16, TILES.rows), block(columns, 16, TILES.columns)
    bk = block(length, 16, TILES.depth)
    steps = runs * cdiv(length, bk)
    blocks = cdiv(rows, bm) * cdiv(columns, bn) * layers
    while blocks * max(1, steps // _LONG) < _FULL * processors and (bm > 64 or bn > 32):
        bm, bn = (bm // 2, bn) if bm > 64 else (bm, bn // 2)
        blocks = cdiv(rows, bm) * cdiv(columns, bn) * layers
    slices = max(1, min(_RESIDENT * processors // blocks, steps // _SHORT))
    if steps - cdiv(steps, slices) < _ADDING * (1 + blocks // max(1, processors)):
        slices = 1
    return Blocks(bm, bn, bk, slices, _warps(bm, bn), _REGISTERS if bm >= 64 else _UNFILLED)


def _warps(rows: int, columns: int) -> int:
    """Four multiply 64 rows on Hopper. In smaller blocks each has 16 along the longer side: Triton lays the warps of
    dots that add to one another out in a line, and what exceeds the block would be computed twice."""
    return min(8, rows // 16) if rows >= 64 else min(4, max(rows, columns) // 16)
