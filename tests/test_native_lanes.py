"""Tasks that a core runs at once, one in each lane: right, and the same bits as from a core for each of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import hypothesis.strategies as st
import models
import pytest
import torch
from hypothesis import given, settings
from loops import adapt, adapt_vjp, layers, loop, meta_gradient, refusal
from setups import SETUPS, VECTOR, make_learner, make_tasks
from test_meta_gradients import check_against_oracle
from test_native import (
    A_RATE_A_PARAMETER,
    A_RATE_A_STEP,
    NATIVE_CASES,
    ONE_RATE,
    assert_same_bits,
    bits,
    case_tasks,
    close,
    compare,
    program_around,
    rates,
)  # fmt: skip
from torch import nn

from metafast.executors import CpuExecutor, ReferenceExecutor
from metafast.program.capture import capture
from metafast.program.losses import as_loss
from metafast.tasks import TaskBatch

pytestmark = pytest.mark.skipif(not CpuExecutor.isas(), reason="metafast._C is not built")

MANY = 64
"""Threads, so many that each has a task: lanes do not pay."""


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 7), nn.Linear(7, 7, bias=False), nn.Linear(7, 2)

    def forward(self, x):
        h = torch.sigmoid(self.first(x))
        return self.head(torch.relu(self.second(h)) + h + h)


def sequential(*widths, between=nn.ReLU):
    layers = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), between())]
    return nn.Sequential(*layers[:-1])


MODELS = {
    "sinusoid": lambda: sequential(1, 40, 40, 1),
    "odd": lambda: sequential(3, 17, 9, 33, 2, between=nn.GELU),
    "residual": Residual,
    "repeated": models.Repeated,
    "one layer": lambda: nn.Sequential(nn.Flatten(), nn.Linear(5, 11)),
    "pixels": lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(6, 3)),
}  # fmt: skip


def made(name, loss, dtype, tasks, support=5, query=6, **options):
    torch.manual_seed(1)
    model = MODELS[name]()
    shapes = [p.shape for p in model.parameters()]
    sample, outputs = (shapes[0][1], *shapes[0][2:]), shapes[-1][0]
    program = capture(model, as_loss(loss), torch.zeros(support, *sample), **options)
    params = program.flatten({n: p.detach() for n, p in model.named_parameters()}).to(dtype)

    def targets(n):
        return torch.randn(tasks, n, outputs).to(dtype) if loss == "mse" else torch.randint(outputs, (tasks, n))

    x = [torch.randn(tasks, n, *sample).to(dtype) for n in (support, query)]
    return program, params, TaskBatch(x[0], targets(support), x[1], targets(query))


def together(program, tasks, threads=1):
    """How many tasks a core runs at once; zero: each on its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return CpuExecutor()._memory(program, tasks.shapes, loop(1))["lanes"]
    finally:
        torch.set_num_threads(before)


def assert_apart_is_the_same(program, params, tasks, **options):
    assert together(program, tasks)
    assert not together(program, tasks, MANY)
    assert_same_bits(
        bits(program, params, tasks, threads=1, **options), bits(program, params, tasks, threads=MANY, **options)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("name", MODELS)
def test_every_model(name, loss, dtype):
    if name == "sinusoid" and loss == "cross_entropy":
        pytest.skip("one class")
    for tasks, support, query in ((17, 5, 6), (25, 1, 10), (130, 3, 1), (16, 70, 66)):
        work = made(name, loss, dtype, tasks, support, query)
        if together(work[0], work[2]):  # not with the tape of many samples
            assert_apart_is_the_same(*work)
        else:
            assert support == 70
        compare(*work)


def in_lanes(setup):
    if setup.sample != VECTOR or setup.ragged:
        return False
    program, tasks = make_learner(setup).program, make_tasks(setup, tasks=19)
    return refusal(CpuExecutor(), program, tasks.support_x) is None and together(program, tasks) > 0


LEARNERS = [setup for setup in SETUPS if CpuExecutor.isas() and in_lanes(setup)]


@pytest.mark.parametrize("one_call", [False, True])
@pytest.mark.parametrize("setup", LEARNERS, ids=str)
def test_learners_against_the_oracle(setup, one_call):
    tasks = make_tasks(setup, tasks=19)
    check_against_oracle(make_learner(setup, backend="cpu"), tasks.to(torch.float64), 1e-9, one_call)
    check_against_oracle(make_learner(setup, torch.float32, "cpu"), tasks, 1e-4, one_call)


def test_learners_of_every_kind_run_in_lanes():
    kinds = {setup.learner.__name__ for setup in LEARNERS}
    assert kinds == {"MAML", "FOMAML", "MetaSGD"}


@pytest.mark.parametrize("kind", [ONE_RATE, A_RATE_A_STEP, A_RATE_A_PARAMETER])
@pytest.mark.parametrize("first_order", [False, True])
def test_rates_weights_and_frozen_parameters(kind, first_order):
    for adapted, weights in ((None, [0.1, 0.2, 0.3, 0.4]), (["2.weight", "4.bias"], None)):
        program, params, tasks = made("odd", "mse", torch.float64, 40, adapt=adapted)
        options = {"step_weights": weights, "first_order": first_order}
        compare(program, params, tasks, steps=3, kind=kind, **options)
        lr, found = rates(kind, 3, program.size, params.dtype), []
        for threads in (1, 2, MANY):
            torch.set_num_threads(threads)
            found.append(meta_gradient(CpuExecutor(), program, params, lr, tasks, 3, **options))
        torch.set_num_threads(1)
        for other in found[1:]:
            assert_same_bits(other, found[0])


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_every_function(loss):
    program, params, tasks = made("odd", loss, torch.float32, 27)
    lr, native = torch.full((2, 1), 0.05), CpuExecutor()
    starts = params + 0.1 * torch.randn(27, program.size)

    def run(threads):
        torch.set_num_threads(threads)
        trajectory = adapt(native, program, starts, lr, tasks.support, 2)
        v = torch.randn(trajectory.shape, generator=torch.Generator().manual_seed(2))
        return (
            trajectory,
            adapt(native, program, params, lr, tasks.support, 2),
            native.predict(program, params, tasks.query_x),
            native.predict(program, starts, tasks.query_x),
            *native.loss_and_grad(program, trajectory[-1], tasks.query, 2),
            *adapt_vjp(native, program, trajectory, lr, tasks.support, v[-1]),
            *adapt_vjp(native, program, trajectory, lr, tasks.support, v, first_order=True),
        )

    once, apart = run(1), run(MANY)
    torch.set_num_threads(1)
    for found, wanted in zip(once, apart, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("case", [case for case in NATIVE_CASES if len(case.inputs[0]) == 2], ids=str)
def test_every_layer_of_vectors(case):
    program, tasks = program_around(case), case_tasks(case, torch.float64, 19)
    params = 0.3 * torch.randn(program.size, dtype=torch.float64)
    compare(program, params, tasks)
    if together(program, tasks):
        assert_apart_is_the_same(program, params, tasks)
    else:
        assert program.size > 300 or case.layer.kind in ("batch_norm", "layer_norm")


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_random_vectors(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    torch.manual_seed(draw(0, 1000))
    layers, widths = [], [draw(1, 20) for _ in range(draw(2, 4))]
    for inputs, outputs in pairwise(widths):
        layers.append(nn.Linear(inputs, outputs, bias=data.draw(st.booleans())))
        layers.append(data.draw(st.sampled_from([nn.ReLU(), nn.Tanh(), nn.GELU(), nn.Sigmoid()])))
    model = nn.Sequential(*layers, nn.Linear(widths[-1], 2)).double()
    count = draw(8, 70)
    x = [torch.randn(count, draw(1, 13), widths[0], dtype=torch.float64) for _ in range(2)]
    program = capture(model, as_loss("mse"), x[0][0])
    y = [torch.randn(*v.shape[:2], 2, dtype=torch.float64) for v in x]
    params = program.flatten({n: p.detach() for n, p in model.named_parameters()})
    tasks = TaskBatch(x[0], y[0], x[1], y[1])
    compare(program, params, tasks)
    assert_apart_is_the_same(program, params, tasks)


def test_a_nan_stays_in_its_task():
    program, params, tasks = made("odd", "mse", torch.float32, 16)
    tasks.support_x[3] = torch.nan
    found = bits(program, params, tasks, threads=1)
    assert found.losses.isnan().nonzero().flatten().tolist() == [3]
    assert found.outputs.isnan().flatten(1).any(1).nonzero().flatten().tolist() == [3]


def test_what_is_not_run_in_lanes():
    program, _, tasks = made("sinusoid", "mse", torch.float32, 25)
    lanes = together(program, tasks)
    assert lanes in (2, 4, 8, 16)
    assert f"a core for {lanes} tasks at once" in layers(CpuExecutor(), program, tasks.support_x)[0]
    assert "a core for each task" in layers(CpuExecutor(), program, tasks.support_x[: lanes - 1])[0]
    shapes = (tasks.tasks(slice(n)).shapes for n in (1, 25))
    few, many = (CpuExecutor().memory(program, loop(5), shape).peak for shape in shapes)
    assert many > lanes / 3 * few
    tight = CpuExecutor(budget=0)
    assert "a core for each task" in layers(tight, program, tasks.support_x)[0]
    wide, _, batch = made("odd", "mse", torch.float32, 25, support=2000)
    assert not together(wide, batch)


def test_ragged_tasks_run_apart():
    program, params, tasks = made("odd", "mse", torch.float64, 20)
    masks = [torch.rand(y.shape[:2]) < 0.6 for y in (tasks.support_y, tasks.query_y)]
    for mask in masks:
        mask[:, 1:3] = True
    ragged = replace(tasks, support_mask=masks[0], query_mask=masks[1])
    rate = torch.full((1, 1), 0.05, dtype=torch.float64)
    expected = meta_gradient(ReferenceExecutor(), program, params, rate, ragged, 2)
    found = bits(program, params, ragged)
    close(found.losses, expected.losses, 1e-12)
    close(found.grad, expected.grad, 1e-12)


def test_a_parameter_that_nothing_reads():
    class Idle(Residual):
        def __init__(self):
            super().__init__()
            self.first, self.idle = nn.Linear(3, 7), nn.Parameter(torch.randn(37))
            self.last = nn.Parameter(torch.randn(5, 3))

    torch.manual_seed(1)
    model = Idle()
    program = capture(model, as_loss("mse"), torch.zeros(5, 3))
    params = program.flatten({n: p.detach() for n, p in model.named_parameters()}).double()
    _, _, tasks = made("residual", "mse", torch.float64, 20)
    compare(program, params, tasks, kind=A_RATE_A_PARAMETER)
    assert_apart_is_the_same(program, params, tasks)
