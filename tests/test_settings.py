"""Settings of a learner that are set later: each takes effect with the next batch, or is refused in words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import Scaled
from torch import nn
from unrolled import check, unrolled

import metafast as mf
from metafast.executors import CpuExecutor


def small() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    model.add_module("head", nn.Linear(8, 3))
    return model.double()


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


class Wasteful(nn.Module):
    """Has parameters that forward does not use, before and between those that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(5))
        self.body, self.other, self.head = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def batch(samples: int = 6) -> mf.TaskBatch:
    generator = torch.Generator().manual_seed(0)
    x, qx = (torch.randn(3, samples, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.arange(3 * samples).reshape(3, samples) % 3
    return mf.TaskBatch(x, y, qx, y)


def maml(model=small, cls=mf.MAML, **options):
    torch.manual_seed(1)
    return cls(model(), **{"loss": "cross_entropy", "lr": 0.1, "steps": 2, **options})


def gradients(learner, tasks=None):
    learner.zero_grad()
    learner.backward(tasks or batch())
    return {n: p.grad.clone() for n, p in learner.named_parameters() if p.grad is not None}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    assert wanted
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13, msg=name)


def smoothed(outputs, targets):
    return F.cross_entropy(outputs, targets, label_smoothing=0.3)


SETTINGS = {
    "steps": {"steps": 3},
    "fewer steps": {"steps": 1},
    "lr": {"lr": 0.3},
    "lr by a Rate": {"lr": mf.Rate(0.3)},
    "loss": {"loss": smoothed},
    "loss that is a module": {"loss": nn.CrossEntropyLoss(label_smoothing=0.3)},
    "query_loss": {"query_loss": smoothed},
    "adapt by name": {"adapt": "head"},
    "adapt by module names": {"adapt": ["0", "head.bias"]},
    "first_order": {"first_order": True},
    "step_weights": {"step_weights": [0.3, 0.7]},
    "backend": {"backend": "reference"},
    "an executor": {"backend": CpuExecutor(budget=1 << 20)},
    "precision": {"precision": "float32"},
    "output": {"output": 0},
    "several": {"steps": 4, "lr": 0.05, "adapt": ["0"], "loss": "cross_entropy"},
}


@pytest.mark.parametrize("seen", [False, True], ids=["before a batch", "after a batch"])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_a_setting_that_is_set_later_is_as_one_that_was_given(options, seen):
    model = small
    if "output" in options:  # a part of a tuple

        class Pair(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = small()

            def forward(self, x):
                return self.inner(x), x

        model = Pair
    learner = maml(model, **({"output": 0} if "output" in options else {}))
    if seen:
        learner.backward(batch())
    for name, value in options.items():
        setattr(learner, name, value)
    same(gradients(learner), gradients(maml(model, **options)))
    fast, wanted = (each.adapt(batch().support_x, batch().support_y) for each in (learner, maml(model, **options)))
    torch.testing.assert_close(fast(batch().query_x), wanted(batch().query_x), rtol=1e-10, atol=1e-13)
    assert next(iter(learner.explain().splitlines())) == next(iter(maml_explained(model, options)))


def maml_explained(model, options):
    learner = maml(model, **options)
    learner.backward(batch())
    return learner.explain().splitlines()


def test_settings_that_are_set_are_held_to_the_truth():
    learner, tasks = maml(), batch()
    check(learner, tasks, F.cross_entropy, 0.1, 2)
    learner.steps = 3
    check(learner, tasks, F.cross_entropy, 0.1, 3)
    learner.lr = 0.25
    check(learner, tasks, F.cross_entropy, 0.25, 3)
    learner.loss = smoothed
    check(learner, tasks, smoothed, 0.25, 3)
    learner.backend = "reference"
    learner.steps = 1
    check(learner, tasks, smoothed, 0.25, 1)
    assert (learner.steps, learner.lr, learner.backend) == (1, 0.25, "reference")


def test_a_learned_loss_that_is_set_later_is_learned():
    for name in ("loss", "query_loss"):
        learner, own = maml(), Scaled()
        learner.backward(batch())
        setattr(learner, name, own)
        found, wanted = gradients(learner), gradients(maml(**{name: Scaled()}))
        assert float(own.scale.grad) != 0
        same(found, wanted)
        assert any(p is own.scale for p in learner.parameters())
        setattr(learner, name, None if name == "query_loss" else "cross_entropy")
        same(gradients(learner), gradients(maml()))
        assert not any(p is own.scale for p in learner.parameters())


def test_batch_norm_modes_are_set_later():
    for mode in ("frozen", "running", "task", {"1": "frozen"}, None):
        learner = maml(normed)
        learner.backward(batch())
        fresh = maml(normed)
        fresh.load_state_dict(learner.state_dict())
        fresh.bn = learner.bn = mode
        given = maml(normed, bn=mode)
        given.load_state_dict(learner.state_dict())
        same(gradients(learner), gradients(given))
        assert learner.bn == mode
    with pytest.raises(TypeError):
        maml(normed, bn={"1": "frozen"}).bn["1"] = "task"


def test_rates_are_set_in_place_and_the_optimiser_still_holds_them():
    for rate in (mf.Rate(0.1, learn=True), mf.Rate(0.1, ("layer", "step"), learn=True), mf.Rate(0.1, "parameter")):
        learner = maml(lr=rate)
        held = learner.rate.value
        learner.backward(batch())
        learner.lr = 0.3
        assert learner.rate.value is held
        assert bool((held == 0.3).all())
        wanted = maml(lr=mf.Rate(0.3, rate.per, rate.learn))
        same(gradients(learner), gradients(wanted))
        learner.lr = mf.Rate((0.1, 0.2), rate.per, rate.learn)
        assert learner.rate.value is held
        assert bool(((held >= 0.1) & (held <= 0.2)).all())
    learner = maml(lr=mf.Rate(0.1, learn=True))
    optimiser = torch.optim.SGD(learner.parameters(), lr=1.0)
    learner.lr = 0.3
    learner.backward(batch())
    optimiser.step()
    assert learner.lr != 0.3


REFUSED = {
    "steps": (lambda le: setattr(le, "steps", 0), ValueError, "steps=0: the inner loop takes a whole number"),
    "steps that are a flag": (lambda le: setattr(le, "steps", True), ValueError, "whole number"),
    "lr": (lambda le: setattr(le, "lr", -0.1), ValueError, "positive"),
    "lr by step": (
        lambda le: setattr(le, "lr", mf.Rate(0.1, "step")),
        ValueError,
        "make a new learner, or set lr to a",
    ),
    "learned lr": (lambda le: setattr(le, "lr", mf.Rate(0.1, learn=True)), ValueError, "make a new learner"),
    "loss": (lambda le: setattr(le, "loss", "entropy"), ValueError, "loss='entropy' is unknown"),
    "bn": (lambda le: setattr(le, "bn", "batch"), ValueError, "bn='batch' is unknown"),
    "rows": (lambda le: setattr(le, "bn", "per_step"), ValueError, "make a new learner with this bn"),
    "adapt": (lambda le: setattr(le, "adapt", "haed"), ValueError, "'haed' is no parameter"),
    "adapt by nothing": (lambda le: setattr(le, "adapt", []), ValueError, "adapt is empty"),
    "backend": (lambda le: setattr(le, "backend", "gpu"), ValueError, "backend='gpu' is unknown"),
    "precision": (lambda le: setattr(le, "precision", "fp8"), ValueError, "precision='fp8' is unknown"),
    "output": (lambda le: setattr(le, "output", 1.5), TypeError, "output=1.5"),
    "first_order": (lambda le: setattr(le, "first_order", 1), TypeError, "first_order=1: give True"),
    "step_weights": (lambda le: setattr(le, "step_weights", [1.0]), ValueError, "give 2 finite numbers"),
    "model": (lambda le: setattr(le, "model", normed()), AttributeError, "make a learner of the other module"),
    "rate": (lambda le: setattr(le, "rate", 0.1), AttributeError, r"set learner\.lr"),
    "rows themselves": (lambda le: setattr(le, "rows", None), AttributeError, "cannot be replaced"),
    "loss modules": (lambda le: setattr(le, "loss_modules", None), AttributeError, r"set learner\.loss or"),
    "captures": (lambda le: setattr(le, "captures", None), AttributeError, "cannot be replaced"),
    "program": (lambda le: setattr(le, "program", None), AttributeError, "was captured"),
    "adapted_names": (lambda le: setattr(le, "adapted_names", ["0"]), AttributeError, r"set learner\.adapt "),
    "loop": (lambda le: setattr(le, "loop", None), AttributeError, r"set learner\.steps"),
    "a method": (lambda le: setattr(le, "batch_norm", "task"), AttributeError, "is a method"),
    "a slip": (lambda le: setattr(le, "stepz", 3), AttributeError, r"did you mean learner\.steps\?"),
    "a name of a recipe": (lambda le: setattr(le, "inner_lr", 3), AttributeError, r"did you mean learner\.lr\?"),
    "a slip with a module": (lambda le: setattr(le, "los", nn.MSELoss()), AttributeError, r"learner\.loss\?"),
    "an unknown name": (lambda le: setattr(le, "colour", 3), AttributeError, "its settings are adapt, backend, bn"),
    "deleting": (lambda le: delattr(le, "steps"), AttributeError, "cannot be deleted"),
    "deleting a part": (lambda le: delattr(le, "model"), AttributeError, "cannot be deleted"),
}


@pytest.mark.parametrize(("change", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_set_is_refused_and_leaves_the_learner_as_it_was(change, error, text):
    learner = maml(normed)
    before = {key: value.clone() for key, value in learner.state_dict().items()}
    wanted = gradients(learner)
    learner.load_state_dict(before)
    with pytest.raises(error, match=text):
        change(learner)
    same(gradients(learner), wanted)


@pytest.mark.parametrize(
    ("learner", "text"),
    [
        (lambda: maml(lr=mf.Rate(0.1, "step")), "rates are told apart by step, 2 of them; make a new learner"),
        (lambda: maml(normed, bn="per_step"), "per_step batch norm has .* make a new learner"),
        (lambda: maml(step_weights=[0.5, 0.5]), r"step_weights, 2 of them; set learner\.step_weights = None first"),
        (lambda: maml(cls=mf.MAMLPlusPlus, model=normed), "make a new learner with this number of steps"),
    ],
)
def test_steps_that_something_else_depends_on(learner, text):
    learner = learner()
    wanted = gradients(learner)
    learner.steps = 2  # the same number
    with pytest.raises(ValueError, match=rf"steps=3: .*{text}"):
        learner.steps = 3
    assert learner.steps == 2
    same(gradients(learner), wanted)


def test_step_weights_go_with_steps_once_they_are_taken_back():
    learner = maml(step_weights=[0.5, 0.5])
    learner.step_weights = learner.step_weights  # as they are read
    assert learner.step_weights == [0, 0.5, 0.5]
    learner.step_weights = None
    learner.steps = 3
    assert learner.step_weights == [0, 0, 0, 1]
    learner.step_weights = [0.2, 0.3, 0.5]
    same(gradients(learner), gradients(maml(steps=3, step_weights=[0.2, 0.3, 0.5])))


def test_settings_of_the_other_learners():
    reptile = maml(cls=mf.Reptile)
    reptile.backward(batch())
    reptile.optimizer, reptile.batch_size, reptile.steps, reptile.lr = "adam", 4, 3, 0.01
    same(gradients(reptile), gradients(maml(cls=mf.Reptile, optimizer="adam", batch_size=4, steps=3, lr=0.01)))
    with pytest.raises(ValueError, match="'adamw' is unknown"):
        reptile.optimizer = "adamw"
    with pytest.raises(ValueError, match="batch_size=0"):
        reptile.batch_size = 0
    plus = maml(normed, mf.MAMLPlusPlus)
    plus.at_epoch(3)
    plus.multi_step_epochs, plus.second_order_from = 5, 4
    assert plus.step_weights[1:] == mf.multi_step_weights(3, 2, 5)
    assert plus.first_order
    plus.at_epoch(4)
    assert not plus.first_order
    with pytest.raises(ValueError, match=r"multi_step_epochs=0"):
        plus.multi_step_epochs = 0
    with pytest.raises(ValueError, match=r"second_order_from=-1"):
        plus.second_order_from = -1
    assert plus.multi_step_epochs == 5


def test_a_class_of_ones_own_keeps_attributes_of_its_own():
    class Own(mf.MAML):
        declared: int

        def __init__(self, model, **options):
            super().__init__(model, **options)
            self.calls = 0

        @property
        def depth(self):
            return self.calls

        @depth.setter
        def depth(self, depth):
            self.calls = depth

    learner = maml(cls=Own)
    learner.calls += 1
    learner.declared = 3
    learner.depth = 7
    assert learner.calls == 7
    learner._private = 1
    learner.extra = nn.Linear(2, 2)  # a part that is no slip
    learner.register_buffer("seen", torch.zeros(1))
    learner.seen = torch.ones(1)
    learner.forward = learner.forward  # a method in the place of a method
    with pytest.raises(AttributeError, match=r"Own has no attribute 'call' to set.*in the constructor or declared"):
        learner.call = 3
    with pytest.raises(AttributeError, match=r"did you mean learner\.depth"):
        learner.dept = 3


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("per", ["parameter", ("parameter", "step"), "layer", ("layer", "step"), "step", ()])
@pytest.mark.parametrize("make", [small, lambda: Wasteful().double()], ids=["small", "wasteful"])
def test_rates_belong_to_their_parameters(make, per, learn, backend):
    """Random rates, so that one in another's place shows, against autograd in float64."""
    learner, tasks = maml(make, lr=mf.Rate((0.01, 0.3), per, learn), backend=backend), batch()
    names = dict(learner.model.named_parameters())
    axes = {per} if isinstance(per, str) else set(per)
    value = learner.rate.value.detach().clone().requires_grad_(learn)
    steps = value.shape[0]
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    rates, at = {}, 0
    for name, p in names.items():
        chosen = value
        if "layer" in axes:
            chosen = value[:, layers.index(name.rpartition(".")[0])]
        elif "parameter" in axes:
            chosen = value[:, at : at + p.numel()].reshape(steps, *p.shape)
        at += p.numel()
        rates[name] = chosen.reshape(steps, *chosen.shape[1:]) if "parameter" in axes else chosen.reshape(-1, 1)
        if "parameter" not in axes:
            rates[name] = rates[name].reshape(-1, *(1,) * p.dim())
    assert value.shape == (
        2 if "step" in axes else 1,
        {"layer": len(layers), "parameter": at}.get(next(iter(axes - {"step"}), ""), 1),
    )
    _, wanted, of_rates = unrolled(learner.model, tasks, F.cross_entropy, rates, 2, (value,) if learn else ())
    for run in (learner.backward, lambda t: learner(t).loss.backward(), no_grad(learner.backward)):
        learner.zero_grad()
        run(tasks)
        for name, p in names.items():
            found = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(found, wanted[name], rtol=1e-8, atol=1e-11, msg=name)
        if learn:
            torch.testing.assert_close(learner.rate.value.grad, of_rates[0], rtol=1e-8, atol=1e-11)
    fast = learner.adapt(tasks.support_x, tasks.support_y)(tasks.query_x)
    torch.testing.assert_close(fast, learner(tasks).outputs.detach(), rtol=1e-10, atol=1e-12)


def no_grad(function):
    def run(tasks):
        with torch.no_grad():
            return function(tasks)

    return run


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_reptile_has_the_rates_of_the_parameters_that_are_used(backend):
    options = {"cls": mf.Reptile, "backend": backend, "batch_size": 6}
    learner = maml(lambda: Wasteful().double(), lr=mf.Rate((0.01, 0.3), "parameter"), **options)
    plain = maml(lambda: Wasteful().double(), lr=mf.Rate(0.1), **options)
    with torch.no_grad():
        learner.rate.value.fill_(0.1)
    same(gradients(learner), gradients(plain))


LEARNED = {
    "Meta-SGD": (lambda: maml(cls=mf.MetaSGD), {"rate.value": (1, 8 * 8 + 8 + 8 * 3 + 3)}),
    "Meta-SGD with spare parameters": (
        lambda: maml(lambda: Wasteful().double(), mf.MetaSGD), {"rate.value": (1, 5 + 72 + 18 + 27)},
    ),
    "MAML++": (
        lambda: maml(normed, mf.MAMLPlusPlus),
        {"rate.value": (2, 3), "rows.1/weight": (3, 8), "rows.1/bias": (3, 8)},
    ),
    "by layer": (lambda: maml(lr=mf.Rate(0.1, "layer", learn=True)), {"rate.value": (1, 2)}),
    "one": (lambda: maml(lr=mf.Rate(0.1, learn=True)), {"rate.value": (1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize(("make", "further"), LEARNED.values(), ids=LEARNED)
def test_learned_rates_are_listed_once(make, further):
    learner = make()
    for _ in range(2):
        own = {n: tuple(p.shape) for n, p in learner.named_parameters() if not n.startswith("model.")}
        assert own == further
        assert len({*map(id, learner.parameters())}) == len(list(learner.parameters()))
        assert sum(p.numel() for p in learner.parameters()) == sum(p.numel() for p in learner.model.parameters()) + sum(
            torch.Size(shape).numel() for shape in further.values()
        )
        assert {k for k in learner.state_dict() if not k.startswith("model.")} == further.keys()
        learner.backward(batch())


def test_a_checkpoint_of_other_rates_is_refused_in_words():
    saved = maml(lr=mf.Rate(0.1, "step", learn=True), steps=3).state_dict()
    with pytest.raises(RuntimeError, match=r"saved inner rates are \[3, 1\].*\[2, 1\].*another number of steps"):
        maml(lr=mf.Rate(0.1, "step", learn=True)).load_state_dict(saved)


def test_rates_of_parameters_that_are_no_longer_there_are_refused():
    learner = maml(lr=mf.Rate(0.1, "parameter", learn=True))
    learner.backward(batch())
    learner.model.head = nn.Linear(8, 4).double()
    with pytest.raises(ValueError, match=r"parameters \['head.bias', 'head.bias', .* make a new learner"):
        learner.backward(batch())
    single = maml()
    single.backward(batch())
    single.model.head = nn.Linear(8, 4).double()
    check(single, batch(), F.cross_entropy, 0.1, 2)


def test_reading_a_setting_costs_what_an_attribute_costs():
    """Setting clears what was planned; reading and the next batch of the same kind do not."""
    learner, tasks = maml(), batch()
    learner.backward(tasks)
    known = learner._known
    assert (learner.steps, learner.bn, learner.output) == (2, None, None)
    learner.first_order = True
    learner.step_weights = [0.5, 0.5]
    learner.lr = 0.2
    learner.backward(tasks)
    assert learner._known is known
    assert len(known) == 1
    learner.loss = smoothed
    assert learner._known is not known
