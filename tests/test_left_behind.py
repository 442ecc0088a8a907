"""A loss that reads what a run of the model leaves behind is refused: it would be that of another run."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from front_door.case import Net, small, vectors
from front_door.truth import Unrolled

import metafast as mf


def maml(model, loss):
    return mf.MAML(model, loss=loss, lr=0.1, steps=2)


class Auxiliary(Net):
    def __init__(self, kept=0.0):
        super().__init__()
        self.auxiliary = kept

    def forward(self, x):
        h = torch.tanh(self.body(x))
        self.auxiliary = h.square().mean()
        return self.head(h)


def test_a_loss_that_reads_what_forward_leaves_is_refused():
    model = Auxiliary().double()
    learner = maml(model, loss=lambda z, y: F.cross_entropy(z, y) + model.auxiliary)
    with pytest.raises(ValueError, match=r"the loss reads 'auxiliary'.*Let forward return it"):
        learner.backward(vectors())
    assert model.auxiliary == 0.0


def test_a_loss_that_reads_what_a_hook_stores_is_refused():
    model, stored = small().double(), {}
    model[1].register_forward_hook(lambda module, inputs, output: stored.update(h=output))
    learner = maml(model, loss=lambda z, y: F.cross_entropy(z, y) + stored["h"].mean())
    with pytest.raises(ValueError, match="the loss reads 'h'"):
        learner.backward(vectors())


def test_what_forward_leaves_may_lie_there_where_no_loss_reads_it():
    model = Auxiliary().double()
    learner = maml(model, loss=lambda z, y: F.cross_entropy(z, y) + 0.1 * model.head.weight.square().sum())
    learner.backward(vectors())
    assert math.isfinite(model.auxiliary)
    captured = [learner.program]
    for _ in range(3):
        learner.backward(vectors())
        captured.append(learner.program)
    assert captured[-1] is captured[-2], "it is not captured again for each batch"


def test_a_loss_that_takes_out_what_a_hook_stores_is_refused_and_finds_it_as_it_was():
    model, stored = small().double(), {}
    model[1].register_forward_hook(lambda module, inputs, output: stored.update(h=output.detach()))
    learner = maml(model, loss=lambda z, y: F.cross_entropy(z, y) + stored.pop("h").mean())
    with pytest.raises(ValueError, match="the loss reads 'h'"):
        learner.backward(vectors())
    assert list(stored) == ["h"]
    assert isinstance(stored["h"], torch.Tensor)


class Cached(Net):
    mask = None

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.linspace(0, 1, 8, dtype=x.dtype)
        return self.head(torch.tanh(self.body(x)) * self.mask)


def test_a_loss_that_calls_the_model_finds_what_that_call_leaves():
    model, x = Cached().double(), torch.randn(4, 8, dtype=torch.float64)

    def loss(z, y):
        return F.cross_entropy(z, y) + 0.1 * model(x).square().mean()

    wanted = Unrolled(model, loss=loss, lr=0.1, steps=2).gradient(vectors())
    maml(model, loss=loss).backward(vectors())
    named = dict(model.named_parameters())
    for name, grad in wanted.grads.items():
        if named[name].grad is not None:
            torch.testing.assert_close(named[name].grad, grad, rtol=1e-8, atol=1e-11)
