"""Whole programs against the oracle: what metafast is for."""

from __future__ import annotations

import copy
import itertools
import math

import hypothesis.strategies as st
import models
import pytest
import torch
from hypothesis import given, settings
from loops import meta_gradient
from oracle import directional_derivative
from setups import SETUPS, Setup, images, make_learner, make_oracle, make_tasks
from torch import nn

import metafast as mf
from metafast.executors import ReferenceExecutor

every_backend = pytest.mark.parametrize("backend", ["reference", "auto"])
every_setup = pytest.mark.parametrize("setup", SETUPS, ids=str)
EXACT = [s for s in SETUPS if "irst order" not in s.name and s.learner is not mf.FOMAML]


def gradients(learner):
    """Meta-gradients by the user's names; ``rate`` is the learned rate's."""
    named = {name: p.grad for name, p in learner.model.named_parameters()}
    named |= {key.replace("/", "."): p.grad for key, p in learner.rows.items()}
    return named | ({"rate": learner.rate.value.grad} if learner.rate.value.requires_grad else {})


def assert_gradients(found, expected, tolerance):
    """Each tensor against the norm of the whole gradient, and the whole against itself."""
    size = math.sqrt(sum(float(expected[n].norm()) ** 2 for n in found))
    assert size > 1e-3, "a gradient of nearly zero tests nothing"
    for name, g in found.items():
        g = torch.zeros_like(expected[name]) if g is None else g.double()
        error = float((g - expected[name]).norm())
        assert error <= tolerance * size, f"{name} is off by {error / size:.1e} of the gradient's norm"
        own = float(expected[name].norm())
        assert error <= 100 * tolerance * own or own < 1e-6 * size, (
            f"{name} is off by {error / own:.1e} of its own norm"
        )


def close(a, b, tolerance):
    a, b = a.detach().double(), b.detach().double()
    assert a.shape == b.shape
    assert float((a - b).norm()) <= tolerance * max(float(b.norm()), 1e-3)


def check_against_oracle(learner, tasks, tolerance, one_call=False):
    learner.zero_grad()
    out = learner.backward(tasks) if one_call else learner(tasks)
    oracle, rates, leaf = make_oracle(learner)  # after running statistics have taken in the batch
    truth = oracle.gradient(tasks, rates, rate=leaf)
    if not one_call:
        out.loss.backward()
    close(out.losses, truth.losses, tolerance)
    for t, expected in enumerate(truth.outputs):
        kept = out.outputs[t] if tasks.query_mask is None else out.outputs[t][tasks.query_mask[t]]
        close(kept, expected, tolerance)
    assert_gradients(gradients(learner), truth.grads, tolerance)


@every_backend
@every_setup
def test_float64(setup, backend):
    learner = make_learner(setup, backend=backend)
    check_against_oracle(learner, make_tasks(setup).to(torch.float64), 1e-9)


@every_backend
@every_setup
def test_float32(setup, backend):
    check_against_oracle(make_learner(setup, torch.float32, backend), make_tasks(setup), 1e-4)


@every_setup
def test_one_task(setup):
    check_against_oracle(make_learner(setup), make_tasks(setup, tasks=3).to(torch.float64).tasks(slice(0, 1)), 1e-9)


@every_setup
def test_the_three_ways_to_a_gradient_agree(setup):
    learner, tasks = make_learner(setup), make_tasks(setup).to(torch.float64)
    start = copy.deepcopy(learner.state_dict())
    out = learner(tasks)
    out.loss.backward()
    by_autograd = gradients(learner)
    learner.zero_grad()
    learner.load_state_dict(start)  # running statistics
    direct = learner.backward(tasks)
    in_one_call = gradients(learner)
    close(direct.losses, out.losses, 1e-12)
    close(direct.outputs, out.outputs, 1e-12)
    found = {n: g for n, g in in_one_call.items() if g is not None}
    assert_gradients(found, {n: by_autograd[n] for n in found}, 1e-12)
    if not learner.first_order:
        learner.zero_grad()
        learner.load_state_dict(start)
        learner(tasks, create_graph=True).loss.backward()
        recorded = {n: g for n, g in gradients(learner).items() if g is not None}
        assert_gradients(recorded, {n: by_autograd[n] for n in recorded}, 1e-11)


@pytest.mark.parametrize("setup", EXACT, ids=str)
def test_a_direction_by_finite_differences(setup):
    learner, tasks = make_learner(setup), make_tasks(setup).to(torch.float64)
    learner(tasks).loss.backward()
    leaves = [p for p in learner.parameters() if p.grad is not None]
    directions = [torch.randn_like(p) for p in leaves]
    starts = [p.detach().clone() for p in leaves]

    def loss(along):
        with torch.no_grad():
            for p, start, d in zip(leaves, starts, directions, strict=True):
                p.copy_(start + along * d)
            return learner(tasks).loss

    found = sum(float((p.grad * d).sum()) for p, d in zip(leaves, directions, strict=True))
    expected = float(directional_derivative(loss, torch.tensor(0.0), torch.tensor(1.0, dtype=torch.float64)))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-8)


@every_setup
def test_hessian_is_symmetric_and_right(setup):
    learner, tasks = make_learner(setup), make_tasks(setup).to(torch.float64)
    program = learner.program
    u, v = (torch.randn(len(tasks), program.size, dtype=torch.float64) * program.adapted for _ in range(2))
    theta = learner.flat_parameters().detach()
    hu, hv = (ReferenceExecutor().hvp(program, theta, tasks.support, along) for along in (u, v))
    uhv, vhu = (u * hv).sum(1), (v * hu).sum(1)
    assert float(uhv.abs().max()) > 1e-6
    close(uhv, vhu, 1e-10)
    if not setup.ragged:
        oracle, _, _ = make_oracle(learner)
        named = [p.name for p in program.parameters]
        direction = dict(zip(named, program.unflatten(u[1]), strict=True))
        expected = oracle.hessian_vector(tasks.support_x[1], tasks.support_y[1], direction)
        close(hu[1], torch.cat([expected[n].flatten() for n in named]), 1e-9)


@every_setup
def test_chunks_of_tasks_change_nothing(setup):
    learner, tasks = make_learner(setup), make_tasks(setup).to(torch.float64)
    results = [
        meta_gradient(
            ReferenceExecutor(budget), learner.program, learner.flat_parameters().detach(), learner.rate().detach(),
            tasks, learner.steps, step_weights=learner.step_weights, first_order=learner.first_order,
        )
        for budget in (1, 2 << 30)
    ]  # fmt: skip
    for part in ("losses", "outputs", "grad", "rates_grad"):
        close(getattr(results[0], part), getattr(results[1], part), 1e-12)


def test_weights_of_tasks():
    """Any function of ``out.losses`` can be differentiated."""
    setup = SETUPS[1]
    learner, tasks = make_learner(setup), make_tasks(setup).to(torch.float64)
    weights = torch.tensor([0.2, -1.5, 3.0], dtype=torch.float64)
    oracle, rates, _ = make_oracle(learner)
    losses, _ = oracle.losses(tasks, rates)
    loss = (weights * losses**2).sum()
    expected = dict(zip(oracle.parameters, torch.autograd.grad(loss, list(oracle.parameters.values())), strict=True))
    (weights * learner(tasks).losses ** 2).sum().backward()
    assert_gradients(gradients(learner), expected, 1e-9)


def test_gradients_add_up():
    setup = SETUPS[7]
    learner, tasks = make_learner(setup), make_tasks(setup).to(torch.float64)
    learner.backward(tasks)
    once = {n: g.clone() for n, g in gradients(learner).items()}
    learner.backward(tasks)
    learner(tasks).loss.backward()
    assert_gradients({n: g / 3 for n, g in gradients(learner).items()}, once, 1e-12)


@pytest.mark.parametrize("setup", [SETUPS[1], SETUPS[7]], ids=str)
def test_a_second_differentiation_is_refused(setup):
    learner, tasks = make_learner(setup), make_tasks(setup).to(torch.float64)
    loss = learner(tasks).loss
    (gradient,) = torch.autograd.grad(loss, learner.model[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated once.*create_graph=True"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", ["MAML, 3 steps", "Meta-SGD", "rate for each step", "multi-step loss", "custom loss",
                                  "PReLU, derived", "direct parameters", "batch norm of the task", "residual",
                                  "ANIL, learned rate", "ragged regression"])  # fmt: skip
def test_create_graph_can_be_differentiated_again(name):
    setup = next(s for s in SETUPS if s.name == name)
    learner, tasks = make_learner(setup), make_tasks(setup).to(torch.float64)
    oracle, rates, leaf = make_oracle(learner)
    theirs = {**oracle.parameters, "rate": leaf}
    ours = {**dict(learner.model.named_parameters()), "rate": learner.rate.value}
    if not learner.rate.value.requires_grad:
        del theirs["rate"], ours["rate"]
    directions = {n: torch.randn_like(p) for n, p in theirs.items()}

    def second(loss, leaves):
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        along = sum((g * directions[n]).sum() for n, g in zip(leaves, grads, strict=True))
        return dict(zip(leaves, torch.autograd.grad(along, list(leaves.values()), materialize_grads=True), strict=True))

    expected = second(oracle.losses(tasks, rates)[0].mean(), theirs)
    assert_gradients(second(learner(tasks, create_graph=True).loss, ours), expected, 1e-9)


def test_running_statistics_move_as_torch_moves_them():
    setup = next(s for s in SETUPS if s.name == "batch norm running")
    learner, tasks = make_learner(setup), make_tasks(setup).to(torch.float64)
    torch_model = setup.model().double()
    torch_model.load_state_dict(learner.model.state_dict())
    torch_model.train()
    torch_model(tasks.support_x.flatten(0, 1))
    learner.backward(tasks)
    moved = learner.model.state_dict()
    assert not torch.equal(moved["1.running_mean"], torch.zeros(4))
    # Behind the first norm the values depend on its mode, so only the first can be compared with one pass of torch.
    close(moved["1.running_mean"], torch_model.state_dict()["1.running_mean"], 1e-12)
    close(moved["1.running_var"], torch_model.state_dict()["1.running_var"], 1e-12)


@pytest.mark.parametrize("shaped", [(), (nn.Flatten(),)], ids=["the samples", "flattened samples"])
def test_running_statistics_of_the_samples_themselves(shaped):
    """No operation comes before the norm."""
    sample = (1, 5, 2) if shaped else (10,)
    model, plain = nn.Sequential(*shaped, nn.BatchNorm1d(10), nn.Linear(10, 3)).double(), nn.BatchNorm1d(10).double()
    learner = mf.MAML(model, loss="cross_entropy", lr=0.1, bn="running")
    x, y = torch.randn(2, 6, *sample, dtype=torch.float64), torch.randint(3, (2, 6))
    learner.backward(mf.TaskBatch(x, y, x, y))
    plain(x.reshape(12, 10))
    close(model[-2].running_mean, plain.running_mean, 1e-12)
    close(model[-2].running_var, plain.running_var, 1e-12)


def test_running_statistics_that_moved_before_backward_are_noticed():
    setup = next(s for s in SETUPS if s.name == "batch norm running")
    learner, tasks = make_learner(setup), make_tasks(setup).to(torch.float64)
    first, second = learner(tasks), learner(tasks)
    with pytest.raises(RuntimeError, match=r"running statistics.*before the next batch"):
        (first.loss + second.loss).backward()


@pytest.mark.parametrize("bn", ["task", "per_step", "frozen"])
def test_other_modes_leave_the_running_statistics_alone(bn):
    setup = images(bn, models.convnet, bn=bn)
    learner, tasks = make_learner(setup), make_tasks(setup).to(torch.float64)
    before = {n: b.clone() for n, b in learner.model.named_buffers()}
    learner.backward(tasks)
    learner(tasks).loss.backward()
    learner.adapt(tasks.support_x, tasks.support_y)
    assert all(torch.equal(b, before[n]) for n, b in learner.model.named_buffers())


@st.composite
def perceptrons(draw):
    widths = draw(st.lists(st.integers(1, 9), min_size=2, max_size=5))
    activation = draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid, nn.LeakyReLU, nn.Softplus]))
    normed = draw(st.booleans())

    def model():
        layers = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b, bias=draw_bias), activation()] + [nn.LayerNorm(b)] * (normed and b > 2)
        return nn.Sequential(*layers, nn.Linear(widths[-1], 2))

    draw_bias = draw(st.booleans())
    return Setup(
        "random", model, (widths[0],), options={"steps": draw(st.integers(1, 3))}, support=draw(st.integers(1, 6))
    )


@st.composite
def convolutions(draw):
    channels = draw(st.lists(st.integers(1, 4), min_size=2, max_size=3))
    height, width = draw(st.integers(5, 11)), draw(st.integers(5, 11))
    blocks = [
        (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 1)),
         draw(st.booleans()), draw(st.sampled_from([None, nn.MaxPool2d, nn.AvgPool2d])))
        for _ in channels[1:]
    ]  # fmt: skip

    def model():
        layers, h, w = [], height, width
        for (a, b), (kh, kw, stride, padding, norm, pool) in zip(itertools.pairwise(channels), blocks, strict=True):
            kh, kw = min(kh, h + 2 * padding), min(kw, w + 2 * padding)
            layers.append(nn.Conv2d(a, b, (kh, kw), stride, padding))
            h, w = (h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1
            layers += [nn.BatchNorm2d(b)] * (norm and h * w >= 4) + [nn.Tanh()]
            if pool and min(h, w) >= 3:
                layers.append(pool(3, 2, 1))
                h, w = (h - 1) // 2 + 1, (w - 1) // 2 + 1
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * h * w, 3))

    steps = draw(st.integers(1, 2))
    return Setup(
        "random", model, (channels[0], height, width), 3, options={"steps": steps}, support=draw(st.integers(1, 4))
    )


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(setup=st.one_of(perceptrons(), convolutions()), seed=st.integers(0, 99))
def test_random_programs(setup, seed):
    for backend in ("reference", "auto"):
        torch.manual_seed(seed)
        learner = make_learner(setup, backend=backend)
        check_against_oracle(learner, make_tasks(setup).to(torch.float64), 1e-9)
