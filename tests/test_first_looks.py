"""What a learner finds out once, of the first batch of a kind, holds for all that follow."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from front_door.truth import Unrolled
from torch import nn

import metafast as mf

T, N, M = 3, 5, 7


def batch(n=N, m=M, support_mask=None, query_mask=None):
    generator = torch.Generator().manual_seed(0)
    shapes = ((T, n, 4), (T, n, 3), (T, m, 4), (T, m, 3))
    x, y, qx, qy = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return mf.TaskBatch(x, y, qx, qy, support_mask, query_mask)


def maml(model, **options):
    return mf.MAML(model.double(), **{"loss": "mse", "lr": 0.1, "steps": 2, **options})


def agrees(learner, tasks, **options):
    wanted = Unrolled(learner.model, **{"loss": "mse", "lr": 0.1, "steps": 2, **options}).gradient(tasks)
    learner.zero_grad()
    out = learner.backward(tasks)
    torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-9, atol=1e-12)
    for name, p in learner.model.named_parameters():
        torch.testing.assert_close(p.grad, wanted.grads[name], rtol=1e-8, atol=1e-11)


def plain():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.factor = 1.0


class Mixes(Own):
    def forward(self, x):
        h = self.head(self.body(x))
        return h - h.mean(0)


class Counts(Own):
    def forward(self, x):
        return self.head(self.body(x)) * (10.0 / x.shape[0])


class Spares(Own):
    """Sends no gradient through the body where there are many samples."""

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.shape[0] <= 10):
            h = torch.tanh(self.body(x))
        return self.head(h)


class Scales(Own):
    def forward(self, x):
        return self.head(self.body(x)) * self.factor


class EvenAlone(Own):
    def forward(self, x):
        if x.shape[0] % 2:
            raise ValueError("give pairs")
        return self.head(self.body(x))


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
}


@pytest.mark.filterwarnings("ignore:autocast has no effect")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", ["prepare", "explain"])
def test_a_mode_of_the_caller_s_does_not_stay(mode, call):
    learner = maml(plain())
    with MODES[mode]():
        learner.prepare(batch()) if call == "prepare" else learner.explain(batch().support_x)
    agrees(learner, batch())


def mask(n, padded):
    kept = torch.ones(T, n, dtype=torch.bool)
    kept[1, n - padded :] = False
    return kept


@pytest.mark.parametrize("model", [Mixes, Counts])
@pytest.mark.parametrize("size", [N, M])
def test_padding_is_refused_whatever_the_first_mask_was(model, size):
    learner = maml(model())
    whole = batch(N, size, mask(N, 0), mask(size, 0))
    agrees(learner, whole)
    for masks in ((mask(N, 2), None), (None, mask(size, 3)), (mask(N, 2), mask(size, 3))):
        with pytest.raises(ValueError, match="Use tasks of one size"):
            learner.backward(batch(N, size, *masks))
    with pytest.raises(ValueError, match="Use tasks of one size"):
        learner.adapt(whole.support_x, whole.support_y, support_mask=mask(N, 1))


@pytest.mark.parametrize("size", [N, M])
def test_minibatches_of_reptile_are_computed_as_the_model_computes_them(size):
    model = Counts().double()
    learner = mf.Reptile(model, loss="mse", lr=0.1, steps=1, batch_size=2)
    tasks = batch(m=size)
    learner.backward(tasks)
    chosen = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:2]
    for t in range(T):
        loss = F.mse_loss(model(tasks.support_x[t][chosen]), tasks.support_y[t][chosen])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = p.grad - 0.1 * grad / T
    assert all(float(p.grad.abs().max()) < 1e-12 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_query_sets_are_looked_at_with_their_gradient(dtype):
    model = Spares()
    learner = maml(model)
    learner.to(dtype)
    tasks = batch(m=20).to(dtype)
    wanted = Unrolled(model, loss="mse", lr=0.1, steps=2).gradient(tasks)
    learner.backward(tasks)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted.grads[name], rtol=1e-4, atol=1e-6)


def test_sets_that_a_model_cannot_take_are_no_stand_ins():
    agrees(maml(EvenAlone()), batch(4, 8))


COPIES = {"itself": lambda x: x, "deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("way", COPIES)
def test_adapted_models_stay_what_they_were(way):
    model = Scales()
    learner, tasks = maml(model), batch()
    adapted = learner.adapt(tasks.support_x, tasks.support_y)
    x = torch.randn(T, 9, 4, dtype=torch.float64)
    few = adapted(x[:, :N])
    model.factor = 2.0
    adapted = COPIES[way](adapted)
    assert torch.equal(adapted(x[:, :N]), few)
    with pytest.raises(RuntimeError, match=r"Scales has changed since it was adapted.*9 samples"):
        adapted(x)


def test_adapted_models_keep_the_buffers_that_they_were_made_with():
    model = Counts()
    model.register_buffer("level", torch.ones(1, dtype=torch.float64))
    model.forward = lambda x: model.head(model.body(x)) * model.level * (10.0 / x.shape[0])
    learner, tasks = maml(model), batch()
    adapted = learner.adapt(tasks.support_x, tasks.support_y)
    x = torch.randn(T, 9, 4, dtype=torch.float64)
    before = adapted(x)
    model.level.mul_(3)
    assert torch.equal(adapted(x), before)
    with pytest.raises(RuntimeError, match="8 samples"):
        adapted(x[:, :8])


class Branches(Own):
    def forward(self, x):
        h = self.body(x)
        return self.head(torch.tanh(h) if x.shape[0] <= N else torch.special.erf(h))


def test_adapted_models_find_the_executor_for_another_number_of_samples():
    model = Branches()
    learner, tasks = maml(model, steps=1), batch(m=N)
    adapted = learner.adapt(tasks.support_x, tasks.support_y)
    x = torch.randn(T, 9, 4, dtype=torch.float64)
    task = adapted.state_dict(1)
    torch.testing.assert_close(adapted(x)[1], torch.func.functional_call(model, task, (x[1],)))


class Averages(Own):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean.mul_(0.5).add_(0.5 * x.detach().mean(0))
        return self.head(self.body(x - self.mean))


def test_a_compiled_graph_refuses_a_model_that_changes_what_it_reads():
    learner = maml(Averages())
    compiled = torch.compile(lambda tasks: learner(tasks).loss, backend="eager")
    with pytest.raises(RuntimeError, match="call the learner uncompiled"):
        compiled(batch())
    learner.eval()
    torch.testing.assert_close(compiled(batch()), learner(batch()).loss)


class Keeps(Own):
    calls, kept = 0, None

    def forward(self, x):
        self.kept, self.calls = self.body(x), self.calls + 1
        return self.head(self.kept)


def test_compiling_leaves_nothing_in_the_model():
    model = Keeps()
    learner = maml(model).eval()
    torch.compile(lambda tasks: learner(tasks).loss, backend="eager")(batch())
    assert (model.calls, model.kept) == (0, None)
