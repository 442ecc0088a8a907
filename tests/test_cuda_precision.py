"""Products of the CUDA executor on tensor cores, as its twin emulates them: rounded as they are told to be, and no
otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from block_checks import check_precisions
from loops import layers, refusal
from setups import Setup, make_learner, make_tasks, rate
from test_cuda_twin import H100, NORMED, OWN, parts
from test_meta_gradients import check_against_oracle
from torch import nn

from metafast import executors
from metafast.executors.native.cuda import PRECISIONS, BlockLimits, CudaExecutor
from metafast.tasks import Batch

pytest.importorskip("metafast._C")

BITS = {"tf32": 11, "bf16": 8}  # of the significand


def twin(clusters=(1,), precision="float32"):
    return CudaExecutor(BlockLimits(H100, 132, clusters=clusters), precision=precision)


def rounded(x, bits):
    """In float64; ties, which random numbers do not have, aside."""
    fraction, exponent = torch.frexp(x.double())
    return torch.ldexp((fraction * 2**bits).round() / 2**bits, exponent)


def linear():
    return nn.Sequential(nn.Linear(21, 61), nn.Linear(61, 59))


def gradient_of_rounded(learner, batch, bits):
    """Outputs and gradient of the mean squared error, with every operand of a product rounded."""
    w, b, v, c = (p.detach().double() for p in learner.model.parameters())
    products = []
    for x, y in zip(batch.x.double(), batch.y.double(), strict=True):
        hidden = rounded(x, bits) @ rounded(w, bits).T + b
        out = rounded(hidden, bits) @ rounded(v, bits).T + c
        g = 2 * (out - y) / y.numel()
        g_hidden = rounded(g, bits) @ rounded(v, bits)
        weights = rounded(g_hidden, bits).T @ rounded(x, bits), rounded(g, bits).T @ rounded(hidden, bits)
        grad = (weights[0].flatten(), g_hidden.sum(0), weights[1].flatten(), g.sum(0))
        products.append((out, torch.cat(grad)))
    return [torch.stack(found) for found in zip(*products, strict=True)]


def check_rounding(executor, precision, device="cpu"):
    """Of 13 samples, whose tiles no dimension fills."""
    setup = Setup("linear", linear, (21,), outputs=59, support=13)
    learner, support = make_learner(setup, torch.float32), make_tasks(setup).support
    batch = Batch(support.x.to(device), support.y.to(device))
    params = learner.flat_parameters().detach().to(device)
    _, grad, outputs = executor.with_precision(precision).loss_and_grad(learner.program, params, batch)
    for found, rough, exact in zip(
        (outputs, grad), gradient_of_rounded(learner, support, BITS[precision]),
        gradient_of_rounded(learner, support, 50), strict=True,
    ):  # fmt: skip
        assert float((found.cpu() - rough).norm()) <= 3e-5 * float(rough.norm())
        assert float((exact - rough).norm()) >= 2e-4 * float(rough.norm())


@pytest.mark.parametrize("clusters", [(1,), (2,)], ids=str)
@pytest.mark.parametrize("precision", BITS)
def test_operands_are_rounded(precision, clusters):
    check_rounding(twin(clusters), precision)


FILLED = [
    replace(OWN[0], support=16),
    *(replace(s, support=16) for s in NORMED),
    Setup("classifier", lambda: nn.Sequential(nn.Linear(30, 48), nn.Tanh(), nn.Linear(48, 20)), (30,), 20, support=16,
          options={"steps": 3, "lr": rate("parameter"), "step_weights": [0.5, 0, 0.5]}),
]  # fmt: skip


@pytest.mark.parametrize("clusters", [(1,), (2,), (8,)], ids=str)
@pytest.mark.parametrize("setup", FILLED, ids=str)
def test_three_products_are_as_exact_as_float32(setup, clusters, monkeypatch):
    executor = twin(clusters)
    check_precisions(executor, setup, "cpu", 1e-4)
    monkeypatch.setattr(executors, "_EXECUTORS", [executor])
    setup = replace(setup, options={**setup.options, "precision": "tf32x3"})
    check_against_oracle(make_learner(setup, torch.float32, executor.name), make_tasks(setup, query=12), 1e-4)


def test_an_executor_that_is_given_keeps_its_precision():
    setup = FILLED[0]
    learner, tasks = make_learner(setup, torch.float32, twin(precision="bf16")), make_tasks(setup)
    learner.backward(tasks)
    rounded = [p.grad for p in learner.model.parameters()]
    expected = parts(learner.backend, learner, tasks)[2]
    assert torch.equal(torch.cat([g.flatten() for g in rounded]), expected)
    assert not torch.equal(expected, parts(twin(), learner, tasks)[2])


def test_layers_that_leave_tiles_half_empty_stay_exact():
    learner, tasks = make_learner(OWN[1], torch.float32), make_tasks(OWN[1])
    for a, b in zip(parts(twin(), learner, tasks), parts(twin(precision="bf16"), learner, tasks), strict=True):
        assert torch.equal(a, b)


def test_precision_is_asked_for_by_name():
    executor = twin()
    learner, tasks = make_learner(OWN[0]), make_tasks(OWN[0])
    assert executor.with_precision("float32") is executor
    assert [executor.with_precision(p).with_precision("tf32").precision for p in PRECISIONS] == ["tf32"] * 4
    assert refusal(executor, learner.program, tasks, precision="float16") == "it has no precision 'float16'"
    with pytest.raises(ValueError, match="precision='float16' is unknown; choose from \\['float32', 'tf32x3'"):
        twin(precision="float16")
    in_double = tasks.support_x.double()
    assert refusal(executor.with_precision("bf16"), learner.program, in_double) == (
        "dtype torch.float64: precision='bf16' is of float32"
    )
    assert refusal(executor.with_precision("tf32"), learner.program, tasks.support_x) is None
    notes = layers(executor.with_precision("tf32"), learner.program, tasks.support_x)
    assert notes[0].endswith("; operands of products rounded to 11 bits, on tensor cores where they are filled")
    with pytest.raises(ValueError, match="tensor cores take float32"):
        parts(executor.with_precision("tf32"), learner, tasks.to(torch.float64))
