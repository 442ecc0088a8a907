from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metafast import TaskBatch, demo, doctor, plain
from metafast.demo import AGREEMENT, Demo, Goal, Speed, compare
from metafast.recipes import recipe
from metafast.train import Options, Training


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo, "RUNS", 1)
    monkeypatch.setattr(demo, "SECONDS", 0.0)


@pytest.mark.parametrize("name", ["sinusoid", "glyphs-5w1s"])
def test_metafast_and_the_plain_loop_agree_before_they_are_timed(quick, tmp_path, name):
    training = Training(replace(recipe(name, tasks=2), eval_every=0), Options(tmp_path, device="cpu"))
    before = [p.detach().clone() for p in training.learner.parameters()]
    speed = compare(training)
    assert 0 < speed.difference < AGREEMENT
    assert speed.metafast > 0
    assert speed.plain > 0
    assert "times (the meta-gradients agree to" in str(speed)
    assert all(torch.equal(a, b) for a, b in zip(before, training.learner.parameters(), strict=True))
    assert all(p.grad is None for p in training.learner.parameters())


def test_no_speed_is_reported_when_the_gradients_differ(quick, tmp_path, monkeypatch):
    right = plain.meta_gradient

    def wrong(*arguments):
        loss, grads = right(*arguments)
        return loss, {name: 1.01 * g for name, g in grads.items()}

    monkeypatch.setattr(plain, "meta_gradient", wrong)
    speed = compare(Training(recipe("sinusoid", tasks=2), Options(tmp_path, device="cpu")))
    assert speed.difference == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert str(speed) == "sinusoid: the meta-gradients differ by 9.9e-03 (relative): no comparison"
    assert not Demo({}, (speed,), (), "cpu", 1.0, Path()).reached


def test_a_goal_that_is_missed_shows():
    found = Demo({}, (), (Goal("MSE 1.7 (at most 1.5)", False), Goal("fine", True)), "cpu", 1.0, Path("nowhere"))
    assert not found.reached
    assert "[NOT REACHED] MSE 1.7 (at most 1.5)" in str(found)
    assert found.to_json()["goals"][0] == {"text": "MSE 1.7 (at most 1.5)", "reached": False}


def test_goals_are_judged_by_what_was_measured():
    def summaries(before, after, accuracy):
        rows = [{"steps": s, "mse": m, "ci95": 0.1, "tasks": 9} for s, m in ((0, before), (1, after), (5, 0.3))]
        return {
            "sinusoid": {"tests": rows},
            "glyphs-5w1s": {"result": {"accuracy": accuracy, "ci95": 0.01, "tasks": 9}},
        }

    assert [g.reached for g in demo.judge(summaries(3.1, 1.4, 0.86))] == [True] * 4
    assert [g.reached for g in demo.judge(summaries(2.9, 1.6, 0.84))] == [False, False, True, False]


def test_speed_of_gradients_that_agree():
    assert str(Speed("x", 200.0, 10.0, 1e-6)) == (
        "x: 200 tasks/s, plain torch loop 10 tasks/s: 20.0 times (the meta-gradients agree to 1e-06)"
    )


def test_the_plain_loop_is_second_order():
    """Against the derivative worked out by hand for ``L = (w x - y)^2`` with one inner step."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    w = model.weight.item()
    x, y, qx, qy = 0.7, 0.3, -1.1, 0.4
    tasks = TaskBatch(*(torch.full((1, 1, 1), value, dtype=torch.float64) for value in (x, y, qx, qy)))
    loss, grads = plain.meta_gradient(model, torch.nn.functional.mse_loss, tasks, 0.1, 1, {"weight"})
    adapted = w - 0.1 * 2 * x * (w * x - y)
    assert float(loss) == pytest.approx((adapted * qx - qy) ** 2, rel=1e-6)
    assert float(grads["weight"]) == pytest.approx(2 * qx * (adapted * qx - qy) * (1 - 0.1 * 2 * x * x), rel=1e-6)


def test_a_wrong_gradient_makes_the_doctor_say_so(monkeypatch):
    monkeypatch.setattr(doctor, "gradient_error", lambda backend, device: 0.02)
    findings = doctor.examine()
    assert not findings.healthy
    assert "its meta-gradient differs from autograd's by 2.0e-02 on cpu" in str(findings)
    assert "something is broken: do not trust results" in str(findings)


def test_the_doctor_names_what_is_missing_and_the_command_that_mends_it(monkeypatch):
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "PIL" else real(name))
    finding = next(f for f in doctor.examine().findings if f.subject == "PIL")
    assert (finding.state, finding.remedy) == ("missing", 'pip install "metafast[train]"')
    assert finding.text == "not installed, so no reading of pictures"
