"""What changes after the learner has seen its first batch: attributes, buffers, modes, settings."""

from __future__ import annotations

import enum
import types

import torch
import torch.nn.functional as F
from front_door.case import CLASSES, Net, Table, small, vectors
from torch import nn
from torch.nn.utils import prune

CASES = Table()


def sets(name, value):
    """A change of a plain attribute of the module."""
    return lambda model, learner, tasks: setattr(model, name, value)


@CASES.forward(change=sets("temperature", 0.5))
def a_number_that_is_annealed(net, x):
    return net.head(torch.tanh(net.body(x))) / net.temperature


@CASES.forward(change=sets("temperature", True))
def a_flag_that_forward_reads(net, x):
    h = torch.tanh(net.body(x))
    return net.head(h + net.second(x)) if net.temperature is True else net.head(h)


@CASES.forward(change=sets("temperature", "wide"))
def a_string_that_chooses_a_path(net, x):
    return net.head(torch.relu(net.body(x)) if net.temperature == "wide" else torch.tanh(net.second(x)))


@CASES.forward(change=sets("temperature", None))
def an_option_that_becomes_none(net, x):
    h = net.body(x)
    return net.head(h if net.temperature is None else torch.tanh(h))


class Mode(enum.Enum):
    NARROW, WIDE = range(2)


class Moded(Net):
    def __init__(self):
        super().__init__()
        self.mode, self.scales = Mode.NARROW, [1.0, 1.0]
        self.options = {"slope": 0.1}
        self.settings = types.SimpleNamespace(power=1)

    def forward(self, x):
        h = F.leaky_relu(self.body(x), self.options["slope"]) ** self.settings.power
        h = h * self.scales[0] + self.second(x) * self.scales[1]
        return self.head(h if self.mode is Mode.NARROW else torch.tanh(h))


CASES.one("an enumeration", Moded, change=sets("mode", Mode.WIDE))
CASES.one("a list of numbers that is replaced", Moded, change=sets("scales", [1.0, 0.3]))
CASES.one(
    "an element of a list of numbers", Moded, change=lambda model, learner, tasks: model.scales.__setitem__(1, 0.3)
)
CASES.one("an entry of a dictionary", Moded, change=lambda model, learner, tasks: model.options.update(slope=0.7))
CASES.one(
    "an attribute of an attribute", Moded, change=lambda model, learner, tasks: setattr(model.settings, "power", 3)
)
CASES.one(
    "the slope of a LeakyReLU",
    lambda: nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(0.1), nn.Linear(8, CLASSES)),
    change=lambda model, learner, tasks: setattr(model[1], "negative_slope", 0.8),
)
CASES.one(
    "a layer that is replaced",
    small,
    change=lambda model, learner, tasks: model.__setitem__(1, nn.ReLU()),
)
CASES.one(
    "a hook that comes later",
    small,
    change=lambda model, learner, tasks: model[0].register_forward_hook(lambda module, inputs, output: 3 * output),
)


@CASES.module(change=lambda model, learner, tasks: model.handle.remove())
def a_hook_that_goes_later():
    net = small()
    net.handle = net[0].register_forward_hook(lambda module, inputs, output: 3 * output)
    return net


def fills(model, learner, tasks):
    model.level.fill_(0.5)


def replaces(model, learner, tasks):
    model.level = torch.tensor(0.5, dtype=model.level.dtype)


@CASES.forward(change=fills)
def a_buffer_that_is_filled(net, x):
    return net.head(torch.tanh(net.body(x)) * (1 / net.level))


@CASES.forward(change=replaces)
def a_buffer_that_is_replaced(net, x):
    return net.head(torch.tanh(net.body(x)) * net.level.exp())


@CASES.forward(change=fills)
def a_number_read_out_of_a_buffer(net, x):
    return net.head(torch.tanh(net.body(x)) * net.level.item())


@CASES.forward(change=fills)
def a_branch_on_a_buffer(net, x):
    h = net.body(x)
    return net.head(torch.tanh(h) if net.level > 1 else h)


class Tabled(Net):
    """A plain tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.shift = torch.linspace(-1, 1, 8)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x) + self.shift))


CASES.one("a plain tensor that is filled", Tabled, change=lambda model, learner, tasks: model.shift.mul_(-2))
CASES.one(
    "a plain tensor that is replaced",
    Tabled,
    change=lambda model, learner, tasks: setattr(model, "shift", 1 - model.shift),
)


class Staged(Net):
    """Reads whether it is in training."""

    def forward(self, x):
        h = self.body(x)
        return self.head(torch.tanh(h) if self.training else h)


CASES.one("eval() comes later", Staged, change=lambda model, learner, tasks: model.eval())
CASES.one("train() comes later", lambda: Staged().eval(), change=lambda model, learner, tasks: model.train())
CASES.one(
    "the mode of a part comes later",
    lambda: nn.Sequential(nn.Linear(8, 8), Staged()),
    change=lambda model, learner, tasks: model[1].eval(),
)


def freezes(model, learner, tasks):
    model[0].requires_grad_(False)


def freezes_for_a_while(model, learner, tasks):
    freezes(model, learner, tasks)
    learner.backward(tasks)
    learner.zero_grad()
    model[0].requires_grad_(True)


CASES.one("requires_grad_(False) comes later", small, change=freezes)
CASES.one("requires_grad_(False), and back", small, change=freezes_for_a_while)


def thaws(model, learner, tasks):
    model.requires_grad_(True)


@CASES.module(change=thaws)
def requires_grad_that_comes_later():
    net = small()
    net[0].requires_grad_(False)
    return net


def steps_by_hand(model, learner, tasks):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.sign(parameter))


def loads(model, learner, tasks):
    model.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()})


def replaces_a_parameter(model, learner, tasks):
    model[0].weight = nn.Parameter(0.3 * model[0].weight.detach())


CASES.one("parameters moved in place", small, change=steps_by_hand)
CASES.one("load_state_dict", small, change=loads)


def smoothed(outputs, targets):
    return F.cross_entropy(outputs, targets, label_smoothing=0.3)


CASES.one("a parameter that is replaced", small, change=replaces_a_parameter)
CASES.one("steps", small, change=lambda model, learner, tasks: setattr(learner, "steps", 3), truth={"steps": 3})
CASES.one("lr", small, change=lambda model, learner, tasks: setattr(learner, "lr", 0.3), truth={"lr": 0.3})
CASES.one(
    "first_order",
    small,
    change=lambda model, learner, tasks: setattr(learner, "first_order", True),
    truth={"first_order": True},
)
CASES.one(
    "loss",
    small,
    change=lambda model, learner, tasks: setattr(learner, "loss", smoothed),
    truth={"loss": smoothed},
)


@CASES.forward()
def a_running_mean_updated_in_forward(net, x):
    with torch.no_grad():
        net.level.mul_(0.9).add_(0.1 * x.mean())
    return net.head(torch.tanh(net.body(x) - net.level))


@CASES.forward()
def a_buffer_assigned_in_forward(net, x):
    net.level = 0.9 * net.level + 0.1 * net.body(x).detach().mean()
    return net.head(torch.tanh(net.body(x)) * net.level)


@CASES.forward()
def a_call_counter_in_a_buffer(net, x):
    net.level += 1
    return net.head(torch.tanh(net.body(x)) / net.level)


class Cached(Net):
    """Keeps what it made of the first input's shape."""

    def __init__(self):
        super().__init__()
        self.cache = None

    def forward(self, x):
        if self.cache is None or self.cache.shape != x.shape:
            self.cache = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
        return self.head(torch.tanh(self.body(x + self.cache)))


CASES.one("a cache that forward fills", Cached)


def other_samples(model, learner, tasks):
    """The learner meets a batch of another size in between."""
    learner.backward(tasks.tasks(slice(0, 1)))
    learner.zero_grad()


@CASES.forward(vectors, change=other_samples)
def another_number_of_tasks_in_between(net, x):
    return net.head(torch.tanh(net.body(x) - x.mean(0)))


class Banks(Net):
    """Tensors in a list and in a dictionary, and an attribute of the class."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.masks, self.banks = [torch.linspace(0, 1, 8)], {"shift": torch.linspace(-1, 1, 8)}

    def forward(self, x):
        return self.head(torch.tanh(self.body(x) * self.masks[0] + self.banks["shift"]) * self.factor)


def of_a_class_of_its_own():
    return type("Banks", (Banks,), {"factor": 1.0})()


CASES.one("a tensor in a list that is replaced", Banks, change=lambda m, l, t: m.masks.__setitem__(0, 1 - m.masks[0]))
CASES.one("a tensor in a dictionary that is replaced", Banks, change=lambda m, l, t: m.banks.update(shift=m.masks[0]))
CASES.one("an attribute of the class", of_a_class_of_its_own, change=lambda m, l, t: setattr(type(m), "factor", 3.0))
CASES.one("a forward that is replaced", small, change=lambda m, l, t: setattr(m[1], "forward", torch.sin))
CASES.one("a layer that is appended", small, change=lambda m, l, t: m.append(nn.Softplus()))
CASES.one(
    "eps of a norm",
    lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, CLASSES)),
    change=lambda m, l, t: setattr(m[1], "eps", 0.5),
)
CASES.one("pruning that comes later", small, change=lambda m, l, t: prune.l1_unstructured(m[0], "weight", amount=0.5))
CASES.one(
    "weights that are tied later",
    lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, CLASSES)),
    change=lambda m, l, t: setattr(m[2], "weight", m[0].weight),
)
