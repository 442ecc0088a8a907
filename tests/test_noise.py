"""Dropout and other random numbers: what is drawn, and the exact meta-gradient under it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metafast as mf
from metafast.executors import ReferenceExecutor
from metafast.kernels.noise import Noise
from metafast.program.noise import given_numbers

ONE = torch.tensor([12345])


class Call(nn.Module):
    """Calls a function of itself and the input between two linear layers."""

    def __init__(self, function, width=6, **modules):
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 3)
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self, torch.tanh(self.first(x))))


def images(m, x):
    return m.drop(x.reshape(len(x), 3, 2, 1)).flatten(1)


def drop_path(m, x):
    kept = x.new_empty((len(x), 1)).bernoulli_(0.6)
    return x * kept.div_(0.6)


def drop_connect(m, x):
    return F.linear(x, F.dropout(m.mix.weight, 0.4), m.mix.bias)


def read_twice(m, x):
    number = torch.randint(1, 4, (len(x), 6))
    return torch.relu(m.mix(x * number)) * number + number.cos()


def noisy_labels(m, x):
    chosen = torch.multinomial(torch.softmax(x, 1), 3)
    return x * x.gather(1, chosen).sum(1, keepdim=True)


def shuffled(m, x):
    return x + 0.5 * x[:, torch.randperm(x.shape[1])]


def sequence(m, x):
    return m.net(x.reshape(len(x), 2, 3))[0].flatten(1)


def tokens(m, x):
    return m.net(x.reshape(len(x), 2, 3)).flatten(1)


def attended(m, x):
    q = x.reshape(len(x), 1, 2, 3)
    return F.scaled_dot_product_attention(q, q, torch.sin(q), dropout_p=0.3).flatten(1)


def reparametrised(m, x):
    return torch.distributions.Normal(x, F.softplus(m.mix(x)), validate_args=False).rsample()


MODELS = {
    "nn.Dropout": lambda: Call(lambda m, x: m.drop(x), drop=nn.Dropout(0.4)),
    "F.dropout in place": lambda: Call(lambda m, x: F.dropout(x * 1.5, 0.4, inplace=True)),
    "all is dropped": lambda: Call(lambda m, x: x + F.dropout(x, 1.0)),
    "nn.Dropout1d": lambda: Call(lambda m, x: m.drop(x.reshape(len(x), 3, 2)).flatten(1), drop=nn.Dropout1d(0.4)),
    "nn.Dropout2d": lambda: Call(images, drop=nn.Dropout2d(0.4)),
    "nn.Dropout2d in place": lambda: Call(lambda m, x: images(m, x * 1.5), drop=nn.Dropout2d(0.4, inplace=True)),
    "nn.AlphaDropout": lambda: Call(lambda m, x: m.drop(x), drop=nn.AlphaDropout(0.4)),
    "nn.FeatureAlphaDropout": lambda: Call(images, drop=nn.FeatureAlphaDropout(0.4)),
    "native_dropout": lambda: Call(lambda m, x: torch.native_dropout(x, 0.4, True)[0]),
    "twice": lambda: Call(lambda m, x: m.drop(x) + m.drop(x), drop=nn.Dropout(0.4)),
    "DropConnect": lambda: Call(drop_connect, mix=nn.Linear(6, 6)),
    "drop path": lambda: Call(drop_path),
    "rand_like": lambda: Call(lambda m, x: x * torch.rand_like(x)),
    "randn_like": lambda: Call(lambda m, x: x + 0.3 * torch.randn_like(x)),
    "rand, one for all": lambda: Call(lambda m, x: x * torch.rand(1, dtype=x.dtype)),
    "randn": lambda: Call(lambda m, x: x * torch.randn(len(x), 6, dtype=x.dtype)),
    "a number that is not used": lambda: Call(lambda m, x: (torch.rand(3), F.dropout(x, 0.3))[1]),
    "x.normal_": lambda: Call(lambda m, x: x + torch.empty_like(x).normal_(0.1, 0.2)),
    "x.uniform_": lambda: Call(lambda m, x: x * torch.empty_like(x).uniform_(0.5, 1.5)),
    "a part filled": lambda: Call(
        lambda m, x: x * torch.cat([x.new_ones(len(x), 2), x.new_empty(len(x), 4).uniform_()], 1)
    ),
    "torch.normal": lambda: Call(lambda m, x: x + torch.normal(x, 0.2)),
    "torch.normal of two": lambda: Call(lambda m, x: x + torch.normal(x, x.detach().abs())),
    "Normal.rsample": lambda: Call(reparametrised, mix=nn.Linear(6, 6)),
    "torch.bernoulli": lambda: Call(lambda m, x: x * torch.bernoulli(torch.sigmoid(x))),
    "gumbel_softmax": lambda: Call(lambda m, x: x + F.gumbel_softmax(x, 0.7)),
    "randint": lambda: Call(lambda m, x: x * torch.randint(1, 4, (len(x), 6))),
    "one draw, read by several": lambda: Call(read_twice, mix=nn.Linear(6, 6)),
    "randint_like": lambda: Call(lambda m, x: x * torch.randint_like(x, 1, 4)),
    "random_": lambda: Call(lambda m, x: x * torch.empty(len(x), 6, dtype=torch.int64).random_(1, 4)),
    "randperm": lambda: Call(shuffled),
    "multinomial": lambda: Call(noisy_labels),
    "multinomial, again and again": lambda: Call(
        lambda m, x: x * torch.multinomial(torch.softmax(x, 1), 6, replacement=True)
    ),
    "log_normal_, cauchy_, geometric_": lambda: Call(
        lambda m, x: x * (x.new_empty(6).log_normal_(0.0, 0.3) + torch.tanh(x.new_empty(6).cauchy_()))
        / x.new_empty(6).geometric_(0.5)
    ),
    "nn.RReLU": lambda: Call(lambda m, x: m.act(x), act=nn.RReLU()),
    "nn.RReLU in place": lambda: Call(lambda m, x: m.act(x * 2), act=nn.RReLU(inplace=True)),
    "attention": lambda: Call(attended),
    "nn.MultiheadAttention": lambda: Call(
        lambda m, x: m.net(*[x.reshape(len(x), 2, 3)] * 3)[0].flatten(1),
        net=nn.MultiheadAttention(3, 1, 0.3, batch_first=True),
    ),
    "nn.TransformerEncoderLayer": lambda: Call(
        tokens, net=nn.TransformerEncoderLayer(3, 1, 5, dropout=0.3, batch_first=True)
    ),
    "nn.LSTM": lambda: Call(sequence, net=nn.LSTM(3, 3, 2, dropout=0.4, batch_first=True)),
    "nn.GRU, both ways": lambda: Call(
        lambda m, x: m.net(x.reshape(len(x), 2, 3))[0][..., :3].flatten(1),
        net=nn.GRU(3, 3, 3, dropout=0.4, batch_first=True, bidirectional=True),
    ),
    "nn.RNN": lambda: Call(sequence, net=nn.RNN(3, 3, 2, dropout=0.4, batch_first=True)),
}  # fmt: skip


def tasks_of(count=3, n=5, m=4, seeds=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    given = torch.randint(1 << 40, (count, 2), generator=generator) if seeds else None
    return mf.TaskBatch(draw(count, n, 4), draw(count, n, 3), draw(count, m, 4), draw(count, m, 3), seeds=given)


def made(name, dtype=torch.float64):
    torch.manual_seed(0)
    return MODELS[name]().to(dtype)


def truth(model, tasks, run=given_numbers, lr=0.1, steps=2, first_order=False):
    """Losses, and gradients of their mean, of the unrolled inner loop of the module itself under torch.autograd."""
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    losses = []
    for t in range(len(tasks)):
        theta = dict(parameters)
        for part, step in [(tasks.support, s) for s in range(steps)] + [(tasks.query, steps)]:
            kept = slice(None) if part.mask is None else part.mask[t]
            with run(part.seeds[t], step):
                # Padding is drawn for as well, and then cut off.
                loss = F.mse_loss(functional_call(model, theta, (part.x[t],))[kept], part.y[t][kept])
            if part.y is tasks.query.y:
                losses.append(loss)
                break
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True, materialize_grads=True)
            grads = [g.detach() if first_order else g for g in grads]
            theta = {n: p - lr * g for (n, p), g in zip(theta.items(), grads, strict=True)}
    total = torch.stack(losses).mean()
    found = torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)
    return torch.stack(losses).detach(), dict(zip(parameters, found, strict=True))


def grads_of(model):
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_agree(model, losses, wanted, tolerance=1e-9):
    torch.testing.assert_close(losses.detach(), wanted[0], rtol=tolerance, atol=tolerance)
    largest = max(float(g.abs().max()) for g in wanted[1].values())
    for name, grad in grads_of(model).items():
        error = float((grad - wanted[1][name]).abs().max()) / largest
        assert error <= tolerance, f"{name} is off by {error:.1e}"


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


def test_native_executors_say_why_they_do_not_run_it():
    learner = mf.MAML(made("nn.Dropout"), loss="mse", lr=0.1)
    learner.backward(tasks_of())
    text = learner.explain()
    assert "executor: reference" in text
    assert "drop.noise: no rules for 'noise'" in text
    with pytest.raises(RuntimeError, match="no rules for 'noise'"):
        mf.MAML(made("nn.Dropout"), loss="mse", lr=0.1, backend="cpu").backward(tasks_of())


class Drawing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.noise = torch.rand_like(x)
        return x * ctx.noise

    @staticmethod
    def backward(ctx, g):
        return g * ctx.noise


GENERATOR = torch.Generator()
REFUSED = {
    "poisson": (lambda m, x: x * torch.poisson(x * x), ["by poisson", "torch.poisson(", "torch.rand"]),
    "a generator of its own": (
        lambda m, x: x * torch.rand(6, generator=GENERATOR, dtype=x.dtype),
        ["generator of its own", "generator=", "out"]
    ),
    "a seed of its own": (
        lambda m, x: (torch.manual_seed(0), F.dropout(x, 0.3))[1], ["set the seed", "by dropout", "buffer"]
    ),
    "a branch on it": (
        lambda m, x: x if torch.rand(()) < 0.5 else 2 * x, ["reads a random number", "torch.where"]
    ),
    "inside of a Function": (lambda m, x: Drawing.apply(x), ["Drawing", "draws random numbers", "pass them to apply"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_repeated_is_refused_in_words(name):
    function, words = REFUSED[name]
    learner = mf.MAML(Call(function).double(), loss="mse", lr=0.1)
    with pytest.raises(mf.CaptureError) as error:
        learner.backward(tasks_of())
    for word in [*words, "test_noise.py"]:
        assert word in str(error.value), str(error.value)


def test_a_batch_without_seeds_is_refused():
    model, tasks = made("nn.Dropout"), tasks_of()
    learner = mf.MAML(model, loss="mse", lr=0.1)
    learner.backward(tasks)
    with pytest.raises(ValueError, match="no seeds"):
        ReferenceExecutor().predict(learner.program, learner.flat_parameters(), tasks.query_x)
    with pytest.raises(ValueError, match=r"seeds has .* it must be torch.int64 of shape \(3, 2\)"):
        mf.TaskBatch(tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y, seeds=torch.zeros(3))


def numbers(distribution, seeds=None, step=0, number=0, shape=(200, 500), dtype=torch.float64, **options):
    layer = Noise(number, distribution, dtype, shape, **options)
    return layer.values(ONE if seeds is None else seeds, step, shape)


QUANTILES = torch.tensor([0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("distribution", "cdf"), [
    ("uniform", lambda x: x), ("open", lambda x: x), ("normal", torch.special.ndtr),
])  # fmt: skip
def test_numbers_have_their_distribution(distribution, cdf, dtype):
    found = numbers(distribution, dtype=dtype).flatten()
    below = cdf(found.double().quantile(QUANTILES))
    allowed = 5 * (QUANTILES * (1 - QUANTILES) / found.numel()).sqrt()
    assert ((below - QUANTILES).abs() <= allowed).all(), below - QUANTILES
    assert found.unique().numel() > 0.98 * found.numel()
    if distribution != "normal":
        assert float(found.min()) >= 0
        assert float(found.max()) < 1
    if distribution == "open":
        assert float(found.min()) > 0


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_what_is_kept_has_the_right_share_and_size(rate):
    found = numbers("kept", rate=rate, scale=1 / (1 - rate))
    kept = found != 0
    assert (found[kept] == 1 / (1 - rate)).all()
    share, deviation = float(kept.double().mean()), math.sqrt(rate * (1 - rate) / found.numel())
    assert abs(share - (1 - rate)) < 5 * deviation
    neighbours = [kept[..., 1:] & kept[..., :-1], kept[:, 1:] & kept[:, :-1], kept[..., 64:] & kept[..., :-64]]
    for both in neighbours:
        assert float(both.double().mean()) == pytest.approx((1 - rate) ** 2, abs=0.01)


def test_tasks_steps_draws_and_sets_are_independent():
    from metafast.kernels.noise.counter import seeds_of

    cpu = torch.device("cpu")
    seeds = torch.cat([seeds_of(base, 8, part, cpu) for base in (0, 1, -5) for part in (0, 1)])
    assert seeds.unique().numel() == len(seeds)
    rows = [numbers("normal", seeds, step, number, (4000,)) for step in (0, 1, 2) for number in (0, 1)]
    correlation = torch.corrcoef(torch.cat(rows))
    correlation.fill_diagonal_(0)
    assert float(correlation.abs().max()) < 6 / math.sqrt(4000)


def test_a_sample_has_the_same_numbers_beside_any_others():
    assert torch.equal(numbers("normal", shape=(7, 5))[:, :3], numbers("normal", shape=(3, 5)))


def test_the_counter_in_whole_numbers_of_python():
    word, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(x):
        x &= word
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & word
        x = (x ^ x >> 27) * 0x94D049BB133111EB & word
        return x ^ x >> 31

    seeds, step, number = (0, 1, -7), 2, 3
    keys = [mix(mix(z + (step + 1) * gamma) + (number + 1) * gamma) for z in seeds]
    wanted = [[(mix(key + (i + 1) * gamma) >> 11) / 2**53 for i in range(5)] for key in keys]
    assert numbers("uniform", torch.tensor(seeds), step, number, (5,)).tolist() == wanted


@pytest.mark.parametrize(("function", "own"), [
    ("dropout", lambda x: F.dropout(x, 0.3)),
    ("alpha dropout", lambda x: F.alpha_dropout(x, 0.3, True)),
    ("channels", lambda x: F.dropout2d(x.reshape(-1, 10, 1, 1), 0.3)),
    ("rrelu", lambda x: F.rrelu(x - 1.5, training=True)),
    ("exponential_", lambda x: torch.empty_like(x).exponential_(2.0)),
    ("log_normal_", lambda x: torch.empty_like(x).log_normal_(0.1, 0.2)),
    ("geometric_", lambda x: torch.empty_like(x).geometric_(0.3)),
    ("cauchy_", lambda x: torch.atan(torch.empty_like(x).cauchy_(0.5, 2.0))),
    ("randint", lambda x: torch.randint(2, 9, x.shape).double()),
    ("bernoulli", lambda x: torch.bernoulli(x / 2)),
    ("bernoulli_", lambda x: torch.empty_like(x).bernoulli_(0.2)),
    ("multinomial", lambda x: torch.multinomial(torch.arange(1.0, 6).expand(20000, 5), 2).double()[:, 1]),
    ("multinomial again", lambda x: torch.multinomial(torch.arange(1.0, 6).expand(20000, 5), 2, True).double()),
    ("uniform_", lambda x: torch.empty_like(x).uniform_(2, 5)),
    ("normal_", lambda x: torch.empty_like(x).normal_(2, 5)),
])  # fmt: skip
def test_operations_draw_as_torch_draws(function, own):
    """Mean, deviation and quantiles of what is computed of a counter against torch's own generator."""
    torch.manual_seed(0)
    x = torch.ones(20000, 2, dtype=torch.float64)
    wanted = own(x).flatten().double()
    with given_numbers(ONE):
        found = own(x).flatten().double()
    assert found.shape == wanted.shape
    deviation = float(wanted.std())
    assert abs(float(found.mean() - wanted.mean())) < 5 * deviation * math.sqrt(2 / len(wanted))
    assert float(found.std()) == pytest.approx(deviation, rel=0.06)
    for q in (0.1, 0.5, 0.9):
        at = float(wanted.quantile(q))
        shares = [float((v <= at + 1e-9).double().mean()) for v in (found, wanted)]
        assert abs(shares[0] - shares[1]) < 5 * math.sqrt(0.5 / len(wanted))


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


@pytest.mark.parametrize("distribution", ["uniform", "open", "normal", "kept"])
def test_threads_do_not_matter(distribution):
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(numbers(distribution, shape=(999, 333), rate=0.3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_random_numbers_have_no_place_in_a_compiled_graph():
    learner, tasks = mf.MAML(made("nn.Dropout"), loss="mse", lr=0.1), tasks_of(seeds=False)
    with pytest.raises(RuntimeError, match="compiled graph has no place for their seeds"):
        learner.for_operator(tasks, True)
    learner.eval()
    learner.for_operator(tasks, True)


@pytest.mark.parametrize("name", ["nn.Dropout", "nn.AlphaDropout", "randn"])
def test_verify_takes_models_that_draw(name):
    certificate = mf.verify(made(name), tasks_of(seeds=False), loss="mse", lr=0.1, steps=2)
    assert certificate.passed, str(certificate)


@pytest.mark.parametrize("name", ["nn.Dropout", "randn", "nn.LSTM"])
def test_watched_layers_draw_the_same(name):
    from metafast.profile.layered import TimedExecutor

    found = []
    for executor in (ReferenceExecutor(), TimedExecutor(ReferenceExecutor())):
        model = made(name)
        found.append(mf.MAML(model, loss="mse", lr=0.1, steps=2, backend=executor).backward(tasks_of()).losses)
        found.append(model.first.weight.grad)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_gradients_that_leave_the_learner_see_the_same_numbers():
    """A learned loss, samples that require a gradient, torch.func, and a Function of the user's go other ways."""
    tasks, wanted = tasks_of(), truth(made("nn.Dropout"), tasks_of())
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    model = made("nn.Dropout")
    out = mf.MAML(model, loss=lambda z, y: (scale * (z - y) ** 2).mean(), lr=0.1, steps=2).backward(tasks)
    assert_agree(model, out.losses, wanted)
    assert float(scale.grad.abs()) > 0

    model, x = made("nn.Dropout"), tasks.support_x.clone().requires_grad_()
    out = mf.MAML(model, loss="mse", lr=0.1, steps=2)(
        mf.TaskBatch(x, tasks.support_y, tasks.query_x, tasks.query_y, seeds=tasks.seeds)
    )
    out.loss.backward()
    assert_agree(model, out.losses, wanted)
    assert float(x.grad.norm()) > 0

    model = made("nn.Dropout")
    learner = mf.MAML(model, loss="mse", lr=0.1, steps=2)
    learner.prepare(tasks)
    named = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    grads = torch.func.grad(lambda p: functional_call(learner, p, (tasks,)).loss)(named)
    for name, grad in wanted[1].items():
        torch.testing.assert_close(grads[f"model.{name}"], grad, rtol=1e-9, atol=1e-12)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def test_a_function_of_the_users_beside_random_numbers():
    torch.manual_seed(0)
    model, tasks = Call(lambda m, x: m.drop(Square.apply(x)), drop=nn.Dropout(0.4)).double(), tasks_of()
    out = mf.MAML(model, loss="mse", lr=0.1, steps=2).backward(tasks)
    assert_agree(model, out.losses, truth(model, tasks))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, scale):
        return self.b(F.dropout(torch.tanh(self.a(x)), 0.4) * (scale[:, :1] + torch.rand_like(scale[:, :1])))


def test_samples_of_several_tensors():
    torch.manual_seed(0)
    model, tasks = Two().double(), tasks_of()
    pairs = [(x, x.sin()) for x in (tasks.support_x, tasks.query_x)]
    several = mf.TaskBatch(pairs[0], tasks.support_y, pairs[1], tasks.query_y, seeds=tasks.seeds)
    out = mf.MAML(model, loss="mse", lr=0.1, steps=2).backward(several)
    grads = grads_of(model)
    model.zero_grad()
    again = mf.MAML(model, loss="mse", lr=0.1, steps=2)(several)
    again.loss.backward()
    assert torch.equal(again.losses.detach(), out.losses)
    for name, grad in grads_of(model).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-10, atol=1e-13)
    wanted = []
    for t in range(len(tasks)):
        theta = dict(model.named_parameters())
        for step in range(2):
            with given_numbers(tasks.seeds[t, 0], step):
                outputs = functional_call(model, theta, (pairs[0][0][t], pairs[0][1][t]))
            steps = torch.autograd.grad(F.mse_loss(outputs, tasks.support_y[t]), list(theta.values()))
            theta = {n: p - 0.1 * g for (n, p), g in zip(theta.items(), steps, strict=True)}
        with given_numbers(tasks.seeds[t, 1], 2):
            outputs = functional_call(model, theta, (pairs[1][0][t], pairs[1][1][t]))
        wanted.append(F.mse_loss(outputs, tasks.query_y[t]).detach())
    torch.testing.assert_close(out.losses, torch.stack(wanted), rtol=1e-9, atol=1e-12)


def test_running_statistics_behind_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    tasks = tasks_of()
    hidden = []
    for t in range(len(tasks)):
        with given_numbers(tasks.seeds[t, 0]), torch.no_grad():
            hidden.append(model[1](model[0](tasks.support_x[t])))
    mf.MAML(model, loss="mse", lr=0.1, steps=2, bn="running").backward(tasks)
    torch.testing.assert_close(model[2].running_mean, 0.1 * torch.cat(hidden).mean(0))


def test_a_rate_that_is_raised_later_is_noticed():
    torch.manual_seed(0)
    model = Call(lambda m, x: m.drop(x), drop=nn.Dropout(0.0)).double()
    learner, tasks = mf.MAML(model, loss="mse", lr=0.1, steps=2), tasks_of()
    learner.backward(tasks)
    assert not learner.program.draws
    model.drop.p = 0.4
    model.zero_grad()
    out = learner.backward(tasks)
    assert_agree(model, out.losses, truth(model, tasks))
