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
from metafast.verification.agreement import Agreement, agreement

EXACT = 1e-8
"""Of the largest gradient. What float64 rounds away in these programs is below 1e-10."""
DIVERGED = 1e6
"""A gradient this large, or infinite, is that of an inner loop that has run away: rounding decides it."""
ROUNDING = 10
"""How many times as far from the truth as plain autograd in float32 another order of sums may be."""
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
        if said is not None and not _is_rounding(sample, learner, tasks, answer, wanted):
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


def _is_rounding(sample: Sample, learner: mf.MAML, tasks: mf.TaskBatch, answer: Answer, wanted: Answer) -> bool:
    """Says whether a float32 answer differs because rounding decides: autograd's does so too, and float64 is exact.

    A norm of features that hardly differ from sample to sample multiplies what rounding does by hundreds.
    """
    if sample.dtype != "float32":
        return False
    plain = _truth(sample, learner, tasks, torch.float32)
    seen = _agreement(answer, wanted)
    rounding = _agreement((plain.losses, {n: plain.grads[n] for n in wanted[1]}), wanted)
    like_plain = (
        seen.losses <= ROUNDING * rounding.losses
        and seen.gradient <= ROUNDING * rounding.gradient
        and seen.parameter_error <= ROUNDING * rounding.parameter_error
    )
    return like_plain and _difference(sample.with_settings(dtype="float64")) is None


def _agreement(answer: Answer, wanted: Answer) -> Agreement:
    as_arrays = [(a[0].double().numpy(), {n: g.double().numpy() for n, g in a[1].items()}) for a in (answer, wanted)]
    return agreement(*as_arrays)


def _truth(sample: Sample, learner: mf.MAML, tasks: mf.TaskBatch, dtype: torch.dtype = torch.float64) -> Truth:
    model = learner.model
    adapted = [n for n, p in model.named_parameters() if p.requires_grad] if sample.adapt is None else sample.adapt
    oracle = Oracle(
        model, sample.make_loss(), sample.steps, adapted=adapted, first_order=sample.first_order,
        weights=sample.step_weights, bn=sample.bn or "task", dtype=dtype,
    )  # fmt: skip
    for key, row in learner.rows.items():
        oracle.parameters[key.replace("/", ".")] = row.detach().to(dtype, copy=True).requires_grad_()
    leaf = learner.rate.value.detach().to(dtype, copy=True).requires_grad_()
    return oracle.gradient(tasks, rates_by_name(oracle, leaf, learner), rate=leaf)


def _compared(sample: Sample, answer: Answer, wanted: Answer) -> str | None:
    largest = float(torch.stack([g.abs().max() for g in wanted[1].values()]).max())  # not a number, where one is
    if not largest < DIVERGED:
        return None
    if sample.dtype == "float32":
        if largest < 1e-6:
            return None  # nothing but rounding
        seen = _agreement(answer, wanted)
        return None if seen.agrees else str(seen)
    off = {n: float((answer[1][n] - g).abs().max()) / max(largest, 1e-6) for n, g in wanted[1].items()}
    off["the losses"] = float((answer[0] - wanted[0]).abs().max()) / max(float(wanted[0].abs().max()), 1e-6)
    worst = max(off, key=lambda name: math.inf if math.isnan(off[name]) else off[name])
    return None if off[worst] <= EXACT else f"{worst} is off by {off[worst]:.1e} of the largest gradient"
