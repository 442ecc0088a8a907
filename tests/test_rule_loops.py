"""Truncation, segments, samples of each step's own, weights of steps, and gradients that leave, under any rule."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from loop_oracle import parts
from rule_cases import RULES, Scaled, Two, batch, check, maml, mlp, truth_of, wave
from torch import nn

import metafast as mf
from metafast.executors.composition import segments_of

BACKENDS = ("auto", "reference")
SOME = [mf.SGD(), RULES[1], RULES[6], RULES[11], RULES[14]]
SIZE = 43  # the parameters of mlp()


def bytes_of(rule, rows, tasks=2):
    """The memory of so many steps of an mlp in float64."""
    return rows * tasks * (1 + len(rule.states)) * SIZE * 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", [None, [0.1, 0.2, 0.3, 0.4], [0.0, 0.7, 0.0, 0.0]], ids=["last", "all", "early"])
@pytest.mark.parametrize("k", [0, 1, 3, 9, "T1-T2"])
@pytest.mark.parametrize("rule", SOME, ids=str)
def test_the_way_back_goes_through_the_last_steps(rule, k, weights, backend):
    options = {"steps": 4, "truncate": k, "step_weights": weights, "backend": backend}
    check(maml(inner=rule, learn_state=bool(rule.states), lr=mf.Rate(0.1, "step", learn=True), **options), batch())


@pytest.mark.parametrize("rule", SOME, ids=str)
def test_no_step_of_the_way_back_is_first_order_at_the_end(rule):
    """With ``truncate=0`` the meta-gradient is that of the query loss at theta_S."""
    learner, tasks = maml(inner=rule, truncate=0), batch()
    out = learner.backward(tasks)
    wanted = [torch.zeros_like(p) for p in learner.model.parameters()]
    fast = learner.adapt(tasks.support_x, tasks.support_y)
    for t in range(len(tasks)):
        own = mlp()
        own.load_state_dict(fast.state_dict(t))
        F.cross_entropy(own(tasks.query_x[t]), tasks.query_y[t]).backward()
        wanted = [w + p.grad / len(tasks) for w, p in zip(wanted, own.parameters(), strict=True)]
    for p, want in zip(learner.model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-10, atol=1e-13)
    assert not out.losses.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("truncate", [None, 19])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rule", SOME, ids=str)
def test_a_loop_in_segments_is_the_whole_loop(rule, weighted, truncate, backend):
    steps, hyper = 26, {"lr": mf.Rate(0.02, ("step", "layer"), learn=True)}
    if rule.hyper and rule.states:
        rule = type(rule)(**{rule.hyper[-1]: mf.Rate(0.1, "step", learn=True)}, max_norm=1.0)
    options = {"steps": steps, "truncate": truncate, "step_weights": [0.1] * steps if weighted else None, **hyper}
    for tasks in (batch(), batch(steps, ragged=True)):
        learner = maml(inner=rule, memory=bytes_of(rule, 14), backend=backend, **options)
        found = segments_of(learner.loop, 2, (1 + len(rule.states)) * SIZE, 8)
        assert not found.keeps_all
        assert len(found.spans) >= 4
        assert found.bytes <= learner.memory
        check(learner, tasks, ways=("backward", "forward"))
        whole = maml(inner=rule, backend=backend, **options)
        for each in (learner, whole):
            each.zero_grad()
            each.backward(tasks)
        for p, q in zip(learner.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-13)
    assert "steps kept and the others taken again" in learner.explain()
    assert whole.loop.is_plain or "every one of" in whole.explain()


@pytest.mark.parametrize("steps", range(1, 40))
def test_what_segments_keep_at_the_least_suffices(steps):
    """No other length of a segment keeps less, and a memory of as much is enough."""
    loop = maml(steps=steps, memory=1).loop
    with pytest.raises(ValueError, match="bytes at the least") as refused:
        segments_of(loop, 1, 1, 8)
    least = int(re.search(r"keeps ([\d,]+) bytes", str(refused.value))[1].replace(",", ""))
    found = segments_of(loop._replace(memory=least), 1, 1, 8)
    assert found.bytes == least == min(found._replace(length=length).bytes for length in range(1, steps + 1))
    with pytest.raises(ValueError, match="bytes at the least"):
        segments_of(loop._replace(memory=least - 1), 1, 1, 8)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("way", ["backward", "__call__"])
def test_a_memory_that_is_too_small_is_refused_before_statistics_move(backend, way):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    learner = mf.MAML(
        model, loss="cross_entropy", lr=0.1, steps=9, inner=mf.Adam(), bn="running", memory=10, backend=backend
    )
    x, y = torch.randn(2, 5, 4, dtype=torch.float64), torch.randint(3, (2, 5))
    with pytest.raises(ValueError, match=r"memory=10: .* bytes at the least"):
        getattr(learner, way)(mf.TaskBatch(x, y, x, y))
    assert not model[1].running_mean.any()
    learner.memory = None
    getattr(learner, way)(mf.TaskBatch(x, y, x, y))
    assert model[1].running_mean.any()


def test_an_adaptation_of_many_steps_keeps_none_of_them():
    tasks, learner = batch(), maml(inner=mf.Adam(), lr=0.01, memory=1)
    fast = learner.adapt(tasks.support_x, tasks.support_y, steps=50)
    parts = learner.adapt(tasks.support_x, tasks.support_y, steps=25)
    parts = learner.adapt(tasks.support_x, tasks.support_y, steps=25, after=parts)
    assert torch.equal(fast.parameters, parts.parameters)


def leaves_of(tasks):
    """The batch with inputs that require gradients, and these inputs."""
    leaves = []

    def leaf(part):
        leaves.append(part.detach().clone().requires_grad_())
        return leaves[-1]

    support, query = parts(tasks.support_x, leaf), parts(tasks.query_x, leaf)
    masks = tasks.support_mask, tasks.query_mask
    return mf.TaskBatch(support, tasks.support_y, query, tasks.query_y, *masks, each_step=tasks.each_step), leaves


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sets", [0, 3], ids=["one set", "a set for each step"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"truncate": 2, "step_weights": [0.2, 0.3, 0.5]},
        {"truncate": 0, "step_weights": [0.2, 0.3, 0.5]},
        {"first_order": True, "step_weights": [0.2, 0.3, 0.5]},
        {"steps": 20, "memory": 9000},
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", [mf.SGD(), RULES[1], RULES[6]], ids=str)
def test_gradients_reach_inputs_and_loss_modules(rule, options, sets, backend):
    loss, options = Scaled(), dict(options)
    if "memory" in options:
        sets, options["memory"] = sets and options["steps"], bytes_of(rule, 11)
    tasks, leaves = leaves_of(batch(sets, ragged=True))
    rates = {"lr": mf.Rate(0.05, "step", learn=True), "learn_state": bool(rule.states)}
    check(maml(inner=rule, loss=loss, backend=backend, **rates, **options), tasks, loss=loss, leaves=leaves)


@pytest.mark.parametrize("sets", [0, 3], ids=["one set", "a set for each step"])
@pytest.mark.parametrize("wave_too", [False, True])
def test_gradients_reach_soft_targets(sets, wave_too):
    hard = batch(sets)
    y = torch.softmax(torch.randn(*hard.support_y.shape, 3, dtype=torch.float64), -1).requires_grad_()
    qy = torch.softmax(torch.randn(2, 3, 3, dtype=torch.float64), -1).requires_grad_()
    tasks = mf.TaskBatch(hard.support_x, y, hard.query_x, qy, each_step=bool(sets))
    for rule in (mf.SGD(), mf.Adam(eps=1e-2)):
        check(maml(wave if wave_too else mlp, inner=rule), tasks, leaves=[y, qy])


@pytest.mark.parametrize("named", [False, True], ids=["in order", "by name"])
@pytest.mark.parametrize("sets", [0, 3], ids=["one set", "a set for each step"])
def test_samples_of_several_tensors(sets, named):
    lead = (sets, 2) if sets else (2,)
    x, side = (torch.randn(*lead, 4, width, dtype=torch.float64) for width in (4, 2))
    qx, qside = (torch.randn(2, 3, width, dtype=torch.float64) for width in (4, 2))
    pack = (lambda a, b: {"side": b, "x": a}) if named else (lambda a, b: (a, b))
    y, qy = torch.randint(0, 3, (*lead, 4)), torch.randint(0, 3, (2, 3))
    tasks, leaves = leaves_of(mf.TaskBatch(pack(x, side), y, pack(qx, qside), qy, each_step=bool(sets)))

    def two():
        return Two().double()

    learner = maml(two, inner=mf.Adam(eps=1e-2))
    check(learner, tasks, leaves=leaves)
    fast = learner.adapt(pack(x, side), y, each_step=bool(sets))
    loop, _ = truth_of(learner, F.cross_entropy)
    torch.testing.assert_close(
        fast(pack(qx, qside)), torch.stack(loop.losses(tasks)[1]).detach(), rtol=1e-10, atol=1e-12
    )


def test_a_meta_loss_on_outputs_and_losses():
    rule, tasks = mf.RMSprop(eps=1e-2, momentum=0.5), batch()
    for options in ({}, {"truncate": 2, "step_weights": [0.5, 0.2, 0.3]}, {"steps": 20, "memory": bytes_of(rule, 11)}):
        learner = maml(inner=rule, **options)
        losses, outputs = truth_of(learner, F.cross_entropy)[0].losses(tasks)
        share = torch.tensor([0.3, -1.2], dtype=torch.float64)
        wanted = torch.autograd.grad(
            (share * losses).sum() + torch.stack(outputs).pow(3).sum(), list(learner.parameters())
        )
        out = learner(tasks)
        ((share * out.losses).sum() + out.outputs.pow(3).sum()).backward()
        for p, want in zip(learner.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, want, rtol=1e-9, atol=1e-11)


def test_a_query_loss_of_its_own_and_a_loss_that_reads_parameters():
    rule = mf.AdamW(eps=1e-2)
    learner = maml(inner=rule, query_loss=lambda z, y: F.multi_margin_loss(z, y), step_weights=[0.2, 0.3, 0.5])
    loop, _ = truth_of(learner, F.cross_entropy)
    losses, _ = type(loop)(**{**vars(loop), "query_loss": F.multi_margin_loss}).losses(batch())
    wanted = torch.autograd.grad(losses.mean(), list(learner.parameters()))
    learner.backward(batch())
    for p, want in zip(learner.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-9, atol=1e-12)


def test_dropout_draws_its_own_numbers_in_each_step():
    """Uncut, in segments, and recorded: all see the same numbers."""

    def dropping():
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 3)).double()

    seeds = torch.arange(4).reshape(2, 2)
    plain, rule = batch(), mf.Adam(eps=1e-2)
    tasks = mf.TaskBatch(plain.support_x, plain.support_y, plain.query_x, plain.query_y, seeds=seeds)
    found = []
    for memory, create_graph in ((None, False), (bytes_of(rule, 11), False), (None, True)):
        learner = maml(dropping, inner=rule, lr=0.02, steps=20, memory=memory)
        learner(tasks, create_graph=create_graph).loss.backward()
        found.append([p.grad for p in learner.parameters()])
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: maml(truncate="T2"), ValueError, r"truncate='T2': give a number of steps, \"T1-T2\" or None"),
        (lambda: maml(truncate=-1), ValueError, "truncate=-1"),
        (lambda: maml(truncate=1.5), ValueError, "truncate=1.5"),
        (lambda: maml(memory=0), ValueError, "memory=0"),
        (
            lambda: maml(memory=10).backward(batch()),
            ValueError,
            r"memory=10: .* keeps [\d,]+ bytes at the least; give more",
        ),
        (lambda: maml(memory=10)(batch()), ValueError, "memory=10"),
        (
            lambda: maml(steps=2).backward(batch(3)),
            ValueError,
            "samples for 3 inner steps .* there are 2: give as many",
        ),
        (lambda: maml(steps=2)(batch(3)), ValueError, "samples for 3 inner steps"),
        (lambda: maml().adapt(batch().support_x, batch().support_y, each_step=True), ValueError, r"\[S, T, n\]"),
        (lambda: sets(batch(3).support_x, batch().support_y), ValueError, r"\[3, 2, 4, 4\], \[2, 4\]"),
        (lambda: sets(batch(3).support_x, batch(2).support_y), ValueError, r"\[3, 2, 4, 4\], \[2, 2, 4\]"),
        (lambda: sets(batch(3).support_x, None), TypeError, "a NoneType is among the support tensors"),
        (lambda: sets(batch(3).support_x[:0], batch(3).support_y[:0]), ValueError, r"\[0, 2, 4, 4\]"),
        (lambda: sets(batch(3, tasks=3).support_x, batch(3, tasks=3).support_y), ValueError, "support_x has 3 tasks"),
    ],
    ids=range(14),
)
def test_what_does_not_fit_is_refused_in_words(call, error, text):
    with pytest.raises(error, match=text):
        call()


def sets(x, y):
    tasks = batch()
    return mf.TaskBatch(x, y, tasks.query_x, tasks.query_y, each_step=True)
