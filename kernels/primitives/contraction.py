"""The contractions of linear and convolution: one or two terms ``A_i . B_i`` summed in the same registers.

Memory order: activations ``[T,n,H,W,C]``, weights ``[T,O,kh,kw,C]``, so that what a block reads lies side by side. A
linear layer is a 1x1 convolution of 1x1 images. A second term makes the loop over K twice as long.

- ``metafast_gather_product``: rows are pixels of the result, K runs over taps and channels of the source. A
  convolution, and its data gradient when the source is the adjoint.
- ``metafast_weight_gradient``: K runs over the pixels of all samples.
- ``metafast_add_slices``: where K was cut into slices that ran side by side, adds them in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LARGEST = tl.constexpr(3.4028234663852886e38)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _split(x):
    """``hi + lo = x``, where ``hi`` has the 11 bits of a TF32 operand and ``lo`` is at most two thirds of its last bit.

    A product comes first, since it keeps ``hi`` NaN where ``x`` is: adding half of the last bit to the bits of the
    usual NaN, all of them ones, gives zero.
    """
    hi = (x * (1 + 2**-10 / 3)).to(tl.uint32, bitcast=True) & 0xFFFFE000
    hi = hi.to(tl.float32, bitcast=True)
    return hi, x - hi


@triton.jit
def _multiply(acc, a, b, PRECISION: tl.constexpr):
    """``acc + a . b``; in float32 by three products of TF32, the small ones first, in a sum of their own: tensor cores
    cut sums off that grow, and ``acc`` grows over all of K."""
    if PRECISION == "bf16":
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
        if _INTERPRETED:  # where a dot takes no bf16; the products are exact in float32 either way
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, acc)
    elif PRECISION == "tf32":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32")
    else:
        a_hi, a_lo = _split(a)
        b_hi, b_lo = _split(b)
        part = tl.dot(a_lo, b_hi, input_precision="tf32")
        part = tl.dot(a_hi, b_lo, part, input_precision="tf32")
        # Infinities and overflow are what ``a_hi b_hi`` says: beside them any number does, also for NaN.
        part = tl.minimum(tl.maximum(part, -_LARGEST), _LARGEST)
        return acc + tl.dot(a_hi, b_hi, part, input_precision="tf32")


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
def _share(slice, total, slices):
    """Where a slice of ``total`` steps begins: they differ by one step at most."""
    return slice * (total // slices) + tl.minimum(slice, total % slices)


@triton.jit
def _finish(acc, y, bias, parts, z, stat, offset, inside, column, present, width, count):
    """Adds the bias, stores a tile of the result and the sums of its ``count`` rows that are asked for."""
    if bias is not None:
        acc += tl.load(bias + column, present, 0.0)[None, :]
    tl.store(y + offset, acc, inside)
    if parts is not None:
        acc = tl.where(inside, acc, 0.0)
        if z is None:
            first = tl.sum(acc, 0) / count
            centred = tl.where(inside, acc - first[None, :], 0.0)
            second = tl.sum(centred * centred, 0)
        else:
            mean, r = tl.load(stat + column, present, 0.0), tl.load(stat + width + column, present, 0.0)
            zh = (tl.load(z + offset, inside, 0.0).to(tl.float32) - mean[None, :]) * r[None, :]
            first, second = tl.sum(acc, 0), tl.sum(acc * zh, 0)
        tl.store(parts + column, first, present)
        tl.store(parts + width + column, second, present)


@triton.jit
def metafast_gather_product(
    y, bias, parts, z, stat,
    a0, w0, a1, w1,
    bias_stride, w0_stride, w1_stride, n, slices,
    S: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (row tile x column tile, task x group, residue of the row by the stride x slice of K); ``y[slice, ...]``."""
    tile, task, group = tl.program_id(0), tl.program_id(1) // S.groups, tl.program_id(1) % S.groups
    column_tiles: tl.constexpr = (S.outputs + BN - 1) // BN
    row_tile, column_tile = tile // column_tiles, tile % column_tiles
    slice, layer = tl.program_id(2) % slices, tl.program_id(2) // slices
    res_h, res_w = layer // S.classes_w, layer % S.classes_w
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

    wide: tl.constexpr = S.channels >= 16
    chunks: tl.constexpr = (S.channels + BK - 1) // BK
    depth = taps_h * taps_w * S.channels
    steps = taps_h * taps_w * chunks if wide else (depth + BK - 1) // BK
    total = steps * (1 if a1 is None else 2)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(_share(slice, total, slices), _share(slice + 1, total, slices)):
        a, weight = _term(i >= steps, a0, a1), _term(i >= steps, w0, w1)
        if wide:  # a step stays within a tap: its pixels are found once a row
            tap, c = i % steps // chunks, i % steps % chunks * BK + tl.arange(0, BK)
            kh = first_h + tap // taps_w * S.classes_h
            kw = first_w + tap % taps_w * S.classes_w
            sh, in_h = _source(h, kh, S.scale_h, S.offset_h, S.step_h, S.divide_h, S.source_h)
            sw, in_w = _source(w, kw, S.scale_w, S.offset_w, S.step_w, S.divide_w, S.source_w)
            pixel = ((sample * S.source_h + sh) * S.source_w + sw) * (S.channels * S.groups)
            a_offset = pixel[:, None] + c[None, :]
            a_in = ((m < rows) & in_h & in_w)[:, None] & (c < S.channels)[None, :]
            w_tap = (kh * S.taps_w + kw) * S.tap_stride
            w_offset = w_tap + c[:, None] * S.channel_stride + o[None, :] * S.output_stride
            w_in = (c < S.channels)[:, None] & (o < S.outputs)[None, :]
        else:
            k = i % steps * BK + tl.arange(0, BK)
            tap, c = k // S.channels, k % S.channels
            kh = first_h + tap // taps_w * S.classes_h
            kw = first_w + tap % taps_w * S.classes_w
            sh, in_h = _source(h[:, None], kh[None, :], S.scale_h, S.offset_h, S.step_h, S.divide_h, S.source_h)
            sw, in_w = _source(w[:, None], kw[None, :], S.scale_w, S.offset_w, S.step_w, S.divide_w, S.source_w)
            a_offset = ((sample[:, None] * S.source_h + sh) * S.source_w + sw) * (S.channels * S.groups) + c[None, :]
            a_in = in_h & in_w & (m < rows)[:, None] & (k < depth)[None, :]
            w_depth = (kh * S.taps_w + kw) * S.tap_stride + c * S.channel_stride
            w_offset = w_depth[:, None] + o[None, :] * S.output_stride
            w_in = (k < depth)[:, None] & (o < S.outputs)[None, :]
        pixels = tl.load(a + a_offset, a_in, 0.0, cache_modifier=".ca")  # the next tap reads nearly the same ones
        acc = _multiply(acc, pixels, tl.load(weight + w_offset, w_in, 0.0), PRECISION)

    width: tl.constexpr = S.outputs * S.groups
    tasks = tl.num_programs(1) // S.groups
    base = (slice.to(tl.int64) * tasks + task) * n * (S.rows_h * S.rows_w * width)
    if bias is not None:
        bias += task.to(tl.int64) * bias_stride
    if parts is not None:
        parts += (task.to(tl.int64) * (tl.num_programs(0) // column_tiles) + row_tile) * 2 * width
    if z is not None:
        z += base
        stat += task.to(tl.int64) * 2 * width
    offset = ((sample * S.rows_h + h) * S.rows_w + w)[:, None] * width + (group * S.outputs + o)[None, :]
    present = o < S.outputs
    inside = (m < rows)[:, None] & present[None, :]  # offsets apart from the base: 64 bits for each element would spill
    count = tl.minimum(BM, rows - row_tile * BM)
    _finish(acc, y + base, bias, parts, z, stat, offset, inside, group * S.outputs + o, present, width, count)


@triton.jit
def metafast_weight_gradient(
    out, g0, x0, g1, x1, n, slices,
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
    g_task = task.to(tl.int64) * n * (S.rows_h * S.rows_w * width) + group * S.outputs
    x_task = task.to(tl.int64) * n * (S.source_h * S.source_w * S.channels * S.groups) + group * S.channels
    g0 += g_task
    x0 += x_task
    if g1 is not None:
        g1 += g_task
        x1 += x_task
    slice = tl.program_id(2)
    pixels = n * (S.rows_h * S.rows_w)
    steps = (pixels + BK - 1) // BK
    total = steps * (1 if g1 is None else 2)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(_share(slice, total, slices), _share(slice + 1, total, slices)):
        g, x = _term(i >= steps, g0, g1), _term(i >= steps, x0, x1)
        p = i % steps * BK + tl.arange(0, BK)
        sample, h, w = p // (S.rows_h * S.rows_w), p // S.rows_w % S.rows_h, p % S.rows_w
        sh, in_h = _source(h[:, None], kh[None, :], S.scale_h, S.offset_h, S.step_h, 1, S.source_h)
        sw, in_w = _source(w[:, None], kw[None, :], S.scale_w, S.offset_w, S.step_w, 1, S.source_w)
        x_offset = ((sample[:, None] * S.source_h + sh) * S.source_w + sw) * (S.channels * S.groups) + c[None, :]
        x_in = in_h & in_w & (p < pixels)[:, None] & (k < columns)[None, :]
        g_offset = p[:, None] * width + o[None, :]
        g_in = (p < pixels)[:, None] & (o < S.outputs)[None, :]
        adjoints = tl.trans(tl.load(g + g_offset, g_in, 0.0))
        acc = _multiply(acc, adjoints, tl.load(x + x_offset, x_in, 0.0), PRECISION)

    tasks = tl.num_programs(1) // S.groups
    row = (slice.to(tl.int64) * tasks + task) * width + group * S.outputs + o
    tl.store(out + row[:, None] * columns + k[None, :], acc, (o < S.outputs)[:, None] & (k < columns)[None, :])


@triton.jit
def metafast_add_slices(
    y, bias, parts, z, stat, added, bias_stride, rows, width, slices, BR: tl.constexpr, BC: tl.constexpr
):
    """``y[task, row, column]``: the sum over slices of ``added[slice, ...]``, in their order, with what follows a
    product. Grid (row tile x column tile, task)."""
    column_tiles = (width + BC - 1) // BC
    row_tile, task = tl.program_id(0) // column_tiles, tl.program_id(1).to(tl.int64)
    row = row_tile * BR + tl.arange(0, BR)
    column = tl.program_id(0) % column_tiles * BC + tl.arange(0, BC)
    present = column < width
    inside = (row < rows)[:, None] & present[None, :]
    offset = row[:, None] * width + column[None, :]
    base = task * rows * width
    total = tl.zeros((BR, BC), dtype=tl.float32)
    for _ in range(slices):
        total += tl.load(added + base + offset, inside, 0.0)
        added += tl.num_programs(1).to(tl.int64) * rows * width
    if bias is not None:
        bias += task * bias_stride
    if parts is not None:
        parts += (task * (tl.num_programs(0) // column_tiles) + row_tile) * 2 * width
    if z is not None:
        z += base
        stat += task * 2 * width
    count = tl.minimum(BR, rows - row_tile * BR)
    _finish(total, y + base, bias, parts, z, stat, offset, inside, column, present, width, count)
