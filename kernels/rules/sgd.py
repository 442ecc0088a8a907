"""Steps along the gradient with momentum, weight decay and Nesterov's look ahead, and the way back."""

from __future__ import annotations

import triton
import triton.language as tl

from .clipping import clipped, contribute, hyper, unclipped


@triton.jit
def _numbers(rows, stride, count, i, inside, WIDE: tl.constexpr):
    """The learning rate, the momentum, the share of the gradient in the velocity, and the weight decay."""
    share = tl.where(count == 1, 1.0, 1 - hyper(rows, stride, 2, i, inside, WIDE)).to(tl.float32)
    rate = hyper(rows, stride, 0, i, inside, WIDE).to(tl.float32)
    momentum = hyper(rows, stride, 1, i, inside, WIDE).to(tl.float32)
    return rate, momentum, share, hyper(rows, stride, 3, i, inside, WIDE).to(tl.float32)


@triton.jit(do_not_specialize=["tiles", "count"])
def metafast_sgd(
    out, z, g, rows, moved, squares, pace, stride, tiles, count, P, STATES: tl.constexpr, OPTION: tl.constexpr,
    NORM: tl.constexpr, VALUE: tl.constexpr, WIDE: tl.constexpr, B: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """``out = step(z, g)`` of ``z [task, (1 + STATES) P]``, which begins anew after ``pace`` elements; ``g [task, P]``.
    Grid (block, task)."""
    task = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * B + tl.arange(0, B)
    inside = i < P
    moves = tl.load(moved + i, inside, 0) != 0
    rate, momentum, share, decay = _numbers(rows, stride, count, i, inside, WIDE)
    gradient = tl.load(g + task * P + i, inside, 0.0)
    gradient = clipped(gradient, rows, squares, tiles, stride, task, i, inside, NORM, VALUE, WIDE, BT)
    z += task * pace + i
    out += task * (1 + STATES) * P + i
    theta = tl.load(z, inside, 0.0)
    gradient += decay * theta
    direction = gradient
    if STATES:
        velocity = tl.load(z + P, inside, 0.0)
        after = momentum * velocity + share * gradient
        tl.store(out + P, tl.where(moves, after, velocity), inside)
        direction = gradient + momentum * after if OPTION else after
    tl.store(out, tl.where(moves, theta - rate * direction, theta), inside)


@triton.jit(do_not_specialize=["tiles", "count"])
def metafast_sgd_vjp(
    back, u, parts, dots, v, z, g, rows, moved, squares, pace, stride, tiles, count, P, STATES: tl.constexpr,
    OPTION: tl.constexpr, NORM: tl.constexpr, VALUE: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr,
    B: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The adjoints of what ``metafast_sgd`` reads, from that of what it writes, ``v``: of ``z`` in ``back``, of the
    gradient in ``u``, of the hyper-parameters in ``parts`` unless that is None. Grid (block, task)."""
    task = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * B + tl.arange(0, B)
    inside = i < P
    moves = tl.load(moved + i, inside, 0) != 0
    rate, momentum, share, decay = _numbers(rows, stride, count, i, inside, WIDE)
    raw = tl.load(g + task * P + i, inside, 0.0)
    gradient = clipped(raw, rows, squares, tiles, stride, task, i, inside, NORM, VALUE, WIDE, BT)
    z += task * pace + i
    v += task * (1 + STATES) * P + i
    back += task * (1 + STATES) * P + i
    theta, of_theta = tl.load(z, inside, 0.0), tl.load(v, inside, 0.0)
    gradient += decay * theta
    direction, of_direction = gradient, -rate * of_theta
    of_gradient = of_direction
    if STATES:
        velocity, of_velocity = tl.load(z + P, inside, 0.0), tl.load(v + P, inside, 0.0)
        after = momentum * velocity + share * gradient
        if OPTION:
            direction = gradient + momentum * after
            of_after = of_velocity + momentum * of_direction
            of_gradient = of_direction + share * of_after
            of_momentum = of_after * velocity + of_direction * after
        else:
            direction = after
            of_after = of_velocity + of_direction
            of_gradient = share * of_after
            of_momentum = of_after * velocity
        tl.store(back + P, tl.where(moves, momentum * of_after, of_velocity), inside)
        of_dampening = tl.where(count == 1, 0.0, -of_after * gradient)
    else:
        of_momentum = tl.zeros((B,), tl.float32)
        of_dampening = of_momentum
    tl.store(back, tl.where(moves, of_theta + decay * of_gradient, of_theta), inside)
    if parts is not None:
        contribute(parts, -of_theta * direction, moves, inside, task, i, P, 0, H, WIDE)
        contribute(parts, of_momentum, moves, inside, task, i, P, 1, H, WIDE)
        contribute(parts, of_dampening, moves, inside, task, i, P, 2, H, WIDE)
        contribute(parts, of_gradient * theta, moves, inside, task, i, P, 3, H, WIDE)
    unclipped(u, of_gradient, raw, parts, dots, rows, squares, tiles, stride, moves, inside, task, i, P, NORM, VALUE, H,
              WIDE, BT)  # fmt: skip
