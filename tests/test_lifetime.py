"""Copies of learners and of adapted models, what they keep alive, and what keeps them alive."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from models import Scaled
from torch import nn

import metafast as mf
from metafast.executors import CpuExecutor, ReferenceExecutor, TritonExecutor
from metafast.executors.by_program import ByProgram
from metafast.program import Program


class Wave(nn.Module):
    """Has operations without rules, a buffer, a plain attribute, and a parameter that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.scale = nn.Linear(8, 8), nn.Linear(8, 3), 0.5
        self.spare = nn.Parameter(torch.ones(4))
        self.register_buffer("level", torch.tensor(2.0))

    def forward(self, x):
        return self.head(torch.sinh(self.body(x) * self.level).cumsum(-1) * self.scale)


def normed() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())
    model.add_module("head", nn.Linear(8, 3))
    return model


def batch(samples: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> mf.TaskBatch:
    generator = torch.Generator().manual_seed(seed)
    x, qx = (torch.randn(3, samples, 8, generator=generator, dtype=dtype) for _ in range(2))
    y = torch.arange(3 * samples).reshape(3, samples) % 3
    return mf.TaskBatch(x, y, qx, y)


def smoothed(outputs, targets):
    return F.cross_entropy(outputs, targets, label_smoothing=0.1)


COMMON = {"loss": "cross_entropy", "lr": 0.1, "steps": 2}
LEARNERS = {
    "MAML": lambda m: mf.MAML(m, **COMMON),
    "MAML by name": lambda m: mf.MAML(m, **COMMON, backend="reference"),
    "MAML by an executor": lambda m: mf.MAML(m, **COMMON, backend=ReferenceExecutor(max_tasks=2)),
    "MAML with learned losses": lambda m: mf.MAML(m, **{**COMMON, "loss": Scaled()}, query_loss=Scaled()),
    "FOMAML": lambda m: mf.FOMAML(m, **{**COMMON, "loss": smoothed}),
    "ANIL": lambda m: mf.ANIL(m, head="head", **{**COMMON, "lr": mf.Rate(0.1, "layer", learn=True)}),
    "Meta-SGD": lambda m: mf.MetaSGD(m, **COMMON),
    "MAML++": lambda m: mf.MAMLPlusPlus(m, **COMMON),
    "Reptile": lambda m: mf.Reptile(m, **COMMON, optimizer="adam", batch_size=4),
}


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "torch.save": saved}


def make(learner: str, model=normed):
    torch.manual_seed(1)
    return LEARNERS[learner](model().double())


def results(learner, tasks):
    learner.zero_grad()
    out = learner.backward(tasks)
    return [out.losses, out.outputs, *(p.grad.clone() for p in learner.parameters() if p.grad is not None)]


def same_bits(found, wanted):
    assert len(found) == len(wanted) > 3
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("model", [normed, Wave])
@pytest.mark.parametrize("name", LEARNERS)
def test_a_copy_computes_the_same_bits_and_is_its_own(name, model, way):
    learner, tasks = make(name, model), batch()
    for seen in (False, True):
        if seen:
            learner.backward(tasks)
        twin = COPIES[way](learner)
        assert twin.captures.model is twin.model is not learner.model
        assert not {map(id, learner.parameters())} & {map(id, twin.parameters())}
        assert [n for n, _ in twin.named_parameters()] == [n for n, _ in learner.named_parameters()]
        before = {key: value.clone() for key, value in learner.state_dict().items()}
        same_bits(results(twin, tasks), results(learner, tasks))
        learner.load_state_dict(before)  # batch norm's own statistics have moved
    twin.lr = 0.3
    twin.loss = "mse"
    with torch.no_grad():
        for p in twin.model.parameters():
            p.mul_(0.5)
    assert learner.loss.kind != "mse"
    fresh = make(name, model)
    fresh.load_state_dict(before)
    same_bits(results(learner, tasks), results(fresh, tasks))


@pytest.mark.parametrize("name", LEARNERS)
def test_a_shallow_copy_shares_parameters_and_has_settings_of_its_own(name):
    learner, tasks = make(name, Wave), batch()
    wanted = results(learner, tasks)
    twin = copy.copy(learner)
    assert all(map(lambda a, b: a is b, learner.parameters(), twin.parameters()))
    same_bits(results(twin, tasks), wanted)
    twin.loss = F.cross_entropy if name == "FOMAML" else smoothed
    assert not torch.equal(results(twin, tasks)[0], wanted[0])
    same_bits(results(learner, tasks), wanted)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("model", [normed, Wave])
@pytest.mark.parametrize("name", LEARNERS)
def test_adapted_models_can_be_copied_and_stay_what_they_are(name, model, way):
    learner, tasks = make(name, model), batch()
    fast = learner.adapt(tasks.support_x, tasks.support_y)
    wanted = fast(tasks.query_x)
    twin = COPIES[way](fast)
    learner.loss, learner.lr = smoothed, 0.7
    for p in learner.parameters():
        p.data.mul_(0.5)
    for adapted in (fast, twin, COPIES[way](twin)):
        assert torch.equal(adapted(tasks.query_x), wanted)
    if model is Wave:
        for adapted in (fast, twin):  # another number of samples
            assert torch.equal(adapted(tasks.query_x[:, :4]), wanted[:, :4])
    assert all(map(torch.equal, twin.state_dict(1).values(), fast.state_dict(1).values()))


def test_settings_survive_a_copy():
    learner = make("MAML++")
    learner.at_epoch(3)
    learner.multi_step_epochs = 7
    for way in COPIES.values():
        twin = way(learner)
        assert (twin.steps, twin.bn, twin.step_weights) == (2, "per_step", learner.step_weights)
        assert twin.multi_step_epochs == 7
        with pytest.raises(AttributeError, match=r"did you mean learner\.steps"):
            twin.stepz = 3
        twin.multi_step_epochs = 9
        assert twin.step_weights == [0.0, *mf.multi_step_weights(3, 2, 9)]


@pytest.mark.parametrize("way", COPIES)
def test_modes_of_single_batch_norms_survive_a_copy(way):
    learner = make("MAML")
    learner.bn = {"": "task"}
    found = learner(batch()).losses
    twin = COPIES[way](learner)
    assert twin.bn == {"": "task"}
    assert torch.equal(twin(batch()).losses, found)


def test_executors_can_be_copied():
    for executor in (CpuExecutor(budget=7), ReferenceExecutor(max_tasks=2), TritonExecutor("float32", True, budget=5)):
        for way in COPIES.values():
            twin = way(executor)
            assert type(twin) is type(executor)
            assert (twin.budget, twin.precision) == (executor.budget, executor.precision)


def table(executor: CpuExecutor, program: Program) -> int:
    """How many descriptions of one Program the native executor keeps."""
    return len(executor._models._kept._known[program])


@pytest.mark.parametrize("model", [normed, Wave])
def test_nothing_keeps_a_batch_or_a_learner_alive(model):
    """Without the garbage collector: nothing waits for it but what capturing the module took."""
    learner, gone = make("MAML", model), []
    gc.collect()
    gc.disable()
    try:
        for samples in range(2, 9):
            tasks = batch(samples)
            out = learner.backward(tasks)
            graph = learner(tasks)
            fast = learner.adapt(tasks.support_x, tasks.support_y)
            outputs = fast(tasks.query_x)
            tensors = [tasks.support_x, tasks.support_y, tasks.query_x, out.outputs, graph.losses, outputs]
            gone += map(weakref.ref, [*tensors, fast, fast.parameters])
            del tasks, out, graph, fast, outputs, tensors
        assert not [ref for ref in gone if ref() is not None]
        program, captured, module = (weakref.ref(o) for o in (learner.program, learner.captures, learner.model))
        own = weakref.ref(learner)
        del learner
        assert own() is captured() is program() is None
        gc.collect()
        assert module() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "backend", ["cpu", "reference", TritonExecutor(interpreted=True)], ids=["cpu", "reference", "triton"]
)
def test_executors_let_programs_go(backend):
    torch.manual_seed(1)
    own = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    learner = mf.MAML(own, **COMMON, backend=backend)
    learner.backward(batch(dtype=torch.float32))
    program, loss = weakref.ref(learner.program), weakref.ref(own[0])
    del learner, own
    gc.collect()
    assert program() is loss() is None


def test_what_is_kept_of_many_kinds_of_batches_is_bounded():
    learner, executor = mf.MAML(nn.Linear(8, 3).double(), **COMMON), CpuExecutor()
    learner.backend = executor
    counts = []
    for samples in range(1, 131):
        learner.backward(batch(samples))
        counts.append((len(learner._known), len(learner.captures.recordings), len(learner.captures.programs)))
    assert max(counts) == counts[-1] <= (64, 64, 256)
    assert len(executor._models._kept._known) <= 1
    images = mf.MAML(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)), **COMMON, backend=executor)
    y = torch.tensor([[0, 1, 2]])
    for side in range(1, 80):
        x = torch.randn(1, 3, 2, side, 2)
        images.backward(mf.TaskBatch(x, y, x, y))
    assert sum(len(kept) for kept in executor._models._kept._known.values()) <= 130


def test_findings_go_with_their_program_and_the_oldest_goes_first():
    learner = make("MAML", lambda: nn.Linear(8, 3))
    learner.backward(batch())
    kept: ByProgram[int] = ByProgram()
    calls = []

    def find(program, number):
        calls.append(number)
        return number

    for number in (*range(65), 64, 1, 0):
        assert kept.of(learner.program, number, find) == number
    assert calls == [*range(65), 0]
    del learner
    gc.collect()
    assert not len(kept._known)
