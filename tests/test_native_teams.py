"""Tasks that several threads share: the same bits as from one thread, whatever the size of the team."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from loops import adapt, adapt_vjp, layers, loop, plan
from test_native import MODELS, NATIVE_CASES, assert_same_bits, bits, case_tasks, program_around, setup

from metafast.executors import CpuExecutor
from metafast.program import Program
from metafast.program.losses import as_loss
from metafast.tasks import TaskBatch

pytestmark = pytest.mark.skipif(not CpuExecutor.isas(), reason="metafast._C is not built")

ALONE = CpuExecutor(team_from=1 << 62)
SHARED = CpuExecutor(team_from=0)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", NATIVE_CASES, ids=str)
def test_every_layer(case):
    program = program_around(case)
    for dtype, tasks, threads in ((torch.float32, 1, 2), (torch.float32, 2, 5), (torch.float64, 1, 3)):
        params = (0.3 * torch.randn(program.size)).to(dtype)
        made = program, params, case_tasks(case, dtype, tasks)
        assert_same_bits(bits(*made, native=SHARED, threads=threads), bits(*made, native=ALONE, threads=threads))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "custom"])
def test_every_function(name, loss):
    program, params, tasks = setup(name, torch.float32, tasks=1)
    if loss != "cross_entropy":
        chosen = as_loss("mse" if loss == "mse" else lambda outputs, targets: (outputs - targets).abs().mean())
        program = Program(program.nodes, program.parameters, program.output, chosen)
        ys = [torch.randn(*y.shape, 3) for y in (tasks.support_y, tasks.query_y)]
        tasks = TaskBatch(tasks.support_x, ys[0], tasks.query_x, ys[1])
    lr = torch.full((2, 1), 0.05)

    def run(native):
        native = plan(native, program, tasks).executor
        trajectory = adapt(native, program, params, lr, tasks.support, 2)
        v = torch.ones_like(trajectory)
        return (
            trajectory,
            native.predict(program, params, tasks.query_x),
            *native.loss_and_grad(program, trajectory[-1], tasks.query, 2),
            *adapt_vjp(native, program, trajectory, lr, tasks.support, v[-1]),
            *adapt_vjp(native, program, trajectory, lr, tasks.support, v, first_order=True),
        )

    torch.set_num_threads(1)
    expected = run(ALONE)
    torch.set_num_threads(3)
    for found, wanted in zip(run(SHARED), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_ragged_tasks(name):
    program, params, tasks = setup(name, torch.float32, tasks=2)
    masks = [torch.rand(y.shape) < 0.6 for y in (tasks.support_y, tasks.query_y)]
    for mask in masks:
        mask[:, 1:3] = True
    made = program, params, replace(tasks, support_mask=masks[0], query_mask=masks[1])
    assert_same_bits(bits(*made, native=SHARED, threads=5), bits(*made, native=ALONE))


def test_more_tasks_than_sums_and_more_threads_than_tasks():
    made = program, _, tasks = setup("mlp", torch.float32, tasks=70)
    torch.set_num_threads(80)
    assert "several cores for each task" in layers(SHARED, program, tasks.support_x)[0]
    assert_same_bits(bits(*made, native=SHARED, threads=80), bits(*made, native=ALONE))


def test_small_tasks_stay_with_one_core_and_large_ones_do_not():
    torch.set_num_threads(2)
    for name, tasks, words in (
        ("mlp", 1, "a core for each task"),
        ("wide images", 1, "several cores for each task"),
        ("wide images", 2, "a core for each task"),
    ):
        program, _, batch = setup(name, torch.float32, tasks=tasks)
        assert words in layers(CpuExecutor(), program, batch.support_x)[0]
        more, less = (e.memory(program, loop(2), batch.shapes).peak for e in (SHARED, ALONE))
        assert (more > less) == (tasks == 1)


LIMITED = """
import torch
from test_native import assert_same_bits, bits, setup
from test_native_teams import ALONE, SHARED
made = setup("conv", torch.float32, tasks=2)
assert_same_bits(bits(*made, native=SHARED, threads=5), bits(*made, native=ALONE))
"""


@pytest.mark.parametrize("limit", ["1", "2"])
def test_a_pool_that_gives_fewer_threads(limit):
    """Members that never come are not waited for."""
    here = os.path.dirname(__file__)
    env = {**os.environ, "OMP_THREAD_LIMIT": limit, "PYTHONPATH": here}
    subprocess.run([sys.executable, "-c", LIMITED], check=True, timeout=120, env=env, cwd=here)
