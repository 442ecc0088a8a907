"""Capture: what becomes of a user's module, and what is refused."""

from __future__ import annotations

import copy
import inspect
import types

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


def program_of(model, **options):
    return capture(model, MSE(), **options)


def kinds(model):
    return [node.layer.kind for node in program_of(model).nodes]


class Call(nn.Module):
    """``function(module, x)`` behind a linear layer, so that there is something to learn."""

    def __init__(self, function, **modules):
        super().__init__()
        self.first = nn.Linear(4, 4)
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, x):
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
     ["linear", "derived"]),
    ("nn.LeakyReLU", VECTOR, lambda: Call(lambda m, x: m.a(x), a=nn.LeakyReLU(0.3)), ["linear", "leaky_relu"]),
    ("tanh", VECTOR, lambda: Call(lambda m, x: m.a(torch.tanh(x.tanh())), a=nn.Tanh()), ["linear"] + ["tanh"] * 3),
    ("sigmoid", VECTOR, lambda: Call(lambda m, x: m.a(torch.sigmoid(x.sigmoid())), a=nn.Sigmoid()),
     ["linear"] + ["sigmoid"] * 3),
    ("gelu", VECTOR, lambda: Call(lambda m, x: m.a(F.gelu(x)), a=nn.GELU()), ["linear", "gelu", "gelu"]),
    ("gelu by tanh", VECTOR, lambda: Call(lambda m, x: m.a(F.gelu(x, approximate="tanh")), a=nn.GELU("tanh")),
     ["linear", "derived", "derived"]),
    ("softsign", VECTOR, lambda: Call(lambda m, x: F.softsign(x)), ["linear", "derived"]),
    ("x + y", VECTOR, lambda: Call(lambda m, x: torch.tanh(x) + x), ["linear", "tanh", "add"]),
    ("torch.add", VECTOR, lambda: Call(lambda m, x: torch.add(x, torch.tanh(x))), ["linear", "tanh", "add"]),
    ("x.add", VECTOR, lambda: Call(lambda m, x: x.add(torch.tanh(x))), ["linear", "tanh", "add"]),
    ("x += y", VECTOR, lambda: Call(lambda m, x: _iadd(torch.tanh(x), x)), ["linear", "tanh", "add"]),
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
     ["linear", "derived"]),
    ("a norm that is called by another name", VECTOR, lambda: Call(lambda m, x: m.n(x), n=RenamedNorm(4)),
     ["linear", "batch_norm"]),
    ("a layer that computes more than its base", VECTOR, lambda: Call(lambda m, x: m.l(x), l=Doubled(4, 3)),
     ["linear", "derived"]),
    ("an identity that is none", VECTOR, lambda: Call(lambda m, x: m.i(x), i=Negated()), ["linear", "derived"]),
    ("identity", VECTOR, lambda: Call(lambda m, x: m.i(x), i=nn.Identity()), ["linear"]),
    ("LayerNorm", SEQUENCE, lambda: Call(lambda m, x: m.n(x), n=nn.LayerNorm([3, 4])), ["linear", "layer_norm"]),
    ("LayerNorm without map", VECTOR, lambda: Call(lambda m, x: m.n(x), n=nn.LayerNorm(4, elementwise_affine=False)),
     ["linear", "layer_norm"]),
    ("LayerNorm without shift", VECTOR, lambda: Call(lambda m, x: m.n(x), n=nn.LayerNorm(4, bias=False)),
     ["linear", "layer_norm"]),
    ("F.layer_norm", VECTOR, lambda: Call(lambda m, x: F.layer_norm(x, [4])), ["linear", "derived"]),
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
     lambda: Call(lambda m, x: m.c(x), c=nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")), ["linear", "derived"]),
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
     ["linear", "derived"]),
    ("F.adaptive_avg_pool2d", IMAGE, lambda: Call(lambda m, x: F.adaptive_avg_pool2d(x, 2)),
     ["linear", "adaptive_avg_pool2d"]),
    ("adaptive pool that keeps an axis", IMAGE, lambda: Call(lambda m, x: m.p(x), p=nn.AdaptiveAvgPool2d((None, 2))),
     ["linear", "derived"]),
    ("Flatten", IMAGE, lambda: Call(lambda m, x: m.f(x), f=nn.Flatten()), ["linear", "flatten"]),
    ("x.flatten", IMAGE, lambda: Call(lambda m, x: x.flatten(1)), ["linear", "flatten"]),
    ("torch.flatten, middle", IMAGE, lambda: Call(lambda m, x: torch.flatten(x, 1, 2)), ["linear", "flatten"]),
    ("torch.flatten from the end", IMAGE, lambda: Call(lambda m, x: torch.flatten(x, -3)), ["linear", "derived"]),
    ("view by size", IMAGE, lambda: Call(lambda m, x: x.view(x.size(0), -1)), ["linear", "flatten"]),
    ("view by shape", IMAGE, lambda: Call(lambda m, x: x.view(x.shape[0], -1)), ["linear", "flatten"]),
    ("torch.reshape", IMAGE, lambda: Call(lambda m, x: torch.reshape(x, (x.size(0), -1))), ["linear", "flatten"]),
    ("view that keeps no sample", IMAGE, lambda: Call(lambda m, x: x.view(x.size(0), 4, -1)), ["linear", "derived"]),
    ("transpose", SEQUENCE, lambda: Call(lambda m, x: x.transpose(1, 2)), ["linear", "derived"]),
    ("mean", SEQUENCE, lambda: Call(lambda m, x: x.mean(dim=1)), ["linear", "derived"]),
    ("multi-head attention", SEQUENCE,
     lambda: Call(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2, batch_first=True)),
     ["linear", "derived"]),
    ("max over an axis", SEQUENCE, lambda: Call(lambda m, x: x.max(dim=1)[0]), ["linear", "derived"]),
    ("max over an axis, by name", SEQUENCE, lambda: Call(lambda m, x: torch.max(x, 1).values), ["linear", "derived"]),
    ("unpacking", SEQUENCE, lambda: Call(lambda m, x: _first_two(x.unbind(1))),
     ["linear", "derived", "derived", "add"]),
]  # fmt: skip


def test_no_two_layers_match_the_same():
    reference, kind = types.ModuleType("reference"), nn.Linear
    reference.PATTERNS = Pattern(lambda input: None, modules=(kind,)), Pattern(lambda input: None, modules=(kind,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "modules", lambda file: [reference])
        with pytest.raises(ValueError, match=r"Linear.*two patterns"):
            patterns.catalogue.__wrapped__()


def _iadd(a, b):
    a += b
    return a


def _first_two(parts):
    return parts[0] + parts[1]


@pytest.mark.parametrize(("sample", "make", "expected"), [s[1:] for s in SPELLINGS], ids=[s[0] for s in SPELLINGS])
def test_spellings_become_the_layers_they_mean(sample, make, expected):
    model = make().double()
    assert kinds(model) == expected
    assert_predicts(model, sample)


def assert_predicts(model, sample):
    program = program_of(model)
    x = torch.randn(2, 5, *sample, dtype=torch.float64)
    flat = program.flatten(dict(model.named_parameters())).detach()
    found = ReferenceExecutor().predict(program, flat, x)
    expected = torch.stack([model(x[0].clone()), model(x[1].clone())])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-11, atol=1e-12)


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
    model = make().double()
    assert_predicts(model, sample)


def test_names_come_from_the_module_and_the_module_stays_as_it_was():
    model = models.Residual()
    before, code = copy.deepcopy(model.state_dict()), type(model).forward
    modes = [m.training for m in model.modules()]
    program = program_of(model)
    assert [p.name for p in program.parameters] == [name for name, _ in model.named_parameters()]
    assert [tuple(p.shape) for p in program.parameters] == [tuple(p.shape) for p in model.parameters()]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert type(model).forward is code
    assert [m.training for m in model.modules()] == modes


def test_flat_vector_holds_each_parameter_at_its_place():
    model = models.Direct()
    program = program_of(model)
    named = dict(model.named_parameters())
    flat = program.flatten(named)
    assert flat.shape == (program.size,) == (sum(p.numel() for p in model.parameters()),)
    for p, value in zip(program.parameters, program.unflatten(flat), strict=True):
        assert torch.equal(value, named[p.name])
        assert torch.equal(flat[p.offset : p.offset + p.size], named[p.name].flatten())
    by_task = {name: torch.stack([p, 2 * p]) for name, p in named.items()}
    assert torch.equal(program.flatten(by_task), torch.stack([flat, 2 * flat]))


def test_unused_parameters_are_left_out_and_tied_ones_come_once():
    assert not any(p.name.startswith("spare") for p in program_of(models.Unused()).parameters)
    assert [p.name for p in program_of(models.Tied()).parameters] == ["a.weight", "a.bias", "head.weight", "head.bias"]


def test_what_does_not_change_from_step_to_step_is_known():
    program = program_of(models.Embedded(), adapt={"classifier.weight"})
    assert program.moving == (False,) * (len(program.nodes)) + (True,)
    assert program_of(models.Embedded(), adapt={"body.0.bias"}).moving[1:] == (True,) * len(program.nodes)
    by_step = program_of(models.Embedded(), adapt={"classifier.weight"}, bn="per_step", steps=2)
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
    return x * float(x.abs().max())


class WritesToInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        x.mul_(2)
        return self.layer(x)


def _writes_to_view(m, x):
    half = x[:, :2]
    half.add_(1)
    return x


def _writes_to_shared(m, x):
    y = torch.tanh(x)
    z = y + 1
    y.mul_(2)
    return y + z


def _writes_by_index(m, x):
    y = torch.tanh(x)
    y[:, 0] = 0
    return y


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, other):
        return self.layer(x) + other


REFUSALS = [
    ("branch", lambda: Call(_branches), ["test_capture.py", "x.sum() > 0", "torch.where"]),
    ("loop", lambda: Call(_loops), ["test_capture.py", "x.norm() > 1"]),
    ("number from a tensor", lambda: Call(_counts), ["test_capture.py", "x.abs().max()"]),
    ("write to the input", WritesToInput, ["in-place", "test_capture.py", "x.mul_(2)", "out-of-place"]),
    ("write to a view", lambda: Call(_writes_to_view), ["in-place", "half.add_(1)"]),
    ("write to a shared value", lambda: Call(_writes_to_shared), ["in-place", "y.mul_(2)"]),
    ("write by index", lambda: Call(_writes_by_index), ["in-place", "y[:, 0] = 0", "torch.where"]),
    ("len", lambda: Call(lambda m, x: x.view(len(x), -1)), ["test_capture.py", "use x.size(0)"]),
    ("in-place module on a shared value", lambda: Call(lambda m, x: torch.tanh(x) + m.r(x), r=nn.ReLU(inplace=True)),
     ["in-place", "inplace=False"]),
    ("two inputs", TwoInputs, ["TwoInputs.forward", "'other'", "one batch"]),
    ("tuple of outputs", lambda: Call(lambda m, x: (x, x)), ["Call.forward returns", "one tensor"]),
    ("dict of outputs", lambda: Call(lambda m, x: {"y": x}), ["Call.forward returns", "one tensor"]),
    ("no output of the input", lambda: Call(lambda m, x: m.first.weight), ["one tensor that depends on its input"]),
    ("no parameters", lambda: nn.Sequential(nn.ReLU()), ["no parameters", "nothing to meta-learn"]),
    ("a lone constant", lambda: Call(lambda m, x: x + torch.tanh(m.first.bias)), ["test_capture.py", "tanh"]),
    ("unpacking by iteration", lambda: Call(lambda m, x: sum(row for row in x)),
     ["test_capture.py", "row for row in x"]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "words"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_what_cannot_work_is_refused_with_the_line(make, words):
    with pytest.raises(CaptureError) as caught:
        program_of(make())
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


def test_the_refusal_names_the_users_line():
    lines, start = inspect.getsourcelines(_branches)
    line = start + next(i for i, text in enumerate(lines) if "if x.sum()" in text)
    with pytest.raises(CaptureError, match=rf"test_capture\.py:{line} "):
        mf.MAML(Call(_branches), loss="mse", lr=0.1)


def test_options_with_default_values_are_fixed():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, scale=2.0, negate=False):
            x = self.layer(x) * scale
            return -x if negate else x

    assert_predicts(Scaled().double(), VECTOR)
