"""How modules, losses and learners are called: signatures, outputs, targets, losses, gradients that leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from front_door.case import CLASSES, QUERIES, SAMPLES, TASKS, Net, Table, images, labels, sequences, small, vectors
from torch import nn

import metafast as mf

CASES = Table()


class Defaults(Net):
    def forward(self, x=None, mask=None):
        h = torch.tanh(self.body(x))
        return self.head(h if mask is None else h * mask)


class KeywordOnly(Net):
    def forward(self, x, *, scale=2.0, inverted=False):
        return self.head(torch.tanh(scale * self.body(x))) * (-1 if inverted else 1)


class Starred(Net):
    def forward(self, *inputs, **options):
        (x,) = inputs
        return self.head(torch.tanh(self.body(x))) * options.get("scale", 1.5)


class Called(Net):
    """Its work is done by another method, and by a function."""

    def __call__(self, x):
        return 2 * super().__call__(x)

    def features(self, x):
        return torch.tanh(self.body(x))

    def forward(self, x):
        return self.head(self.features(x))


CASES.one("a first argument with a default", Defaults)
CASES.one("keyword-only options", KeywordOnly)
CASES.one("*args and **kwargs", Starred)
CASES.one("a __call__ of its own", Called)


# outputs that are no tensor
class Two(Net):
    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.head(h), h


class Listed(Net):
    def forward(self, x):
        return {"logits": self.head(torch.tanh(self.body(x))), "norm": x.norm()}


class Output(NamedTuple):
    logits: torch.Tensor
    features: torch.Tensor


class Named(Net):
    def forward(self, x):
        h = torch.tanh(self.body(x))
        return Output(self.head(h), h)


@dataclass
class ModelOutput:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class Classed(Net):
    def forward(self, x):
        return ModelOutput(self.head(torch.tanh(self.body(x))))


def picks(output):
    """The learner's option and the truth's function that pick one output."""

    def read(returned):
        by_key = isinstance(output, int) or isinstance(returned, dict)
        return returned[output] if by_key else getattr(returned, output)

    return {"options": {"output": output}, "truth": {"answer": read}}


CASES.one("a tuple of outputs", Two, **picks(0))
CASES.one("a dictionary of outputs", Listed, **picks("logits"))
CASES.one("a NamedTuple of outputs", Named, **picks("logits"))
CASES.one("a dataclass of outputs", Classed, **picks("logits"))


# several inputs
class Pair(Net):
    def forward(self, x, context):
        return self.head(torch.tanh(self.body(x) + context @ self.second.weight))


class Keyed(Net):
    def forward(self, ids, mask=None):
        return self.head((torch.tanh(self.body(ids)) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def pairs():
    batch = vectors()
    x, qx = batch.support_x, batch.query_x
    return mf.TaskBatch((x, x.cos()), batch.support_y, (qx, qx.cos()), batch.query_y)


def masked_sequences():
    batch = sequences()

    def part(x):
        lengths = torch.arange(1, x.shape[1] + 1).clamp(max=4)
        mask = (torch.arange(4) < lengths[:, None]).double()
        return {"ids": x, "mask": mask.expand(TASKS, -1, -1)}

    return mf.TaskBatch(part(batch.support_x), batch.support_y, part(batch.query_x), batch.query_y)


CASES.one("two inputs", Pair, pairs)
CASES.one("inputs by name", Keyed, masked_sequences)


# losses
def weighted(outputs, targets):
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=outputs.dtype)
    return F.cross_entropy(outputs, targets, weight=weight, label_smoothing=0.1)


def focal(outputs, targets):
    p = torch.softmax(outputs, -1).gather(1, targets[:, None])
    return -((1 - p) ** 2 * p.log()).mean()


def detached_teacher(outputs, targets):
    """Self-distillation: the teacher's answer carries no gradient."""
    with torch.no_grad():
        teacher = torch.softmax(outputs / 2, -1)
    return F.cross_entropy(outputs, targets) + F.kl_div(F.log_softmax(outputs, -1), teacher, reduction="batchmean")


class Contrast(nn.Module):
    """A loss in a module: similar labels attract."""

    def forward(self, outputs, targets):
        same = targets[:, None] == targets
        similarity = F.normalize(outputs, dim=1) @ F.normalize(outputs, dim=1).T
        return F.binary_cross_entropy_with_logits(similarity, same.to(outputs.dtype))


for name, loss in [
    ("weights of classes and label smoothing", weighted),
    ("focal loss", focal),
    ("a loss with a part under no_grad", detached_teacher),
    ("a module as the loss", Contrast()),
    ("nn.CrossEntropyLoss", nn.CrossEntropyLoss()),
    ("a loss of one_hot labels", lambda o, t: F.mse_loss(o.softmax(-1), F.one_hot(t, CLASSES).to(o.dtype))),
    ("a loss that is a sum over samples", lambda o, t: F.cross_entropy(o, t, reduction="sum") / 10),
]:
    CASES.one(name, small, loss=loss)


class Learned(nn.Module):
    """A learned inner loss."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, outputs, targets):
        return self.scale * F.cross_entropy(outputs, targets)


LEARNED = Learned()
CASES.one(
    "a loss with a parameter of its own", small, loss=LEARNED, leaves=lambda model, tasks: {"scale": LEARNED.scale}
)


# targets
def with_targets(make, targets):
    """A batch whose targets are made of the inputs of each part."""

    def made():
        batch = make()
        return mf.TaskBatch(batch.support_x, targets(batch.support_x), batch.query_x, targets(batch.query_x))

    return made


def ignored(x):
    y = labels(x.shape[1])
    y[:, 0] = -100
    return y


soft_labels = with_targets(vectors, lambda x: torch.softmax(x[..., :CLASSES], -1))
ignored_labels = with_targets(vectors, ignored)
regression = with_targets(vectors, lambda x: x[..., :3].sin())
segmented = with_targets(images, lambda x: (x.sum(2) * 3).long().abs() % CLASSES)


def rows_left_out():
    batch = vectors()
    masks = [torch.ones(TASKS, n, dtype=torch.bool) for n in (SAMPLES, QUERIES)]
    for mask in masks:
        mask[0, 4:], mask[2, 0] = False, False
    return mf.TaskBatch(batch.support_x, batch.support_y, batch.query_x, batch.query_y, *masks)


CASES.one("soft labels", small, soft_labels)
CASES.one("labels of -100 are left out", small, ignored_labels)
CASES.one(
    "a label for every pixel",
    lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, CLASSES, 1)),
    segmented,
    loss=F.cross_entropy,
)
CASES.one("regression", small, regression, loss="mse")
CASES.one("regression with a robust loss", small, regression, loss=F.smooth_l1_loss)
CASES.one("ragged tasks", small, rows_left_out)
# What mixes the samples of a task would mix in the padding.
CASES.one(
    "ragged tasks of a module that subtracts the mean of its samples",
    lambda: nn.Sequential(nn.Linear(8, 8), Centred(), nn.Linear(8, CLASSES)),
    rows_left_out,
    may_be_refused=True,
)


class Centred(nn.Module):
    def forward(self, x):
        return torch.tanh(x - x.mean(0))


# gradients that leave the learner
def with_gradient():
    batch = vectors()
    batch.support_x.requires_grad_()
    batch.query_x.requires_grad_()
    return batch


def with_gradient_of_targets():
    batch = regression()
    y = batch.support_y.clone().requires_grad_()
    return mf.TaskBatch(batch.support_x, y, batch.query_x, batch.query_y)


CASES.one(
    "inputs that require a gradient",
    small,
    with_gradient,
    leaves=lambda model, tasks: {"support_x": tasks.support_x, "query_x": tasks.query_x},
)
CASES.one(
    "targets that require a gradient",
    small,
    with_gradient_of_targets,
    loss="mse",
    leaves=lambda model, tasks: {"support_y": tasks.support_y},
)
OUTER = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)


class Closed(Net):
    """A tensor of the outside that requires a gradient."""

    def forward(self, x):
        return self.head(torch.tanh(self.body(x) * OUTER))


# A gradient that leaves through a closure is right, or it is refused: it is not dropped.
CASES.one(
    "a leaf that the module holds in a closure",
    Closed,
    leaves=lambda model, tasks: {"outer": OUTER},
    may_be_refused=True,
)


# inner rules
def momentum(parameters, grads, state):
    state.update({n: 0.9 * state[n] + g if n in state else g for n, g in grads.items()})
    return {n: p - 0.1 * state[n] for n, p in parameters.items()}


CASES.one(
    "an inner loop with momentum",
    small,
    steps=3,
    truth={"rule": momentum},
    learner=lambda model: mf.MAML(model, loss="cross_entropy", lr=0.1, steps=3, inner=mf.SGD(momentum=0.9)),
)
for count in (1, 5):
    CASES.one(f"{count} steps", small, steps=count)
CASES.one("adapted by name", small, options={"adapt": ["2"]}, truth={"moved": ["2.weight", "2.bias"]})
