"""What training asks of a learner, whether it takes gradient steps or not."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import metafast as mf
from metafast import learners
from metafast.learners import base
from metafast.training import checkpoint
from metafast.training.build import build_learner, build_model
from metafast.training.progress import Progress
from metafast.training.recipes import Recipe, recipe
from metafast.training.report import finish, table
from metafast.training.run import LAST, Options, Training
from metafast.training.saved_run import explain_recipe, open_run, predict, retest


@pytest.fixture
def smoother(monkeypatch):
    """A learner that takes no gradient step: the targets of the support set, weighted by nearness of features."""
    monkeypatch.setattr(base, "_LEARNERS", dict(base._LEARNERS))

    class Smoother(mf.Learner):
        name = "smoother"
        paper = "Nadaraya, Watson 1964"

        def __init__(self, model):
            super().__init__()
            self.model = model

        @classmethod
        def from_recipe(cls, recipe, model, backend):
            return cls(model)

        def forward(self, tasks):
            outputs = self.adapt(tasks.support_x, tasks.support_y)(tasks.query_x)
            return mf.LearnerOutput((outputs - tasks.query_y).square().flatten(1).mean(1), outputs)

        def adapt(self, support_x, support_y, *, support_mask=None):
            known = self.model(support_x)
            return lambda x: torch.softmax(-torch.cdist(self.model(x), known), -1) @ support_y

    return Smoother


def run(chosen, folder, **options):
    training = Training(chosen, Options(folder, device="cpu", **options))
    training.run(Progress())
    return training


def test_learners_are_found_by_the_name_of_their_class():
    assert learners.names() == sorted(learners.names())
    assert {name: learners.by_name(name).name for name in learners.names()} == {n: n for n in learners.names()}
    assert learners.by_name("maml++") is mf.MAMLPlusPlus
    known = re.escape(", ".join(learners.names()))
    with pytest.raises(ValueError, match=f"there is no algorithm 'mamlpp'; choose from {known}"):
        learners.by_name("mamlpp")


def test_a_name_belongs_to_one_class():
    known = learners.by_name("maml")
    with pytest.raises(ValueError, match=r"name = 'maml' of .*Other is taken by metafast\.learners\.maml\.MAML"):

        class Other(mf.MAML):
            name = "maml"

    class Nameless(mf.MAML):
        pass

    assert learners.by_name("maml") is known is not Nameless


def test_recipes_have_no_inner_loop_where_the_learner_has_none(smoother):
    chosen = recipe("sinusoid", "smoother")
    inner = {name: getattr(chosen, name) for name in base.INNER_SETTINGS}
    assert inner == {"steps": None, "inner_lr": None, "inner_optimizer": None, "test_steps": None}
    assert Recipe.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen
    for name, value in (("steps", 3), ("inner_lr", 0.1), ("test_steps", (1,)), ("inner_optimizer", "sgd")):
        with pytest.raises(ValueError, match=rf"{name} is .*, but smoother has no such setting; leave it out"):
            recipe("sinusoid", "smoother", **{name: value})
    with pytest.raises(ValueError, match="steps is missing; maml needs it"):
        Recipe(**{**vars(chosen), "algorithm": "maml"})
    with pytest.raises(ValueError, match="inner_optimizer is 'adam'; maml takes sgd"):
        recipe("sinusoid", inner_optimizer="adam")


def test_a_learner_without_inner_loop_is_trained_resumed_tested_and_used(smoother, tmp_path):
    chosen = recipe("sinusoid", "smoother", iterations=40, tasks=3, lr=0.01, eval_every=20, eval_tasks=10)
    straight = run(chosen, tmp_path / "straight")
    resumed = Training(chosen, Options(tmp_path / "resumed", device="cpu"))
    for _ in range(15):
        resumed.step()
    resumed.save(LAST)
    run(chosen, tmp_path / "resumed", resume=True)
    (wanted, _), (found, _) = (checkpoint.load(tmp_path / name / LAST) for name in ("straight", "resumed"))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    first, last = (build_learner(chosen, build_model(chosen, 0), "auto"), straight.learner)
    tasks = straight.episodes.test[10].batch(0)
    with torch.no_grad():
        assert last(tasks).loss < 0.9 * first(tasks).loss

    summary = finish(straight, 30, wall_seconds=1.0)
    assert [set(row) for row in summary["tests"]] == [{"shots", "mse", "ci95", "tasks"}] * 2
    assert summary["result"]["shots"] == 5
    assert summary["executor"] == ["executor: none, Smoother runs as PyTorch's own operators; 1,761 parameters"]
    assert table(summary["tests"], "mse").splitlines()[0] == "shots  mse with 95% interval"
    opened = open_run(tmp_path / "straight", "cpu")
    assert retest(opened, None, 30, None, None, None)["tests"] == summary["tests"]
    with pytest.raises(ValueError, match="smoother has no such setting"):
        retest(opened, None, 30, None, None, [3])
    assert explain_recipe(chosen, "cpu", "auto").startswith("executor: none, Smoother")
    points = tmp_path / "points.csv"
    with points.open("w", newline="") as file:
        csv.writer(file).writerows([("x", "y"), (0, 1), (1, 2)])
    rows = predict(opened, points, points, None, tmp_path / "fit.png")
    assert all(1 <= row["y"] <= 2 for row in rows)
    with pytest.raises(ValueError, match="smoother has no such setting"):
        predict(opened, points, points, 3, None)


def test_backward_gives_the_gradient_of_the_mean_loss_and_keeps_no_graph(smoother):
    learner = smoother(nn.Linear(1, 3))
    x, y = torch.randn(4, 5, 1), torch.randn(4, 5, 1)
    tasks = mf.TaskBatch(x, y, x + 0.1, y)
    expected = torch.autograd.grad(learner(tasks).losses.mean(), list(learner.parameters()))
    out = learner.backward(tasks)
    assert not out.losses.requires_grad
    assert not out.outputs.requires_grad
    assert all(map(torch.equal, (p.grad for p in learner.parameters()), expected))


def test_a_learner_says_what_a_cuda_graph_cannot_hold(smoother):
    tasks = open_tasks()
    assert smoother(nn.Linear(1, 3)).graph_obstacle(tasks) == "Smoother may wait for the host"
    options = {"loss": "mse", "lr": 0.1, "backend": "reference"}
    adam = mf.Reptile(nn.Linear(1, 1), optimizer="adam", **options)
    assert adam.graph_obstacle(tasks) == "Reptile's inner Adam takes its mask from the host"
    for learner in (mf.Reptile(nn.Linear(1, 1), **options), mf.MAML(nn.Linear(1, 1), **options)):
        assert learner.graph_obstacle(tasks) == "executor 'reference' may wait for the host"


def open_tasks():
    x, y = torch.randn(2, 5, 1), torch.randn(2, 5, 1)
    return mf.TaskBatch(x, y, x, y)


def test_batch_norm_is_described_where_there_is_one(smoother):
    norm = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))
    assert smoother(nn.Linear(1, 2)).batch_norm() is None
    assert smoother(norm).batch_norm() == "as torch.nn.BatchNorm does in training mode"
    for bn in ("task", "per_step", "frozen", "running"):
        assert mf.MAML(norm, loss="mse", lr=0.1, bn=bn).batch_norm().startswith(f"{bn}: ")
    assert mf.MAML(nn.Linear(1, 2), loss="mse", lr=0.1).batch_norm() is None


@pytest.mark.parametrize("iterations", [1, 7, 100, 230])
def test_schedule_of_maml_plus_plus_reaches_each_epoch_at_its_iteration(iterations):
    learner, other = (mf.MAMLPlusPlus(nn.Linear(1, 1), loss="mse", second_order_from=29) for _ in range(2))
    for iteration in range(iterations):
        other.at_epoch(100 * iteration // iterations)  # whole numbers: 100 * (29 / 100) is below 29
        wanted = (other.step_weights, other.first_order)
        assert learner.schedule(iteration, iterations) == wanted == (learner.step_weights, learner.first_order)


def test_outer_optimisers_are_those_of_the_papers():
    options = {"loss": "mse", "lr": 0.1}
    for learner, kind in ((mf.MAML, torch.optim.Adam), (mf.Reptile, torch.optim.SGD)):
        optimizer = learner(nn.Linear(1, 1), **options).outer_optimizer(0.25)
        assert type(optimizer) is kind
        assert float(optimizer.param_groups[0]["lr"]) == 0.25


def test_the_learner_of_the_page_can_be_trained(monkeypatch):
    monkeypatch.setattr(base, "_LEARNERS", dict(base._LEARNERS))
    page = (Path(__file__).parent.parent / "docs" / "adding_a_learner.md").read_text()
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {"MAML": mf.MAML, "__name__": "page"})
    chosen = recipe("glyphs-5w1s", "fo-head", channels=4)
    assert (chosen.algorithm, chosen.steps, chosen.test_steps) == ("fo-head", 5, (0, 5))
    learner = build_learner(chosen, build_model(chosen, seed=0), "auto")
    assert learner.first_order
    assert learner.adapted_names == {"head.weight", "head.bias"}


def test_a_forward_of_its_own_counts_in_backward():
    """And a hook on the learner does."""

    class Doubled(mf.MAML):
        def forward(self, tasks, create_graph=False):
            out = super().forward(tasks, create_graph)
            return mf.LearnerOutput(2 * out.losses, out.outputs)

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    tasks = mf.TaskBatch(*(torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 2, dtype=torch.float64)) * 2)
    options = {"loss": "mse", "lr": 0.1}
    plain, doubled, hooked = mf.MAML(model, **options), Doubled(model, **options), mf.MAML(model, **options)
    hooked.register_forward_hook(lambda module, args, out: mf.LearnerOutput(3 * out.losses, out.outputs))
    grads = []
    for learner in (plain, doubled, hooked):
        learner.zero_grad()
        learner.backward(tasks)
        grads.append(model[0].weight.grad)
    torch.testing.assert_close(grads[1], 2 * grads[0])
    torch.testing.assert_close(grads[2], 3 * grads[0])
