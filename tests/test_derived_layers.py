"""Derived layers of several learners, and in batches with padding."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from front_door.case import CLASSES, samples
from front_door.truth import LOSSES, Unrolled
from torch import nn

import metafast as mf


class Scattered(nn.Module):
    """torch.vmap has a wrong derivative of ``select_scatter``, and metafast finds that out for each learner."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        h = self.body(x)
        return self.head(h.select_scatter(torch.tanh(h[:, 1]), 1, 0).mean(1))


def learner_of(model: nn.Module) -> mf.MAML:
    return mf.MAML(model, loss="cross_entropy", lr=0.1, steps=2)


def assert_learns_right(learner: mf.MAML, model: nn.Module, tasks: mf.TaskBatch) -> None:
    """The gradient is that of a plain loop over the tasks."""
    truth = Unrolled(model, loss="cross_entropy", lr=0.1, steps=2).gradient(tasks)
    model.zero_grad()
    learner.backward(tasks)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, truth.grads[name], rtol=1e-9, atol=1e-12)


def test_an_equal_layer_of_a_learner_that_is_gone_leaves_nothing_behind():
    torch.manual_seed(0)
    model, tasks = Scattered().double(), samples(4, 8)()
    first, second = learner_of(model), learner_of(model)
    assert_learns_right(first, model, tasks)
    assert_learns_right(second, model, tasks)
    del first
    gc.collect()
    assert_learns_right(second, model, tasks)


class Waves(nn.Module):
    """Has no number where a sample holds none, and none for a sample of zeros: it divides by its length."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(torch.sin(self.body(x / x.norm(dim=1, keepdim=True))))


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def ragged(padding: float) -> mf.TaskBatch:
    """Regression tasks of different sizes, with ``padding`` in the samples and in the targets that do not count."""
    tasks = samples(8)()
    masks = [torch.arange(x.shape[1]) < torch.tensor([[6], [2], [4]]) for x in (tasks.support_x, tasks.query_x)]
    x = [torch.where(m[..., None], x, padding) for m, x in zip(masks, (tasks.support_x, tasks.query_x), strict=True)]
    return mf.TaskBatch(x[0], x[0][..., :CLASSES].clone(), x[1], x[1][..., :CLASSES].clone(), *masks)


@pytest.mark.parametrize("padding", [0.0, float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize(
    "loss", ["mse", nn.MSELoss(reduction="sum"), lambda o, y: F.huber_loss(o, y)], ids=["mse", "a sum", "huber"]
)
@pytest.mark.parametrize("make", [Waves, plain])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_padding_does_not_count_whatever_it_holds(make, loss, padding, backend):
    torch.manual_seed(0)
    model, tasks = make().double(), ragged(padding)
    truth = Unrolled(model, loss=LOSSES.get(loss, loss), lr=0.01, steps=2).gradient(tasks)
    learner = mf.MAML(model, loss=loss, lr=0.01, steps=2, backend=backend)
    for one_call in (False, True):
        model.zero_grad()
        if one_call:
            found = learner.backward(tasks).loss
        else:
            found = learner(tasks).loss
            found.backward()
        torch.testing.assert_close(found.detach(), truth.loss)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, truth.grads[name], rtol=1e-9, atol=1e-12)
