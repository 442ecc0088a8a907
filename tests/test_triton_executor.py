"""The Triton executor around its kernels: memory plans, precisions, bytes moved, the same bits twice, refusals."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("triton")

import torch
from loops import adapt, adapt_vjp, loop, meta_gradient, refusal
from setups import make_learner, make_tasks
from test_hvp import of_oracle
from test_layers import loss_rules
from test_triton import (  # the fixtures act by being here
    DEVICE,
    NETWORKS,
    SUITE,
    _executor,  # noqa: F401
    _quick,  # noqa: F401
    executor,
)
from torch import nn

from benchmarks.gpu import counts
from metafast.bench.workloads import workload
from metafast.executors.memory import choose_memory_plan, peak_bytes
from metafast.executors.triton import lowering
from metafast.executors.triton.executor import TritonExecutor
from metafast.kernels.cross_entropy import CrossEntropy
from metafast.kernels.primitives import products
from metafast.program.capture import capture
from metafast.program.interpreter import Pass
from metafast.program.losses import as_loss
from metafast.tasks import Batch, TaskBatch, TaskShapes

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def small_network(name="rate for each layer and step", support=5):
    """What an executor takes of a setup."""
    setup = replace(SUITE[name], support=support)
    learner, tasks = make_learner(setup, torch.float32, device=DEVICE), make_tasks(setup, tasks=2).to(DEVICE)
    return learner.program, learner.flat_parameters().detach(), learner.rate().detach(), tasks


def test_one_call_equals_its_parts_and_two_runs_are_equal_bit_by_bit():
    program, theta, rate, tasks = small_network("batch norm of the task")
    triton = executor()
    runs = [meta_gradient(triton, program, theta, rate, tasks, 1) for _ in range(2)]
    assert torch.equal(runs[0].grad, runs[1].grad)
    assert torch.equal(runs[0].losses, runs[1].losses)
    trajectory = adapt(triton, program, theta, rate, tasks.support, 1)
    losses, v, _ = triton.loss_and_grad(program, trajectory[-1], tasks.query, 1)
    grad, rates_grad = adapt_vjp(triton, program, trajectory, rate, tasks.support, v / 2)
    assert torch.equal(losses, runs[0].losses)
    torch.testing.assert_close(grad.sum(0), runs[0].grad, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(rates_grad, runs[0].rates_grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["rate for each layer and step", "batch norm of the task", "ANIL"])
def test_hessian_vector_products_agree_with_the_oracle(name):
    setup = replace(SUITE[name], support=5)
    learner, tasks = make_learner(setup, torch.float32, "reference"), make_tasks(setup, tasks=2)
    program, theta = learner.program, learner.flat_parameters().detach()
    u = torch.randn(2, program.size)
    wanted = of_oracle(learner, tasks.to(torch.float64), u.double() * program.adapted)
    found = executor().hvp(program, theta.to(DEVICE), tasks.to(DEVICE).support, u.to(DEVICE))
    assert float((found.cpu() - wanted).norm()) <= 1e-4 * float(wanted.norm())


def test_every_plan_gives_the_same_gradient():
    program, theta, rate, tasks = small_network(support=160)  # so that its memory is activations and not parameters
    free = executor()
    expected = meta_gradient(free, program, theta, rate, tasks, 2)
    whole = only_plan(free)
    assert (whole.chunk, whole.keep) == (2, True)
    tight = TritonExecutor(interpreted=DEVICE == "cpu", budget=1)
    found = meta_gradient(tight, program, theta, rate, tasks, 2)
    least = only_plan(tight)
    assert (least.chunk, least.keep) == (1, False)
    assert 0 < least.peak < whole.peak / 2  # half of the tasks, and no activations kept beside the sums over tasks
    for name in ("losses", "outputs", "grad", "rates_grad"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)


def only_plan(triton):
    (plan,) = triton.memory_plans.values()
    return plan


def test_bf16_halves_the_memory_of_activations_and_costs_accuracy():
    program, theta, rate, tasks = small_network("batch norm of the task")
    exact, rounded = executor(), executor().with_precision("bf16")
    expected, found = (meta_gradient(e, program, theta, rate, tasks, 1) for e in (exact, rounded))
    assert found.losses.dtype == found.outputs.dtype == found.grad.dtype == torch.float32
    for name in ("losses", "outputs", "grad"):
        a, b = getattr(found, name), getattr(expected, name)
        assert 1e-4 < float((a - b).norm() / b.norm()) < 0.1, name
    images = [torch.Size((2, n, 2, 64, 64)) for n in (25, 75)]
    shapes = TaskShapes.of_samples(torch.empty(images[0], device="meta"))
    shapes = shapes._replace(query_x=images[1], query_y=images[1][:2], devices=(torch.device(DEVICE),) * 2)
    layers = nn.Sequential(nn.Conv2d(2, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3))
    model = capture(layers, as_loss("mse"), torch.zeros(2, 2, 64, 64))
    peaks = []
    for triton in (executor(), executor().with_precision("bf16")):
        planned = triton.plan(model, loop(2), shapes, triton.precision)
        assert planned.memory() == str(only_plan(triton))
        peaks.append(only_plan(triton).peak)
    assert 0.45 < peaks[1] / peaks[0] < 0.6


def test_the_predicted_peak_is_that_of_the_run():
    """The prediction comes from a run without memory: here the tensors of a run with memory are counted instead."""
    program, theta, rate, tasks = small_network()
    planned, triton = executor(), executor()
    meta_gradient(planned, program, theta, rate, tasks, 3)
    triton.memory_plans = planned.memory_plans
    measured = peak_bytes(lambda: meta_gradient(triton, program, theta, rate, tasks, 3))
    assert 0.8 < only_plan(planned).peak / measured < 1.2


PLANS = [(10**6, 100, 32, True), (1700, 100, 3, True), (1700, 2, 2, True), (499, 100, 4, False), (1, 100, 1, False)]


@pytest.mark.parametrize(("budget", "most", "chunk", "keep"), PLANS)
def test_plans(budget, most, chunk, keep):
    plan = choose_memory_plan(lambda chunk, keep: chunk * (500 if keep else 100), 32, budget, most)
    assert (plan.chunk, plan.keep) == (chunk, keep)
    assert sum(len(range(32)[part]) for part in plan.chunks(32)) == 32


def test_precision_is_asked_for_by_name():
    setup = SUITE["batch norm of the task"]
    tasks = make_tasks(setup, tasks=1)
    learner = make_learner(
        replace(setup, options={"steps": 1, "precision": "bf16"}), torch.float32, "triton", device=DEVICE
    )
    assert "(bf16)" in learner.explain(tasks.support_x.to(DEVICE))
    derived = replace(SUITE["SiLU, derived"], options={"precision": "bf16"})
    with pytest.raises(RuntimeError, match="needs kernels for every layer"):
        make_learner(derived, torch.float32, "triton", device=DEVICE)


def test_a_label_outside_makes_its_task_nan_and_no_other():
    loss, z = lowering.triton_loss(CrossEntropy()), torch.randn(2, 4, 3, device=DEVICE)
    y = torch.tensor([[0, 1, 2, 1], [2, 10**12, 0, 1]], device=DEVICE)
    losses, g, _ = loss_rules(loss, z, y, z)
    assert losses[0].isnan().tolist() == [False, True]
    assert g[0].isnan().any(-1).tolist() == [[False] * 4, [False, True, False, False]]


LAUNCHING = ("batch_norm.kernel", "cross_entropy.kernel", "primitives.products", "primitives.row_reductions")
MODEL = {"forward": 2, "backward": 5, "jvp": 3, "hvp": 10}  # in units of all convolutions' outputs


def test_activations_are_read_and_written_as_often_as_the_model_says(monkeypatch):
    moved = 0

    def count(kernel, grid, *args, **options):
        nonlocal moved
        moved += sum(x.numel() * x.element_size() for x in args if isinstance(x, torch.Tensor))

    for name in LAUNCHING:
        monkeypatch.setattr(sys.modules[f"metafast.kernels.{name}"], "launch", count)
    monkeypatch.setattr(products, "processors", lambda device: 0)  # slices of K come on top
    work = workload("mini5w1s-5")
    program = capture(work.network(), as_loss(work.loss), work.draw().support_x[0])
    lowered = lowering.lower(program, "float32", torch.device("cpu")).program
    theta, x = torch.empty(4, lowered.size, device="meta"), torch.empty(4, 5, 84, 84, 3, device="meta")
    batch = Batch(x.movedim(-1, 2), torch.empty(4, 5, dtype=torch.int64, device="meta"))
    run = Pass(lowered, theta, batch, 0, (True,) * len(lowered.parameters))
    found = {}
    for phase in ("forward", "loss", "backward", "jvp", "hvp"):
        moved = 0
        getattr(run, phase)(*([theta] if phase == "jvp" else []))
        found[phase] = moved
    outputs = sum(4 * ctx.norm.x.numel() for ctx in run.contexts.values() if "norm" in vars(ctx))
    assert outputs == 4 * 4 * 5 * 32 * (84**2 + 42**2 + 21**2 + 10**2)
    for phase, times in MODEL.items():
        assert found[phase] < 1.5 * times * outputs, phase
    assert 15 * outputs < sum(found.values()) < 21 * outputs


MERGING = ("metafast_add_tiles", "metafast_merge_moments")


def test_what_a_meta_step_launches_beside_its_kernels(monkeypatch):
    merging = Counter()
    monkeypatch.setattr(
        sys.modules["metafast.kernels.primitives.row_reductions"],
        "launch",
        lambda kernel, *args, **options: merging.update([kernel.__name__]),
    )
    for name, merges in (("omni5w1s-5", 15), ("mini5w1s-5", 26)):
        work = workload(name)
        tasks, triton = work.draw(), TritonExecutor(budget=40 << 30)
        program = capture(work.network(), as_loss(work.loss), tasks.support_x[0])
        tasks = TaskBatch(*(x.to("meta") for x in (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)))
        theta, rate = torch.empty(program.size, device="meta"), torch.empty(1, 1, device="meta")
        meta_gradient(triton, program, theta, rate, tasks, work.steps, learns_rates=False)  # finds the plan
        merging.clear()
        operators = Counter()
        with counts.Operators(operators):
            meta_gradient(triton, program, theta, rate, tasks, work.steps, learns_rates=False)
        passes, steps = 2 * work.steps + 1, work.steps
        expected = {"cat": passes, "addcmul": steps, "add": steps, "mul": steps + 2, "neg": 1, "new_zeros": 3, "sum": 1,
                    "index_copy_": 1, "index_select": 1}  # fmt: skip
        expected |= {"clone": 2} if name.startswith("mini") else {}  # images with channels, into their memory order
        assert operators == expected
        assert sum(merging[kernel] for kernel in MERGING) <= merges


def test_refusals():
    program = make_learner(NETWORKS[0], torch.float32, "reference").program
    x = torch.zeros(1, 2, 1, 19, 16, device=DEVICE)
    assert refusal(executor(), program, x) is None
    assert "float64" in refusal(executor(), program, x.double())
    assert "ragged" in refusal(executor(), program, x, ragged=True)
    assert "needs an NVIDIA GPU" in refusal(TritonExecutor(), program, x.cpu())
    with pytest.raises(ValueError, match=r"half.*float32"):
        TritonExecutor(precision="half")
