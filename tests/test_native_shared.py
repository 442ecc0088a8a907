"""Layers that are called twice and flattened images among vectors run in C++, and agree with the oracle."""

from __future__ import annotations

import pytest
import torch
from loops import layers, refusal
from setups import IMAGE, Setup, images, make_learner, make_tasks, vectors
from test_meta_gradients import check_against_oracle
from test_threads import assert_same
from torch import nn

import metafast as mf
from metafast.executors import CpuExecutor
from metafast.executors.native.cuda import BlockLimits, CudaExecutor

pytestmark = pytest.mark.skipif(not CpuExecutor.isas(), reason="metafast._C is not built")

FEATURES = 2 * 9 * 7


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def twice(layer, *behind):
    return nn.Sequential(layer, nn.Tanh(), layer, *behind)


def small(*layers, channels=2):
    """Images of 2x3 pixels."""
    return nn.Sequential(nn.Conv2d(2, channels, 3, (4, 3), (0, 1)), *layers)


class Skip(nn.Module):
    """x + W x of flattened images, of the model's input or of what ``before`` makes of it."""

    def __init__(self, width, before=None, between=None):
        super().__init__()
        self.before, self.between = before or nn.Identity(), between or nn.Identity()
        self.linear, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.between(torch.flatten(self.before(x), 1))
        return self.head(torch.tanh(x + self.linear(x)) + x)


class Siamese(nn.Module):
    """One layer reads the image, another one and the first read what comes of it."""

    def __init__(self):
        super().__init__()
        self.body, self.again, self.head = small(nn.Tanh()), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        h = self.body(x).flatten(1)
        return self.head(self.again(torch.tanh(self.again(h))) + h)


class Branches(nn.Module):
    """Images that one branch flattens and, behind it, another one convolves."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.conv = small(nn.Tanh(), channels=3), nn.BatchNorm1d(18), nn.Conv2d(3, 2, 2)
        self.head, self.other = nn.Linear(18, 3), nn.Linear(4, 3)

    def forward(self, x):
        h = self.body(x)
        flat = self.head(torch.relu(self.norm(h.flatten(1))))
        return flat + self.other(torch.tanh(self.conv(h)).flatten(1))


CALLED_TWICE = [
    vectors("linear layer", lambda: twice(nn.Linear(3, 3), nn.Linear(3, 2))),
    vectors("linear layer, Meta-SGD", learner=mf.MetaSGD, lr=(0.02, 0.1),
            model=lambda: twice(nn.Linear(3, 3), nn.Linear(3, 2))),
    vectors("linear layer alone, weights", lambda: twice(nn.Linear(3, 3), nn.Linear(3, 2)), step_weights=[0.6, 0.2]),
    images("convolution", lambda: twice(nn.Conv2d(2, 2, 3, padding=1), nn.Flatten(), nn.Linear(FEATURES, 3))),
    images("linear layer of flattened images",
           lambda: nn.Sequential(nn.Flatten(), twice(nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 3)))),
    images("linear layer of flattened images and of vectors", Siamese),
]  # fmt: skip
FLATTENED = [
    images("sum with the input", lambda: Skip(FEATURES)),
    images("sum with the input, first order", lambda: Skip(FEATURES), first_order=True),
    images("sum with hidden images", lambda: Skip(18, small(nn.Tanh(), channels=3), nn.GELU())),
    images("sum, ANIL", lambda: Skip(18, small(channels=3), nn.Sigmoid()), learner=mf.ANIL, head="head"),
    images("sum, ragged", lambda: Skip(18, small(channels=3)), ragged=True),
    images("batch norm of the input",
           lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, 3))),
    images("batch norm of hidden images",
           lambda: small(nn.Flatten(), nn.BatchNorm1d(18), nn.ReLU(), nn.Linear(18, 3), channels=3)),
    images("batch norm of one of two branches", Branches),
    images("batch norm, running", bn="running",
           model=lambda: small(nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(18), nn.Linear(18, 3), channels=3)),
    images("batch norm, per step", bn="per_step", lr=mf.Rate((0.02, 0.1), ("layer", "step"), learn=True),
           model=lambda: small(nn.Tanh(), nn.Flatten(), nn.BatchNorm1d(18), nn.Linear(18, 3), channels=3)),
    Setup("classes", lambda: small(nn.Tanh(), nn.Conv2d(2, 2, 3, padding=1), nn.Flatten()), IMAGE, 12,
          options={"steps": 2}),
]  # fmt: skip
every_setup = pytest.mark.parametrize("setup", CALLED_TWICE + FLATTENED, ids=str)


@every_setup
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tasks", [3, 19])
def test_against_the_oracle(setup, tasks, threads):
    torch.set_num_threads(threads)
    batch = make_tasks(setup, tasks)
    for one_call in (False, True):
        check_against_oracle(make_learner(setup, backend="cpu"), batch.to(torch.float64), 1e-9, one_call)
        check_against_oracle(make_learner(setup, torch.float32, "cpu"), batch, 1e-4, one_call)


@every_setup
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_bits_for_any_number_of_threads(setup, dtype):
    assert_same(setup, dtype, 19, 4, threads=(1, 2, 3, 19))


@every_setup
def test_a_team_gives_the_same_bits(setup):
    if not setup.ragged:
        assert_same(setup, torch.float32, 2, 4, (1, 2, 5), CpuExecutor(team_from=0))


@pytest.mark.parametrize("setup", CALLED_TWICE[:3], ids=str)
def test_shared_layers_of_vectors_run_in_lanes(setup):
    program, batch = make_learner(setup).program, make_tasks(setup, 19)
    assert "tasks at once" in layers(CpuExecutor(), program, batch)[0]


@pytest.mark.parametrize("isa", CpuExecutor.isas())
@every_setup
def test_every_instruction_set(setup, isa):
    check_against_oracle(make_learner(setup, backend=CpuExecutor(isa=isa)), make_tasks(setup).to(torch.float64), 1e-9)


def test_blocks_of_a_gpu_say_what_they_leave_to_others():
    twin = CudaExecutor(BlockLimits(227 << 10, 4))
    for setup in (FLATTENED[0], FLATTENED[5]):
        reason = refusal(twin, make_learner(setup).program, make_tasks(setup))
        assert "a sum of values of different shapes" in reason or "batch norm of flattened images" in reason
