"""Gradients that leave the learner: exact by unrolled autograd on the user's own modules, or refused in words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metafast as mf

T, N, M, STEPS, LR = 3, 6, 5, 2, 0.1
WAYS = ("forward", "backward", "backward under no_grad", "create_graph")


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def convnet():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
    ).double()


class Scaled(nn.Module):
    """A learned loss: a parameter of its own weighs the loss, another one the targets."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.7, dtype=torch.float64))
        self.shift = nn.Parameter(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))

    def forward(self, outputs, targets):
        return self.scale * F.cross_entropy(outputs + self.shift, targets)


def data(*sample):
    return tuple(torch.randn(T, n, *sample, dtype=torch.float64) for n in (N, M))


def labels():
    return tuple(torch.randint(0, 3, (T, n)) for n in (N, M))


def unrolled(model, loss, tasks, *, steps=STEPS, lr=LR, first_order=False, moved=None):
    """Query losses ``[T]`` and outputs ``[T, m, ...]``, one task at a time, with the graph of every step."""
    theta = dict(model.named_parameters())
    moved = list(theta) if moved is None else moved
    rates = lr if isinstance(lr, (list, torch.Tensor)) else [lr] * steps
    losses, outputs = [], []
    for t in range(len(tasks)):
        fast = dict(theta)
        for rate in rates:
            of_step = loss(functional_call(model, fast, (tasks.support_x[t],)), tasks.support_y[t])
            grads = torch.autograd.grad(
                of_step, [fast[n] for n in moved], create_graph=True, materialize_grads=True, allow_unused=True
            )
            grads = [g.detach() for g in grads] if first_order else grads
            fast = {**fast, **{n: fast[n] - rate * g for n, g in zip(moved, grads, strict=True)}}
        outputs.append(functional_call(model, fast, (tasks.query_x[t],)))
        losses.append(loss(outputs[-1], tasks.query_y[t]))
    return torch.stack(losses), torch.stack(outputs)


def gradients(value, tensors):
    return torch.autograd.grad(value, tensors, materialize_grads=True, allow_unused=True)


def run(way, learner, tasks, tensors):
    """Returns the losses, and the gradients that one way of asking leaves in ``.grad``."""
    for tensor in tensors:
        tensor.grad = None
    if way == "backward":
        out = learner.backward(tasks)
    elif way == "backward under no_grad":
        with torch.no_grad():
            out = learner.backward(tasks)
    else:
        out = learner(tasks, create_graph=way == "create_graph")
        out.loss.backward()
    return out.losses.detach(), [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]


def compare(found, wanted):
    losses, grads = found
    torch.testing.assert_close(losses, wanted[0].detach(), rtol=1e-10, atol=1e-12)
    for got, want in zip(grads, wanted[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_reach_an_encoder_in_front(way, first_order, backend):
    model, encoder, (x, qx), (y, qy) = mlp(), nn.Linear(7, 4).double(), data(7), labels()
    tensors = [*model.parameters(), *encoder.parameters()]
    losses, _ = unrolled(model, F.cross_entropy, mf.TaskBatch(encoder(x), y, encoder(qx), qy), first_order=first_order)
    wanted = losses, gradients(losses.mean(), tensors)
    assert all(float(g.abs().max()) > 1e-4 for g in wanted[1])
    learner = mf.MAML(model, loss="cross_entropy", lr=LR, steps=STEPS, first_order=first_order, backend=backend)
    compare(run(way, learner, mf.TaskBatch(encoder(x), y, encoder(qx), qy), tensors), wanted)


@pytest.mark.parametrize("only", ["support_x", "query_x"])
def test_gradients_reach_each_input_alone_through_convolutions_and_a_frozen_body(only):
    model, (x, qx), (y, qy) = convnet(), data(1, 4, 4), labels()
    leaf = {"support_x": x, "query_x": qx}[only].requires_grad_()
    tasks = mf.TaskBatch(x, y, qx, qy)
    tensors = [*model.parameters(), leaf]
    losses, _ = unrolled(model, F.cross_entropy, tasks, moved=["4.weight", "4.bias"])
    wanted = losses, gradients(losses.mean(), tensors)
    learner = mf.ANIL(model, loss="cross_entropy", lr=LR, steps=STEPS, head="4")
    for way in WAYS:
        compare(run(way, learner, tasks, tensors), wanted)
    with torch.no_grad():
        assert not learner(tasks).losses.requires_grad


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", ["mse", "soft"])
def test_gradients_reach_targets(loss, way):
    model, (x, qx) = mlp(), data(4)
    y, qy = (torch.randn(T, n, 3, dtype=torch.float64).softmax(-1).requires_grad_() for n in (N, M))
    function = F.mse_loss if loss == "mse" else F.cross_entropy
    tasks, tensors = mf.TaskBatch(x, y, qx, qy), [*model.parameters(), y, qy]
    losses, _ = unrolled(model, function, tasks)
    wanted = losses, gradients(losses.mean(), tensors)
    learner = mf.MAML(model, loss="mse" if loss == "mse" else function, lr=LR, steps=STEPS)
    compare(run(way, learner, tasks, tensors), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_module_brings_its_parameters(way):
    model, loss, (x, qx), (y, qy) = mlp(), Scaled(), data(4), labels()
    learner = mf.MAML(model, loss=loss, lr=LR, steps=STEPS)
    assert {id(p) for p in learner.parameters()} == {id(p) for p in (*model.parameters(), *loss.parameters())}
    assert {"loss_modules.0.scale", "loss_modules.0.shift"} <= set(learner.state_dict())
    tasks, tensors = mf.TaskBatch(x, y, qx, qy), list(learner.parameters())
    losses, _ = unrolled(model, loss, tasks)
    compare(run(way, learner, tasks, tensors), (losses, gradients(losses.mean(), tensors)))


@pytest.mark.parametrize("way", WAYS)
def test_two_loss_modules_for_support_and_query_sets(way):
    model, loss, query_loss, (x, qx), (y, qy) = mlp(), Scaled(), Scaled(), data(4), labels()
    nn.init.constant_(query_loss.scale, 0.3)
    learner = mf.MAML(model, loss=loss, query_loss=query_loss, lr=LR, steps=STEPS)
    tensors = [*model.parameters(), *loss.parameters(), *query_loss.parameters()]
    assert {id(p) for p in learner.parameters()} == {id(p) for p in tensors}
    _, outputs = unrolled(model, loss, mf.TaskBatch(x, y, qx, qy))
    losses = torch.stack(list(map(query_loss, outputs, qy)))
    compare(run(way, learner, mf.TaskBatch(x, y, qx, qy), tensors), (losses, gradients(losses.mean(), tensors)))


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_classes_that_are_learned(way):
    """PyTorch's own function has no derivative in them; metafast's rules have."""
    model, (x, qx), (y, qy) = mlp(), data(4), labels()
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)

    def loss(outputs, targets):
        of_class = weight[targets]
        return -(of_class * outputs.log_softmax(-1).gather(-1, targets[:, None])[:, 0]).sum() / of_class.sum()

    tasks, tensors = mf.TaskBatch(x, y, qx, qy), [*model.parameters(), weight]
    losses, _ = unrolled(model, loss, tasks)
    learner = mf.MAML(model, loss=nn.CrossEntropyLoss(weight=weight), lr=LR, steps=STEPS)
    compare(run(way, learner, tasks, tensors), (losses, gradients(losses.mean(), tensors)))


class OfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(2, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, x, z):
        return self.head(torch.tanh(self.a(x) + self.b(z)))


@pytest.mark.parametrize("needed", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_samples_of_two_tensors(way, needed):
    model, (x, qx), (z, qz), (y, qy) = OfTwo(), data(4), data(2), labels()
    z.requires_grad_(needed)
    qx.requires_grad_(needed)
    tensors = [*model.parameters(), *([z, qx] if needed else [])]
    losses = []
    for t in range(T):
        fast = dict(model.named_parameters())
        for _ in range(STEPS):
            of_step = F.cross_entropy(functional_call(model, fast, (x[t], z[t])), y[t])
            grads = torch.autograd.grad(of_step, list(fast.values()), create_graph=True)
            fast = {name: p - LR * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        losses.append(F.cross_entropy(functional_call(model, fast, (qx[t], qz[t])), qy[t]))
    losses = torch.stack(losses)
    learner = mf.MAML(model, loss="cross_entropy", lr=LR, steps=STEPS)
    tasks = mf.TaskBatch((x, z), y, (qx, qz), qy)
    compare(run(way, learner, tasks, tensors), (losses, gradients(losses.mean(), tensors)))


def test_an_optimiser_moves_the_parameters_of_a_loss_module_and_a_checkpoint_holds_them():
    loss, (x, qx), (y, qy) = Scaled(), data(4), labels()
    learner = mf.MAML(mlp(), loss=loss, lr=LR, steps=STEPS)
    optimizer, before = torch.optim.SGD(learner.parameters(), lr=0.1), loss.scale.detach().clone()
    learner.backward(mf.TaskBatch(x, y, qx, qy))
    optimizer.step()
    assert not torch.equal(loss.scale, before)
    other = mf.MAML(mlp(), loss=Scaled(), lr=LR, steps=STEPS)
    other.load_state_dict(learner.state_dict())
    tasks = mf.TaskBatch(x, y, qx, qy)
    assert torch.equal(other(tasks).losses, learner(tasks).losses)
    learner.zero_grad()
    assert loss.scale.grad is None


@pytest.mark.parametrize("way", WAYS)
def test_gradients_reach_what_a_loss_closes_over(way):
    model, (x, qx), (y, qy) = mlp(), data(4), labels()
    weight, made_of = (torch.randn(3, dtype=torch.float64).requires_grad_() for _ in range(2))

    def loss(outputs, targets):
        return F.cross_entropy(outputs * weight, targets) + (made_of.exp() * outputs.square()).mean()

    tasks, tensors = mf.TaskBatch(x, y, qx, qy), [*model.parameters(), weight, made_of]
    losses, _ = unrolled(model, loss, tasks)
    wanted = losses, gradients(losses.mean(), tensors)
    learner = mf.MAML(model, loss=loss, lr=LR, steps=STEPS)
    compare(run(way, learner, tasks, tensors), wanted)


def test_what_a_loss_closes_over_may_change_from_call_to_call():
    model, (x, qx), (y, qy) = mlp(), data(4), labels()
    weight = torch.randn(3, dtype=torch.float64)

    def loss(outputs, targets):
        return F.cross_entropy(outputs * weight, targets)

    learner, tasks = mf.MAML(model, loss=loss, lr=LR, steps=STEPS), mf.TaskBatch(x, y, qx, qy)
    for needed in (False, True, False):
        weight.requires_grad_(needed)
        weight.grad = None
        learner.backward(tasks)
        assert (weight.grad is not None) == needed


@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("moved", [None, ["2.weight", "2.bias"]], ids=["all", "head"])
def test_a_penalty_on_the_models_own_parameters(way, first_order, moved):
    """Before the first step the fast weights are these parameters themselves; later the penalty is constant."""
    model, (x, qx), (y, qy) = mlp(), data(4), labels()

    def loss(outputs, targets):
        coupled = (outputs.mean(0) * model[2].bias).sum()  # a mixed derivative in outputs and parameter
        return F.cross_entropy(outputs, targets) + 0.3 * model[0].weight.square().sum() + coupled

    tasks, tensors = mf.TaskBatch(x, y, qx, qy), list(model.parameters())
    losses, outputs = unrolled(model, loss, tasks, first_order=first_order, moved=moved)
    wanted = losses, gradients(losses.mean(), tensors)
    learner = mf.MAML(model, loss=loss, lr=LR, steps=STEPS, first_order=first_order, adapt=moved)
    compare(run(way, learner, tasks, tensors), wanted)
    with torch.no_grad():
        torch.testing.assert_close(learner(tasks).losses, losses.detach(), rtol=1e-10, atol=1e-12)
    adapted = learner.adapt(x, y)(qx)
    torch.testing.assert_close(adapted, outputs.detach(), rtol=1e-10, atol=1e-12)
    assert not adapted.requires_grad


@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("loss", ["cross_entropy", "callable"])
@pytest.mark.parametrize("build", [mlp, convnet])
def test_a_meta_loss_on_the_outputs(build, loss, backend, first_order):
    model, (y, qy) = build(), labels()
    x, qx = data(4) if build is mlp else data(1, 4, 4)
    tasks = mf.TaskBatch(x, y, qx, qy)
    rate = torch.tensor([0.1, 0.07], dtype=torch.float64, requires_grad=True)
    tensors = [*model.parameters(), rate]
    losses, outputs = unrolled(model, F.cross_entropy, tasks, lr=rate, first_order=first_order)

    def meta_loss(losses, outputs):
        margin = F.multi_margin_loss(outputs.flatten(0, 1), qy.flatten())
        return margin + (losses * torch.arange(T, dtype=losses.dtype)).sum()

    wanted = gradients(meta_loss(losses, outputs), tensors)
    learner = mf.MAML(
        model, loss=F.cross_entropy if loss == "callable" else loss, lr=mf.Rate(0.1, "step", learn=True), steps=STEPS,
        first_order=first_order, backend=backend,
    )  # fmt: skip
    with torch.no_grad():
        learner.rate.value.copy_(rate[:, None])
    out = learner(tasks)
    meta_loss(out.losses, out.outputs).backward()
    found = [*(p.grad for p in model.parameters()), learner.rate.value.grad[:, 0]]
    compare((out.losses.detach(), found), (losses, wanted))


def test_a_meta_loss_on_the_outputs_alone_of_ragged_tasks():
    model, (x, qx), (y, qy) = mlp(), data(4), labels()
    kept = torch.tensor([5, 3, 4])
    mask = torch.arange(M)[None] < kept[:, None]
    for backend in ("auto", "reference"):
        learner = mf.MAML(model, loss="cross_entropy", lr=LR, steps=STEPS, backend=backend)
        out = learner(mf.TaskBatch(x, y, qx, qy, None, mask))
        model.zero_grad()
        F.cross_entropy(out.outputs[mask], qy[mask]).backward()
        _, outputs = unrolled(model, F.cross_entropy, mf.TaskBatch(x, y, qx, qy))
        wanted = gradients(F.cross_entropy(outputs[mask], qy[mask]), list(model.parameters()))
        for p, want in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, want, rtol=1e-9, atol=1e-11)


def test_second_derivatives_of_recorded_inputs():
    model, (x, qx), (y, qy) = mlp(), data(4), labels()
    x.requires_grad_()
    tasks = mf.TaskBatch(x, y, qx, qy)
    learner = mf.MAML(model, loss="cross_entropy", lr=LR, steps=STEPS)
    found, (losses, _) = learner(tasks, create_graph=True).loss, unrolled(model, F.cross_entropy, tasks)
    first, wanted = (torch.autograd.grad(v, x, create_graph=True)[0].square().sum() for v in (found, losses.mean()))
    torch.testing.assert_close(first, wanted, rtol=1e-9, atol=1e-11)
    pairs = zip(*(torch.autograd.grad(v, list(model.parameters())) for v in (first, wanted)), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)
    fused = torch.autograd.grad(learner(tasks).loss, x, create_graph=True)[0].square().sum()
    torch.testing.assert_close(fused, wanted, rtol=1e-9, atol=1e-11)
    with pytest.raises(RuntimeError, match=r"can be differentiated once.*create_graph=True"):
        fused.backward()


@pytest.mark.parametrize("of", ["losses", "outputs"])
def test_a_fused_result_says_that_it_can_be_differentiated_once(of):
    model, (x, qx), (y, qy) = mlp(), data(4), labels()
    out = mf.MAML(model, loss="cross_entropy", lr=LR, steps=STEPS)(mf.TaskBatch(x, y, qx, qy))
    first = torch.autograd.grad(getattr(out, of).square().sum(), model[0].weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"can be differentiated once.*create_graph=True"):
        first.sum().backward()


def test_reptile_refuses_what_it_would_cut_off():
    model, (x, qx), (y, qy) = mlp(), data(4), labels()
    plain = mf.TaskBatch(x, y, qx, qy)
    leaf = x.clone().requires_grad_()
    learner = mf.Reptile(model, loss="cross_entropy", lr=LR)
    for call in (learner, learner.backward):
        with pytest.raises(ValueError, match=r"support_x requires a gradient, and Reptile has none.*detach"):
            call(mf.TaskBatch(leaf, y, qx, qy))
        call(plain)
    with torch.no_grad():
        learner(mf.TaskBatch(leaf, y, qx, qy))
    penalised = mf.Reptile(model, loss=lambda o, t: F.cross_entropy(o, t) + model[0].weight.square().sum(), lr=LR)
    for call in (penalised, penalised.backward, lambda tasks: penalised.adapt(x, y)):
        with pytest.raises(ValueError, match="a tensor that the loss of the support sets reads"):
            call(plain)


def test_nothing_is_probed_where_the_loss_is_metafasts_own():
    assert not mf.MAML(mlp(), loss="mse", lr=LR)._loss_probe.needed
    assert mf.MAML(mlp(), loss=lambda o, t: F.cross_entropy(o, t), lr=LR)._loss_probe.needed
