"""torch.compile around a learner, and the operators that it sees."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_outside_gradients import LR, STEPS, M, N, Scaled, T, convnet, data, gradients, labels, mlp, unrolled
from torch import nn
from transforms import Cosine, close, left_behind, make

import metafast as mf
from metafast.inner.operators import meta_loss, meta_loss_vjp


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # torch 2.13 warns of its own use of what it has deprecated, while it compiles.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("build", [mlp, Cosine])
def test_a_compiled_learner_that_has_seen_no_batch(build):
    model, learner, tasks = make(build())
    losses, _ = unrolled(model, F.cross_entropy, tasks)
    out = compiled(learner)(tasks)
    parameters = list(model.parameters())
    close([out.losses.detach()], [losses.detach()])
    close(left_behind(out.loss, parameters), gradients(losses.mean(), parameters))


@pytest.mark.slow
def test_a_learner_compiled_by_inductor():
    model, learner, tasks = make()
    losses, _ = unrolled(model, F.cross_entropy, tasks)
    loss = torch.compile(lambda tasks: 2 * learner(tasks).loss, fullgraph=True)(tasks)
    parameters = list(model.parameters())
    close(left_behind(loss, parameters), gradients(2 * losses.mean(), parameters))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
def test_an_encoder_a_learned_loss_and_a_meta_loss_in_one_compiled_graph(dynamic, first_order):
    model, loss, encoder, (x, qx), (y, qy) = mlp(), Scaled(), nn.Linear(7, 4).double(), data(7), labels()
    learner = mf.MAML(model, loss=loss, lr=LR, steps=STEPS, first_order=first_order)

    def batch():
        return mf.TaskBatch(encoder(x), y, encoder(qx), qy)

    def meta_loss(losses, outputs):
        return losses.mean() + F.multi_margin_loss(outputs.flatten(0, 1), qy.flatten())

    def whole(x, qx):
        out = learner(mf.TaskBatch(encoder(x), y, encoder(qx), qy))
        return meta_loss(out.losses, out.outputs)

    tensors = [*model.parameters(), *encoder.parameters(), *loss.parameters()]
    wanted = meta_loss(*unrolled(model, loss, batch(), first_order=first_order))
    found = compiled(whole, dynamic=dynamic)(x, qx)
    close([found.detach()], [wanted.detach()])
    close(left_behind(found, tensors), gradients(wanted, tensors))


def test_a_compiled_learner_follows_its_settings_and_its_batches():
    model, learner, tasks = make()
    run, parameters = compiled(learner), list(model.parameters())
    for first_order in (False, True, False):
        learner.first_order = first_order
        losses, _ = unrolled(model, F.cross_entropy, tasks, first_order=first_order)
        close(left_behind(run(tasks).loss, parameters), gradients(losses.mean(), parameters))
    with torch.no_grad():
        model[0].weight.mul_(0.5)
        assert not run(tasks).losses.requires_grad
    other = mf.TaskBatch(*(torch.cat([t, t[:1]]) for t in (tasks.support_x, tasks.support_y)), *(
        torch.cat([t, t[:1]])[:, :3] for t in (tasks.query_x, tasks.query_y)
    ))  # fmt: skip
    for batch in (tasks, other):
        losses, _ = unrolled(model, F.cross_entropy, batch)
        close(left_behind(run(batch).loss, parameters), gradients(losses.mean(), parameters))
    learner.step_weights = [0.5, 2.0]
    close([run(tasks).losses.detach()], [learner(tasks).losses.detach()])


@pytest.mark.parametrize("bn", ["task", "per_step", "frozen", "running"])
def test_compiled_batch_norm_and_learned_rates(bn):
    (x, qx), (y, qy) = data(1, 4, 4), labels()
    tasks = mf.TaskBatch(x, y, qx, qy)
    _, learner, _ = make(convnet(), tasks, bn=bn, lr=mf.Rate(LR, ("layer", "step"), learn=True))
    other = copy.deepcopy(learner)
    assert other.number != learner.number
    parameters, of_other = list(learner.parameters()), list(other.parameters())
    run = compiled(learner)
    close(left_behind(run(tasks).loss, parameters), left_behind(other(tasks).loss, of_other))
    assert float(learner.rate.value.grad.abs().max()) > 0
    close(learner.model[1].buffers(), other.model[1].buffers())
    if bn == "running":
        early = run(tasks)
        run(tasks)
        with pytest.raises(RuntimeError, match="running statistics of batch norm, has changed"):
            early.loss.backward()


def test_ragged_tasks_compiled():
    (x, qx), (y, qy) = data(4), labels()
    mask, query_mask = torch.rand(T, N) < 0.7, torch.rand(T, M) < 0.7
    mask[:, 0] = query_mask[:, 0] = True
    tasks = mf.TaskBatch(x, y, qx, qy, mask, query_mask)
    model, learner, _ = make(tasks=tasks)
    parameters = list(model.parameters())
    wanted = left_behind(learner(tasks).loss, parameters)
    close(left_behind(compiled(learner)(tasks).loss, parameters), wanted)


def test_what_a_compiled_graph_cannot_hold_is_refused():
    model, tasks = mlp(), make()[2]
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for loss in (
        lambda o, t: F.cross_entropy(o * weight, t),
        lambda o, t: F.cross_entropy(o, t) + model[0].weight.square().sum(),
    ):
        learner = make(model, tasks, loss=loss)[1]
        with pytest.raises(RuntimeError, match=r"torch.compile cannot see.*Make it a parameter of an nn.Module"):
            compiled(learner)(tasks)
    learner = make(model, tasks)[1]
    with pytest.raises(Exception, match="create_graph=True records plain operations"):
        compiled(learner)(tasks, create_graph=True)


def operands(learner, tasks):
    theta = torch.cat([p.detach().flatten() for p in learner.model.parameters()]).requires_grad_()
    batch = (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)
    of_loss = list(learner.loss_modules.parameters())
    rates = learner.rate().detach().requires_grad_()
    return learner.number, theta, rates, *batch, of_loss, tasks.support_mask, tasks.query_mask, [0.0, 0.3, 1.0], False


def test_the_operators_are_what_torch_expects_of_operators():
    _, learner, tasks = make()
    x = tasks.support_x.clone().requires_grad_()
    scaled = make(tasks=tasks, loss=Scaled())[1]
    for owner, batch in (
        (learner, tasks),
        (learner, mf.TaskBatch(x, tasks.support_y, tasks.query_x, tasks.query_y)),
        (scaled, tasks),
    ):
        torch.library.opcheck(meta_loss, (*operands(owner, batch), True))
    number, *inputs, of_loss, mask, query_mask, weights, first_order = operands(scaled, tasks)
    inputs, of_loss = ([t.detach() for t in some] for some in (inputs, of_loss))
    with torch.no_grad():
        losses, outputs, *kept = meta_loss(number, *inputs, of_loss, mask, query_mask, weights, first_order, True)
    inputs += of_loss
    for needed in ([True, True, *[False] * 6], [True, False, True, False, True, False, False, True]):
        for adjoints in ((losses, outputs), (None, outputs), (losses, None)):
            arguments = (number, inputs, mask, query_mask, weights, first_order, *kept, *adjoints, needed)
            torch.library.opcheck(meta_loss_vjp, arguments)


def test_the_operators_say_what_they_refuse():
    _, learner, tasks = make()
    arguments = operands(learner, tasks)
    losses, *_ = meta_loss(*arguments, True)
    first = torch.autograd.grad(losses.sum(), arguments[1], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="cannot be mapped over a further axis"):
        torch.func.vmap(lambda theta: meta_loss(arguments[0], theta, *arguments[2:], True)[0])(
            arguments[1].detach().expand(2, -1)
        )
    del learner
    gc.collect()
    with pytest.raises(RuntimeError, match="the learner that this graph was compiled for is gone"):
        meta_loss(*arguments, True)
