"""Models, their tasks and the learners' settings at which meta-gradients are tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import models
import torch
import torch.nn.functional as F
from oracle import Oracle
from torch import nn

import metafast as mf

IMAGE, VECTOR, SEQUENCE = (2, 9, 7), (3,), (5, 4)


@dataclass(frozen=True)
class Setup:
    """A model, its tasks and a learner's settings. ``classes``: outputs of a classifier; ``None``: regression."""

    name: str
    model: Callable[[], nn.Module]
    sample: tuple[int, ...] = VECTOR
    classes: int | None = None
    outputs: int = 2
    loss: Any = None
    learner: type[mf.MAML] = mf.MAML
    options: dict[str, Any] = field(default_factory=dict)
    ragged: bool = False
    support: int = 5

    def __str__(self) -> str:
        return self.name


def log_cosh(outputs, targets):
    return torch.log(torch.cosh(outputs - targets)).mean()


def smoothed(outputs, targets):
    return F.cross_entropy(outputs, targets, label_smoothing=0.1)


def images(name, model, **options):
    rest = {k: options.pop(k) for k in ("loss", "learner", "ragged", "support") if k in options}
    return Setup(name, model, IMAGE, 3, options={"steps": 2, **options}, **rest)


def vectors(name, model=models.mlp, **options):
    rest = {k: options.pop(k) for k in ("loss", "learner", "ragged", "support") if k in options}
    return Setup(name, model, options={"steps": 2, **options}, **rest)


def rate(*per, learn=True):
    return mf.Rate((0.02, 0.1), per, learn=learn)


SETUPS = [
    vectors("MAML, 1 step", steps=1),
    vectors("MAML, 3 steps", steps=3),
    vectors("MAML, 5 steps", steps=5),
    vectors("MAML, one support sample", support=1),
    vectors("first order", first_order=True, steps=3),
    vectors("first order, learned rate", first_order=True, lr=rate("parameter"), steps=3),
    vectors("FOMAML", learner=mf.FOMAML),
    vectors("Meta-SGD", learner=mf.MetaSGD, lr=(0.02, 0.1), steps=3),
    vectors("learned scalar rate", lr=rate(), steps=3),
    vectors("rate for each step", lr=rate("step"), steps=3),
    vectors("rate for each layer", lr=rate("layer"), steps=3),
    vectors("rate for each layer and step", lr=rate("layer", "step"), steps=3),
    vectors("rate for each parameter and step", lr=rate("parameter", "step"), steps=2),
    vectors("rate for each step, not learned", lr=rate("step", learn=False), steps=3),
    vectors("multi-step loss", step_weights=[0.2, 0.3, 0.5], steps=3),
    vectors("multi-step loss, learned rates, none on the last", step_weights=[0.7, 0.3, 0], steps=3, lr=rate("step")),
    vectors("multi-step loss, first order", step_weights=[0.5, 0.2, 0.3], steps=3, first_order=True),
    vectors("custom loss", loss=log_cosh),
    vectors("custom loss, ragged", loss=log_cosh, ragged=True),
    vectors("a sum of squares", loss=nn.MSELoss(reduction="sum"), ragged=True),
    vectors("another loss of query sets", query_loss=nn.L1Loss(), steps=3, step_weights=[0.2, 0.3, 0.5]),
    vectors("ragged regression", ragged=True),
    vectors("only biases adapted", adapt=["0.bias", "4.bias"]),
    vectors("ReLU", lambda: models.mlp(nn.ReLU)),
    vectors("LeakyReLU", lambda: models.mlp(nn.LeakyReLU)),
    vectors("Sigmoid", lambda: models.mlp(nn.Sigmoid)),
    vectors("GELU", lambda: models.mlp(nn.GELU)),
    vectors("PReLU, derived", lambda: models.mlp(nn.PReLU)),
    vectors("SiLU, derived", lambda: models.mlp(nn.SiLU)),
    vectors("gates by chunk and slice", models.Gated),
    vectors("buffers", models.Buffered),
    vectors("tied weights", models.Tied),
    vectors("tied weights, Meta-SGD", models.Tied, learner=mf.MetaSGD),
    vectors("direct parameters", models.Direct),
    vectors("direct parameters, rate for each layer and step", models.Direct, lr=rate("layer", "step")),
    vectors("unused parameter", models.Unused),
    images("batch norm of the task", models.convnet, bn="task"),
    images("batch norm of the task, ragged", models.convnet, ragged=True),
    images("batch norm per step", models.convnet, bn="per_step", steps=3),
    images("batch norm per step, multi-step", models.convnet, bn="per_step", steps=3, step_weights=[0.3, 0.3, 0.4]),
    images("batch norm frozen", models.convnet, bn="frozen"),
    images("batch norm running", models.convnet, bn="running"),
    images("MAML++", models.convnet, learner=mf.MAMLPlusPlus, lr=0.05, steps=3),
    images("batch norm not adapted", models.convnet, adapt="without batch norm"),
    images("stride 2, average pool", lambda: models.convnet(pool=nn.AvgPool2d, stride=2)),
    images("group norm, derived", lambda: models.convnet(norm=lambda c: nn.GroupNorm(1, c))),
    images("instance norm, derived", lambda: models.convnet(norm=lambda c: nn.InstanceNorm2d(c, affine=True))),
    images("residual", models.Residual),
    images("residual, custom loss", models.Residual, loss=smoothed),
    images("class weights and smoothed labels, ragged", models.convnet, ragged=True, loss=nn.CrossEntropyLoss(
        torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), label_smoothing=0.1)),
    images("residual, Meta-SGD", models.Residual, learner=mf.MetaSGD, lr=(0.02, 0.1)),
    images("functional forms", models.Functional),
    images("ANIL", models.Embedded, learner=mf.ANIL, head="classifier", steps=3),
    images("ANIL, ragged", models.Embedded, learner=mf.ANIL, head="classifier", steps=3, ragged=True),
    images("ANIL, first order", models.Embedded, learner=mf.ANIL, head="classifier", first_order=True),
    images("ANIL, learned rate", models.Embedded, learner=mf.ANIL, head="classifier", lr=rate("parameter")),
    images("ANIL, multi-step", models.Embedded, learner=mf.ANIL, head="classifier", step_weights=[0.5, 0.5]),
    images("ANIL, norm and head", models.Embedded, learner=mf.ANIL, head=["norm", "classifier"]),
    images("ANIL, per-step batch norm", models.Embedded, learner=mf.ANIL, head="classifier", bn="per_step"),
    images("body adapted, head not", models.Embedded, adapt="body"),
    Setup("views", models.Viewed, (2, 5, 5), 3, options={"steps": 2}),
    Setup("attention", models.Attention, SEQUENCE, 3, options={"steps": 2}),
    Setup("recurrence", models.Recurrent, SEQUENCE, 3, options={"steps": 2}),
    Setup("LayerNorm of images", lambda: models.convnet(norm=lambda c: nn.LayerNorm([9, 7] if c == 4 else [4, 2])),
          IMAGE, 3, options={"steps": 2}),
]  # fmt: skip


def make_tasks(setup, tasks=3, query=4):
    def part(n):
        x = torch.randn(tasks, n, *setup.sample)
        y = torch.randint(0, setup.classes, (tasks, n)) if setup.classes else torch.randn(tasks, n, setup.outputs)
        return x, y

    masks = ()
    if setup.ragged:
        masks = tuple(torch.ones(tasks, n, dtype=torch.bool) for n in (setup.support, query))
        masks[0][0, 3:], masks[0][2, 0], masks[1][1, :2] = False, False, False
    return mf.TaskBatch(*part(setup.support), *part(query), *masks)


def make_learner(setup, dtype=torch.float64, backend="reference", tasks=None, device="cpu"):
    """A learner that is prepared for batches like ``tasks``, or like those of ``make_tasks``."""
    model = setup.model().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    options = {
        "backend": backend,
        "lr": 0.05,
        "loss": setup.loss or ("cross_entropy" if setup.classes else "mse"),
        **setup.options,
    }
    if options.get("adapt") == "without batch norm":
        options["adapt"] = mf.without_batch_norm(model)
    learner = setup.learner(model, **options)
    with torch.no_grad():  # rows of a per-step batch norm that differ
        for row in learner.rows.parameters():
            row.add_(0.1 * torch.randn_like(row))
    with torch.random.fork_rng():
        first = tasks or make_tasks(setup).to(dtype)
    learner.to(device).prepare(first.to(device))
    return learner


def make_oracle(learner):
    """The same settings, told to the oracle by name. Also the rates by name and the leaf that they were made from."""
    program = learner.program
    modes = [node.layer.mode for node in program.nodes if node.layer.kind == "batch_norm"]
    oracle = Oracle(
        learner.model, getattr(program.loss, "function", program.loss.kind), learner.steps,
        adapted=[p.name for p in program.parameters if p.adapted], first_order=learner.first_order,
        weights=learner.step_weights[1:], query_loss=getattr(learner.query_loss, "function", None),
        bn=modes[0] if modes else "task",
    )  # fmt: skip
    for key, row in learner.rows.items():
        oracle.parameters[key.replace("/", ".")] = row.detach().double().requires_grad_()
    leaf = learner.rate.value.detach().double().requires_grad_()
    return oracle, rates_by_name(oracle, leaf, learner), leaf


def rates_by_name(oracle, leaf, learner):
    """``{name: [S, *shape]}`` from rates ``[1 or S, 1 or layers or elements]``, counted in the order of the module."""
    used = [p.name for p in learner.program.parameters]
    rows = leaf.expand(learner.steps, -1)
    by_name, offset, layers = {}, 0, []
    for name in used:
        shape = oracle.parameters[name].shape
        layers += [name.rpartition(".")[0]] if name.rpartition(".")[0] not in layers else []
        if leaf.shape[1] == 1:
            column = rows
        elif learner.rate.index is not None:
            column = rows[:, layers.index(name.rpartition(".")[0])][:, None]
        else:
            column = rows[:, offset : offset + shape.numel()]
        by_name[name] = column.expand(learner.steps, shape.numel()).reshape(learner.steps, *shape)
        offset += shape.numel()
    unused = {n: torch.zeros(learner.steps, *p.shape) for n, p in oracle.parameters.items() if n not in by_name}
    return by_name | unused


def regression(tasks=4, support=6, query=5, dtype=torch.float64):
    return make_tasks(Setup("", models.mlp, support=support), tasks, query).to(dtype)


def classification(tasks=3):
    return make_tasks(Setup("", models.Embedded, IMAGE, 3), tasks).to(torch.float64)


def perceptron(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return models.mlp().to(dtype)


def grads(learner):
    return [p.grad.clone() for p in learner.model.parameters()]
