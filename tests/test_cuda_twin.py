"""The CUDA executor's code on the CPU, thread after thread: against the oracle, in watched memory.

The twin fills a block's memory with NaN and raises where a thread reaches outside of it, or touches what another
one writes before the next barrier.
"""

from __future__ import annotations

import models
import pytest
import torch
from block_checks import (
    check_a_full_device,
    check_labels_outside,
    check_one_launch,
    check_tasks_that_take_turns,
    check_the_parts_alone,
)
from loops import meta_gradient, refusal
from setups import IMAGE, SETUPS, Setup, make_learner, make_tasks, rate, vectors
from test_meta_gradients import assert_gradients, check_against_oracle, close, gradients
from test_native import NATIVE_CASES, case_tasks, compare, program_around
from torch import nn

import metafast as mf
from metafast import executors
from metafast.executors import ReferenceExecutor
from metafast.executors.native.cuda import BlockLimits, CudaExecutor
from metafast.program.capture import capture
from metafast.program.losses import as_loss

pytest.importorskip("metafast._C")

H100, A100 = 232448, 166912
TWINS = {
    "all steps in a block's memory": BlockLimits(H100, 132),
    "steps through global memory": BlockLimits(A100, 1),
    "a warp a block": BlockLimits(H100, 1, threads=32),
    "2 blocks a task": BlockLimits(H100, 132, clusters=(2,)),
    "4 blocks a task, steps through global memory": BlockLimits(H100, 1, threads=64, clusters=(4,)),
}
FOREIGN = {
    "custom loss", "ragged regression", "PReLU, derived", "SiLU, derived", "gates by chunk and slice", "buffers",
    "direct parameters", "direct parameters, rate for each layer and step", "custom loss, ragged", "a sum of squares",
    "another loss of query sets",
}  # fmt: skip


class Normed(nn.Module):
    """Layer norms with and without parameters, a skip connection, and leaky units."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Linear(5, 7), nn.Linear(7, 7, bias=False)
        self.first, self.second = nn.LayerNorm(7), nn.LayerNorm(7, elementwise_affine=False)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = self.first(self.embed(x))
        x = x + nn.functional.leaky_relu(self.inner(x))
        return self.head(self.second(x))


def classifier():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 5))


def flattened():
    return nn.Sequential(nn.Flatten(), nn.Linear(126, 6), nn.Sigmoid(), nn.Linear(6, 3))


def sinusoid():
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


OWN = [
    Setup("sinusoid", sinusoid, (1,), outputs=1, support=10, options={"steps": 5, "lr": 0.01}),
    Setup("classifier", classifier, (6,), 5, options={"steps": 3}),
    Setup("classifier, head adapted", classifier, (6,), 5, options={"steps": 3, "adapt": ["4"]}),
    Setup("classifier, body adapted", classifier, (6,), 5, options={"steps": 2, "adapt": ["0", "2"]}),
    Setup("classifier, ANIL", classifier, (6,), 5, learner=mf.ANIL,
          options={"steps": 3, "head": "4", "lr": rate("parameter")}),
    Setup("classifier, Meta-SGD", classifier, (6,), 5, learner=mf.MetaSGD, options={"steps": 2, "lr": (0.02, 0.1)}),
    Setup("classifier, multi-step", classifier, (6,), 5, options={"steps": 3, "step_weights": [0.5, 0, 0.5]}),
    Setup("linear classifier", lambda: nn.Linear(6, 5), (6,), 5, options={"steps": 2}),
    Setup("layer norm", Normed, (5,), 3, options={"steps": 3}),
    Setup("layer norm, only norms adapted", Normed, (5,), 3, options={"steps": 2, "adapt": ["first"]}),
    Setup("flattened images", flattened, IMAGE, 3, options={"steps": 2}),
    vectors("many samples", lambda: models.mlp(nn.ReLU), support=150),
]  # fmt: skip
RUNS = OWN + [s for s in SETUPS if len(s.sample) == 1 and s.name not in FOREIGN]


def named(name):
    return next(s for s in RUNS if s.name == name)


@pytest.fixture(params=TWINS, ids=str)
def twin(request, monkeypatch):
    executor = CudaExecutor(TWINS[request.param])
    monkeypatch.setattr(executors, "_EXECUTORS", [executor])
    return executor


@pytest.mark.parametrize("setup", RUNS, ids=str)
def test_float64(setup, twin):
    learner, tasks = make_learner(setup, backend=twin.name), make_tasks(setup).to(torch.float64)
    check_against_oracle(learner, tasks, 1e-9)
    learner.zero_grad()
    out = learner(tasks)
    out.loss.backward()
    by_autograd = gradients(learner)
    learner.zero_grad()
    direct = learner.backward(tasks)
    close(direct.losses, out.losses, 1e-12)
    close(direct.outputs, out.outputs, 1e-12)
    found = {n: g for n, g in gradients(learner).items() if g is not None}
    assert_gradients(found, {n: by_autograd[n] for n in found}, 1e-12)


@pytest.mark.parametrize("setup", RUNS, ids=str)
def test_float32(setup, twin):
    check_against_oracle(make_learner(setup, torch.float32, twin.name), make_tasks(setup), 1e-4)


@pytest.mark.parametrize("learns_rates", [True, False])
@pytest.mark.parametrize("setup", RUNS, ids=str)
def test_one_launch(setup, learns_rates, twin):
    check_one_launch(twin, setup, "cpu", torch.float64, 1e-9, learns_rates)


def test_a_query_loss_before_the_first_step(twin):
    check_one_launch(twin, named("classifier, multi-step"), "cpu", torch.float64, 1e-9, at_start=0.3)


def test_the_parts_alone(twin):
    check_the_parts_alone(twin, named("classifier"), "cpu", torch.float64, 1e-11)


VECTOR_CASES = [case for case in NATIVE_CASES if len(case.inputs[0]) == 2]


@pytest.mark.parametrize("case", VECTOR_CASES, ids=str)
def test_the_cases_of_every_layer_of_vectors(case):
    twin = CudaExecutor(TWINS["all steps in a block's memory"])
    program, tasks = program_around(case), case_tasks(case, torch.float64)
    if reason := refusal(twin, program, tasks):
        assert "batch_norm: blocks run" in reason or (str(case) == "layer_norm: wide" and "KiB of shared" in reason)
    else:
        compare(program, 0.3 * torch.randn(program.size, dtype=torch.float64), tasks, native=twin)


def test_labels_outside(twin):
    check_labels_outside(twin, named("classifier"), "cpu", torch.float64)


@pytest.mark.parametrize("setup", [s for s in SETUPS if s not in RUNS], ids=str)
def test_what_blocks_do_not_run_is_refused_in_words(setup):
    twin = CudaExecutor(TWINS["all steps in a block's memory"])
    reason = refusal(twin, make_learner(setup).program, make_tasks(setup).to(torch.float64))
    assert reason is not None
    assert len(reason) > 10


class OnePixel(nn.Module):
    """Its second convolution reads its own padding around a single pixel."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).flatten(1))


def test_a_window_on_one_pixel_is_a_convolution():
    setup = Setup("one pixel", OnePixel, (3, 1, 1), 3, options={"steps": 2})
    twin = CudaExecutor(TWINS["all steps in a block's memory"])
    reason = refusal(twin, make_learner(setup).program, make_tasks(setup).to(torch.float64).support_x)
    assert reason == "conv2d: blocks run linear, layer_norm, relu, leaky_relu, tanh, sigmoid, gelu and add"


def test_a_launch_carries_the_tables_of_32_operations(monkeypatch):
    def deep(operations):
        layers = [nn.Linear(3, 3) if k % 2 == 0 else nn.Tanh() for k in range(operations)]
        return Setup("deep", lambda: nn.Sequential(*layers), (3,), 3, options={"steps": 2})

    twin = CudaExecutor(TWINS["all steps in a block's memory"])
    monkeypatch.setattr(executors, "_EXECUTORS", [twin])
    tasks = make_tasks(deep(32)).to(torch.float64)
    check_against_oracle(make_learner(deep(32), backend=twin.name), tasks, 1e-9)
    reason = refusal(twin, make_learner(deep(33), backend=ReferenceExecutor()).program, tasks.support_x)
    assert reason == "33 operations: a launch of blocks carries the tables of 32"


def parts(executor, learner, tasks, **options):
    program, params = learner.program, learner.flat_parameters().detach()
    found = meta_gradient(executor, program, params, learner.rate().detach(), tasks, learner.steps, **options)
    return found.losses, found.outputs, found.grad, found.rates_grad


@pytest.mark.parametrize(
    "machine",
    [
        BlockLimits(H100, 5), BlockLimits(A100, 2), BlockLimits(A100, 1, 64), BlockLimits(H100, 7, clusters=(2,)),
    ],
    ids=str,
)  # fmt: skip
def test_tasks_that_take_turns_in_few_blocks(machine):
    setup = next(s for s in RUNS if s.name == "classifier, Meta-SGD")
    learner, tasks = make_learner(setup), make_tasks(setup, tasks=150).to(torch.float64)
    found = parts(CudaExecutor(machine), learner, tasks)
    for a, b in zip(found, parts(ReferenceExecutor(), learner, tasks), strict=True):
        close(a, b, 1e-12)


def test_no_inner_step_is_a_plain_gradient():
    setup = next(s for s in RUNS if s.name == "classifier")
    learner, tasks = make_learner(setup), make_tasks(setup).to(torch.float64)
    program, params = learner.program, learner.flat_parameters().detach()
    found = meta_gradient(CudaExecutor(BlockLimits(A100, 1)), program, params, learner.rate().detach(), tasks, 0)
    close(found.grad, ReferenceExecutor().loss_and_grad(program, params.expand(3, -1), tasks.query)[1].mean(0), 1e-12)


def test_a_task_that_does_not_fit_is_refused_with_its_size():
    learner, tasks = make_learner(OWN[0]), make_tasks(OWN[0]).to(torch.float64)
    executor = CudaExecutor(BlockLimits(80_000, 132, clusters=(1,)))
    reason = refusal(executor, learner.program, tasks.support_x)
    assert reason == (
        "a task takes 83 KiB of shared memory and a block has 78 KiB; clusters of blocks need compute capability 9.0"
    )
    with pytest.raises(ValueError, match="takes 84096 bytes of shared memory and a block has 80000"):
        parts(executor, learner, tasks)


def wide():
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5))


class WideNormed(nn.Module):
    """Between divided values a whole one, with a skip connection, and units that are not zero at zero."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 45), nn.LayerNorm(45), nn.Linear(45, 61)
        self.third, self.head = nn.Linear(61, 61, bias=False), nn.Linear(61, 5)

    def forward(self, x):
        x = torch.sigmoid(self.second(self.norm(self.first(x))))
        return self.head(x + nn.functional.gelu(self.third(x)))


WIDE = Setup("wide", wide, (64,), 5, options={"steps": 2, "lr": 0.02})
NORMED = [
    Setup("one rate", WideNormed, (6,), 5, options={"steps": 2}),
    Setup("a rate for each parameter", WideNormed, (6,), 5, options={"steps": 3, "lr": rate("parameter")}),
    Setup("head adapted", WideNormed, (6,), 5, options={"steps": 2, "adapt": ["head"]}),
]


RESIDENT = [named("sinusoid"), named("classifier, multi-step")]
TURNS = [(s, size) for s in (*RESIDENT, *NORMED[1:]) for size in (1, 2, 8)] + [(WIDE, 8)]


@pytest.mark.parametrize("learns_rates", [True, False])
@pytest.mark.parametrize(("setup", "size"), TURNS, ids=str)
def test_tasks_that_take_turns(setup, size, learns_rates):
    twin = CudaExecutor(BlockLimits(H100, size, clusters=(size,)))
    check_tasks_that_take_turns(twin, setup, "cpu", torch.float32, 1e-4, learns_rates)


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("setup", RESIDENT, ids=str)
def test_a_full_device(setup, size):
    twin = CudaExecutor(BlockLimits(H100, 6 * size, clusters=(size,)))
    check_a_full_device(twin, setup, "cpu", torch.float32, 1e-4)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("setup", NORMED, ids=str)
def test_blocks_that_have_few_columns_or_none(setup, size, monkeypatch):
    """61 features are 16 quads; 45 are 12, of which the last two of eight blocks have none."""
    twin = CudaExecutor(BlockLimits(H100, 132, clusters=(size,)))
    monkeypatch.setattr(executors, "_EXECUTORS", [twin])
    check_against_oracle(make_learner(setup, backend=twin.name), make_tasks(setup).to(torch.float64), 1e-9)


def test_a_task_that_needs_a_cluster_gets_the_smallest():
    def chosen(hidden, queries=5):
        setup = Setup("", lambda: models.mlp(nn.ReLU, (16, hidden, hidden, 5)), (16,), 5, support=10)
        learner, tasks = make_learner(setup, torch.float32), make_tasks(setup)
        shapes = tasks.shapes._replace(query_x=torch.Size((len(tasks), queries, 16)))
        return executor.shared_memory(learner.program, shapes)[0]

    executor = CudaExecutor(BlockLimits(H100, 132))
    assert [chosen(hidden) for hidden in (64, 128, 200, 256)] == [1, 2, 4, 8]
    assert chosen(64, queries=500) == 8


def test_a_task_in_eight_blocks(monkeypatch):
    twin = CudaExecutor(BlockLimits(H100, 132))
    monkeypatch.setattr(executors, "_EXECUTORS", [twin, ReferenceExecutor()])
    learner, tasks = make_learner(WIDE, torch.float32, twin.name), make_tasks(WIDE, tasks=1)
    check_against_oracle(learner, tasks, 1e-4)
    assert "CUDA C++, a cluster of 8 blocks for each task, " in learner.explain()
    reason = refusal(twin, learner.program, tasks.support_x, queries=60)
    assert "KiB of shared memory in each of 8 blocks and a block has 227 KiB" in reason


@pytest.mark.parametrize("inputs", [12_000, 20_000])
def test_a_layer_of_gigabytes_is_refused(inputs):
    with torch.device("meta"):
        model = nn.Linear(inputs, 9000)
    program = capture(model, as_loss("mse"), torch.empty(3, inputs, device="meta"), adapt={"weight", "bias"}, steps=1)
    assert "memory" in refusal(CudaExecutor(BlockLimits(H100, 132)), program, torch.empty(2, 3, inputs))


def test_a_query_set_that_does_not_fit_goes_to_the_next_executor(monkeypatch):
    twin, setup = CudaExecutor(BlockLimits(30_000, 132, clusters=(1,))), OWN[1]
    monkeypatch.setattr(twin, "proven", True)
    monkeypatch.setattr(executors, "_EXECUTORS", [twin, ReferenceExecutor()])
    learner = make_learner(setup, backend="auto")
    for queries, chosen in ((4, "cuda"), (40, "reference")):
        check_against_oracle(learner, make_tasks(setup, query=queries).to(torch.float64), 1e-9)
        assert learner.explain().startswith(f"executor: {chosen} ")
    assert "passed over cuda: a task takes 34 KiB of shared memory and a block has 29 KiB" in learner.explain()
    with pytest.raises(RuntimeError, match="34 KiB"):
        make_learner(setup, backend="cuda")(make_tasks(setup, query=40).to(torch.float64))


@pytest.mark.parametrize("threads", [-32, 48, 512])
def test_a_block_has_whole_warps(threads):
    learner, tasks = make_learner(OWN[1]), make_tasks(OWN[1]).to(torch.float64)
    with pytest.raises(ValueError, match=f"threads={threads}: a block has 32, 64, ... or 256 threads"):
        parts(CudaExecutor(BlockLimits(H100, 1, threads)), learner, tasks)


def test_without_a_gpu_it_says_what_it_needs():
    learner, tasks = make_learner(OWN[1]), make_tasks(OWN[1])
    assert refusal(CudaExecutor(), learner.program, tasks.support_x) == "device cpu: it runs on NVIDIA GPUs"
