"""Steps by rules on the Triton executor: their kernels against autograd, meta-gradients against the reference."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

import models
import torch
from setups import images, make_learner, make_tasks, rate, vectors
from test_triton import (  # the fixtures act by being here
    DEVICE,
    SMALL,
    _executor,  # noqa: F401
    _memory_full_of_nan,  # noqa: F401
    _quick,  # noqa: F401
    _use,
    executor,
)

import metafast as mf
from benchmarks.gpu import counts
from metafast.bench.workloads import workload
from metafast.executors.base import Executor
from metafast.executors.triton.rules import TritonRule, lower_rule
from metafast.kernels.rules.cases import CASES
from metafast.tasks import TaskBatch

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
TASKS = 3


def rule_of(case):
    return getattr(mf, case.rule)(**case.options)


def rows_of(rule, size, wide):
    """The hyper-parameters as numbers, or for each parameter others."""
    values = [0.1, *(float(getattr(rule, name)) for name in rule.hyper_names[1:])]
    rows = torch.tensor(values, dtype=torch.float64)[:, None]
    if wide:
        rows = rows * (1 - 0.1 * torch.rand(len(rows), size, dtype=torch.float64))
        if rule.max_norm is not None:  # it is that of the whole gradient
            rows[rule.hyper_names.index("max_norm")] = rule.max_norm
    return rows


def point(rule, size):
    """``z``, the gradient, which parameters move, and an adjoint; some have never had a gradient."""
    width = (1 + len(rule.states)) * size
    z, gradient, v = torch.randn(TASKS, width), torch.randn(TASKS, size), torch.randn(TASKS, width)
    moved = torch.rand(size) < 0.8
    moved[: size // 8 + 1] = True
    if len(rule.states) == 2:
        z[:, 2 * size :].square_()
        z[:, size:][:, : size // 8], z[:, 2 * size :][:, : size // 8] = 0, 0
        gradient[:, : size // 8] = 0
    return z, gradient * moved, moved, v


def both(rule, at, rows, count):
    """Of the kernels, and of the rule in float64: the step, and the adjoints of its state, gradient and numbers."""
    z, gradient, moved, v = (t.to(DEVICE) for t in at)
    fused = lower_rule(rule)
    assert isinstance(fused, TritonRule)
    there = rows.to(DEVICE)
    step = fused.advance(z, gradient, there, count, moved)
    found = [step, *fused.advance_vjp(z, gradient, there, count, moved, v, True)]
    z, gradient, moved, v = (t.double() if t.is_floating_point() else t for t in at)
    step = rule.advance(z, gradient, rows, count, moved)
    return [t.cpu() for t in found], [step, *rule.advance_vjp(z, gradient, rows, count, moved, v, True)]


def assert_close(found, wanted, tolerance):
    """Relative errors of norms; that of a number against a sum of as many values of unit size and either sign."""
    terms = wanted[2].numel() / wanted[3].shape[1]
    for name, ours, theirs in zip(("step", "z", "gradient", "hyper"), found, wanted, strict=True):
        assert ours.shape == theirs.shape, name
        lines = zip(ours, theirs, strict=True) if name == "hyper" else [(ours, theirs)]
        for i, (a, b) in enumerate(lines):
            error, size = float((a - b).norm()), max(float(b.norm()), terms**0.5 if name == "hyper" else 1.0)
            assert error <= tolerance * size, f"{name} {i} is off by {error / size:.1e}, relatively"


@pytest.mark.parametrize("blocks", ["usual", "small"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_and_their_way_back(case, blocks, monkeypatch):
    if blocks == "small":
        _use(SMALL, monkeypatch)
    rule = rule_of(case)
    at, rows = point(rule, case.size), rows_of(rule, case.size, case.wide)
    assert_close(*both(rule, at, rows, case.count), case.tolerance)


@pytest.mark.parametrize("case", [c for c in CASES if "clipped" in c.name], ids=str)
def test_what_is_not_learned_changes_nothing_and_two_runs_are_equal_bit_by_bit(case):
    rule = rule_of(case)
    z, gradient, moved, v = (t.to(DEVICE) for t in point(rule, case.size))
    rows, fused = rows_of(rule, case.size, case.wide).to(DEVICE), lower_rule(rule)
    runs = [fused.advance_vjp(z, gradient, rows, case.count, moved, v, learns) for learns in (True, True, False)]
    assert all(map(torch.equal, runs[0], runs[1]))
    assert all(map(torch.equal, runs[0][:2], runs[2][:2]))
    assert runs[2].hyper is None
    shared = fused.advance(z[:1].expand(TASKS, -1), gradient, rows, case.count, moved)
    assert torch.equal(shared, fused.advance(z[:1].repeat(TASKS, 1), gradient, rows, case.count, moved))


@pytest.mark.parametrize("rule", [mf.SGD(max_norm=1.0), mf.Adam(max_norm=1.0, max_value=1.0)], ids=str)
def test_a_gradient_of_zero_has_finite_adjoints_and_nan_stays_in_its_task(rule):
    z, gradient, moved, v = point(rule, 20)
    z[:, 20:], gradient[0], gradient[1, 0] = 0, 0, float("nan")
    found, wanted = both(rule, (z, gradient, moved, v), rows_of(rule, 20, False), 1)
    for ours, theirs in zip(found[:3], wanted[:3], strict=True):
        assert bool(ours[0].isfinite().all())
        torch.testing.assert_close(ours[::2].double(), theirs[::2], rtol=1e-4, atol=1e-5)
        there = moved.repeat(ours.shape[1] // 20)  # autograd gives those that do not move NaN, too
        assert torch.equal(ours[1].isnan()[there], theirs[1].isnan()[there])
    assert bool(found[2][1].isnan().any())


def test_rules_without_kernels_stay_as_they_are():
    class Own(mf.SGD):
        def step(self, theta, gradient, state, hyper, count):
            return theta - hyper["lr"] * gradient.sign(), state

    for rule in (mf.Adam(amsgrad=True), mf.RMSprop(), mf.Adagrad(), Own()):
        assert lower_rule(rule) is rule


def of_each_step(tasks, steps):
    """The same queries, and other support sets for each step."""
    x, y = (torch.stack([t.roll(s, 0) for s in range(steps)]) for t in (tasks.support_x, tasks.support_y))
    return TaskBatch(x, y, tasks.query_x, tasks.query_y, each_step=True)


def check(setup, each_step=False):
    """The meta-gradient in all that is learned, against that of the reference in float64."""
    ours = make_learner(setup, torch.float32, "triton", device=DEVICE)
    truth = make_learner(setup)
    truth.load_state_dict(ours.state_dict())
    tasks = make_tasks(setup, tasks=3 if setup.ragged else 2, query=3)
    tasks = of_each_step(tasks, setup.options["steps"]) if each_step else tasks
    found, wanted = ours.backward(tasks.to(DEVICE)), truth.backward(tasks.to(torch.float64))
    torch.testing.assert_close(found.losses.cpu().double(), wanted.losses, rtol=1e-4, atol=1e-6)
    if not setup.ragged:
        torch.testing.assert_close(found.outputs.cpu().double(), wanted.outputs, rtol=1e-3, atol=1e-4)
    grads = {name: p.grad for name, p in ours.named_parameters()}
    for name, p in truth.named_parameters():
        assert (grads[name] is None) == (p.grad is None), name
        if p.grad is not None:
            error = grads[name].cpu().double() - p.grad
            assert float(error.norm()) <= 1e-4 * max(float(p.grad.norm()), 1e-2), name


def learned(value, *per):
    return mf.Rate(value, per, learn=True)


MOMENTUM = mf.SGD(momentum=learned(0.8, "layer"), dampening=0.1, weight_decay=learned(0.05), max_norm=learned(0.7))
BETAS = (learned(0.8, "step"), learned(0.9))
ADAM = mf.Adam(betas=BETAS, eps=learned(1e-3), weight_decay=learned(0.1), max_value=learned(0.2))
WHOLE = [
    vectors("momentum, learned", inner=MOMENTUM, lr=rate("step")),
    vectors("momentum, numbers", inner=mf.SGD(momentum=0.9, max_norm=0.5), steps=3, step_weights=[0.2, 0.3, 0.5]),
    vectors("Nesterov, only biases", inner=mf.SGD(momentum=learned(0.8), nesterov=True, max_value=0.3),
            adapt=["0.bias", "4.bias"]),
    vectors("Adam, learned", inner=ADAM, lr=rate("parameter"), steps=3),
    vectors("AdamW, first order", inner=mf.AdamW(betas=BETAS, weight_decay=learned(0.1), eps=1e-2), first_order=True),
    vectors("AdamW, ragged", inner=mf.AdamW(eps=1e-2, max_norm=1.0), ragged=True, lr=rate()),
    vectors("RMSprop, by autograd", inner=mf.RMSprop(eps=1e-2, max_norm=1.0), lr=rate("parameter"),
            adapt=["4.bias", "4.weight"]),
    vectors("truncated", inner=mf.SGD(momentum=learned(0.8, "step")), steps=4, truncate=2),
    vectors("plain, truncated", steps=3, truncate=1, lr=rate("step")),
    vectors("in segments", inner=mf.AdamW(betas=BETAS, eps=1e-2), steps=9, memory=24_000, lr=0.02),
    vectors("the state is learned", inner=mf.SGD(momentum=0.8), learn_state=True),
    images("batch norm per step", models.convnet, bn="per_step", inner=mf.SGD(momentum=learned(0.8), max_norm=1.0)),
]  # fmt: skip


@pytest.mark.parametrize("setup", WHOLE, ids=str)
def test_meta_gradients_are_those_of_the_reference(setup):
    check(setup)


@pytest.mark.parametrize(
    "setup",
    [
        vectors("momentum", inner=MOMENTUM, lr=rate("step"), steps=3),
        vectors("plain, learned rates", steps=3, lr=rate("parameter")),
        images("images, plain", models.convnet),
        vectors("in segments", inner=mf.SGD(momentum=0.8), steps=4, memory=12_000),
    ],
    ids=str,
)
def test_steps_with_samples_of_their_own(setup):
    check(setup, each_step=True)


@pytest.mark.parametrize("name", ["momentum, learned", "truncated"])
def test_one_call_equals_its_parts(name):
    setup = next(s for s in WHOLE if s.name == name)
    learner, tasks = make_learner(setup, torch.float32, "triton", device=DEVICE), make_tasks(setup, tasks=2).to(DEVICE)
    theta, rates = learner.flat_parameters().detach(), learner.inner_rates().detach()
    once = executor().meta_gradient(learner.program, learner.loop, (theta,), rates, tasks)
    parts = Executor.meta_gradient(executor(), learner.program, learner.loop, (theta,), rates, tasks)
    torch.testing.assert_close(once.losses, parts.losses)
    torch.testing.assert_close(once.grads[0], parts.grads[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(once.rates_grad, parts.rates_grad, rtol=1e-5, atol=1e-7)


class Own(mf.Rule):
    """A step that may do anything."""

    def step(self, theta, gradient, state, hyper, count):
        return theta - hyper["lr"] * gradient, state


def test_what_a_cuda_graph_can_hold():
    setup = vectors("any")
    learner, tasks = make_learner(setup, torch.float32, "triton", device=DEVICE), make_tasks(setup, tasks=2).to(DEVICE)
    for rule in (mf.SGD(), mf.SGD(momentum=0.9), mf.Adam(amsgrad=True), mf.RMSprop(), mf.Adagrad()):
        learner.inner = rule
        assert learner.graph_obstacle(tasks) is None
        assert learner.graph_obstacle(of_each_step(tasks, 2)) is None
    learner.truncate = 1
    assert learner.graph_obstacle(tasks) is None
    learner.inner = Own()
    assert "a rule of the user's" in learner.graph_obstacle(tasks)


STEPS = {
    "momentum": (mf.SGD(momentum=0.9), {"metafast_sgd": 1, "metafast_sgd_vjp": 1}),
    "clipped": (mf.SGD(momentum=0.9, max_norm=1.0), {"metafast_sgd": 1, "metafast_sgd_vjp": 1, "metafast_unclip": 1,
                                                     "metafast_gradient_squares": 2}),
    "Adam": (mf.Adam(), {"metafast_adam": 1, "metafast_adam_vjp": 1}),
}  # fmt: skip


@pytest.fixture
def _by_name(monkeypatch):
    """Kernels that are interpreted have no more to be described than a name."""
    monkeypatch.setattr(counts, "describe", lambda kernel, *rest: SimpleNamespace(name=kernel.__name__))


@pytest.mark.usefixtures("_by_name")
@pytest.mark.parametrize("name", STEPS)
def test_what_a_meta_step_launches(name):
    """One kernel a step each way, a few for a norm, and nothing that waits for the host or copies from it."""
    rule, kernels = STEPS[name]
    work = workload("omni5w1s-5")
    step = counts.meta_step(work, 90, rule)
    found = Counter(launch.name for launch in step.launches)
    assert {kernel: found[kernel] for kernel in kernels} == {kernel: n * work.steps for kernel, n in kernels.items()}
    passes, states = 2 * work.steps + 1, len(rule.states)
    expected = {"cat": passes + work.steps + 1, "add": work.steps, "mul": 2, "new_full": states, "constant_pad_nd": 1,
                "new_zeros": 3, "sum": 1, "index_copy_": 1, "index_select": 1}  # fmt: skip
    del step.operators["fill_"]  # of memory that these tests fill with NaN first
    assert step.operators == expected


@pytest.mark.usefixtures("_by_name")
@pytest.mark.parametrize("rule", [mf.RMSprop(), mf.Adam(amsgrad=True), mf.Adagrad(max_norm=1.0)], ids=str)
def test_rules_without_kernels_neither_wait_for_the_host_nor_copy_from_it(rule):
    operators = counts.meta_step(workload("sin25-5"), 90, rule).operators
    assert not {"_local_scalar_dense", "item", "copy_", "lift_fresh"} & set(operators)
