"""The peers that are written in ``torch.func``: all tasks at once, by reverse mode or by forward over reverse.

In training mode ``F.batch_norm`` has a wrong second derivative under ``torch.func`` (torch 2.13, CPU: 1e-4
relative even in float64, and the bias of a convolution in front of it, whose gradient is zero, gets one that is not),
while plain autograd is exact. So these peers get batch norms that are written out in elementary operations; with
torch's own they would disagree and get no time.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jvp, vjp, vmap

from metafast.program.losses import TORCH_FUNCTIONS
from metafast.tasks import TaskBatch
from metafast.verification.inner_updates import InnerUpdate
from metafast.verification.torch_loop import LossFunction

from .peers import Answer, Peer
from .workloads import LR, Workload

_LONG = 100  # a compiler that unrolls a loop of so many steps takes longer than anybody waits

Params = dict[str, Tensor]
States = dict[str, tuple[Tensor, ...]]


class TorchVmap(Peer):
    """Takes the gradient by ``torch.func`` of the mean over the tasks of ``vmap``, all tasks at once."""

    name = "torch.func vmap"

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        objective, start = _objective(workload, tasks), _start(workload, tasks)
        each_step = workload.each_step

        def task(start: Params, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
            fast = dict(start)
            update = InnerUpdate(workload.inner, fast.pop(LR, workload.lr), torch)
            state = update.start(fast)
            for s in range(workload.steps):
                x, y = (sx[s], sy[s]) if each_step else (sx, sy)
                fast, state = update(fast, grad(objective)(fast, x, y), state, s + 1)
            return objective(fast, qx, qy)

        def mean(start: Params, *data: Tensor) -> tuple[Tensor, Tensor]:
            losses = vmap(task, (None, int(each_step), int(each_step), 0, 0))(start, *data)
            return losses.mean(), losses

        run = self._compiled(grad(mean, has_aux=True))

        def call() -> Answer:
            grads, losses = run(start, tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)
            return losses, grads

        return call

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function


class TorchCompile(TorchVmap):
    """Compiles the vmap peer by ``torch.compile``, from an empty compile cache.

    Of a long loop it compiles one step, and autograd goes back through the compiled steps.
    """

    name = "torch.compile"

    def missing(self, workload: Workload, device: str) -> str | None:
        compiler = os.environ.get("CXX", "g++")
        if device == "cpu" and shutil.which(compiler) is None:
            return f"there is no C++ compiler {compiler} for it to use"
        if device != "cpu" and importlib.util.find_spec("triton") is None:
            return "there is no Triton for it to use"
        return None

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        if workload.steps <= _LONG:
            return super().prepare(workload, tasks)
        objective, start = _objective(workload, tasks), _start(workload, tasks)
        gradients, values = vmap(grad(objective)), vmap(objective)

        def step(fast: Params, state: States, lr: Any, x: Tensor, y: Tensor, count: Tensor) -> tuple[Params, States]:
            return InnerUpdate(workload.inner, lr, torch)(fast, gradients(fast, x, y), state, count)

        run, count = self._compiled(step), tasks.query_x.new_tensor(1.0)

        def call() -> Answer:
            leaves = {name: p.detach().requires_grad_() for name, p in start.items()}
            fast = {name: p.expand(len(tasks), *p.shape) for name, p in leaves.items() if name != LR}
            state = InnerUpdate(workload.inner, workload.lr, torch).start(fast)
            for s in range(workload.steps):
                support = tasks.support.at(s)
                fast, state = run(fast, state, leaves.get(LR, workload.lr), support.x, support.y, count + s)
            losses = values(fast, tasks.query_x, tasks.query_y)
            grads = torch.autograd.grad(losses.mean(), list(leaves.values()))
            return losses.detach(), dict(zip(leaves, grads, strict=True))

        return call

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        torch.compiler.config.force_disable_caches = True
        return torch.compile(function, dynamic=False)


class MixedMode(Peer):
    """Goes the way back step by step, with Hessian-vector products by forward over reverse mode: ``jvp`` of ``grad``.

    No graph is kept. What is kept of each step are its parameters and, under a rule with a state, the state and the
    gradient. Its mean squared error is written out: ``jvp`` of ``grad`` of torch's own fails (torch 2.13).
    """

    name = "mixed mode"

    def prepare(self, workload: Workload, tasks: TaskBatch) -> Callable[[], Answer]:
        objective, start = _objective(workload, tasks, {**TORCH_FUNCTIONS, "mse": _mse}), _start(workload, tasks)
        lr = start.pop(LR, tasks.query_x.new_tensor(workload.lr))
        update, stateful = InnerUpdate(workload.inner, lr, torch), bool(workload.inner.states)
        gradients, judge = vmap(grad(objective)), vmap(grad_and_value(objective))

        @torch.no_grad()
        def call() -> Answer:
            fast = {name: p.expand(len(tasks), *p.shape) for name, p in start.items()}
            state, kept = update.start(fast), list[tuple[Any, ...]]()
            for s in range(workload.steps):
                support = tasks.support.at(s)
                gradient = gradients(fast, support.x, support.y)
                kept.append((fast, *((gradient, state) if stateful else ())))
                fast, state = update(fast, gradient, state, s + 1)
            grads, losses = judge(fast, tasks.query_x, tasks.query_y)
            v, of_state = {name: g / len(tasks) for name, g in grads.items()}, _zeros(state)
            of_lr = torch.zeros_like(lr)
            for s in reversed(range(workload.steps)):
                support, (fast, *further) = tasks.support.at(s), kept.pop()
                if stateful:
                    gradient, state = further
                    v, u, of_state, of_this = _back_through_update(update, fast, gradient, state, s + 1, (v, of_state))
                else:
                    u = {name: -lr * t for name, t in v.items()}
                gradient, product = _products(objective, fast, u, support.x, support.y)
                if not stateful:
                    of_this = -sum((v[name] * g).sum() for name, g in gradient.items())
                of_lr += of_this
                v = {name: t + product[name] for name, t in v.items()}
            summed = {name: t.sum(0) for name, t in v.items()}
            return losses, {**summed, LR: of_lr} if workload.learns_lr else summed

        return call


def _products(objective: Callable[..., Tensor], fast: Params, u: Params, x: Tensor, y: Tensor) -> tuple[Params, Params]:
    """Returns the gradients and the Hessian-vector products ``H u`` of all tasks."""

    def product(fast: Params, u: Params, x: Tensor, y: Tensor) -> Any:
        return jvp(lambda p: grad(objective)(p, x, y), (fast,), (u,))

    found: tuple[Params, Params] = vmap(product)(fast, u, x, y)
    return found


def _back_through_update(
    update: InnerUpdate, fast: Params, gradient: Params, state: States, count: int, adjoints: tuple[Params, States]
) -> tuple[Params, Params, States, Tensor]:
    """Returns the adjoints of parameters, gradient, state and rate from those of the next parameters and state."""

    def step(fast: Params, gradient: Params, state: States, lr: Tensor) -> tuple[Params, States]:
        return replace(update, lr=lr)(fast, gradient, state, count)

    back: Callable[[Any], Any] = vjp(step, fast, gradient, state, update.lr)[1]
    return back(adjoints)


def _objective(
    workload: Workload, tasks: TaskBatch, losses: Mapping[str, LossFunction] = TORCH_FUNCTIONS
) -> Callable[[Params, Tensor, Tensor], Tensor]:
    """Returns the loss of samples of one task as a function of the parameters."""
    model = _written_out(workload.network().to(tasks.query_x))
    loss = losses[workload.loss]
    return lambda params, x, y: loss(functional_call(model, params, x), y)


def _mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def _start(workload: Workload, tasks: TaskBatch) -> Params:
    """Returns all that a gradient is wanted in: the parameters and, where it is learned, the rate."""
    start = {name: p.detach() for name, p in workload.network().to(tasks.query_x).named_parameters()}
    return {**start, LR: tasks.query_x.new_tensor(workload.lr)} if workload.learns_lr else start


def _zeros(state: States) -> States:
    return {name: tuple(map(torch.zeros_like, own)) for name, own in state.items()}


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
