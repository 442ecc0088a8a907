"""The inner loops at which rules are tested, and how a learner with any of them is held to the truth."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from loop_oracle import Loop, Rule
from torch import Tensor, nn

import metafast as mf

WAYS = ("backward", "forward", "create_graph")
HYPER = {
    "sgd": ("momentum", "dampening", "weight_decay"),
    "adam": ("beta1", "beta2", "eps", "weight_decay"),
    "adamw": ("beta1", "beta2", "eps", "weight_decay"),
    "rmsprop": ("alpha", "eps", "weight_decay", "momentum"),
    "adagrad": ("lr_decay", "weight_decay", "eps", "initial_accumulator_value"),
}
RULES = [
    mf.SGD(momentum=0.9),
    mf.SGD(momentum=0.5, nesterov=True, weight_decay=0.1),
    mf.SGD(momentum=0.7, dampening=0.3),
    mf.SGD(weight_decay=0.2, max_norm=0.4),
    mf.SGD(max_value=0.05),
    mf.Adam(),
    mf.Adam(betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1, amsgrad=True),
    mf.Adam(betas=(0.0, 0.99), eps=1e-4, max_norm=0.3, max_value=0.08),
    mf.AdamW(eps=1e-3, weight_decay=0.3),
    mf.AdamW(betas=(0.8, 0.9), eps=1e-3, amsgrad=True, max_norm=0.5),
    mf.RMSprop(eps=1e-3),
    mf.RMSprop(alpha=0.8, eps=1e-3, momentum=0.6, centered=True, weight_decay=0.1),
    mf.RMSprop(alpha=0.5, eps=1e-2, centered=True, max_value=0.1),
    mf.Adagrad(eps=1e-3),
    mf.Adagrad(lr_decay=0.3, weight_decay=0.1, initial_accumulator_value=0.2, max_norm=1.0),
]


class Sign(mf.Rule):
    """The rule of the docstring of Rule."""

    hyper = ("decay",)
    states = ("trace",)

    def __init__(self, decay=0.9):
        self.decay = decay

    def step(self, theta, gradient, state, hyper, count):
        trace = hyper["decay"] * state[0] + gradient
        return theta - hyper["lr"] * torch.tanh(trace), (trace,)


class Wave(nn.Module):
    """Has operations without rules of their own, and a parameter that forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(3))
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.sinh(self.body(x)).cumsum(-1) * 0.3)


class Two(nn.Module):
    """Takes two tensors, the second by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(2, 5), nn.Linear(5, 3)

    def forward(self, x, side):
        return self.head(torch.tanh(self.a(x) * self.b(side)))


class Stopped(nn.Module):
    """Reads parameters that no gradient goes back to, under ``no_grad`` and by ``detach``."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.body, self.gate, self.head = (
            nn.Linear(4, 4),
            nn.Linear(4, 5),
            nn.Linear(5, 5),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        with torch.no_grad():
            x = torch.relu(self.frozen(x))
        return self.head(torch.tanh(self.body(x)) * self.gate.weight.detach().sum(0))


class Scaled(nn.Module):
    """A loss with weights for samples and a shift, all learned."""

    def __init__(self, samples: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, samples, dtype=torch.float64))
        self.shift = nn.Parameter(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))

    def forward(self, outputs, targets):
        each = F.cross_entropy(outputs + self.shift, targets, reduction="none")
        return (self.weight[: len(each)] * each).mean()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def wave() -> nn.Module:
    return Wave().double()


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3)
    ).double()


def batch(steps: int = 0, *, sample: tuple[int, ...] = (4,), tasks: int = 2, ragged: bool = False) -> mf.TaskBatch:
    """Tasks of three classes; with ``steps`` each of them has support samples of its own."""
    generator = torch.Generator().manual_seed(7)
    lead = ((steps,) if steps else ()) + (tasks, 4)
    x = torch.randn(*lead, *sample, generator=generator, dtype=torch.float64)
    qx = torch.randn(tasks, 3, *sample, generator=generator, dtype=torch.float64)
    y, qy = (torch.randint(0, 3, shape, generator=generator) for shape in (lead, (tasks, 3)))
    masks: tuple[Any, Any] = (None, None)
    if ragged:
        masks = torch.rand(lead, generator=generator) < 0.6, torch.rand((tasks, 3), generator=generator) < 0.6
        for mask in masks:
            mask[..., 0] = True
            mask[..., 0, -1] = False
    return mf.TaskBatch(x, y, qx, qy, *masks, each_step=bool(steps))


def maml(make=mlp, cls=mf.MAML, **options):
    torch.manual_seed(1)
    return cls(make(), **{"loss": "cross_entropy", "lr": 0.1, "steps": 3, **options})


def spread(leaf: Tensor, axes: set[str], model: nn.Module) -> Any:
    """Rates ``[1 or S, 1 or layers or P]`` as the truth takes them: by step, and by the parameter's name."""

    def of_row(row: Tensor) -> Any:
        if not axes & {"layer", "parameter"}:
            return row[0]
        found, place, layers = {}, 0, {}
        for name, p in model.named_parameters():
            layer = layers.setdefault(name.rpartition(".")[0], len(layers))
            found[name] = row[layer] if "layer" in axes else row[place : place + p.numel()].reshape(p.shape)
            place += p.numel()
        return found

    return [of_row(row) for row in leaf] if "step" in axes else of_row(leaf[0])


def truth_of(learner, loss, rule=None) -> tuple[Loop, list[tuple[nn.Parameter, Tensor]]]:
    """The same loop as a learner's, and its learned hyper-parameters: each with the leaf that stands for it."""
    pairs = []

    def value_of(name: str, given: Any) -> Any:
        holder = learner.rate if name == "lr" else learner.hyper[name] if isinstance(given, mf.Rate) else None
        if holder is None:
            return given
        leaf = holder.value.detach().double().requires_grad_()
        if holder.learn:
            pairs.append((holder.value, leaf))
        return spread(leaf, holder.axes, learner.model)

    inner = learner.inner
    kind = type(inner).__name__.lower()
    if rule is None:
        names = [*HYPER[kind], *(name for name in ("max_norm", "max_value") if getattr(inner, name) is not None)]
        hyper = {name: value_of(name, getattr(inner, name)) for name in ("lr", *names) if name != "lr"}
        if hyper.get("momentum") == 0:
            del hyper["momentum"]
        flags = frozenset(f for f in ("nesterov", "amsgrad", "centered") if getattr(inner, f, False))
        rule = Rule(kind, {"lr": value_of("lr", None), **hyper}, flags)
    else:
        own = {name: value_of(name, getattr(inner, name)) for name in inner.hyper_names[1:]}
        rule = Rule(rule.kind, {"lr": value_of("lr", None), **own}, rule.flags, rule.step)
    start = {}
    for name, rates in learner.start_state.items():
        leaf = rates.value.detach().double().requires_grad_()
        pairs.append((rates.value, leaf))
        start[name] = spread(leaf, {"parameter"}, learner.model)
    loop = Loop(
        learner.model, loss, learner.steps, rule, sorted(learner.adapted_names), learner.first_order,
        learner.step_weights[1:], learner.truncate, start,
    )  # fmt: skip
    return loop, pairs


def stepped(model: nn.Module, rule: mf.Rule, lr: float, batches, loss=F.cross_entropy, adapted=None) -> Iterator:
    """A copy of the model after each step of torch's own optimiser with the rule's options, and the optimiser."""
    own = copy.deepcopy(model)
    moved = [p for name, p in own.named_parameters() if adapted is None or name in adapted]
    options = {f.name: getattr(rule, f.name) for f in fields(rule) if f.name not in ("max_norm", "max_value")}
    optimiser = getattr(torch.optim, type(rule).__name__)(moved, lr=lr, **options)
    for x, y in batches:
        optimiser.zero_grad()
        loss(own(x), y).backward()
        if rule.max_value is not None:
            torch.nn.utils.clip_grad_value_(moved, rule.max_value)
        if rule.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(moved, rule.max_norm)
        optimiser.step()
        yield own, optimiser


def run(way: str, learner, tasks: mf.TaskBatch) -> mf.learners.LearnerOutput:
    if way == "backward":
        return learner.backward(tasks)
    out = learner(tasks, create_graph=way == "create_graph")
    out.loss.backward()
    return out


def check(learner, tasks, *, loss=F.cross_entropy, leaves=(), ways=WAYS, rule=None, rtol=1e-9, atol=1e-12):
    """Holds losses, outputs and all gradients of a learner to the truth on each way; ``leaves`` are further tensors."""
    loop, pairs = truth_of(learner, loss, rule)
    losses, outputs = loop.losses(tasks)
    meta = [*learner.model.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else ()), *leaves]
    meta = [p for p in meta if p.requires_grad]
    sources = [*meta, *(leaf for _, leaf in pairs)]
    wanted = torch.autograd.grad(losses.mean(), sources, allow_unused=True, materialize_grads=True)
    found = [*meta, *(parameter for parameter, _ in pairs)]
    for way in ways:
        for tensor in found:
            tensor.grad = None
        out = run(way, learner, tasks)
        torch.testing.assert_close(out.losses.detach(), losses.detach(), rtol=rtol, atol=atol, msg=f"{way}: losses")
        for t, of_task in enumerate(outputs):
            kept = slice(None) if tasks.query_mask is None else tasks.query_mask[t]
            torch.testing.assert_close(out.outputs[t].detach()[kept], of_task.detach(), rtol=rtol, atol=atol)
        for k, (tensor, want) in enumerate(zip(found, wanted, strict=True)):
            got = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            least = atol * max(1.0, float(want.abs().max()))
            said = partial("{0}, {1}: {2}".format, way, k)
            torch.testing.assert_close(got, want, rtol=rtol, atol=least, msg=said)
