"""What only a GPU can show of the CUDA executor. `pytest -m gpu` runs it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from block_checks import (
    check_a_full_device,
    check_labels_outside,
    check_one_launch,
    check_precisions,
    check_tasks_that_take_turns,
    check_the_parts_alone,
)
from loops import meta_gradient, refusal
from native_work import RULES, work
from setups import make_learner, make_tasks
from test_cuda_precision import BITS, FILLED, check_rounding
from test_cuda_twin import RESIDENT, RUNS, TURNS, WIDE, named
from test_meta_gradients import check_against_oracle, close

import metafast as mf
from metafast import executors
from metafast.executors.cuda_graphs import CudaGraph
from metafast.executors.native.cuda import CudaExecutor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
SINUSOID = named("sinusoid")
GPUS = {
    "threads chosen": CudaExecutor(),
    "32 threads": CudaExecutor(threads=32),
    "256 threads": CudaExecutor(threads=256),
    "2 blocks a task": CudaExecutor(clusters=(2,)),
    "8 blocks a task": CudaExecutor(clusters=(8,)),
}


def needs_clusters(size):
    if size > 1 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters of blocks need compute capability 9.0")


@pytest.fixture(params=GPUS)
def gpu(request, monkeypatch):
    executor = GPUS[request.param]
    needs_clusters(executor.clusters[0])
    monkeypatch.setattr(executors, "_EXECUTORS", [executor])
    return executor


def on_gpu(setup, count=3, **tasks):
    learner = make_learner(setup, torch.float32, "cuda", device="cuda")
    return learner, make_tasks(setup, tasks=count, **tasks).to("cuda")


@pytest.mark.parametrize("setup", RUNS, ids=str)
def test_float32(setup, gpu):
    check_against_oracle(*on_gpu(setup), 1e-4)


@pytest.mark.parametrize("learns_rates", [True, False])
@pytest.mark.parametrize("setup", RUNS, ids=str)
def test_one_launch(setup, learns_rates, gpu):
    check_one_launch(gpu, setup, "cuda", torch.float32, 1e-4, learns_rates)


@pytest.mark.parametrize("name", RULES)
def test_rules(name, gpu):
    given = work(RULES[name], width="step", dtype=torch.float32)
    wanted, found = given.meta_gradient(executors.ReferenceExecutor()), by_rule(gpu, given)
    close(found.losses.cpu(), wanted.losses, 1e-4)
    close(found.grads[0].cpu(), wanted.grads[0], 1e-3)
    assert torch.equal(found.grads[0], by_rule(gpu, given).grads[0])


def by_rule(gpu, given):
    tasks = given.tasks.to("cuda")
    return gpu.meta_gradient(given.program, given.loop, (given.params.cuda(),), given.rates.cuda(), tasks)


@pytest.mark.parametrize("rule", [mf.Adam(eps=1e-2, max_norm=0.5), mf.Adam(eps=1e-2, amsgrad=True)], ids=str)
@pytest.mark.parametrize("executor", [CudaExecutor(), executors.TritonExecutor()], ids=["blocks", "triton"])
def test_a_cuda_graph_holds_rules(executor, rule):
    """One that blocks run in one launch, and one whose steps are those of PyTorch."""
    given = work(rule, dtype=torch.float32)
    theta, rates, tasks = given.params.cuda(), given.rates.cuda(), given.tasks.to("cuda")
    arguments = given.program, given.loop, (theta,), rates, tasks
    expected = executor.meta_gradient(*arguments)
    graph = CudaGraph(lambda: tuple(executor.meta_gradient(*arguments).grads), theta.device)
    theta.zero_()
    graph.replay()
    moved = graph.result[0].clone()
    theta.copy_(given.params)
    graph.replay()
    close(graph.result[0], expected.grads[0], 1e-5)
    assert not torch.equal(graph.result[0], moved)


def test_a_query_loss_before_the_first_step(gpu):
    check_one_launch(gpu, named("classifier, multi-step"), "cuda", torch.float32, 1e-4, at_start=0.3)


@pytest.mark.parametrize("learns_rates", [True, False])
@pytest.mark.parametrize(("setup", "size"), TURNS, ids=str)
def test_tasks_that_take_turns(setup, size, learns_rates):
    needs_clusters(size)
    executor = CudaExecutor(clusters=(size,))
    check_tasks_that_take_turns(executor, setup, "cuda", torch.float32, 1e-4, learns_rates)


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("setup", RESIDENT, ids=str)
def test_a_full_device(setup, size):
    needs_clusters(size)
    check_a_full_device(CudaExecutor(clusters=(size,)), setup, "cuda", torch.float32, 1e-4)


def test_the_parts_alone(gpu):
    check_the_parts_alone(gpu, named("classifier"), "cuda", torch.float32, 1e-4)


def test_a_task_that_needs_a_cluster():
    executor = CudaExecutor()
    learner, tasks = on_gpu(WIDE, 40)
    if refusal(executor, learner.program, tasks.support_x):
        pytest.skip("eight blocks of this GPU are too small, or it has no clusters")
    assert executor.shared_memory(learner.program, tasks.shapes)[0] > 1
    check_against_oracle(learner, tasks, 1e-4)


def parts(gpu, learner, tasks):
    program, params = learner.program, learner.flat_parameters().detach()
    found = meta_gradient(gpu, program, params, learner.rate().detach(), tasks, learner.steps)
    return found.losses, found.outputs, found.grad, found.rates_grad


@pytest.mark.parametrize("clusters", [(1,), (2,)], ids=str)
@pytest.mark.parametrize("precision", BITS)
def test_operands_are_rounded(precision, clusters):
    needs_clusters(*clusters)
    check_rounding(CudaExecutor(clusters=clusters), precision, "cuda")


@pytest.mark.parametrize("clusters", [(1,), (2,), (8,)], ids=str)
@pytest.mark.parametrize("setup", FILLED, ids=str)
def test_three_products_are_as_exact_as_float32(setup, clusters):
    needs_clusters(*clusters)
    check_precisions(CudaExecutor(clusters=clusters), setup, "cuda", 1e-4)


@pytest.mark.parametrize("count", [1, 25, 1024, 4096])
def test_two_runs_give_the_same_bits(gpu, count):
    learner, tasks = on_gpu(SINUSOID, count)
    first, second = parts(gpu, learner, tasks), parts(gpu, learner, tasks)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("count", [25, 300])
def test_the_twin_agrees(gpu, count):
    if count > 25 and gpu.clusters[0] > 1:
        pytest.skip("the twin of a cluster is slow")
    learner, tasks = on_gpu(SINUSOID, count)
    found = parts(gpu, learner, tasks)
    twin = CudaExecutor(gpu.limits(tasks.support_x.device))
    expected = parts(twin, learner.cpu(), tasks.to("cpu"))
    for a, b in zip(found, expected, strict=True):
        assert float((a.cpu() - b).norm()) <= 1e-5 * float(b.norm())


def test_another_stream_is_respected(gpu):
    learner, tasks = on_gpu(SINUSOID, 64)
    expected = parts(gpu, learner, tasks)
    late = mf.TaskBatch(*(torch.full_like(x, math.nan) for x in tensors(tasks)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for to, x in zip(tensors(late), tensors(tasks), strict=True):
            to.copy_(x)
        found = parts(gpu, learner, late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def tensors(tasks):
    return tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y


def test_a_meta_gradient_can_be_captured_in_a_graph(gpu):
    learner, tasks = on_gpu(SINUSOID, 25)
    expected = parts(gpu, learner, tasks)
    parameters = list(learner.model.parameters())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = parts(gpu, learner, tasks)
    with torch.no_grad():
        before = [p.clone() for p in parameters]
        for p in parameters:
            p.mul_(1.5)
    graph.replay()
    assert not torch.equal(found[2], expected[2])
    with torch.no_grad():
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_shapes_that_are_new_are_not_captured(gpu):
    learner, tasks = on_gpu(SINUSOID, 25)
    with pytest.raises(RuntimeError, match="run them once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        parts(gpu, learner, tasks)
    assert parts(gpu, learner, tasks)[0].isfinite().all()


def test_what_lies_elsewhere_is_named(gpu):
    learner, tasks = on_gpu(SINUSOID)
    with pytest.raises(ValueError, match="lr is on another device than the tasks"):
        meta_gradient(gpu, learner.program, learner.flat_parameters().detach(), torch.ones(1, 1), tasks, learner.steps)


def test_a_launch_that_fails_is_named_and_leaves_the_next_alone(monkeypatch):
    executor = CudaExecutor(clusters=(1,))
    (wide, many), (learner, tasks) = on_gpu(WIDE), on_gpu(SINUSOID)
    machine = executor.limits(tasks.support_x.device)
    with monkeypatch.context() as patch:
        patch.setattr(executor, "limits", lambda device: replace(machine, shared=10 * machine.shared))
        with pytest.raises(RuntimeError, match=r"CUDA: metafast_inner_loop of 3 tasks, .* bytes on device 0"):
            parts(executor, wide, many)
    assert parts(executor, learner, tasks)[2].isfinite().all()


def test_labels_outside(gpu):
    check_labels_outside(gpu, named("classifier"), "cuda", torch.float32)
