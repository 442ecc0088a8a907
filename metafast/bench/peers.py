"""Peers: other ways to compute the same meta-gradient. All read the same tensors and return the same two things."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metafast.inner.rules import Adam
from metafast.program.losses import TORCH_FUNCTIONS
from metafast.tasks import TaskBatch
from metafast.verification.inner_updates import InnerUpdate
from metafast.verification.torch_loop import task_loss

from .workloads import LR, Workload

Answer = tuple[Any, dict[str, Any]]
"""The query losses ``[T]``, and the gradient of their mean by parameter name, as anything that ``numpy.asarray``
takes; where the workload learns the inner rate, the gradient in it is the one under ``LR``."""

LEARN2LEARN = "METAFAST_LEARN2LEARN"


class Peer(ABC):
    """One way to compute the meta-gradient of a workload."""

    name: str
    package = "torch"

    def version(self) -> str:
        """Returns the version of the package that does the work."""
        return metadata.version(self.package)

    def missing(self, workload: Workload, device: str) -> str | None:
        """Says why the peer cannot run ``workload`` on ``device``, without importing it; ``None`` means that it can."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed: pip install {self.package}"
        return None

    def load(self) -> None:
        """Imports the package, so that the memory of that can be told from the memory that a meta-gradient needs."""
        importlib.import_module(self.package)

    @abstractmethod
    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        """Makes the model in the dtype and on the device of ``tasks``. Returns a call that computes one
        meta-gradient."""


@dataclass(frozen=True)
class Metafast(Peer):
    """Runs metafast through its public interface. ``backend`` is the name of an executor, or ``"auto"``."""

    backend: str = "auto"
    package = "metafast"

    @property
    def name(self) -> str:  # type: ignore[override]
        """Returns ``metafast``, followed by the executor where one was asked for: ``metafast (cpu)``."""
        return "metafast" if self.backend == "auto" else f"metafast ({self.backend})"

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        model = workload.network().to(tasks.query_x)
        learner = workload.learner(model, backend=self.backend)
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        if workload.learns_lr:
            parameters[LR] = learner.rate.value

        def call() -> Answer:
            learner.zero_grad(set_to_none=True)
            losses = learner.backward(tasks).losses
            return losses, _gradients(parameters)

        return call


class TorchLoop(Peer):
    """Runs ``torch.autograd`` with ``create_graph=True``, one task after the other. In float64 it is the oracle."""

    name = "torch loop"

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        model, loss = workload.network().to(tasks.query_x), TORCH_FUNCTIONS[workload.loss]
        start: dict[str, Tensor] = dict(model.named_parameters())
        lr = rate_of(workload, tasks)
        update = InnerUpdate(workload.inner, lr, torch)

        def task(t: int) -> Tensor:
            return task_loss(model, loss, start, tasks, t, update, workload.steps, start)

        return _sequential(start, lr, len(tasks), task)


class Learn2Learn(Peer):
    """Runs ``learn2learn.algorithms.MAML`` with ``clone()`` and ``adapt()``, one task after the other.

    The build of learn2learn fails on recent Pythons, but its algorithms need nothing that is built. The unpacked source
    distribution is enough; the environment variable METAFAST_LEARN2LEARN names its folder.
    """

    name = package = "learn2learn"

    def version(self) -> str:
        self._package()
        return str(importlib.import_module("learn2learn._version").__version__)

    def missing(self, workload: Workload, device: str) -> str | None:
        folder = os.environ.get(LEARN2LEARN)
        if folder is None:
            return super().missing(workload, device) and (
                f"learn2learn is not installed, and {LEARN2LEARN} names no folder of its unpacked source distribution: "
                "pip download --no-deps --no-binary :all: learn2learn"
            )
        if not (Path(folder) / "learn2learn/algorithms/maml.py").is_file():
            return f"{LEARN2LEARN}={folder} has no learn2learn/algorithms/maml.py; unpack the source distribution there"
        if workload.inner.states:
            return "it cannot: its inner steps go along the gradient, without momentum or moments"
        return None

    def load(self) -> None:
        self._package()
        importlib.import_module("learn2learn.algorithms.maml")

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        self._package()
        maml = importlib.import_module("learn2learn.algorithms.maml").MAML
        model, loss = workload.network().to(tasks.query_x), TORCH_FUNCTIONS[workload.loss]
        start: dict[str, Tensor] = dict(model.named_parameters())
        lr = rate_of(workload, tasks)
        learner = maml(model, lr=lr)

        def task(t: int) -> Tensor:
            clone = learner.clone()
            for s in range(workload.steps):
                support = tasks.support.at(s)
                clone.adapt(loss(clone(support.x[t]), support.y[t]))
            return loss(clone(tasks.query_x[t]), tasks.query_y[t])

        return _sequential(start, lr, len(tasks), task)

    @staticmethod
    def _package() -> None:
        """Registers empty packages in the place of learn2learn's own, whose ``__init__`` import every data set and
        reinforcement learner."""
        folder = os.environ.get(LEARN2LEARN)
        if folder is not None:
            for name in ("learn2learn", "learn2learn.algorithms"):
                module = sys.modules.setdefault(name, types.ModuleType(name))
                module.__path__ = [str(Path(folder, *name.split(".")))]


class Higher(Peer):
    """Runs ``higher.innerloop_ctx`` around SGD or Adam, one task after the other.

    Its Adam adds ``eps`` to the root of the moment as it is, and torch's to the root of the corrected one. It gets
    another ``eps`` for each step, with which the two are the same.
    """

    name = package = "higher"

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        higher = importlib.import_module("higher")
        model, loss = workload.network().to(tasks.query_x), TORCH_FUNCTIONS[workload.loss]
        start: dict[str, Tensor] = dict(model.named_parameters())
        lr, settings = rate_of(workload, tasks), _settings(workload.inner)
        kind = torch.optim.Adam if "eps" in settings else torch.optim.SGD
        optimizer = kind(model.parameters(), lr=workload.lr, **settings)

        def of_step(count: int) -> dict[str, list[float]]:
            return {"eps": [settings["eps"] * (1 - settings["betas"][1] ** count) ** 0.5]} if "eps" in settings else {}

        def task(t: int) -> Tensor:
            context = higher.innerloop_ctx(model, optimizer, copy_initial_weights=False, override={"lr": [lr]})
            with context as (fast, steps):
                for s in range(workload.steps):
                    support = tasks.support.at(s)
                    steps.step(loss(fast(support.x[t]), support.y[t]), override=of_step(s + 1))
                return loss(fast(tasks.query_x[t]), tasks.query_y[t])

        return _sequential(start, lr, len(tasks), task)


class TorchOpt(Peer):
    """Runs ``torchopt.MetaSGD`` or ``torchopt.MetaAdam``, one task after the other.

    The root of a moment that is zero has no derivative, and makes all gradients NaN. Against that ``eps_root`` is added
    to the moments; the one here does nothing else, for its root is a hundredth of ``eps``.
    """

    name = "TorchOpt"
    package = "torchopt"

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        torchopt = importlib.import_module("torchopt")
        model, loss = workload.network().to(tasks.query_x), TORCH_FUNCTIONS[workload.loss]
        start: dict[str, Tensor] = dict(model.named_parameters())
        lr, settings = rate_of(workload, tasks), _settings(workload.inner)
        if "eps" in settings:
            optimizer = torchopt.MetaAdam(model, lr, **settings, eps_root=1e-4 * settings["eps"] ** 2)
        else:
            optimizer = torchopt.MetaSGD(model, lr, **settings)
        before = [torchopt.extract_state_dict(part, by="reference") for part in (model, optimizer)]

        def task(t: int) -> Tensor:
            for s in range(workload.steps):
                support = tasks.support.at(s)
                optimizer.step(loss(model(support.x[t]), support.y[t]))
            judged = loss(model(tasks.query_x[t]), tasks.query_y[t])
            for part, state in zip((model, optimizer), before, strict=True):
                torchopt.recover_state_dict(part, state)
            return judged

        return _sequential(start, lr, len(tasks), task)


def rate_of(workload: Workload, tasks: TaskBatch) -> float | Tensor:
    """Returns the inner rate: a number, or where its gradient is wanted a leaf of autograd's graph."""
    return tasks.query_x.new_tensor(workload.lr).requires_grad_() if workload.learns_lr else workload.lr


def _settings(inner: Any) -> dict[str, Any]:
    """Returns the settings of a rule as other libraries call them, which is as torch does."""
    return {"betas": inner.betas, "eps": inner.eps} if isinstance(inner, Adam) else {"momentum": inner.momentum}


def _sequential(
    start: dict[str, Tensor], lr: float | Tensor, count: int, task: Callable[[int], Tensor]
) -> Callable[[], Answer]:
    """Runs one task after the other and frees each before the next, so that the loop needs as little memory as it
    can."""
    leaves = {**start, LR: lr} if isinstance(lr, Tensor) else start

    def call() -> Answer:
        for leaf in leaves.values():
            leaf.grad = None
        losses = []
        for t in range(count):
            loss = task(t)
            (loss / count).backward()
            losses.append(loss.detach())
            del loss
        return torch.stack(losses), _gradients(leaves)

    return call


def _gradients(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {**found, LR: found[LR].reshape(())} if LR in found else found


def peers() -> list[Peer]:
    """Returns all peers, the simplest first."""
    from .functional_peers import MixedMode, TorchCompile, TorchVmap
    from .jax_peer import Jax

    return [
        TorchLoop(), TorchVmap(), TorchCompile(), MixedMode(), Learn2Learn(), Higher(), TorchOpt(), Jax(),
    ]  # fmt: skip
