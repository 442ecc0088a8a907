"""Inner steps with momentum and weight decay, against torch.optim.SGD and against autograd in float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_settings import Wasteful, batch, maml, normed, small
from torch import nn
from unrolled import unrolled

import metafast as mf

RULES = [
    mf.SGD(),
    mf.SGD(momentum=0.9),
    mf.SGD(momentum=0.5, nesterov=True),
    mf.SGD(weight_decay=0.2),
    mf.SGD(momentum=0.9, nesterov=True, weight_decay=0.1),
]


def along(rule):
    """The direction of a step, as torch.optim.SGD's page writes it."""

    def direction(theta, g, kept):
        g = g + rule.weight_decay * theta
        kept["v"] = rule.momentum * kept["v"] + g if "v" in kept else g
        return g + rule.momentum * kept["v"] if rule.nesterov else kept["v"]

    return direction


class Wave(nn.Module):
    """Has operations without rules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.sinh(self.body(x)).cumsum(-1) * 0.3)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "make", [small, lambda: Wasteful().double(), lambda: Wave().double()], ids=["small", "spare", "wave"]
)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_meta_gradients_are_those_of_autograd(rule, make, backend):
    learner, tasks = maml(make, inner=rule, steps=3, backend=backend), batch()
    total, wanted, _ = unrolled(learner.model, tasks, F.cross_entropy, 0.1, 3, (), along(rule))
    for run in (
        learner.backward,
        lambda t: learner(t).loss.backward(),
        lambda t: learner(t, create_graph=True).loss.backward(),
    ):
        learner.zero_grad()
        run(tasks)
        for name, p in learner.model.named_parameters():
            found = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(found, wanted[name], rtol=1e-9, atol=1e-12, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(learner(tasks).loss, total)
        out = learner.backward(tasks)
    torch.testing.assert_close(out.loss, total)
    assert not out.losses.requires_grad


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_adapted_models_are_those_of_torchs_optimiser(rule):
    learner, tasks = maml(small, inner=rule, steps=4, adapt=["0", "head.bias"]), batch()
    fast = learner.adapt(tasks.support_x, tasks.support_y)
    for t in range(len(tasks)):
        own = copy.deepcopy(learner.model)
        moved = [*own[0].parameters(), own.head.bias]
        optimiser = torch.optim.SGD(
            moved, lr=0.1, momentum=rule.momentum, nesterov=rule.nesterov, weight_decay=rule.weight_decay
        )
        for _ in range(4):
            optimiser.zero_grad()
            F.cross_entropy(own(tasks.support_x[t]), tasks.support_y[t]).backward()
            optimiser.step()
        torch.testing.assert_close(fast(tasks.query_x)[t], own(tasks.query_x[t]).detach(), rtol=1e-10, atol=1e-12)


def test_learned_rates_and_batch_norm_and_first_order():
    rule = mf.SGD(momentum=0.9)
    learner, tasks = maml(inner=rule, lr=mf.Rate(0.1, "step", learn=True), steps=3), batch()
    learner.backward(tasks)
    value = learner.rate.value.detach().clone().requires_grad_()
    names = [n for n, _ in learner.model.named_parameters()]
    by_name = {n: value.reshape(3, 1, 1) if n.endswith("weight") else value for n in names}
    _, _, (of_rates,) = unrolled(learner.model, tasks, F.cross_entropy, by_name, 3, (value,), along(rule))
    torch.testing.assert_close(learner.rate.value.grad, of_rates, rtol=1e-9, atol=1e-12)
    for cls in (mf.MAMLPlusPlus, mf.FOMAML, mf.MetaSGD):
        assert all(p.grad is not None for p in _trained(maml(normed, cls, inner=rule, lr=0.05)).rate.parameters())


def _trained(learner):
    learner.backward(batch())
    return learner


def test_the_rule_is_a_setting():
    learner, tasks = maml(steps=3), batch()
    plain = learner(tasks).losses
    learner.inner = mf.SGD(momentum=0.9)
    assert not torch.allclose(learner(tasks).losses, plain)
    assert "inner steps: SGD(momentum=0.9" in learner.explain()
    assert "one by one" in learner.graph_obstacle(tasks)
    twin = pickle.loads(pickle.dumps(learner))
    assert torch.equal(twin(tasks).losses, learner(tasks).losses)
    with pytest.raises(TypeError, match=r"inner='adam': give a rule"):
        learner.inner = "adam"
    learner.inner = mf.SGD()
    assert torch.equal(learner(tasks).losses, plain)
    assert "inner steps" not in learner.explain()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"momentum": "0.9"}, "momentum='0.9'"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"weight_decay": float("inf")}, "weight_decay=inf"),
        ({"nesterov": True}, "needs a momentum"),
        ({"nesterov": 1, "momentum": 0.9}, "nesterov=1"),
    ],
)
def test_options_out_of_their_range_are_refused(options, text):
    with pytest.raises((TypeError, ValueError), match=text):
        mf.SGD(**options)
