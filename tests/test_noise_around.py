"""Random numbers beside what else a learner does: copies, refusals, transforms, checks, several tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from noise_models import Call, assert_agree, grads_of, made, tasks_of, truth
from torch import nn
from torch.func import functional_call

import metafast as mf
from metafast.executors import ReferenceExecutor
from metafast.program.noise import given_numbers


def test_native_executors_say_why_they_do_not_run_it():
    learner = mf.MAML(made("nn.Dropout"), loss="mse", lr=0.1)
    learner.backward(tasks_of())
    text = learner.explain()
    assert "executor: reference" in text
    assert "drop.noise: no rules for 'noise'" in text
    with pytest.raises(RuntimeError, match="no rules for 'noise'"):
        mf.MAML(made("nn.Dropout"), loss="mse", lr=0.1, backend="cpu").backward(tasks_of())


class Drawing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.noise = torch.rand_like(x)
        return x * ctx.noise

    @staticmethod
    def backward(ctx, g):
        return g * ctx.noise


GENERATOR = torch.Generator()
REFUSED = {
    "poisson": (lambda m, x: x * torch.poisson(x * x), ["by poisson", "torch.poisson(", "torch.rand"]),
    "a generator of its own": (
        lambda m, x: x * torch.rand(6, generator=GENERATOR, dtype=x.dtype),
        ["generator of its own", "generator=", "out"]
    ),
    "a seed of its own": (
        lambda m, x: (torch.manual_seed(0), F.dropout(x, 0.3))[1], ["set the seed", "by dropout", "buffer"]
    ),
    "a branch on it": (
        lambda m, x: x if torch.rand(()) < 0.5 else 2 * x, ["reads a random number", "torch.where"]
    ),
    "inside of a Function": (lambda m, x: Drawing.apply(x), ["Drawing", "draws random numbers", "pass them to apply"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_repeated_is_refused_in_words(name):
    function, words = REFUSED[name]
    learner = mf.MAML(Call(function).double(), loss="mse", lr=0.1)
    with pytest.raises(mf.CaptureError) as error:
        learner.backward(tasks_of())
    for word in [*words, "test_noise_around.py"]:
        assert word in str(error.value), str(error.value)


def test_a_batch_without_seeds_is_refused():
    model, tasks = made("nn.Dropout"), tasks_of()
    learner = mf.MAML(model, loss="mse", lr=0.1)
    learner.backward(tasks)
    with pytest.raises(ValueError, match="no seeds"):
        ReferenceExecutor().predict(learner.program, learner.flat_parameters(), tasks.query_x)
    with pytest.raises(ValueError, match=r"seeds has .* it must be torch.int64 of shape \(3, 2\)"):
        mf.TaskBatch(tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y, seeds=torch.zeros(3))


def test_random_numbers_have_no_place_in_a_compiled_graph():
    learner, tasks = mf.MAML(made("nn.Dropout"), loss="mse", lr=0.1), tasks_of(seeds=False)
    with pytest.raises(RuntimeError, match="compiled graph has no place for their seeds"):
        learner.for_operator(tasks, True)
    learner.eval()
    learner.for_operator(tasks, True)


@pytest.mark.parametrize("name", ["nn.Dropout", "nn.AlphaDropout", "randn"])
def test_verify_takes_models_that_draw(name):
    certificate = mf.verify(made(name), tasks_of(seeds=False), loss="mse", lr=0.1, steps=2)
    assert certificate.passed, str(certificate)


@pytest.mark.parametrize("name", ["nn.Dropout", "randn", "nn.LSTM"])
def test_watched_layers_draw_the_same(name):
    from metafast.profile.layered import TimedExecutor

    found = []
    for executor in (ReferenceExecutor(), TimedExecutor(ReferenceExecutor())):
        model = made(name)
        found.append(mf.MAML(model, loss="mse", lr=0.1, steps=2, backend=executor).backward(tasks_of()).losses)
        found.append(model.first.weight.grad)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_gradients_that_leave_the_learner_see_the_same_numbers():
    """A learned loss, samples that require a gradient, torch.func, and a Function of the user's go other ways."""
    tasks, wanted = tasks_of(), truth(made("nn.Dropout"), tasks_of())
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    model = made("nn.Dropout")
    out = mf.MAML(model, loss=lambda z, y: (scale * (z - y) ** 2).mean(), lr=0.1, steps=2).backward(tasks)
    assert_agree(model, out.losses, wanted)
    assert float(scale.grad.abs()) > 0

    model, x = made("nn.Dropout"), tasks.support_x.clone().requires_grad_()
    out = mf.MAML(model, loss="mse", lr=0.1, steps=2)(
        mf.TaskBatch(x, tasks.support_y, tasks.query_x, tasks.query_y, seeds=tasks.seeds)
    )
    out.loss.backward()
    assert_agree(model, out.losses, wanted)
    assert float(x.grad.norm()) > 0

    model = made("nn.Dropout")
    learner = mf.MAML(model, loss="mse", lr=0.1, steps=2)
    learner.prepare(tasks)
    named = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    grads = torch.func.grad(lambda p: functional_call(learner, p, (tasks,)).loss)(named)
    for name, grad in wanted[1].items():
        torch.testing.assert_close(grads[f"model.{name}"], grad, rtol=1e-9, atol=1e-12)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def test_a_function_of_the_users_beside_random_numbers():
    torch.manual_seed(0)
    model, tasks = Call(lambda m, x: m.drop(Square.apply(x)), drop=nn.Dropout(0.4)).double(), tasks_of()
    out = mf.MAML(model, loss="mse", lr=0.1, steps=2).backward(tasks)
    assert_agree(model, out.losses, truth(model, tasks))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, scale):
        return self.b(F.dropout(torch.tanh(self.a(x)), 0.4) * (scale[:, :1] + torch.rand_like(scale[:, :1])))


def test_samples_of_several_tensors():
    torch.manual_seed(0)
    model, tasks = Two().double(), tasks_of()
    pairs = [(x, x.sin()) for x in (tasks.support_x, tasks.query_x)]
    several = mf.TaskBatch(pairs[0], tasks.support_y, pairs[1], tasks.query_y, seeds=tasks.seeds)
    out = mf.MAML(model, loss="mse", lr=0.1, steps=2).backward(several)
    grads = grads_of(model)
    model.zero_grad()
    again = mf.MAML(model, loss="mse", lr=0.1, steps=2)(several)
    again.loss.backward()
    assert torch.equal(again.losses.detach(), out.losses)
    for name, grad in grads_of(model).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-10, atol=1e-13)
    wanted = []
    for t in range(len(tasks)):
        theta = dict(model.named_parameters())
        for step in range(2):
            with given_numbers(tasks.seeds[t, 0], step):
                outputs = functional_call(model, theta, (pairs[0][0][t], pairs[0][1][t]))
            steps = torch.autograd.grad(F.mse_loss(outputs, tasks.support_y[t]), list(theta.values()))
            theta = {n: p - 0.1 * g for (n, p), g in zip(theta.items(), steps, strict=True)}
        with given_numbers(tasks.seeds[t, 1], 2):
            outputs = functional_call(model, theta, (pairs[1][0][t], pairs[1][1][t]))
        wanted.append(F.mse_loss(outputs, tasks.query_y[t]).detach())
    torch.testing.assert_close(out.losses, torch.stack(wanted), rtol=1e-9, atol=1e-12)


def test_running_statistics_behind_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    tasks = tasks_of()
    hidden = []
    for t in range(len(tasks)):
        with given_numbers(tasks.seeds[t, 0]), torch.no_grad():
            hidden.append(model[1](model[0](tasks.support_x[t])))
    mf.MAML(model, loss="mse", lr=0.1, steps=2, bn="running").backward(tasks)
    torch.testing.assert_close(model[2].running_mean, 0.1 * torch.cat(hidden).mean(0))


def test_a_rate_that_is_raised_later_is_noticed():
    torch.manual_seed(0)
    model = Call(lambda m, x: m.drop(x), drop=nn.Dropout(0.0)).double()
    learner, tasks = mf.MAML(model, loss="mse", lr=0.1, steps=2), tasks_of()
    learner.backward(tasks)
    assert not learner.program.draws
    model.drop.p = 0.4
    model.zero_grad()
    out = learner.backward(tasks)
    assert_agree(model, out.losses, truth(model, tasks))
