"""How a product is cut into blocks: by its shape, and by how many blocks it takes to fill the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from .launch import TILES, block, cdiv

_FULL = 2  # blocks for each multiprocessor: below that a smaller block is worth its second read of an operand
_RESIDENT = 4  # blocks that share a multiprocessor, of 128 threads with 128 registers
_REGISTERS = 128  # that a thread may have, so that 16 warps share a multiprocessor
# A thread of a block with fewer rows than a warpgroup multiplies may have more; unbounded, the assembler stops at 128.
_UNFILLED_REGISTERS = 168
_SHORT = 4  # steps of the shortest slice of K
_LONG = 16  # steps of slices that beat smaller blocks
# Steps that slices have to save for each block in a row, since a launch of its own adds them up.
_ADDING = 8


@dataclass(frozen=True)
class Blocks:
    """How a product is cut up.

    A block makes ``rows x columns`` of the result in steps of ``depth`` along K. It has ``warps``, whose threads have
    at most ``registers`` each. K is cut into ``slices`` that run side by side.
    """

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
    return Blocks(bm, bn, bk, slices, _warps(bm, bn), _REGISTERS if bm >= 64 else _UNFILLED_REGISTERS)


def _warps(rows: int, columns: int) -> int:
    """The warps of a block.

    On Hopper four multiply 64 rows. In smaller blocks each has 16 along the longer side: Triton lays the warps of dots
    that add to one another out in a line, and what exceeds the block would be computed twice.
    """
    return min(8, rows // 16) if rows >= 64 else min(4, max(rows, columns) // 16)
