"""Expressions of parameters: weights that are made of others, tied, mixed, generated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from front_door.case import CLASSES, Net, Table, sequences
from torch import nn

CASES = Table()


@CASES.forward()
def a_cosine_head_with_a_learned_temperature(net, x):
    features = F.normalize(torch.tanh(net.body(x)), dim=-1)
    return net.scalar.exp() * F.linear(features, F.normalize(net.matrix, dim=-1))


@CASES.forward()
def weight_norm_by_hand(net, x):
    v = net.body.weight
    w = net.vector[:, None] * v / v.norm(dim=1, keepdim=True)
    return net.head(torch.tanh(F.linear(x, w, net.body.bias)))


@CASES.forward()
def a_low_rank_update_of_a_weight(net, x):
    a, b = net.matrix, net.second.weight[:CLASSES]
    return net.head(torch.tanh(F.linear(x, net.body.weight + 0.1 * a.T @ b, net.body.bias)))


class Adapter(nn.Module):
    """LoRA as it is written: the base is frozen."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(0.1 * torch.randn(8, 2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.base(x) + (x @ self.down.T) @ self.up.T * (16 / 2)))


CASES.one("a frozen weight with a low-rank adapter", Adapter, lr=0.01)


class HyperNetwork(nn.Module):
    """The weights of one layer come out of another."""

    def __init__(self):
        super().__init__()
        self.code = nn.Parameter(torch.randn(4))
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8 * 4 + 4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        w, b = self.generator(self.code).split([32, 4])
        return self.head(torch.tanh(F.linear(x, w.view(4, 8), b)))


CASES.one("a hypernetwork", HyperNetwork)


class FiLM(nn.Module):
    """CAVIA's context: a vector of the task that scales and shifts features."""

    def __init__(self):
        super().__init__()
        self.context = nn.Parameter(torch.zeros(5))
        self.body, self.film, self.head = nn.Linear(8, 6), nn.Linear(5, 12), nn.Linear(6, CLASSES)

    def forward(self, x):
        scale, shift = self.film(self.context).chunk(2)
        return self.head(torch.relu(self.body(x) * (1 + scale) + shift))


CASES.one("FiLM from a context vector", FiLM)
CASES.one(
    "FiLM from a context vector that alone is adapted",
    FiLM,
    options={"adapt": ["context"]},
    truth={"moved": ["context"]},
)


@CASES.forward()
def a_context_beside_every_sample(net, x):
    context = net.vector.expand(x.size(0), -1)
    return net.head(torch.tanh(net.body(x) + net.second(torch.cat([x[:, :4], context[:, :4]], dim=1))))


@CASES.forward()
def a_softmax_of_a_parameter(net, x):
    mix = torch.softmax(net.matrix[:, 0], dim=0)
    branches = torch.stack([torch.tanh(net.body(x)), torch.relu(net.second(x)), net.blocks(x)])
    return net.head(torch.einsum("b,bnd->nd", mix, branches))


@CASES.forward()
def concatenated_weights(net, x):
    w = torch.cat([net.body.weight, net.second.weight])
    b = torch.cat([net.body.bias, net.second.bias])
    left, right = F.linear(x, w, b).chunk(2, dim=1)
    return net.head(torch.sigmoid(left) * right)


@CASES.forward()
def the_average_of_two_layers(net, x):
    w = torch.lerp(net.body.weight, net.second.weight, torch.sigmoid(net.scalar))
    return net.head(torch.tanh(x @ w.t()))


@CASES.forward()
def a_module_called_on_a_parameter(net, x):
    return net.head(torch.tanh(net.body(x) * net.second(net.vector)))


@CASES.forward()
def a_tied_decoder(net, x):
    return net.head(torch.tanh(net.body(x)) @ net.body.weight)


@CASES.forward()
def a_loss_scale_of_a_norm_of_weights(net, x):
    return net.head(torch.tanh(net.body(x))) / (1 + net.head.weight.square().sum().sqrt())


@CASES.forward()
def a_masked_weight(net, x):
    keep = torch.ones_like(net.body.weight).tril()
    return net.head(torch.tanh(F.linear(x, net.body.weight * keep, net.body.bias)))


@CASES.forward()
def a_matrix_exponential(net, x):
    a = net.second.weight
    rotation = torch.linalg.matrix_exp(0.3 * (a - a.T))
    return net.head(torch.tanh(net.body(x)) @ rotation)


@CASES.forward()
def the_sum_over_all_parameters(net, x):
    size = sum(p.square().sum() for p in net.parameters())
    return net.head(torch.tanh(net.body(x))) * (1 + 0.01 * size)


@CASES.forward()
def parameters_by_name(net, x):
    named = dict(net.named_parameters())
    return F.linear(torch.tanh(F.linear(x, named["body.weight"])), named["head.weight"], named["head.bias"])


@CASES.forward(sequences)
def einsum_with_a_parameter(net, x):
    return net.head(torch.tanh(torch.einsum("nld,ed->nle", x, net.body.weight)).mean(1))


@CASES.forward(sequences)
def a_learned_query_that_pools(net, x):
    weights = torch.softmax(x @ net.vector / 8**0.5, dim=1)
    return net.head(torch.tanh(net.body((weights.unsqueeze(-1) * x).sum(1))))


class ClassToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.mix, self.head = nn.Linear(5, 5), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        x = x + torch.tanh(self.mix(x.transpose(1, 2))).transpose(1, 2)
        return self.head(x[:, 0])


CASES.one("a class token and learned positions", ClassToken, sequences)


class Experts(Net):
    """Every expert runs, a gate weighs them."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(CLASSES))

    def forward(self, x):
        gate = torch.softmax(F.linear(x, self.matrix), dim=-1)
        return self.head(torch.tanh(sum(gate[:, i : i + 1] * e(x) for i, e in enumerate(self.experts))))


CASES.one("a soft mixture of experts", Experts)


class Implicit(nn.Module):
    """The output of one layer is the bias of its own weight, and a parameter is not used at all."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, CLASSES, bias=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.absent = None

    def forward(self, x):
        h = torch.tanh(self.a(x + self.a.bias))
        return self.b(h) if self.absent is None else self.b(h + self.absent)


CASES.one("a bias used twice, a parameter never, an attribute that is None", Implicit)


@CASES.forward()
def a_graph_convolution_over_the_features(net, x):
    adjacency = torch.softmax(net.second.weight, dim=-1)
    return net.head(torch.tanh((net.body(x).unsqueeze(-1) * adjacency).sum(1)))


@CASES.forward()
def ridge_regression_in_closed_form(net, x):
    h = torch.tanh(net.body(x))
    gram = h.T @ h + net.scalar.exp() * torch.eye(8, dtype=x.dtype)
    return h @ torch.linalg.solve(gram, h.T @ net.second(x)[:, :CLASSES])


@CASES.forward()
def less_usual_products(net, x):
    h = torch.addmm(net.body.bias, x, net.body.weight.t(), beta=0.5, alpha=2)
    h = torch.addcmul(h, x, net.vector, value=0.3) + torch.outer(x[:, 0], net.vector)
    h = torch.tensordot(torch.tanh(h), net.second.weight, dims=([1], [0]))
    return net.head(torch.baddbmm(h[:, None], h[:, None], net.second.weight.expand(len(h), -1, -1))[:, 0])
