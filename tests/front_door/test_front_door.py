"""What a module computes is what metafast computes, or it says so."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import replace

import pytest
import torch
from front_door import calls, changes, contexts, layers, modules, parameters, refusals, shapes, values
from front_door.case import no_leaves
from front_door.truth import Unrolled
from torch import Tensor

import metafast as mf

FILES = (contexts, modules, parameters, shapes, values, layers, changes, calls, refusals)
CASES = [case for file in FILES for case in file.CASES]
# Cases that are right and that metafast does not serve yet, with what they wait for.
# What machinery says that no user has asked for, and what Python says when nobody has looked.
INTERNAL = (
    r"\bvmap\b|functorch|\bfx\b|\bexport(ed)?\b|Proxy|aten::|Could not guard|Batching rule|setup_context|NoneType|"
    r"has no attribute|FakeTensor|__torch_dispatch__"
)
REFUSALS = (mf.CaptureError, ValueError, TypeError, RuntimeError)
RAW = (KeyError, AttributeError, NameError, IndexError, AssertionError, RecursionError)


def test_every_case_has_a_name_of_its_own():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) > 190


def made(case):
    """The module of a case with its parameters and buffers in its dtype, its batch and its learner."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = case.make().to(case.dtype)
    tasks = case.tasks()
    tasks = tasks if case.dtype == torch.float64 else tasks.to(case.dtype)
    return model, tasks, case.make_learner(model)


def gradients(model, leaves) -> dict[str, Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad} | leaves
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}


def forget(model, leaves):
    for tensor in [*model.parameters(), *leaves.values()]:
        tensor.grad = None


def difference(loss, found, truth) -> tuple[str, float]:
    """What differs most, where it is more than a tolerance allows; relative to the largest gradient."""
    largest = max(float(g.abs().max()) for g in truth.grads.values())
    assert largest > 1e-6, "a gradient of nearly zero tests nothing"
    off = {n: float((found[n] - g).abs().max()) / largest for n, g in truth.grads.items()}
    off["the loss"] = abs(float(loss) - float(truth.loss)) / abs(float(truth.loss))
    worst = max(off, key=lambda name: off[name] if off[name] == off[name] else float("inf"))
    return worst, off[worst]


def check_words(error) -> None:
    """An error is metafast's own, and speaks of what the user wrote."""
    assert not isinstance(error, RAW), repr(error)
    assert not re.search(INTERNAL, str(error)), repr(error)


def learn(case) -> None:
    model, tasks, learner = made(case)
    learner.backward(tasks)
    if case.change is not None:
        case.change(model, learner, tasks)
        learner.backward(tasks)


@pytest.mark.filterwarnings("ignore")  # of what torch warns, the module is the cause
@pytest.mark.parametrize("case", [case for case in CASES if case.refused is None], ids=str)
def test_the_gradient_is_that_of_the_module(case):
    try:
        model, tasks, learner = made(case)
        if case.change is not None:
            learner.backward(tasks)
            case.change(model, learner, tasks)
        leaves = case.leaves(model, tasks)
        for one_call in (False, True):
            truth = truth_of(case, model, tasks)
            forget(model, leaves)
            # What lies outside of the parameters gets its gradient by autograd.
            out = learner.backward(tasks) if one_call and not leaves else learner(tasks)
            if out.loss.requires_grad:
                out.loss.backward()
            worst, off = difference(out.loss.detach(), gradients(model, leaves), truth)
            assert off <= case.tolerance, f"{worst} is off by {off:.1e} of the largest gradient"
    except REFUSALS as error:
        if not case.may_be_refused:
            raise
        check_words(error)


def truth_of(case, model, tasks):
    """The truth at the settings of the case; the module is left as it is."""
    settings = {"loss": case.loss, "lr": case.lr, "steps": case.steps, **case.truth}
    before = {n: b.clone() for n, b in model.named_buffers()}
    plain = model if case.plain is None else case.plain(model)
    truth = Unrolled(plain, **settings).gradient(tasks, **case.leaves(model, tasks))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert all(bool(g.isfinite().all()) for g in truth.grads.values())
    return truth


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for case in CASES if case.refused is not None], ids=str)
def test_what_has_no_right_answer_is_refused_in_words(case):
    with pytest.raises(REFUSALS) as caught:
        learn(case)
    said = str(caught.value)
    check_words(caught.value)
    for part in case.refused:
        assert part in said, said


IN_FLOAT32 = [
    case for case in CASES
    if case.refused is None and case.dtype == torch.float64 and case.leaves is no_leaves and
    "autocast" not in case.name
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", IN_FLOAT32, ids=str)
def test_float32_is_served_too(case):
    """The second look does not take rounding for a difference. Modules draw their parameters in float32, so that the
    truth of float64 is that of the same model; a value on the edge of a jump would be off by far more than rounding."""
    model, tasks, learner = made(case)
    if case.change is not None:
        learner.backward(tasks)
        case.change(model, learner, tasks)
    truth = truth_of(case, model, tasks)
    model, tasks, learner = made(replace(case, dtype=torch.float32))
    try:
        if case.change is not None:
            learner.backward(tasks)
            case.change(model, learner, tasks)
            forget(model, {})
        loss = learner.backward(tasks).loss
    except REFUSALS as error:
        if not case.may_be_refused:
            raise
        check_words(error)
        return
    worst, off = difference(loss.double(), {n: g.double() for n, g in gradients(model, {}).items()}, truth)
    assert off <= 2e-3, f"{worst} is off by {off:.1e} of the largest gradient"


WRITES = ("a running mean updated in forward", "a buffer assigned in forward", "a call counter in a buffer",
          "spectral norm that iterates in forward", "BatchNorm in training", "BatchNorm in evaluation",
          "BatchNorm with a cumulative average")  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("one_call", [True, False])
@pytest.mark.parametrize("case", [case for case in CASES if case.name in WRITES], ids=str)
def test_forward_writes_as_one_call_of_the_module_does(case, one_call):
    """Tasks run side by side, so that a learner's call counts once: on the support set of the first task."""
    model, tasks, learner = made(case)
    for _ in range(2):
        twin = copy.deepcopy(model)
        twin(tasks.support_x[0])
        if one_call:
            learner.backward(tasks)
        else:
            learner(tasks).loss.backward()
        found, expected = dict(model.named_buffers()), dict(twin.named_buffers())
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[n], b, rtol=1e-12) for n, b in expected.items())
        assert not any(b.requires_grad for b in found.values())


def test_a_wrong_gradient_would_be_found():
    """Against the truth of another module, of first order, and of another rate."""
    case = next(case for case in CASES if case.name == "regression")
    model, tasks, _ = made(case)
    right = truth_of(case, model, tasks)
    settings = {"model": model, "loss": case.loss, "lr": case.lr, "steps": case.steps}
    for wrong in ({"first_order": True}, {"lr": 1.0001 * case.lr}, {"steps": 3}, {"moved": ["0.weight"]}):
        other = Unrolled(**{**settings, **wrong}).gradient(tasks)
        assert difference(other.loss, other.grads, right)[1] > 100 * case.tolerance
