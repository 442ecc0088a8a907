"""Tasks that are summed in one chunk: the first one's adjoint lies where the sum does, alone, in lanes and in teams."""

from __future__ import annotations

import pytest
import torch
from oracle import Oracle
from setups import rates_by_name
from torch import nn

import metafast as mf
from metafast.executors import CpuExecutor

pytestmark = pytest.mark.skipif(not CpuExecutor.isas(), reason="metafast is built without its extension")


@pytest.mark.parametrize("isa", CpuExecutor.isas())
@pytest.mark.parametrize("weights", [None, (0.3, 0.0, 0.7)], ids=["the last step", "weights of steps"])
@pytest.mark.parametrize("tasks", [1, 2, 16, 17, 64, 65, 129, 193])
def test_sums_of_chunks(tasks, weights, isa):
    torch.manual_seed(tasks)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    rate = mf.Rate((0.03, 0.07), ("layer", "step"), learn=True)
    executor = CpuExecutor(isa=isa)
    learner = mf.MAML(model, loss="mse", lr=rate, steps=3, step_weights=weights, backend=executor)
    sizes = ((4, 3), (4, 2), (3, 3), (3, 2))
    batch = mf.TaskBatch(*(torch.randn(tasks, n, width, dtype=torch.float64) for n, width in sizes))
    found = learner.backward(batch)
    oracle = Oracle(model, "mse", 3, weights=learner.step_weights[1:])
    leaf = learner.rate.value.detach().clone().requires_grad_()
    wanted = oracle.gradient(batch, rates_by_name(oracle, leaf, learner), rate=leaf)
    torch.testing.assert_close(found.losses, wanted.losses, rtol=1e-10, atol=1e-12)
    named = {**dict(model.named_parameters()), "rate": learner.rate.value}
    assert named.keys() == wanted.grads.keys()
    for name, grad in wanted.grads.items():
        torch.testing.assert_close(named[name].grad, grad, rtol=1e-9, atol=1e-12)
