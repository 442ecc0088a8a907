"""The learners against plain torch loops, and what a user does with them."""

from __future__ import annotations

import copy

import models
import pytest
import torch
import torch.nn.functional as F
from setups import IMAGE, SETUPS, Setup, classification, grads, make_learner, make_tasks, perceptron, regression
from torch import nn
from torch.func import functional_call

import metafast as mf
from metafast.episodes import SinusoidSampler


def test_the_loss_keeps_its_graph_where_it_is_read_first_without_gradients():
    learner, tasks = mf.MAML(perceptron(), loss="mse", lr=0.1), regression()
    learner(tasks).loss.backward()
    expected = grads(learner)
    learner.zero_grad()
    out = learner(tasks)
    with torch.no_grad():
        assert out.loss == out.losses.mean()
    out.loss.backward()
    assert all(map(torch.equal, grads(learner), expected))
    with torch.no_grad():
        assert not learner(tasks).loss.requires_grad


def test_first_order_is_a_setting_that_can_be_changed():
    model, tasks = perceptron(), regression()
    first, second = mf.FOMAML(model, loss="mse", lr=0.1, steps=3), mf.MAML(model, loss="mse", lr=0.1, steps=3)
    first.backward(tasks)
    expected = grads(first)
    first.zero_grad()
    second.backward(tasks)
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(grads(second), expected, strict=True)) > 0.05
    second.zero_grad()
    second.first_order = True
    second.backward(tasks)
    torch.testing.assert_close(grads(second), expected, rtol=1e-12, atol=1e-14)


def test_meta_sgd_learns_a_rate_for_every_parameter():
    learner = mf.MetaSGD(perceptron(), loss="mse", lr=(0.02, 0.06), steps=2)
    rate = learner.rate.value
    size = sum(p.numel() for p in learner.model.parameters())
    assert rate.shape == (1, size)
    assert any(p is rate for p in learner.parameters())
    assert 0.02 <= float(rate.detach().min()) < float(rate.detach().max()) <= 0.06
    before = rate.detach().clone()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    learner.backward(regression())
    optimizer.step()
    assert int((rate != before).sum()) > size // 2


@pytest.mark.parametrize(
    ("per", "shape"),
    [
        ((), (1, 1)), ("step", (3, 1)), ("layer", (1, 3)), (("layer", "step"), (3, 3)), ("parameter", (1, 71)),
        (["parameter", "step"], (3, 71)),
    ],
)  # fmt: skip
def test_rates_have_the_shape_that_was_asked_for(per, shape):
    learner = mf.MAML(perceptron(), loss="mse", lr=mf.Rate(0.1, per, learn=True), steps=3)
    assert learner.rate.value.shape == shape
    assert learner.rate.value.dtype == torch.float64
    with torch.no_grad():
        learner.rate.value.copy_(torch.arange(1, 1 + learner.rate.value.numel()).reshape(shape))
    rows = learner.rate()
    if shape[1] == 3:  # three Linear layers of 3*6+6, 6*5+5 and 5*2+2 elements
        assert rows[0].tolist() == [1.0] * 24 + [2.0] * 35 + [3.0] * 12
    fixed = mf.MAML(perceptron(), loss="mse", lr=mf.Rate(0.1, per), steps=3)
    assert len(list(fixed.parameters())) == 6
    assert torch.equal(fixed.rate.value, torch.full(shape, 0.1, dtype=torch.float64))


@pytest.mark.parametrize("head", ["classifier", ["classifier.weight", "classifier.bias"], "module"])
def test_anil_moves_the_head_alone(head):
    model, tasks = models.Embedded().double(), classification()
    learner = mf.ANIL(model, loss="cross_entropy", lr=0.1, steps=2, head=model.classifier if head == "module" else head)
    adapted = learner.adapt(tasks.support_x, tasks.support_y).state_dict(1)
    for name, before in model.named_parameters():
        assert torch.equal(adapted[name], before.detach()) != name.startswith("classifier")
    learner.backward(tasks)
    assert all(float(p.grad.norm()) > 0 for n, p in model.named_parameters() if n != "body.0.bias")


def test_the_gradient_of_a_rate_for_each_layer_has_the_same_bits_for_any_number_of_threads():
    """Of many parameters, so that threads would divide the sums over them."""
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 7))
    rates = mf.MAML(model, loss="mse", lr=mf.Rate(0.1, ("layer", "step"), learn=True), steps=3).rate
    adjoint, found = torch.randn(3, rates.index.numel()), []
    try:
        for threads in (1, *[2] * 5):
            torch.set_num_threads(threads)
            rates.value.grad = None
            rates().backward(adjoint)
            found.append(rates.value.grad)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(found[0], other) for other in found[1:])
    expected = torch.stack([adjoint[:, rates.index == layer].double().sum(1) for layer in (0, 1)], 1)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-3)


def test_multi_step_weights():
    assert mf.multi_step_weights(0, 5, 10) == pytest.approx([0.2] * 5)
    assert mf.multi_step_weights(5, 5, 10) == pytest.approx([0.1] * 4 + [0.6])
    assert mf.multi_step_weights(10, 5, 10) == pytest.approx([0.006] * 4 + [0.976])
    assert mf.multi_step_weights(99, 5, 10) == pytest.approx([0.006] * 4 + [0.976])
    assert mf.multi_step_weights(3, 1, 10) == pytest.approx([1.0])
    for epoch in range(15):
        assert sum(mf.multi_step_weights(epoch, 4, 12)) == pytest.approx(1.0)


def test_maml_plus_plus_is_its_settings():
    learner = mf.MAMLPlusPlus(
        models.convnet().double(), loss="cross_entropy", lr=0.1, steps=3, multi_step_epochs=4, second_order_from=2
    )
    learner.prepare(classification())
    assert learner.rate.value.shape == (3, 5)  # two convolutions, two norms and the head
    assert {k: tuple(p.shape) for k, p in learner.rows.items()} == {
        "1/weight": (4, 4), "1/bias": (4, 4), "5/weight": (4, 3), "5/bias": (4, 3),
    }  # fmt: skip
    assert [p.name for p in learner.program.parameters if not p.adapted] == ["1.weight", "1.bias", "5.weight", "5.bias"]
    assert learner.first_order
    assert learner.step_weights == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    learner.at_epoch(2)
    assert not learner.first_order
    assert learner.step_weights[1:] == pytest.approx(mf.multi_step_weights(2, 3, 4))
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    before = copy.deepcopy(learner.state_dict())
    learner.backward(classification())
    optimizer.step()
    moved = {name for name, value in learner.state_dict().items() if not torch.equal(value, before[name])}
    assert {"rows.1/weight", "rows.5/bias", "rate.value", "model.0.weight"} <= moved
    assert "model.1.weight" not in moved  # its rows take its place


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_adapting_with_another_number_of_steps(steps):
    model, tasks = perceptron(), regression()
    learner = mf.MAML(model, loss="mse", lr=mf.Rate(0.1, "step", learn=True), steps=2)
    with torch.no_grad():
        learner.rate.value.copy_(torch.tensor([[0.1], [0.03]], dtype=torch.float64))
    fast = learner.adapt(tasks.support_x, tasks.support_y, steps=steps)
    for t in range(2):
        theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        for rate in [0.1, 0.03, 0.03, 0.03, 0.03][:steps]:
            loss = F.mse_loss(functional_call(model, theta, (tasks.support_x[t],)), tasks.support_y[t])
            gradients = torch.autograd.grad(loss, list(theta.values()))
            theta = {
                n: (p - rate * g).detach().requires_grad_() for (n, p), g in zip(theta.items(), gradients, strict=True)
            }
        expected = functional_call(model, theta, (tasks.query_x[t],)).detach()
        torch.testing.assert_close(fast(tasks.query_x)[t], expected, rtol=1e-10, atol=1e-12)


def test_adapted_models_go_back_into_the_users_module():
    tasks = classification()
    learner = make_learner(Setup("", models.Embedded, IMAGE, 3, options={"steps": 2, "lr": 0.1}))
    fast = learner.adapt(tasks.support_x, tasks.support_y)
    found = fast(tasks.query_x)
    assert found.shape == (3, 4, 3)
    assert not found.requires_grad
    for t in range(3):
        own = copy.deepcopy(learner.model)
        missing = own.load_state_dict(fast.state_dict(t), strict=False)
        assert not missing.unexpected_keys
        torch.testing.assert_close(own.train()(tasks.query_x[t]).detach(), found[t], rtol=1e-10, atol=1e-11)
    assert torch.equal(learner(tasks).outputs, found)


@pytest.mark.parametrize(
    "setup", [s for s in SETUPS if s.name in ("Meta-SGD", "MAML++", "batch norm running")], ids=str
)
def test_state_dict_round_trip(setup):
    tasks = make_tasks(setup).to(torch.float64)
    learner = make_learner(setup)
    torch.manual_seed(5)
    other = make_learner(setup)
    assert not torch.equal(other(tasks).losses, learner(tasks).losses)
    other.load_state_dict(learner.state_dict())
    with torch.no_grad():
        assert torch.equal(other(tasks).losses, learner(tasks).losses)
    assert {f"model.{name}" for name in learner.model.state_dict()} <= set(learner.state_dict())


@pytest.mark.parametrize("bn", ["task", "per_step", "frozen", "running"])
def test_moving_between_dtypes(bn):
    """Buffers and rates move too, and running statistics go on moving in the module after it."""
    setup = Setup(
        "", models.convnet, IMAGE, 3, options={"steps": 2, "bn": bn, "lr": mf.Rate(0.05, "layer", learn=True)}
    )
    tasks = make_tasks(setup)
    learner = make_learner(setup, torch.float32)
    reference = copy.deepcopy(learner).double()
    learner.backward(tasks)
    learner.zero_grad()
    learner.load_state_dict(copy.deepcopy(reference).float().state_dict())
    learner.double()
    for current in (learner, reference):
        current.backward(tasks.to(torch.float64))
    for (name, p), q in zip(learner.named_parameters(), reference.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10, msg=name)
    for (name, b), c in zip(learner.named_buffers(), reference.named_buffers(), strict=True):
        torch.testing.assert_close(b, c[1], rtol=1e-9, atol=1e-10, msg=name)
    learner.float()
    before = {name: b.clone() for name, b in learner.model.named_buffers() if "running" in name}
    learner.backward(tasks)
    assert all(torch.equal(b, before[n]) == (bn != "running") for n, b in learner.model.named_buffers() if n in before)


def test_a_module_that_has_changed_is_captured_again():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double().eval()
    learner, tasks = mf.MAML(model, loss="mse", lr=0.1), regression()
    before = learner(tasks).losses
    model[2] = nn.Linear(4, 2).double()
    learner.backward(tasks)
    assert float(model[2].weight.grad.norm()) > 0
    assert not torch.equal(learner(tasks).losses, before)
    learner.train()
    assert not torch.equal(learner(tasks).losses, learner(tasks).losses), "dropout draws anew in each call"
    learner.eval()
    assert not torch.equal(learner(tasks).losses, before)


@pytest.mark.parametrize("adapt", [None, ["0", "2", "4"]])
def test_frozen_parameters_get_no_gradient(adapt):
    """Without ``adapt`` the inner loop leaves them alone from then on; it moves those that ``adapt`` names."""
    setup = Setup("", models.mlp, options={"steps": 3, "adapt": adapt})
    learner, tasks = make_learner(setup), make_tasks(setup).to(torch.float64)
    learner.backward(tasks)
    before = {n: p.grad.clone() for n, p in learner.model.named_parameters()}
    learner.zero_grad()
    learner.model[0].weight.requires_grad_(False)
    if adapt is None:
        fresh = mf.MAML(copy.deepcopy(learner.model), loss="mse", lr=0.05, steps=3)
        fresh.backward(tasks)
        expected = {n: p.grad for n, p in fresh.model.named_parameters()}
        assert not torch.allclose(expected["4.bias"], before["4.bias"])
    else:
        expected = before
    for run in (learner.backward, lambda tasks: learner(tasks).loss.backward()):
        learner.zero_grad()
        run(tasks)
        for name, p in learner.model.named_parameters():
            if name == "0.weight":
                assert p.grad is None
            else:
                torch.testing.assert_close(p.grad, expected[name], rtol=1e-12, atol=1e-14)


def test_nothing_is_recorded_without_need():
    learner, tasks = mf.MAML(perceptron(), loss="mse", lr=0.1), regression()
    with torch.no_grad():
        quiet = learner(tasks)
    recorded = learner(tasks)
    assert not quiet.loss.requires_grad
    assert recorded.loss.requires_grad
    assert recorded.outputs.requires_grad
    assert not quiet.outputs.requires_grad
    assert torch.equal(quiet.losses, recorded.losses)
    assert not learner.backward(tasks).losses.requires_grad


def test_batches_of_any_size_follow_one_another():
    learner = mf.MAML(perceptron(), loss="mse", lr=0.1, steps=2)
    for tasks, support, query in [(4, 6, 5), (1, 6, 5), (4, 1, 5), (4, 6, 1), (7, 3, 2), (4, 6, 5)]:
        batch = regression(tasks, support, query)
        together = learner(batch)
        assert together.losses.shape == (tasks,)
        assert together.outputs.shape == (tasks, query, 2)
        alone = [learner(batch.tasks(slice(t, t + 1))).losses for t in range(tasks)]
        torch.testing.assert_close(together.losses, torch.cat(alone), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_memory_layout_of_a_batch_does_not_matter_and_runs_repeat_to_the_bit(backend):
    setup = Setup("", models.Embedded, IMAGE, 3, options={"steps": 2})
    learner, tasks = make_learner(setup, torch.float32, backend), make_tasks(setup)
    wide = {name: value[:, :, None].expand(*value.shape[:2], 2, *value.shape[2:]) for name, value in vars(tasks).items()
            if isinstance(value, torch.Tensor)}  # fmt: skip
    strided = mf.TaskBatch(
        **{name: value.transpose(0, 1).contiguous().transpose(0, 1)[:, :, 0] for name, value in wide.items()}
    )
    assert not strided.support_x.is_contiguous()
    learner.backward(tasks)
    expected = grads(learner)
    for batch in (tasks, strided):
        learner.zero_grad()
        learner.backward(batch)
        assert all(torch.equal(a, b) for a, b in zip(grads(learner), expected, strict=True))


def test_explain_names_the_executor_and_every_layer():
    learner = mf.ANIL(models.Embedded(), loss="cross_entropy", lr=0.1, head="classifier", backend="reference")
    assert "no batch has been seen" in learner.explain()
    text = learner.explain(torch.randn(2, 5, *IMAGE))
    learner(classification().to(torch.float32))
    assert learner.explain() == text
    lines = text.splitlines()
    assert lines[0] == "executor: reference (backend='reference')"
    layers = ["conv2d", "batch_norm", "relu", "max_pool2d", "flatten", "layer_norm", "linear"]
    assert [line.split()[1] for line in lines[1:-1]] == layers
    assert "76 parameters" in lines[1]
    assert "classifier" in lines[-2]
    assert lines[-1].strip() == "loss: cross_entropy; 75 of 207 parameters are adapted"


def test_explain_says_what_is_derived():
    text = mf.MAML(models.mlp(nn.PReLU), loss="mse", lr=0.1, backend="reference").explain(torch.randn(2, 5, 3))
    assert "PReLU" in text
    assert "differentiated by torch.autograd" in text


def test_meta_training_learns_sinusoids():
    """500 meta-steps: on unseen waves one inner step on 10 points takes the error from above 3 to below 1.2."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    learner = mf.MAML(model, loss="mse", lr=0.01)
    optimizer = torch.optim.Adam(learner.parameters(), lr=5e-3)
    sampler = SinusoidSampler(shots=10, queries=10, tasks=25)
    test = SinusoidSampler(shots=10, queries=50, tasks=200, stream="test").batch(0)
    for step in range(500):
        optimizer.zero_grad()
        learner.backward(sampler.batch(step))
        optimizer.step()
    with torch.no_grad():
        end = float(learner(test).loss)
    unadapted = learner.adapt(test.support_x, test.support_y, steps=0)
    prior = float(F.mse_loss(unadapted(test.query_x), test.query_y))
    assert end < 1.2
    assert prior > 3


def test_the_inner_loop_leaves_parameters_alone_that_need_no_gradient():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    model[0].requires_grad_(False)
    x, y = torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    fast = mf.MAML(model, loss="mse", lr=0.1).adapt(x, y).state_dict(0)
    assert torch.equal(fast["0.weight"], model[0].weight)
    assert not torch.allclose(fast["2.weight"], model[2].weight)


class Centred(nn.Module):
    """Its layer beyond the linear one is derived; with ``mixes`` it reads all samples of the task."""

    def __init__(self, mixes):
        super().__init__()
        self.linear, self.mixes = nn.Linear(3, 2), mixes

    def forward(self, x):
        x = self.linear(x)
        return x - x.mean(0, keepdim=True) if self.mixes else x * torch.softmax(x, 1)


def test_padding_that_would_leak_through_a_derived_layer_is_refused():
    x, y, mask = torch.randn(2, 4, 3), torch.randn(2, 4, 2), torch.ones(2, 4, dtype=torch.bool)
    mask[0, 3] = False
    tasks = mf.TaskBatch(x, y, x, y, mask, mask)
    mf.MAML(Centred(mixes=False), loss="mse", lr=0.1).backward(tasks)
    with pytest.raises(ValueError, match=r"\['sub'\] mixes the samples of a task"):
        mf.MAML(Centred(mixes=True), loss="mse", lr=0.1).backward(tasks)
