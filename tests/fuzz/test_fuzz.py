"""Random programs by fixed seeds, and the programs that earlier versions got wrong."""

from __future__ import annotations

import pytest
import torch
from fuzz.check import fault, make_learner
from fuzz.draw import draw
from fuzz.findings import FINDINGS
from fuzz.networks import DERIVED, NATIVE
from fuzz.run import main
from fuzz.sample import Sample

import metafast as mf

SEEDS = range(300)


@pytest.mark.parametrize("first", SEEDS[::20])
def test_random_programs(first):
    faults = []
    for seed in SEEDS[first : first + 20]:
        sample = draw(seed)
        said = fault(sample)
        if said is not None:
            faults.append(f"seed {seed}: {said}\n{sample}")
    assert not faults, "\n\n".join(faults)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", FINDINGS)
def test_what_was_found(name, backend):
    said = fault(FINDINGS[name].with_settings(backend=backend))
    assert said is None, said


@pytest.mark.parametrize("name", [name for name, sample in FINDINGS.items() if sample.backend == "twin"])
def test_what_was_found_on_the_twin(name):
    said = fault(FINDINGS[name])
    assert said is None, said


def test_the_seeds_draw_every_kind():
    samples = [draw(seed) for seed in SEEDS]
    models = " ".join(sample.model for sample in samples)
    parts = ("Conv2d", "BatchNorm1d", "BatchNorm2d", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "LayerNorm",
             "GroupNorm", "InstanceNorm2d", "Residual", "Twice", "Tied", "Frozen", "Gate", "Cosine", "Shifted", "SumOf",
             "inplace=True", "groups=3", "dilation=2", "ceil_mode=True")  # fmt: skip
    for part in (*NATIVE, *DERIVED, *parts):
        assert part in models, part
    for field in ("steps", "bn", "backend", "dtype", "threads", "first_order", "ragged", "classes", "loss", "rate"):
        assert len({getattr(sample, field) for sample in samples}) > 1, field
    assert {sample.steps for sample in samples} == {1, 2, 3, 4, 5, 6}
    assert {sample.tasks for sample in samples} >= {1, 86} or max(sample.tasks for sample in samples) > 60
    for field in ("adapt", "frozen", "step_weights"):
        assert sum(bool(getattr(sample, field)) for sample in samples) > 20, field


def test_a_wrong_gradient_is_a_fault_with_what_makes_it_again(monkeypatch, capsys):
    """The rate of the learner is off by a hundredth of a per cent, and in float32 by ten per cent."""
    for dtype, factor in (("float64", 1.0001), ("float32", 1.1)):
        sample = Sample("nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))", (3,), 2, steps=3, dtype=dtype)
        assert fault(sample) is None
        monkeypatch.setattr("fuzz.check._in_one_call", lambda learner, tasks, by=factor: _scaled(learner, tasks, by))
        assert fault(sample) is not None
        monkeypatch.undo()
    monkeypatch.setattr("fuzz.run.fault", lambda sample: "0.weight is off")
    assert main(["--count", "5", "--most", "1", "--seed", "7"]) == 1
    printed = capsys.readouterr().out
    assert "seed 7: 0.weight is off\nfrom fuzz.check import fault" in printed
    assert "1 programs, 1 with a fault" in printed


def _scaled(learner, tasks, factor):
    learner.zero_grad()
    losses = learner.backward(tasks).losses
    grads = {name: p.grad.clone() for name, p in learner.model.named_parameters()}
    return losses, {**grads, "2.bias": grads["2.bias"] * factor}


def test_the_printed_lines_make_the_sample_again(capsys):
    """Run as they stand, from the tests' folder, they say that nothing is wrong."""
    exec(str(draw(3)), {})
    assert capsys.readouterr().out == "None\n"


def test_a_rate_for_each_layer_has_one_gradient_on_any_number_of_threads():
    """Its sum goes over more than 32,768 elements, where torch's own adds from several threads at once."""
    sample = Sample("nn.Sequential(nn.Linear(64, 130), nn.ReLU(), nn.Linear(130, 5))", (64,), 5, tasks=2, steps=4,
                    rate="mf.Rate(0.02, ('layer', 'step'), learn=True)", dtype="float32")  # fmt: skip
    learner, tasks = make_learner(sample), sample.make_tasks()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 2, 3):
            torch.set_num_threads(threads)
            learner.zero_grad()
            learner.backward(tasks)
            found.append(learner.rate.value.grad.clone())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(grad, found[0]) for grad in found)


def test_backward_under_no_grad_gives_every_gradient():
    sample = Sample("nn.Linear(3, 2)", (3,), 2, steps=2, rate="mf.Rate(0.05, ('layer', 'step'), learn=True)")
    learner, tasks = make_learner(sample), sample.make_tasks()
    learner.backward(tasks)
    plain = [p.grad.clone() for p in learner.parameters()]
    learner.zero_grad()
    with torch.no_grad():
        learner.backward(tasks)
    assert all(torch.equal(p.grad, g) for p, g in zip(learner.parameters(), plain, strict=True))


def test_losses_have_the_same_bits_on_any_number_of_threads():
    sample = FINDINGS["many tasks with weights of steps and a bias alone"]
    learner, tasks = make_learner(sample), sample.make_tasks()
    before, losses = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            losses.append(learner.backward(tasks).losses)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found, losses[0]) for found in losses)


def test_a_tied_weight_may_be_adapted_by_its_other_name():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).double()
    model[1].weight = model[0].weight
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    tasks = mf.TaskBatch(x, x.sin(), x.cos(), x)
    grads = []
    for adapt in (["1"], ["0.weight", "1.bias"]):
        model.zero_grad()
        mf.MAML(model, loss="mse", lr=0.1, adapt=adapt).backward(tasks)
        grads.append(model[0].weight.grad)
    assert torch.allclose(*grads, rtol=1e-12)
