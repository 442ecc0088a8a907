"""Whatever changes in a module between two batches takes effect with the next one: by autograd of the module itself."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_settings import batch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import register_parametrization
from unrolled import check

import metafast as mf
from metafast.learners.module_snapshot import ModuleSnapshot


class Mode(enum.Enum):
    NARROW, WIDE = range(2)


@dataclasses.dataclass
class Inner:
    power: float = 1.0
    shifts: list[float] = dataclasses.field(default_factory=lambda: [0.0, 1.0])


@dataclasses.dataclass
class Config:
    slope: float = 0.1
    inner: Inner = dataclasses.field(default_factory=Inner)


@dataclasses.dataclass(slots=True)
class Slotted:
    factor: float = 1.0


class Plain:
    def __init__(self, factor=1.0):
        self.factor, self.inner = factor, types.SimpleNamespace(bias=0.0)


class Net(nn.Module):
    """Reads attributes of every sort."""

    level = 1.0

    def __init__(self):
        super().__init__()
        self.body, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.number, self.word, self.mode, self.flag, self.nothing = 1.0, "tanh", Mode.NARROW, False, None
        self.scales, self.table, self.pair = [1.0, 0.5], {"a": {"b": 1.0}}, (1.0, [2.0])
        self.config, self.plain, self.slotted = Config(), Plain(), Slotted()
        self.options = argparse.Namespace(gain=1.0)
        self.several = [Plain(), Plain()]
        self.array = np.ones(8)
        self.tensor = torch.ones((), dtype=torch.float64)
        self.register_buffer("buffer", torch.full((8,), 2.0))

    def forward(self, x):
        h = self.body(x) * self.number * self.level / self.options.gain
        h = torch.tanh(h) if self.word == "tanh" else torch.sigmoid(h)
        h = h + self.second(x) if self.mode is Mode.WIDE else h
        h = h * (2 if self.flag else 1) + (0 if self.nothing is None else self.nothing)
        h = h * self.scales[0] + self.scales[-1] + self.table["a"]["b"] * self.pair[1][0]
        h = F.leaky_relu(h - 2.5, self.config.slope) * self.config.inner.power + self.config.inner.shifts[0]
        h = h * self.plain.factor + self.plain.inner.bias + self.several[1].factor * self.slotted.factor
        h = h * torch.as_tensor(self.array.tolist(), dtype=h.dtype) + self.tensor * self.buffer
        return self.head(h)


def tied(m):
    """The second body, which the mode brings in, has the weight of the first."""
    m.mode, m.second.weight = Mode.WIDE, m.body.weight


CHANGES = {
    "a number": lambda m: setattr(m, "number", 0.5),
    "a word": lambda m: setattr(m, "word", "sigmoid"),
    "an enumeration": lambda m: setattr(m, "mode", Mode.WIDE),
    "a flag": lambda m: setattr(m, "flag", True),
    "None": lambda m: setattr(m, "nothing", 0.3),
    "an element of a list": lambda m: m.scales.__setitem__(0, 0.25),
    "a longer list": lambda m: m.scales.append(0.7),
    "another list": lambda m: setattr(m, "scales", [0.3, 0.1]),
    "an entry of a nested dictionary": lambda m: m.table["a"].update(b=-1.0),
    "a list inside of a tuple": lambda m: m.pair[1].__setitem__(0, 5.0),
    "a field of a dataclass": lambda m: setattr(m.config, "slope", 0.9),
    "a field of a nested dataclass": lambda m: setattr(m.config.inner, "power", 2.0),
    "a list in a nested dataclass": lambda m: m.config.inner.shifts.__setitem__(0, 0.4),
    "another dataclass": lambda m: setattr(m, "config", Config(0.7)),
    "a dataclass with slots": lambda m: setattr(m.slotted, "factor", 3.0),
    "an attribute of an object": lambda m: setattr(m.plain, "factor", 2.0),
    "a namespace in an object": lambda m: setattr(m.plain.inner, "bias", 0.4),
    "an attribute of an object in a list": lambda m: setattr(m.several[1], "factor", 2.0),
    "another object in a list": lambda m: m.several.__setitem__(1, Plain(3.0)),
    "a parsed argument": lambda m: setattr(m.options, "gain", 2.0),
    "an array": lambda m: m.array.__setitem__(slice(0, 4), 2.0),
    "a plain tensor that is filled": lambda m: m.tensor.fill_(3.0),
    "a plain tensor that is replaced": lambda m: setattr(m, "tensor", m.tensor + 1),
    "a buffer that is filled": lambda m: m.buffer.fill_(0.5),
    "a buffer that is replaced": lambda m: setattr(m, "buffer", torch.arange(8.0, dtype=torch.float64)),
    "a parameter that is moved": lambda m: m.body.weight.data.mul_(0.5),
    "a parameter that is replaced": lambda m: setattr(m.body, "weight", nn.Parameter(m.body.weight.detach() * 0.5)),
    "a parameter that is tied": tied,
    "a parameter that is taken out": lambda m: setattr(m.body, "bias", None),
    "a layer that is replaced": lambda m: setattr(m, "body", nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)).double()),
    "a layer that is parametrised": lambda m: register_parametrization(m.body, "weight", nn.Softsign()),
    "a hook": lambda m: m.body.register_forward_hook(lambda module, args, out: 3 * out),
    "a hook before": lambda m: m.body.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "requires_grad": lambda m: m.body.requires_grad_(False),
    "requires_grad of one": lambda m: m.head.bias.requires_grad_(False),
    "another class": lambda m: setattr(m, "__class__", Doubled),
    "a forward of its own": lambda m: setattr(m, "forward", lambda x: Net.forward(m, x) ** 2),
}


class Doubled(Net):
    def forward(self, x):
        return 2 * super().forward(x)


def maml(model, **options):
    return mf.MAML(model, **{"loss": "cross_entropy", "lr": 0.1, "steps": 2, "backend": "reference", **options})


def held(learner):
    check(learner, batch(), F.cross_entropy, 0.1, 2)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_takes_effect_with_the_next_batch(change):
    torch.manual_seed(1)
    learner = maml(Net().double())
    held(learner)
    first = learner(batch()).losses
    snapshot = learner._snapshot
    assert not snapshot.changed()
    change(learner.model)
    held(learner)
    if change is not CHANGES["requires_grad of one"]:
        assert not torch.equal(learner(batch()).losses, first)
    program = learner.program
    held(learner)
    assert learner.program is program  # nothing has changed since


def test_changes_of_classes_and_of_all_modules():
    torch.manual_seed(1)
    learner, forward = maml(Net().double()), Net.forward
    held(learner)
    try:
        Net.level = 0.5
        held(learner)
        Net.forward = lambda self, x: forward(self, x) ** 2
        held(learner)
    finally:
        Net.forward, Net.level = forward, 1.0
    held(learner)
    handle = register_module_forward_hook(lambda module, args, out: 2 * out)
    try:
        held(learner)
    finally:
        handle.remove()
    held(learner)


def test_a_tensor_that_equals_the_one_before_it():
    learner = maml(Net().double())
    held(learner)
    learner.model.tensor = learner.model.tensor.clone()
    held(learner)
    learner.model.tensor.fill_(3.0)
    held(learner)


def test_a_list_that_equals_the_one_before_it():
    learner = maml(Net().double())
    held(learner)
    learner.model.scales = list(learner.model.scales)
    held(learner)
    learner.model.scales[0] = 0.3
    held(learner)


def test_hooks_go():
    torch.manual_seed(1)
    model = Net().double()
    handles = [model.body.register_forward_hook(lambda module, args, out: 3 * out)]
    handles += [model.head.register_forward_pre_hook(lambda module, args: (2 * args[0],))]
    learner = maml(model)
    held(learner)
    for handle in handles:
        handle.remove()
        held(learner)


def test_requires_grad_goes_and_comes_back():
    learner = maml(Net().double())
    held(learner)
    for part in (learner.model.body, learner.model.head, learner.model.body.weight):
        for state in (False, True):
            part.requires_grad_(state)
            held(learner)
            if not state:
                frozen = [part] if isinstance(part, nn.Parameter) else part.parameters()
                assert all(p.grad is None for p in frozen)


class Staged(nn.Module):
    """Reads its own mode, and has dropout and batch norm."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(8, 8), nn.Dropout(dropout), nn.Linear(8, 3)

    def forward(self, x):
        h = self.drop(self.body(x))
        return self.head(torch.tanh(h) if self.training else h)


def test_modes_take_effect():
    learner = maml(Staged().double())
    held(learner)
    training = learner(batch()).losses
    for switch, same in (
        (learner.eval, False),
        (learner.train, True),
        (learner.model.eval, False),
        (learner.train, True),
    ):
        switch()
        held(learner)
        assert torch.equal(learner(batch()).losses, training) == same
    learner = maml(Staged(0.5).double().eval())
    held(learner)


@pytest.mark.parametrize("bn", [None, "task", "running", "frozen"])
def test_statistics_that_move_are_no_change(bn):
    """A model whose own forward writes into its buffers is captured once."""
    learner = maml(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double(), bn=bn)
    learner.backward(batch())
    program, mean = learner.program, learner.model[1].running_mean.clone()
    for run in (learner.backward, learner):
        run(batch())
        assert learner.program is program
    assert torch.equal(learner.model[1].running_mean, mean) == (bn in ("task", "frozen"))


@pytest.mark.parametrize("trained", [True, False])
def test_a_learner_in_evaluation_keeps_the_batch_norm_that_it_was_trained_with(trained):
    """``eval()`` of the learner is no change of what its batch norms are; that of the module alone is one."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    model[1].running_mean.add_(0.3)
    model[1].train(trained)
    learner = maml(model)
    statistics = "task" if trained else "frozen"
    wanted = maml(model, bn=statistics)(batch()).losses
    other = maml(model, bn="frozen" if trained else "task")(batch()).losses
    assert not torch.allclose(wanted, other)
    with torch.no_grad():
        torch.testing.assert_close(learner(batch()).losses, wanted)
        learner.eval()
        torch.testing.assert_close(learner(batch()).losses, wanted)
        learner.train()
        model[1].train(not trained)
        torch.testing.assert_close(learner(batch()).losses, other)


def test_a_snapshot_does_not_look_into_everything():
    """A large object, one that holds itself, and one of another package are taken for the same while they are."""
    model = Net()
    model.large, model.own, model.foreign = (
        list(range(100_000)),
        Plain(),
        types.SimpleNamespace(rng=np.random.default_rng()),
    )
    model.own.own = model.own
    snapshot = ModuleSnapshot(model)
    model.large[5], model.own.factor = -1, 1.0
    assert not snapshot.changed()
    model.large = list(model.large)
    assert snapshot.changed()
    snapshot = ModuleSnapshot(model)
    model.own.factor = 2.0
    assert snapshot.changed()
