"""Losses of every sort in whole inner loops, against the oracle: PyTorch's with their options, and users' own."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import models
import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle
from setups import Setup, make_tasks
from test_meta_gradients import assert_gradients, close
from torch import nn

import metafast as mf
from metafast.executors.native import cpu
from metafast.kernels.contract.layer import RuleContext
from metafast.kernels.cross_entropy import CrossEntropy
from metafast.kernels.custom_loss import CustomLoss
from metafast.kernels.mse import MSE
from metafast.program.losses import as_loss

WEIGHT = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
CLASSES, STEPS, LR = 3, 2, 0.1


def classifier():
    return models.mlp(widths=(3, 6, CLASSES))


def normed():
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES))


def pixels():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, CLASSES, 1))


SMOOTHED = partial(F.cross_entropy, label_smoothing=0.2)


def branching(outputs, targets):
    if targets.sum() > 5:
        outputs = 1.5 * outputs
    kept = targets > 0
    extra = F.one_hot(targets, CLASSES)[kept] * outputs[kept]
    return F.cross_entropy(outputs, targets) + extra.square().sum() / (1 + targets.max().item())


def focal(outputs, targets):
    p = F.softmax(outputs, -1).gather(-1, targets[:, None])[:, 0]
    return (-((1 - p) ** 2) * p.log()).mean()


class Tempered(nn.Module):
    """A loss with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (1.5, 0.2))

    def forward(self, outputs, targets):
        return F.cross_entropy(self.scale * outputs, targets) + self.shift * outputs.square().mean()


# name, loss as given to the learner, the same as a function, kind of targets
LOSSES = [
    ("by name", "cross_entropy", F.cross_entropy, "labels"),
    ("a function", F.cross_entropy, F.cross_entropy, "labels"),
    ("a module", nn.CrossEntropyLoss(), F.cross_entropy, "labels"),
    ("weights", nn.CrossEntropyLoss(weight=WEIGHT), partial(F.cross_entropy, weight=WEIGHT), "labels"),
    ("a partial", SMOOTHED, SMOOTHED, "labels"),
    ("a sum", nn.CrossEntropyLoss(reduction="sum"), partial(F.cross_entropy, reduction="sum"), "labels"),
    ("a label left out", nn.CrossEntropyLoss(ignore_index=1), partial(F.cross_entropy, ignore_index=1), "labels"),
    ("labels left out", "cross_entropy", F.cross_entropy, "some left out"),
    ("labels left out, weights", nn.CrossEntropyLoss(weight=WEIGHT), partial(F.cross_entropy, weight=WEIGHT),
     "some left out"),
    ("probabilities", "cross_entropy", F.cross_entropy, "probabilities"),
    ("log-likelihood", lambda z, y: F.nll_loss(F.log_softmax(z, 1), y), lambda z, y: F.nll_loss(F.log_softmax(z, 1), y),
     "labels"),
    ("binary", nn.BCEWithLogitsLoss(pos_weight=WEIGHT), partial(F.binary_cross_entropy_with_logits, pos_weight=WEIGHT),
     "probabilities"),
    ("focal", focal, focal, "labels"),
    ("branches", branching, branching, "labels"),
    ("squares", nn.MSELoss(), F.mse_loss, "probabilities"),
    ("Huber", nn.HuberLoss(delta=0.5), partial(F.huber_loss, delta=0.5), "probabilities"),
    ("a module with parameters", Tempered(), Tempered(), "labels"),
]  # fmt: skip
every_loss = pytest.mark.parametrize(("loss", "function", "kind"), [c[1:] for c in LOSSES], ids=[c[0] for c in LOSSES])
every_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])


def with_targets(tasks, kind):
    """The tasks with such targets; of labels that are left out each task has another number."""
    parts = dict(vars(tasks))
    for name in ("support_y", "query_y"):
        labels = parts[name]
        if kind == "probabilities":
            parts[name] = torch.randn(*labels.shape[:2], CLASSES, *labels.shape[2:], dtype=torch.float64).softmax(2)
        elif kind == "some left out":
            parts[name] = labels.clone()
            for t in range(len(labels)):
                parts[name][t, 1 : 1 + t] = -100
    return mf.TaskBatch(**parts)


def draw(kind, ragged=False):
    return with_targets(make_tasks(Setup("", classifier, classes=CLASSES, ragged=ragged)).to(torch.float64), kind)


def truth_of(model, function, tasks, query_loss=None, **options):
    oracle = Oracle(model, function, STEPS, query_loss=query_loss, **options)
    rates = {n: torch.full((STEPS, *p.shape), LR, dtype=torch.float64) for n, p in oracle.parameters.items()}
    return oracle.gradient(tasks, rates)


def check(learner, tasks, truth, tolerance=1e-9):
    """Each way to a gradient against the truth."""
    ways = [learner.backward]
    ways += [] if learner.first_order else [partial(learner, create_graph=True)]
    for way in (*ways, learner):
        learner.zero_grad()
        out = way(tasks)
        if out.loss.requires_grad:
            out.loss.backward()
        close(out.losses, truth.losses, tolerance)
        for t, expected in enumerate(truth.outputs):
            kept = slice(None) if tasks.query_mask is None else tasks.query_mask[t]
            close(out.outputs[t][kept], expected, tolerance)
        assert_gradients({n: p.grad for n, p in learner.model.named_parameters()}, truth.grads, tolerance)


@every_backend
@every_loss
@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
def test_loss(loss, function, kind, ragged, backend):
    model, tasks = classifier().double(), draw(kind, ragged)
    learner = mf.MAML(model, loss=loss, lr=LR, steps=STEPS, backend=backend)
    check(learner, tasks, truth_of(model, function, tasks))


@every_backend
@pytest.mark.parametrize("kind", ["labels", "some left out", "probabilities"])
@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), F.cross_entropy])
def test_images_of_labels(loss, kind, backend):
    """And a sample whose label is left out still counts in batch norm, as in torch."""
    setup = Setup("", pixels, (2, 4, 3), CLASSES, ragged=True)
    model, tasks = pixels().double(), make_tasks(setup).to(torch.float64)
    labels = {n: torch.randint(0, CLASSES, (*getattr(tasks, n).shape, 4, 3)) for n in ("support_y", "query_y")}
    tasks = with_targets(mf.TaskBatch(**{**vars(tasks), **labels}), kind)
    learner = mf.MAML(model, loss=loss, lr=LR, steps=STEPS, backend=backend)
    check(learner, tasks, truth_of(model, F.cross_entropy if loss == "cross_entropy" else loss, tasks))


@every_backend
def test_a_sample_whose_label_is_left_out_counts_in_batch_norm(backend):
    model, tasks = normed().double(), draw("some left out")
    learner = mf.MAML(model, loss="cross_entropy", lr=LR, steps=STEPS, backend=backend)
    check(learner, tasks, truth_of(model, F.cross_entropy, tasks))


@every_backend
def test_labels_are_looked_at_in_every_batch(backend):
    """Batches of one kind, of which some leave labels out, in support or in query sets."""
    model = classifier().double()
    learner = mf.MAML(model, loss="cross_entropy", lr=LR, steps=STEPS, backend=backend)
    plain, some = draw("labels"), draw("some left out")
    mixed = [{**vars(plain), "support_y": some.support_y}, {**vars(plain), "query_y": some.query_y}]
    for tasks in (plain, some, plain, *(mf.TaskBatch(**parts) for parts in mixed), draw("probabilities"), plain):
        check(learner, tasks, truth_of(model, F.cross_entropy, tasks))
    for bad in (-1, 3):
        with pytest.raises(ValueError, match=f"contains the label {bad}"):
            learner(mf.TaskBatch(**{**vars(some), "query_y": some.query_y.clone().fill_(bad)}))


@every_backend
def test_a_task_without_a_label_is_nan_as_in_torch_and_leaves_the_others_alone(backend):
    tasks = draw("labels")
    tasks.query_y[1] = -100
    learner = mf.MAML(classifier().double(), loss="cross_entropy", lr=LR, steps=STEPS, backend=backend)
    losses = learner(tasks).losses
    assert torch.isnan(losses).tolist() == [False, True, False]
    losses[[0, 2]].sum().backward()
    assert all(p.grad.isfinite().all() for p in learner.model.parameters())


def test_losses_without_options_keep_their_rules_in_cpp(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a loss in Python")

    monkeypatch.setattr(cpu, "PythonLoss", refuse)
    tasks = draw("labels")
    for loss in ("cross_entropy", F.cross_entropy, nn.CrossEntropyLoss(), partial(F.cross_entropy, ignore_index=-100)):
        mf.MAML(classifier().double(), loss=loss, lr=LR, backend="cpu").backward(tasks)
    values = draw("probabilities")
    for loss in ("mse", F.mse_loss, nn.MSELoss(), partial(F.mse_loss, reduction="mean")):
        mf.MAML(classifier().double(), loss=loss, lr=LR, backend="cpu").backward(values)
    with pytest.raises(AssertionError):
        mf.MAML(classifier().double(), loss="cross_entropy", lr=LR, backend="cpu").backward(values)


def test_what_is_recognised():
    weighted = nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=2, label_smoothing=0.1, reduction="sum")
    options = {"weight": WEIGHT, "ignore_index": 2, "label_smoothing": 0.1, "reduction": "sum"}
    for loss in (weighted, partial(F.cross_entropy, **options)):
        found = as_loss(loss)
        assert isinstance(found, CrossEntropy)
        assert found.options == options
        assert found.function is loss
    assert as_loss(weighted).module is weighted
    assert as_loss(Tempered()).module is not None
    assert as_loss(F.cross_entropy).module is None
    assert isinstance(as_loss(nn.MSELoss(reduction="sum")), MSE)
    assert as_loss(nn.MSELoss()).options == as_loss("mse").options == {}

    class Doubled(nn.MSELoss):
        def forward(self, outputs, targets):
            return 2 * super().forward(outputs, targets)

    hooked = nn.MSELoss()
    hooked.register_forward_hook(lambda module, arguments, output: 3 * output)
    own = nn.MSELoss()
    own.forward = lambda outputs, targets: outputs.sum()
    old = partial(F.mse_loss, reduce=True)
    for loss in (Doubled(), hooked, own, old, partial(F.mse_loss, torch.zeros(2)), partial(F.mse_loss, weight=WEIGHT)):
        assert isinstance(as_loss(loss), CustomLoss), loss


def test_a_moved_module_brings_its_weight_along():
    loss = nn.CrossEntropyLoss(weight=WEIGHT.clone())
    learner, tasks = mf.MAML(classifier().double(), loss=loss, lr=LR, steps=STEPS), draw("labels")
    learner.backward(tasks)
    loss.float()
    loss.weight.fill_(1.0)
    check(learner, tasks, truth_of(learner.model, F.cross_entropy, tasks))


@every_backend
def test_an_option_of_a_module_that_changes_later_takes_effect(backend):
    loss, tasks = nn.CrossEntropyLoss(), draw("labels")
    learner = mf.MAML(classifier().double(), loss=loss, lr=LR, steps=STEPS, backend=backend)
    for change in ({}, {"label_smoothing": 0.3}, {"reduction": "sum"}, {"ignore_index": 1}, {"weight": WEIGHT}):
        for name, value in change.items():
            setattr(loss, name, value)
        check(learner, tasks, truth_of(learner.model, copy.deepcopy(loss), tasks))


QUERY = [
    ("labels, probabilities", "cross_entropy", "labels", "mse", "probabilities"),
    ("both in C++ of one kind of targets", "mse", "probabilities", "cross_entropy", "probabilities"),
    ("smoothed on support sets alone", nn.CrossEntropyLoss(label_smoothing=0.3), "labels", "cross_entropy", "labels"),
    ("a callable on query sets", "cross_entropy", "some left out", focal, "labels"),
    ("a callable on support sets", branching, "labels", nn.CrossEntropyLoss(WEIGHT), "some left out"),
]
every_query_loss = pytest.mark.parametrize(
    ("loss", "kind", "query_loss", "query_kind"), [c[1:] for c in QUERY], ids=[c[0] for c in QUERY]
)


@every_backend
@every_query_loss
@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
@pytest.mark.parametrize("first_order", [False, True], ids=["", "first order"])
def test_query_loss(loss, kind, query_loss, query_kind, ragged, first_order, backend):
    model, tasks = classifier().double(), draw(kind, ragged)
    tasks = mf.TaskBatch(**{**vars(tasks), "query_y": with_targets(draw("labels"), query_kind).query_y})
    learner = mf.MAML(
        model, loss=loss, query_loss=query_loss, lr=LR, steps=STEPS, backend=backend, first_order=first_order
    )
    check(learner, tasks, truth_of(model, loss, tasks, query_loss, first_order=first_order))
    with torch.no_grad():
        adapted = learner.adapt(tasks.support_x, tasks.support_y, support_mask=tasks.support_mask)
    if not ragged:
        assert torch.equal(adapted(tasks.query_x), learner(tasks).outputs)
    assert "on query sets" in learner.explain()


@pytest.mark.parametrize("kind", [mf.ANIL, mf.MetaSGD, mf.MAMLPlusPlus, mf.FOMAML, mf.Reptile])
def test_learners_take_a_query_loss(kind):
    tasks = draw("labels")
    options = {"head": "2"} if kind is mf.ANIL else {}
    both = [
        kind(copy.deepcopy(model), loss="cross_entropy", query_loss=query_loss, lr=0.1, steps=2, **options)
        for model in [classifier().double()]
        for query_loss in (None, partial(F.cross_entropy, reduction="sum"))
    ]
    losses = [learner.backward(tasks).losses for learner in both]
    torch.testing.assert_close(losses[1], losses[0] * tasks.query_x.shape[1], rtol=1e-10, atol=0)
    factor = 1 if kind is mf.Reptile else tasks.query_x.shape[1]
    for a, b in zip(*(learner.parameters() for learner in both), strict=True):
        torch.testing.assert_close(b.grad, a.grad * factor, rtol=1e-9, atol=1e-12)


def test_verify_holds_the_model_to_the_losses_that_were_given():
    tasks = draw("some left out")
    loss = nn.CrossEntropyLoss(WEIGHT.float(), label_smoothing=0.1)
    certificate = mf.verify(classifier(), tasks.to(torch.float32), loss=loss, query_loss=focal_of_kept, lr=LR, steps=2)
    assert certificate.passed, str(certificate)


def focal_of_kept(outputs, targets):
    kept = targets >= 0
    return focal(outputs[kept], targets[kept])


def test_rules_of_a_loss_are_recorded_for_the_tensors_that_it_closes_over():
    """Value, gradient and Hessian-vector product, differentiated in the loss's own parameters."""
    loss = Tempered()
    z, d = (torch.randn(2, 4, CLASSES, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = torch.randint(0, CLASSES, (2, 4))
    rules, ctx = as_loss(loss), RuleContext(0, None, (True,), ())
    found = [rules.forward(ctx, z, y), rules.backward(ctx), rules.tangent_backward(ctx, d)]
    value = torch.stack([loss(z[t], y[t]) for t in range(2)])
    (gradient,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    (product,) = torch.autograd.grad((gradient * d.detach()).sum(), z, create_graph=True)
    leaves = [z, *loss.parameters()]
    for ours, theirs in zip(found, (value, gradient, product), strict=True):
        torch.testing.assert_close(ours, theirs)
        directions = torch.randn_like(theirs)
        of = [torch.autograd.grad((v * directions).sum(), leaves, retain_graph=True) for v in (ours, theirs)]
        for a, b in zip(*of, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_rules_of_cross_entropy_are_recorded_for_soft_labels_and_weights():
    weight = WEIGHT.clone().requires_grad_()
    z, soft = (torch.randn(2, 4, CLASSES, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        soft[0, 0] = torch.tensor([0.0, 1.0, 0.0])  # which has a derivative too
    rules, ctx = CrossEntropy(weight=weight, label_smoothing=0.1), RuleContext(0, None, (True,), ())
    value = torch.stack([F.cross_entropy(z[t], soft[t], weight=weight, label_smoothing=0.1) for t in range(2)])
    (gradient,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    for ours, theirs in zip((rules.forward(ctx, z, soft), rules.backward(ctx)), (value, gradient), strict=True):
        directions = torch.randn_like(theirs)
        leaves = [z, soft, weight]
        of = [torch.autograd.grad((v * directions).sum(), leaves, retain_graph=True) for v in (ours, theirs)]
        for a, b in zip(*of, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_loss_with_branches_runs_alone_and_the_others_together():
    outputs, targets = torch.randn(5, 4, CLASSES), torch.randint(0, CLASSES, (5, 4))
    calls = []

    def counted(z, y):
        calls.append(1)
        return focal(z, y)

    loss = CustomLoss(counted)
    for _ in range(2):
        calls.clear()
        loss.forward(RuleContext(0, None, (True,), ()), outputs, targets)
    assert len(calls) == 1
    alone = CustomLoss(lambda z, y: calls.append(1) or branching(z, y))
    for _ in range(2):
        calls.clear()
        alone.forward(RuleContext(0, None, (True,), ()), outputs, targets)
    assert len(calls) == 5


def test_what_a_loss_prints_is_of_one_task(capsys):
    loss = CustomLoss(lambda z, y: print(y) or F.mse_loss(z, y))
    values = torch.arange(6.0).reshape(3, 2, 1)
    loss.forward(RuleContext(0, None, (True,), ()), values, values)
    assert capsys.readouterr().out.endswith("tensor([[2.],\n        [3.]])\ntensor([[4.],\n        [5.]])\n")


def test_no_warning_of_torchs_reaches_the_user():
    """Some operations have no rule for tasks together; torch then warns of what the user never asked for."""
    values = torch.randn(3, 4, 4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loss = CustomLoss(lambda z, y: (torch.pdist(z) - torch.pdist(y)).square().mean())
        loss.forward(RuleContext(0, None, (True,), ()), values, values.flip(1))
    assert [str(warning.message) for warning in said] == []
