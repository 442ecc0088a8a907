"""Runs a program and says what is wrong with its meta-gradient."""

from __future__ import annotations

import math
import traceback
import warnings

import torch
from fuzz.sample import Sample
from oracle import Oracle, Truth
from setups import rates_by_name

import metafast as mf
from metafast.executors.native.cuda import BlockLimits, CudaExecutor
from metafast.verification.agreement import agreement

EXACT = 1e-8
"""Of the largest gradient. What float64 rounds away in these programs is below 1e-10."""
DIVERGED = 1e6
"""A gradient this large, or infinite, is that of an inner loop that has run away: rounding decides it."""
Answer = tuple[torch.Tensor, dict[str, torch.Tensor]]


def fault(sample: Sample) -> str | None:
    """Says what is wrong; ``None`` where nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _difference(sample)
    except Exception:
        return traceback.format_exc()


def _difference(sample: Sample) -> str | None:
    learner, tasks = make_learner(sample), sample.make_tasks()
    found = _found(sample, learner, tasks)
    truth = _truth(sample, learner, tasks)
    # Parameters that are frozen have no gradient to compare, nor have rates that are not learned.
    wanted = truth.losses, {n: truth.grads[n] for n in found[0][1]}
    for answer in found:
        said = _compared(sample, answer, wanted)
        if said is not None:
            return said
    return None


def _found(sample: Sample, learner: mf.MAML, tasks: mf.TaskBatch) -> list[Answer]:
    """The answers of one call, and for some programs those of autograd; the truth needs no threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(sample.threads)
    try:
        found = [_in_one_call(learner, tasks)]
        # A second call would find running statistics that have moved.
        if sample.seed % 4 == 0 and sample.bn != "running":
            found.append(_by_autograd(learner, tasks))
    finally:
        torch.set_num_threads(before)
    return found


def make_learner(sample: Sample) -> mf.MAML:
    """The learner; an executor that cannot run the program leaves it to ``auto``."""
    model = sample.make_model()
    options = {"loss": sample.make_loss(), "steps": sample.steps, "first_order": sample.first_order, "bn": sample.bn,
               "step_weights": sample.step_weights, "adapt": sample.adapt}  # fmt: skip
    if sample.backend in ("auto", "reference"):
        return mf.MAML(model, lr=sample.make_rate(), backend=sample.backend, **options)
    backend = CudaExecutor(BlockLimits(232448, 132)) if sample.backend == "twin" else sample.backend
    torch.manual_seed(sample.seed)
    learner = mf.MAML(model, lr=sample.make_rate(), backend=backend, **options)
    try:
        learner.backward(sample.make_tasks())
    except RuntimeError as error:
        if "cannot run this model" not in str(error):
            raise
        learner.backend = "auto"
    learner.zero_grad()
    return learner


def _in_one_call(learner: mf.MAML, tasks: mf.TaskBatch) -> Answer:
    learner.zero_grad()
    return learner.backward(tasks).losses, _gradients(learner)


def _by_autograd(learner: mf.MAML, tasks: mf.TaskBatch) -> Answer:
    learner.zero_grad()
    out = learner(tasks)
    out.loss.backward()
    return out.losses.detach(), _gradients(learner)


def _gradients(learner: mf.MAML) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in learner.model.named_parameters() if p.requires_grad}
    named |= {key.replace("/", "."): p for key, p in learner.rows.items() if p.requires_grad}
    named |= {"rate": learner.rate.value} if learner.rate.value.requires_grad else {}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}


def _truth(sample: Sample, learner: mf.MAML, tasks: mf.TaskBatch) -> Truth:
    model = learner.model
    adapted = [n for n, p in model.named_parameters() if p.requires_grad] if sample.adapt is None else sample.adapt
    oracle = Oracle(
        model, sample.make_loss(), sample.steps, adapted=adapted, first_order=sample.first_order,
        weights=sample.step_weights, bn=sample.bn or "task",
    )  # fmt: skip
    for key, row in learner.rows.items():
        oracle.parameters[key.replace("/", ".")] = row.detach().double().requires_grad_()
    leaf = learner.rate.value.detach().double().requires_grad_()
    return oracle.gradient(tasks, rates_by_name(oracle, leaf, learner), rate=leaf)


def _compared(sample: Sample, answer: Answer, wanted: Answer) -> str | None:
    largest = float(torch.stack([g.abs().max() for g in wanted[1].values()]).max())  # not a number, where one is
    if not largest < DIVERGED:
        return None
    if sample.dtype == "float32":
        as_arrays = [
            (a[0].double().numpy(), {n: g.double().numpy() for n, g in a[1].items()}) for a in (answer, wanted)
        ]
        if largest < 1e-6:
            return None  # nothing but rounding
        seen = agreement(*as_arrays)
        return None if seen.agrees else str(seen)
    off = {n: float((answer[1][n] - g).abs().max()) / max(largest, 1e-6) for n, g in wanted[1].items()}
    off["the losses"] = float((answer[0] - wanted[0]).abs().max()) / max(float(wanted[0].abs().max()), 1e-6)
    worst = max(off, key=lambda name: math.inf if math.isnan(off[name]) else off[name])
    return None if off[worst] <= EXACT else f"{worst} is off by {off[worst]:.1e} of the largest gradient"
