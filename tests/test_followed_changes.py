"""What a forward pass can read and the user can change: each change counts in the next batch."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import pickle
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from front_door.case import CLASSES, Net, small, vectors
from front_door.truth import Unrolled
from torch import nn

import metafast as mf

LR, STEPS = 0.1, 2
NUMBER, NOTHING, TENSOR, FUNCTION = 0.5, None, torch.tensor(0.5), torch.tanh


class Config:
    scale = 0.5


def helper(h):
    return h * NUMBER


def maml(model, **options):
    return mf.MAML(model, **{"loss": "cross_entropy", "lr": LR, "steps": STEPS, **options})


def agrees(model, learner, loss="cross_entropy"):
    """The gradient is that of the module as it is now."""
    tasks = vectors()
    wanted = Unrolled(model, loss=loss, lr=LR, steps=STEPS).gradient(tasks)
    learner.zero_grad()
    learner.backward(tasks)
    named = dict(model.named_parameters())
    largest = max(float(grad.abs().max()) for grad in wanted.grads.values())
    for name, grad in wanted.grads.items():
        found = torch.zeros_like(grad) if named[name].grad is None else named[name].grad
        assert float((found - grad).abs().max()) <= 1e-8 * largest, name


class Reading(Net):
    """Multiplies by what ``read`` returns of the module."""

    def __init__(self, read, held=None):
        super().__init__()
        self.read, self.held = read, held

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)) * self.read(self))


class Slotted:
    __slots__ = ("__value",)

    def __init__(self):
        self.__value = 0.5

    def get(self):
        return self.__value

    def set(self, value):
        self.__value = value


@dataclasses.dataclass
class Data:
    number: int = 1

    def __post_init__(self):
        self.value = 0.5


class Holder:
    def __init__(self):
        self.value = 0.5

    def get(self, module=None):
        return self.value


class Dictionary(dict):
    pass


class Answering(dict):
    """Its entries are attributes, and a name that is none fails as a key does."""

    __getattr__ = dict.__getitem__


def with_default(module, table={"value": 0.5}):  # noqa: B006
    return table["value"]


def dictionary():
    made = Dictionary()
    made.value = 0.5
    return made


CONFIGURATION = types.ModuleType("configuration_of_mine")
CONFIGURATION.scale = 0.5

OBJECTS = {
    "a bound method": (Holder().get, lambda h: h(), lambda h: setattr(h.__self__, "value", 2.0)),
    "a class": (type("C", (), {"value": 0.5}), lambda h: h.value, lambda h: setattr(h, "value", 2.0)),
    "an instance": (type("C", (), {"value": 0.5})(), lambda h: h.value, lambda h: setattr(type(h), "value", 2.0)),
    "an attribute of a dict": (dictionary(), lambda h: h.value, lambda h: setattr(h, "value", 2.0)),
    "a dict whose entries are attributes": (Answering(v=0.5), lambda h: h.v, lambda h: h.update(v=2.0)),
    "an attribute beside fields": (Data(), lambda h: h.value, lambda h: setattr(h, "value", 2.0)),
    "a private slot": (Slotted(), lambda h: h.get(), lambda h: h.set(2.0)),
    "a UserDict": (collections.UserDict(v=0.5), lambda h: h["v"], lambda h: h.update(v=2.0)),
    "a long list": ([0.5] * 1500, lambda h: h[700], lambda h: h.__setitem__(700, 2.0)),
    "an array": (np.full(5000, 0.5), lambda h: float(h[700]), lambda h: h.__setitem__(700, 2.0)),
    "a default": (with_default, lambda h: h(None), lambda h: h.__defaults__[0].update(value=2.0)),
    "a module of Python's": (CONFIGURATION, lambda h: h.scale, lambda h: setattr(h, "scale", 2.0)),
    "a list that holds itself": ((own := [0.5], own.append(own))[0], lambda h: h[0], lambda h: h.__setitem__(0, 2.0)),
    "True for 1": ([1], lambda h: 2.0 if h[0] is True else 1.0, lambda h: h.__setitem__(0, True)),
    "1.0 for 1": ({"k": 1}, lambda h: 2.0 if isinstance(h["k"], float) else 1.0, lambda h: h.update(k=1.0)),
    "another order": (
        {"a": 2.0, "b": 3.0}, lambda h: functools.reduce(lambda x, y: x**y, h.values()),
        lambda h: h.update(a=h.pop("a")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTS)
def test_what_an_object_holds(name):
    held, read, change = OBJECTS[name]
    model = Reading(lambda module: read(module.held), held).double()
    learner = maml(model)
    agrees(model, learner)
    change(model.held)
    agrees(model, learner)


def set_global(name, value):
    globals()[name] = value


def decorated(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


GLOBALS = {
    "a number": (lambda m: NUMBER, lambda: set_global("NUMBER", 2.0)),
    "none": (lambda m: 0.5 if NOTHING is None else NOTHING, lambda: set_global("NOTHING", 2.0)),
    "a tensor": (lambda m: TENSOR, lambda: set_global("TENSOR", torch.tensor(2.0))),
    "a function": (lambda m: FUNCTION(torch.tensor(2.0)), lambda: set_global("FUNCTION", torch.relu)),
    "of a helper": (lambda m: helper(1.0), lambda: set_global("NUMBER", 2.0)),
    "in a lambda": (lambda m: (lambda h: h * NUMBER)(1.0), lambda: set_global("NUMBER", 2.0)),
    "behind a decorator": (decorated(lambda m: NUMBER), lambda: set_global("NUMBER", 2.0)),
    "of a class": (lambda m: Config.scale, lambda: setattr(Config, "scale", 2.0)),
    "of a module": (lambda m: CONFIGURATION.scale, lambda: setattr(CONFIGURATION, "scale", 2.0)),
}


@pytest.mark.parametrize("name", GLOBALS)
def test_globals(name, monkeypatch):
    for key, value in (("NUMBER", 0.5), ("NOTHING", None), ("TENSOR", torch.tensor(0.5)), ("FUNCTION", torch.tanh)):
        monkeypatch.setitem(globals(), key, value)
    monkeypatch.setattr(Config, "scale", 0.5)
    monkeypatch.setattr(CONFIGURATION, "scale", 0.5)
    read, change = GLOBALS[name]
    model = Reading(read).double()
    learner = maml(model)
    agrees(model, learner)
    change()
    agrees(model, learner)


def test_what_hooks_hold():
    state, holder = {"k": 0.5}, Holder()
    model = small().double()
    model[0].register_forward_hook(lambda module, inputs, output: output * state["k"])
    model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * holder.value,))
    learner = maml(model)
    agrees(model, learner)
    state["k"] = 2.0
    agrees(model, learner)
    holder.value = 3.0
    agrees(model, learner)
    model[0]._forward_hooks.clear()
    agrees(model, learner)


def test_cells_that_change_places():
    first, second = 2.0, None

    def read(module):
        return (1.0 if first is None else first) + (0.0 if second is None else second)

    def swap():
        nonlocal first, second
        first, second = second, 3.0

    model = Reading(read).double()
    learner = maml(model)
    agrees(model, learner)
    swap()
    agrees(model, learner)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Tanh()})
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return self.head(x)


def test_the_order_of_modules():
    model = Listed().double()
    learner = maml(model)
    agrees(model, learner)
    model.layers["a"] = model.layers.pop("a")
    agrees(model, learner)


def test_rates_go_with_their_layers_in_any_order():
    torch.manual_seed(0)
    model = Listed().double()
    learner = maml(model, lr=mf.Rate((0.01, 0.5), per="layer"))
    learner.backward(vectors())
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.layers, head = model.layers, model.head
    del model.head
    model._modules = {"head": head, **model._modules}
    learner.backend = "reference"
    learner.zero_grad()
    learner.backward(vectors())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, before[name], rtol=1e-9, atol=1e-11)


class Level(Net):
    def forward(self, x):
        return self.head(torch.tanh(self.body(x)) * self.level.item())


WRITES = {
    "data.fill_": lambda m: m.level.data.fill_(0.5),
    "numpy": lambda m: m.level.numpy().fill(0.5),
    "data": lambda m: setattr(m.level, "data", torch.tensor(0.5, dtype=torch.float64)),
}


@pytest.mark.parametrize("way", WRITES)
def test_numbers_of_a_buffer_that_torch_counts_no_write_of(way):
    model = Level().double()
    learner = maml(model)
    agrees(model, learner)
    WRITES[way](model)
    agrees(model, learner)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)), "copy": copy.copy}


def normed():
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("seen", [True, False])
def test_a_copy_made_after_a_change(way, seen):
    model = normed()
    learner = maml(model)
    if seen:
        learner.backward(vectors())
    model[1].eval()
    model[0].requires_grad_(False)
    twin = COPIES[way](learner)
    agrees(twin.model, twin)


@pytest.mark.parametrize("setting", ["backend", "precision"])
def test_a_setting_after_a_change(setting):
    model = normed()
    learner = maml(model)
    learner.backward(vectors())
    model[1].eval()
    model[3] = nn.Linear(8, CLASSES).double()
    setattr(learner, setting, {"backend": "reference", "precision": "float32"}[setting])
    agrees(model, learner)


def test_evaluation_keeps_the_modes_that_training_ended_with():
    model = normed()
    learner = maml(model)
    model[1].eval()
    learner.eval()
    agrees(model, learner)


class Cache(Net):
    def __init__(self):
        super().__init__()
        self.mask = None

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.linspace(0, 1, 8, dtype=x.dtype)
        return self.head(torch.tanh(self.body(x)) * self.mask)


def test_an_attribute_that_forward_fills_once():
    model = Cache().double()
    learner = maml(model)
    agrees(model, learner)
    agrees(model, learner)
    for value in (2.0, 3.0):
        model.mask = torch.full((8,), value, dtype=torch.float64)
        agrees(model, learner)
    model.mask.mul_(2)
    agrees(model, learner)


class Recurrent(Net):
    """Its state goes from call to call, as nothing at first."""

    def __init__(self, start):
        super().__init__()
        self.state = start

    def forward(self, x):
        h = torch.tanh(self.body(x))
        if isinstance(self.state, list):
            self.state = [*self.state, h.detach().mean(0)][-2:]
            return self.head(h + sum(self.state))
        h = h if self.state is None else h + self.state
        self.state = h.detach().mean(0)
        return self.head(h)


class Kept(nn.Module):
    """Runs a module with the state that it has now."""

    def __init__(self, model):
        super().__init__()
        self.model, self.state = model, model.state

    def forward(self, x):
        self.model.state = self.state
        return self.model(x)


@pytest.mark.parametrize("start", [None, torch.zeros(8, dtype=torch.float64), []], ids=["none", "tensor", "list"])
def test_state_that_forward_keeps_for_the_next_call(start):
    model = Recurrent(start).double()
    learner = maml(model)
    for _ in range(3):
        wanted = Unrolled(Kept(copy.deepcopy(model)), loss="cross_entropy", lr=LR, steps=STEPS).gradient(vectors())
        learner.zero_grad()
        learner.backward(vectors())
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(p.grad, wanted.grads[f"model.{name}"], rtol=1e-9, atol=1e-11)


def scripted():
    return torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh()).eval())


def test_a_scripted_part():
    model = nn.Sequential(scripted(), nn.Linear(8, CLASSES)).double()
    learner = maml(model)
    learner.backward(vectors())
    assert not learner.program.draws
    model[0].train()
    learner.backward(vectors())
    assert learner.program.draws


LOSSES = {
    "a hook": lambda loss: loss.register_forward_hook(lambda module, inputs, output: 3 * output),
    "a forward": lambda loss: setattr(loss, "forward", lambda z, y: 3 * F.cross_entropy(z, y)),
    "an option": lambda loss: setattr(loss, "label_smoothing", 0.3),
}


@pytest.mark.parametrize("change", LOSSES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_loss_of_torch_s(change, backend):
    model, loss = small().double(), nn.CrossEntropyLoss()
    learner = maml(model, loss=loss, backend=backend)
    agrees(model, learner, loss)
    LOSSES[change](loss)
    agrees(model, learner, loss)


def test_a_partial_of_a_loss():
    model, loss = small().double(), functools.partial(F.cross_entropy, label_smoothing=0.0)
    learner = maml(model, loss=loss)
    agrees(model, learner, loss)
    loss.keywords["label_smoothing"] = 0.3
    agrees(model, learner, loss)


def test_parameters_of_another_shape():
    model = Reading(lambda module: module.factor).double()
    model.factor = nn.Parameter(torch.randn(8, dtype=torch.float64))
    learner = maml(model)
    agrees(model, learner)
    model.factor.data = torch.randn(1, dtype=torch.float64)
    agrees(model, learner)


def test_buffers_that_require_a_gradient_are_refused():
    model = Net().double()
    model.forward = lambda x: model.head(model.body(x) * model.level)
    learner = maml(model)
    learner.backward(vectors())
    model.level.requires_grad_()
    with pytest.raises(ValueError, match=r"buffer 'level' requires a gradient.*nn\.Parameter"):
        learner.backward(vectors())
