"""Ragged tasks and losses that Python computes, on the native executor: against the oracle."""

from __future__ import annotations

import models
import pytest
import torch
from setups import IMAGE, SETUPS, Setup, images, log_cosh, make_learner, make_tasks, rate, smoothed, vectors
from test_meta_gradients import assert_gradients, check_against_oracle, close, gradients
from torch import nn

import metafast as mf
from metafast.executors import CpuExecutor
from metafast.kernels.mse import MSE

pytestmark = pytest.mark.skipif(not CpuExecutor.isas(), reason="metafast._C is not built")


def painter():
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1))


def of_mean_colours(outputs, targets):
    return torch.log(torch.cosh(outputs.mean((2, 3)) - targets)).mean()


def absolute(outputs, targets):
    return (outputs - targets).abs().mean()


OWN = [
    vectors("custom loss, Meta-SGD", loss=log_cosh, learner=mf.MetaSGD, lr=(0.02, 0.1), steps=3),
    vectors("custom loss, rates of steps", loss=log_cosh, step_weights=[0.2, 0.3, 0.5], lr=rate("step"), steps=3),
    vectors("custom loss, first order, learned rate", loss=log_cosh, first_order=True, lr=rate("parameter"), steps=3),
    vectors("custom loss, first order, biases adapted", loss=log_cosh, first_order=True, lr=rate("parameter"),
            adapt=["0.bias", "4.bias"]),
    vectors("custom loss, FOMAML", loss=log_cosh, learner=mf.FOMAML, steps=3),
    vectors("custom loss without curvature", loss=absolute, steps=3),
    vectors("custom loss, only biases adapted", loss=log_cosh, adapt=["0.bias", "4.bias"]),
    images("custom loss, ANIL", models.Embedded, loss=smoothed, learner=mf.ANIL, head="classifier", steps=3),
    images("custom loss, batch norm per step", models.convnet, loss=smoothed, bn="per_step", steps=3),
    Setup("custom loss of images", painter, IMAGE, loss=of_mean_colours, options={"steps": 3}),
    vectors("ragged, Meta-SGD", learner=mf.MetaSGD, lr=(0.02, 0.1), steps=3, ragged=True),
    vectors("ragged, first order, learned rate", first_order=True, lr=rate("step"), steps=3, ragged=True),
    images("ragged, per step", models.convnet, bn="per_step", steps=3, step_weights=[0.2, 0.3, 0.5], ragged=True),
    images("ragged, batch norm running", models.convnet, bn="running", ragged=True),
    images("ragged, residual", models.Residual, ragged=True),
]  # fmt: skip
RUNS = OWN + [s for s in SETUPS if s.ragged or s.loss]


@pytest.mark.parametrize("setup", RUNS, ids=str)
def test_float64(setup):
    learner, tasks = make_learner(setup, backend="cpu"), make_tasks(setup).to(torch.float64)
    check_against_oracle(learner, tasks, 1e-9)
    by_autograd = gradients(learner)
    learner.zero_grad()
    if setup.options.get("bn") != "running":  # whose statistics have moved
        learner.backward(tasks)
        assert_gradients(gradients(learner), by_autograd, 1e-12)


@pytest.mark.parametrize("setup", RUNS, ids=str)
def test_float32(setup):
    check_against_oracle(make_learner(setup, torch.float32, "cpu"), make_tasks(setup), 1e-4)


class Slow(MSE):
    """MSE without rules in C++."""

    kind = "slow"


@pytest.mark.parametrize("ragged", [False, True])
def test_a_loss_in_python_gives_what_it_gives_in_cpp(ragged):
    setup = images("ragged", models.convnet, loss="mse", steps=3, lr=rate("step"), ragged=ragged)
    tasks = make_tasks(setup).to(torch.float64)
    labels = (torch.nn.functional.one_hot(y, 3).double() for y in (tasks.support_y, tasks.query_y))
    support_y, query_y = labels
    tasks = mf.TaskBatch(tasks.support_x, support_y, tasks.query_x, query_y, tasks.support_mask, tasks.query_mask)
    found = []
    for loss in ("mse", Slow()):
        torch.manual_seed(1)
        learner = make_learner(
            images("", models.convnet, loss=loss, steps=3, lr=rate("step")), backend="cpu", tasks=tasks
        )
        out = learner.backward(tasks)
        found.append((out, gradients(learner)))
    (fast, expected), (slow, slow_gradients) = found
    close(slow.losses, fast.losses, 1e-12)
    close(slow.outputs, fast.outputs, 1e-12)
    assert_gradients(slow_gradients, expected, 1e-12)


def test_padding_may_hold_anything():
    setup = next(s for s in RUNS if s.name == "batch norm of the task, ragged")
    learner, tasks = make_learner(setup, backend="cpu"), make_tasks(setup).to(torch.float64)
    learner.backward(tasks)
    expected = gradients(learner)
    for x, mask in ((tasks.support_x, tasks.support_mask), (tasks.query_x, tasks.query_mask)):
        x[~mask] = 1e3
    learner.zero_grad()
    out = learner.backward(tasks)
    assert all(torch.equal(g, expected[n]) for n, g in gradients(learner).items())
    assert out.outputs[~tasks.query_mask].count_nonzero() == 0


@pytest.mark.parametrize("name", ["batch norm of the task, ragged", "residual, custom loss"])
def test_same_bits_for_any_number_of_threads(name):
    setup = next(s for s in RUNS if s.name == name)
    learner, tasks = make_learner(setup, torch.float32, "cpu"), make_tasks(setup)
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        try:
            learner.zero_grad()
            learner.backward(tasks)
        finally:
            torch.set_num_threads(1)
        found.append(gradients(learner))
    assert all(torch.equal(g, found[0][n]) for other in found[1:] for n, g in other.items())


def test_adapting_to_ragged_tasks():
    setup = next(s for s in RUNS if s.name == "batch norm of the task, ragged")
    tasks, found = make_tasks(setup).to(torch.float64), []
    for backend in ("cpu", "reference"):
        torch.manual_seed(1)
        adapted = make_learner(setup, backend=backend).adapt(tasks.support_x, tasks.support_y, 4, tasks.support_mask)
        found.append(adapted.parameters)
    close(*found, 1e-12)


def test_explain_tells_how_a_meta_gradient_goes_through_memory():
    learner, x = make_learner(images("", models.convnet), torch.float32, "cpu"), torch.randn(3, 5, *IMAGE)
    assert "1 task at a time, activations kept, peak " in learner.explain(x)
    custom = make_learner(images("", models.convnet, loss=smoothed), torch.float32, "cpu")
    assert "activations computed again" in custom.explain(x)
