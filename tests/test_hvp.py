"""``Executor.hvp``: the Hessian of each task's loss times a direction, by every executor, against the oracle."""

from __future__ import annotations

import models
import pytest
import torch
from loops import plan, refusal
from setups import SETUPS, images, make_learner, make_oracle, make_tasks
from test_meta_gradients import close

from metafast.executors import BlockLimits, CpuExecutor, CudaExecutor, Executor, ReferenceExecutor

# Where it takes the default of the base class, two terms of one size are subtracted: a digit is lost.
EXECUTORS = {
    "reference": (ReferenceExecutor(), 1e-9),
    "cpu": (CpuExecutor(), 1e-9),
    "twin": (CudaExecutor(BlockLimits(232448, 132)), 1e-8),
}


def of_oracle(learner, tasks, u):
    oracle, _, _ = make_oracle(learner)
    names = [p.name for p in learner.program.parameters]
    products = []
    for t, along in enumerate(u):
        direction = dict(zip(names, learner.program.unflatten(along), strict=True))
        counted = slice(None) if tasks.support_mask is None else tasks.support_mask[t]
        product = oracle.hessian_vector(tasks.support_x[t][counted], tasks.support_y[t][counted], direction)
        products.append(torch.cat([product[name].flatten() for name in names]))
    return torch.stack(products)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_every_executor(setup, name):
    executor, tolerance = EXECUTORS[name]
    learner, tasks = make_learner(setup), make_tasks(setup).to(torch.float64)
    if name != "reference" and refusal(executor, learner.program, tasks):
        pytest.skip("it does not run this model")
    program, theta = learner.program, learner.flat_parameters().detach()
    u = torch.randn(len(tasks), program.size, dtype=torch.float64)
    runs = plan(executor, program, tasks).executor
    found = runs.hvp(program, theta, tasks.support, u)
    close(found, of_oracle(learner, tasks, u * program.adapted), tolerance)  # no column is that of a fixed parameter
    close(runs.hvp(program, theta, tasks.support, u[0])[0], found[0], tolerance)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_default_is_exact_for_curvatures_of_any_size(scale):
    setup = SETUPS[1]
    learner, tasks = make_learner(setup, torch.float32), make_tasks(setup)
    program, theta = learner.program, learner.flat_parameters().detach()
    program = program.with_loss(type("Scaled", (type(program.loss),), {
        name: (lambda rule: lambda self, *args: scale * rule(self, *args))(getattr(type(program.loss), name))
        for name in ("forward", "backward", "tangent_backward")
    })())  # fmt: skip
    u, reference = torch.randn(program.size), ReferenceExecutor()
    found = Executor.hvp(reference, program, theta, tasks.support, u)
    close(found, reference.hvp(program, theta, tasks.support, u), 1e-5)


def test_a_loss_without_curvature_in_outputs_that_are_linear_has_none():
    learner = make_learner(SETUPS[0], torch.float32)
    tasks = make_tasks(SETUPS[0])
    program = learner.program
    found = Executor.hvp(ReferenceExecutor(), program, learner.flat_parameters().detach(), tasks.support,
                         torch.zeros(program.size))  # fmt: skip
    assert not found.isnan().any()
    assert not found.any()


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_step_that_a_pass_belongs_to(name):
    """Batch norm per step: each step has its own row of parameters."""
    setup = images("per step", models.convnet, bn="per_step", steps=2)
    learner, tasks = make_learner(setup), make_tasks(setup).to(torch.float64)
    program, theta = learner.program, learner.flat_parameters().detach()
    u, executor = torch.randn(program.size, dtype=torch.float64), EXECUTORS[name][0]
    by_step = [executor.hvp(program, theta, tasks.support, u, step) for step in (0, 1)]
    close(Executor.hvp(executor, program, theta, tasks.support, u, 1), by_step[1], 1e-8)
    assert float((by_step[0] - by_step[1]).norm()) > 1e-3 * float(by_step[0].norm())
