"""Learns the inner loss itself: a small network, which takes a model to the truth through samples that mislead.

    min over theta_0, phi, a of  mean_t MSE_query(theta_t,S),   theta_{s+1} = theta_s - a grad mean_i M_phi(f(x_i), y_i)

Tasks are sinusoids of 20 points, and 30% of the values are anything. The query sets hold the truth. The MSE follows
every point; the learned loss finds out what to believe. See Bechtle et al. 2021 (1906.05374).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import hold_to, in_float64, options_of, save
from torch import Tensor, nn
from torch.func import functional_call

import metafast as mf
from metafast.extras import require

Loss = Callable[[Tensor, Tensor], Tensor]


class LearnedLoss(nn.Module):
    """Is a loss of one task: the mean over its points of what a network says of output and target."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Takes outputs and targets ``[n, 1]``, and returns a number."""
        seen = torch.cat([outputs, targets, outputs - targets], -1) / 3
        return F.softplus(self.network(seen)).mean()


def mlp(width: int) -> nn.Sequential:
    """Makes the model that the inner loop trains."""
    return nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def sinusoids(tasks: int, shots: int = 20, queries: int = 20) -> mf.TaskBatch:
    """Draws tasks, in whose support sets 30% of the values are drawn from -10 to 10."""
    amplitude, phase = torch.empty(tasks, 1, 1).uniform_(0.1, 5), torch.empty(tasks, 1, 1).uniform_(0, math.pi)
    x = torch.empty(tasks, shots + queries, 1).uniform_(-5, 5)
    support_y, query_y = (amplitude * torch.sin(x + phase)).split([shots, queries], 1)
    misleads = torch.rand_like(support_y) < 0.3
    support_y = torch.where(misleads, torch.empty_like(support_y).uniform_(-10, 10), support_y)
    return mf.TaskBatch(x[:, :shots], support_y, x[:, shots:], query_y)


def loss_by_loop(model: nn.Module, loss: Loss, rate: Tensor, steps: int, tasks: mf.TaskBatch) -> Tensor:
    """Returns the meta-loss by torch alone, one task after another."""
    losses = []
    for x, y, query_x, query_y in zip(tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y, strict=True):
        theta = dict(model.named_parameters())
        for _ in range(steps):
            inner = loss(functional_call(model, theta, (x,)), y)
            gradients = torch.autograd.grad(inner, [*theta.values()], create_graph=True)
            theta = {name: p - rate * g for (name, p), g in zip(theta.items(), gradients, strict=True)}
        losses.append(F.mse_loss(functional_call(model, theta, (query_x,)), query_y))
    return torch.stack(losses).mean()


def check(steps: int = 3) -> None:
    """Compares the meta-gradient in model, learned loss and rate with that of the plain loop, in float64."""
    with in_float64():
        loss, tasks = LearnedLoss(4), sinusoids(3, 5, 6)
        learner = mf.MAML(mlp(6), loss=loss, query_loss="mse", lr=mf.Rate(0.3, learn=True), steps=steps)
        wanted = [*learner.parameters()]
        meta_loss = loss_by_loop(learner.model, loss, learner.rate.value, steps, tasks)
        truth = torch.autograd.grad(meta_loss, wanted)
        learner.backward(tasks)
        hold_to(truth, [p.grad for p in wanted], "meta-gradient in model, loss and rate")


def learn(name: str, loss: str | Loss, rate: float, given: argparse.Namespace) -> mf.MAML:
    """Learns the initialisation, the rate and what parameters the inner loss has; says how well it does."""
    learner = mf.MAML(mlp(40), loss=loss, query_loss="mse", lr=mf.Rate(rate, learn=True), steps=given.steps)
    optimizer = torch.optim.Adam(learner.parameters(), lr=2e-3)
    for step in range(given.iterations):
        optimizer.zero_grad()
        out = learner.backward(sinusoids(given.tasks))
        nn.utils.clip_grad_norm_(learner.parameters(), 10.0)
        optimizer.step()
        if step % 200 == 0:
            print(f"{name}, iteration {step:4}: query MSE {out.loss:.2f}")
    return learner


def main(given: argparse.Namespace) -> None:
    """Compares the learned loss with two that are known, after the same numbers of inner and outer steps."""
    learned = LearnedLoss()
    rows: dict[str, tuple[str | Loss, float]] = {
        "MSE": ("mse", 0.01), "Huber's loss": (F.smooth_l1_loss, 0.05), "learned loss": (learned, 0.3)
    }  # fmt: skip
    learners = {name: learn(name, *row, given) for name, row in rows.items()}
    test = sinusoids(500)
    print(f"query MSE of {len(test)} new tasks after {given.steps} inner steps on")
    with torch.no_grad():
        for name, learner in learners.items():
            print(f"  {name}: {learner(test).loss:.3f}")
        error = torch.linspace(-10, 10, 201)[:, None]
        values = torch.stack([learned(e[None], torch.zeros(1, 1)) for e in error])
    figure = require("matplotlib.figure").Figure(figsize=(9, 3.5), layout="constrained")
    of_loss, of_fit = figure.subplots(1, 2)
    of_loss.plot(error, values)
    of_loss.set(xlabel="output, where the target is 0", ylabel="learned loss")
    x, shown = torch.linspace(-5, 5, 200)[None, :, None], int(test.query_y.abs().amax((1, 2)).argmax())
    one = slice(shown, shown + 1)
    for name, learner in learners.items():
        of_fit.plot(x[0], learner.adapt(test.support_x[one], test.support_y[one])(x)[0], label=name)
    of_fit.plot(test.support_x[shown], test.support_y[shown], "^", color="purple", label="support")
    of_fit.plot(test.query_x[shown], test.query_y[shown], ".", color="black", label="truth")
    of_fit.set(xlabel="x", title="a new task")
    of_fit.legend(fontsize="small")
    save(figure, given.out, "learned_loss.png")


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the options."""
    return options_of(__doc__, argv, steps=3, iterations=800, tasks=16)


if __name__ == "__main__":
    given = options()
    check() if given.check else main(given)
