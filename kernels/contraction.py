"""The contractions of linear and convolution: one or two terms ``A_i . B_i`` summed in the same registers.

Memory order: activations ``[T,n,H,W,C]``, weights ``[T,O,kh,kw,C]``, so that what a block reads lies side by side. A
linear layer is a 1x1 convolution of 1x1 images. A second term makes the loop over K twice as long.

- ``metafast_gather_product``: rows are pixels of the result, K runs over taps and channels of the source. A
  convolution, and its data gradient when the source is the adjoint.
- ``metafast_weight_gradient``: K runs over the pixels of all samples, cut into slices that are added in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _multiply(acc, a, b, PRECISION: tl.constexpr):
    if PRECISION == "bf16":
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
        if _INTERPRETED:  # where a dot takes no bf16; the products are exact in float32 either way
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, acc)
    elif PRECISION == "tf32":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")


@triton.jit
def _source(row, tap, MUL: tl.constexpr, OFF: tl.constexpr, STEP: tl.constexpr, DIV: tl.constexpr, END: tl.constexpr):
    """The coordinate that a row of the result reads at a tap, and whether it lies in the source."""
    place = row * MUL + OFF + tap * STEP
    inside = place >= 0
    if DIV > 1:
        inside = inside & (place % DIV == 0)
        place = place // DIV
    return place, inside & (place < END)


@triton.jit
def _term(second, p0, p1):
    """The pointer of the term at hand."""
    if p1 is None:
        return p0
    else:
        return tl.where(second, p1, p0)


@triton.jit
def metafast_gather_product(
    y, bias, parts, z, stat,
    a0, w0, a1, w1,
    bias_stride, w0_stride, w1_stride, n,
    S: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (row tile x column tile, task x group, residue of the row by the stride)."""
    tile, task, group = tl.program_id(0), tl.program_id(1) // S.groups, tl.program_id(1) % S.groups
    column_tiles: tl.constexpr = (S.outputs + BN - 1) // BN
    row_tile, column_tile = tile // column_tiles, tile % column_tiles
    res_h, res_w = tl.program_id(2) // S.classes_w, tl.program_id(2) % S.classes_w
    # Rows of one residue all use the same taps, every classes-th from the first.
    first_h = ((res_h + S.offset_h) * S.inverse_h) % S.classes_h
    first_w = ((res_w + S.offset_w) * S.inverse_w) % S.classes_w
    taps_h = (S.taps_h - first_h + S.classes_h - 1) // S.classes_h
    taps_w = (S.taps_w - first_w + S.classes_w - 1) // S.classes_w
    rows_h = (S.rows_h - res_h + S.classes_h - 1) // S.classes_h
    rows_w = (S.rows_w - res_w + S.classes_w - 1) // S.classes_w

    rows = n * rows_h * rows_w
    m = row_tile * BM + tl.arange(0, BM)
    sample = m // (rows_h * rows_w)
    h = (m // rows_w) % rows_h * S.classes_h + res_h
    w = m % rows_w * S.classes_w + res_w
    o = column_tile * BN + tl.arange(0, BN)

    source_size: tl.constexpr = S.source_h * S.source_w * S.channels * S.groups
    w_group = group * S.weights_per_group
    a0 += task.to(tl.int64) * n * source_size + group * S.channels
    w0 += task.to(tl.int64) * w0_stride + w_group
    if a1 is not None:
        a1 += task.to(tl.int64) * n * source_size + group * S.channels
        w1 += task.to(tl.int64) * w1_stride + w_group

    acc = tl.zeros((BM, BN), dtype=tl.float32)
    terms: tl.constexpr = 1 if a1 is None else 2
    if S.channels >= 16:
        slices: tl.constexpr = (S.channels + BK - 1) // BK
        steps = taps_h * taps_w * slices
        for i in range(steps * terms):
            a, weight = _term(i >= steps, a0, a1), _term(i >= steps, w0, w1)
            tap, c = i % steps // slices, i % slices * BK + tl.arange(0, BK)
            kh = first_h + tap // taps_w * S.classes_h
            kw = first_w + tap % taps_w * S.classes_w
            sh, in_h = _source(h, kh, S.scale_h, S.offset_h, S.step_h, S.divide_h, S.source_h)
            sw, in_w = _source(w, kw, S.scale_w, S.offset_w, S.step_w, S.divide_w, S.source_w)
            pixel = ((sample * S.source_h + sh) * S.source_w + sw) * (S.channels * S.groups)
            a_at = pixel[:, None] + c[None, :]
            a_in = ((m < rows) & in_h & in_w)[:, None] & (c < S.channels)[None, :]
            w_at = (kh * S.taps_w + kw) * S.tap_stride + c[:, None] * S.channel_stride + o[None, :] * S.output_stride
            w_in = (c < S.channels)[:, None] & (o < S.outputs)[None, :]
            pixels = tl.load(a + a_at, a_in, 0.0, cache_modifier=".ca")  # the next tap reads nearly the same ones
            acc = _multiply(acc, pixels, tl.load(weight + w_at, w_in, 0.0), PRECISION)
    else:
        depth = taps_h * taps_w * S.channels
        steps = (depth + BK - 1) // BK
        for i in range(steps * terms):
            a, weight = _term(i >= steps, a0, a1), _term(i >= steps, w0, w1)
            k = i % steps * BK + tl.arange(0, BK)
            tap, c = k // S.channels, k % S.channels
            kh = first_h + tap // taps_w * S.classes_h
            kw = first_w + tap % taps_w * S.classes_w
            sh, in_h = _source(h[:, None], kh[None, :], S.scale_h, S.offset_h, S.step_h, S.divide_h, S.source_h)
            sw, in_w = _source(w[:, None], kw[None, :], S.scale_w, S.offset_w, S.step_w, S.divide_w, S.source_w)
            a_at = ((sample[:, None] * S.source_h + sh) * S.source_w + sw) * (S.channels * S.groups) + c[None, :]
            a_in = in_h & in_w & (m < rows)[:, None] & (k < depth)[None, :]
            w_at = ((kh * S.taps_w + kw) * S.tap_stride + c * S.channel_stride)[:, None] + o[None, :] * S.output_stride
            w_in = (k < depth)[:, None] & (o < S.outputs)[None, :]
            acc = _multiply(acc, tl.load(a + a_at, a_in, 0.0), tl.load(weight + w_at, w_in, 0.0), PRECISION)

    column = group * S.outputs + o
    if bias is not None:
        acc += tl.load(bias + task.to(tl.int64) * bias_stride + column, o < S.outputs, 0.0)[None, :]
    width: tl.constexpr = S.outputs * S.groups
    pixel = (sample * S.rows_h + h) * S.rows_w + w
    base = task.to(tl.int64) * n * (S.rows_h * S.rows_w * width)
    y_at = pixel[:, None] * width + column[None, :]  # apart from the base: 64 bits for each element would spill
    y_in = (m < rows)[:, None] & (o < S.outputs)[None, :]
    tl.store(y + base + y_at, acc, y_in)
    if parts is not None:
        if z is None:
            count = tl.minimum(BM, rows - row_tile * BM)
            first = tl.sum(tl.where(y_in, acc, 0.0), 0) / count
            centred = tl.where(y_in, acc - first[None, :], 0.0)
            second = tl.sum(centred * centred, 0)
        else:
            stat += task.to(tl.int64) * 2 * width + column
            mean, r = tl.load(stat, o < S.outputs, 0.0), tl.load(stat + width, o < S.outputs, 0.0)
            zh = (tl.load(z + base + y_at, y_in, 0.0).to(tl.float32) - mean[None, :]) * r[None, :]
            acc = tl.where(y_in, acc, 0.0)
            first, second = tl.sum(acc, 0), tl.sum(acc * zh, 0)
        tiles = tl.num_programs(0) // column_tiles
        parts += (task.to(tl.int64) * tiles + row_tile) * 2 * width + column
        tl.store(parts, first, o < S.outputs)
        tl.store(parts + width, second, o < S.outputs)


@triton.jit
def metafast_weight_gradient(
    out, g0, x0, g1, x1, n, slice_length,
    S: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``out[slice, task, o, tap, c]``. Grid (tile, task x group, slice of the pixels); ``S`` is the forward gather."""
    tile, task, group = tl.program_id(0), tl.program_id(1) // S.groups, tl.program_id(1) % S.groups
    columns: tl.constexpr = S.taps_h * S.taps_w * S.channels
    column_tiles: tl.constexpr = (columns + BN - 1) // BN
    o = tile // column_tiles * BM + tl.arange(0, BM)
    k = tile % column_tiles * BN + tl.arange(0, BN)
    tap, c = k // S.channels, k % S.channels
    kh, kw = tap // S.taps_w, tap % S.taps_w
    width: tl.constexpr = S.outputs * S.groups
    depth: tl.constexpr = S.channels * S.groups
    pixels = n * (S.rows_h * S.rows_w)
    x_size: tl.constexpr = S.source_h * S.source_w * depth
    g_task = task.to(tl.int64) * pixels * width + group * S.outputs
    x_task = task.to(tl.int64) * n * x_size + group * S.channels
    g0 += g_task
    x0 += x_task
    if g1 is not None:
        g1 += g_task
        x1 += x_task

    acc = tl.zeros((BM, BN), dtype=tl.float32)
    begin = tl.program_id(2) * slice_length
    end = tl.minimum(begin + slice_length, pixels)
    terms: tl.constexpr = 1 if g1 is None else 2
    steps = (end - begin + BK - 1) // BK
    for i in range(steps * terms):
        g, x = _term(i >= steps, g0, g1), _term(i >= steps, x0, x1)
        p = begin + i % steps * BK + tl.arange(0, BK)
        sample, h, w = p // (S.rows_h * S.rows_w), p // S.rows_w % S.rows_h, p % S.rows_w
        sh, in_h = _source(h[:, None], kh[None, :], S.scale_h, S.offset_h, S.step_h, 1, S.source_h)
        sw, in_w = _source(w[:, None], kw[None, :], S.scale_w, S.offset_w, S.step_w, 1, S.source_w)
        x_at = ((sample[:, None] * S.source_h + sh) * S.source_w + sw) * depth + c[None, :]
        x_in = in_h & in_w & (p < end)[:, None] & (k < columns)[None, :]
        g_at = p[:, None] * width + o[None, :]
        g_in = (p < end)[:, None] & (o < S.outputs)[None, :]
        acc = _multiply(acc, tl.trans(tl.load(g + g_at, g_in, 0.0)), tl.load(x + x_at, x_in, 0.0), PRECISION)

    tasks = tl.num_programs(1) // S.groups
    row = (tl.program_id(2).to(tl.int64) * tasks + task) * width + group * S.outputs + o
    tl.store(out + row[:, None] * columns + k[None, :], acc, (o < S.outputs)[:, None] & (k < columns)[None, :])


@triton.jit
def metafast_add_slices(out, parts, size, slices, B: tl.constexpr):
    """``out[i] = sum_s parts[s, i]``, in the order of the slices. Grid (tile,)."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    total = tl.zeros((B,), dtype=tl.float32)
    for s in range(slices):
        total += tl.load(parts + s * size + i, i < size, 0.0)
    tl.store(out + i, total, i < size)
