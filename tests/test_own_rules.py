"""Rules of the user's own, with learned parameters and states; settings, copies and checkpoints; what is refused."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from loop_oracle import Rule
from rule_cases import Scaled, Sign, batch, check, maml, mlp, run, wave
from torch import nn

import metafast as mf


def sign(theta, g, state, hyper, count):
    state["trace"] = hyper["decay"] * state.get("trace", 0) + g
    return theta - hyper["lr"] * torch.tanh(state["trace"])


class Learned(mf.Rule, nn.Module):
    """A network makes the step of each element, and its memory, of gradient and memory."""

    states = ("memory",)

    def __init__(self):
        nn.Module.__init__(self)
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def step(self, theta, gradient, state, hyper, count):
        way, memory = self.net(torch.stack([gradient, state[0]], -1)).unbind(-1)
        return theta - hyper["lr"] * way, (memory,)


def learned_rule():
    """A rule, and the truth of it."""
    torch.manual_seed(3)
    rule = Learned()

    def step(theta, g, state, hyper, count):
        way, state["memory"] = rule.net(torch.stack([g, state.get("memory", torch.zeros_like(g))], -1)).unbind(-1)
        return theta - hyper["lr"] * way

    return rule, Rule("own", {}, step=step)


class Plain(mf.Rule):
    """A gradient step, to make rules of."""

    def step(self, theta, gradient, state, hyper, count):
        return theta - hyper["lr"] * gradient, state


def made(step=None, **attributes):
    """A rule with another step, or with other attributes."""
    cls = type("Made", (Plain,), attributes if step is None else {**attributes, "step": step})
    return cls()


OPTIONS = [
    {},
    {"step_weights": [0.2, 0.3, 0.5], "truncate": 1},
    {"steps": 20, "memory": 20 * 43 * 2 * 8 * 2},
    {"first_order": True},
    {"learn_state": True, "backend": "reference"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", [mlp, wave])
def test_a_rule_of_the_users_own(make, options):
    tasks = batch(options.get("steps", 3), ragged=True)
    for decay, per in ((0.8, None), (0.8, ()), (0.8, ("step", "layer")), (0.8, "parameter")):
        rate = decay if per is None else mf.Rate((decay, 0.9), per, learn=True)
        learner = maml(make, inner=Sign(rate), **options)
        check(learner, tasks, rule=Rule("own", {}, step=sign), ways=("backward",))
    check(learner, tasks, rule=Rule("own", {}, step=sign))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_rule_that_is_a_module_is_learned(options):
    rule, truth = learned_rule()
    learner = maml(inner=rule, **options)
    assert {"inner.net.0.weight", "inner.net.2.bias"} <= {name for name, _ in learner.named_parameters()}
    tasks = batch(options.get("steps", 3), ragged=True)
    check(learner, tasks, rule=truth, leaves=list(rule.parameters()))
    assert all(float(p.grad.abs().max()) > 0 for p in rule.parameters()) or options.get("truncate")
    loss = Scaled()
    learner = maml(inner=rule, loss=loss, **options)
    check(learner, batch(), rule=truth, leaves=list(rule.parameters()), loss=loss)
    rule.requires_grad_(False)
    check(maml(inner=rule, **options), batch(), rule=truth)


def test_a_tensor_that_a_rule_closes_over_gets_its_gradient():
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    outer = torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True)

    class Closing(mf.Rule):
        gate = None

        def step(self, theta, gradient, state, hyper, count):
            factor = scale if self.gate is None else scale * self.gate
            return theta - hyper["lr"] * factor * gradient, ()

    rule = Closing()
    learner = maml(inner=rule)

    def step(theta, g, state, hyper, count):
        return theta - hyper["lr"] * (scale if rule.gate is None else scale * rule.gate) * g

    check(learner, batch(), rule=Rule("own", {}, step=step), leaves=[scale])
    for k in (0, 1):  # made anew for each batch, as a hypernetwork makes it
        for way in ("backward", "forward"):
            rule.gate, scale.grad, outer.grad = outer.prod() + outer[k], None, None
            run(way, learner, batch())
            found = scale.grad, outer.grad
            rule.gate, scale.grad, outer.grad = outer.prod() + outer[k], None, None
            run("create_graph", learner, batch())
            for got, want in zip(found, (scale.grad, outer.grad), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
                assert float(want.abs().sum()) > 0
    with torch.no_grad():
        assert not learner(batch()).losses.requires_grad


def test_a_rule_of_the_users_own_clips():
    rule = made(max_norm=mf.Rate((0.1, 0.3), "step", learn=True), max_value=mf.Rate((0.03, 0.1), "layer", learn=True))
    truth = Rule("own", {}, step=lambda theta, g, state, hyper, count: theta - hyper["lr"] * g)
    check(maml(inner=rule), batch(), rule=truth)
    check(maml(inner=made(max_norm=0.1), truncate=2), batch(3), rule=truth)


def test_a_subclass_is_a_rule_of_its_own():
    class Halved(mf.SGD):
        def step(self, theta, gradient, state, hyper, count):
            return super().step(theta, gradient / 2, state, hyper, count)

    def half(theta, g, state, hyper, count):
        return theta - hyper["lr"] * g / 2

    check(maml(inner=Halved()), batch(), rule=Rule("own", {}, step=half))


def test_a_dataclass_may_be_a_rule():
    @dataclass
    class Stretched(mf.Rule):
        factor: float = 2.0

        def step(self, theta, gradient, state, hyper, count):
            return theta - hyper["lr"] * self.factor * gradient / count, ()

    def step(theta, g, state, hyper, count):
        return theta - hyper["lr"] * 2 * g / count

    learner = maml(inner=Stretched())
    check(learner, batch(), rule=Rule("own", {}, step=step))
    assert "Stretched(factor=2.0)" in learner.explain()
    twin = maml(inner=Stretched())
    twin.inner.factor = 1.0
    assert not torch.allclose(twin(batch()).losses, learner(batch()).losses)


def test_hyper_parameters_may_change_as_attributes():
    rule = Sign(0.5)
    learner = maml(inner=rule)
    learner.backward(batch())
    rule.decay = 0.9
    check(learner, batch(), rule=Rule("own", {}, step=sign))
    rule.decay = torch.tensor(0.9)
    with pytest.raises(TypeError, match=r"Sign.decay is tensor\(0.9000\): give a finite number"):
        learner.backward(batch())


# What is refused, and what is said.
def _in_place(name):
    def step(self, theta, gradient, state, hyper, count):
        {"theta": theta, "gradient": gradient, "v": state[0] if state else None, "lr": hyper["lr"]}[name].mul_(0.5)
        return theta - gradient, state

    return step


REFUSED = {
    "states too many": (lambda: made(lambda s, w, g, v, h, k: (w, (g,))), r"\[\[2, 43\], \[2, 43\]\].*states \[\]"),
    "states too few": (lambda: made(lambda s, w, g, v, h, k: (w, ()), states=("v",)), r"states \['v'\]"),
    "theta alone": (lambda: made(lambda s, w, g, v, h, k: w), "returned Tensor for theta"),
    "nothing": (lambda: made(lambda s, w, g, v, h, k: None), "returned NoneType for theta"),
    "another shape": (lambda: made(lambda s, w, g, v, h, k: (w.mean(0), ())), r"shapes \[\[43\]\] for theta \[2, 43\]"),
    "a state of another shape": (
        lambda: made(lambda s, w, g, v, h, k: (w, (g.norm(dim=-1, keepdim=True),)), states=("v",)), r"\[2, 1\]"
    ),
    "a number for a state": (lambda: made(lambda s, w, g, v, h, k: (w, (1.0,)), states=("v",)), "None"),
    "tasks mixed": (lambda: made(lambda s, w, g, v, h, k: (w - g / g.norm(), ())), "where another task stands beside"),
    "random numbers": (lambda: made(lambda s, w, g, v, h, k: (w - g * torch.rand_like(g), ())), "other numbers"),
    "theta in place": (lambda: made(_in_place("theta")), "changes theta in place"),
    "gradient in place": (lambda: made(_in_place("gradient")), "changes gradient in place"),
    "state in place": (lambda: made(_in_place("v"), states=("v",)), "changes v in place"),
    "hyper in place": (lambda: made(_in_place("lr")), "changes lr in place"),
    "hyper missing": (lambda: made(hyper=("foo",)), "'foo', and the rule has no such attribute"),
    "hyper a tensor": (lambda: made(hyper=("foo",), foo=torch.ones(())), r"Made.foo is tensor\(1.\): give a finite"),
    "hyper infinite": (lambda: made(hyper=("foo",), foo=float("inf")), "Made.foo is inf"),
    "hyper a word": (lambda: made(hyper="foo", foo=0.1), "Made.hyper = 'foo': give a tuple"),
    "hyper twice": (lambda: made(hyper=("foo", "foo"), foo=0.1), r"all different"),
    "hyper lr": (lambda: made(hyper=("lr",), lr=0.3), "names 'lr', which every rule has"),
    "states a word": (lambda: made(states="foo"), "Made.states = 'foo'"),
    "start": (lambda: made(states=("v",), start=lambda self, name: None), r"start\('v'\) is None"),
    "max_norm by layer": (lambda: made(max_norm=mf.Rate(1.0, "layer")), "norm is that of a task's whole gradient"),
    "max_norm": (lambda: made(max_norm=0), "max_norm=0: give a number above 0"),
    "max_value": (lambda: made(max_value="1"), "max_value='1'"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "text"), REFUSED.values(), ids=REFUSED)
def test_a_rule_that_cannot_be_is_refused_before_any_work(make, text):
    torch.manual_seed(0)
    rule = make()

    def later():
        learner = maml()
        learner.inner = rule
        learner(batch())

    for call in (lambda: maml(inner=rule).backward(batch()), later):
        with pytest.raises((TypeError, ValueError), match=text):
            call()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: mf.SGD(momentum=1.0), "momentum=1.0: give a number in"),
        (lambda: mf.SGD(momentum="0.9"), "momentum='0.9': give a number, or an mf.Rate"),
        (lambda: mf.Adam(lr=0.1), r"Adam\(lr=0.1\): the learning rate is the learner's"),
        (lambda: mf.SGD(0.1, 0.9), "positional"),
        (lambda: mf.SGD(momentum=True), "momentum=True"),
        (lambda: mf.SGD(momentum=torch.tensor(0.9)), "momentum=tensor"),
        (lambda: mf.SGD(weight_decay=-0.1), "weight_decay=-0.1"),
        (lambda: mf.SGD(weight_decay=float("inf")), "weight_decay=inf"),
        (lambda: mf.SGD(weight_decay=float("nan")), "weight_decay=nan"),
        (lambda: mf.SGD(momentum=0.9, dampening=-0.1), "dampening=-0.1"),
        (lambda: mf.SGD(nesterov=True), "nesterov=True: it needs a momentum"),
        (lambda: mf.SGD(nesterov=True, momentum=0.9, dampening=0.1), "no dampening"),
        (lambda: mf.SGD(nesterov=1, momentum=0.9), "nesterov=1: give True or False"),
        (lambda: mf.SGD(momentum=mf.Rate((0.5, 1.2))), r"momentum=Rate\(value=\(0.5, 1.2\)"),
        (lambda: mf.SGD(max_norm=0), "max_norm=0: give a number above 0"),
        (lambda: mf.SGD(max_value=-1), "max_value=-1"),
        (lambda: mf.Adam(max_norm=mf.Rate(1.0, "layer", learn=True)), r'max_norm=Rate.*per="step"'),
        (lambda: mf.Adam(max_norm=mf.Rate(1.0, ("step", "parameter"))), "max_norm=Rate"),
        (lambda: mf.Adam(betas=0.9), "betas=0.9: give a pair"),
        (lambda: mf.Adam(betas=(0.9, 1.0)), r"betas\[1\]=1.0"),
        (lambda: mf.Adam(betas=(-0.1, 0.9)), r"betas\[0\]=-0.1"),
        (lambda: mf.Adam(eps=-1e-8), "eps=-1e-08"),
        (lambda: mf.AdamW(amsgrad=None), "amsgrad=None: give True or False"),
        (lambda: mf.RMSprop(alpha=1), "alpha=1"),
        (lambda: mf.RMSprop(centered="yes"), "centered='yes'"),
        (lambda: mf.RMSprop(momentum=1), "momentum=1"),
        (lambda: mf.Adagrad(lr_decay=-1), "lr_decay=-1"),
        (lambda: mf.Adagrad(initial_accumulator_value=mf.Rate(0.1)), "initial_accumulator_value=Rate.*give a number"),
        (lambda: maml(inner=mf.Adam), "give a rule"),
        (lambda: maml(inner="adam"), "inner='adam': give a rule"),
        (lambda: maml(inner=mf.SGD(), learn_state=True), "learn_state=True: .*carries no state"),
        (lambda: maml(inner=made(hyper=("keys",), keys=mf.Rate(0.3))), "cannot be called 'keys'"),
        (lambda: maml(inner=mf.Adam(), learn_state=1), "learn_state=1: give True or False"),
    ],
    ids=range(33),
)
def test_options_out_of_their_range_are_refused(make, text):
    with pytest.raises((TypeError, ValueError), match=text):
        make()


# Settings, copies and checkpoints.
def rich(**options):
    """A learner with all that it can learn."""
    rule = mf.Adam(
        betas=(mf.Rate(0.5, "layer", learn=True), 0.9),
        eps=mf.Rate(1e-2, learn=True),
        max_norm=mf.Rate(0.4, "step", True),
    )
    return maml(inner=rule, learn_state=True, lr=mf.Rate(0.1, ("step", "layer"), learn=True), **options)


def jolted(learner):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in learner.parameters():
            p.mul_(1 + 0.1 * torch.rand(p.shape, generator=generator, dtype=p.dtype))
    return learner


def test_copies_pickles_and_checkpoints_are_the_same_learner():
    learner, saved = jolted(rich()), io.BytesIO()
    torch.save(learner.state_dict(), saved)
    saved.seek(0)
    loaded = rich()
    loaded.load_state_dict(torch.load(saved))
    for twin in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner)), loaded):
        assert torch.equal(twin(batch()).losses, learner(batch()).losses)
        check(twin, batch(), ways=("backward",))
    rule, truth = learned_rule()
    learner = maml(inner=rule, learn_state=True)
    for twin in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        check(twin, batch(), rule=truth, ways=("backward",))
        assert twin.inner is not learner.inner
        assert all(p.grad is not None for p in twin.inner.parameters())
    with pytest.raises(RuntimeError, match="inner rates are"):
        rich().load_state_dict(rich(steps=4).state_dict())


def test_another_dtype():
    def single():
        return mlp().float()

    torch.manual_seed(1)
    rule = mf.SGD(momentum=mf.Rate(0.5, "layer", learn=True), weight_decay=0.1)
    learner = mf.MAML(
        single(), loss="cross_entropy", lr=mf.Rate(0.1, learn=True), steps=3, inner=rule, learn_state=True
    )
    learner.backward(batch().to(torch.float32))
    learner.to(torch.float64)
    check(learner, batch())


@pytest.mark.parametrize("seen", [False, True])
def test_settings_take_effect_with_the_next_batch(seen):
    learner, tasks = maml(), batch()
    if seen:
        learner.backward(tasks)
    for rule in (mf.SGD(momentum=0.9), mf.Adam(eps=1e-2), mf.SGD(), mf.SGD(momentum=0.5, nesterov=True)):
        learner.inner = rule
        check(learner, tasks, ways=("backward",))
    for name, value in {
        "truncate": 1, "memory": 10**6, "lr": 0.2, "steps": 5, "first_order": True, "step_weights": [0.2] * 5,
        "adapt": ["2"],
    }.items():  # fmt: skip
        setattr(learner, name, value)
        check(learner, tasks, ways=("backward", "create_graph"))
    learner.truncate, learner.first_order, learner.step_weights = "T1-T2", False, None
    assert learner.truncate == 1
    check(learner, tasks)
    learner.truncate = None
    check(learner, tasks)
    assert "inner steps: SGD(momentum=0.5" in learner.explain()
    assert learner.graph_obstacle(tasks) == "executor 'cpu' may wait for the host"
    learner.inner, learner.memory = mf.SGD(), None
    assert "inner steps" not in learner.explain(tasks.support_x)


def test_learned_hyper_parameters_stay_where_optimisers_hold_them():
    learner, tasks = rich(), batch()
    held = learner.hyper["beta1"].value
    learner.inner = mf.Adam(
        betas=(mf.Rate(0.7, "layer", True), 0.8), eps=mf.Rate(0.1, learn=True), max_norm=mf.Rate(0.2, "step", True)
    )
    assert learner.hyper["beta1"].value is held
    assert held.tolist() == [[0.7, 0.7]]
    check(learner, tasks)
    for rule in (
        mf.Adam(),
        mf.AdamW(betas=(0.9, mf.Rate(0.7, "layer", True))),
        mf.Adam(betas=(mf.Rate(0.7, "step", True), 0.8)),
    ):
        with pytest.raises(ValueError, match=r"hyper-parameters \['beta1', 'eps', 'max_norm'\].*make a new learner"):
            learner.inner = rule
    with pytest.raises(ValueError, match="told apart by step, 3 of them"):
        learner.steps = 4
    learner = maml(inner=mf.SGD(momentum=mf.Rate(0.9, "step", learn=True)))
    with pytest.raises(ValueError, match=r"steps=4: .*told apart by step, 3 of them"):
        learner.steps = 4
    learner = maml(inner=mf.Adam(), learn_state=True)
    with pytest.raises(ValueError, match=r"state that is learned is \['exp_avg', 'exp_avg_sq'\]"):
        learner.inner = mf.SGD(momentum=0.9)


def test_a_rule_that_is_a_module_may_come_and_go():
    rule, truth = learned_rule()
    learner = maml()
    plain = learner.backward(batch())
    learner.inner = rule
    check(learner, batch(), rule=truth, leaves=list(rule.parameters()))
    assert "inner.net.0.weight" in dict(learner.named_parameters())
    learner.inner = mf.SGD()
    assert "inner.net.0.weight" not in dict(learner.named_parameters())
    assert torch.equal(learner.backward(batch()).losses, plain.losses)


def test_rates_by_layer_follow_no_other_model():
    for options in (
        {"inner": mf.SGD(momentum=mf.Rate(0.9, "layer", learn=True))},
        {"inner": mf.Adam(), "learn_state": True},
    ):
        learner = maml(**options)
        learner.backward(batch())
        learner.model.append(nn.Linear(3, 3).double())
        with pytest.raises(ValueError, match=r"'3.bias', '3.weight'.*make a new learner"):
            learner.backward(batch())


def test_fixed_hyper_parameters_are_told_apart_but_not_learned():
    learner = maml(inner=mf.SGD(momentum=mf.Rate((0.1, 0.9), ("step", "layer"))))
    assert [name for name, _ in learner.named_parameters()] == [
        "model.0.weight",
        "model.0.bias",
        "model.2.weight",
        "model.2.bias",
    ]
    check(learner, batch())


def test_within_torch():
    """Under torch.func the same gradient; a compiled graph says that it takes plain steps."""
    learner = maml(inner=mf.Adam(eps=1e-2))
    learner.backward(batch())
    parameters = {name: p.detach() for name, p in learner.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(learner, parameters, (batch(),)).loss

    found = torch.func.grad(loss)(parameters)
    for name, p in learner.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-10, atol=1e-13)
    for each, tasks in ((learner, batch()), (maml(truncate=1), batch()), (maml(), batch(3))):
        with pytest.raises(Exception, match="a compiled graph holds inner loops of plain gradient steps"):
            torch.compile(each, backend="eager", fullgraph=True)(tasks)


def test_reptile_goes_on_with_its_adam():
    tasks = batch()
    learner = mf.Reptile(mlp(), loss=F.cross_entropy, lr=0.05, steps=4, optimizer="adam")
    fast = learner.adapt(tasks.support_x, tasks.support_y)
    parts = learner.adapt(tasks.support_x, tasks.support_y, steps=1)
    parts = learner.adapt(tasks.support_x, tasks.support_y, steps=3, after=parts)
    assert torch.equal(fast.parameters, parts.parameters)
    assert sorted(fast.state) == ["exp_avg", "exp_avg_sq"]
    learner.batch_size = 2
    three = learner.adapt(tasks.support_x, tasks.support_y, steps=3)
    parts = learner.adapt(tasks.support_x, tasks.support_y, steps=2)
    assert torch.equal(
        learner.adapt(tasks.support_x, tasks.support_y, steps=1, after=parts).parameters, three.parameters
    )
