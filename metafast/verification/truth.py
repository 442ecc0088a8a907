"""The truth of a certificate: the user's model in float64, one task at a time, under autograd. None of metafast's rules
take part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metafast.kernels.input_part import InputPart
from metafast.learners import MAML
from metafast.learners.batch_norm import in_modes
from metafast.program.capture import Layout, node_values
from metafast.program.module_run import picked
from metafast.program.noise import given_numbers
from metafast.program.operation import Made, Recording
from metafast.program.recording import record
from metafast.program.replay import replay
from metafast.program.rule import hyper_rows, started
from metafast.tasks import Batch, Samples, TaskBatch, each_part, moved, parts_of

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
    """Computes what ``learner`` should compute. ``theta [P]`` has its parameters, in float64 on the CPU.

    Outputs, losses and gradients are those of the module itself, and a rule of the inner loop is its own step, which
    autograd differentiates. What happens inside of it, for the checks of single
    layers, is repeated from a recording of the module, by torch's own operations.
    """

    def __init__(self, learner: MAML) -> None:
        self.program, self.steps, self.output = learner.program, learner.steps, learner.output
        self.modes = learner.captures.modes()
        self.model = deepcopy(learner.model).cpu().double()
        self.theta = learner.flat_parameters().detach().cpu().double()
        self.rates = learner.inner_rates().detach().cpu().double()
        self.rule = learner.loop.rule
        self.loss = in_double(learner.loss.function)
        self.query_loss = self.loss if learner.query_loss is None else in_double(learner.query_loss.function)
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        self.by_step = [p.shape != shapes[p.name] for p in self.program.parameters]
        self.recordings: dict[Any, tuple[Recording, list[Made]]] = {}

    def value(self, node: int, theta: Tensor, x: Any, seed: Tensor | None) -> Tensor:
        """Returns the value of node ``node`` of the Program on the samples ``x [n, ...]``, in the first inner step."""
        layer = self.program.nodes[node].layer
        if isinstance(layer, InputPart):
            return parts_of(x)[layer.number]
        recording, made = self._recorded(x)
        at = node - sum(isinstance(n.layer, InputPart) for n in self.program.nodes)
        value: Tensor = replay(recording, self._named(theta, 0), x, seed)[made[at]]
        return value

    def _named(self, theta: Tensor, step: int) -> dict[str, Tensor]:
        """Returns the parameters by name."""
        rows = zip(self.program.parameters, self.program.unflatten(theta), self.by_step, strict=True)
        return {p.name: t[min(step, t.shape[0] - 1)] if by_step else t for p, t, by_step in rows}

    def _recorded(self, x: Any) -> tuple[Recording, list[Made]]:
        """Returns what the module does with samples of the shapes of ``x``, and the values of the Program's nodes."""
        key = tuple(part.shape for part in parts_of(x))
        if key not in self.recordings:
            with in_modes(self.model, self.modes):
                recording = record(self.model, x, self.output)
            names = tuple(p.name for p in self.program.parameters)
            shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
            adapted = {p.name for p in self.program.parameters if p.adapted}
            layout = Layout(names, shapes, adapted, self.steps)
            self.recordings[key] = recording, node_values(recording, layout, self.modes)
        return self.recordings[key]

    def outputs(self, theta: Tensor, x: Any, step: int, seed: Tensor | None) -> Tensor:
        """Returns the model's outputs on the samples ``x [n, ...]``; random numbers follow from ``seed [1]``."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        kwargs = x.by_name if isinstance(x, Samples) else {}
        args = () if kwargs else tuple(parts_of(x))
        with in_modes(self.model, self.modes), given_numbers(seed, step):
            returned = functional_call(self.model, {**self._named(theta, step), **buffers}, args, kwargs)
        return picked(returned, self.output, self.model)

    def derivatives(self, node: int, loss: Any, batch: Batch, u: Tensor) -> Derivatives:
        """Differentiates ``loss`` on the value of node ``node`` twice, the second time along ``u [P]``."""
        parts = []
        for x, y, seed in _samples(batch):
            theta = self.theta.clone().requires_grad_()
            last = node == self.program.output - 1
            outputs = self.outputs(theta, x, 0, seed) if last else self.value(node, theta, x, seed)
            value = loss(outputs, y)
            grad = _gradient(value, theta, create_graph=True)
            parts.append((outputs.detach(), value.detach(), grad.detach(), _gradient(grad @ u, theta)))
        columns = list(zip(*parts, strict=True))
        return Derivatives(torch.cat(columns[0]), *(torch.stack(column) for column in columns[1:]))

    def meta_gradient(self, tasks: TaskBatch) -> tuple[Tensor, Tensor]:
        """Returns the query losses ``[T]`` and the gradient ``[P]`` of their mean, through every inner step."""
        losses, grad = [], torch.zeros_like(self.theta)
        for support, query in _by_task(tasks):
            theta = self.theta.clone().requires_grad_()
            loss = self._task_loss(theta, support, query, recorded=True)
            losses.append(loss.detach())
            grad += _gradient(loss, theta) / len(tasks)
        return torch.stack(losses), grad

    def meta_loss(self, theta: Tensor, tasks: TaskBatch) -> float:
        """Returns the mean query loss alone, when tasks adapt from the parameters ``theta [P]``."""
        total = sum(self._task_loss(theta, *sets, recorded=False).item() for sets in _by_task(tasks))
        return total / len(tasks)

    def _task_loss(self, theta: Tensor, support: list[_Task], query: _Task, recorded: bool) -> Tensor:
        """Takes one task's steps and judges it; ``support`` has its samples for all steps, or those of each step."""
        adapted, rule = self.program.adapted, self.rule
        z = started(rule, theta[None], len(theta))
        for step in range(self.steps):
            if not recorded:
                z = z.detach().requires_grad_()
            theta, samples = z[0, : len(theta)], support[min(step, len(support) - 1)]
            loss = self.loss(self.outputs(theta, samples.x, step, samples.seed), samples.y)
            gradient = (adapted * _gradient(loss, theta, create_graph=recorded))[None]
            if rule is None:
                z = z - self.rates[min(step, self.rates.shape[0] - 1)] * gradient
            else:
                z = rule.advance(z, gradient, hyper_rows(self.rates, step), step + 1, adapted)
        return self.query_loss(self.outputs(z[0, : len(theta)], query.x, self.steps, query.seed), query.y)


def in_double(loss: Function) -> Function:
    """Returns the user's own loss on the CPU, with the tensors of a module or of a partial in float64."""
    if isinstance(loss, nn.Module):
        return deepcopy(loss).cpu().double()
    if isinstance(loss, functools.partial):
        options = {k: _wide(v) if isinstance(v, Tensor) else v for k, v in loss.keywords.items()}
        return functools.partial(loss.func, *loss.args, **options)
    return loss


def _gradient(value: Tensor, theta: Tensor, create_graph: bool = False) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(theta)
    (grad,) = torch.autograd.grad(value, [theta], create_graph=create_graph, materialize_grads=True)
    return grad


class _Task(NamedTuple):
    """The samples ``[n, ...]`` of one task, their targets, and the seed ``[1]`` of its random numbers."""

    x: Any
    y: Tensor
    seed: Tensor | None


def _by_task(tasks: TaskBatch) -> list[tuple[list[_Task], _Task]]:
    """Returns each task's support sets, one or one for each step, and its query set."""
    steps = [_samples(tasks.support.at(s)) for s in range(max(tasks.shapes.step_sets, 1))]
    return list(zip(map(list, zip(*steps, strict=True)), _samples(tasks.query), strict=True))


def _samples(batch: Batch) -> list[_Task]:
    """Returns each task's samples and targets in float64, without those that are masked out."""
    x, y = each_part(_wide, batch.x), _wide(batch.y)
    tasks = range(len(y))
    seeds = [None if batch.seeds is None else batch.seeds[t : t + 1].cpu() for t in tasks]
    if batch.mask is None:
        return [_Task(x[t], y[t], seeds[t]) for t in tasks]
    mask = batch.mask.cpu()
    return [_Task(x[t][mask[t]], y[t][mask[t]], seeds[t]) for t in tasks]


def _wide(t: Tensor) -> Tensor:
    """Returns a tensor in float64 on the CPU; integers stay integers."""
    return moved(t.detach(), "cpu", torch.float64)
