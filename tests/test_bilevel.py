"""Bilevel problems, fast weights and the derivatives of a task's loss, against plain loops in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import metafast as mf
from metafast.executors.memory import peak_bytes

S = 12
LAYERS = {"0.weight": 0, "0.bias": 0, "2.weight": 1, "2.bias": 1}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def sets(each_step=True):
    generator = torch.Generator().manual_seed(1)
    lead = (S, 6) if each_step else (6,)
    x = torch.randn(*lead, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(*lead, 3, generator=generator, dtype=torch.float64).softmax(-1)
    held = torch.randn(9, 5, generator=generator, dtype=torch.float64), torch.arange(9) % 3
    return (x, y), held


def unrolled(model, train, held, rate, momentum, decay, each_step=True):
    """The loss at the end of S steps of SGD with momentum, and the parameters there."""
    theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    start, velocity = dict(theta), dict.fromkeys(theta, 0.0)
    for s in range(S):
        x, y = (t[s] if each_step else t for t in train)
        grads = torch.autograd.grad(
            F.cross_entropy(functional_call(model, theta, (x,)), y), list(theta.values()), create_graph=True
        )
        for (name, p), g in zip(list(theta.items()), grads, strict=True):
            velocity[name] = momentum[0, 0] * velocity[name] + g + decay[0, LAYERS[name]] * p
            theta[name] = p - rate[0, LAYERS[name]] * velocity[name]
    return F.cross_entropy(functional_call(model, theta, (held[0],)), held[1]), theta, start


def learned_rule():
    return mf.SGD(momentum=mf.Rate(0.8, learn=True), weight_decay=mf.Rate(0.02, per="layer", learn=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("memory", [None, 12_000], ids=["kept", "segments"])
@pytest.mark.parametrize("each_step", [True, False])
@pytest.mark.parametrize("learn_start", [False, True])
def test_hypergradients_are_those_of_the_unrolled_loop(backend, memory, each_step, learn_start):
    model, (train, held) = network(), sets(each_step)
    options = {"loss": "cross_entropy", "lr": mf.Rate(0.1, per="layer", learn=True), "steps": S}
    problem = mf.Bilevel(
        model, **options, inner=learned_rule(), memory=memory, learn_start=learn_start, backend=backend
    )
    hyper = [
        p.detach().clone().requires_grad_() for n, p in problem.named_parameters() if not n.startswith("learner.m")
    ]
    assert [tuple(p.shape) for p in hyper] == [(1, 2), (1, 1), (1, 2)]
    y = train[1].clone().requires_grad_()
    loss, theta, start = unrolled(model, (train[0], y), held, *hyper, each_step=each_step)
    wanted = torch.autograd.grad(loss, [*(start.values() if learn_start else ()), *hyper, y])

    given = train[1].clone().requires_grad_()
    out = problem((train[0], given), held, each_step=each_step)
    found = torch.autograd.grad(out.loss, [*problem.parameters(), given])
    torch.testing.assert_close(out.loss, loss)
    for mine, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-13)

    out = problem.backward(train, held, each_step=each_step)
    assert out.outputs.shape == (9, 3)
    for parameter, true in zip(problem.parameters(), wanted[:-1], strict=True):
        torch.testing.assert_close(parameter.grad, true, rtol=1e-9, atol=1e-13)
    if not learn_start:
        assert all(p.grad is None for p in model.parameters())
    solution = problem.solve(train, each_step=each_step)
    torch.testing.assert_close(solution(held[0]), functional_call(model, theta, (held[0],)))
    torch.testing.assert_close(solution.state_dict()["2.bias"], theta["2.bias"])


def test_a_bilevel_problem_says_what_it_keeps_and_what_it_takes():
    train, held = sets(each_step=False)
    problem = mf.Bilevel(network(), loss="cross_entropy", lr=0.1, steps=400, memory=120_000)
    problem.backward((train[0], train[1].argmax(1)), held)
    assert "steps kept at a time" in problem.explain()
    assert "steps kept and the others taken again" in problem.explain()
    train, held = sets()
    problem = mf.Bilevel(network(), loss="cross_entropy", lr=0.1, steps=S)
    with pytest.raises(TypeError, match=r"a set is \(x, y\) or \(x, y, mask\)"):
        problem.backward(train[0], held, each_step=True)
    with pytest.raises(TypeError, match=r"a set has a ndarray; pass torch.Tensors"):
        problem.backward((train[0].numpy(), train[1]), held, each_step=True)
    with pytest.raises(ValueError, match=r"support_x has samples for 11 inner steps .* there are 12"):
        problem.backward((train[0][:11], train[1][:11]), held, each_step=True)
    problem = mf.Bilevel(network(), loss="cross_entropy", lr=0.1, steps=S, memory=100)
    with pytest.raises(ValueError, match=r"memory=100: .* bytes at the least"):
        problem.backward(train, held, each_step=True)


class Exponential(nn.Module):
    def forward(self, logarithm):
        return logarithm.exp()

    def right_inverse(self, value):
        return value.log()


@pytest.mark.parametrize("per", [(), "step", "layer", "parameter"], ids=str)
def test_rates_may_have_a_parametrization(per):
    """Each call computes them anew, and a number that is set goes into what they are made of."""
    held = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3
    rate, rule = mf.Rate(0.1, per, learn=True), mf.SGD(momentum=mf.Rate(0.5, per, learn=True))
    plain, made = (mf.Bilevel(network(), loss="cross_entropy", lr=rate, steps=3, inner=rule) for _ in range(2))
    for rates in (made.learner.rate, made.learner.hyper["momentum"]):
        parametrize.register_parametrization(rates, "value", Exponential())
    for number in (0.1, 0.3):
        for problem in (plain, made):
            problem.learner.lr = number
            problem.zero_grad()
            problem.backward(held, held)
        for logarithm, value in zip(made.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(logarithm.exp(), value, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(logarithm.grad, value * value.grad, rtol=1e-10, atol=1e-13)
        for problem in (plain, made):
            torch.testing.assert_close(problem.solve(held)(held[0]), plain.solve(held)(held[0]))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_way_forward_and_back_hold_no_more_steps_than_they_say(backend):
    train, held = sets(each_step=False)
    problems = [
        mf.Bilevel(network(), loss="cross_entropy", lr=0.1, steps=900, memory=memory, backend=backend, learn_start=True)
        for memory in (None, 40_000)
    ]
    all_of_them, some = [peak_bytes(lambda p=p: p(train, held).loss.backward()) for p in problems]
    row = 8 * problems[0].learner.program.size
    assert all_of_them > 900 * row
    assert some < 150 * row
    for p, q in zip(*(problem.parameters() for problem in problems), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_fast_weights_keep_a_graph_from_call_to_call(backend):
    model = network()
    layer = mf.FastWeights(model, loss="mse", lr=mf.Rate(0.1, learn=True), inner=mf.Adam(), backend=backend)
    generator = torch.Generator().manual_seed(2)
    chunks = [torch.randn(3, 2, 4, n, generator=generator, dtype=torch.float64) for n in (5, 3, 5)]
    keys, values, queries = mine = [c.clone().requires_grad_() for c in chunks]
    fast, total = None, 0
    for i in range(3):
        outputs, fast = layer.after(fast, keys[i], values[i], queries[i])
        total = total + (outputs * (i + 1)).sin().sum()
    found = torch.autograd.grad(total, [*mine, layer.rate.value, *model.parameters()])

    keys, values, queries = plain = [c.clone().requires_grad_() for c in chunks]
    rate = layer.rate.value.detach().clone().requires_grad_()
    start = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    total = 0
    for t in range(2):
        theta, m, v = dict(start), dict.fromkeys(start, 0.0), dict.fromkeys(start, 0.0)
        for i in range(3):
            loss = F.mse_loss(functional_call(model, theta, (keys[i, t],)), values[i, t])
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            for (name, p), g in zip(list(theta.items()), grads, strict=True):
                m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g * g
                root = v[name].sqrt() / (1 - 0.999 ** (i + 1)) ** 0.5
                theta[name] = p - rate[0, 0] / (1 - 0.9 ** (i + 1)) * m[name] / (root + 1e-8)
            total = total + (functional_call(model, theta, (queries[i, t],)) * (i + 1)).sin().sum()
    wanted = torch.autograd.grad(total, [*plain, rate, *start.values()])
    for mine, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-13)
    with pytest.raises(TypeError, match="fast is a Tensor; pass what the last call returned"):
        layer.after(fast.z, chunks[0][0], chunks[1][0], chunks[2][0])
    with pytest.raises(ValueError, match="the weights of 2 sequences, and the batch has 1"):
        layer.after(fast, chunks[0][0, :1], chunks[1][0, :1], chunks[2][0, :1])


@pytest.mark.parametrize("inner", [mf.SGD(), mf.Adam()], ids=str)
def test_fast_weights_begin_where_they_are_told_and_are_found_by_name(inner):
    """Sequences with starts of their own do what each does as the model that starts there."""
    models = [network(), network()]
    for p in models[1].parameters():
        p.data.mul_(0.5)
    layer = mf.FastWeights(models[0], loss="mse", lr=0.1, steps=3, inner=inner)
    x, y = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    starts = torch.stack([torch.nn.utils.parameters_to_vector(m.parameters()) for m in models])
    outputs, fast = layer.after(mf.Fast(starts, 0), x, y, x)
    of_starts = torch.autograd.grad(outputs.square().sum(), starts)[0]
    for t, model in enumerate(models):
        own = mf.FastWeights(model, loss="mse", lr=0.1, steps=3, inner=inner)
        wanted, end = own.after(None, x[t : t + 1], y[t : t + 1], x[t : t + 1])
        torch.testing.assert_close(outputs[t], wanted[0], rtol=1e-12, atol=1e-14)
        grads = torch.autograd.grad(wanted.square().sum(), list(model.parameters()))
        torch.testing.assert_close(of_starts[t], torch.cat([g.flatten() for g in grads]), rtol=1e-10, atol=1e-13)
        for name, weights in layer.weights(fast).items():
            torch.testing.assert_close(weights[t], own.weights(end)[name][0], rtol=1e-12, atol=1e-14)
        found = functional_call(model, {name: w[t] for name, w in layer.weights(fast).items()}, (x[t],))
        torch.testing.assert_close(found, outputs[t], rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match=rf"weights of shape \[2, {starts.shape[1] - 1}\]; .* P = {starts.shape[1]}"):
        layer.after(mf.Fast(starts[:, 1:], 0), x, y, x)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("adapted", [False, True])
def test_derivatives_of_a_tasks_loss_are_those_of_autograd(backend, adapted):
    model = network()
    learner = mf.MAML(model, loss="cross_entropy", lr=0.1, steps=2, adapt="2", backend=backend)
    x, y = torch.randn(3, 6, 5, dtype=torch.float64), torch.arange(18).reshape(3, 6) % 3
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 5 + [False]])
    fast = learner.adapt(x, y, support_mask=mask) if adapted else None
    task_loss = learner.task_loss(x, y, at=fast, mask=mask)
    u = torch.randn(3, learner.program.size, dtype=torch.float64)
    for t in range(3):
        kept = mask[t]

        def loss(theta, t=t, kept=kept):
            return F.cross_entropy(functional_call(model, task_loss.by_name(theta), (x[t][kept],)), y[t][kept])

        theta = task_loss.at[t]
        torch.testing.assert_close(task_loss.value()[t], loss(theta).detach())
        torch.testing.assert_close(task_loss.grad()[t], torch.func.grad(loss)(theta), rtol=1e-9, atol=1e-13)
        product = torch.autograd.functional.hessian(loss, theta) @ u[t]
        torch.testing.assert_close(task_loss.hvp(u)[t], product, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(task_loss.jvp(u)[t], torch.func.grad(loss)(theta) @ u[t])
    named = {"0.weight": torch.ones(7, 5), "2.bias": torch.randn(3, 3)}
    vector = task_loss.vector(named)
    assert torch.equal(task_loss.by_name(vector)["2.bias"], named["2.bias"].double())
    torch.testing.assert_close(task_loss.hvp(named), task_loss.hvp(vector))


def test_vectors_and_parameters_of_other_shapes_are_refused():
    learner = mf.MAML(network(), loss="cross_entropy", lr=0.1)
    x, y = torch.randn(3, 6, 5, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.int64)
    task_loss = learner.task_loss(x, y)
    with pytest.raises(ValueError, match=r"a vector of shape \[4\]: give one of \[3, 66\], of \[66\]"):
        task_loss.hvp(torch.ones(4))
    with pytest.raises(ValueError, match=r"'3.weight' of shape \[1\]: the parameter is one of \['0.weight'"):
        task_loss.jvp({"3.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'2.bias' of shape \[2\]: the parameter is of shape \[3\]"):
        task_loss.jvp({"2.bias": torch.ones(2)})
    with pytest.raises(ValueError, match=r"a list: give one of \[3, 66\]"):
        task_loss.hvp([1.0])
    with pytest.raises(ValueError, match=r"at: parameters of shape \[2, 66\]"):
        learner.task_loss(x, y, at=torch.zeros(2, 66, dtype=torch.float64))


def test_conjugate_gradients_on_products_solve_with_the_hessian():
    """``(I + H / lam) v = g``, the implicit gradient of iMAML."""
    learner = mf.MAML(network(), loss="cross_entropy", lr=0.1)
    x, y = torch.randn(2, 8, 5, dtype=torch.float64), torch.arange(16).reshape(2, 8) % 3
    task_loss = learner.task_loss(x, y)
    g, lam = task_loss.grad(), 2.0
    v, r = torch.zeros_like(g), g.clone()
    p = r.clone()
    for _ in range(30):
        q = p + task_loss.hvp(p) / lam
        a = (r * r).sum(1, keepdim=True) / (p * q).sum(1, keepdim=True).clamp_min(1e-300)
        v, old = v + a * p, (r * r).sum(1, keepdim=True)
        r = r - a * q
        p = r + (r * r).sum(1, keepdim=True) / old.clamp_min(1e-300) * p
    torch.testing.assert_close(v + task_loss.hvp(v) / lam, g, rtol=1e-8, atol=1e-12)
