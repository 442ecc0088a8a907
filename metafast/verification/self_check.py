"""Checks, in a few seconds each, whether the executors of this machine give right gradients, and fast."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from metafast.episodes import SinusoidSampler
from metafast.executors import Executor
from metafast.learners import MAML
from metafast.models import mlp
from metafast.tasks import TaskBatch
from metafast.verification.certificate import Certificate, verify
from metafast.verification.speed import SpeedComparison, compare

_RATE, _STEPS = 0.01, 5  # of the sinusoid problem


@dataclass(frozen=True)
class Probe:
    """A small model with its tasks and loss."""

    name: str
    model: nn.Module
    tasks: TaskBatch
    loss: str


def probes(device: str) -> list[Probe]:
    """Makes two probes: a smooth MLP, and a convolutional network with batch norm, ReLU and pooling."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    convolutional = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip
    models = [mlp(hidden=(8, 8)), convolutional]
    for model in models:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    labels = torch.arange(3, device=device).repeat(4, 2)
    points, pictures = [draw(4, 5, 1) for _ in range(4)], [draw(4, 6, 1, 8, 8) for _ in range(2)]
    return [
        Probe("MLP", models[0].to(device), TaskBatch(*points), "mse"),
        Probe("CNN", models[1].to(device), TaskBatch(pictures[0], labels, pictures[1], labels), "cross_entropy"),
    ]


def gradients(executor: Executor, device: str) -> dict[str, Certificate]:
    """Returns a certificate by the name of each probe that the executor runs on ``device``."""
    return {
        probe.name: verify(probe.model, probe.tasks, loss=probe.loss, lr=0.01, steps=3, backend=executor)
        for probe in probes(device)
        if refusal(executor, probe) is None
    }


def refusal(executor: Executor, probe: Probe) -> str | None:
    """Says why the executor cannot run the probe; ``None`` means that it can."""
    learner = MAML(probe.model, loss=probe.loss, lr=0.01, steps=3)
    learner.prepare(probe.tasks)
    plan = executor.plan(learner.program, learner.loop, probe.tasks.shapes)
    return plan if isinstance(plan, str) else None


def speed(executor: Executor, device: str) -> SpeedComparison:
    """Compares the executor with a torch loop on the sinusoid problem, with 25 tasks and 5 steps."""
    tasks, model = SinusoidSampler(10, 10, 25, device=device).batch(0), mlp().to(device)
    learner = MAML(model, loss="mse", lr=_RATE, steps=_STEPS, backend=executor)
    return compare(learner, tasks, _RATE)
