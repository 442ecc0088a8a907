"""Inner loops by rules in one C++ call, against the reference executor and autograd through a loop written here."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from native_work import ALL_WIDTHS, MODELS, RULES, assert_close, assert_same, compare, kept, mlp, plain, work
from test_native import close
from torch.func import functional_call

import metafast as mf
from metafast.executors import CpuExecutor, ReferenceExecutor, base, steps

pytestmark = pytest.mark.skipif(not CpuExecutor.isas(), reason="metafast._C is not built")


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    """What comes past C++ would be compared with itself."""

    def refuse(*_, **__):
        raise AssertionError("the steps were taken one by one")

    whole = base.evaluate
    monkeypatch.setattr(steps, "adapt", refuse)
    monkeypatch.setattr(steps, "adapt_vjp", refuse)
    monkeypatch.setattr(base, "evaluate", lambda e, *rest: refuse() if isinstance(e, CpuExecutor) else whole(e, *rest))


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", RULES)
def test_every_rule(name, model):
    if (name, model) == ("adam without eps", "conv"):
        pytest.skip("channels that are dead have moments of zero")
    for width in ALL_WIDTHS:
        for weights in (None, (0.1, 0.0, 0.3, 0.6)):
            made = work(RULES[name], model, width, weights=weights)
            compare(made)


@pytest.mark.parametrize("name", RULES)
def test_first_order_frozen_ragged_and_unlearned(name):
    if name == "adam without eps":
        pytest.skip("0 / 0 where a parameter is frozen or a channel is dead")
    compare(work(RULES[name], width="step", first_order=True, adapt=["0.weight", "4.bias"], weights=(0.2, 0, 0.3, 0.5)))
    compare(work(RULES[name], ragged=True, adapt=["2.weight", "2.bias"], learns_rates=False))
    compare(work(RULES[name], "conv", ragged=True, width="parameter", first=2))


def by_autograd(made):
    """The same, by autograd through steps that are written here; per task, in float64."""
    theta0, rates = made.params.clone().requires_grad_(), made.rates.clone().requires_grad_()
    rule, loop, tasks = made.loop.rule, made.loop, made.tasks
    moved = made.program.adapted

    def loss(theta, x, y):
        names = (p.name for p in made.program.parameters)
        named = dict(zip(names, made.program.unflatten(theta), strict=True))
        return F.cross_entropy(functional_call(made.model, named, (x,)), y)

    losses = []
    for t in range(len(tasks)):
        theta, state, total = theta0, [torch.full_like(theta0, rule.start(name)) for name in rule.states], 0.0
        for s in range(loop.steps + 1):
            if loop.step_weights[s]:
                total = total + loop.step_weights[s] * loss(theta, tasks.query_x[t], tasks.query_y[t])
            if s == loop.steps:
                break
            if loop.truncate is not None and s == loop.steps - loop.truncate:
                theta, state = theta0 + (theta - theta0).detach(), [part.detach() for part in state]
            x, y = (v[s, t] if tasks.each_step else v[t] for v in (tasks.support_x, tasks.support_y))
            (g,) = torch.autograd.grad(loss(theta, x, y), theta, create_graph=True)
            g = g.detach() if loop.first_order else g
            rows = rates[:, min(s, rates.shape[1] - 1)].expand(-1, made.program.size)
            hyper = dict(zip(rule.hyper_names, rows, strict=True))
            if rule.max_value is not None:
                g = torch.minimum(torch.maximum(g, -hyper["max_value"]), hyper["max_value"])
            if rule.max_norm is not None:
                g = g * (hyper["max_norm"] / (g[moved].norm() + 1e-6)).clamp(max=1)
            found, states = rule.step(theta[None], g[None], tuple(part[None] for part in state), hyper, s + 1)
            theta = torch.where(moved, found[0], theta)
            state = [torch.where(moved, new[0], old) for new, old in zip(states, state, strict=True)]
        losses.append(total)
    grads = torch.autograd.grad(torch.stack(losses).mean(), (theta0, rates))
    return torch.stack(losses).detach(), *grads


@pytest.mark.parametrize("width", ["step", "step and parameter"])
@pytest.mark.parametrize("name", RULES)
def test_rules_against_autograd(name, width):
    for options in ({}, {"first_order": True}, {"truncate": 2, "steps": 4}, {"each_step": True, "steps": 4}):
        made = work(RULES[name], width=width, tasks=3, **options)
        found = made.meta_gradient()
        for f, w in zip((found.losses, found.grads[0], found.rates_grad), by_autograd(made), strict=True):
            close(f, w, 1e-9)


@pytest.mark.parametrize("adapt", [None, ["2.weight", "4.bias"], ["0.weight"]])
@pytest.mark.parametrize("width", ["number", "step"])
def test_one_rate_needs_no_gradient_of_a_step(width, adapt):
    """Its gradient is a derivative along the way back: where steps stand still too, and against one rate for each."""
    for options in ({}, {"ragged": True, "truncate": 2}, {"each_step": True, "weights": (0.1, 0.2, 0.0, 0.3, 0.4)}):
        made = work(None, "mlp", width, steps=4, tasks=19, adapt=adapt, **options)
        for zero in (False, True):
            if zero:
                made.rates[-1] = 0
            found = compare(made)
            assert_close(found, made.but(one_rate=False).meta_gradient(), 1e-12)
            assert found.rates_grad.shape == made.rates.shape
            assert (found.rates_grad != 0).all() or options.get("truncate")
    native, reference, support = CpuExecutor(), ReferenceExecutor(), made.tasks.support
    z = native.adapt(made.program, made.loop, made.params, made.rates, support)
    v = torch.randn_like(z)
    back = [e.adapt_vjp(made.program, made.loop, z, made.rates, support, v) for e in (native, reference)]
    for f, w in zip(*back, strict=True):
        close(f, w, 1e-10)


@pytest.mark.parametrize("width", ["number", "step"])
@pytest.mark.parametrize("sizes", [(33, 64, 128, 3), (1, 40, 96, 3), (17, 130, 64, 15)])
def test_a_team_takes_steps_by_one_rate_in_place(sizes, width):
    """Wide products are shared by columns, others by rows; inputs and outputs have padding; loops whole and cut."""
    model = (lambda: mlp(*sizes), sizes[:1])
    for options in ({}, {"weights": (0.1, 0.0, 0.2, 0.3, 0.4)}, {"learns_rates": False, "each_step": True}):
        exact = work(None, model, width, steps=4, tasks=1, support=5, **options)
        least = kept(exact)
        assert CpuExecutor(team_from=0)._memory(exact.program, exact.tasks.shapes, exact.loop)["team_workspace"] > 0
        for made, tolerance in ((exact, 1e-9), (work(None, model, width, 4, 1, 5, torch.float32, **options), None)):
            torch.set_num_threads(1)
            alone = made.meta_gradient()
            if tolerance:
                assert_close(alone, made.meta_gradient(ReferenceExecutor()), tolerance)
            for threads in (2, 4, 5):
                torch.set_num_threads(threads)
                for bound in (None, least, 2 * least):
                    assert_same(made.but(memory=bound).meta_gradient(CpuExecutor(team_from=0)), alone)


def test_rates_that_became_wide_are_wide():
    made = work(None, width="parameter", one_rate=True)
    assert_same(compare(made), made.but(one_rate=False).meta_gradient())


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_rules_and_loops_at_random(data):
    draw = data.draw
    number = st.floats(0.0, 0.9)
    clips = {name: draw(st.none() | st.floats(0.02, 0.5)) for name in ("max_norm", "max_value")}
    momentum, decay, eps = draw(st.just(0.0) | number), draw(st.just(0.0) | number), draw(st.floats(1e-3, 0.1))
    nesterov = draw(st.booleans()) and momentum > 0
    dampening, betas = 0.0 if nesterov else draw(number), (draw(number), draw(number))
    options = {"weight_decay": decay, "eps": eps, **clips}
    rules = [
        mf.SGD(momentum=momentum, dampening=dampening, weight_decay=decay, nesterov=nesterov, **clips),
        mf.Adam(betas=betas, **options),
        mf.AdamW(betas=betas, **options),
        mf.RMSprop(alpha=draw(number), momentum=momentum, centered=draw(st.booleans()), **options),
        mf.Adagrad(lr_decay=draw(number), initial_accumulator_value=draw(number), **options),
    ]
    rule = draw(st.sampled_from(rules))
    count = draw(st.integers(1, 6))
    made = work(
        rule, "mlp", draw(st.sampled_from(ALL_WIDTHS)), count, draw(st.integers(1, 3)), draw(st.integers(3, 5)),
        weights=draw(st.none() | st.lists(st.sampled_from([0.0, 0.5]), min_size=count + 1, max_size=count + 1)),
        ragged=draw(st.booleans()), each_step=draw(st.booleans()), seed=draw(st.integers(0, 99)),
        adapt=draw(st.sampled_from([None, ["2.weight", "4.bias"]])), first_order=draw(st.booleans()),
        learns_rates=draw(st.booleans()), first=draw(st.integers(0, 2)),
        truncate=draw(st.none() | st.integers(0, count)),
    )  # fmt: skip
    if draw(st.booleans()):
        made = plain(made)
    whole = compare(made)
    cut = CpuExecutor(budget=draw(st.sampled_from([0, 2000, 5000])))
    assert_same(made.meta_gradient(cut), whole)


@pytest.mark.parametrize("name", RULES)
def test_z_goes_out_and_in(name):
    """The trajectory, and its way back from adjoints everywhere, in two halves."""
    made = work(RULES[name], width="step", steps=4, tasks=3, each_step=True, ragged=True)
    native, reference, support = CpuExecutor(), ReferenceExecutor(), made.tasks.support
    halves = [(made.loop.part(a, b), support.steps(a, b)) for a, b in ((0, 2), (2, 4))]
    z = made.params
    for loop, batch in halves:
        found, wanted = (e.adapt(made.program, loop, z, made.rates, batch) for e in (native, reference))
        close(found, wanted, 1e-10)
        v = torch.randn_like(found)
        for adjoint in (v, v[-1]):
            back = [e.adapt_vjp(made.program, loop, wanted, made.rates, batch, adjoint) for e in (native, reference)]
            for f, w in zip(*back, strict=True):
                close(f, w, 1e-9)
        z = wanted[-1]


@pytest.mark.parametrize("each_step", [False, True])
@pytest.mark.parametrize("width", ["number", "step and parameter"])
@pytest.mark.parametrize("name", [*RULES, None])
def test_threads_lanes_and_cores_agree(name, width, each_step):
    """Bits of 19 tasks: in lanes, a core for each, and in two runs; of one task: alone, and by a team."""
    rule, dtype = RULES.get(name), torch.float32
    made = work(rule, width=width, tasks=40, dtype=dtype, each_step=each_step, weights=(0.1, 0.2, 0.3, 0.4))
    if name is None:
        made = plain(made)
    assert CpuExecutor()._memory(made.program, made.tasks.shapes, made.loop)["lanes"]
    found = []
    for threads in (1, 1, 2, 64):
        torch.set_num_threads(threads)
        found.append(made.meta_gradient())
    for other in found[1:]:
        assert_same(other, found[0])
    for model in ("mlp", "conv"):
        alone = work(rule, model, width, tasks=1, dtype=dtype, each_step=each_step)
        for weights in ((0.0, 0.0, 0.0, 1.0), (0.1, 0.2, 0.3, 0.4)):
            one = (plain(alone) if name is None else alone).but(step_weights=weights)
            torch.set_num_threads(1)
            wanted = one.meta_gradient()
            torch.set_num_threads(2)
            assert_same(one.meta_gradient(CpuExecutor(team_from=0)), wanted)
            assert_same(one.meta_gradient(CpuExecutor(team_from=0, budget=0)), wanted)


@pytest.mark.parametrize("model", MODELS)
def test_a_hessian_product_is_one_call(model, monkeypatch):
    made = work(None, model, tasks=3, ragged=True, adapt=None if model == "conv" else ["2.weight"])
    u = torch.randn(3, made.program.size, dtype=torch.float64)
    wanted = ReferenceExecutor().hvp(made.program, made.params, made.tasks.query, u, 1)
    monkeypatch.setattr("metafast.executors.native.cpu.PythonLoss", None)
    for along in (u, u[0]):
        found = CpuExecutor().hvp(made.program, made.params, made.tasks.query, along, 1)
        close(found[:1], wanted[:1], 1e-10)
    torch.set_num_threads(2)
    assert torch.equal(CpuExecutor(team_from=0).hvp(made.program, made.params, made.tasks.query, along, 1), found)


class Halved(mf.SGD):
    """A rule of the user's own, whatever it inherits."""

    def step(self, theta, gradient, state, hyper, count):
        found, states = super().step(theta, gradient, state, hyper, count)
        return (found + theta) / 2, states


def test_what_has_no_formula_is_taken_step_by_step(monkeypatch):
    monkeypatch.undo()
    calls = []
    whole = steps.adapt
    monkeypatch.setattr(steps, "adapt", lambda *args: calls.append(1) or whole(*args))
    for rule in (Halved(momentum=0.5), mf.Adam(amsgrad=True, eps=0.1)):
        compare(work(rule))
    wide = work(RULES["momentum"], width="parameter")
    wide.rates[1] *= torch.linspace(0.5, 1.0, wide.program.size)
    compare(wide)
    assert len(calls) == 3
