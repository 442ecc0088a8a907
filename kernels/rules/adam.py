"""Steps along the mean gradient over the root of the mean square, with weight decay of both kinds, and the way back."""

from __future__ import annotations

import triton
import triton.language as tl

from .clipping import clipped, contribute, hyper, unclipped


@triton.jit
def _power(base, exponent):
    """``base ** exponent`` for a whole exponent of at least 0, by repeated squaring."""
    found, square = base * 0 + 1, base
    while exponent > 0:
        found = tl.where(exponent % 2 == 1, found * square, found)
        square *= square
        exponent = exponent // 2
    return found


@triton.jit
def _starts(beta1, beta2, count):
    """What makes up for moments that start from zero: ``1 - beta1^k`` and ``(1 - beta2^k)^(-1/2)``."""
    return 1 - _power(beta1, count), 1 / tl.sqrt(1 - _power(beta2, count))


@triton.jit
def _moments(mean, square, gradient, beta1, beta2):
    """The moments after the step."""
    mean = beta1.to(tl.float32) * mean + (1 - beta1).to(tl.float32) * gradient
    return mean, beta2.to(tl.float32) * square + (1 - beta2).to(tl.float32) * gradient * gradient


@triton.jit
def _decays(rows, stride, i, inside, OPTION: tl.constexpr, WIDE: tl.constexpr):
    """How much of theta goes into the gradient, and how much of it the decoupled decay leaves."""
    decay = hyper(rows, stride, 4, i, inside, WIDE)
    if OPTION:
        return (decay * 0).to(tl.float32), (1 - hyper(rows, stride, 0, i, inside, WIDE) * decay).to(tl.float32)
    else:
        return decay.to(tl.float32), (decay * 0 + 1).to(tl.float32)


@triton.jit(do_not_specialize=["tiles", "count"])
def metafast_adam(
    out, z, g, rows, moved, squares, pace, stride, tiles, count, P, STATES: tl.constexpr, OPTION: tl.constexpr,
    NORM: tl.constexpr, VALUE: tl.constexpr, WIDE: tl.constexpr, B: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """``out = step(z, g)`` of ``z [task, (1 + STATES) P]``, which begins anew after ``pace`` elements; ``g [task, P]``.
    Grid (block, task)."""
    task = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * B + tl.arange(0, B)
    inside = i < P
    moves = tl.load(moved + i, inside, 0) != 0
    beta1, beta2 = hyper(rows, stride, 1, i, inside, WIDE), hyper(rows, stride, 2, i, inside, WIDE)
    start1, start2 = _starts(beta1, beta2, count)
    decay, left = _decays(rows, stride, i, inside, OPTION, WIDE)
    gradient = tl.load(g + task * P + i, inside, 0.0)
    gradient = clipped(gradient, rows, squares, tiles, stride, task, i, inside, NORM, VALUE, WIDE, BT)
    z += task * pace + i
    out += task * (1 + STATES) * P + i
    theta, mean, square = tl.load(z, inside, 0.0), tl.load(z + P, inside, 0.0), tl.load(z + P + P, inside, 0.0)
    gradient += decay * theta
    mean1, square1 = _moments(mean, square, gradient, beta1, beta2)
    eps = hyper(rows, stride, 3, i, inside, WIDE).to(tl.float32)
    quotient = tl.div_rn(mean1, tl.sqrt_rn(square1) * start2.to(tl.float32) + eps)
    rate = (hyper(rows, stride, 0, i, inside, WIDE) / start1).to(tl.float32)
    tl.store(out, tl.where(moves, left * theta - rate * quotient, theta), inside)
    tl.store(out + P, tl.where(moves, mean1, mean), inside)
    tl.store(out + P + P, tl.where(moves, square1, square), inside)


@triton.jit(do_not_specialize=["tiles", "count"])
def metafast_adam_vjp(
    back, u, parts, dots, v, z, g, rows, moved, squares, pace, stride, tiles, count, P, STATES: tl.constexpr,
    OPTION: tl.constexpr, NORM: tl.constexpr, VALUE: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr,
    B: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The adjoints of what ``metafast_adam`` reads, from that of what it writes, ``v``: of ``z`` in ``back``, of the
    gradient in ``u``, of the hyper-parameters in ``parts`` unless that is None. Grid (block, task)."""
    task = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * B + tl.arange(0, B)
    inside = i < P
    moves = tl.load(moved + i, inside, 0) != 0
    beta1, beta2 = hyper(rows, stride, 1, i, inside, WIDE), hyper(rows, stride, 2, i, inside, WIDE)
    start1, start2 = _starts(beta1, beta2, count)
    decay, left = _decays(rows, stride, i, inside, OPTION, WIDE)
    raw = tl.load(g + task * P + i, inside, 0.0)
    gradient = clipped(raw, rows, squares, tiles, stride, task, i, inside, NORM, VALUE, WIDE, BT)
    z += task * pace + i
    v += task * (1 + STATES) * P + i
    back += task * (1 + STATES) * P + i
    theta, mean, square = tl.load(z, inside, 0.0), tl.load(z + P, inside, 0.0), tl.load(z + P + P, inside, 0.0)
    gradient += decay * theta
    mean1, square1 = _moments(mean, square, gradient, beta1, beta2)
    root, eps = tl.sqrt_rn(square1), hyper(rows, stride, 3, i, inside, WIDE).to(tl.float32)
    denominator = root * start2.to(tl.float32) + eps
    quotient = tl.div_rn(mean1, denominator)
    rate = hyper(rows, stride, 0, i, inside, WIDE)

    of_theta = tl.load(v, inside, 0.0)
    of_quotient = -(rate / start1).to(tl.float32) * of_theta
    of_mean = tl.load(v + P, inside, 0.0)
    of_square = tl.load(v + P + P, inside, 0.0)
    of_mean1 = of_mean + tl.div_rn(of_quotient, denominator)
    of_denominator = -tl.div_rn(of_quotient * quotient, denominator)
    half = tl.div_rn(of_denominator * start2.to(tl.float32), 2 * tl.where(root == 0, 1.0, root))
    of_square1 = of_square + tl.where(root == 0, 0.0, half)
    of_gradient = (1 - beta1).to(tl.float32) * of_mean1 + (2 - 2 * beta2).to(tl.float32) * gradient * of_square1
    tl.store(back, tl.where(moves, left * of_theta + decay * of_gradient, of_theta), inside)
    tl.store(back + P, tl.where(moves, beta1.to(tl.float32) * of_mean1, of_mean), inside)
    tl.store(back + P + P, tl.where(moves, beta2.to(tl.float32) * of_square1, of_square), inside)
    if parts is not None:
        along = -of_theta * quotient
        by_beta1 = (rate * count * _power(beta1, count - 1) / (start1 * start1)).to(tl.float32)
        by_beta2 = (0.5 * count * _power(beta2, count - 1) * start2 * start2 * start2).to(tl.float32)
        of_rate, of_decay = along * (1 / start1).to(tl.float32), of_gradient * theta
        if OPTION:
            of_rate -= of_theta * theta * hyper(rows, stride, 4, i, inside, WIDE).to(tl.float32)
            of_decay = -of_theta * theta * rate.to(tl.float32)
        of_beta1 = of_mean1 * (mean - gradient) + along * by_beta1
        of_beta2 = of_square1 * (square - gradient * gradient) + of_denominator * root * by_beta2
        contribute(parts, of_rate, moves, inside, task, i, P, 0, H, WIDE)
        contribute(parts, of_beta1, moves, inside, task, i, P, 1, H, WIDE)
        contribute(parts, of_beta2, moves, inside, task, i, P, 2, H, WIDE)
        contribute(parts, of_denominator, moves, inside, task, i, P, 3, H, WIDE)
        contribute(parts, of_decay, moves, inside, task, i, P, 4, H, WIDE)
    unclipped(u, of_gradient, raw, parts, dots, rows, squares, tiles, stride, moves, inside, task, i, P, NORM, VALUE, H,
              WIDE, BT)  # fmt: skip
