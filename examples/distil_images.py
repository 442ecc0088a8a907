"""Distils Fashion-MNIST into ten pictures, one of each kind, from which a network learns in 20 steps.

    min over pictures and rate of  mean_t L(theta_t,S; real pictures),   theta_t,S by S steps on the ten from start t

Each outer step draws T random starts, and all of them are trained at once: fast weights that begin where they are told.
See Wang et al. 2018, "Dataset Distillation" (1811.10959).
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common import hold_to, in_float64, options_of, save
from fashion_mnist import FOLDER, KINDS, read
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import metafast as mf
from metafast.extras import require

LABELS = torch.arange(10)


def network(width: int, pixels: int = 784) -> nn.Sequential:
    """Makes the network."""
    return nn.Sequential(nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, 10))


def random_starts(count: int, width: int, pixels: int = 784) -> Tensor:
    """Draws initial parameters of so many networks, ``[T, P]``."""
    return torch.stack([parameters_to_vector(network(width, pixels).parameters()) for _ in range(count)]).detach()


def distilling(width: int, pixels: int, steps: int) -> mf.FastWeights:
    """Makes what trains the networks; the rate is learned with the pictures."""
    rate = mf.Rate(0.1, learn=True)
    return mf.FastWeights(network(width, pixels), loss="cross_entropy", lr=rate, steps=steps)


def trained(learner: mf.FastWeights, starts: Tensor, pictures: Tensor, judges: Tensor) -> tuple[Tensor, mf.Fast]:
    """Trains each network on ``pictures [10, D]``; returns outputs ``[T, m, 10]`` for ``judges``, and its weights."""
    tasks = len(starts)
    support_x, support_y = pictures.expand(tasks, -1, -1), LABELS.expand(tasks, -1)
    return learner.after(mf.Fast(starts, 0), support_x, support_y, judges.expand(tasks, -1, -1))


def loss_on(learner: mf.FastWeights, starts: Tensor, pictures: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Returns the mean loss of the trained networks on real pictures."""
    outputs, _ = trained(learner, starts, pictures, x)
    return F.cross_entropy(outputs.flatten(0, 1), y.repeat(len(starts)))


def loss_by_loop(
    model: nn.Module, rate: Tensor, steps: int, starts: Tensor, pictures: Tensor, x: Tensor, y: Tensor
) -> Tensor:
    """Returns the same by torch alone, one network after another."""
    losses = []
    for start in starts:
        vector_to_parameters(start, model.parameters())
        theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        for _ in range(steps):
            inner = F.cross_entropy(functional_call(model, theta, (pictures,)), LABELS)
            gradients = torch.autograd.grad(inner, [*theta.values()], create_graph=True)
            theta = {name: p - rate * g for (name, p), g in zip(theta.items(), gradients, strict=True)}
        losses.append(F.cross_entropy(functional_call(model, theta, (x,)), y))
    return torch.stack(losses).mean()


def check(steps: int = 5) -> None:
    """Compares the gradient in pictures and rate with that of the plain loop, in float64."""
    with in_float64():
        learner, starts = distilling(6, 12, steps), random_starts(3, 6, 12)
        pictures, x, y = torch.rand(10, 12, requires_grad=True), torch.rand(20, 12), torch.randint(10, (20,))
        wanted = pictures, learner.rate.value
        found = torch.autograd.grad(loss_on(learner, starts, pictures, x, y), wanted)
        loss = loss_by_loop(network(6, 12), learner.rate.value, steps, starts, pictures, x, y)
        hold_to(torch.autograd.grad(loss, wanted), found, "gradient in the pictures and the rate")


@torch.no_grad()
def accuracy(learner: mf.FastWeights, starts: Tensor, pictures: Tensor, test: tuple[Tensor, Tensor]) -> float:
    """Returns the mean accuracy of networks trained on ``pictures``."""
    weights = learner.weights(trained(learner, starts, pictures, pictures)[1])
    right = 0.0
    for t in range(len(starts)):
        outputs = functional_call(learner.model, {name: w[t] for name, w in weights.items()}, (test[0],))
        right += float((outputs.argmax(1) == test[1]).float().mean())
    return right / len(starts)


def one_of_each(x: Tensor, y: Tensor) -> Tensor:
    """Draws a real picture of each kind, ``[10, 784]``."""
    shuffled = torch.randperm(len(y))
    return torch.stack([x[shuffled[(y[shuffled] == kind).nonzero()[0, 0]]] for kind in range(10)])


def main(given: argparse.Namespace) -> None:
    """Learns the pictures, and compares them with real ones on starts that no outer step has seen."""
    (x, y), test = read(given.data, "train"), read(given.data, "test")
    learner = distilling(given.width, x.shape[1], given.steps)
    pictures = torch.rand(10, x.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([{"params": pictures, "lr": 0.02}, {"params": learner.rate.parameters(), "lr": 2e-3}])
    for step in range(given.outer_steps):
        chosen = torch.randint(len(x), (given.batch,))
        starts = random_starts(given.tasks, given.width, x.shape[1])
        optimizer.zero_grad()
        loss = loss_on(learner, starts, pictures, x[chosen], y[chosen])
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"outer step {step:3}: loss {loss:.3f}, rate {learner.rate.value.item():.3f}")
    starts = random_starts(10, given.width, x.shape[1])
    print(f"test accuracy after {given.steps} steps on ten pictures, mean of {len(starts)} new starts:")
    print(f"  distilled: {accuracy(learner, starts, pictures, test):.1%}")
    draws = [one_of_each(x, y) for _ in range(10)]
    of_real = {}
    for rate in (0.05, 0.1, 0.2, 0.4, 0.8):
        learner.lr = rate
        of_real[rate] = sum(accuracy(learner, starts[:2], real, test) for real in draws) / len(draws)
    best = max(of_real, key=of_real.__getitem__)
    print(f"  real, at the rate of {best} that is best for them: {of_real[best]:.1%}, mean of {len(draws)} draws")
    figure = require("matplotlib.figure").Figure(figsize=(10, 4.3), layout="constrained")
    for kind, axes in enumerate(figure.subplots(2, 5).flat):
        axes.imshow(pictures[kind].detach().reshape(28, 28).numpy(), cmap="gray")
        axes.set(title=KINDS[kind], xticks=[], yticks=[])
    save(figure, given.out, "distil_images.png")


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the options."""
    return options_of(__doc__, argv, data=FOLDER, steps=20, outer_steps=120, tasks=8, width=64, batch=256)


if __name__ == "__main__":
    given = options()
    check() if given.check else main(given)
