"""What a run of a module is recorded as: changes in place, detached parts, Functions, constants, sizes and traces."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_capture import Call, assert_computes, program_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import metafast as mf
from metafast.program.second_look import Difference


def _view(m, x):
    half = x[:, :2]
    half.add_(1)
    return x * x


def _view_read_again(m, x):
    half, whole = x[:, :2], x.t()
    x.mul_(2).sub_(0.5)
    return half * whole.t()[:, 2:]


def _shared(m, x):
    y = x * 2
    z = y + 1
    y.mul_(2)
    return y + z


def _items(m, x):
    y = torch.zeros_like(x)
    y[:, 0] = x[:, 1]
    y[:, 2:] += torch.sin(x[:, :2])
    y[0] = 3
    return y * x


def _masked(m, x):
    return x.clone().masked_fill_(x < 0, 0.5) * x


def _out(m, x):
    y = torch.empty_like(x)
    torch.mul(x.detach(), 2, out=y)
    return y * x


def _copied(m, x):
    y = torch.empty(5, 4, dtype=x.dtype)
    y.copy_(x)
    y.view(-1)[3] = 1
    return torch.sin(y)


def _rows(m, x):
    y = torch.zeros(5, 4, dtype=x.dtype)
    for i, row in enumerate(x):
        y[i] = row.sin() * (i + 1)
    return y


def _no_grad(m, x):
    with torch.no_grad():
        scale = x.abs().amax(1, keepdim=True)
    return x / (1 + scale)


def _normalised(m, x):
    return F.linear(x, m.first.weight / m.first.weight.norm(dim=1, keepdim=True))


class Through(torch.autograd.Function):
    """Rounds, and sends the gradient through."""

    @staticmethod
    def forward(ctx, x):
        return x.round(decimals=1)

    @staticmethod
    def backward(ctx, g):
        return g * 3


COMPUTED = {
    "a write to a view": _view,
    "views that are read after a write": _view_read_again,
    "a write to a value that is read later": _shared,
    "items": _items,
    "masked_fill_": _masked,
    "out=": _out,
    "copy_": _copied,
    "a row at a time": _rows,
    "an in-place module on a shared value": lambda m, x: x * 2 + m.act(x * 3),
    "len": lambda m, x: x.view(len(x), -1),
    "iteration": lambda m, x: sum(row for row in x) + x,
    "a value of parameters alone": lambda m, x: x + torch.tanh(m.first.bias),
    "an expression of a weight": _normalised,
    "no_grad": _no_grad,
    "detach": lambda m, x: x * x.detach().sin(),
    ".data": lambda m, x: x * x.data.sin(),
    "detach_": lambda m, x: x.sin() * x.cos().detach_(),
    "a Function": lambda m, x: Through.apply(x) * x,
    "checkpoint": lambda m, x: checkpoint(lambda y: torch.sin(y) * y, x, use_reentrant=False),
    "whole numbers between": lambda m, x: x.gather(1, x.argsort(1)) * x,
    "a bool between": lambda m, x: torch.where(x > 0, x, x.exp()),
    "several results": lambda m, x: torch.cat([*x.split(2, 1), *x.topk(2, 1)[:1]], 1),
    "a constant that is made": lambda m, x: x @ torch.eye(4, dtype=x.dtype).flip(0),
    "a constant that is written to": lambda m, x: x * torch.zeros(4, dtype=x.dtype).add_(2).cumsum_(0),
    "a number of a constant": lambda m, x: x * float(torch.ones(3).sum()),
    "a branch on a constant": lambda m, x: x if bool((torch.ones(3) > 0).all()) else -x,
    "an expanded mean": lambda m, x: x - x.mean(0).expand_as(x),
    "an einsum": lambda m, x: torch.einsum("ni,oi->no", x, m.first.weight),
    "a norm of its own": lambda m, x: F.batch_norm(x, None, None, training=True),
    "attention": lambda m, x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])[0, 0],
}


@pytest.mark.parametrize("function", COMPUTED.values(), ids=COMPUTED)
def test_values_and_gradients_are_those_of_the_module(function):
    assert_computes(Call(function, act=nn.ReLU(inplace=True)).double(), (4,))


def batch(n=5, m=5, dtype=torch.float64):
    return mf.TaskBatch(*(torch.randn(3, k, 4, dtype=dtype) for k in (n, n, m, m)))


def gradient(model, tasks, backend="reference"):
    learner = mf.MAML(model, loss="mse", lr=0.1, steps=2, backend=backend)
    learner.backward(tasks)
    return learner, torch.cat([p.grad.flatten() for p in model.parameters()])


def unrolled(model, tasks):
    """The same by torch alone."""
    total = 0
    for t in range(len(tasks)):
        theta = dict(model.named_parameters())
        for _ in range(2):
            loss = F.mse_loss(torch.func.functional_call(model, theta, (tasks.support_x[t],)), tasks.support_y[t])
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {name: p - 0.1 * g for (name, p), g in zip(theta.items(), grads, strict=True)}
        outputs = torch.func.functional_call(model, theta, (tasks.query_x[t],))
        total = total + F.mse_loss(outputs, tasks.query_y[t]) / len(tasks)
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])


BY_SIZE = {
    "a factor": lambda m, x: torch.sin(x) / len(x),
    "positions": lambda m, x: x * torch.arange(len(x), dtype=x.dtype)[:, None],
    "a branch on the size": lambda m, x: torch.sin(x) if len(x) > 4 else torch.cos(x),
    "rows": lambda m, x: torch.stack([row * i for i, row in enumerate(torch.sin(x))]),
}


@pytest.mark.parametrize("function", BY_SIZE.values(), ids=BY_SIZE)
def test_a_model_may_depend_on_the_number_of_samples(function):
    model, tasks = Call(function).double(), batch(5, 3)
    learner, found = gradient(model, tasks)
    torch.testing.assert_close(found, unrolled(model, tasks), rtol=1e-9, atol=1e-11)
    assert set(learner.program.by_samples) == {5, 3}
    assert learner.program.at(3) is not learner.program.at(5)
    with pytest.raises(ValueError, match="not run on 4 of them"):
        learner.program.at(4)
    fast = learner.adapt(tasks.support_x, tasks.support_y)
    own = Call(function).double()
    own.load_state_dict(fast.state_dict(1))
    for n in (5, 3, 4):
        x = torch.randn(3, n, 4, dtype=torch.float64)
        torch.testing.assert_close(fast(x)[1], own(x[1]).detach(), rtol=1e-10, atol=1e-11)


def test_one_program_serves_all_sizes_where_none_is_read():
    learner, _ = gradient(Call(lambda m, x: torch.sin(x).mean(1, keepdim=True) * x).double(), batch(5, 3))
    assert not learner.program.by_samples
    assert learner.program.at(4) is learner.program


def _gated(m, x):
    return x * m.gate if bool(m.gate > 1) else x - m.gate


def test_buffers_are_read_at_each_call_and_their_numbers_are_looked_at_again():
    model, tasks = Call(_gated).double(), batch()
    model.register_buffer("gate", torch.tensor(2.0, dtype=torch.float64))
    learner = mf.MAML(model, loss="mse", lr=0.1, steps=2, backend="reference")
    for value in (2.0, 3.0, 0.5, 0.7):
        model.gate.fill_(value)
        learner.zero_grad()
        learner.backward(tasks)
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.testing.assert_close(found, unrolled(model, tasks), rtol=1e-9, atol=1e-11)


class Counting(nn.Module):
    """Leaves a sum in a buffer, the number of calls in an attribute, its latest input, and sizes in a list."""

    def __init__(self):
        super().__init__()
        self.first, self.calls, self.latest, self.sizes = nn.Linear(4, 4), 0, None, []
        self.register_buffer("total", torch.zeros(4, dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        self.latest = x
        self.sizes.append(len(x))
        self.total += x.detach().sum(0)
        return torch.sin(self.first(x))


def test_a_batch_leaves_the_traces_of_one_call():
    model, tasks = Counting().double(), batch()
    learner, found = gradient(model, tasks)
    twin = Counting().double()
    twin.load_state_dict({**model.state_dict(), "total": torch.zeros(4)})
    torch.testing.assert_close(found, unrolled(twin, tasks), rtol=1e-9, atol=1e-11)
    for calls in (1, 2):
        assert (model.calls, model.sizes) == (calls, [5] * calls)
        torch.testing.assert_close(model.total, calls * tasks.support_x[0].sum(0))
        learner.backward(tasks)
    learner.eval()
    learner(tasks)
    assert model.calls == 3


def test_capture_alone_leaves_no_trace():
    model = Counting().double()
    program_of(model)
    assert (model.calls, model.latest, model.sizes, float(model.total.abs().sum())) == (0, None, [], 0.0)


CALLS = itertools.count(1)


class Alternating(nn.Module):
    """Does not do twice the same, by what lies outside of it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x):
        return self.first(x) * next(CALLS)


def test_a_second_look_sees_what_changes_from_call_to_call():
    with pytest.raises(Difference, match=r"not what it computes.*test_recording\.py:\d+ \(return self\.first"):
        gradient(Alternating().double(), batch())
