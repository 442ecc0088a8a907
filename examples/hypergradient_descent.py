"""Learns a learning rate and a weight decay for each layer, by hypergradients through all of a training.

    min over lambda of  L_validation(theta_S(lambda)),   theta_S by S steps of SGD with momentum on the training set

An MLP sees too few and noisy samples of a function of 3 among 20 inputs. Rates and decays stay positive, because they
are exponentials of what the outer optimiser moves: a parametrization of torch. See Maclaurin et al. 2015 (1502.03492)
and Franceschi et al. 2017 (1703.01785).
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common import hold_to, options_of, save
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import metafast as mf
from metafast.extras import require

MOMENTUM = 0.9
Samples = tuple[Tensor, Tensor]


class Exponential(nn.Module):
    """Makes a positive number of any."""

    def forward(self, logarithm: Tensor) -> Tensor:
        """Returns the number."""
        return logarithm.exp()

    def right_inverse(self, value: Tensor) -> Tensor:
        """Returns its logarithm."""
        return value.log()


def samples(count: int) -> Samples:
    """Draws noisy samples of a function that three of the inputs decide."""
    x = torch.randn(count, 20)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2] + torch.tanh(x[:, 1:2] * x[:, 2:3])
    return x, y + 0.3 * torch.randn_like(y)


def mlp(width: int) -> nn.Sequential:
    """Makes the network."""
    return nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


def problem_of(model: nn.Module, steps: int) -> mf.Bilevel:
    """Makes the bilevel problem: training inside, and hyper-parameters for each layer outside."""
    rate = mf.Rate(0.02, per="layer", learn=True)
    decay = mf.Rate(1e-3, per="layer", learn=True)
    inner = mf.SGD(momentum=MOMENTUM, weight_decay=decay)
    problem = mf.Bilevel(model, loss="mse", lr=rate, steps=steps, inner=inner)
    for rates in (problem.learner.rate, problem.learner.hyper["weight_decay"]):
        parametrize.register_parametrization(rates, "value", Exponential())
    return problem


def loss_by_loop(model: nn.Module, logarithms: list[Tensor], train: Samples, validation: Samples, steps: int) -> Tensor:
    """Does the same by torch alone: the validation loss, whose graph holds every step."""
    theta = dict(model.named_parameters())
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in theta))
    rates, decays = (
        {name: v.exp().flatten()[layers.index(name.rpartition(".")[0])] for name in theta} for v in logarithms
    )
    velocity: dict[str, Tensor] = {}
    for step in range(steps):
        loss = F.mse_loss(functional_call(model, theta, (train[0],)), train[1])
        gradients = torch.autograd.grad(loss, [*theta.values()], create_graph=True)
        for name, gradient in zip(list(theta), gradients, strict=True):
            gradient = gradient + decays[name] * theta[name]
            velocity[name] = gradient if step == 0 else MOMENTUM * velocity[name] + gradient
            theta[name] = theta[name] - rates[name] * velocity[name]
    return F.mse_loss(functional_call(model, theta, (validation[0],)), validation[1])


def check(steps: int = 20) -> None:
    """Compares the hypergradient with that of the plain loop, in float64."""
    model = mlp(4).double()
    train, validation = (tuple(t.double() for t in samples(8)) for _ in range(2))
    problem = problem_of(model, steps)
    logarithms = list(problem.parameters())
    loss = loss_by_loop(model, logarithms, train, validation, steps)
    truth = torch.autograd.grad(loss, logarithms)
    problem.backward(train, validation)
    hold_to(truth, [p.grad for p in logarithms], "hypergradient in rates and decays")


def curve(problem: mf.Bilevel, train: Samples, judges: Samples, points: list[int]) -> list[float]:
    """Returns the loss on other samples after so many inner steps."""
    return [F.mse_loss(problem.solve(train, k)(judges[0]), judges[1]).item() for k in points]


def main(given: argparse.Namespace) -> None:
    """Tunes by hypergradients, and compares with the run before."""
    train, validation, test = samples(200), samples(200), samples(2000)
    problem = problem_of(mlp(given.width), given.steps)
    points = sorted({given.steps * k // 15 for k in range(16)})
    untuned, untuned_test = (curve(problem, train, of, points) for of in (validation, test))
    optimizer = torch.optim.Adam(problem.parameters(), lr=0.07)
    for step in range(given.outer_steps):
        optimizer.zero_grad()
        loss = problem.backward(train, validation).loss
        optimizer.step()
        if step % 5 == 0:
            print(f"outer step {step:3}: validation loss {loss:.3f}")
    tuned, tuned_test = (curve(problem, train, of, points) for of in (validation, test))
    print(f"validation loss: untuned {untuned[-1]:.3f}, tuned {tuned[-1]:.3f}")
    print(f"test loss: untuned {untuned_test[-1]:.3f}, tuned {tuned_test[-1]:.3f}")
    for name, rates in (("learning rate", problem.learner.rate), ("weight decay", problem.learner.hyper.weight_decay)):
        print(f"{name} of each layer:", ", ".join(f"{v:.4f}" for v in rates.value.flatten().tolist()))
    figure = require("matplotlib.figure").Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(points, untuned, label="untuned")
    axes.plot(points, tuned, label="tuned")
    axes.set(xlabel="inner step", ylabel="validation loss")
    axes.legend()
    save(figure, given.out, "hypergradient_descent.png")


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the options."""
    return options_of(__doc__, argv, steps=200, outer_steps=40, width=32)


if __name__ == "__main__":
    given = options()
    check() if given.check else main(given)
