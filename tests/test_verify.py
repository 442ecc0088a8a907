"""The certificate: right models pass in every setting, and a sign error planted in a rule is found and named."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from models import convnet
from setups import SETUPS, make_learner, make_tasks
from test_cli import call
from torch import nn

import metafast as mf
from metafast.executors import BlockLimits, CpuExecutor, CudaExecutor, Executor, ReferenceExecutor
from metafast.kernels.batch_norm import BatchNorm
from metafast.kernels.conv2d import Conv2d
from metafast.kernels.cross_entropy import CrossEntropy
from metafast.kernels.linear import Linear
from metafast.kernels.pointwise.reference import Tanh

NAMES = ("MAML, 3 steps", "rate for each layer and step", "only biases adapted", "ragged regression", "custom loss",
         "tied weights", "direct parameters", "buffers", "SiLU, derived", "batch norm per step", "batch norm running",
         "batch norm of the task, ragged", "residual", "functional forms", "body adapted, head not",
         "recurrence")  # fmt: skip


def certificate(setup: Any, backend: str = "auto", dtype: torch.dtype = torch.float32) -> mf.Certificate:
    learner, tasks = make_learner(setup), make_tasks(setup, tasks=3)
    options = {"lr": 0.05, "loss": setup.loss or ("cross_entropy" if setup.classes else "mse"), **setup.options}
    return mf.verify(learner.model.to(dtype), tasks.to(dtype), backend=backend, **options)


@pytest.mark.parametrize("setup", [s for s in SETUPS if s.name in NAMES], ids=str)
def test_right_models_pass(setup: Any) -> None:
    torch.manual_seed(0)
    found = certificate(setup)
    assert found.passed, str(found)
    assert found.first_wrong is None
    assert {check.dtype for check in found.checks} == {"float32", "float64"}
    exact = [check.error for check in found.checks if check.dtype == "float64" and "difference" not in check.name]
    assert max(exact) < 1e-12
    assert "everything agrees" in found.verdict


def test_every_name_is_a_setup() -> None:
    assert set(NAMES) <= {setup.name for setup in SETUPS}


def images(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, mf.TaskBatch]:
    torch.manual_seed(0)
    model = convnet().to(dtype)
    shots = [torch.randn(2, n, 2, 9, 7, dtype=dtype) for n in (6, 6)]
    labels = torch.arange(3).repeat(2, 2)
    return model, mf.TaskBatch(shots[0], labels, shots[1], labels)


def negated(rule: Any, only: Any, which: int) -> Any:
    """``rule`` with the sign of result ``which`` turned, for the layers that ``only`` holds for."""

    def turned(self: Any, ctx: Any, *arguments: Any) -> Any:
        result = rule(self, ctx, *arguments)
        if not only(self):
            return result
        if which < 0:
            return -result
        inputs, params = result
        parts = list(params)
        parts[which] = None if parts[which] is None else -parts[which]
        return inputs, tuple(parts)

    return turned


@pytest.mark.parametrize(
    ("layer", "rule", "which", "name", "stage"),
    [
        (Conv2d, "forward", -1, "4", "forward"),
        (Conv2d, "backward", 0, "4", "backward"),
        (Conv2d, "tangent_forward", -1, "4", "tangent_forward or tangent_backward"),
        (Conv2d, "tangent_backward", 0, "4", "tangent_forward or tangent_backward"),
        (BatchNorm, "backward", 1, "1", "backward"),
        (BatchNorm, "tangent_backward", 0, "1", "tangent_forward or tangent_backward"),
        (Linear, "backward", 1, "9", "backward"),
        (Linear, "tangent_backward", 0, "9", "tangent_forward or tangent_backward"),
    ],
)
@pytest.mark.parametrize("both", [True, False], ids=["float64 too", "float32 alone"])
def test_a_planted_sign_error_is_named(
    monkeypatch: pytest.MonkeyPatch, layer: Any, rule: str, which: int, name: str, stage: str, both: bool
) -> None:
    """In one convolution (the one without a bias), in the batch norms or in the head, and nowhere else."""
    if not both:
        planned = ReferenceExecutor.plan_own
        monkeypatch.setattr(ReferenceExecutor, "plan_own", lambda self, program, loop, shapes: (
            "float64" if shapes.dtype == torch.float64 else planned(self, program, loop, shapes)))  # fmt: skip
    only = (lambda self: not self.bias) if layer is Conv2d else (lambda self: True)
    monkeypatch.setattr(layer, rule, negated(getattr(layer, rule), only, which))
    model, tasks = images()
    found = mf.verify(model, tasks, loss="cross_entropy", lr=0.02, steps=2, backend="reference")
    assert not found.passed
    assert found.first_wrong is not None
    assert (found.first_wrong.name, found.first_wrong.wrong) == (name, stage)
    assert f"wrong from layer {name!r}" in found.verdict
    json.dumps(found.to_json(), allow_nan=False)


def test_an_error_in_a_curvature_shows_in_second_order_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    second_derivative = Tanh.second_derivative
    monkeypatch.setattr(Tanh, "second_derivative", lambda self, ctx: -second_derivative(self, ctx))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(2, 2, 5, 2).double(), torch.randn(2, 2, 5, 1).double()
    tasks = mf.TaskBatch(x[0], y[0], x[1], y[1])
    found = mf.verify(model, tasks, loss="mse", lr=0.1, backend="reference")
    failed = {check.name for check in found.checks if not check.passed}
    assert {"meta-gradient", "Hessian-vector product", "meta-gradient by finite differences"} <= failed
    assert "losses" not in failed
    assert found.first_wrong is not None
    assert found.first_wrong.name == "1"
    assert next(layer.wrong for layer in found.layers) == ""


def test_a_wrong_loss_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CrossEntropy.tangent_backward
    monkeypatch.setattr(CrossEntropy, "tangent_backward", lambda self, ctx, d: -right(self, ctx, d))
    model, tasks = images()
    found = mf.verify(model, tasks, loss="cross_entropy", lr=0.02, backend="reference")
    assert found.first_wrong is not None
    assert (found.first_wrong.name, found.first_wrong.kind) == ("loss", "cross_entropy")


def test_a_wrong_inner_loop_is_told_from_a_wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ReferenceExecutor.adapt
    monkeypatch.setattr(
        ReferenceExecutor, "adapt", lambda self, p, params, lr, *rest: right(self, p, params, -lr, *rest)
    )
    model, tasks = images()
    found = mf.verify(model, tasks, loss="cross_entropy", lr=0.02, backend="reference")
    assert not found.passed
    assert found.first_wrong is None
    assert "the inner loop" in found.verdict


def of_steps() -> tuple[nn.Module, mf.TaskBatch]:
    torch.manual_seed(0)
    x, y = torch.randn(3, 2, 5, 4), torch.randint(3, (3, 2, 5))
    tasks = mf.TaskBatch(x, y, torch.randn(2, 5, 4), torch.randint(3, (2, 5)), each_step=True)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)), tasks


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rules_and_samples_of_each_step_pass_and_are_told_where_they_are_wrong(monkeypatch, backend: str) -> None:
    model, tasks = of_steps()
    options = {"loss": "cross_entropy", "lr": 0.02, "steps": 3, "backend": backend}
    found = mf.verify(model, tasks, inner=mf.Adam(max_norm=1.0), **options)
    assert found.passed, str(found)
    assert "Adam(" in found.settings["inner"]
    executor = CpuExecutor if found.executor == "cpu" else ReferenceExecutor
    right = executor.adapt_vjp
    meta_gradient = Executor.meta_gradient  # made of adapt and adapt_vjp
    monkeypatch.setattr(executor, "meta_gradient", meta_gradient)
    monkeypatch.setattr(executor, "adapt_vjp", lambda self, p, loop, z, rates, *rest: right(
        self, p, loop, z, rates * 0.9 if loop.rule else rates, *rest))  # fmt: skip
    wrong = mf.verify(model, tasks, inner=mf.Adam(max_norm=1.0), **options)
    assert not wrong.passed
    assert wrong.first_wrong is None
    assert "meta-gradient" in wrong.verdict


def test_an_executor_that_gives_other_bits_each_time_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = ReferenceExecutor.loss_and_grad, iter(range(10**6))

    def shaky(self: Any, *arguments: Any) -> Any:
        losses, grad, outputs = right(self, *arguments)
        return losses, grad * (1 + 1e-12 * (next(calls) % 2)), outputs

    monkeypatch.setattr(ReferenceExecutor, "loss_and_grad", shaky)
    model, tasks = images(torch.float64)
    found = mf.verify(model, tasks, loss="cross_entropy", lr=0.02, backend="reference")
    assert [check.name for check in found.checks if not check.passed] == ["two runs give the same bits"]


@pytest.mark.skipif(not CpuExecutor.isas(), reason="metafast._C is not built")
def test_native_is_verified_and_the_model_stays_untouched() -> None:
    model, tasks = images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = mf.verify(model, tasks, loss="cross_entropy", lr=0.02, steps=2, adapt=[model[9], "4"], backend="cpu")
    assert found.passed, str(found)
    assert found.executor == "cpu"
    assert found.settings["adapted"] == ["4.weight", "9.weight", "9.bias"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [layer.name for layer in found.layers] == [*map(str, range(10)), "loss"] * 2


@pytest.mark.skipif(not CpuExecutor.isas(), reason="metafast._C is not built")
@pytest.mark.parametrize(("function", "stage"), [("loss_and_grad", "backward"), ("adapt_vjp", "tangent_")])
def test_an_error_of_a_fused_executor_is_named(monkeypatch: pytest.MonkeyPatch, function: str, stage: str) -> None:
    """One bias of a batch norm gets the wrong sign; whichever program it is part of, it is the same layer's."""
    right = getattr(CpuExecutor, function)

    def wrong(self: Any, program: Any, *arguments: Any, **options: Any) -> Any:
        found = list(right(self, program, *arguments, **options))
        bias = next(p for p in program.parameters if p.name == "5.bias")
        part = (slice(None), slice(bias.offset, bias.offset + bias.size))
        if function == "loss_and_grad":
            found[1][part] *= -1
        else:  # v - lr H v
            v = arguments[4]
            found[0][part] = 2 * v[part] - found[0][part]
        return tuple(found)

    monkeypatch.setattr(CpuExecutor, function, wrong)
    model, tasks = images()
    found = mf.verify(model, tasks, loss="cross_entropy", lr=0.02, backend="cpu")
    assert found.first_wrong is not None
    assert (found.first_wrong.name, found.first_wrong.kind) == ("5", "batch_norm")
    assert found.first_wrong.wrong.startswith(stage)


@pytest.mark.skipif(not CpuExecutor.isas(), reason="metafast._C is not built")
def test_a_block_that_just_holds_a_task_is_verified() -> None:
    """A layer is checked with the support set for queries: that takes more memory than the task, which has fewer."""
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    x, y = torch.randn(2, 12, 3), torch.randn(2, 12, 2)
    tasks, options = mf.TaskBatch(x, y, x[:, :2], y[:, :2]), {"loss": "mse", "lr": 0.05, "steps": 2}
    learner = mf.MAML(model, **options)
    learner.prepare(tasks)
    program = learner.program
    _, enough = CudaExecutor(BlockLimits(1 << 20, 132, clusters=(1,))).shared_memory(program, tasks.shapes)
    found = mf.verify(model, tasks, backend=CudaExecutor(BlockLimits(enough, 132, clusters=(1,))), **options)
    assert found.passed, found.verdict
    assert found.executor == "cuda"
    assert any(layer.how.startswith("not run by itself: a task takes") for layer in found.layers)


FACTORY = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4))
"""


def test_the_command_writes_a_certificate(tmp_path: Any, capsys: Any) -> None:
    file, out = tmp_path / "mine.py", tmp_path / "certificate.json"
    file.write_text(FACTORY)
    options = ["--input-shape", "1,6,6", "--ways", 4, "--shots", 2, "--device", "cpu", "--json", out]
    code, text, _ = call(capsys, "verify", f"{file}:net", *options)
    assert code == 0
    assert "PASSED: mine:net on " in text
    written = json.loads(out.read_text())
    assert written["passed"]
    assert written["model"] == "mine:net"
    assert {"torch", "metafast", "commit", "date", "cpu"} <= set(written["machine"])
    assert [check["passed"] for check in written["checks"]] == [True] * 14
    assert [layer["name"] for layer in written["layers"]] == ["0", "1", "2", "3", "4", "loss"] * 2


def test_the_command_fails_on_a_wrong_rule(tmp_path: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchNorm, "tangent_forward", negated(BatchNorm.tangent_forward, lambda self: True, -1))
    file = tmp_path / "mine.py"
    file.write_text(FACTORY)
    options = ["--input-shape", "1,6,6", "--ways", 4, "--device", "cpu", "--backend", "reference"]
    code, text, _ = call(capsys, "verify", f"{file}:net", *options)
    assert code == 1
    assert "FAILED: mine:net on reference: wrong from layer '1' (batch_norm) on" in text


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["{}/none.py:net"], 2, "there is no Python file"),
        (["{}/mine.py"], 2, "give file.py:factory"),
        (["{}/mine.py:net", "--dtype", "half"], 2, "--dtype 'half'"),
        (["{}/mine.py:net", "--json", "{}/no/c.json"], 1, "there is no folder"),
        (["{}/mine.py:net", "--input-shape", "2,6,6", "--ways", "4"], 2, "--input-shape 2,6,6: the model of net() in"),
        (["{}/mine.py:net", "--input-shape", "1,6,6", "--ways", "4", "--adapt", "hed"], 2, "'hed' is no parameter"),
        (["{}/mine.py:net", "--input-shape", "1,6,6", "--ways", "4", "--backend", "cuda"], 1, "cannot run"),
    ],
)
def test_command_errors(tmp_path: Any, capsys: Any, options: list[str], code: int, text: str) -> None:
    (tmp_path / "mine.py").write_text(FACTORY)
    found, out, err = call(capsys, "verify", *(o.format(tmp_path) for o in options), "--device", "cpu")
    assert (found, out) == (code, "")
    assert text in err
