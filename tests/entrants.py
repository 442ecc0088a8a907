"""Peers and a workload for the tests of the bench, in a module that a process of its own can import."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from metafast.benchmarks.peers import Answer, TorchLoop
from metafast.benchmarks.workloads import Workload
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
