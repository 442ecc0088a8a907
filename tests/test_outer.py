"""The outer step as something that can be recorded: what a CUDA graph would do with it, on the CPU."""

from __future__ import annotations

import json

import pytest
import torch
from loops import plan
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metafast.episodes import ClassificationSampler, ImageDataset, SinusoidSampler
from metafast.executors import BlockLimits, CudaExecutor, ReferenceExecutor, TritonExecutor
from metafast.executors.native import cpu
from metafast.kernels.cross_entropy import CrossEntropy
from metafast.program.losses import as_loss
from metafast.training import checkpoint
from metafast.training.build import build_learner, build_model
from metafast.training.data import open_episodes
from metafast.training.outer_step import WINDOW, OuterStep, graph_obstacle, record_graph
from metafast.training.recipes import recipe

READS = ("_local_scalar_dense", "nonzero", "equal", "lift_fresh")


class Tape(TorchDispatchMode):
    """Does with operators what a CUDA graph does with kernels: they are noted and not done, their numbers and addresses
    stay those of the recording, and none may read a value on the host."""

    def __init__(self, run):
        super().__init__()
        self.noted, overwritten = [], []
        self.overwritten = overwritten
        with self:
            self.result = run()
        with torch.no_grad():
            for tensor, value in reversed(overwritten):
                tensor.copy_(value)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name, kwargs = operator.overloadpacket.__name__, kwargs or {}
        assert name not in READS, f"{name} reads a value on the host"
        given = zip(operator._schema.arguments, args, strict=False)
        for tensor in tree_leaves([value for a, value in given if a.alias_info and a.alias_info.is_write]):
            self.overwritten.append((tensor, tensor.clone()))
        result = operator(*args, **kwargs)
        self.noted.append((operator, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self):
        for operator, args, kwargs, noted in self.noted:
            if not any(r.alias_info and not r.alias_info.is_write for r in operator._schema.returns):  # not a view
                result = operator(*args, **kwargs)
                for place, value in zip(tree_leaves(noted), tree_leaves(result), strict=True):
                    if isinstance(place, torch.Tensor) and place is not value:
                        place.copy_(value)


def tape(run, device):
    assert device == torch.device("cpu")
    return Tape(run).replay


def outer_step(chosen, backend="auto", recorder=None, device="cpu", sampler=None):
    learner = build_learner(chosen, build_model(chosen, seed=0).to(device), backend)
    return OuterStep(chosen, learner, sampler or open_episodes(chosen, None, 0, device).train, recorder)


def state(outer):
    moments = outer.optimizer.state_dict()["state"].values()
    return [*outer.learner.state_dict().values(), *(m[k] for m in moments for k in sorted(m)), outer.window]


RECIPES = {
    "maml": recipe("sinusoid", tasks=3, iterations=60, schedule="cosine", clip=0.05),
    "metasgd": recipe("sinusoid", "metasgd", tasks=3, steps=2),
    "anil": recipe("sinusoid", "anil", tasks=3),
    "reptile": recipe("sinusoid", "reptile", iterations=60),
    "maml++, weights that change every 12 iterations": recipe("sinusoid", "maml++", tasks=3, iterations=1200),
    "maml++, weights that change, then stay": recipe("sinusoid", "maml++", tasks=3, iterations=60),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("chosen", RECIPES.values(), ids=RECIPES)
def test_a_recorded_step_gives_the_same_bits(chosen, backend):
    plain, recorded = outer_step(chosen, backend), outer_step(chosen, backend, tape)
    for iteration in range(40):
        plain(iteration)
        recorded(iteration)
        if iteration % 8 == 7:
            assert all(torch.equal(a, b) for a, b in zip(state(plain), state(recorded), strict=True))
    assert plain.window.count_nonzero(0)[0] == WINDOW


def test_a_recorded_step_classifies_to_the_same_bits(monkeypatch):
    # Labels are looked at in every batch on the CPU, in the first on a GPU.
    monkeypatch.setattr(CrossEntropy, "check", lambda *_: None)
    monkeypatch.setattr(cpu, "has_rules", lambda *_: True)
    chosen = recipe("glyphs-5w1s", tasks=2, channels=4, clip=0.01)
    plain, recorded = outer_step(chosen), outer_step(chosen, recorder=tape)
    for iteration in range(4):
        plain(iteration)
        recorded(iteration)
    assert all(torch.equal(a, b) for a, b in zip(state(plain), state(recorded), strict=True))
    assert 0 < plain.window[:4, 1].mean() < 1


@pytest.mark.parametrize(
    ("name", "plain"),
    [("maml", [0]), ("reptile", [0]), ("maml++, weights that change every 12 iterations", [0, 12])],
)
def test_an_iteration_runs_as_it_is_under_new_weights_and_each_runs_once(name, plain):
    seen = []

    def recorder(run, device):
        seen.append("recorded")
        return lambda: (seen.append("replayed"), run())

    outer = outer_step(RECIPES[name], recorder=recorder)
    batch = outer.sampler.batch
    outer.sampler.batch = lambda step: (seen.append(int(step)), batch(step))[1]
    for iteration in range(15):
        outer(iteration)
    expected = []
    for iteration in range(15):
        expected += ["recorded"] if iteration - 1 in plain else []
        expected += [iteration] if iteration in plain else ["replayed", iteration]
    assert seen == expected


PIXELS = torch.arange(7 * 6 * 25).remainder(251).to(torch.uint8).view(7, 6, 1, 5, 5)


@pytest.mark.parametrize(
    "sampler",
    [
        SinusoidSampler(5, 3, 4),
        ClassificationSampler(ImageDataset(PIXELS, tuple("abcdefg")), 3, 2, 1, 4),
        ClassificationSampler(ImageDataset(PIXELS, tuple("abcdefg"), torch.tensor([6, 3, 5, 4, 3, 6, 6])), 3, 2, 1, 4),
    ],
    ids=["sinusoids", "images", "classes of different sizes"],
)
def test_recorded_tasks_are_those_of_the_step(sampler):
    step = torch.tensor(3)
    recorded = Tape(lambda: sampler.batch(step))
    for now in (0, 8, 2**40):
        step.fill_(now)
        recorded.replay()
        found, expected = recorded.result, sampler.batch(now)
        for part in ("support_x", "support_y", "query_x", "query_y"):
            assert torch.equal(getattr(found, part), getattr(expected, part))


def test_the_rate_of_the_schedule_reaches_the_optimiser():
    chosen = recipe("sinusoid", "reptile", iterations=60, tasks=3)
    outer = outer_step(chosen, recorder=tape)
    for iteration in (0, 1, 30, 59):
        outer(iteration)
        assert float(outer.optimizer.param_groups[0]["lr"]) == chosen.lr_at(iteration)


def test_an_optimiser_on_another_device_keeps_its_own_settings():
    chosen = recipe("sinusoid")
    learner = build_learner(chosen, build_model(chosen, seed=0), "auto")
    parameters = list(learner.parameters())
    first, settings = learner.outer_optimizer(chosen.lr), {"fused": False, "capturable": False, "lr": 0.5}
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    first.step()
    tensors, description = checkpoint.pack_optimizer(first)
    second = torch.optim.Adam(parameters, **settings)
    checkpoint.unpack_optimizer(second, tensors, json.loads(json.dumps(description)))
    assert {k: second.param_groups[0][k] for k in settings} == settings
    assert torch.equal(second.state_dict()["state"][0]["exp_avg"], first.state_dict()["state"][0]["exp_avg"])
    assert float(second.state_dict()["state"][0]["step"]) == 1


def test_why_a_step_is_not_recorded():
    outer = outer_step(RECIPES["maml"])
    tasks = outer.sampler.batch(0)
    assert graph_obstacle(outer.learner, tasks) == "device cpu has no CUDA graphs"
    outer.learner.prepare(tasks)
    program = outer.learner.program
    twin, triton = CudaExecutor(BlockLimits(232448, 132)), TritonExecutor(interpreted=True)

    def obstacle(executor, program=program):
        return plan(executor, program, tasks).graph_obstacle

    assert obstacle(ReferenceExecutor()) == "executor 'reference' may wait for the host"
    assert obstacle(twin) is None
    assert obstacle(triton) is None
    derived = obstacle(triton, program.with_loss(as_loss(torch.nn.functional.huber_loss)))
    assert derived == "loss: a function of PyTorch's or the user's that may read values"


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA would record it")
def test_a_refused_recording_says_how_to_go_on():
    with pytest.raises(RuntimeError, match=r"(?s)recorded as a CUDA graph \(.*\); --no-graph trains without"):
        record_graph(lambda: None, torch.device("cuda", 0))
