"""Peers and a workload for the tests of the bench, in a module that a process of its own can import."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from metafast.bench.peers import Answer, TorchLoop
from metafast.bench.workloads import Workload
from metafast.models import mlp
from metafast.tasks import TaskBatch


class WrongSign(TorchLoop):
    """The torch loop with one parameter's gradient negated."""

    name = "wrong sign"

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        right = super().prepare(workload, tasks)

        def call() -> Answer:
            losses, gradient = right()
            return losses, {**gradient, "hidden1.bias": -gradient["hidden1.bias"]}

        return call


class Sleeper(TorchLoop):
    name = "sleeper"

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        time.sleep(600)
        raise AssertionError("it is ended before this")


@dataclass(frozen=True)
class Meeting(TorchLoop):
    """One of two that wait for each other in ``folder``: each can be ready only while the other's first call runs."""

    folder: Path
    number: int

    @property
    def name(self) -> str:
        return f"meeting {self.number}"

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        (self.folder / str(self.number)).touch()
        while not (self.folder / str(1 - self.number)).exists():
            time.sleep(0.02)
        return super().prepare(workload, tasks)


class Inexact(TorchLoop):
    """The torch loop with a gradient that is 0.03% too long: close enough for a pooled network, a defect here."""

    name = "inexact"

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        right = super().prepare(workload, tasks)

        def call() -> Answer:
            losses, gradient = right()
            return losses, {name: 1.0003 * value for name, value in gradient.items()}

        return call


class Broken(TorchLoop):
    name = "broken"

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        raise OverflowError("no such luck")


class Absent(TorchLoop):
    name = "absent"

    def missing(self, workload: Workload, device: str) -> str | None:
        return "absent is not installed"


def small() -> nn.Module:
    torch.manual_seed(0)
    return mlp(hidden=(6,)).apply(lambda m: m.reset_parameters() if isinstance(m, nn.Linear) else None)


def tiny() -> Workload:
    return Workload("tiny", small, "mse", (1,), ways=0, shots=4, queries=3, tasks=2, steps=2, lr=0.01)
