"""Loops by rules in C++ as tests make them: a model, its tasks, what is done to each, and the numbers of the rule."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from test_native import close
from torch import nn

import metafast as mf
from metafast.executors import CpuExecutor, ReferenceExecutor
from metafast.program.capture import capture
from metafast.program.inner_loop import InnerLoop
from metafast.program.losses import as_loss
from metafast.tasks import TaskBatch

RULES = {
    "momentum": mf.SGD(momentum=0.9),
    "dampened": mf.SGD(momentum=0.8, dampening=0.3, weight_decay=0.1),
    "nesterov": mf.SGD(momentum=0.7, nesterov=True, weight_decay=0.05),
    "decay": mf.SGD(weight_decay=0.2),
    "norm": mf.SGD(max_norm=0.4),
    "value": mf.SGD(max_value=0.05),
    "both clips": mf.SGD(momentum=0.9, max_norm=0.2, max_value=0.06),
    "adam": mf.Adam(eps=1e-3),
    "adam, decay": mf.Adam(betas=(0.8, 0.95), weight_decay=0.1, eps=1e-2),
    "adam without eps": mf.Adam(betas=(0.0, 0.5), eps=0.0),
    "adamw": mf.AdamW(weight_decay=0.2, eps=1e-2),
    "adam, clips": mf.Adam(eps=1e-2, max_norm=0.3, max_value=0.1),
    "rmsprop": mf.RMSprop(eps=1e-2),
    "rmsprop, all": mf.RMSprop(alpha=0.9, eps=0.1, momentum=0.5, centered=True, weight_decay=0.1),
    "rmsprop, centered": mf.RMSprop(alpha=0.9, eps=0.1, centered=True, max_norm=0.5),
    "adagrad": mf.Adagrad(lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.2, eps=1e-3),
}
ALL_WIDTHS = ("number", "step", "parameter", "step and parameter")


class Net(nn.Module):
    """A convolution with batch norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5, track_running_stats=False)
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        return self.head(F.max_pool2d(torch.relu(self.norm(self.conv(x))), 2).flatten(1))


def mlp(*widths):
    parts = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*parts[:-1])


MODELS = {"mlp": (lambda: mlp(3, 7, 5, 3), (3,)), "conv": (Net, (2, 4, 4))}


@dataclasses.dataclass
class Work:
    """A model and its tasks, what is done to them, and the rates."""

    program: object
    model: nn.Module
    params: torch.Tensor
    tasks: TaskBatch
    loop: InnerLoop
    rates: torch.Tensor

    def meta_gradient(self, executor=None):
        executor = executor or CpuExecutor()
        return executor.meta_gradient(self.program, self.loop, (self.params,), self.rates, self.tasks)

    def but(self, **changes):
        return dataclasses.replace(self, loop=self.loop._replace(**changes))


def samples(shape, count, ragged, dtype, classes=3):
    x, y = torch.randn(*shape, count, *dtype[1], dtype=dtype[0]), torch.randint(classes, (*shape, count))
    mask = None
    if ragged:
        mask = torch.rand(*shape, count) < 0.6
        mask[..., 1:3] = True
    return x, y, mask


def table(rule, width, steps, size, dtype):
    """Hyper-parameters ``[H, R, W]``; where there is one a parameter only the rate and the decay differ among them."""
    rows, columns = (steps if "step" in width else 1), (size if "parameter" in width else 1)
    if rule is None:
        return (0.05 + 0.1 * torch.rand(rows, columns, dtype=torch.float64)).to(dtype)
    numbers = [0.1, *(getattr(rule, name) for name in rule.hyper_names[1:])]
    found = torch.tensor(numbers, dtype=torch.float64)[:, None, None].repeat(1, rows, columns)
    found = found * (1 + 0.1 * torch.rand(len(numbers), rows, 1, dtype=torch.float64)).clamp(
        max=0.99 / found.clamp(0.9)
    )
    for h, name in enumerate(rule.hyper_names):
        if name in ("lr", "weight_decay"):
            found[h] *= 0.7 + 0.6 * torch.rand(rows, columns, dtype=torch.float64)
    return found


def work(
    rule, model="mlp", width="number", steps=3, tasks=2, support=4, dtype=torch.float64, weights=None, ragged=False,
    each_step=False, adapt=None, seed=0, **options,
):  # fmt: skip
    torch.manual_seed(seed)
    make, sample = MODELS[model] if isinstance(model, str) else model
    module = make().double()
    program = capture(module, as_loss("cross_entropy"), torch.zeros(support, *sample, dtype=torch.float64), adapt=adapt)
    params = program.flatten({n: p.detach() for n, p in module.named_parameters()}).to(dtype)
    x, y, mask = samples((steps, tasks) if each_step else (tasks,), support, ragged, (dtype, sample))
    qx, qy, qmask = samples((tasks,), support + 1, ragged, (dtype, sample))
    batch = TaskBatch(x, y, qx, qy, mask, qmask, each_step=each_step)
    options.setdefault("learns_rates", True)
    options.setdefault("one_rate", rule is None and "parameter" not in width)
    loop = InnerLoop(steps, tuple(weights or (*[0.0] * steps, 1.0)), rule=rule, **options)
    return Work(program, module, params, batch, loop, table(rule, width, steps, program.size, dtype))


def assert_close(found, wanted, tolerance, mask=None):
    close(found.losses, wanted.losses, tolerance)
    outputs = (found.outputs, wanted.outputs) if mask is None else (found.outputs[mask], wanted.outputs[mask])
    close(*outputs, tolerance)
    close(found.grads[0], wanted.grads[0], tolerance)
    assert (found.rates_grad is None) == (wanted.rates_grad is None)
    if found.rates_grad is not None:
        assert found.rates_grad.dtype == wanted.rates_grad.dtype
        for f, w in zip(found.rates_grad, wanted.rates_grad, strict=True):  # each hyper-parameter has a size of its own
            close(f, w, tolerance)


def assert_same(found, wanted):
    parts = ("losses", "outputs", "rates_grad")
    pairs = [(getattr(found, p), getattr(wanted, p)) for p in parts] + [(found.grads[0], wanted.grads[0])]
    for f, w in pairs:
        assert (f is None and w is None) or torch.equal(f, w)


def compare(made, tolerance=1e-9):
    found = made.meta_gradient()
    assert_close(found, made.meta_gradient(ReferenceExecutor()), tolerance, made.tasks.query_mask)
    return found


def plain(made):
    """The same loop without a rule."""
    rates = made.rates[0] if made.rates.dim() == 3 else made.rates
    loop = made.loop._replace(rule=None, one_rate=rates.shape[1] == 1)
    return dataclasses.replace(made, loop=loop, rates=rates.to(made.params.dtype))


def kept(made, executor=None):
    """Bytes of z that are kept at the least, in words of the error that says so."""
    with pytest.raises(ValueError, match=r"memory=1: the way back through \d+ steps keeps \d+ bytes") as found:
        made.but(memory=1).meta_gradient(executor)
    return int(str(found.value).split("keeps ")[1].split()[0])
