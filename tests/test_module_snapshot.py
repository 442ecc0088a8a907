"""What a learner notices between two batches: everything that has been replaced, switched or written into."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import models
import pytest
import torch
from loops import loop, meta_gradient, plan
from setups import Setup, make_tasks
from torch import nn

import metafast as mf
from metafast.executors import CpuExecutor, Executor
from metafast.learners.module_snapshot import ModuleSnapshot

BACKENDS = ["cpu", "reference"]


def regression(seed=0):
    torch.manual_seed(seed)
    return make_tasks(Setup("", models.mlp, support=6), 3, 5).to(torch.float64)


def labelled():
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    return mf.TaskBatch(x, torch.randint(2, (2, 6)), x + 0.1, torch.randint(2, (2, 6)))


def maml(backend="cpu", lr=0.1, loss="mse", seed=1, **options):
    torch.manual_seed(seed)
    return mf.MAML(models.mlp().double(), loss=loss, lr=lr, steps=2, backend=backend, **options)


def gradient(learner, tasks):
    """Of all meta-parameters, from nothing."""
    for p in learner.parameters():
        p.grad = None
    learner.backward(tasks)
    return [p.grad.clone() for p in learner.parameters() if p.grad is not None]


def same(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def renamed(model):
    model._parameters["other"] = model._parameters.pop("bias")


CHANGES = {
    "a parameter is another one of the same value": lambda m: setattr(m[0], "bias", nn.Parameter(m[0].bias.detach())),
    "a parameter is gone": lambda m: delattr(m[0], "bias"),
    "a parameter is None": lambda m: setattr(m[0], "bias", None),
    "a parameter has come": lambda m: setattr(m[1], "gain", nn.Parameter(torch.ones(()))),
    "a parameter has another name": lambda m: renamed(m[0]),
    "a buffer is another one": lambda m: setattr(m[2], "running_mean", m[2].running_mean.clone()),
    "a buffer has come": lambda m: m[0].register_buffer("spare", None),
    "a module is another one": lambda m: setattr(m, "1", nn.Tanh()),
    "a module has come": lambda m: m.append(nn.Tanh()),
    "a module is gone": lambda m: m.pop(1),
    "one module has another mode": lambda m: m[2].eval(),
    "a parameter is no longer trained": lambda m: m[0].weight.requires_grad_(False),
    "the root has another mode": lambda m: setattr(m, "training", False),
    "a parameter is not trained any more": lambda m: m[0].weight.requires_grad_(False),
    "an attribute has another value": lambda m: setattr(m[2], "eps", 1e-3),
    "a list has another item": lambda m: m.widths.append(3),
    "an attribute has come": lambda m: setattr(m, "scale", 2.0),
    "a hook has come": lambda m: m[1].register_forward_hook(lambda module, args, output: -output),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_snapshot_notices(change):
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.BatchNorm1d(2))
    model.widths = [2, 2]
    snapshot = ModuleSnapshot(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert not snapshot.changed()
    change(model)
    assert snapshot.changed()


def test_a_snapshot_does_not_keep_its_owner():
    learner = maml()
    learner.backward(regression())
    gone = weakref.ref(learner)
    gc.disable()
    try:
        del learner
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))])
def test_a_copy_looks_at_its_own_module(copied):
    model = nn.Sequential(nn.Linear(3, 2), nn.LeakyReLU(0.1)).double()
    learner, tasks = mf.MAML(model, loss="mse", lr=0.1), regression()
    before = gradient(learner, tasks)
    other = copied(learner)
    same(gradient(other, tasks), before)
    other.model[1].negative_slope = 0.7
    after = gradient(other, tasks)
    assert not torch.allclose(after[0], before[0])
    same(gradient(learner, tasks), before)
    model[1].negative_slope = 0.7
    same(gradient(learner, tasks), after)


def test_zero_grad_clears_all_that_a_learner_has():
    model = models.convnet().double()
    learner = mf.MAMLPlusPlus(model, loss="mse", lr=0.1, steps=2)
    model[0].bias.requires_grad_(False)
    assert {name.partition(".")[0] for name, _ in learner.named_parameters()} == {"model", "rows", "rate"}

    def cleared(**options):
        for p in learner.parameters():
            p.grad = torch.ones_like(p)
        learner.zero_grad(**options)
        return [p.grad for p in learner.parameters()]

    assert not any(map(torch.is_tensor, cleared()))
    assert not any(map(torch.any, cleared(set_to_none=False)))
    learner.extra = nn.Linear(2, 2)
    model[0] = nn.Conv2d(2, 4, 3, padding=1).double()
    learner.rate.value = nn.Parameter(torch.ones_like(learner.rate.value))
    assert not any(map(torch.is_tensor, cleared()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_written_into_parameters_are_seen(backend):
    learner, tasks, other = maml(backend), regression(), maml(seed=5)
    before = gradient(learner, tasks)
    expected = gradient(other, tasks)
    assert not torch.allclose(before[0], expected[0])
    learner.load_state_dict(other.state_dict())
    same(gradient(learner, tasks), expected)
    for p, q in zip(learner.model.parameters(), maml().model.parameters(), strict=True):
        p.data = q.detach().clone()
    same(gradient(learner, tasks), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_in_any_memory_order(backend):
    learner, tasks = maml(backend), regression()
    expected = gradient(learner, tasks)
    weight = learner.model[2].weight
    weight.data = weight.detach().t().contiguous().t()
    assert not weight.is_contiguous()
    same(gradient(learner, tasks), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("learn", [False, True])
def test_a_rate_that_has_changed_is_seen(backend, learn):
    rate = mf.Rate(0.1, learn=learn)
    learner, tasks = maml(backend, lr=rate), regression()
    before = gradient(learner, tasks)
    expected = gradient(maml(lr=mf.Rate(0.3, learn=learn)), tasks)
    with torch.no_grad():
        learner.rate.value.fill_(0.3)
    same(gradient(learner, tasks), expected)
    first = torch.full((1, 1), 0.1, dtype=torch.float64)
    program = learner.program
    learner.rate.value = nn.Parameter(first) if learn else first
    same(gradient(learner, tasks), before)
    assert learner.program.computes_as(program)  # the model is the same


def test_a_learner_that_was_moved_is_seen():
    learner, tasks = maml(), regression()
    expected = gradient(learner, tasks)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-5)):
        learner.to(dtype)
        for found, wanted in zip(gradient(learner, tasks.to(dtype)), expected, strict=True):
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    with pytest.raises(TypeError, match="query_y has dtype"):
        learner.backward(mf.TaskBatch(tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y.float()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_which_parameters_are_trained_is_seen(backend):
    learner, tasks = maml(backend), regression()
    everything, frozen = gradient(learner, tasks), maml(backend)
    learner.model[0].weight.requires_grad_(False)
    frozen.model[0].weight.requires_grad_(False)
    same(gradient(learner, tasks), gradient(frozen, tasks))
    assert learner.model[0].weight.grad is None
    learner.model[0].weight.requires_grad_(True)
    same(gradient(learner, tasks), everything)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", ["support", "query"])
def test_labels_written_into_a_batch_are_checked_again(backend, part):
    learner, tasks = maml(backend, loss="cross_entropy"), labelled()
    learner.backward(tasks)
    getattr(tasks, f"{part}_y")[1, 3] = 2
    with pytest.raises(ValueError, match=rf"{part}_y contains the label 2, but the model has 2 outputs"):
        learner.backward(tasks)


def test_targets_of_another_shape_are_refused_after_a_batch_that_was_right():
    learner, tasks = maml(), regression()
    x, y = tasks.support_x, tasks.support_y
    learner.backward(mf.TaskBatch(x, y, x, y))
    for wrong, message in ((y[..., :1], "Nothing is broadcast"), (y[..., 0].long(), "Nothing is broadcast")):
        with pytest.raises(ValueError, match=message):
            learner.backward(mf.TaskBatch(x, wrong, x, y))
        with pytest.raises(ValueError, match=message):
            learner.backward(mf.TaskBatch(x, y, x, wrong))
    with pytest.raises(TypeError, match="mse takes floating-point targets"):
        learner.backward(mf.TaskBatch(x, y, x, y.long()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_add_up_and_belong_to_no_graph(backend):
    learner, tasks, others = maml(backend, lr=mf.Rate(0.1, learn=True)), regression(), regression(seed=7)
    first, second = gradient(learner, tasks), gradient(learner, others)
    gradient(learner, tasks)
    kept = [p.grad for p in learner.model.parameters()]
    for grad in kept:
        grad.requires_grad_()
    out = learner.backward(others)
    same([p.grad for p in learner.parameters()], [a + b for a, b in zip(first, second, strict=True)])
    same(kept, [a for a, p in zip(first, learner.parameters(), strict=True) if p is not learner.rate.value])
    results = [out.losses, out.outputs, *(p.grad for p in learner.model.parameters())]
    assert not any(t.requires_grad for t in results)


@pytest.mark.parametrize("loss", ["mse", nn.functional.l1_loss])
def test_parameters_in_parts_and_in_a_row(loss):
    """The native executor takes them as a module holds them, and as one vector; the same bits."""
    learner, tasks = maml(loss=loss), regression()
    learner.backward(tasks)
    parts, rate, native = learner._sources, torch.full((1, 1), 0.1, dtype=torch.float64), CpuExecutor()
    native = plan(native, learner.program, tasks).executor
    whole = meta_gradient(native, learner.program, learner.flat_parameters(), rate, tasks, 2)
    losses, outputs, gradients, rate_gradient = native.meta_gradient(learner.program, loop(2), parts, rate, tasks)
    by_default = Executor.meta_gradient(native, learner.program, loop(2), parts, rate, tasks)
    assert torch.equal(torch.cat([g.flatten() for g in gradients]), whole.grad.detach())
    assert all(g.shape == p.shape for g, p in zip(gradients, parts, strict=True))
    for found, wanted in zip(by_default.grads, gradients, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14)
    assert torch.equal(rate_gradient, whole.rates_grad)
    for found, wanted in ((losses, whole.losses), (outputs, whole.outputs)):
        assert torch.equal(found, wanted)
        assert not found.requires_grad


def test_parameters_of_another_number_or_type_are_refused():
    learner, tasks = maml(), regression()
    learner.backward(tasks)
    parts, rate, native = learner._sources, torch.full((1, 1), 0.1, dtype=torch.float64), CpuExecutor()
    with pytest.raises(ValueError, match=r"params has \d+ elements where the model needs \d+"):
        native.meta_gradient(learner.program, loop(2), parts[1:], rate, tasks)
    with pytest.raises(ValueError, match="params must have the dtype"):
        native.meta_gradient(learner.program, loop(2), [*parts[:-1], parts[-1].float()], rate, tasks)
