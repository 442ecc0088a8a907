"""Dropout and other random numbers: what is drawn, and the exact meta-gradient under it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from noise_models import MODELS, Call, assert_agree, made, tasks_of, truth
from torch import nn
from torch.func import functional_call

import metafast as mf
from metafast.executors import ReferenceExecutor
from metafast.kernels.noise import Noise
from metafast.program.noise import given_numbers


@pytest.mark.parametrize("name", MODELS)
def test_meta_gradients_are_those_of_the_module_on_the_same_numbers(name):
    model, tasks = made(name), tasks_of()
    learner = mf.MAML(model, loss="mse", lr=0.1, steps=2)
    out = learner.backward(tasks)
    assert learner.program.draws
    assert_agree(model, out.losses, truth(model, tasks))


@pytest.mark.parametrize("name", ["nn.Dropout", "nn.AlphaDropout", "DropConnect", "randn_like", "nn.GRU, both ways"])
@pytest.mark.parametrize("way", ["forward", "recorded"])
def test_every_way_to_the_meta_gradient_sees_the_same_numbers(name, way):
    model, tasks = made(name), tasks_of()
    out = mf.MAML(model, loss="mse", lr=0.1, steps=2)(tasks, **({"create_graph": True} if way == "recorded" else {}))
    out.loss.backward()
    assert_agree(model, out.losses, truth(model, tasks))


@pytest.mark.parametrize("name", ["nn.Dropout", "torch.normal", "nn.LSTM"])
def test_the_first_order_gradient(name):
    model, tasks = made(name), tasks_of()
    out = mf.FOMAML(model, loss="mse", lr=0.1, steps=3).backward(tasks)
    assert_agree(model, out.losses, truth(model, tasks, steps=3, first_order=True))


def test_float32_drops_what_float64_drops():
    narrow = mf.MAML(made("nn.Dropout", torch.float32), loss="mse", lr=0.1, steps=2).backward(
        tasks_of(dtype=torch.float32)
    )
    wide = mf.MAML(made("nn.Dropout"), loss="mse", lr=0.1, steps=2).backward(tasks_of())
    torch.testing.assert_close(narrow.losses.double(), wide.losses, rtol=1e-5, atol=0)


def test_masks_given_to_torch_from_outside(monkeypatch):
    """No code of metafast runs in this truth but that of the numbers: F.dropout is replaced by a product with them."""
    model, tasks = made("twice"), tasks_of()
    out = mf.MAML(model, loss="mse", lr=0.1, steps=2).backward(tasks)

    class Masks:
        def __init__(self, seed, step):
            self.seed, self.step, self.number = seed.reshape(1), step, 0

        def __enter__(self):
            monkeypatch.setattr(F, "dropout", self.drop)

        def __exit__(self, *error):
            monkeypatch.undo()

        def drop(self, x, p, training, inplace):
            layer = Noise(self.number, "kept", x.dtype, tuple(x.shape), rate=p, scale=1 / (1 - p))
            self.number += 1
            return x * layer.values(self.seed, self.step, layer.shape)[0]

    assert_agree(model, out.losses, truth(model, tasks, Masks))


def test_ragged_tasks():
    model, tasks = made("nn.Dropout"), tasks_of()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:] = mask[2, 0] = False
    tasks = mf.TaskBatch(
        tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y, mask, mask[:, 1:].clone(), seeds=tasks.seeds
    )
    out = mf.MAML(model, loss="mse", lr=0.1, steps=2).backward(tasks)
    assert_agree(model, out.losses, truth(model, tasks))


@pytest.mark.parametrize("name", ["nn.Dropout", "randn_like", "nn.AlphaDropout", "rand, one for all"])
def test_the_tasks_that_are_computed_together_do_not_matter(name):
    found = []
    for most in (None, 1, 2):
        model = made(name)
        out = mf.MAML(model, loss="mse", lr=0.1, steps=2, backend=ReferenceExecutor(max_tasks=most)).backward(
            tasks_of()
        )
        found.append((out.losses, out.outputs))
    for losses, outputs in found[1:]:
        assert torch.equal(losses, found[0][0])
        assert torch.equal(outputs, found[0][1])


def test_finite_differences_of_the_meta_loss():
    model, tasks = made("nn.TransformerEncoderLayer"), tasks_of()
    learner = mf.MAML(model, loss="mse", lr=0.1, steps=2)
    learner.backward(tasks)
    weight, h = model.first.weight, 1e-5
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=weight.dtype)
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * h * direction
            sides.append(float(learner(tasks).loss))
            weight -= sign * h * direction
    slope_of_loss = (sides[0] - sides[1]) / (2 * h)
    assert slope_of_loss == pytest.approx(float((weight.grad * direction).sum()), rel=1e-6)


def test_seeds_come_from_torchs_default_generator():
    learner, tasks = mf.MAML(made("nn.Dropout"), loss="mse", lr=0.1, steps=2), tasks_of(seeds=False)
    torch.manual_seed(3)
    first = learner.backward(tasks).losses
    after = torch.get_rng_state()
    second = learner.backward(tasks).losses
    torch.manual_seed(3)
    again = learner.backward(tasks).losses
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    torch.randint(-(1 << 63), (1 << 63) - 1, ())
    assert torch.equal(after, torch.get_rng_state()), "one call draws one number"


@pytest.mark.parametrize("name", ["nn.Dropout", "nn.TransformerEncoderLayer"])
def test_evaluation_draws_nothing_and_costs_nothing(name):
    learner, tasks = mf.MAML(made(name), loss="mse", lr=0.1, steps=2), tasks_of(seeds=False)
    learner.eval()
    before = torch.get_rng_state()
    first, second = learner.backward(tasks).losses, learner.backward(tasks).losses
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, second)
    assert not learner.program.draws
    assert not {node.layer.kind for node in learner.program.nodes} & {"noise", "dropout"}
    learner.train()
    assert not torch.equal(learner.backward(tasks).losses, learner.backward(tasks).losses)


def test_a_batch_norm_beside_it_leaves_the_generator_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    learner, tasks = mf.MAML(model, loss="mse", lr=0.1, steps=2), tasks_of()
    before = torch.get_rng_state()
    learner.backward(tasks)
    learner(tasks).loss.backward()
    assert int(model[1].num_batches_tracked) == 2
    assert torch.equal(before, torch.get_rng_state())


def test_adapted_models_are_those_that_the_learner_judges():
    model, tasks = made("nn.Dropout"), tasks_of(seeds=False)
    learner = mf.MAML(model, loss="mse", lr=0.1, steps=2)
    torch.manual_seed(4)
    adapted = learner.adapt(tasks.support_x, tasks.support_y)
    first, second = adapted(tasks.query_x), adapted(tasks.query_x)
    assert not torch.equal(first, second), "each call drops others, as a module in training does"
    assert adapted(tasks.query_x[:, :2]).shape == (3, 2, 3)
    torch.manual_seed(4)
    with_others = learner.adapt(tasks.support_x, tasks.support_y)
    assert torch.equal(adapted.parameters, with_others.parameters)


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"optimizer": "adam"}])
def test_reptile_and_anil(options):
    tasks = tasks_of()
    outs = [mf.Reptile(made("nn.Dropout"), loss="mse", lr=0.1, steps=3, **options).backward(tasks) for _ in range(2)]
    assert torch.equal(outs[0].losses, outs[1].losses)
    model = made("nn.Dropout")
    out = mf.ANIL(model, head="last", loss="mse", lr=0.1, steps=1).backward(tasks)
    assert not torch.equal(out.losses, outs[0].losses)


def test_anil_draws_anew_in_each_step():
    """The part that no inner step moves is computed once, but for what comes behind random numbers."""
    model, tasks = made("nn.Dropout"), tasks_of()
    out = mf.ANIL(model, head="last", loss="mse", lr=0.1, steps=2).backward(tasks)
    losses, _ = truth_of_head(model, tasks)
    torch.testing.assert_close(out.losses, losses, rtol=1e-9, atol=1e-9)


def truth_of_head(model, tasks):
    frozen = {n: p.detach() for n, p in model.named_parameters() if not n.startswith("last")}
    moved = {n: p for n, p in model.named_parameters() if n.startswith("last")}

    losses = []
    for t in range(len(tasks)):
        theta = dict(moved)
        for step in range(2):
            with given_numbers(tasks.seeds[t, 0], step):
                outputs = functional_call(model, {**frozen, **theta}, (tasks.support_x[t],))
            grads = torch.autograd.grad(F.mse_loss(outputs, tasks.support_y[t]), list(theta.values()))
            theta = {n: p - 0.1 * g for (n, p), g in zip(theta.items(), grads, strict=True)}
        with given_numbers(tasks.seeds[t, 1], 2):
            losses.append(
                F.mse_loss(functional_call(model, {**frozen, **theta}, (tasks.query_x[t],)), tasks.query_y[t])
            )
    return torch.stack(losses).detach(), None


def test_learned_rates_and_weights_of_steps():
    model, tasks = made("nn.Dropout"), tasks_of()
    options = {"loss": "mse", "lr": mf.Rate(0.1, "step", learn=True), "steps": 2, "step_weights": (0.3, 0.7)}
    by_hand, at_once = mf.MAML(made("nn.Dropout"), **options), mf.MAML(model, **options)
    by_hand(tasks).loss.backward()
    at_once.backward(tasks)
    for a, b in zip(by_hand.parameters(), at_once.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_a_checkpointed_part_sees_its_numbers_again():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.4), nn.Tanh())
    model = Call(lambda m, x: checkpoint(m.part, x, use_reentrant=False), part=part).double()
    tasks = tasks_of()
    out = mf.MAML(model, loss="mse", lr=0.1, steps=2).backward(tasks)
    plain = Call(lambda m, x: m.part(x), part=part).double()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(out.losses, mf.MAML(plain, loss="mse", lr=0.1, steps=2).backward(tasks).losses)


@pytest.mark.parametrize(("name", "draws"), [("nn.Dropout", 1), ("twice", 2), ("one draw, read by several", 1),
                                             ("nn.GRU, both ways", 2), ("a number that is not used", 1)])  # fmt: skip
def test_each_draw_is_one_node(name, draws):
    learner = mf.MAML(made(name), loss="mse", lr=0.1)
    learner.backward(tasks_of())
    layers = [node.layer for node in learner.program.at(5).nodes if node.layer.kind == "noise"]
    assert len(layers) == draws
    assert len({layer.number for layer in layers}) == draws


@pytest.mark.parametrize("most", [None, 1])
def test_predictions_and_curvature_of_given_seeds(most):
    model, tasks, step = made("nn.AlphaDropout"), tasks_of(), 1
    learner, executor = mf.MAML(model, loss="mse", lr=0.1), ReferenceExecutor(max_tasks=most)
    learner.backward(tasks)
    theta, support = learner.flat_parameters().detach(), tasks.support
    u = torch.randn(theta.shape, generator=torch.Generator().manual_seed(5), dtype=theta.dtype)
    outputs = executor.predict(learner.program, theta, support.x, step, support.seeds)
    products = executor.hvp(learner.program, theta, support, u, step)
    assert [p.name for p in learner.program.parameters] == [n for n, _ in model.named_parameters()]
    for t in range(len(tasks)):
        with given_numbers(support.seeds[t], step):
            wanted = model(support.x[t])
        torch.testing.assert_close(outputs[t], wanted, rtol=1e-10, atol=1e-12)
        grads = torch.autograd.grad(F.mse_loss(wanted, support.y[t]), list(model.parameters()), create_graph=True)
        along = torch.cat([g.flatten() for g in grads]) @ u
        product = torch.cat([p.flatten() for p in torch.autograd.grad(along, list(model.parameters()))])
        torch.testing.assert_close(products[t], product, rtol=1e-8, atol=1e-11)
