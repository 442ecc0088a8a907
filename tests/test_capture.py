"""Capture: what becomes of a user's module, and what is refused."""

from __future__ import annotations

import copy
import inspect
import random

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metafast as mf
from metafast.executors import ReferenceExecutor
from metafast.kernels.contract.pattern import Pattern
from metafast.kernels.mse import MSE
from metafast.program import patterns
from metafast.program.capture import CaptureError, capture
from metafast.tasks import Batch


def program_of(model, sample=(4,), **options):
    return capture(model, MSE(), torch.randn(5, *sample, dtype=next(model.parameters()).dtype), **options)


class Call(nn.Module):
    """``function(module, x)`` behind a linear layer, so that there is something to learn."""

    def __init__(self, function, **modules):
        super().__init__()
        self.first = nn.Linear(4, 4)
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, x):
        self.given = x
        return self.function(self, self.first(x))


class RenamedNorm(nn.BatchNorm1d):
    """Adds nothing to its base."""


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Negated(nn.Identity):
    def forward(self, x):
        return -x


VECTOR, IMAGE, SEQUENCE = (4,), (2, 6, 4), (3, 4)
SPELLINGS = [
    ("nn.ReLU", VECTOR, lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), ["linear", "relu"]),
    ("F.relu", VECTOR, lambda: Call(lambda m, x: F.relu(x)), ["linear", "relu"]),
    ("F.relu in place", VECTOR, lambda: Call(lambda m, x: F.relu(x, inplace=True)), ["linear", "relu"]),
    ("torch.relu", VECTOR, lambda: Call(lambda m, x: torch.relu(x)), ["linear", "relu"]),
    ("x.relu", VECTOR, lambda: Call(lambda m, x: x.relu()), ["linear", "relu"]),
    ("x.relu_", VECTOR, lambda: Call(lambda m, x: x.relu_()), ["linear", "relu"]),
    ("F.leaky_relu", VECTOR, lambda: Call(lambda m, x: F.leaky_relu(x, negative_slope=0.3)), ["linear", "leaky_relu"]),
    ("an option that is a tensor", VECTOR, lambda: Call(lambda m, x: F.leaky_relu(x, m.slope), slope=torch.tensor(0.3)),
     ["linear", "leaky_relu"]),
    ("nn.LeakyReLU", VECTOR, lambda: Call(lambda m, x: m.a(x), a=nn.LeakyReLU(0.3)), ["linear", "leaky_relu"]),
    ("tanh", VECTOR, lambda: Call(lambda m, x: m.a(torch.tanh(x.tanh())), a=nn.Tanh()), ["linear"] + ["tanh"] * 3),
    ("sigmoid", VECTOR, lambda: Call(lambda m, x: m.a(torch.sigmoid(x.sigmoid())), a=nn.Sigmoid()),
     ["linear"] + ["sigmoid"] * 3),
    ("gelu", VECTOR, lambda: Call(lambda m, x: m.a(F.gelu(x)), a=nn.GELU()), ["linear", "gelu", "gelu"]),
    ("gelu by tanh", VECTOR, lambda: Call(lambda m, x: m.a(F.gelu(x, approximate="tanh")), a=nn.GELU("tanh")),
     ["linear", "derived"]),
    ("softsign", VECTOR, lambda: Call(lambda m, x: F.softsign(x)), ["linear", "derived"]),
    ("x + y", VECTOR, lambda: Call(lambda m, x: torch.tanh(x) + x), ["linear", "tanh", "add"]),
    ("torch.add", VECTOR, lambda: Call(lambda m, x: torch.add(x, torch.tanh(x))), ["linear", "tanh", "add"]),
    ("x.add", VECTOR, lambda: Call(lambda m, x: x.add(torch.tanh(x))), ["linear", "tanh", "add"]),
    ("x += y", VECTOR, lambda: Call(lambda m, x: _iadd(x + x, x)), ["linear", "add", "add"]),
    ("scaled add", VECTOR, lambda: Call(lambda m, x: torch.add(x, torch.tanh(x), alpha=2)),
     ["linear", "tanh", "derived"]),
    ("x + 1", VECTOR, lambda: Call(lambda m, x: x + 1), ["linear", "derived"]),
    ("1 + x", VECTOR, lambda: Call(lambda m, x: 1 + x), ["linear", "derived"]),
    ("add with fewer axes", VECTOR, lambda: Call(lambda m, x: x + x.mean(0)), ["linear", "derived", "add"]),
    ("x plus a size", VECTOR, lambda: Call(lambda m, x: x + x.size(0)), ["linear", "derived"]),
    ("F.linear", VECTOR, lambda: Call(lambda m, x: F.linear(x, m.first.weight, m.first.bias)), ["linear", "linear"]),
    ("F.linear, by name", VECTOR, lambda: Call(lambda m, x: F.linear(input=x, weight=m.first.weight)), ["linear"] * 2),
    ("x @ w", VECTOR, lambda: Call(lambda m, x: x @ m.first.weight), ["linear", "derived"]),
    ("dropout in eval mode", VECTOR, lambda: Call(lambda m, x: m.d(x), d=nn.Dropout(0.5)).eval(), ["linear"]),
    ("F.dropout, not training", VECTOR, lambda: Call(lambda m, x: F.dropout(x, 0.5, False)),
     ["linear"]),
    ("a norm that is called by another name", VECTOR, lambda: Call(lambda m, x: m.n(x), n=RenamedNorm(4)),
     ["linear", "batch_norm"]),
    ("a layer that computes more than its base", VECTOR, lambda: Call(lambda m, x: m.l(x), l=Doubled(4, 3)),
     ["linear", "linear", "derived"]),
    ("an identity that is none", VECTOR, lambda: Call(lambda m, x: m.i(x), i=Negated()), ["linear", "derived"]),
    ("identity", VECTOR, lambda: Call(lambda m, x: m.i(x), i=nn.Identity()), ["linear"]),
    ("LayerNorm", SEQUENCE, lambda: Call(lambda m, x: m.n(x), n=nn.LayerNorm([3, 4])), ["linear", "layer_norm"]),
    ("LayerNorm without map", VECTOR, lambda: Call(lambda m, x: m.n(x), n=nn.LayerNorm(4, elementwise_affine=False)),
     ["linear", "layer_norm"]),
    ("LayerNorm without shift", VECTOR, lambda: Call(lambda m, x: m.n(x), n=nn.LayerNorm(4, bias=False)),
     ["linear", "layer_norm"]),
    ("F.layer_norm", VECTOR, lambda: Call(lambda m, x: F.layer_norm(x, [4])), ["linear", "layer_norm"]),
    ("BatchNorm1d", VECTOR, lambda: Call(lambda m, x: m.n(x), n=nn.BatchNorm1d(4)), ["linear", "batch_norm"]),
    ("BatchNorm1d of a sequence", SEQUENCE, lambda: Call(lambda m, x: m.n(x), n=nn.BatchNorm1d(3, affine=False)),
     ["linear", "batch_norm"]),
    ("BatchNorm2d", IMAGE, lambda: Call(lambda m, x: m.n(x), n=nn.BatchNorm2d(2, track_running_stats=False)),
     ["linear", "batch_norm"]),
    ("BatchNorm3d", (2, 3, 2, 4), lambda: Call(lambda m, x: m.n(x), n=nn.BatchNorm3d(2)), ["linear", "batch_norm"]),
    ("Conv2d", IMAGE, lambda: Call(lambda m, x: m.c(x), c=nn.Conv2d(2, 4, (3, 2), 2, (1, 0), groups=2)),
     ["linear", "conv2d"]),
    ("F.conv2d", IMAGE, lambda: Call(lambda m, x: F.conv2d(x, m.c.weight, padding=1), c=nn.Conv2d(2, 4, 3)),
     ["linear", "conv2d"]),
    ("padding by name", IMAGE, lambda: Call(lambda m, x: m.c(x), c=nn.Conv2d(2, 4, 3, padding="same")),
     ["linear", "derived"]),
    ("padding by reflection", IMAGE,
     lambda: Call(lambda m, x: m.c(x), c=nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")),
     ["linear", "derived", "conv2d"]),
    ("Conv1d", SEQUENCE, lambda: Call(lambda m, x: m.c(x), c=nn.Conv1d(3, 2, 2)), ["linear", "derived"]),
    ("MaxPool2d", IMAGE, lambda: Call(lambda m, x: m.p(x), p=nn.MaxPool2d((3, 2), padding=(1, 0), ceil_mode=True)),
     ["linear", "max_pool2d"]),
    ("F.max_pool2d", IMAGE, lambda: Call(lambda m, x: F.max_pool2d(x, 2)), ["linear", "max_pool2d"]),
    ("AvgPool2d", IMAGE, lambda: Call(lambda m, x: m.p(x), p=nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
     ["linear", "avg_pool2d"]),
    ("F.avg_pool2d", IMAGE, lambda: Call(lambda m, x: F.avg_pool2d(x, (2, 1), stride=1)), ["linear", "avg_pool2d"]),
    ("AdaptiveAvgPool2d", IMAGE, lambda: Call(lambda m, x: m.p(x), p=nn.AdaptiveAvgPool2d((4, 3))),
     ["linear", "adaptive_avg_pool2d"]),
    ("a window as large as the image", IMAGE, lambda: Call(lambda m, x: F.avg_pool2d(x, x.shape[2:])),
     ["linear", "avg_pool2d"]),
    ("F.adaptive_avg_pool2d", IMAGE, lambda: Call(lambda m, x: F.adaptive_avg_pool2d(x, 2)),
     ["linear", "adaptive_avg_pool2d"]),
    ("adaptive pool that keeps an axis", IMAGE, lambda: Call(lambda m, x: m.p(x), p=nn.AdaptiveAvgPool2d((None, 2))),
     ["linear", "adaptive_avg_pool2d"]),
    ("Flatten", IMAGE, lambda: Call(lambda m, x: m.f(x), f=nn.Flatten()), ["linear", "flatten"]),
    ("x.flatten", IMAGE, lambda: Call(lambda m, x: x.flatten(1)), ["linear", "flatten"]),
    ("torch.flatten, middle", IMAGE, lambda: Call(lambda m, x: torch.flatten(x, 1, 2)), ["linear", "flatten"]),
    ("torch.flatten from the end", IMAGE, lambda: Call(lambda m, x: torch.flatten(x, -3)), ["linear", "flatten"]),
    ("view by size", IMAGE, lambda: Call(lambda m, x: x.view(x.size(0), -1)), ["linear", "flatten"]),
    ("view by shape", IMAGE, lambda: Call(lambda m, x: x.view(x.shape[0], -1)), ["linear", "flatten"]),
    ("torch.reshape", IMAGE, lambda: Call(lambda m, x: torch.reshape(x, (x.size(0), -1))), ["linear", "flatten"]),
    ("view that keeps no sample", IMAGE, lambda: Call(lambda m, x: x.view(x.size(0), 4, -1)), ["linear", "derived"]),
    ("transpose", SEQUENCE, lambda: Call(lambda m, x: x.transpose(1, 2)), ["linear", "derived"]),
    ("mean", SEQUENCE, lambda: Call(lambda m, x: x.mean(dim=1)), ["linear", "derived"]),
    ("multi-head attention", SEQUENCE,
     lambda: Call(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2, batch_first=True)),
     ["linear", "derived", "linear", "derived", "linear", "derived"]),
    ("max over an axis", SEQUENCE, lambda: Call(lambda m, x: x.max(dim=1)[0]), ["linear", "derived"]),
    ("max over an axis, by name", SEQUENCE, lambda: Call(lambda m, x: torch.max(x, 1).values), ["linear", "derived"]),
    ("unpacking", SEQUENCE, lambda: Call(lambda m, x: _first_two(x.unbind(1))),
     ["linear", "derived", "derived", "add"]),
]  # fmt: skip


def _iadd(a, b):
    a += b
    return a


def _first_two(parts):
    return parts[0] + parts[1]


@pytest.mark.parametrize(("sample", "make", "expected"), [s[1:] for s in SPELLINGS], ids=[s[0] for s in SPELLINGS])
def test_spellings_become_the_layers_they_mean(sample, make, expected):
    model = make().double()
    assert [node.layer.kind for node in program_of(model, sample).nodes] == expected
    assert_computes(model, sample)


def assert_computes(model, sample):
    """Outputs and gradients of two tasks are those of the module itself."""
    program = program_of(model, sample)
    x = torch.randn(2, 5, *sample, dtype=torch.float64)
    flat = program.flatten(dict(model.named_parameters())).detach()
    reference = ReferenceExecutor()
    parameters, expected = [dict(model.named_parameters())[p.name] for p in program.parameters], []
    outputs = torch.stack([model(x[0].clone()), model(x[1].clone())])
    torch.testing.assert_close(reference.predict(program, flat, x), outputs.detach(), rtol=1e-11, atol=1e-12)
    y = torch.randn_like(outputs)
    for task in range(2):
        loss = F.mse_loss(outputs[task], y[task])
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        expected.append(torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                                   for p, g in zip(parameters, found, strict=True)]))  # fmt: skip
    _, grads, _ = reference.loss_and_grad(program, flat.expand(2, -1), Batch(x, y))
    torch.testing.assert_close(grads, torch.stack(expected), rtol=1e-9, atol=1e-11)


def test_no_two_layers_match_the_same(monkeypatch):
    reference = type("reference", (), {"PATTERNS": (Pattern(lambda: None, ("tanh.default",)),) * 2})
    monkeypatch.setattr(patterns, "modules", lambda file: [reference])
    with pytest.raises(ValueError, match=r"tanh\.default is matched by two patterns"):
        patterns.catalogue.__wrapped__()


@pytest.mark.parametrize(
    ("make", "sample"),
    [
        (models.mlp, (3,)), (models.convnet, (2, 9, 7)), (models.Residual, (2, 9, 7)), (models.Attention, (5, 4)),
        (models.Gated, (3,)), (models.Viewed, (2, 5, 5)), (models.Buffered, (3,)), (models.Tied, (3,)),
        (models.Direct, (3,)), (models.Functional, (2, 9, 7)), (models.Unused, (3,)), (models.Embedded, (2, 9, 7)),
        (models.Recurrent, (5, 4)),
        (lambda: nn.Sequential(nn.Sequential(models.mlp()), models.mlp(widths=(2, 4))), (3,)),
    ],
)  # fmt: skip
def test_predictions_are_the_modules_own(make, sample):
    assert_computes(make().double(), sample)


def test_names_come_from_the_module_and_the_module_stays_as_it_was():
    model = models.Residual()
    before, code = copy.deepcopy(model.state_dict()), type(model).forward
    modes = [m.training for m in model.modules()]
    program = program_of(model, (2, 9, 7))
    assert [p.name for p in program.parameters] == [name for name, _ in model.named_parameters()]
    names = ["stem", "relu", "block.0", "block.1", "block.2", "skip", "add", "sigmoid", "add_1", "avg_pool2d",
             "adaptive_avg_pool2d", "flatten", "classifier"]  # fmt: skip
    assert [node.name for node in program.nodes] == names
    assert "models.py" in program.nodes[1].line
    assert "F.relu(self.stem(x))" in program.nodes[1].line
    assert [tuple(p.shape) for p in program.parameters] == [tuple(p.shape) for p in model.parameters()]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert type(model).forward is code
    assert [m.training for m in model.modules()] == modes


def test_flat_vector_holds_each_parameter_at_its_place():
    model = models.Direct()
    program = program_of(model, (3,))
    named = dict(model.named_parameters())
    flat = program.flatten(named)
    assert flat.shape == (program.size,) == (sum(p.numel() for p in model.parameters()),)
    for p, value in zip(program.parameters, program.unflatten(flat), strict=True):
        assert torch.equal(value, named[p.name])
        assert torch.equal(flat[p.offset : p.offset + p.size], named[p.name].flatten())
    by_task = {name: torch.stack([p, 2 * p]) for name, p in named.items()}
    assert torch.equal(program.flatten(by_task), torch.stack([flat, 2 * flat]))


def test_unused_parameters_are_left_out_and_tied_ones_come_once():
    assert not any(p.name.startswith("spare") for p in program_of(models.Unused(), (3,)).parameters)
    tied = program_of(models.Tied(), (3,)).parameters
    assert [p.name for p in tied] == ["a.weight", "a.bias", "head.weight", "head.bias"]


def test_what_does_not_change_from_step_to_step_is_known():
    program = program_of(models.Embedded(), (2, 9, 7), adapt={"classifier.weight"})
    assert program.moving == (False,) * (len(program.nodes)) + (True,)
    assert program_of(models.Embedded(), (2, 9, 7), adapt={"body.0.bias"}).moving[1:] == (True,) * len(program.nodes)
    by_step = program_of(models.Embedded(), (2, 9, 7), adapt={"classifier.weight"}, bn="per_step", steps=2)
    assert by_step.moving[1:3] == (False, True)
    assert next(p for p in by_step.parameters if p.name == "body.1.weight").shape == (3, 4)


def _branches(m, x):
    if x.sum() > 0:
        return x
    return -x


def _loops(m, x):
    while x.norm() > 1:
        x = x / 2
    return x


def _counts(m, x):
    return x * float(x.detach().abs().max())


def _unseen_write(m, x):
    y = torch.tanh(x)
    with torch.no_grad():
        y.mul_(2)
    return y


OUTSIDE = torch.ones(4, requires_grad=True)


class WritesToInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        x.mul_(2)
        return self.layer(x)


class Twice(torch.autograd.Function):
    """Reads a tensor that is not among its arguments, where ``other`` is given; or changes its argument."""

    other = None

    @staticmethod
    def forward(ctx, x, in_place):
        return x.mul_(2) if in_place else x * 2 if Twice.other is None else x * Twice.other

    @staticmethod
    def backward(ctx, g):
        return 2 * g, None


def _closure(m, x):
    Twice.other = torch.tanh(x)
    try:
        return Twice.apply(x, False)
    finally:
        Twice.other = None


def _doubled_weight(m, x):
    with torch.no_grad():
        return x @ Twice.apply(m.first.weight, True)


def _drawn_by_python(m, x):
    return x * random.random()


def _differentiates(m, x):
    return torch.autograd.grad(x.sum(), x, create_graph=True)[0] * x


REFUSALS = [
    ("branch", lambda: Call(_branches), ["test_capture.py", "x.sum() > 0", "torch.where"]),
    ("loop", lambda: Call(_loops), ["test_capture.py", "x.norm() > 1"]),
    ("number from a tensor", lambda: Call(_counts), ["test_capture.py", "x.detach().abs().max()", ".item()"]),
    ("list from a tensor", lambda: Call(lambda m, x: x * x.detach().tolist()[0][0]), [".tolist()", "torch.where"]),
    ("array from a tensor", lambda: Call(lambda m, x: x * x.detach().numpy()[0, 0]), [".numpy()", "torch.where"]),
    ("shape from values", lambda: Call(lambda m, x: x[x > 0]), ["shape depends on values", "x[x > 0]"]),
    ("write to the input", WritesToInput, ["in place", "test_capture.py", "x.mul_(2)", "out-of-place"]),
    ("write to a parameter", lambda: Call(lambda m, x: x + m.first.weight.data.mul_(2)), ["'first.weight' in place"]),
    ("write that carries no gradient", lambda: Call(_unseen_write), ["torch.no_grad()", "out-of-place"]),
    ("numbers drawn by Python", lambda: Call(_drawn_by_python), ["Python's random", "test_capture.py"]),
    ("a gradient in forward", lambda: Call(_differentiates), ["differentiates", "grad(x.sum()"]),
    ("torch.func in forward", lambda: Call(lambda m, x: torch.vmap(torch.sin)(x)), ["torch.func", "Write out"]),
    ("a foreign leaf", lambda: Call(lambda m, x: x * OUTSIDE), ["not registered", "nn.Parameter"]),
    ("a Function that reads beside its arguments", lambda: Call(_closure), ["Twice", "Pass it to apply"]),
    ("a Function in place", lambda: Call(lambda m, x: Twice.apply(torch.tanh(x), True)), ["Twice", "in place"]),
    ("a Function that changes a parameter", lambda: Call(_doubled_weight), ["Twice", "in place", "x.mul_(2)"]),
    ("a sparse tensor", lambda: Call(lambda m, x: torch.sparse.mm(torch.eye(5).to_sparse(), x)), ["to_dense()"]),
    ("tuple of outputs", lambda: Call(lambda m, x: (x, x)), ["Call.forward returns", "one tensor", "output="]),
    ("dict of outputs", lambda: Call(lambda m, x: {"y": x}), ["Call.forward returns", "['y']", "output="]),
    ("whole numbers as outputs", lambda: Call(lambda m, x: x.argmax(1)), ["torch.int64", "real numbers"]),
    ("no output of the input", lambda: Call(lambda m, x: m.first.weight), ["does not depend on its input"]),
    ("no output of the input, computed", lambda: Call(lambda m, x: m.first.weight.sin()),
     ["does not depend on its input"]),
    ("a constant as output", lambda: Call(lambda m, x: torch.ones(5, 4)), ["does not depend on its input"]),
    ("parameters that are not used", lambda: Call(lambda m, x: m.given), ["no parameters", "nothing to meta-learn"]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "words"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_what_cannot_work_is_refused_with_the_line(make, words):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CaptureError) as caught:
        program_of(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


def test_the_refusal_names_the_users_line():
    lines, start = inspect.getsourcelines(_branches)
    line = start + next(i for i, text in enumerate(lines) if "if x.sum()" in text)
    with pytest.raises(CaptureError, match=rf"test_capture\.py:{line} "):
        mf.MAML(Call(_branches), loss="mse", lr=0.1).explain(torch.randn(2, 3, 4))


def test_a_module_that_fails_is_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 4))

        def forward(self, x, other):
            return self.inner(x) + other

    with pytest.raises(ValueError, match=r"Two fails at module '' \(Two\): .*missing.*'other'.*shape \[4\]"):
        program_of(Two())
    with pytest.raises(ValueError, match=r"module '1' \(Linear\): .*cannot be multiplied.* 5 samples .*shape \[4\]"):
        program_of(Two().inner)


def test_options_with_default_values_are_fixed():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, scale=2.0, negate=False):
            x = self.layer(x) * scale
            return -x if negate else x

    assert_computes(Scaled().double(), VECTOR)
