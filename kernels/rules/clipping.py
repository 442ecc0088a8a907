"""What the kernels of all steps share: hyper-parameters, the clipped gradient and its adjoint."""

from __future__ import annotations

import triton
import triton.language as tl

NORM_EPS = tl.constexpr(1e-6)  # what torch.nn.utils.clip_grad_norm_ adds to the norm


@triton.jit
def hyper(rows, stride, K: tl.constexpr, i, inside, WIDE: tl.constexpr):
    """Row ``K`` of the hyper-parameters in float64: a number, or with ``WIDE`` one for each of the elements ``i``."""
    row = rows + tl.full((), K, tl.int64) * stride
    if WIDE:
        return tl.load(row + i, inside, 0.5)  # outside a number at which no formula is singular
    else:
        return tl.load(row)


@triton.jit
def clamped(g, rows, stride, i, inside, VALUE: tl.constexpr, WIDE: tl.constexpr):
    """The gradient with each element clamped to the bound in row ``VALUE``; 0: as it is."""
    if VALUE:
        bound = hyper(rows, stride, VALUE, i, inside, WIDE).to(tl.float32)
        g = tl.where(g > bound, bound, tl.where(g < -bound, -bound, g))
    return g


@triton.jit
def total(parts, tiles, BT: tl.constexpr):
    """The sum of ``tiles`` numbers, in a fixed order."""
    sums = tl.zeros((BT,), tl.float32)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        sums += tl.load(parts + t, t < tiles, 0.0)
    return tl.sum(sums, 0)


@triton.jit
def scale(squares, tiles, rows, stride, i, inside, NORM: tl.constexpr, WIDE: tl.constexpr, BT: tl.constexpr):
    """For a task the norm ``n``, and ``c = min(M / (n + 1e-6), 1)`` with where it is below one or just so.

    ``squares`` are the parts of ``n^2``. A norm that is no number makes the gradient none.
    """
    norm = tl.sqrt_rn(total(squares, tiles, BT))
    factor = (hyper(rows, stride, NORM, i, inside, WIDE) / (norm + NORM_EPS)).to(tl.float32)
    return norm, tl.where(factor > 1, 1.0, factor), factor <= 1


@triton.jit
def clipped(
    g, rows, squares, tiles, stride, task, i, inside,
    NORM: tl.constexpr, VALUE: tl.constexpr, WIDE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The gradient that the step takes, from the one that the loss has."""
    h = clamped(g, rows, stride, i, inside, VALUE, WIDE)
    if NORM:
        _, c, _ = scale(squares + task * tiles, tiles, rows, stride, i, inside, NORM, WIDE, BT)
        h = c * h
    return h


@triton.jit
def contribute(parts, value, moves, inside, task, i, P, K: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr):
    """Writes what a block gives to the adjoint of row ``K``: a sum ``[task, block, K]``, or ``[task, K, i]``."""
    value = tl.where(moves, value, 0.0)
    if WIDE:
        tl.store(parts + (task * H + K) * P + i, value, inside)
    else:
        tl.store(parts + (task * tl.num_programs(0) + tl.program_id(0)) * H + K, tl.sum(value, 0))


@triton.jit
def unclamp(
    h, g, parts, rows, stride, moves, inside, task, i, P,
    VALUE: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The adjoint of the gradient from ``h``, that of the clamped one; writes what the bound gets."""
    if VALUE:
        bound = hyper(rows, stride, VALUE, i, inside, WIDE).to(tl.float32)
        above, below = g > bound, g < -bound
        if parts is not None:
            contribute(parts, tl.where(above, h, tl.where(below, -h, 0.0)), moves, inside, task, i, P, VALUE, H, WIDE)
        h = tl.where(above | below, 0.0, h)
    return tl.where(moves, h, 0.0)


@triton.jit
def unclipped(
    u, w, g, parts, dots, rows, squares, tiles, stride, moves, inside, task, i, P,
    NORM: tl.constexpr, VALUE: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Writes to ``u`` the adjoint of the gradient from ``w``, that of the clipped one, and what the bounds get.

    Where it was scaled to a norm, whose adjoint is a sum over all blocks, it writes ``w`` and the parts of that sum;
    ``metafast_unclip`` does the rest.
    """
    if NORM:
        norm, _, scales = scale(squares + task * tiles, tiles, rows, stride, i, inside, NORM, WIDE, BT)
        h = clamped(g, rows, stride, i, inside, VALUE, WIDE)
        of_bound = tl.where(moves, tl.where(scales, w * h / (norm + NORM_EPS), 0.0), 0.0)
        if parts is not None:
            contribute(parts, of_bound, moves, inside, task, i, P, NORM, H, WIDE)
        bound = hyper(rows, stride, NORM, i, inside, WIDE).to(tl.float32)
        tl.store(dots + task * tl.num_programs(0) + tl.program_id(0), tl.sum(of_bound * bound, 0))
        tl.store(u + task * P + i, tl.where(moves, w, 0.0), inside)
    else:
        h = unclamp(w, g, parts, rows, stride, moves, inside, task, i, P, VALUE, H, WIDE)
        tl.store(u + task * P + i, h, inside)


@triton.jit
def metafast_gradient_squares(parts, g, rows, stride, P, VALUE: tl.constexpr, WIDE: tl.constexpr, B: tl.constexpr):
    """The sum of squares of each block of the clamped gradient: ``[task, block]``. Grid (block, task)."""
    task = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * B + tl.arange(0, B)
    inside = i < P
    h = clamped(tl.load(g + task * P + i, inside, 0.0), rows, stride, i, inside, VALUE, WIDE)
    tl.store(parts + task * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(inside, h * h, 0.0), 0))


@triton.jit(do_not_specialize=["tiles", "ways"])
def metafast_unclip(
    u, g, rows, moved, squares, dots, parts, stride, tiles, ways, P,
    NORM: tl.constexpr, VALUE: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr, B: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Turns ``u``, the adjoint of the gradient that was scaled to a norm, into that of the gradient itself.

    Of each task ``squares`` has ``tiles`` parts of ``n^2``, and ``dots`` as many as ``ways`` of ``M Mbar``.
    Grid (block, task).
    """
    task = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * B + tl.arange(0, B)
    inside = i < P
    moves = tl.load(moved + i, inside, 0) != 0
    w = tl.load(u + task * P + i, inside, 0.0)
    gradient = tl.load(g + task * P + i, inside, 0.0)
    h = clamped(gradient, rows, stride, i, inside, VALUE, WIDE)
    norm, c, _ = scale(squares + task * tiles, tiles, rows, stride, i, inside, NORM, WIDE, BT)
    of_norm = -total(dots + task * ways, ways, BT) / (norm + NORM_EPS)
    of_norm = tl.where(norm == 0, 0.0, of_norm / tl.where(norm == 0, 1.0, norm))
    h_bar = c * w + of_norm * h
    found = unclamp(h_bar, gradient, parts, rows, stride, moves, inside, task, i, P, VALUE, H, WIDE)
    tl.store(u + task * P + i, found, inside)
