"""The truth of a certificate: the user's model in float64, one task at a time, under autograd. None of metafast's rules
take part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from metafast.learners import MAML
from metafast.program import Program
from metafast.program.capture import trace
from metafast.tasks import Batch, TaskBatch

# The inner loop is written here once more, so that the truth shares no code with what it judges.
Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Derivatives:
    """A loss and its derivatives for each task.

    Args:
        outputs: the outputs of all samples that are not masked out, ``[N, ...]``.
        losses: ``[T]``.
        grad: the gradients, ``[T, P]``.
        product: the Hessian-vector products ``H u``, ``[T, P]``.
    """

    outputs: Tensor
    losses: Tensor
    grad: Tensor
    product: Tensor


class Truth:
    """Computes what ``learner`` should compute. ``theta [P]`` has its parameters, in float64 on the CPU."""

    def __init__(self, learner: MAML) -> None:
        self.program, self.steps = learner.program, learner.steps
        self.model = deepcopy(learner.model).cpu().double()
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.train(learner.bn in ("task", "per_step"))
        self.theta = learner.flat_parameters().detach().cpu().double()
        self.rates = learner.rate().detach().cpu().double()
        self.loss = in_double(learner.loss.function)
        self.query_loss = self.loss if learner.query_loss is None else in_double(learner.query_loss.function)
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        self.by_step = [p.shape != shapes[p.name] for p in self.program.parameters]
        graph, root = trace(self.model)
        self.ends = [_Prefix(root, graph, end) for end in _ends(graph, self.program)]

    def value(self, node: int, theta: Tensor, x: Tensor, step: int = 0) -> Tensor:
        """Returns the value of node ``node`` of the Program on the samples ``x [n, ...]``, in inner step ``step``."""
        named = {
            f"model.{p.name}": t[min(step, t.shape[0] - 1)] if by_step else t
            for p, t, by_step in zip(self.program.parameters, self.program.unflatten(theta), self.by_step, strict=True)
        }
        return functional_call(self.ends[node], named, (x,))

    def outputs(self, theta: Tensor, x: Tensor, step: int) -> Tensor:
        """Returns the model's outputs on the samples ``x [n, ...]``."""
        return self.value(self.program.output - 1, theta, x, step)

    def derivatives(self, node: int, loss: Any, batch: Batch, u: Tensor) -> Derivatives:
        """Differentiates ``loss`` on the value of node ``node`` twice, the second time along ``u [P]``."""
        parts = []
        for x, y in _samples(batch):
            theta = self.theta.clone().requires_grad_()
            outputs = self.value(node, theta, x)
            value = loss(outputs, y)
            grad = _gradient(value, theta, create_graph=True)
            parts.append((outputs.detach(), value.detach(), grad.detach(), _gradient(grad @ u, theta)))
        columns = list(zip(*parts, strict=True))
        return Derivatives(torch.cat(columns[0]), *(torch.stack(column) for column in columns[1:]))

    def meta_gradient(self, tasks: TaskBatch) -> tuple[Tensor, Tensor]:
        """Returns the query losses ``[T]`` and the gradient ``[P]`` of their mean, through every inner step."""
        losses, grad = [], torch.zeros_like(self.theta)
        for pair in zip(_samples(tasks.support), _samples(tasks.query), strict=True):
            theta = self.theta.clone().requires_grad_()
            loss = self._task_loss(theta, *pair, recorded=True)
            losses.append(loss.detach())
            grad += _gradient(loss, theta) / len(tasks)
        return torch.stack(losses), grad

    def meta_loss(self, theta: Tensor, tasks: TaskBatch) -> float:
        """Returns the mean query loss alone, when tasks adapt from the parameters ``theta [P]``."""
        pairs = zip(_samples(tasks.support), _samples(tasks.query), strict=True)
        total = sum(self._task_loss(theta, *pair, recorded=False).item() for pair in pairs)
        return total / len(tasks)

    def _task_loss(
        self, theta: Tensor, support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor], recorded: bool
    ) -> Tensor:
        adapted = self.program.adapted
        for step in range(self.steps):
            if not recorded:
                theta = theta.detach().requires_grad_()
            loss = self.loss(self.outputs(theta, support[0], step), support[1])
            rate = self.rates[min(step, self.rates.shape[0] - 1)]
            theta = theta - rate * adapted * _gradient(loss, theta, create_graph=recorded)
        return self.query_loss(self.outputs(theta, query[0], self.steps), query[1])


def in_double(loss: Function) -> Function:
    """Returns the user's own loss on the CPU, with the tensors of a module or of a partial in float64."""
    if isinstance(loss, nn.Module):
        return deepcopy(loss).cpu().double()
    if isinstance(loss, functools.partial):
        options = {k: _cpu_double(v) if isinstance(v, Tensor) else v for k, v in loss.keywords.items()}
        return functools.partial(loss.func, *loss.args, **options)
    return loss


def _cpu_double(x: Tensor) -> Tensor:
    return x.detach().cpu().double() if x.is_floating_point() else x.cpu()


class _Prefix(nn.Module):
    """Runs the model as far as one node of its graph."""

    def __init__(self, model: nn.Module, graph: fx.Graph, end: fx.Node) -> None:
        super().__init__()
        self.model, self.graph = model, fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            copies[node] = self.graph.node_copy(node, copies.__getitem__)
            if node is end:
                break
        self.graph.output(copies[end])

    def forward(self, x: Tensor) -> Any:
        return fx.Interpreter(self.model, graph=self.graph).run(x)


def _ends(graph: fx.Graph, program: Program) -> list[fx.Node]:
    """Returns the node of the graph for each node of the Program, which has the same order but fewer nodes."""
    ends: list[fx.Node] = []
    for node in graph.nodes:
        name = str(node.target) if node.op == "call_module" else node.name
        if len(ends) < len(program.nodes) and name == program.nodes[len(ends)].name:
            ends.append(node)
    assert len(ends) == len(program.nodes)
    return ends


def _gradient(value: Tensor, theta: Tensor, create_graph: bool = False) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(theta)
    (grad,) = torch.autograd.grad(value, [theta], create_graph=create_graph, materialize_grads=True)
    return grad


def _samples(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Returns each task's samples and targets in float64, without those that are masked out."""
    x, y = (t.detach().cpu() for t in (batch.x, batch.y))
    x, y = x.double(), y.double() if y.is_floating_point() else y
    if batch.mask is None:
        return list(zip(x, y, strict=True))
    return [(x[t][keep], y[t][keep]) for t, keep in enumerate(batch.mask.cpu())]
