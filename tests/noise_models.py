"""Models that draw random numbers, their tasks, and the truth on given numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metafast as mf
from metafast.program.noise import given_numbers


class Call(nn.Module):
    """Calls a function of itself and the input between two linear layers."""

    def __init__(self, function, width=6, **modules):
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 3)
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self, torch.tanh(self.first(x))))


def images(m, x):
    return m.drop(x.reshape(len(x), 3, 2, 1)).flatten(1)


def drop_path(m, x):
    kept = x.new_empty((len(x), 1)).bernoulli_(0.6)
    return x * kept.div_(0.6)


def drop_connect(m, x):
    return F.linear(x, F.dropout(m.mix.weight, 0.4), m.mix.bias)


def read_twice(m, x):
    number = torch.randint(1, 4, (len(x), 6))
    return torch.relu(m.mix(x * number)) * number + number.cos()


def noisy_labels(m, x):
    chosen = torch.multinomial(torch.softmax(x, 1), 3)
    return x * x.gather(1, chosen).sum(1, keepdim=True)


def shuffled(m, x):
    return x + 0.5 * x[:, torch.randperm(x.shape[1])]


def sequence(m, x):
    return m.net(x.reshape(len(x), 2, 3))[0].flatten(1)


def tokens(m, x):
    return m.net(x.reshape(len(x), 2, 3)).flatten(1)


def attended(m, x):
    q = x.reshape(len(x), 1, 2, 3)
    return F.scaled_dot_product_attention(q, q, torch.sin(q), dropout_p=0.3).flatten(1)


def reparametrised(m, x):
    return torch.distributions.Normal(x, F.softplus(m.mix(x)), validate_args=False).rsample()


MODELS = {
    "nn.Dropout": lambda: Call(lambda m, x: m.drop(x), drop=nn.Dropout(0.4)),
    "F.dropout in place": lambda: Call(lambda m, x: F.dropout(x * 1.5, 0.4, inplace=True)),
    "all is dropped": lambda: Call(lambda m, x: x + F.dropout(x, 1.0)),
    "nn.Dropout1d": lambda: Call(lambda m, x: m.drop(x.reshape(len(x), 3, 2)).flatten(1), drop=nn.Dropout1d(0.4)),
    "nn.Dropout2d": lambda: Call(images, drop=nn.Dropout2d(0.4)),
    "nn.Dropout2d in place": lambda: Call(lambda m, x: images(m, x * 1.5), drop=nn.Dropout2d(0.4, inplace=True)),
    "nn.AlphaDropout": lambda: Call(lambda m, x: m.drop(x), drop=nn.AlphaDropout(0.4)),
    "nn.FeatureAlphaDropout": lambda: Call(images, drop=nn.FeatureAlphaDropout(0.4)),
    "native_dropout": lambda: Call(lambda m, x: torch.native_dropout(x, 0.4, True)[0]),
    "twice": lambda: Call(lambda m, x: m.drop(x) + m.drop(x), drop=nn.Dropout(0.4)),
    "DropConnect": lambda: Call(drop_connect, mix=nn.Linear(6, 6)),
    "drop path": lambda: Call(drop_path),
    "rand_like": lambda: Call(lambda m, x: x * torch.rand_like(x)),
    "randn_like": lambda: Call(lambda m, x: x + 0.3 * torch.randn_like(x)),
    "rand, one for all": lambda: Call(lambda m, x: x * torch.rand(1, dtype=x.dtype)),
    "randn": lambda: Call(lambda m, x: x * torch.randn(len(x), 6, dtype=x.dtype)),
    "a number that is not used": lambda: Call(lambda m, x: (torch.rand(3), F.dropout(x, 0.3))[1]),
    "x.normal_": lambda: Call(lambda m, x: x + torch.empty_like(x).normal_(0.1, 0.2)),
    "x.uniform_": lambda: Call(lambda m, x: x * torch.empty_like(x).uniform_(0.5, 1.5)),
    "a part filled": lambda: Call(
        lambda m, x: x * torch.cat([x.new_ones(len(x), 2), x.new_empty(len(x), 4).uniform_()], 1)
    ),
    "torch.normal": lambda: Call(lambda m, x: x + torch.normal(x, 0.2)),
    "torch.normal of two": lambda: Call(lambda m, x: x + torch.normal(x, x.detach().abs())),
    "Normal.rsample": lambda: Call(reparametrised, mix=nn.Linear(6, 6)),
    "torch.bernoulli": lambda: Call(lambda m, x: x * torch.bernoulli(torch.sigmoid(x))),
    "gumbel_softmax": lambda: Call(lambda m, x: x + F.gumbel_softmax(x, 0.7)),
    "randint": lambda: Call(lambda m, x: x * torch.randint(1, 4, (len(x), 6))),
    "one draw, read by several": lambda: Call(read_twice, mix=nn.Linear(6, 6)),
    "randint_like": lambda: Call(lambda m, x: x * torch.randint_like(x, 1, 4)),
    "random_": lambda: Call(lambda m, x: x * torch.empty(len(x), 6, dtype=torch.int64).random_(1, 4)),
    "randperm": lambda: Call(shuffled),
    "multinomial": lambda: Call(noisy_labels),
    "multinomial, again and again": lambda: Call(
        lambda m, x: x * torch.multinomial(torch.softmax(x, 1), 6, replacement=True)
    ),
    "log_normal_, cauchy_, geometric_": lambda: Call(
        lambda m, x: x * (x.new_empty(6).log_normal_(0.0, 0.3) + torch.tanh(x.new_empty(6).cauchy_()))
        / x.new_empty(6).geometric_(0.5)
    ),
    "nn.RReLU": lambda: Call(lambda m, x: m.act(x), act=nn.RReLU()),
    "nn.RReLU in place": lambda: Call(lambda m, x: m.act(x * 2), act=nn.RReLU(inplace=True)),
    "attention": lambda: Call(attended),
    "nn.MultiheadAttention": lambda: Call(
        lambda m, x: m.net(*[x.reshape(len(x), 2, 3)] * 3)[0].flatten(1),
        net=nn.MultiheadAttention(3, 1, 0.3, batch_first=True),
    ),
    "nn.TransformerEncoderLayer": lambda: Call(
        tokens, net=nn.TransformerEncoderLayer(3, 1, 5, dropout=0.3, batch_first=True)
    ),
    "nn.LSTM": lambda: Call(sequence, net=nn.LSTM(3, 3, 2, dropout=0.4, batch_first=True)),
    "nn.GRU, both ways": lambda: Call(
        lambda m, x: m.net(x.reshape(len(x), 2, 3))[0][..., :3].flatten(1),
        net=nn.GRU(3, 3, 3, dropout=0.4, batch_first=True, bidirectional=True),
    ),
    "nn.RNN": lambda: Call(sequence, net=nn.RNN(3, 3, 2, dropout=0.4, batch_first=True)),
}  # fmt: skip


def tasks_of(count=3, n=5, m=4, seeds=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    given = torch.randint(1 << 40, (count, 2), generator=generator) if seeds else None
    return mf.TaskBatch(draw(count, n, 4), draw(count, n, 3), draw(count, m, 4), draw(count, m, 3), seeds=given)


def made(name, dtype=torch.float64):
    torch.manual_seed(0)
    return MODELS[name]().to(dtype)


def truth(model, tasks, run=given_numbers, lr=0.1, steps=2, first_order=False):
    """Losses, and gradients of their mean, of the unrolled inner loop of the module itself under torch.autograd."""
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    losses = []
    for t in range(len(tasks)):
        theta = dict(parameters)
        for part, step in [(tasks.support, s) for s in range(steps)] + [(tasks.query, steps)]:
            kept = slice(None) if part.mask is None else part.mask[t]
            with run(part.seeds[t], step):
                # Padding is drawn for as well, and then cut off.
                loss = F.mse_loss(functional_call(model, theta, (part.x[t],))[kept], part.y[t][kept])
            if part.y is tasks.query.y:
                losses.append(loss)
                break
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True, materialize_grads=True)
            grads = [g.detach() if first_order else g for g in grads]
            theta = {n: p - lr * g for (n, p), g in zip(theta.items(), grads, strict=True)}
    total = torch.stack(losses).mean()
    found = torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)
    return torch.stack(losses).detach(), dict(zip(parameters, found, strict=True))


def grads_of(model):
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_agree(model, losses, wanted, tolerance=1e-9):
    torch.testing.assert_close(losses.detach(), wanted[0], rtol=tolerance, atol=tolerance)
    largest = max(float(g.abs().max()) for g in wanted[1].values())
    for name, grad in grads_of(model).items():
        error = float((grad - wanted[1][name]).abs().max()) / largest
        assert error <= tolerance, f"{name} is off by {error:.1e}"
