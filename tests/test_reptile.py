"""Reptile against plain training of each task."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from setups import grads, perceptron, regression
from torch.func import functional_call

import metafast as mf


def by_hand(model, tasks, t, steps, rate, optimizer="sgd"):
    """The parameters of one task after plain training."""
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    if optimizer == "adam":
        inner = torch.optim.Adam(theta.values(), lr=rate, betas=(0.0, 0.999))
    else:
        inner = torch.optim.SGD(theta.values(), lr=rate)
    for _ in range(steps):
        inner.zero_grad()
        F.mse_loss(functional_call(model, theta, (tasks.support_x[t],)), tasks.support_y[t]).backward()
        inner.step()
    return {n: p.detach() for n, p in theta.items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_reptile_is_plain_training_averaged(optimizer):
    model, tasks = perceptron(), regression()
    learner = mf.Reptile(model, loss="mse", lr=0.05, steps=4, optimizer=optimizer)
    out = learner.backward(tasks)
    finals = [by_hand(model, tasks, t, 4, 0.05, optimizer) for t in range(4)]
    for name, p in model.named_parameters():
        expected = p.detach() - torch.stack([f[name] for f in finals]).mean(0)
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-11)
    for t in range(4):
        y = functional_call(model, finals[t], (tasks.query_x[t],))
        torch.testing.assert_close(out.outputs[t], y, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(out.losses[t], F.mse_loss(y, tasks.query_y[t]), rtol=1e-9, atol=1e-10)


def test_serial_reptile_is_a_batch_of_one_task():
    model, tasks = perceptron(), regression()
    learner = mf.Reptile(model, loss="mse", lr=0.05, steps=3, optimizer="adam")
    learner.backward(tasks)
    together = grads(learner)
    learner.zero_grad()
    for t in range(4):
        learner.backward(tasks.tasks(slice(t, t + 1)))
    torch.testing.assert_close([g / 4 for g in grads(learner)], together, rtol=1e-11, atol=1e-13)


def test_sgd_with_rate_epsilon_is_the_outer_step_of_reptile():
    model, tasks = perceptron(), regression(tasks=2)
    learner = mf.Reptile(model, loss="mse", lr=0.05, steps=3)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    finals = [by_hand(model, tasks, t, 3, 0.05) for t in range(2)]
    learner.backward(tasks)
    torch.optim.SGD(learner.parameters(), lr=0.25).step()
    for name, p in model.named_parameters():
        mean = (finals[0][name] + finals[1][name]) / 2
        torch.testing.assert_close(p.detach(), start[name] + 0.25 * (mean - start[name]), rtol=1e-9, atol=1e-11)


def test_minibatches_of_reptile_go_once_through_the_support_set():
    """At a vanishing rate three steps on thirds add up to three steps on all samples, and one step does not."""
    model, tasks = perceptron(), regression(support=6)

    def moved(**options):
        learner = mf.Reptile(model, loss="mse", lr=1e-6, **options)
        learner.backward(tasks)
        found = torch.cat([g.flatten() for g in grads(learner)]) / 1e-6
        learner.zero_grad()
        return found

    whole = moved(steps=3)
    torch.testing.assert_close(moved(steps=3, batch_size=2), whole, rtol=1e-4, atol=1e-5)
    assert float((moved(steps=1, batch_size=2) - whole / 3).norm()) > 0.1 * float(whole.norm())
    assert torch.equal(moved(steps=3, batch_size=6), whole)
    assert torch.equal(moved(steps=3, batch_size=100), whole)
