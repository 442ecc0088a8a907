"""The second look finds a Program that is not its module, and names the operation: one planted difference at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metafast as mf
from metafast.kernels.avg_pool2d import AvgPool2d
from metafast.kernels.derived import Derived
from metafast.kernels.linear import Linear
from metafast.kernels.pointwise.reference import ReLU, Tanh
from metafast.learners.double_check import double_check
from metafast.program import Program
from metafast.program.second_look import Difference, check, truth_of

aten = torch.ops.aten
Plant = Callable[[Program], Program]


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class Vectors(nn.Module):
    """A line for each operation, so that a line says which one it is."""

    def __init__(self):
        super().__init__()
        self.first, self.twin = nn.Linear(5, 5), nn.Linear(5, 5)
        self.bare, self.head = nn.Linear(5, 5, bias=False), nn.Linear(5, 3)
        self.last = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5, eps=0.1)
        self.register_buffer("offset", torch.linspace(-1, 1, 5))

    def forward(self, x):
        h = self.first(x)
        h = F.leaky_relu(h, 0.3)
        h = self.norm(h)
        h = h + self.twin(x)
        with torch.no_grad():
            f = torch.sin(self.bare(h))
        h = F.gelu(h)
        h = torch.softmax(h, -1)
        h = torch.tanh(h)
        h = torch.sub(h, f, alpha=0.5)
        h = torch.sigmoid(h)
        h = h * self.offset
        h = self.last(h)
        h = Sign.apply(h) + torch.cos(h)
        return self.head(h)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.norm, self.head = nn.BatchNorm2d(4, eps=0.1), nn.Linear(16, 3)

    def forward(self, x):
        h = self.conv(x)
        h = self.norm(h)
        h = torch.tanh(h)
        h = self.second(h)
        h = F.max_pool2d(h, 2)
        h = F.avg_pool2d(h, 2, stride=1, padding=1, count_include_pad=False)
        h = F.adaptive_avg_pool2d(h, 2)
        return self.head(h.flatten(1))


def number(program: Program, kind: str, count: int = 0) -> int:
    """The place of a node: of the first of its kind, or of a later one; a derived one is known by its operation."""
    found = [i for i, node in enumerate(program.nodes) if kind == node.layer.kind or kind in _operations(node.layer)]
    return found[count]


def _operations(layer) -> list[str]:
    return [_said(step.target) for step in layer.function.steps] if isinstance(layer, Derived) else []


def _said(target) -> str:
    return str(getattr(target, "overloadpacket", target).__name__)


def with_node(program: Program, place: int, **changes) -> Program:
    nodes = list(program.nodes)
    nodes[place] = replace(nodes[place], **changes)
    return replace(program, nodes=tuple(nodes))


def layer(kind: str, count: int = 0, **options) -> Plant:
    """Options of a layer that are others."""

    def plant(program: Program) -> Program:
        place = number(program, kind, count)
        return with_node(program, place, layer=replace(program.nodes[place].layer, **options))

    return plant


def node(kind: str, count: int = 0, **changes) -> Plant:
    """Another layer, other inputs, parameters or constants; a function is asked for them."""

    def plant(program: Program) -> Program:
        place = number(program, kind, count)
        known = program.nodes[place]
        asked = {name: value(known) if callable(value) else value for name, value in changes.items()}
        return with_node(program, place, **asked)

    return plant


def step(operation: str, **changes) -> Plant:
    """A step of a derived layer that is another; a function is asked for what is new."""

    def plant(program: Program) -> Program:
        place = number(program, operation)
        cone = program.nodes[place].layer.function
        which = next(i for i, s in enumerate(cone.steps) if _said(s.target) == operation)
        asked = {n: v(cone.steps[which]) if callable(v) else v for n, v in changes.items()}
        steps = (*cone.steps[:which], replace(cone.steps[which], **asked), *cone.steps[which + 1 :])
        function = replace(cone, steps=steps)
        return with_node(program, place, layer=replace(program.nodes[place].layer, function=function))

    return plant


def under_grad(operation: str) -> Plant:
    """A derived layer that has forgotten that it ran under no_grad."""

    def plant(program: Program) -> Program:
        place = number(program, operation)
        cone = program.nodes[place].layer.function
        function = replace(cone, steps=tuple(replace(s, grad=True) for s in cone.steps))
        return with_node(program, place, layer=replace(program.nodes[place].layer, function=function))

    return plant


def dropped(kind: str, count: int = 0) -> Plant:
    """A node that is not there: what read it reads its input."""

    def plant(program: Program) -> Program:
        place = number(program, kind, count)
        past = program.nodes[place].inputs[0]

        def moved(value: int) -> int:
            return past if value == place + 1 else value - (value > place + 1)

        nodes = [replace(n, inputs=tuple(map(moved, n.inputs))) for n in program.nodes]
        del nodes[place]
        return replace(program, nodes=tuple(nodes), output=moved(program.output))

    return plant


@dataclass(frozen=True)
class Planted:
    """A difference, the model it is planted in, and the parts of the error that name the operation."""

    name: str
    model: type[nn.Module]
    plant: Plant
    named: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


PLANTED = [
    Planted("wrong slope", Vectors, layer("leaky_relu", negative_slope=0.2), ("leaky_relu", "F.leaky_relu(h, 0.3)")),
    Planted("dropped activation", Vectors, dropped("leaky_relu"), ("leaky_relu",)),
    Planted("another activation", Vectors, node("gelu", layer=Tanh()), ("gelu", "F.gelu(h)")),
    Planted("wrong eps of a layer norm", Vectors, layer("layer_norm", eps=0.11), ("layer_norm", "self.norm(h)")),
    Planted("layer norm without its shift", Vectors,
            node("layer_norm", layer=lambda n: replace(n.layer, shift=False), params=lambda n: n.params[:1]),
            ("layer_norm",)),
    Planted("missing bias", Vectors, node("linear", layer=Linear(False), params=lambda n: n.params[:1]),
            ("linear", "self.first(x)")),
    Planted("parameters of another layer", Vectors,
            node("linear", params=lambda n: tuple(k + 2 for k in n.params)), ("linear", "self.first(x)")),
    Planted("skip from another value", Vectors, node("add", inputs=lambda n: (n.inputs[0] - 1, n.inputs[1])),
            ("add", "h + self.twin(x)")),
    Planted("swapped inputs", Vectors, node("sub", inputs=lambda n: n.inputs[::-1]), ("sub", "torch.sub")),
    Planted("wrong axis", Vectors, step("softmax", args=lambda s: (s.args[0], 0, *s.args[2:])),
            ("softmax", "torch.softmax(h, -1)")),
    Planted("wrong number", Vectors, step("sub", kwargs=(("alpha", 0.6),)), ("sub",)),
    Planted("lost no_grad", Vectors, under_grad("sin"), ("sin",)),
    Planted("wrong constant", Vectors, node("mul", constants=lambda n: tuple(1.01 * c for c in n.constants)),
            ("mul", "self.offset")),
    Planted("gradient that is cut", Vectors, step("cos", grad=False), ("cos",)),
    Planted("lost backward of a Function", Vectors, step("Sign", target=lambda s: aten.sign.default), ("Sign",)),
    Planted("wrong eps of a batch norm", Images, layer("batch_norm", eps=0.11), ("batch_norm", "self.norm(h)")),
    Planted("wrong dilation and padding", Images, layer("conv2d", 1, padding=(1, 1), dilation=(1, 1)),
            ("conv2d", "self.second(h)")),
    Planted("average pooling in the place of the largest", Images,
            node("max_pool2d", layer=AvgPool2d((2, 2), (2, 2))), ("max_pool2d",)),
    Planted("padding that counts", Images, layer("avg_pool2d", count_include_pad=True), ("avg_pool2d",)),
    Planted("rectified instead of tanh", Images, node("tanh", layer=ReLU()), ("tanh", "torch.tanh(h)")),
    Planted("output of an earlier value", Images, dropped("tanh"), ("tanh",)),
]  # fmt: skip


def made(model):
    """The learner of a model that has seen a batch, its parameters and the batch."""
    torch.manual_seed(1)
    net = model().double()
    shape = (5,) if model is Vectors else (2, 6, 6)
    x, qx = torch.randn(2, 3, 6, *shape, dtype=torch.float64)
    y = torch.arange(3).repeat(3, 2)
    tasks = mf.TaskBatch(x, y, qx, y)
    learner = mf.MAML(net, loss="cross_entropy", lr=0.1, steps=2)
    learner.backward(tasks)
    return learner, learner.flat_parameters().detach(), tasks


@pytest.mark.parametrize("planted", PLANTED, ids=str)
def test_a_planted_difference_is_found_and_named(planted):
    learner, theta, tasks = made(planted.model)
    double_check(learner.captures, learner.program, theta, tasks)
    with pytest.raises(Difference) as caught:
        double_check(learner.captures, planted.plant(learner.program), theta, tasks)
    said = str(caught.value)
    for part in planted.named:
        assert part in said, said
    assert "aten" not in said


def test_a_learner_raises_what_the_second_look_finds(monkeypatch):
    """At its first batch; and again at the next, since nothing wrong is kept."""
    learner, _, tasks = made(Vectors)
    right = learner.captures.of(tasks)
    fresh = mf.MAML(learner.model, loss="cross_entropy", lr=0.1, steps=2)
    monkeypatch.setattr(type(fresh.captures), "of", lambda self, tasks: PLANTED[0].plant(right))
    for _ in range(2):
        with pytest.raises(Difference, match="leaky_relu"):
            fresh.backward(tasks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_small_wrong_gradient_beside_large_ones_of_frozen_parameters_is_found(dtype):
    """Frozen gradients of a thousand and more times its size forgive rounding and nothing else."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).to(dtype)
    with torch.no_grad():
        model[1].weight.mul_(1e-4)
    model[1].requires_grad_(False)
    x = torch.randn(6, 4, dtype=dtype)
    learner = mf.MAML(model, loss="mse", lr=0.1)
    y = torch.zeros(1, 6, 3, dtype=dtype)
    learner.backward(mf.TaskBatch(x[None], y, x[None], y))
    program, theta = learner.program, learner.flat_parameters().detach()
    truth = truth_of(model(x), dict(model.named_parameters()), x)
    assert check(program.at(6), theta, truth) is None
    wrong = replace(truth, grads={**truth.grads, "0.weight": 2 * truth.grads["0.weight"]})
    assert "its gradient of '0.weight' differs" in check(program.at(6), theta, wrong)
