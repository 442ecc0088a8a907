import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metafast.executors import CpuExecutor
from metafast.kernels.linear import Linear
from metafast.tasks import TaskBatch
from metafast.training.recipes import recipe
from metafast.training.run import Options, Training
from metafast.verification import demonstration, doctor, speed, torch_loop
from metafast.verification.agreement import ONE_STEP
from metafast.verification.demonstration import Demonstration, Expectation
from metafast.verification.speed import SpeedComparison, compare


@pytest.fixture
def quick(monkeypatch):
    """Speeds from a single call."""
    monkeypatch.setattr(speed, "CALLS", 1)
    monkeypatch.setattr(speed, "SECONDS", 0.0)


def compared(training):
    return compare(training.learner, training.episodes.train.batch(0), training.recipe.inner_lr)


@pytest.mark.parametrize("name", ["sinusoid", "glyphs-5w1s"])
def test_metafast_and_the_plain_loop_agree_before_they_are_timed(quick, tmp_path, name):
    training = Training(replace(recipe(name, tasks=2), eval_every=0), Options(tmp_path, device="cpu"))
    before = [p.detach().clone() for p in training.learner.parameters()]
    found = compared(training)
    assert 0 < found.difference < ONE_STEP.value == 1e-3
    assert found.agrees
    assert found.tasks == 2
    assert found.metafast > 0
    assert found.loop > 0
    assert "times (the meta-gradients agree to" in str(found)
    assert all(torch.equal(a, b) for a, b in zip(before, training.learner.parameters(), strict=True))
    assert all(p.grad is None for p in training.learner.parameters())


def test_no_speed_is_reported_when_the_gradients_differ(quick, tmp_path, monkeypatch):
    right = torch_loop.meta_gradient

    def wrong(*arguments):
        loss, grads = right(*arguments)
        return loss, {name: 1.01 * g for name, g in grads.items()}

    monkeypatch.setattr(torch_loop, "meta_gradient", wrong)
    found = compared(Training(recipe("sinusoid", tasks=2), Options(tmp_path, device="cpu")))
    assert found.difference == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert str(found) == "the meta-gradients differ by 9.9e-03 (relative): no comparison"
    shown = Demonstration({}, {"sinusoid": found}, (), "cpu", 1.0, Path())
    assert not shown.reached
    assert f"  sinusoid: {found}" in str(shown).splitlines()


def test_an_expectation_that_is_missed_shows():
    expectations = (Expectation("MSE 1.7 (at most 1.5)", False), Expectation("fine", True))
    found = Demonstration({}, {}, expectations, "cpu", 1.0, Path("nowhere"))
    assert not found.reached
    assert "[NOT REACHED] MSE 1.7 (at most 1.5)" in str(found)
    assert found.to_json()["expectations"][0] == {"text": "MSE 1.7 (at most 1.5)", "reached": False}


def test_expectations_are_judged_by_what_was_measured():
    def summaries(before, after, accuracy):
        rows = [{"steps": s, "mse": m, "ci95": 0.1, "tasks": 9} for s, m in ((0, before), (1, after), (5, 0.3))]
        return {
            "sinusoid": {"tests": rows},
            "glyphs-5w1s": {"result": {"accuracy": accuracy, "ci95": 0.01, "tasks": 9}},
        }

    assert [e.reached for e in demonstration.judge(summaries(3.1, 1.4, 0.86))] == [True] * 4
    assert [e.reached for e in demonstration.judge(summaries(2.9, 1.6, 0.84))] == [False, False, True, False]


def test_speed_of_gradients_that_agree():
    found = SpeedComparison(tasks=4, metafast=0.02, loop=0.4, difference=1e-6)
    assert str(found) == (
        "200 tasks/s, plain torch loop 10 tasks/s: 20.0 times (the meta-gradients agree to 1e-06)"
    )  # fmt: skip
    assert found.to_json() == {"metafast_tasks_per_s": 200, "loop_tasks_per_s": 10, "difference": 1e-6}


def test_the_plain_loop_is_second_order():
    """Against the derivative worked out by hand for ``L = (w x - y)^2`` with one inner step."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    w = model.weight.item()
    x, y, qx, qy = 0.7, 0.3, -1.1, 0.4
    tasks = TaskBatch(*(torch.full((1, 1, 1), value, dtype=torch.float64) for value in (x, y, qx, qy)))
    loss, grads = torch_loop.meta_gradient(model, torch.nn.functional.mse_loss, tasks, 0.1, 1, {"weight"})
    adapted = w - 0.1 * 2 * x * (w * x - y)
    assert float(loss) == pytest.approx((adapted * qx - qy) ** 2, rel=1e-6)
    assert float(grads["weight"]) == pytest.approx(2 * qx * (adapted * qx - qy) * (1 - 0.1 * 2 * x * x), rel=1e-6)


@pytest.fixture
def hasty(monkeypatch):
    """Speeds from fewer calls."""
    monkeypatch.setattr(speed, "SECONDS", 0.05)


def test_a_wrong_gradient_makes_the_doctor_say_so(monkeypatch, hasty):
    right = Linear.tangent_backward

    def wrong(self, ctx, params, d_params, gd_y):
        inputs, (weight, *bias) = right(self, ctx, params, d_params, gd_y)
        return inputs, (-weight, *bias)

    monkeypatch.setattr(Linear, "tangent_backward", wrong)
    findings = doctor.examine()
    assert not findings.healthy
    broken = [finding for finding in findings.findings if finding.state == "broken"]
    assert {finding.subject for finding in broken} == {"executor reference"}
    assert "its meta-gradient of MLP on cpu differs from autograd's by " in broken[0].text
    assert "wrong from layer 'hidden1' (linear) on" in broken[0].text
    assert "something is broken: do not trust results" in str(findings)


def test_every_finding_that_is_not_ok_has_a_remedy(hasty):
    findings = doctor.examine()
    assert findings.healthy
    for finding in findings.findings:
        assert bool(finding.remedy) == (finding.state != "ok"), str(finding)
    subjects = {finding.subject for finding in findings.findings}
    assert {"metafast", "cpu", "extension", "executors", "executor reference", "speed of reference"} <= subjects
    if CpuExecutor.isas():
        text = {finding.subject: finding.text for finding in findings.findings}
        assert re.match(r"compiler \d+\.\d+.*, flags .*-O3", text["extension"])
        assert text["instructions"].startswith(CpuExecutor.isas()[0] + " in use")


def test_a_slow_executor_is_a_finding(monkeypatch, hasty):
    monkeypatch.setattr(doctor, "speed", lambda executor, device: SpeedComparison(25, 0.01, 0.012, 0.0))
    finding = next(f for f in doctor.examine().findings if f.subject == "speed of reference")
    assert finding.state == "missing"
    assert "10.00 ms" in finding.text
    assert "1.2 times as fast" in finding.text
    assert "metafast profile" in finding.remedy


def test_a_missing_extension_is_a_finding_with_its_command(monkeypatch):
    monkeypatch.setattr(doctor.encode, "extension", None)
    (finding,) = doctor._build()
    assert (finding.state, finding.subject) == ("missing", "extension")
    assert "pip install --no-build-isolation -e ." in finding.remedy


def test_the_doctor_names_what_is_missing_and_the_command_that_mends_it(monkeypatch, hasty):
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "PIL" else real(name))
    finding = next(f for f in doctor.examine().findings if f.subject == "PIL")
    assert (finding.state, finding.remedy) == ("missing", 'pip install "metafast[train]"')
    assert finding.text == "not installed, so no reading of pictures"
