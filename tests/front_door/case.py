"""A case of the front door: a module as people write it, the tasks that it learns, and how metafast is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import metafast as mf

TASKS, SAMPLES, QUERIES, CLASSES = 3, 6, 9, 3


def no_leaves(model: nn.Module, tasks: mf.TaskBatch) -> dict[str, Tensor]:
    """Says that no gradient counts but those of the parameters."""
    return {}


@dataclass(frozen=True)
class Case:
    """A module, its tasks, and the settings of a learner and of the truth.

    Attributes:
        name: what people do in it.
        make: makes the module.
        tasks: makes the batch.
        loss: a name or a callable, for the learner and for the truth.
        lr: the inner rate.
        steps: S.
        options: further options of the learner.
        learner: makes the learner, where ``options`` cannot say how.
        change: does something to the module or the learner after a first batch was learned.
        truth: settings of the truth that differ from the learner's first ones.
        leaves: further tensors whose gradients count, by name.
        plain: makes the truth's module, where the learner's own cannot be called with other parameters.
        dtype: of the module and of the floating-point tensors.
        tolerance: the largest error, relative to the largest gradient.
        refused: parts of the text of the error that is the right answer; ``None``: a gradient is.
        may_be_refused: both a right gradient and an error in words are right answers.
    """

    name: str
    make: Callable[[], nn.Module]
    tasks: Callable[[], mf.TaskBatch]
    loss: Any = "cross_entropy"
    lr: float = 0.1
    steps: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    learner: Callable[[nn.Module], mf.MAML] | None = None
    change: Callable[[nn.Module, mf.MAML, mf.TaskBatch], object] | None = None
    truth: dict[str, Any] = field(default_factory=dict)
    leaves: Callable[[nn.Module, mf.TaskBatch], dict[str, Tensor]] = no_leaves
    plain: Callable[[nn.Module], nn.Module] | None = None
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-8
    refused: tuple[str, ...] | None = None
    may_be_refused: bool = False

    def __str__(self) -> str:
        return self.name

    def make_learner(self, model: nn.Module) -> mf.MAML:
        """Makes the learner around the module."""
        if self.learner is not None:
            return self.learner(model)
        return mf.MAML(model, loss=self.loss, lr=self.lr, steps=self.steps, **self.options)


class Net(nn.Module):
    """A body, a second body, a head, and parameters and a buffer of its own: enough for most forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.table = nn.Embedding(8, 8)
        self.matrix, self.vector = nn.Parameter(torch.randn(CLASSES, 8)), nn.Parameter(torch.randn(8))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.temperature = 1.0
        self.register_buffer("level", torch.tensor(2.0))


class Table(list[Case]):
    """The cases of one file, in order; a function or a class below one of its decorators becomes a case."""

    def forward(self, tasks: Callable[[], mf.TaskBatch] | None = None, base: type[nn.Module] = Net, **settings: Any):
        """The case of a module whose forward pass is the function below, named after it."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            made = type(base.__name__, (base,), {"forward": function})
            self.append(Case(_said(function), made, tasks or vectors, **settings))
            return function

        return add

    def module(self, tasks: Callable[[], mf.TaskBatch] | None = None, **settings: Any):
        """The case of the module that the function or class below makes, named after it."""

        def add(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
            self.append(Case(_said(make), make, tasks or vectors, **settings))
            return make

        return add

    def one(self, name: str, make: Callable[[], nn.Module], tasks: Any = None, **settings: Any) -> None:
        """The case of a module that needs no more than an expression."""
        self.append(Case(name, make, tasks or vectors, **settings))


def _said(thing: Any) -> str:
    return thing.__name__.strip("_").replace("_", " ")


def labels(n: int = SAMPLES) -> Tensor:
    return torch.arange(CLASSES).repeat(TASKS, n // CLASSES)


def samples(*shape: int) -> Callable[[], mf.TaskBatch]:
    """A function that makes a batch of such samples, each time anew, and always the same."""

    def make() -> mf.TaskBatch:
        generator = torch.Generator().manual_seed(5)
        x, qx = (torch.randn(TASKS, n, *shape, generator=generator, dtype=torch.float64) for n in (SAMPLES, QUERIES))
        return mf.TaskBatch(x, labels(), qx, labels(QUERIES))

    return make


def tokens(count: int = 20, length: int = 7) -> Callable[[], mf.TaskBatch]:
    """A function that makes a batch of token ids."""

    def make() -> mf.TaskBatch:
        generator = torch.Generator().manual_seed(5)
        x, qx = (torch.randint(0, count, (TASKS, n, length), generator=generator) for n in (SAMPLES, QUERIES))
        return mf.TaskBatch(x, labels(), qx, labels(QUERIES))

    return make


vectors, images, sequences = samples(8), samples(2, 6, 6), samples(4, 8)


def small() -> nn.Sequential:
    """The network of cases whose point is elsewhere."""
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))
