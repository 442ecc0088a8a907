"""Inner loops by rules in thread blocks, by the twin: against the reference executor, in watched memory."""

from __future__ import annotations

import pytest
import torch
from native_work import RULES, assert_close, assert_same, work
from test_cuda_twin import A100, H100, TWINS, WideNormed, classifier
from test_native import close

import metafast as mf
from metafast.executors import ReferenceExecutor, steps
from metafast.executors.native.cuda import BlockLimits, CudaExecutor
from metafast.program.inner_loop import InnerLoop

pytest.importorskip("metafast._C")

NORMED = WideNormed, (6,)
SOME = ("nesterov", "both clips", "adam, clips")


@pytest.fixture(params=TWINS, ids=str)
def twin(request):
    return CudaExecutor(TWINS[request.param])


@pytest.fixture
def _fused(monkeypatch):
    """Nothing may take a launch for each gradient."""

    def never(*args):
        raise AssertionError("the steps are taken one by one")

    for name in ("adapt", "adapt_vjp"):
        monkeypatch.setattr(steps, name, never)


def check(twin, given, tolerance=1e-9):
    found = given.meta_gradient(twin)
    assert_close(found, given.meta_gradient(ReferenceExecutor()), tolerance)
    assert_same(found, given.meta_gradient(twin))


@pytest.mark.usefixtures("_fused")
@pytest.mark.parametrize("name", RULES)
def test_one_launch(name, twin):
    check(twin, work(RULES[name], width="step", weights=[0.2, 0.3, 0.0, 0.5]))


@pytest.mark.usefixtures("_fused")
@pytest.mark.parametrize("options", [{"first_order": True}, {"learns_rates": False}, {"truncate": 2},
                                     {"each_step": True}, {"adapt": ["0.weight", "4.bias"]}], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", SOME)
def test_what_else_a_loop_says(name, options, twin):
    check(twin, work(RULES[name], steps=4, **options))


@pytest.mark.usefixtures("_fused")
@pytest.mark.parametrize(("name", "memory"), [("nesterov", 20_000), ("adam, clips", 30_000)])
def test_segments(name, memory, twin):
    check(twin, work(RULES[name], steps=9, memory=memory))


@pytest.mark.usefixtures("_fused")
@pytest.mark.parametrize("width", ["number", "step"])
def test_plain_steps_with_samples_of_their_own(width, twin):
    check(twin, work(None, width=width, each_step=True))


@pytest.mark.usefixtures("_fused")
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("name", SOME)
def test_blocks_that_share_a_task(name, size):
    """Some have few columns of a weight or none, and all have the same layer norm, which counts once in a norm."""
    check(CudaExecutor(BlockLimits(H100, 132, clusters=(size,))), work(RULES[name], NORMED, steps=2))


@pytest.mark.usefixtures("_fused")
@pytest.mark.parametrize("machine", [BlockLimits(A100, 2), BlockLimits(H100, 7, clusters=(2,))], ids=str)
def test_tasks_that_take_turns(machine):
    check(CudaExecutor(machine), work(RULES["adam, clips"], tasks=40, width="step"))


@pytest.mark.usefixtures("_fused")
@pytest.mark.parametrize("name", ["momentum", "adam, clips"])
def test_float32(name, twin):
    given = work(RULES[name], dtype=torch.float32)
    found, wanted = given.meta_gradient(twin), given.meta_gradient(ReferenceExecutor())
    close(found.grads[0], wanted.grads[0], 1e-4)
    close(found.losses, wanted.losses, 1e-5)


@pytest.mark.usefixtures("_fused")
@pytest.mark.parametrize("name", [*SOME, "rmsprop, all"])
def test_parts_go_on_from_a_state(name, twin):
    """From a state of each task, at a later step, with an adjoint of the last ``z`` or of each."""
    given = work(RULES[name], width="step", steps=5)
    loop, reference, tasks = given.loop.part(2, 5), ReferenceExecutor(), len(given.tasks)
    z = torch.rand(tasks, (1 + loop.states) * given.program.size, dtype=torch.float64) / 5
    arguments = given.program, loop
    found, wanted = (e.adapt(*arguments, z, given.rates, given.tasks.support) for e in (twin, reference))
    close(found, wanted, 1e-11)
    for v in (torch.randn_like(z), torch.randn_like(wanted)):
        rest = wanted, given.rates, given.tasks.support, v
        for f, w in zip(*(e.adapt_vjp(*arguments, *rest) for e in (twin, reference)), strict=True):
            close(f, w, 1e-9)


def test_a_product_with_a_hessian_is_one_launch(twin):
    given = work(None, (classifier, (6,)), adapt={"0.weight", "4.bias"})
    theta, u = torch.randn(2, 2, given.program.size, dtype=torch.float64)
    arguments = given.program, theta, given.tasks.support, u, 3
    found, wanted = (e.hvp(*arguments) for e in (twin, ReferenceExecutor()))
    close(found, wanted, 1e-11)
    close(twin.hvp(*arguments[:3], u[0]), ReferenceExecutor().hvp(*arguments[:3], u[0]), 1e-11)


class Own(mf.Rule):
    """A step that C++ does not know."""

    states = ("trace",)

    def step(self, theta, gradient, state, hyper, count):
        return theta - hyper["lr"] * torch.tanh(gradient + state[0]), (gradient,)

    def __repr__(self):
        return "Own()"


@pytest.mark.parametrize(("rule", "width"), [(mf.Adam(eps=1e-2), "parameter"), (mf.Adam(amsgrad=True), "number"),
                                             (Own(), "step"), (None, "parameter")], ids=str)  # fmt: skip
def test_other_steps_are_taken_one_by_one(rule, width):
    twin = CudaExecutor(TWINS["all steps in a block's memory"])
    check(twin, work(rule, width=width, each_step=rule is None))


def test_a_state_that_does_not_fit_leaves_the_block():
    given = work(RULES["adam"], dtype=torch.float32)
    needed = CudaExecutor(BlockLimits(H100, 132)).shared_memory(given.program, given.tasks.shapes)[1]
    twin = CudaExecutor(BlockLimits(needed, 132, clusters=(1,)))
    assert twin.plan(given.program, given.loop, given.tasks.shapes) is not None
    found, wanted = given.meta_gradient(twin), given.meta_gradient(ReferenceExecutor())
    close(found.grads[0], wanted.grads[0], 1e-4)


def test_what_a_cuda_graph_can_hold():
    given, twin = work(None), CudaExecutor(TWINS["all steps in a block's memory"])
    for rule in (None, *RULES.values(), mf.Adam(amsgrad=True)):
        loop = InnerLoop.judged_last(2, rule=rule)
        assert twin.plan(given.program, loop, given.tasks.shapes).graph_obstacle is None
    plan = twin.plan(given.program, InnerLoop.judged_last(2, rule=Own()), given.tasks.shapes)
    assert "a rule of the user's" in plan.graph_obstacle
    assert "a launch for each gradient" in plan.layers()[0]
