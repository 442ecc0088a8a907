"""Tasks that share their weights run as one: the same numbers as apart, in fewer and fuller programs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

pytest.importorskip("triton")

import torch.nn.functional as F
from loops import adapt
from test_layers import assert_close, point, rules, truth
from test_triton import (  # the fixtures act by being here
    BN,
    DEVICE,
    _executor,  # noqa: F401
    _memory_full_of_nan,  # noqa: F401
    _norm,
    _quick,  # noqa: F401
    _there,
    _use,
    executor,
)
from test_triton_executor import small_network

from metafast.kernels.batch_norm.kernel import TritonBatchNorm
from metafast.kernels.contract.layer import Layer
from metafast.kernels.conv2d import Conv2d
from metafast.kernels.conv2d.kernel import TritonConv2d
from metafast.kernels.conv2d.normalised import NormalisedConv
from metafast.kernels.linear import Linear
from metafast.kernels.linear.kernel import TritonLinear
from metafast.kernels.primitives import launch, products

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
TASKS = 8


@dataclass(frozen=True)
class Shared:
    """A layer and its function; (blocks, tasks x groups, residues) of its products ``apart``, as ``one`` task, and of
    data gradients as ``one_back``. Weights of convolutions are ``[O,kh,kw,C]``."""

    name: str
    layer: Layer
    function: object
    params: tuple
    inputs: tuple
    apart: tuple
    one: tuple
    one_back: tuple
    apart_back: tuple | None = None

    def __str__(self):
        return self.name


def _conv(p, i, **options):
    return F.conv2d(i[0], p[0].movedim(-1, 1), p[1], **options)


CASES = [
    Shared("linear", TritonLinear(Linear()), lambda p, i: F.linear(i[0], p[0], p[1]), ((70, 20), (70,)), ((5, 20),),
           (2, 8, 1), (2, 1, 1), (1, 1, 1), (1, 8, 1)),
    Shared("3x3 images", TritonConv2d(Conv2d((1, 1), (1, 1))), lambda p, i: _conv(p, i, padding=1),
           ((4, 3, 3, 2), (4,)), ((5, 2, 3, 3),), (1, 8, 1), (3, 1, 1), (3, 1, 1)),
    Shared("stride 2, two groups", TritonConv2d(Conv2d((2, 2), (1, 1), groups=2)),
           lambda p, i: _conv(p, i, stride=2, padding=1, groups=2), ((6, 3, 3, 2), (6,)), ((9, 4, 5, 6),),
           (1, 16, 1), (6, 2, 1), (6, 2, 4), (1, 16, 4)),
]  # fmt: skip
NORMALISED = Shared(
    "conv, norm", NormalisedConv(TritonConv2d(Conv2d((1, 1), (1, 1), bias=False)), TritonBatchNorm(BN)),
    lambda p, i: _norm(F.conv2d(i[0], p[0].movedim(-1, 1), None, 1, 1), p[1], p[2]), ((4, 3, 3, 2), (4,), (4,)),
    ((5, 2, 3, 3),), (1, 8, 1), (1, 8, 1), (3, 1, 1),
)  # fmt: skip


@pytest.fixture
def grids(monkeypatch):
    """Those of the products, in order, in the blocks of a full GPU."""
    _use(launch.Tiles(), monkeypatch)
    monkeypatch.setattr(products, "processors", lambda device: 0)
    seen = []

    def noted(kernel, grid, *args, **options):
        if kernel is products.metafast_gather_product:
            seen.append(grid)
        launch.launch(kernel, grid, *args, **options)

    monkeypatch.setattr(products, "launch", noted)
    return seen


def run(layer, at, shared):
    there = {k: [_there(v) for v in x] if isinstance(x, list) else _there(x) for k, x in vars(at).items()}
    there["params"] = [p[:1].expand_as(p) if k in shared else p for k, p in enumerate(there["params"])]
    return [[v.cpu() for v in part] for part in rules(layer, replace(at, **there))]


def of_one_task(at, shared):
    return replace(at, params=[p[:1].expand_as(p) if k in shared else p for k, p in enumerate(at.params)])


@pytest.mark.parametrize("case", [*CASES, NORMALISED], ids=str)
def test_tasks_that_share_their_weights_run_as_one(case, grids):
    everything = range(len(case.params))
    at = of_one_task(point(case, tasks=TASKS), everything)
    assert_close(run(case.layer, at, everything), truth(case.function, at), 1e-5)
    assert grids == [case.one, case.one_back, case.apart, case.apart_back or case.apart]  # tangents go apart


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_direction_that_leaves_the_weights_alone_keeps_tasks_together(case, grids):
    at = of_one_task(point(case, tasks=TASKS), (0, 1))
    at = replace(at, d_params=[None, None])
    assert_close(run(case.layer, at, (0, 1)), truth(case.function, at), 1e-5)
    assert grids == [case.one, case.one_back] * 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bias_of_each_task_keeps_their_products_apart(case, grids):
    at = of_one_task(point(case, tasks=TASKS), (0,))
    assert_close(run(case.layer, at, (0,)), truth(case.function, at), 1e-5)
    assert grids[:2] == [case.apart, case.one_back]


def test_as_many_run_as_one_as_32_bits_reach(monkeypatch):
    assert products._together(4096, 5 * 84 * 84 * 64) == 512  # 951 would fit and do not divide
    assert products._together(6, 2**40) == 1
    case = CASES[1]
    monkeypatch.setattr(products, "REACH", 3 * 5 * 4 * 9)  # of three tasks' results
    at = of_one_task(point(case, tasks=TASKS), (0, 1))
    assert_close(run(case.layer, at, (0, 1)), truth(case.function, at), 1e-5)


def test_the_first_inner_step_of_a_program_runs_as_one(grids):
    program, theta, rate, tasks = small_network()
    adapt(executor(), program, theta, rate, tasks.support, 2)
    measured, forward, backward = 3, 3, 2  # products of a task to see what fits, of each step; none to the images
    assert [grid[1] for grid in grids[measured:]] == [1] * (forward + backward) + [2] * (forward + backward)
