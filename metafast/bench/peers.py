"""Peers: other ways to compute the same meta-gradient. All read the same tensors and return the same two things.

In training mode ``F.batch_norm`` has a wrong second derivative under ``torch.func`` (torch 2.13, CPU: 1e-4
relative even in float64, and the bias of a convolution in front of it, whose gradient is zero, gets one that is not),
while plain autograd is exact. So the vmap peers get batch norms that are written out in elementary operations; with
torch's own they would disagree and get no time.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metafast.learners import MAML
from metafast.program.losses import TORCH_FUNCTIONS
from metafast.tasks import TaskBatch
from metafast.verification.torch_loop import task_loss

from .workloads import Workload

Answer = tuple[Any, dict[str, Any]]
"""The query losses ``[T]``, and the gradient of their mean by parameter name, as anything that ``numpy.asarray``
takes."""

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
        model = workload.network().to(tasks.support_x)
        learner = MAML(model, loss=workload.loss, lr=workload.lr, steps=workload.steps, backend=self.backend)
        parameters: dict[str, Tensor] = dict(model.named_parameters())

        def call() -> Answer:
            learner.zero_grad(set_to_none=True)
            losses = learner.backward(tasks).losses
            return losses, _gradients(parameters)

        return call


class TorchLoop(Peer):
    """Runs ``torch.autograd`` with ``create_graph=True``, one task after the other. In float64 it is the oracle."""

    name = "torch loop"

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        model, loss = workload.network().to(tasks.support_x), TORCH_FUNCTIONS[workload.loss]
        start: dict[str, Tensor] = dict(model.named_parameters())

        def task(t: int) -> Tensor:
            return task_loss(model, loss, start, tasks, t, workload.lr, workload.steps, start)

        return _sequential(model, len(tasks), task)


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
        return None

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        self._package()
        maml = importlib.import_module("learn2learn.algorithms.maml").MAML
        model, loss = workload.network().to(tasks.support_x), TORCH_FUNCTIONS[workload.loss]
        learner = maml(model, lr=workload.lr)

        def task(t: int) -> Tensor:
            clone = learner.clone()
            for _ in range(workload.steps):
                clone.adapt(loss(clone(tasks.support_x[t]), tasks.support_y[t]))
            return loss(clone(tasks.query_x[t]), tasks.query_y[t])

        return _sequential(model, len(tasks), task)

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
    """Runs ``higher.innerloop_ctx`` around SGD, one task after the other."""

    name = package = "higher"

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        higher = importlib.import_module("higher")
        model, loss = workload.network().to(tasks.support_x), TORCH_FUNCTIONS[workload.loss]
        optimizer = torch.optim.SGD(model.parameters(), lr=workload.lr)

        def task(t: int) -> Tensor:
            with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fast, inner):
                for _ in range(workload.steps):
                    inner.step(loss(fast(tasks.support_x[t]), tasks.support_y[t]))
                return loss(fast(tasks.query_x[t]), tasks.query_y[t])

        return _sequential(model, len(tasks), task)


class TorchVmap(Peer):
    """Takes the gradient by ``torch.func`` of the mean over the tasks of ``vmap``, all tasks at once."""

    name = "torch.func vmap"

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        model, loss = _written_out(workload.network().to(tasks.support_x)), TORCH_FUNCTIONS[workload.loss]
        params = {name: p.detach() for name, p in model.named_parameters()}
        data = (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)

        def task(params: dict[str, Tensor], sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
            fast = params
            for _ in range(workload.steps):
                grads = torch.func.grad(lambda p: loss(functional_call(model, p, sx), sy))(fast)
                fast = {name: p - workload.lr * grads[name] for name, p in fast.items()}
            return loss(functional_call(model, fast, qx), qy)

        def mean(params: dict[str, Tensor], *data: Tensor) -> tuple[Tensor, Tensor]:
            losses = torch.func.vmap(task, (None, 0, 0, 0, 0))(params, *data)
            return losses.mean(), losses

        run = self._compiled(torch.func.grad(mean, has_aux=True))

        def call() -> Answer:
            grads, losses = run(params, *data)
            return losses, grads

        return call

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function


class TorchCompile(TorchVmap):
    """Compiles the vmap peer by ``torch.compile``, from an empty compile cache."""

    name = "torch.compile"

    def missing(self, workload: Workload, device: str) -> str | None:
        compiler = os.environ.get("CXX", "g++")
        if device == "cpu" and shutil.which(compiler) is None:
            return f"there is no C++ compiler {compiler} for it to use"
        if device != "cpu" and importlib.util.find_spec("triton") is None:
            return "there is no Triton for it to use"
        return None

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        torch.compiler.config.force_disable_caches = True
        return torch.compile(function, dynamic=False)


def _sequential(model: nn.Module, count: int, task: Callable[[int], Tensor]) -> Callable[[], Answer]:
    """Runs one task after the other and frees each before the next, so that the loop needs as little memory as it
    can."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())

    def call() -> Answer:
        model.zero_grad(set_to_none=True)
        losses = []
        for t in range(count):
            loss = task(t)
            (loss / count).backward()
            losses.append(loss.detach())
        return torch.stack(losses), _gradients(parameters)

    return call


def _gradients(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


class _WrittenOutBatchNorm(nn.Module):
    """Normalises by the batch's statistics, in elementary operations."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        axes = [0, *range(2, x.dim())]
        centred = x - x.mean(axes, keepdim=True)
        y = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + self.eps)
        if self.weight is None:
            return y
        shape = (-1, *(1 for _ in range(x.dim() - 2)))
        return y * self.weight.view(shape) + self.bias.view(shape)


def _written_out(model: nn.Module) -> nn.Module:
    model = deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _WrittenOutBatchNorm(module))
    return model


def peers() -> list[Peer]:
    """Returns all peers, the simplest first."""
    from .jax_peer import Jax

    return [TorchLoop(), TorchVmap(), TorchCompile(), Learn2Learn(), Higher(), Jax()]
