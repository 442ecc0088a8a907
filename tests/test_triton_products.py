"""Products in Triton: float32 out of TF32 as tensor cores round it, infinities, K in slices, and the choice of blocks.

The interpreter multiplies in float32 whatever precision is asked for. Here it cuts the operands of TF32 products off
as tensor cores do, so that a product left out shows.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from test_layers import assert_close, point, truth
from test_triton import (  # the fixtures act by being here
    BN,
    DEVICE,
    _memory_full_of_nan,  # noqa: F401
    _quick,  # noqa: F401
    _use,
)
from test_triton_shared import Shared

from metafast.kernels.batch_norm.kernel import TritonBatchNorm
from metafast.kernels.conv2d import Conv2d
from metafast.kernels.conv2d.kernel import TritonConv2d
from metafast.kernels.conv2d.normalised import NormalisedConv
from metafast.kernels.linear import Linear
from metafast.kernels.linear.kernel import TritonLinear
from metafast.kernels.primitives import contraction, launch, products
from metafast.kernels.primitives.product_blocks import choose_blocks
from metafast.kernels.primitives.products import Convolution, gather_product, weight_gradient

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
ON_CPU = pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter's products can be changed")
FINE = launch.Tiles(64, 32, 16, 1024)
H100 = 132


@pytest.fixture
def _tensor_cores(monkeypatch):
    """Products of TF32 drop the last 13 bits of their operands."""
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    exact = builder.create_dot

    def rounded(x):
        return interpreter.TensorHandle((x.data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32), tl.float32)

    def create_dot(a, b, d, precision, *rest):
        if precision == ir.INPUT_PRECISION.TF32:
            a, b = rounded(a), rounded(b)
        return exact(a, b, d, precision, *rest)

    monkeypatch.setattr(builder, "create_dot", create_dot)


def matrices(rows=20, depth=300, columns=9):
    return torch.randn(1, rows, depth), torch.randn(1, columns, depth)


def product(x, w, precision="float32"):
    """``x w'`` of matrices ``[1, rows, depth]`` and ``[1, columns, depth]``."""
    (x, w), sizes = (v[:, :, None, None].contiguous().to(DEVICE) for v in (x, w)), (x.shape[2], w.shape[1])
    return gather_product([(x, w)], Convolution(1, 1, *sizes).forward(), precision)[0][:, :, 0, 0].cpu()


def off(x, w, precision="float32"):
    """The relative errors of a product and of the gradient of its weights."""
    exact, g = x.double() @ w.double().mT, torch.randn(1, x.shape[1], w.shape[1])
    found = [(product(x, w, precision), exact)]
    images = [v[:, :, None, None].contiguous().to(DEVICE) for v in (g, x)]
    sizes = Convolution(1, 1, x.shape[2], w.shape[1]).forward()
    of_weight = weight_gradient([tuple(images)], sizes, precision)[:, :, 0, 0].cpu()
    found.append((of_weight, g.double().mT @ x.double()))
    return [float((a.double() - b).norm() / b.norm()) for a, b in found]


@triton.jit
def _without_a_hi_b_lo(acc, a, b, PRECISION: tl.constexpr):
    a_hi, a_lo = contraction._split(a)
    b_hi, _ = contraction._split(b)
    return acc + tl.dot(a_hi, b_hi, tl.dot(a_lo, b_hi, input_precision="tf32"), input_precision="tf32")


@triton.jit
def _without_a_lo_b_hi(acc, a, b, PRECISION: tl.constexpr):
    a_hi, _ = contraction._split(a)
    b_hi, b_lo = contraction._split(b)
    return acc + tl.dot(a_hi, b_hi, tl.dot(a_hi, b_lo, input_precision="tf32"), input_precision="tf32")


@pytest.mark.usefixtures("_tensor_cores")
@ON_CPU
def test_float32_is_exact_where_operands_are_cut_off(monkeypatch):
    x, w = matrices()
    assert max(off(x, w)) < 1e-6
    assert min(off(x, w, "tf32")) > 2e-4
    assert min(off(x, w, "bf16")) > 2e-3
    for defect in (_without_a_hi_b_lo, _without_a_lo_b_hi):
        monkeypatch.setattr(contraction, "_multiply", defect)
        assert min(off(x, w)) > 2e-4


@pytest.mark.usefixtures("_tensor_cores")
@ON_CPU
def test_the_rules_of_a_convolution_see_products_that_are_cut_off():
    case, loose = CASES[0], replace(CASES[0], layer=TritonConv2d(CASES[0].layer.options, "tf32"))
    at = point(case, tasks=2)
    assert_close(run_last(case, at), truth(case.function, at), 1e-6)
    with pytest.raises(AssertionError, match="is off by"):
        assert_close(run_last(loose, at), truth(case.function, at), 2e-6)  # what a GPU's products are held to


INF, NAN = float("inf"), float("nan")
ONES = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # NaN as a GPU makes it
SPECIAL = [INF, -INF, NAN, float(ONES[0]), 0.0, 1.0, -1.0003, 1e-3, 1e-30, 3.3e38, -3.3e38, 1e30, -1.0001e30, 0.1]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.skipif(
    DEVICE == "cpu" and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason="the interpreter's maximum of NaN and a number is NaN, a GPU's the number",
)
def test_infinities_overflow_and_nan_are_those_of_float32(request):
    if DEVICE == "cpu":
        request.getfixturevalue("_tensor_cores")
    values = torch.tensor(SPECIAL)
    values[3:4].view(torch.int32)[0] = 0x7FFFFFFF
    x, w = (torch.full((1, len(values), 16), 0.5) for _ in range(2))
    for k in (0, 7):  # apart from each other, and among ordinary values
        x[0, :, k] = values
    w[0, :, 0], w[0, :, 7] = values, values.flip(0)
    found, expected = product(x, w), x @ w.mT
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isposinf(), expected.isposinf())
    assert torch.equal(found.isneginf(), expected.isneginf())
    finite = expected.isfinite()
    assert 30 < finite.sum() < expected.numel() - 60
    torch.testing.assert_close(found[finite], expected[finite], rtol=1e-6, atol=0)


def _conv(p, i, **options):
    return F.conv2d(i[0], p[0].movedim(-1, 1), p[1] if len(p) == 2 else None, **options)


CASES = [
    Shared("3x3, padded", TritonConv2d(Conv2d((1, 1), (1, 1))), lambda p, i: _conv(p, i, padding=1),
           ((5, 3, 3, 19), (5,)), ((2, 19, 3, 4),), (), (), ()),
    Shared("few channels", TritonConv2d(Conv2d((1, 1), (3, 3))), lambda p, i: _conv(p, i, padding=3),
           ((3, 7, 7, 5), (3,)), ((1, 5, 3, 2),), (), (), ()),
    Shared("two groups", TritonConv2d(Conv2d((1, 1), (1, 1), groups=2)),
           lambda p, i: _conv(p, i, padding=1, groups=2), ((4, 3, 3, 20), (4,)), ((1, 40, 2, 3),), (), (), ()),
    Shared("stride 2", TritonConv2d(Conv2d((2, 2), (2, 2))), lambda p, i: _conv(p, i, stride=2, padding=2),
           ((33, 5, 5, 2), (33,)), ((1, 2, 3, 3),), (), (), ()),
    Shared("one row", TritonLinear(Linear()), lambda p, i: F.linear(i[0], p[0], p[1]), ((7, 213), (7,)), ((1, 213),),
           (), (), ()),
    Shared("conv, norm, relu", NormalisedConv(TritonConv2d(Conv2d((1, 1), (1, 1), bias=False)),
                                              TritonBatchNorm(BN, relu=True)),
           lambda p, i: F.relu(F.batch_norm(F.conv2d(i[0], p[0].movedim(-1, 1), None, 1, 1), None, None, p[1], p[2],
                                            True, eps=1e-3)),
           ((6, 3, 3, 17), (6,), (6,)), ((3, 17, 3, 4),), (), (), ()),
]  # fmt: skip
TWICE = ("3x3, padded", "conv, norm, relu")


def run_last(case, at):
    """The rules of a layer whose weights are ``[O,kh,kw,C]``."""
    from test_layers import rules

    there = {k: [v.to(DEVICE, torch.float32) for v in x] if isinstance(x, list) else x.to(DEVICE, torch.float32)
             for k, x in vars(at).items()}  # fmt: skip
    return [[v.cpu() for v in part] for part in rules(case.layer, replace(at, **there))]


@pytest.fixture
def sliced(monkeypatch):
    """Steps so small that K has many steps, on a GPU of which they fill little: by kernel, its grids' last axis."""
    _use(FINE, monkeypatch)
    monkeypatch.setattr(products, "processors", lambda device: H100)
    seen = {}

    def noted(kernel, grid, *args, **options):
        seen.setdefault(getattr(kernel, "__name__", kernel.fn.__name__), []).append(grid[2] if len(grid) > 2 else None)
        launch.launch(kernel, grid, *args, **options)

    monkeypatch.setattr(products, "launch", noted)
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_k_in_slices(case, sliced):
    at = point(case, tasks=2 if case.name in TWICE else 1)
    found = run_last(case, at)
    assert_close(found, truth(case.function, at), 1e-5)
    assert len(sliced["metafast_add_slices"]) >= 2
    if case.name in TWICE:
        again = run_last(case, at)
        assert all(torch.equal(a, b) for parts in zip(found, again, strict=True) for a, b in zip(*parts, strict=True))


def test_the_pixels_of_a_weight_gradient_in_slices(sliced):
    case = replace(CASES[0], layer=TritonConv2d(Conv2d()), function=_conv)
    at = point(replace(case, params=((3, 1, 1, 5), (3,)), inputs=((16, 5, 3, 4),)), tasks=2)
    assert_close(run_last(case, at), truth(case.function, at), 1e-5)
    assert min(sliced["metafast_weight_gradient"]) > 1


def test_statistics_of_slices_are_those_of_the_whole(sliced, monkeypatch):
    x, w = torch.randn(2, 5, 4, 5, 17), torch.randn(2, 18, 3, 3, 17)
    z, stat = torch.randn(2, 5, 4, 5, 18), torch.rand(2, 2, 18)
    x, w, z, stat = (v.to(DEVICE) for v in (x, w, z, stat))
    gather = Convolution(4, 5, 17, 18, (3, 3), padding=(1, 1)).forward()

    def merged():
        """Mean and variance out of the parts, and the sums against ``z``."""
        y, parts, rows = gather_product([(x, w)], gather, "float32", statistics=True)
        counts = torch.full((parts.shape[1],), rows)
        counts[-1] = 100 - rows * (parts.shape[1] - 1)
        counts = counts.to(DEVICE)[None, :, None]
        mean = (parts[:, :, 0] * counts).sum(1) / 100
        spread = (parts[:, :, 1] + counts * (parts[:, :, 0] - mean[:, None]) ** 2).sum(1) / 100
        sums = gather_product([(x, w)], gather, "float32", statistics=(z, stat))[1].sum(1)
        return y.flatten(1, 3), mean, spread, sums

    y, mean, spread, sums = merged()
    assert sliced["metafast_gather_product"] == [4, 4]
    monkeypatch.setattr(products, "processors", lambda device: 0)
    for ours, theirs in zip((y, mean, spread, sums), merged(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(mean, y.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spread, y.var(1, unbiased=False), rtol=1e-5, atol=1e-5)
    zh = (z.flatten(1, 3) - stat[:, None, 0]) * stat[:, None, 1]
    torch.testing.assert_close(sums, torch.stack([y.sum(1), (y * zh).sum(1)], 1), rtol=1e-4, atol=1e-3)


SHAPES = {  # rows, columns, runs, length, layers: what omni5w1s-5 and mini5w1s-5 multiply
    "filled by large blocks": ((14700, 64, 9, 64, 8), (128, 64, 1)),
    "filled by small blocks": ((980, 64, 9, 64, 8), (64, 32, 1)),
    "filled by small blocks, K of two terms": ((980, 64, 18, 64, 8), (64, 32, 2)),
    "a few small blocks, K in slices": ((245, 64, 9, 64, 8), (64, 32, 4)),
    "of one block": ((5, 5, 1, 800, 4), (16, 16, 6)),
    "K so long that it is cut first": ((64, 576, 1, 14700, 8), (64, 64, 7)),
    "K too short to be cut": ((45, 64, 1, 64, 8), (64, 32, 1)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_blocks_follow_from_how_many_fill_the_gpu(name, monkeypatch):
    _use(launch.Tiles(), monkeypatch)
    sizes, (rows, columns, slices) = SHAPES[name]
    blocks = choose_blocks(*sizes, H100)
    assert (blocks.rows, blocks.columns, blocks.slices) == (rows, columns, slices)
    alone = choose_blocks(*sizes, 0)
    assert alone.slices == 1
    assert alone.rows * alone.columns >= rows * columns


def test_every_slice_has_work(monkeypatch):
    _use(launch.Tiles(), monkeypatch)
    for processors in (1, 16, H100):
        for steps in range(1, 200):
            for layers in (1, 3, 50, 1000):
                blocks = choose_blocks(40, 40, steps, 32, layers, processors)
                assert blocks.slices == 1 or steps // blocks.slices >= 4
                assert blocks.registers == (128 if blocks.rows >= 64 else 168)


@triton.jit
def _begin(out, slice, total, slices):
    tl.store(out, contraction._share(slice, total, slices))


@pytest.mark.parametrize(("total", "slices"), [(7, 3), (16_250_000, 528), (2**31 - 1, 1000)])
def test_slices_begin_where_the_one_before_ends(total, slices):
    """Also where the product of a slice and all steps is past 32 bits."""
    found = torch.full((1,), -1, dtype=torch.int32, device=DEVICE)
    for slice in (0, 1, slices - 1, slices):
        _begin[(1,)](found, slice, total, slices)
        assert int(found) == slice * (total // slices) + min(slice, total % slices)
    assert int(found) == total
