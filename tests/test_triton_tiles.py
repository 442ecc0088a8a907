"""Sums and moments that come in tiles: read by the kernels that need them where tiles are few, merged by a kernel of
their own where they are many. And flattened images, gaps between parameters."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("triton")

import torch
import torch.nn.functional as F
from loops import loop
from setups import Setup, make_learner, make_tasks
from test_layers import assert_close, point, truth
from test_triton import (  # the fixtures act by being here
    BN,
    DEVICE,
    HAND_WRITTEN,
    Fused,
    _executor,  # noqa: F401
    _memory_full_of_nan,  # noqa: F401
    _norm,
    _quick,  # noqa: F401
    _use,
    check,
    executor,
    run,
)
from torch import nn

from metafast.executors.reference.executor import ReferenceExecutor
from metafast.executors.reference.inner_loop import InnerLoopRun
from metafast.executors.triton import lowering
from metafast.kernels.batch_norm import BatchNorm
from metafast.kernels.batch_norm import kernel as norm_kernel
from metafast.kernels.batch_norm.kernel import TritonBatchNorm
from metafast.kernels.contract.layer import RuleContext
from metafast.kernels.conv2d import Conv2d
from metafast.kernels.conv2d.kernel import TritonConv2d
from metafast.kernels.conv2d.normalised import NormalisedConv
from metafast.kernels.flatten import Flatten
from metafast.kernels.flatten.pixels import FlattenPixels
from metafast.kernels.primitives import launch, row_reductions
from metafast.program.capture import capture
from metafast.program.losses import as_loss
from metafast.tasks import Batch

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
TINY = launch.Tiles(16, 16, 16, 64)  # 4 rows to a tile of batch norm's sums, 16 to one of a product
MERGING = ("metafast_add_tiles", "metafast_merge_moments")


@pytest.fixture
def merged(monkeypatch):
    """The kernels of their own that merge tiles, as they are launched, in tiles that are tiny and two at a time."""
    _use(TINY, monkeypatch)
    for module in (row_reductions, norm_kernel):
        monkeypatch.setattr(module, "TILES_AT_ONCE", 2)
    monkeypatch.setattr(row_reductions, "ROWS", 16)
    monkeypatch.setattr(norm_kernel, "ROWS", 16)
    names = []

    def noted(kernel, *args, **options):
        names.extend([kernel.__name__] if kernel.__name__ in MERGING else [])
        launch.launch(kernel, *args, **options)

    monkeypatch.setattr(row_reductions, "launch", noted)
    return names


def chain(n, channels=3, size=(4, 4)):
    conv = TritonConv2d(Conv2d((1, 1), (1, 1), bias=False))
    return Fused(
        "conv, norm, relu, pool", NormalisedConv(conv, TritonBatchNorm(BN, True, (2, 2))),
        lambda p, i: F.max_pool2d(F.relu(_norm(F.conv2d(i[0], p[0], None, 1, 1), p[1], p[2])), 2),
        ((channels, 2, 3, 3), (channels,), (channels,)), ((n, 2, *size),),
    )  # fmt: skip


def alone(n, channels=3):
    return Fused("norm, relu", TritonBatchNorm(BN, relu=True), lambda p, i: F.relu(_norm(i[0], *p)),
                 ((channels,), (channels,)), ((n, channels, 2, 3),))  # fmt: skip


SIZES = {  # of a chain: its moments' tiles of 16 of the pixels, its sums' tiles of 4 of the values
    "one tile": chain(1), "two tiles, one channel": chain(2, 1), "a part of a tile": chain(3, 3, (5, 3)),
    "five tiles": chain(5), "one channel alone": alone(3, 1), "alone": alone(5),
}  # fmt: skip


@pytest.mark.parametrize("most", [0, row_reductions.MAX_BYTES_READ])
@pytest.mark.parametrize("name", SIZES)
def test_tiles_are_merged_by_their_readers_or_before_them(name, most, merged, monkeypatch):
    case = SIZES[name]
    monkeypatch.setattr(row_reductions, "MAX_BYTES_READ", most)
    at = point(case, tasks=2)
    at.inputs[0] += 3.0 * torch.arange(at.inputs[0].shape[1]).reshape(-1, 1, 1, 1)  # tiles whose means are far apart
    found = run(case.layer, at, case)
    assert_close(found, truth(case.function, at), 1e-5)
    folded = most > 0 or name == "one tile"
    assert Counter(merged) == ({} if folded else {"metafast_merge_moments": 1, "metafast_add_tiles": 3})
    again = run(case.layer, at, case)
    assert all(torch.equal(a, b) for one, two in zip(found, again, strict=True) for a, b in zip(one, two, strict=True))


def test_bytes_bound_what_readers_read_again(merged, monkeypatch):
    case = SIZES["five tiles"]  # sums: 5 tiles of values for 20 programs over the pixels, and for 5 over the values
    at = point(case, tasks=2)
    bound = 20 * 4 * (2 * 5 * 2 * 3)
    for most, launches in ((bound, 0), (bound - 1, 2)):
        monkeypatch.setattr(row_reductions, "MAX_BYTES_READ", most)
        assert_close(run(case.layer, at, case), truth(case.function, at), 1e-5)
        assert merged == ["metafast_add_tiles"] * launches


@pytest.mark.parametrize("most", [0, row_reductions.MAX_BYTES_READ])
@pytest.mark.parametrize("case", [c for c in HAND_WRITTEN if isinstance(c.layer, BatchNorm)
                                  and sum(torch.Size(x).numel() for x in c.inputs) < 500], ids=str)  # fmt: skip
def test_batch_norm_in_tiles(case, most, merged, monkeypatch):
    monkeypatch.setattr(row_reductions, "MAX_BYTES_READ", most)
    at = point(case, tasks=2)
    assert_close(run(TritonBatchNorm(case.layer), at, case), truth(case.function, at), case.tolerance)


@pytest.mark.parametrize("most", [0, row_reductions.MAX_BYTES_READ])
def test_nan_reaches_its_own_channel_in_every_tile(most, merged, monkeypatch):
    monkeypatch.setattr(row_reductions, "MAX_BYTES_READ", most)
    x = torch.randn(2, 6, 3, 4, 4, device=DEVICE)
    x[1, 4, 1, 0, 0] = float("nan")
    ctx = RuleContext(0, None, (True,), (False, False))
    layer, affine = TritonBatchNorm(BN), [torch.ones(2, 3, device=DEVICE)] * 2
    y = layer.forward(ctx, affine, [x])
    g = torch.ones_like(y)
    (g_x,), _ = layer.backward(ctx, affine, g)
    for v in (y, g_x):
        assert torch.isnan(v[1, :, 1]).all()
        assert not torch.isnan(v[0]).any()
        assert not torch.isnan(v[1, :, ::2]).any()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_wanted_in_many_tiles(needs, merged):
    case = alone(5)
    at = point(case, tasks=2)
    everything, found = run(case.layer, at, case), run(case.layer, at, case, needs)
    for part in (1, 3):
        for wanted, ours, full in zip(needs, found[part], everything[part], strict=True):
            assert (ours is not None) == wanted
            assert ours is None or torch.allclose(ours, full, rtol=1e-5, atol=1e-6)


class Picture(nn.Module):
    """Six pixels of four channels flattened into a head; ``how`` says what stands in its way."""

    def __init__(self, how="plain"):
        super().__init__()
        self.how, self.conv, self.head = how, nn.Conv2d(2, 4, 3, padding=1), nn.Linear(24, 3)
        self.norm, self.wide, self.other = nn.LayerNorm([4, 2, 3]), nn.Linear(3, 24), nn.Linear(24, 3)
        if how == "tied":
            self.other.weight = self.head.weight

    def forward(self, x):
        x = F.max_pool2d(F.gelu(self.conv(x)), 2)
        x = self.norm(x) if self.how == "layer norm" else x
        features = x.flatten(1)
        y = self.head(features)
        if self.how in ("plain", "layer norm"):
            return y
        return y + self.other(torch.tanh(self.wide(y) if self.how == "tied" else features))


PIXELS = Setup("pixels into the head", lambda: nn.Sequential(
    nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 3)),
    (2, 4, 7), 3, options={"steps": 2, "lr": 0.05}, support=5)  # fmt: skip


def test_a_head_that_reads_pixels():
    check(PIXELS, one_call=True)
    learner = make_learner(PIXELS, torch.float32, "reference")
    lowered = lowering.lower(learner.program, "float32", torch.device("cpu"))
    assert isinstance(lowered.program.nodes[1].layer, FlattenPixels)
    flat = torch.randn(3, learner.program.size)
    assert torch.equal(lowered.unpack(lowered.pack(flat)), flat)


@pytest.mark.parametrize("how", ["plain", "tied", "read twice", "layer norm"])
def test_features_that_others_read_keep_their_order(how):
    torch.manual_seed(3)
    model = Picture(how)
    program = capture(model, as_loss("cross_entropy"), torch.zeros(3, 2, 4, 7))
    kinds = [type(n.layer) for n in lowering.lower(program, "float32", torch.device("cpu")).program.nodes]
    assert (FlattenPixels in kinds, Flatten in kinds) == (how == "plain", how != "plain")
    theta = program.flatten({k: v.detach() for k, v in model.named_parameters()}).expand(2, -1)
    x, y = torch.randn(2, 3, 2, 4, 7), torch.tensor([[0, 1, 2], [2, 2, 0]])
    exact = ReferenceExecutor().loss_and_grad(program, theta.double(), Batch(x.double(), y))
    found = executor().loss_and_grad(program, theta.to(DEVICE), Batch(x.to(DEVICE), y.to(DEVICE)))
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-4, atol=1e-5)


def test_gaps_and_biases_without_effect_have_no_gradient():
    learner, tasks = make_learner(PIXELS, torch.float32, device=DEVICE), make_tasks(PIXELS, tasks=2).to(DEVICE)
    theta, rate, triton = learner.flat_parameters().detach(), torch.full((1, 1), 0.1, device=DEVICE), executor()
    lowered = triton._lowered(learner.program, tasks.support_x.device)
    gaps = torch.ones(lowered.program.size, dtype=torch.bool, device=DEVICE)
    gaps[lowered.order] = False
    still = gaps.clone()
    still[lowered.order[learner.program.parameters[1].offset :][:4]] = True  # the bias in front of the norm
    assert 0 < gaps.sum() == still.sum() - 4
    theta = lowered.pack(theta).expand(2, -1)
    found = InnerLoopRun(lowered.program, loop(2, learns_rates=False), rate, triton._reordered(tasks.support))
    trajectory = torch.stack(found.adapt(theta))
    assert torch.all(trajectory[..., gaps] == 0)
    assert torch.equal((trajectory[0] != trajectory[2]).any(0), ~still)
    carried = found.reverse(trajectory.unbind(0), [None, None, (~still).float().expand(2, -1)])
    assert torch.equal((carried != 0).all(0), ~still)
