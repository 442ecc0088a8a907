"""Modules that are more than their class says: subclasses, hooks, parametrizations, compiled and scripted ones."""

from __future__ import annotations

import types
import warnings

import torch
import torch.nn.functional as F
from front_door.case import CLASSES, Net, Table, images, sequences, small
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

CASES = Table()


class DoubledBatchNorm(nn.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


class Squared(nn.Identity):
    def forward(self, x):
        return x * x


class Halved(nn.Dropout):
    def forward(self, x):
        return 0.5 * x


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, w, self.bias)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class SkippingSequential(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = x + layer(x)
        return x


def around(layer, width=8):
    """A network with one layer inside."""
    return nn.Sequential(nn.Linear(8, 8), layer, nn.Tanh(), nn.Linear(width, CLASSES))


CASES.one("a subclass of BatchNorm1d with its own forward", lambda: around(DoubledBatchNorm(8)))
CASES.one("a subclass of Identity with its own forward", lambda: around(Squared()))
CASES.one("a subclass of Dropout with its own forward", lambda: around(Halved(0.5)))
CASES.one("a subclass of Linear with its own forward", lambda: around(Cosine(8, 8)))
CASES.one(
    "a subclass of Sequential with its own forward", lambda: around(SkippingSequential(nn.Linear(8, 8), nn.Tanh()))
)
CASES.one(
    "a subclass of Conv2d with its own forward",
    lambda: nn.Sequential(Standardised(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, CLASSES)),
    images,
)


class PositiveLinear(nn.Linear):
    """A property in place of a parameter's use."""

    @property
    def positive(self):
        return F.softplus(self.weight)

    def forward(self, x):
        return F.linear(x, self.positive, self.bias)


CASES.one("a property that computes a weight", lambda: around(PositiveLinear(8, 8)))


@CASES.module()
def a_forward_hook_that_doubles():
    net = small()
    net[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return net


@CASES.module()
def a_forward_pre_hook_on_a_layer():
    net = small()
    net[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] - inputs[0].mean(0),))
    return net


@CASES.module()
def hooks_on_the_root():
    net = small()
    net.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))
    net.register_forward_hook(lambda module, inputs, output: output - 0.1 * inputs[0][:, :CLASSES])
    return net


@CASES.module()
def a_forward_hook_with_keyword_arguments():
    class Scaled(nn.Linear):
        def forward(self, x, *, scale=1.0):
            return super().forward(x) * scale

    class Caller(Net):
        def forward(self, x):
            return self.head(torch.tanh(self.scaled(x, scale=0.5)))

    net = Caller()
    net.scaled = Scaled(8, 8)
    net.scaled.register_forward_pre_hook(lambda module, args, kwargs: (args, {"scale": 3.0}), with_kwargs=True)
    return net


@CASES.module()
def a_hook_that_collects_features_for_the_head():
    class Collected(Net):
        def forward(self, x):
            self.blocks(x)
            return self.head(self.seen.pop())

    net = Collected()
    net.seen = []
    net.blocks[1].register_forward_hook(lambda module, inputs, output: net.seen.append(output))
    return net


@CASES.module(may_be_refused=True)
def a_full_backward_hook_that_halves():
    net = small()
    net[1].register_full_backward_hook(lambda module, g_in, g_out: (0.5 * g_in[0],))
    return net


@CASES.module()
def a_forward_of_the_instance():
    net = small()
    net[1].forward = types.MethodType(lambda self, x: torch.sin(x), net[1])
    return net


@CASES.module()
def a_forward_replaced_by_a_closure():
    net = small()
    plain = net[0].forward
    net[0].forward = lambda x: plain(x) + x
    return net


CASES.one("weight norm as a parametrization", lambda: around(parametrizations.weight_norm(nn.Linear(8, 8))))
CASES.one("spectral norm as a parametrization", lambda: around(parametrizations.spectral_norm(nn.Linear(8, 8)).eval()))
CASES.one("spectral norm that iterates in forward", lambda: around(parametrizations.spectral_norm(nn.Linear(8, 8))))
CASES.one(
    "an orthogonal parametrization",
    lambda: around(parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map="cayley")),
)


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).transpose(-1, -2)


@CASES.module()
def a_parametrization_of_ones_own():
    net = small()
    parametrize.register_parametrization(net[0], "weight", Symmetric())
    return net


@CASES.module()
def the_old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return around(nn.utils.weight_norm(nn.Linear(8, 8)))


@CASES.module()
def a_pruned_layer():
    net = small()
    prune.l1_unstructured(net[0], "weight", amount=0.4)
    return net


@CASES.module()
def a_pruned_layer_made_permanent():
    net = small()
    prune.random_unstructured(net[0], "weight", amount=0.4)
    prune.remove(net[0], "weight")
    return net


@CASES.module()
def a_compiled_module():
    return torch.compile(small(), backend="eager")


@CASES.module()
def a_compiled_part():
    net = small()
    net[0] = torch.compile(net[0], backend="eager")
    return net


def quietly(function, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


def plainly(model):
    """The truth's module for one that was scripted: functional_call cannot swap a scripted module's parameters."""
    net = small().double()
    net.load_state_dict(model.state_dict())
    return net


@CASES.module(plain=plainly)
def a_scripted_module():
    return quietly(torch.jit.script, small())


@CASES.module(plain=plainly)
def a_traced_module():
    return quietly(torch.jit.trace, small(), torch.randn(2, 8))


@CASES.module(plain=plainly)
def a_scripted_part():
    net = small()
    net[0] = quietly(torch.jit.script, net[0])
    return net


@CASES.module()
def a_scripted_function():
    def bent(x: torch.Tensor) -> torch.Tensor:
        return x / (1 + x.abs())

    class Bent(Net):
        def forward(self, x):
            return self.head(self.bent(self.body(x)))

    net = Bent()
    net.bent = quietly(torch.jit.script, bent)
    return net


@CASES.module()
def lazy_layers_that_have_run():
    net = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(CLASSES))
    net(torch.randn(2, 8))
    return net


# A lazy layer has no parameters that a learner could be made of.
@CASES.module(refused=("LazyLinear", "run"), dtype=torch.float32)
def lazy_layers_that_have_not_run():
    return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(CLASSES))


class Wrapper(nn.Module):
    """Passes unknown attributes on, as wrappers of networks do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


CASES.one("a wrapper that passes attributes and arguments on", lambda: Wrapper(small()))


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.gates = nn.ParameterList(nn.Parameter(torch.tensor(0.1 * i)) for i in range(3))
        self.heads = nn.ModuleDict({"small": nn.Linear(8, CLASSES), "large": nn.Linear(8, 9)})
        self.shifts = nn.ParameterDict({"in": nn.Parameter(torch.randn(8)), "out": nn.Parameter(torch.randn(CLASSES))})

    def forward(self, x):
        x = x + self.shifts["in"]
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = x + gate.exp() * torch.tanh(layer(x))
        return self.heads["small"](x) + self.shifts["out"]


CASES.one("ModuleList, ModuleDict, ParameterList and ParameterDict", Lists)


class Stochastic(nn.Module):
    """Layers that are random in training and not in evaluation."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.RReLU(), nn.Dropout(0.5), nn.AlphaDropout(0.2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = F.dropout(self.net(x), 0.3, training=self.training)
        return self.head(x)


CASES.one("dropout and RReLU in eval mode", lambda: Stochastic().eval())
CASES.one(
    "a TransformerEncoder in eval mode",
    lambda: nn.Sequential(
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True), 2, enable_nested_tensor=False
        ),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    ).eval(),
    sequences,
)


CASES.one("an average of models", lambda: AveragedModel(small()))


class CachedWeights(Net):
    def __init__(self):
        super().__init__()
        self.shared = parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x):
        with parametrize.cached():
            return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


CASES.one("a parametrization that is cached", CachedWeights)


@CASES.forward()
def a_sliced_sequential_and_a_module_made_in_forward(net, x):
    return net.head(nn.Softplus()(net.blocks[:-1](x)) + nn.Sequential(*list(net.blocks)[1:])(x))
