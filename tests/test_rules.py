"""Inner steps by rules, their hyper-parameters and everything that a learner can be told beside, held to the truth."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from loop_oracle import support_of
from rule_cases import RULES, Sign, Stopped, batch, check, convnet, maml, mlp, normed, stepped, truth_of, wave

import metafast as mf
from metafast.program.rule import clipped

BACKENDS = ("auto", "reference")
PER = [(), "step", "layer", "parameter", ("step", "layer"), ("step", "parameter")]
SOME = [RULES[1], RULES[6], RULES[11], RULES[14], mf.SGD()]


def learned(value, per):
    """Rates about ``value``, each another one."""
    return mf.Rate((value, 1.5 * value), per, learn=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [mlp, wave, convnet])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_meta_gradients_are_those_of_autograd(rule, make, backend):
    check(maml(make, inner=rule, backend=backend), batch(sample=(1, 4, 4) if make is convnet else (4,)))


@pytest.mark.parametrize("per", PER, ids=str)
@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adam", "adamw", "rmsprop", "adagrad"])
def test_all_hyper_parameters_are_learned(kind, per):
    of, by_step = (lambda value: learned(value, per)), "step" if "step" in per else ()
    rule = {
        "sgd": lambda: mf.SGD(
            momentum=of(0.5),
            dampening=of(0.2),
            weight_decay=of(0.1),
            max_norm=learned(0.1, by_step),
            max_value=of(0.05),
        ),
        "nesterov": lambda: mf.SGD(momentum=of(0.5), nesterov=True, weight_decay=0.1),
        "adam": lambda: mf.Adam(
            betas=(of(0.5), of(0.6)), eps=of(1e-3), weight_decay=of(0.1), amsgrad=True, max_norm=learned(0.3, by_step)
        ),
        "adamw": lambda: mf.AdamW(betas=(of(0.5), 0.9), eps=1e-3, weight_decay=of(0.1), max_value=of(0.1)),
        "rmsprop": lambda: mf.RMSprop(
            alpha=of(0.5), eps=of(1e-2), weight_decay=of(0.1), momentum=of(0.3), centered=True
        ),
        "adagrad": lambda: mf.Adagrad(
            lr_decay=of(0.2), weight_decay=of(0.1), initial_accumulator_value=0.1, eps=of(1e-2)
        ),
    }[kind]()
    learner = maml(inner=rule, lr=learned(0.05, per))
    check(learner, batch())
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in learner.parameters())
    check(maml(wave, inner=rule, backend="reference", step_weights=[0.2, 0.3, 0.5]), batch(3))
    memory = 2 * len(rule.states) * 43 * 2 * 8 * 20
    check(maml(inner=rule, lr=0.02, steps=20, truncate=17, memory=memory + 14000), batch())


@pytest.mark.parametrize("rule", SOME, ids=str)
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (mf.ANIL, {"head": "2"}),
        (mf.MetaSGD, {"lr": (0.05, 0.1)}),
        (mf.MAMLPlusPlus, {"second_order_from": 0}),
        (mf.MAMLPlusPlus, {"second_order_from": 1}),
        (mf.FOMAML, {}),
        (mf.MAML, {"adapt": ["0.weight", "2.bias"], "first_order": True}),
    ],
    ids=["ANIL", "MetaSGD", "MAML++", "MAML++ first order", "FOMAML", "some parameters"],
)
def test_learners_take_any_rule(cls, options, rule):
    for steps, ragged in ((0, True), (3, False)):
        check(maml(cls=cls, inner=rule, **options), batch(steps, ragged=ragged))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_what_no_gradient_goes_back_to_stays_as_it_is(rule, backend):
    """As torch.optim leaves a parameter whose gradient is None, whatever its weight decay."""

    def stopped():
        return Stopped().double()

    learner = maml(stopped, inner=rule, backend=backend)
    check(learner, batch())
    check(maml(stopped, inner=rule, backend=backend, learn_state=bool(rule.states)), batch(3, ragged=True))
    names = [p.name for p in learner.program.parameters if not p.reached]
    assert sorted(names) == ["frozen.bias", "frozen.weight", "gate.weight"]


@st.composite
def _of_rule(draw):
    def of(low, high, per=True):
        value = draw(st.floats(low, high).map(lambda v: round(v, 3)))
        if draw(st.booleans()):
            return value
        axes = draw(st.sampled_from(PER if per else [(), "step"]))
        return mf.Rate((value, value + 0.01), axes, learn=draw(st.booleans()))

    clips = {}
    if draw(st.booleans()):
        clips["max_norm"] = of(0.1, 0.6, per=False)
    if draw(st.booleans()):
        clips["max_value"] = of(0.05, 0.2)
    kind = draw(st.sampled_from(["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"]))
    decay, eps = of(0, 0.3), of(1e-3, 1e-2)
    if kind == "SGD":
        nesterov = draw(st.booleans())
        dampening = 0.0 if nesterov else of(0, 0.5)
        return mf.SGD(momentum=of(0.1, 0.9), dampening=dampening, weight_decay=decay, nesterov=nesterov, **clips)
    options = {"weight_decay": decay, "eps": eps, **clips}
    if kind == "RMSprop":
        return mf.RMSprop(alpha=of(0.1, 0.95), momentum=of(0, 0.8), centered=draw(st.booleans()), **options)
    if kind == "Adagrad":
        start = draw(st.sampled_from([0.0, 0.1]))
        return mf.Adagrad(lr_decay=of(0, 0.5), initial_accumulator_value=start, **options)
    return getattr(mf, kind)(betas=(of(0.1, 0.9), of(0.1, 0.95)), amsgrad=draw(st.booleans()), **options)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_rule_beside_any_options(data):
    rule, steps = data.draw(_of_rule()), data.draw(st.integers(1, 4))
    options = {
        "steps": steps,
        "lr": data.draw(st.sampled_from([0.05, mf.Rate(0.05, learn=True), mf.Rate(0.05, ("step", "layer"), True)])),
        "first_order": data.draw(st.booleans()),
        "learn_state": data.draw(st.booleans()),
        "truncate": data.draw(st.sampled_from([None, None, 0, 1, 2, 9])),
        "adapt": data.draw(st.sampled_from([None, ["0.bias", "2.weight"]])),
        "backend": data.draw(st.sampled_from(BACKENDS)),
    }
    if data.draw(st.booleans()):
        options["step_weights"] = [round(0.2 + 0.1 * s, 1) for s in range(steps)]
    make = data.draw(st.sampled_from([mlp, mlp, convnet, wave]))
    if make is not mlp:
        options["adapt"] = None
    sets = steps if data.draw(st.booleans()) else 0
    tasks = batch(sets, sample=(1, 4, 4) if make is convnet else (4,), ragged=data.draw(st.booleans()))
    learner = maml(make, inner=rule, **options)
    if options["learn_state"]:
        with torch.no_grad():  # states that are learned begin anywhere, but squares
            for p in learner.start_state.parameters():
                p.add_(0.1 * torch.rand_like(p))
    check(learner, tasks)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_adapted_models_are_those_of_torchs_optimiser(rule, backend):
    learner, tasks = maml(inner=rule, adapt=["0", "2.bias"], backend=backend), batch(7, ragged=True)
    sets = tasks.support_x, tasks.support_y, None, tasks.support_mask
    by_hand = [
        stepped(learner.model, rule, 0.1, support_of(tasks, t, 7), adapted=learner.adapted_names) for t in (0, 1)
    ]
    after, three = None, None
    for step, of_tasks in enumerate(zip(*by_hand, strict=True), 1):
        one = [part[step - 1 : step] if part is not None else None for part in sets]
        after = learner.adapt(*one, each_step=True, after=after)
        fast = learner.adapt(*(part[:step] if part is not None else None for part in sets), each_step=True)
        three = fast if step == 3 else three
        for t, (own, optimiser) in enumerate(of_tasks):
            names = {p: name for name, p in own.named_parameters()}
            for found in (after, fast):
                wanted = torch.cat([p.detach().reshape(-1) for p in own.parameters()])
                torch.testing.assert_close(found.parameters[t], wanted, rtol=1e-11, atol=1e-12)
                states = {key: found.program.unflatten(value[t]) for key, value in found.state.items()}
                for p, kept in optimiser.state.items():
                    number = [q.name for q in found.program.parameters].index(names[p])
                    kept = {key: value for key, value in kept.items() if key != "step" and value is not None}
                    assert kept.keys() == states.keys()
                    for key, value in kept.items():
                        torch.testing.assert_close(states[key][number], value, rtol=1e-11, atol=1e-12)
    seven = learner.adapt(*(p[3:] if p is not None else None for p in sets), each_step=True, after=three)
    assert torch.equal(seven.parameters, fast.parameters)
    assert seven.step == fast.step == 7
    assert all(torch.equal(seven.state[key], fast.state[key]) for key in fast.state)


def test_models_of_other_rules_or_tasks_cannot_be_gone_on_from():
    tasks = batch()
    learner = maml(inner=mf.Adam())
    fast = learner.adapt(tasks.support_x, tasks.support_y)
    learner.inner = mf.SGD(momentum=0.9)
    with pytest.raises(ValueError, match=r"carry the state \['exp_avg', 'exp_avg_sq'\].*needs \['momentum_buffer'\]"):
        learner.adapt(tasks.support_x, tasks.support_y, after=fast)
    with pytest.raises(ValueError, match=r"2 adapted models .* the batch has 1 tasks"):
        learner.adapt(tasks.support_x[:1], tasks.support_y[:1], after=fast)
    for other in ("fast", fast.parameters):
        with pytest.raises(TypeError, match=r"after is a .*: give what an earlier call of adapt returned"):
            learner.adapt(tasks.support_x, tasks.support_y, after=other)
    others = maml(convnet).adapt(batch(sample=(1, 4, 4)).support_x, tasks.support_y)
    with pytest.raises(ValueError, match=r"2 adapted models with 63 parameters, .* the learner 43 parameters"):
        learner.adapt(tasks.support_x, tasks.support_y, after=others)
    learner.inner = mf.AdamW()
    with pytest.raises(ValueError, match=r"are torch.float64 on cpu, and the learner is torch.float32 on cpu;"):
        learner.to(torch.float32).adapt(tasks.support_x.float(), tasks.support_y, after=fast)
    learner.to(torch.float64)
    assert learner.adapt(tasks.support_x, tasks.support_y, after=fast).step == 6


def still(weight=0.0):
    """A ReLU unit that is dead, a hidden layer without influence: gradients of zero, with and without curvature."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].bias[0] = -100
        model[2].weight.fill_(weight)
    return model


RESTING = [
    mf.Adam(eps=0.1),
    mf.Adam(eps=0.1, amsgrad=True, weight_decay=0.1),
    mf.AdamW(eps=0.1),
    mf.RMSprop(eps=0.1),
    mf.RMSprop(eps=0.1, centered=True, momentum=0.5),
    mf.Adagrad(eps=0.1),
    mf.SGD(max_norm=0.5),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RESTING, ids=str)
def test_derivatives_are_finite_where_the_gradient_has_been_zero(rule, backend):
    tasks = batch()
    for weight in (0.0, 0.3):
        learner = maml(lambda weight=weight: still(weight), inner=rule, steps=2, backend=backend)
        check(learner, tasks)
        assert all(bool(p.grad.isfinite().all()) for p in learner.parameters())
    learner = maml(lambda: still(0.0), inner=rule, steps=1, backend=backend)
    learner.backward(tasks)
    direction = [torch.randn_like(p) for p in learner.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(learner.parameters(), direction, strict=True))

    def shifted(h):
        with torch.no_grad():
            for p, d in zip(learner.parameters(), direction, strict=True):
                p.add_(d, alpha=h)
            loss = learner(tasks).loss
            for p, d in zip(learner.parameters(), direction, strict=True):
                p.sub_(d, alpha=h)
        return loss

    # The first step is odd in the gradient, so that a central difference is exact to second order in h.
    torch.testing.assert_close((shifted(1e-5) - shifted(-1e-5)) / 2e-5, slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("rule", "hyper", "wanted"),
    [
        (mf.Adam(), {"beta1": 0.9, "beta2": 0.999, "eps": 1e-3, "weight_decay": 0}, -100),
        (mf.AdamW(), {"beta1": 0.9, "beta2": 0.999, "eps": 1e-3, "weight_decay": 0}, -100),
        (mf.RMSprop(), {"alpha": 0.9, "eps": 1e-3, "weight_decay": 0, "momentum": 0}, -100),
        (mf.Adagrad(), {"lr_decay": 0, "weight_decay": 0, "eps": 1e-3}, -100),
    ],
    ids=["adam", "adamw", "rmsprop", "adagrad"],
)
def test_a_gradient_of_zero_moves_theta_by_the_rate_over_eps(rule, hyper, wanted):
    """``d theta' / d g = -lr / eps`` at ``g = 0``: the step is ``-lr g / (|g| + eps)``, but for what scales ``|g|``."""
    rows = torch.tensor([[0.1], *([float(hyper[name])] for name in rule.hyper)], dtype=torch.float64)
    z, g = torch.zeros(1, 1 + len(rule.states), dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    moved = torch.ones(1, dtype=torch.bool)
    (slope,) = torch.autograd.grad(rule.advance(z, g.requires_grad_(), rows, 1, moved)[:, 0].sum(), g)
    torch.testing.assert_close(float(slope), float(wanted))


def test_a_norm_of_zero_clips_nothing():
    g = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    bound = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    of_g, of_bound = torch.autograd.grad(clipped(mf.SGD(max_norm=0.5), g, {"max_norm": bound}).sum(), (g, bound))
    assert of_g.tolist() == [[1.0, 1.0, 1.0]]
    assert float(of_bound) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rule", "tasks"),
    [(mf.Adam(max_norm=0.5), 1), (mf.SGD(momentum=mf.Rate(0.9, "layer", learn=True), max_value=0.01), 3), (Sign(), 1)],
    ids=["adam", "sgd", "sign"],
)
def test_two_runs_and_all_numbers_of_threads_give_the_same_bits(rule, backend, tasks):
    def wide():
        return torch.nn.Sequential(torch.nn.Linear(4, 260), torch.nn.Tanh(), torch.nn.Linear(260, 170))

    def gradients(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            learner = maml(wide, inner=rule, lr=mf.Rate(0.01, learn=True), backend=backend, steps=2)
            learner.backward(batch(tasks=tasks).to(torch.float32))
            return [p.grad for p in learner.parameters()]
        finally:
            torch.set_num_threads(before)

    if backend == "reference":  # its products of matrices are rounded as threads share them
        assert all(map(torch.equal, gradients(1), gradients(1)))
        return
    found = [gradients(threads) for threads in (1, 1, 2)]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("rule", SOME, ids=str)
def test_recorded_steps_have_every_order(rule):
    learner, tasks = maml(inner=rule, lr=mf.Rate(0.1, learn=True), steps=2), batch()
    loop, pairs = truth_of(learner, F.cross_entropy)
    parameters = [*learner.model.parameters()]
    found = []
    for loss, sources in (
        (learner(tasks, create_graph=True).loss, [*parameters, learner.rate.value]),
        (loop.losses(tasks)[0].mean(), [*parameters, pairs[0][1]]),
    ):
        first = torch.autograd.grad(loss, sources, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), sources))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", [mf.Adam(eps=1e-3), mf.SGD(momentum=0.9)], ids=str)
def test_batch_norm_of_each_step_and_running_statistics(rule):
    check(maml(normed, inner=rule, step_weights=[0.2, 0.3, 0.5]), batch(3))
    for bn in ("per_step", "running", "task", "frozen"):
        learner = maml(normed, inner=rule, bn=bn, steps=3)
        tasks = batch()
        for p in learner.parameters():
            p.grad = None
        learner.backward(tasks)
        fused = [p.grad for p in learner.parameters()]
        other = maml(normed, inner=rule, bn=bn, steps=3)
        other(tasks, create_graph=True).loss.backward()
        for got, p in zip(fused, other.parameters(), strict=True):
            torch.testing.assert_close(got, p.grad, rtol=1e-9, atol=1e-12)
        fast = learner.adapt(tasks.support_x, tasks.support_y, steps=5)
        parts = learner.adapt(tasks.support_x, tasks.support_y, steps=2)
        parts = learner.adapt(tasks.support_x, tasks.support_y, steps=3, after=parts)
        assert torch.equal(fast.parameters, parts.parameters)


def test_float32_is_close_to_float64():
    for rule in RULES:
        exact, rounded = (maml(inner=rule).to(dtype) for dtype in (torch.float64, torch.float32))
        exact.backward(batch())
        rounded.backward(batch().to(torch.float32))
        for p, q in zip(exact.parameters(), rounded.parameters(), strict=True):
            torch.testing.assert_close(q.grad.double(), p.grad, rtol=2e-3, atol=2e-4)
