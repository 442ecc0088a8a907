"""Takes a second look at a captured model: the model itself runs on another task than that it was captured on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from metafast.kernels.derived import compute_task_by_task
from metafast.learners.batch_norm import in_modes
from metafast.learners.captures import Captures
from metafast.program import Program
from metafast.program.capture import Layout, node_values
from metafast.program.module_run import call, picked, unchanged
from metafast.program.noise import given_numbers
from metafast.program.second_look import Difference, Truth, check, first_difference, truth_of
from metafast.tasks import TaskBatch


def double_check(captures: Captures, program: Program, theta: Tensor, tasks: TaskBatch) -> None:
    """Compares ``program`` at ``theta [P]`` with the model on the last task's support and query samples.

    Raises:
        Difference: they do not agree; the text names the first operation that differs.
    """
    spared = captures.is_spared(tasks.query_x)
    for x in [tasks.support_x, tasks.query_x] if program.by_samples or spared else [tasks.support_x]:
        task = _another_task(x)
        seeds = torch.ones(1, dtype=torch.int64, device=theta.device) if program.draws else None
        outputs_alone = spared and x is tasks.query_x  # its gradient has been compared on the support set
        with _first_rows(captures, program, theta):
            truth = run_module(captures, task, seeds, captures.recording(x).is_coarse, outputs_alone)
        difference = check(program.at(x.shape[1]), theta, truth)
        if difference is not None:  # torch.vmap may be what is wrong
            news = [compute_task_by_task(node.layer) for node in program.derived]
            difference = check(program.at(x.shape[1]), theta, truth) if any(news) else difference
        if difference is not None and not _agrees_in_double(captures, x, task, seeds):
            where = _first(captures, program.at(x.shape[1]), theta, truth, x)
            raise Difference(
                f"what was captured of {type(captures.model).__name__} is not what it computes: {difference}, first at "
                f"{where}. It may read something that changes from call to call, such as a random number, a counter or "
                "a global; if it does not, this is a defect of metafast"
            )


def run_module(
    captures: Captures, x: Any, seeds: Tensor | None, coarse: bool = False, outputs_alone: bool = False
) -> Truth:
    """Runs the model itself on one task's samples, and differentiates its outputs unless they are wanted alone."""
    model = captures.model
    grad = torch.set_grad_enabled
    with in_modes(model, captures.modes()), unchanged(model), grad(not outputs_alone), given_numbers(seeds):
        outputs = picked(call(model, tree_map(Tensor.clone, x)), captures.settings.output, model)
        named: dict[str, Tensor] = {} if outputs_alone else dict(model.named_parameters())
        try:
            return truth_of(outputs, named, x, coarse, seeds)
        except RuntimeError as error:
            text = str(error).split("\n")[0]
            raise ValueError(
                f"torch itself cannot differentiate {type(model).__name__} in its parameters: {text}"
            ) from error


@contextmanager
def _first_rows(captures: Captures, program: Program, theta: Tensor) -> Iterator[None]:
    """Gives parameters that have a row for each inner step the row of the first one, while the ``with`` block runs."""
    named = dict(captures.model.named_parameters())
    pairs = zip(program.parameters, program.unflatten(theta), strict=True)
    rows = [(named[p.name], rows[0]) for p, rows in pairs if rows.dim() > named[p.name].dim()]
    kept = [parameter.detach().clone() for parameter, _ in rows]
    with torch.no_grad():
        for parameter, row in rows:
            parameter.copy_(row)
    try:
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), value in zip(rows, kept, strict=True):
                parameter.copy_(value)


def _another_task(x: Any) -> Any:
    """Returns the last task's samples, or where there is one task alone those of it in other numbers."""

    def other(leaf: Tensor) -> Tensor:
        if leaf.shape[0] > 1 or not leaf.is_floating_point():
            return leaf[-1].detach()
        return leaf[0].detach().roll(1, 0) * 1.125

    return tree_map_only(Tensor, other, x)


def _agrees_in_double(captures: Captures, x: Any, task: Any, seeds: Tensor | None) -> bool:
    """Says whether a copy of the model in float64 agrees with its Program, so that rounding is all that differs."""
    if any(p.dtype == torch.float64 for p in captures.model.parameters()):
        return False
    try:
        twin = Captures(deepcopy(captures.model).double(), captures.settings, captures.trained)
        wide, task = (tree_map_only(Tensor, _in_double, tree) for tree in (x, task))
        program = twin.of_samples(wide)
        named = dict(twin.model.named_parameters())
        theta = torch.cat([named[p.name].detach().flatten() for p in program.parameters])
        return check(program, theta, run_module(twin, task, seeds)) is None
    except Exception:  # a model that is no model of float64 cannot tell
        return False


def _in_double(leaf: Tensor) -> Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf


def _first(captures: Captures, program: Program, theta: Tensor, truth: Truth, x: Any) -> str:
    """Names the first operation that differs."""
    recording, settings = captures.recording(x), captures.settings
    shapes = {name: tuple(p.shape) for name, p in captures.model.named_parameters()}
    layout = Layout(tuple(p.name for p in program.parameters), shapes, settings.adapt, settings.steps)
    return first_difference(program, theta, truth, recording, node_values(recording, layout, captures.modes()))
