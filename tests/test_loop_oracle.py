"""The truth of inner loops itself: its steps are those of torch.optim and torch.nn.utils."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from loop_oracle import Loop, Rule, root, support_of
from rule_cases import RULES, batch, convnet, maml, mlp, stepped, truth_of


@pytest.mark.parametrize("make", [mlp, convnet])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_its_steps_are_those_of_torchs_optimisers(rule, make):
    tasks = batch(5, sample=(4,) if make is mlp else (1, 4, 4), ragged=True)
    loop, _ = truth_of(maml(make, inner=rule, steps=5), F.cross_entropy)
    for t in range(len(tasks)):
        batches = support_of(tasks, t, 5)
        found = loop.adapt(batches)
        for step, (own, optimiser) in enumerate(stepped(loop.model, rule, 0.1, batches), 1):
            theta, state = found[step]
            for name, p in own.named_parameters():
                torch.testing.assert_close(theta[name].detach(), p.detach(), rtol=1e-14, atol=1e-14)
                for key, value in state[name].items():
                    torch.testing.assert_close(value.detach(), optimiser.state[p][key], rtol=1e-14, atol=1e-14)


def test_a_parameter_without_a_gradient_stays_as_it_is():
    model = mlp()
    rule = Rule("sgd", {"lr": 0.1, "weight_decay": 0.5, "dampening": 0})
    (theta, _), *_ = reversed(Loop(model, lambda z, y: F.mse_loss(z, y), 2, rule, ["0.weight"]).adapt(unlike(model)))
    assert torch.equal(theta["2.weight"], model[2].weight)
    assert not torch.equal(theta["0.weight"], model[0].weight)


def unlike(model):
    x = torch.randn(3, 4, dtype=torch.float64)
    return [(x, model(x).detach() + 1)] * 2


def test_truncation_is_a_constant_on_theta_0():
    """With a scalar theta and L = theta^2 / 2 a step multiplies by 1 - lr, and the cut by nothing."""

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

        def forward(self, x):
            return x * self.theta

    model, lr, x = One(), 0.1, torch.ones(1, 1, dtype=torch.float64)
    rule = Rule("sgd", {"lr": lr, "weight_decay": 0, "dampening": 0})
    for k in (0, 1, 3, 5, 9):
        loop = Loop(model, lambda z, y: z.square().sum() / 2, 5, rule, truncate=k)
        theta = loop.adapt([(x, x)] * 5)[-1][0]["theta"]
        torch.testing.assert_close(theta.detach(), 1.5 * torch.tensor(1 - lr, dtype=torch.float64) ** 5)
        torch.testing.assert_close(float(torch.autograd.grad(theta, model.theta)[0]), (1 - lr) ** min(k, 5))


def test_the_root_has_no_slope_at_zero():
    x = torch.tensor([4.0, 0.0], dtype=torch.float64, requires_grad=True)
    assert root(x).tolist() == [2.0, 0.0]
    assert torch.autograd.grad(root(x).sum(), x)[0].tolist() == [0.25, 0.0]
