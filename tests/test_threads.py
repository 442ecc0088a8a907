"""Learners give the same bits for any number of threads: in what C++ computes and in what PyTorch does around it."""

from __future__ import annotations

import os
import subprocess
import sys

import models
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from setups import SETUPS, Setup, images, make_learner, make_tasks, vectors
from torch import nn

import metafast as mf
from metafast.executors import CpuExecutor
from metafast.program.one_thread import one_thread

pytestmark = pytest.mark.skipif(not CpuExecutor.isas(), reason="metafast._C is not built")

THREADS = (1, 2, 3)
CLASSES = 17


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def focal(outputs, targets):
    p = torch.softmax(outputs, -1)
    taken = p.gather(1, targets[:, None])
    return -((1 - taken) ** 1.7 * torch.log(taken)).mean()


def competing(outputs, targets):
    """A softmax over samples, and functions that PyTorch rounds otherwise at the ends of vectors."""
    shares = torch.softmax(outputs, 0) * F.softplus(outputs) + torch.sigmoid(outputs) / torch.cosh(0.1 * outputs)
    return shares.sum() + F.cross_entropy(outputs, targets, label_smoothing=0.1)


def squared(outputs, targets):
    return torch.cosh(0.1 * (outputs - targets)).mean()


def wide():
    """More parameters than PyTorch gives to one thread."""
    return models.mlp(widths=(3, 170, 190, CLASSES))


def narrow_classifier():
    return models.mlp(widths=(3, 6, 5, CLASSES))


def classifier(name, model=wide, loss=None, **options):
    rest = {k: options.pop(k) for k in ("learner", "ragged", "support") if k in options}
    return Setup(name, model, classes=CLASSES, loss=loss, options={"steps": 2, **options}, **rest)


def rate(*per):
    return mf.Rate((0.02, 0.1), per, learn=True)


def normalised():
    """Batch norm of the input, and of what threads convolve."""
    return nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(),
        nn.Linear(252, 3),
    )  # fmt: skip


def narrow():
    """Batch norm of one feature: its mean is a single sum."""
    return nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1), nn.Tanh(), nn.Linear(1, 2))


# What PyTorch hands to several threads, each with its numbers of tasks and of queries.
LARGE = [
    (classifier("a rate for each layer and step", lr=rate("layer", "step"), steps=3), 3, 4),
    (classifier("a rate for each layer", lr=rate("layer")), 3, 4),
    (classifier("MAML++", learner=mf.MAMLPlusPlus, lr=0.05, steps=3), 3, 4),
    (classifier("a rate for each parameter and step", lr=rate("parameter", "step")), 3, 4),
    (classifier("Reptile", learner=mf.Reptile, optimizer="adam", batch_size=3), 3, 4),
    (classifier("softmax", narrow_classifier, focal), 16, 130),
    (classifier("softmax, a rate for each step", narrow_classifier, focal, lr=rate("step")), 16, 130),
    (classifier("softmax over samples", narrow_classifier, competing, lr=rate("layer")), 16, 130),
    (classifier("softmax, first order", narrow_classifier, competing, first_order=True, lr=rate()), 16, 130),
    (Setup("one sum of all rates", wide, outputs=CLASSES, loss=squared, options={"lr": rate()}), 2, 10),
    (Setup("one sum of a task", narrow_classifier, outputs=CLASSES, loss=squared), 1, 4000),
    (images("running statistics", normalised, bn="running", support=40), 9, 5),
    (vectors("running statistics of one feature", narrow, bn="running", support=50_000), 2, 5),
    (images("running statistics, ragged", normalised, bn="running", support=90, ragged=True), 8, 5),
    (images("running statistics, custom loss", normalised, bn="running", loss=focal, support=40), 9, 5),
]  # fmt: skip
# Tasks that one thread runs in lanes and many run alone, where a weighted sum of losses was once rounded otherwise.
WEIGHTS = {"step_weights": [0.6, 0.2], "steps": 2}
WEIGHTED = [
    Setup("biases adapted", lambda: nn.Linear(2, 2), (2,), options={"adapt": ["bias"], **WEIGHTS}),
    vectors("a weight used twice", models.Tied, **WEIGHTS),
    vectors("a layer called three times, first order", models.Repeated, first_order=True, **WEIGHTS),
]


def everything(setup, dtype, tasks, query, threads, backend="cpu"):
    """All that a learner computes, by name."""
    torch.manual_seed(3)
    learner, batch = make_learner(setup, dtype, backend), make_tasks(setup, tasks, query).to(dtype)
    torch.set_num_threads(threads)
    found = {}

    def add(way, out):
        found[f"{way}: losses"], found[f"{way}: outputs"] = out.losses.detach(), out.outputs
        found.update({f"{way}: {n}": p.grad for n, p in learner.named_parameters() if p.grad is not None})
        learner.zero_grad()

    add("backward", learner.backward(batch))
    if setup.learner is not mf.Reptile:
        out = learner(batch)
        out.loss.backward()
        add("autograd", out)
    adapted = learner.adapt(batch.support_x, batch.support_y, support_mask=batch.support_mask)
    found["adapted"] = torch.cat([value.flatten() for value in adapted.state_dict(0).values()])
    found["predicted"] = adapted(batch.query_x)
    found.update({f"buffer {n}": b.clone() for n, b in learner.named_buffers()})
    assert torch.get_num_threads() == threads
    return found


def assert_same(setup, dtype, tasks, query, threads=THREADS, backend="cpu"):
    once, *others = (everything(setup, dtype, tasks, query, count, backend) for count in threads)
    for count, other in zip(threads[1:], others, strict=True):
        assert other.keys() == once.keys()
        for name, value in once.items():
            same = value.detach().numpy().tobytes() == other[name].detach().numpy().tobytes()
            assert same, f"{name}: {count} threads give other bits than {threads[0]}"


def runs_natively(setup):
    """Whether the C++ executor runs it."""
    learner = make_learner(setup, backend="auto")
    return learner.explain(make_tasks(setup).support_x.double()).startswith("executor: cpu")


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_every_learner(setup):
    if not runs_natively(setup):
        pytest.skip("the reference executor runs it")
    for dtype in (torch.float32, torch.float64):
        assert_same(setup, dtype, 19, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("setup", "tasks", "query"), LARGE, ids=[str(setup) for setup, *_ in LARGE])
def test_what_pytorch_spreads_over_threads(setup, tasks, query, dtype):
    assert_same(setup, dtype, tasks, query)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("isa", CpuExecutor.isas())
@pytest.mark.parametrize("setup", WEIGHTED, ids=str)
def test_weighted_losses_in_lanes_and_alone(setup, isa, dtype):
    assert_same(setup, dtype, 64, 5, (1, 2, 64), CpuExecutor(isa=isa))


def test_equal_calls_give_equal_rates():
    """Some ways of adding up let threads race: a matter of luck, so it is tried often."""
    setup = classifier("", lr=rate("layer", "step"), steps=3)
    first = everything(setup, torch.float32, 3, 4, 2)["backward: rate.value"]
    for _ in range(8):
        assert torch.equal(everything(setup, torch.float32, 3, 4, 2)["backward: rate.value"], first)


def test_trainings_end_alike(tmp_path):
    ends = []
    for threads in (1, 3):
        out = tmp_path / str(threads)
        options = ["--algorithm", "maml++", "--iterations", "2", "--tasks", "2", "--test-tasks", "4"]
        command = [sys.executable, "-m", "metafast.cli.main", "train", "glyphs-5w1s", "--out", str(out), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run([*command, "--eval-every", "0"], check=True, capture_output=True, env=environment)
        ends.append(load_file(out / "checkpoint.safetensors"))
    for end in ends[1:]:
        assert end.keys() == ends[0].keys()
        for name, value in end.items():
            assert torch.equal(value, ends[0][name]), name


def test_one_thread_is_given_back():
    torch.set_num_threads(3)

    def fail():
        with one_thread():
            raise ValueError(torch.get_num_threads())

    with pytest.raises(ValueError, match="1"):
        fail()
    assert torch.get_num_threads() == 3
