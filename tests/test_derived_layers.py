"""What becomes of derived layers where several learners have equal ones, and of what their functions need."""

from __future__ import annotations

import gc

import torch
from front_door.case import CLASSES, samples
from front_door.truth import Unrolled
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
