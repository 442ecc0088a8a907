"""torch's transforms around a learner: torch.func, autocast, DistributedDataParallel."""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_outside_gradients import LR, STEPS, Scaled, convnet, data, gradients, labels, mlp, unrolled
from torch.func import functional_call
from transforms import Cosine, close, left_behind, make

import metafast as mf
from metafast.inner import autocast

# torch.func


def functional(learner, tasks, **options):
    """The parameters by name, and the learner's loss as a function of them."""
    parameters = {name: p.detach().clone() for name, p in learner.named_parameters()}
    return parameters, lambda named: functional_call(learner, named, (tasks,), options).loss


@pytest.mark.parametrize("seen", [False, True], ids=["new", "seen"])
@pytest.mark.parametrize("build", [mlp, convnet, Cosine])
def test_torch_func_takes_gradients_of_a_learner(build, seen):
    (x, qx), (y, qy) = data(1, 4, 4) if build is convnet else data(4), labels()
    model, learner, tasks = make(build(), mf.TaskBatch(x, y, qx, qy))
    if seen:
        learner(tasks)
        program = learner.program
    parameters, loss = functional(learner, tasks)
    losses, _ = unrolled(model, F.cross_entropy, tasks)
    wanted = dict(zip(parameters, gradients(losses.mean(), list(model.parameters())), strict=True))
    found = torch.func.grad(loss)(parameters)
    value, pull = torch.func.vjp(loss, parameters)
    (pulled,) = pull(torch.full_like(value, 2.0))
    for name, want in wanted.items():
        close([found[name], pulled[name]], [want, 2 * want])
    # For the time of a call other parameters stood in the places of the module's.
    assert not seen or learner.program is program
    own = list(model.parameters())
    close(left_behind(learner(tasks).loss, own), list(wanted.values()))


def test_torch_func_sees_the_parameters_that_it_is_given_and_not_those_of_the_module():
    model, learner, tasks = make(loss=Scaled())
    learner(tasks)
    parameters, loss = functional(learner, tasks)
    parameters = {name: 0.5 * p for name, p in parameters.items()}
    found = torch.func.grad(loss)(parameters)
    with torch.no_grad():
        for name, p in learner.named_parameters():
            p.copy_(parameters[name])
    losses, _ = unrolled(model, learner.loss_modules[0], tasks)
    wanted = gradients(losses.mean(), list(learner.parameters()))
    close([found[name] for name, _ in learner.named_parameters()], wanted)


@pytest.mark.parametrize("name", ["support_x", "query_x"])
@pytest.mark.parametrize("build", [mlp, Cosine])
def test_torch_func_takes_gradients_in_inputs(name, build):
    model, learner, tasks = make(build())

    def batch(value):
        return mf.TaskBatch(**{**vars(tasks), name: value})

    found = torch.func.grad(lambda value: learner(batch(value)).loss)(getattr(tasks, name))
    leaf = getattr(tasks, name).clone().requires_grad_()
    losses, _ = unrolled(model, F.cross_entropy, batch(leaf))
    close([found], gradients(losses.mean(), [leaf]))


@pytest.mark.parametrize("name", ["loss_modules.0.scale", "loss_modules.1.shift", "model.0.weight"])
def test_torch_func_takes_gradients_in_some_parameters_under_learned_losses(name):
    """The others are given too, and are not those of the modules."""
    _, learner, tasks = make(loss=Scaled(), query_loss=Scaled())
    parameters = {n: 0.7 * p.detach() for n, p in learner.named_parameters()}
    found = torch.func.grad(
        lambda value: functional_call(learner, {**parameters, name: value}, (tasks,)).loss
    )(parameters[name])  # fmt: skip
    with torch.no_grad():
        for n, p in learner.named_parameters():
            p.copy_(parameters[n])
    _, outputs = unrolled(learner.model, learner.loss_modules[0], tasks)
    loss = torch.stack(list(map(learner.loss_modules[1], outputs, tasks.query_y))).mean()
    close([found], gradients(loss, [dict(learner.named_parameters())[name]]))


def test_a_layer_that_is_frozen_after_a_transform_is_noticed():
    model, learner, tasks = make()
    parameters, loss = functional(learner, tasks)
    torch.func.grad(loss)(parameters)
    model[0].weight.requires_grad_(False)
    losses, _ = unrolled(model, F.cross_entropy, tasks, moved=["0.bias", "2.weight", "2.bias"])
    close([learner(tasks).losses.detach()], [losses.detach()])


def test_torch_func_has_every_order_through_create_graph():
    model, learner, tasks = make()
    parameters, loss = functional(learner, tasks, create_graph=True)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, found = torch.func.jvp(torch.func.grad(loss), (parameters,), (direction,))
    losses, _ = unrolled(model, F.cross_entropy, tasks)
    first = torch.autograd.grad(losses.mean(), list(model.parameters()), create_graph=True)
    along = sum((g * d).sum() for g, d in zip(first, direction.values(), strict=True))
    close(found.values(), gradients(along, list(model.parameters())))


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (lambda loss, p: torch.func.jvp(loss, (p,), (p,)), "no derivative in forward mode.*create_graph=True"),
        (lambda loss, p: torch.func.grad(lambda q: sum(g.sum() for g in torch.func.grad(loss)(q).values()))(p),
         "differentiated once.*create_graph=True"),
        (lambda loss, p: torch.func.vmap(loss)({n: t.expand(2, *t.shape) for n, t in p.items()}),
         "cannot be mapped over a further axis"),
        (lambda loss, p: torch.func.jacrev(lambda q: loss(q) * torch.ones(2, dtype=torch.float64))(p),
         "cannot be mapped over a further axis"),
    ],
    ids=["jvp", "grad of grad", "vmap", "jacrev"],
)  # fmt: skip
def test_other_transforms_are_refused_in_words(transform, words):
    _, learner, tasks = make()
    parameters, loss = functional(learner, tasks)
    with pytest.raises(RuntimeError, match=words):
        transform(loss, parameters)
    assert not learner(tasks).losses.isnan().any()


def test_what_torch_func_cannot_record_is_refused_in_words():
    class Constant(Cosine):
        def forward(self, x):
            with torch.no_grad():
                shift = self.body(x)
            return F.linear(F.normalize(self.body(x) + shift, dim=-1) * shift.sin(), self.head)

    _, learner, tasks = make(Constant())
    learner.backward(tasks)
    parameters, loss = functional(learner, tasks, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivatives of first order alone.*use torch.autograd.grad"):
        torch.func.grad(loss)(parameters)


def test_running_statistics_move_under_a_transform():
    (x, qx), (y, qy) = data(1, 4, 4), labels()
    tasks = mf.TaskBatch(x, y, qx, qy)
    learner = make(convnet(), tasks, bn="running")[1]
    other = copy.deepcopy(learner)
    parameters, loss = functional(learner, tasks)
    torch.func.grad(loss)(parameters)
    other.backward(tasks)
    close(learner.model[1].buffers(), other.model[1].buffers())


# autocast


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("way", ["backward", "forward", "create_graph", "reptile"])
def test_autocast_around_a_call_changes_nothing_and_is_said_once(way, backend, monkeypatch):
    monkeypatch.setattr(autocast, "_say_once", autocast._say_once.__wrapped__)
    (x, qx), (y, qy) = data(4), labels()
    tasks = mf.TaskBatch(x, y, qx, qy).to(torch.float32)
    model = mlp().float()
    kind = mf.Reptile if way == "reptile" else mf.MAML
    learner = kind(model, loss="cross_entropy", lr=LR, steps=STEPS, backend=backend)

    def run(around):
        learner.zero_grad()
        with around:
            if way in ("backward", "reptile"):
                out = learner.backward(tasks)
            else:
                out = learner(tasks, create_graph=way == "create_graph")
            if way == "forward":
                out.loss.backward()
            adapted = learner.adapt(x.float(), y)(qx.float())
        if way == "create_graph":
            out.loss.backward()  # of recorded operations torch wants it outside
        return [out.losses.detach(), adapted, *(p.grad for p in model.parameters())]

    with pytest.warns(UserWarning, match="autocast has no effect inside"):
        under = run(torch.autocast("cpu", torch.bfloat16))
    assert all(map(torch.equal, under, run(contextlib.nullcontext())))
    assert all(t.dtype == torch.float32 for t in under)


def test_autocast_is_said_once_a_process():
    autocast._say_once.cache_clear()
    _, learner, tasks = make()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match="in the dtype of the parameters"):
            learner(tasks)
        learner(tasks)  # a second warning would be an error


# DistributedDataParallel

WORKER = """
import os, sys
import torch, torch.distributed as dist
import metafast as mf
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, os.environ["TESTS"])
from test_outside_gradients import convnet
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
kind = {"maml": lambda m: mf.MAML(m, loss="cross_entropy", lr=mf.Rate(0.1, "layer", learn=True), steps=2),
        "maml++": lambda m: mf.MAMLPlusPlus(m, loss="cross_entropy", lr=0.1, steps=2)}[sys.argv[1]]
learner = kind(convnet())
alone = kind(convnet())
alone.load_state_dict(learner.state_dict())
D = lambda *s: torch.randn(*s, dtype=torch.float64)
tasks = mf.TaskBatch(D(4, 6, 1, 4, 4), torch.randint(0, 3, (4, 6)), D(4, 5, 1, 4, 4), torch.randint(0, 3, (4, 5)))
for _ in range(2):
    alone.backward(tasks)
model = DistributedDataParallel(learner, find_unused_parameters=True)
share = 4 // world
for _ in range(2):
    model(tasks.tasks(slice(rank * share, (rank + 1) * share))).loss.backward()
pairs = list(zip(learner.named_parameters(), alone.parameters()))
assert sum(p.grad is not None for _, p in pairs) > 3
for (name, p), q in pairs:
    if q.grad is not None:
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11, msg=name)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["maml", "maml++"])
@pytest.mark.parametrize("world", [1, 2])
def test_data_parallel_learners_have_the_gradient_of_the_whole_batch(world, kind, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    tests = str(Path(__file__).parent)
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    common |= {"OMP_NUM_THREADS": "1", "TESTS": tests}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, str(script), kind]
    workers = [subprocess.Popen(command, env={**common, "RANK": str(rank)}, **pipes) for rank in range(world)]
    try:
        said = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * world, "\n".join(said)
