"""Finds out which labels of Fashion-MNIST are wrong, by a weight for each sample that hypergradients learn.

    min over v of  L_clean(theta_S(v)),   theta_{s+1} = theta_s - a grad mean_{i in batch s} sigmoid(v_i) L_i(theta_s)

40% of the training labels are flipped, and a small clean set judges the training. The weight of a sample is a factor of
its soft target, gathered for each inner minibatch; samples that do harm lose theirs. See Franceschi et al. 2017,
"hyper-cleaning" (1703.01785), and Ren et al. 2018 (1803.09050).
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common import hold_to, options_of, save
from fashion_mnist import FOLDER, read
from torch import Tensor, nn
from torch.func import functional_call

import metafast as mf
from metafast.extras import require

FLIPPED, RATE, MINIBATCH, CLEAN = 0.4, 0.1, 100, 500
Samples = tuple[Tensor, Tensor]


def network(width: int, pixels: int = 784) -> nn.Sequential:
    """Makes the network."""
    return nn.Sequential(nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, 10))


def flipped(y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns labels of which 40% are others, drawn evenly, and which of them are."""
    wrong = torch.rand(len(y)) < FLIPPED
    return torch.where(wrong, (y + torch.randint(1, 10, y.shape)) % 10, y), wrong


def minibatches(samples: Samples, weights: Tensor, chosen: Tensor) -> Samples:
    """Gathers ``chosen [S, n]``: pictures ``[S, n, D]``, and soft targets times weights, ``[S, n, 10]``."""
    x, y = samples
    return x[chosen], F.one_hot(y[chosen], 10).to(x.dtype) * weights[chosen, None]


def draw(count: int, steps: int, size: int) -> Tensor:
    """Draws minibatches of inner steps, ``[S, n]``, in passes through all samples."""
    passes = [torch.randperm(count) for _ in range(-(-steps * size // count))]
    return torch.cat(passes)[: steps * size].reshape(steps, size)


def loss_by_loop(model: nn.Module, train: Samples, clean: Samples) -> Tensor:
    """Returns the loss on the clean samples by torch alone; its graph holds every step."""
    theta = dict(model.named_parameters())
    for x, targets in zip(*train, strict=True):
        loss = F.cross_entropy(functional_call(model, theta, (x,)), targets)
        gradients = torch.autograd.grad(loss, [*theta.values()], create_graph=True)
        theta = {name: p - RATE * g for (name, p), g in zip(theta.items(), gradients, strict=True)}
    return F.cross_entropy(functional_call(model, theta, (clean[0],)), clean[1])


def check(steps: int = 6) -> None:
    """Compares the hypergradient in the logits of the weights with that of the plain loop, in float64."""
    model = network(5, 8).double()
    noisy, clean = ((torch.rand(n, 8).double(), torch.randint(10, (n,))) for n in (12, 9))
    logits, chosen = torch.randn(12).double().requires_grad_(), draw(12, steps, 4)
    problem = mf.Bilevel(model, loss="cross_entropy", lr=RATE, steps=steps)
    problem.backward(minibatches(noisy, logits.sigmoid(), chosen), clean, each_step=True)
    found, logits.grad = logits.grad, None
    loss = loss_by_loop(model, minibatches(noisy, logits.sigmoid(), chosen), clean)
    hold_to(torch.autograd.grad(loss, [logits]), [found], "hypergradient in the weights of the samples")


def separation(weights: Tensor, wrong: Tensor) -> float:
    """Returns the AUC: how often a right label has more weight than a wrong one."""
    ranks = weights.argsort().argsort().double() + 1
    right = ~wrong
    rights, wrongs = int(right.sum()), int(wrong.sum())
    return float(ranks[right].sum() - rights * (rights + 1) / 2) / (rights * wrongs)


def tested(samples: Samples, factors: Tensor, test: Samples, given: argparse.Namespace) -> float:
    """Trains a network in the ordinary way on weighted samples, and returns its test accuracy."""
    model = network(given.width)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(given.epochs):
        chosen = draw(len(factors), len(factors) // MINIBATCH, MINIBATCH)
        for x, targets in zip(*minibatches(samples, factors, chosen), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), targets).backward()
            optimizer.step()
    with torch.no_grad():
        return float((model(test[0]).argmax(1) == test[1]).float().mean())


def main(given: argparse.Namespace) -> None:
    """Learns the weights, trains with them, and compares with training on noisy and on clean labels."""
    (x, y), test = read(given.data, "train"), read(given.data, "test")
    order = torch.randperm(len(x))
    of_clean, of_train = order[:CLEAN], order[CLEAN : CLEAN + given.samples]
    clean, (x, right) = (x[of_clean], y[of_clean]), (x[of_train], y[of_train])
    noisy, wrong = flipped(right)
    problem = mf.Bilevel(network(given.width), loss="cross_entropy", lr=RATE, steps=given.steps)
    logits = torch.zeros(len(x), requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for step in range(given.outer_steps):
        chosen = draw(len(x), given.steps, MINIBATCH)
        optimizer.zero_grad()
        loss = problem.backward(minibatches((x, noisy), logits.sigmoid(), chosen), clean, each_step=True).loss
        optimizer.step()
        if step % 10 == 0:
            print(f"outer step {step:3}: loss on clean samples {loss:.3f}, AUC {separation(logits, wrong):.3f}")
    weights = logits.detach().sigmoid()
    alike = torch.ones(len(x))
    print(f"test accuracy after {given.epochs} epochs of Adam on")
    for name, samples, factors in (
        ("noisy labels", (x, noisy), alike),
        ("noisy labels with learned weights", (x, noisy), weights / weights.mean()),
        ("clean labels", (x, right), alike),
        (f"the {CLEAN} clean samples alone", clean, alike[:CLEAN]),
    ):
        print(f"  {name}: {tested(samples, factors, test, given):.1%}")
    print(f"weights tell flipped from clean labels with an AUC of {separation(weights, wrong):.3f}")
    figure = require("matplotlib.figure").Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(
        [weights[~wrong].numpy(), weights[wrong].numpy()], 30, stacked=True, label=["right label", "flipped label"]
    )
    axes.set(xlabel="learned weight", ylabel="training samples")
    axes.legend()
    save(figure, given.out, "reweight_noisy_samples.png")


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the options."""
    return options_of(__doc__, argv, data=FOLDER, samples=5000, steps=50, outer_steps=40, epochs=60, width=64)


if __name__ == "__main__":
    given = options()
    check() if given.check else main(given)
