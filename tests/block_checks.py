"""What the CUDA executor must show on a GPU and, on the CPU, its twin: each check takes the executor and the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from loops import adapt, adapt_vjp, loop, meta_gradient
from setups import make_learner, make_oracle, make_tasks
from test_meta_gradients import assert_gradients, close
from torch import Tensor

import metafast as mf
from metafast.executors import ReferenceExecutor
from metafast.executors.native.cuda import Launch


@dataclass(frozen=True)
class Case:
    """A learner's program with the arguments of a meta-gradient, on the CPU."""

    program: mf.program.Program
    params: Tensor
    lr: Tensor
    tasks: mf.TaskBatch
    steps: int
    options: dict

    def run(self, executor, device="cpu", copies=1, **options):
        tasks = repeated(self.tasks, copies).to(device)
        arguments = self.program, self.params.to(device), self.lr.to(device), tasks, self.steps
        return meta_gradient(executor, *arguments, **self.options, **options)

    def launch(self, executor, device, copies, learns_rates=True) -> Launch:
        first_order = self.options["first_order"]
        how = loop(self.steps, first_order=first_order, learns_rates=learns_rates)
        return executor.launch(self.program, how, repeated(self.tasks.to(device), copies).shapes)


def repeated(tasks, copies):
    """The batch several times over: the gradient of the mean loss stays what it is."""
    parts = (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)
    return mf.TaskBatch(*(part.repeat(copies, *[1] * (part.dim() - 1)) for part in parts))


def case_of(setup, executor, dtype, at_start=0.0, **tasks):
    """``at_start``: the weight of the query loss before the first step."""
    learner = make_learner(setup, dtype, ReferenceExecutor())
    weights = [at_start, *learner.step_weights[1:]]
    options = {"step_weights": weights, "first_order": learner.first_order}
    params, lr = learner.flat_parameters().detach(), learner.rate().detach()
    case = Case(learner.program, params, lr, make_tasks(setup, **tasks).to(dtype), learner.steps, options)
    return learner, case


def truth_of(learner, case):
    """The oracle's losses and outputs, and its gradients by name; ``rate`` is that of ``lr`` as executors take it."""
    oracle, _, _ = make_oracle(learner)
    leaf = case.lr.double().requires_grad_()
    rates = {}
    for p in case.program.parameters:
        rows = leaf if leaf.shape[1] == 1 else leaf[:, p.offset : p.offset + p.size]
        rates[p.name] = rows.expand(case.steps, p.size).reshape(case.steps, *p.shape)
    losses, outputs = oracle.losses(case.tasks, rates)
    if weight := case.options["step_weights"][0]:
        start = [
            oracle.support_loss(oracle.parameters, x.double(), y.double() if y.is_floating_point() else y)
            for x, y in zip(case.tasks.query_x, case.tasks.query_y, strict=True)
        ]
        losses = losses + weight * torch.stack(start)
    leaves = {**{p.name: oracle.parameters[p.name] for p in case.program.parameters}, "rate": leaf}
    grads = torch.autograd.grad(losses.mean(), list(leaves.values()), materialize_grads=True)
    return losses.detach(), torch.stack(outputs), dict(zip(leaves, grads, strict=True))


def check_one_launch(executor, setup, device, dtype, tolerance, learns_rates=True, copies=1, at_start=0.0, **tasks):
    """A meta-gradient in one launch against the oracle, and twice to the same bits. Returns how it was launched."""
    learner, case = case_of(setup, executor, dtype, at_start, **tasks)
    losses, outputs, grads = truth_of(learner, case)
    found, again = (case.run(executor, device, copies, learns_rates=learns_rates) for _ in range(2))
    close(found.losses.cpu(), losses.repeat(copies), tolerance)
    close(found.outputs.cpu(), outputs.repeat(copies, *[1] * (outputs.dim() - 1)), tolerance)
    names = [p.name for p in case.program.parameters]
    named = dict(zip(names, case.program.unflatten(found.grad.cpu()), strict=True))
    assert (found.rates_grad is None) == (not learns_rates)
    if found.rates_grad is not None:
        named["rate"] = found.rates_grad.cpu()
    assert_gradients(named, grads, tolerance)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, again, strict=True))
    return case.launch(executor, device, copies, learns_rates)


def check_tasks_that_take_turns(executor, setup, device, dtype, tolerance, learns_rates):
    """More tasks than all blocks of the device run side by side, their steps through global memory."""
    _, case = case_of(setup, executor, dtype)
    most = case.launch(executor, device, 2**16, learns_rates)
    copies = most.blocks // most.cluster // len(case.tasks) + 2
    launch = check_one_launch(executor, setup, device, dtype, tolerance, learns_rates, copies)
    assert launch.record > 0, "its steps should go through global memory"
    assert copies * len(case.tasks) * launch.cluster > launch.blocks, "each task should not have blocks of its own"
    assert launch.cluster == executor.limits(torch.device(device)).clusters[0]


def check_a_full_device(executor, setup, device, dtype, tolerance):
    """As many tasks as there are processors for, with all steps in shared memory."""
    _, case = case_of(setup, executor, dtype)
    machine = executor.limits(torch.device(device))
    copies = machine.processors // machine.clusters[0] // len(case.tasks)
    launch = check_one_launch(executor, setup, device, dtype, tolerance, copies=copies)
    assert launch.record == 0, "all its steps should stay in shared memory"
    assert launch.blocks == copies * len(case.tasks) * launch.cluster


def check_the_parts_alone(executor, setup, device, dtype, tolerance):
    """All but the meta-gradient, with parameters of each task, against the reference in float64."""
    _, case = case_of(setup, executor, dtype)
    reference, size, T = ReferenceExecutor(), case.program.size, len(case.tasks)
    params, rates, v = torch.randn(T, size) / 2, torch.rand(2, size) / 10, torch.randn(T, size)

    def run(executor, like):
        program, tasks = case.program, case.tasks.to(like.device).to(like.dtype)
        theta, lr, adjoint = (t.to(like) for t in (params, rates, v))
        trajectory = adapt(executor, program, theta, lr, tasks.support, 4)
        assert torch.equal(trajectory[0], theta)
        assert torch.equal(adapt(executor, program, theta, lr, tasks.support, 0), theta[None])
        return (
            executor.predict(program, theta, tasks.query_x), trajectory,
            *executor.loss_and_grad(program, theta, tasks.query),
            *adapt_vjp(executor, program, trajectory, lr, tasks.support, adjoint),
            *adapt_vjp(executor, program, trajectory, lr, tasks.support, adjoint.expand(5, -1, -1), first_order=True),
        )  # fmt: skip

    expected = run(reference, torch.empty(0, dtype=torch.float64))
    for found, truth in zip(run(executor, torch.empty(0, dtype=dtype, device=device)), expected, strict=True):
        close(found.cpu(), truth, tolerance)


def check_labels_outside(executor, setup, device, dtype):
    """A label that is no class makes its task NaN, and no other."""
    for part, label in (("query_y", 10**12), ("query_y", -1), ("support_y", setup.classes), ("support_y", -100)):
        _, case = case_of(setup, executor, dtype)
        getattr(case.tasks, part)[1, 0] = label
        found = case.run(executor, device)
        assert found.losses.isnan().tolist() == [False, True, False]
        assert found.outputs[[0, 2]].isfinite().all()
        assert found.grad.isnan().any()


def check_precisions(executor, setup, device, tolerance):
    """In one launch tf32x3 is as exact as float32, with room for how tensor cores round sums; tf32 and bf16 are used,
    and as rough as they are."""
    learner, case = case_of(setup, executor, torch.float32, query=12)
    truth = truth_of(learner, case)[1]
    exact, rough = (0, 5e-6), (1e-4, 2e-2)
    for precision, (least, most) in {"float32": exact, "tf32x3": exact, "tf32": rough, "bf16": rough}.items():
        outputs = case.run(executor.with_precision(precision), device).outputs.cpu().double()
        off = float((outputs - truth).norm() / truth.norm())
        assert least <= off < most, f"{precision}: outputs are off by {off:.1e}"
    check_one_launch(executor.with_precision("tf32x3"), setup, device, torch.float32, tolerance, query=12)
