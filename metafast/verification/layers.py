"""Finds the layer that is wrong: it cuts the model off behind each layer in turn and puts a squared error there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metafast.executors import ExecutionPlan
from metafast.executors.base import hvp_by_adapt_vjp
from metafast.kernels.mse import MSE
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.tasks import Batch, TaskBatch
from metafast.verification.agreement import agreement
from metafast.verification.truth import Truth


@dataclass(frozen=True)
class LayerCheck:
    """The check of the model up to one layer, or of the whole model with its loss.

    Args:
        name: the layer's name, or ``"loss"``.
        kind: what sort of layer it is.
        how: what the executor says about how it runs the layer.
        dtype: the dtype of the check.
        outputs: the relative error of what the layer puts out; ``None`` where the executor does not run this part.
        gradient: the relative error of a loss's gradient in the worst parameter so far; ``None`` where there is none.
        product: the same of its Hessian-vector product; ``None`` where the Hessian is zero.
        wrong: the rules to suspect; empty where all is well.
    """

    name: str
    kind: str
    how: str
    dtype: str
    outputs: float | None
    gradient: float | None
    product: float | None
    wrong: str


@dataclass(frozen=True)
class Tolerances:
    """The largest relative errors that pass in one dtype, with the reason for them."""

    outputs: float
    gradient: float
    parameter: float
    reason: str


@dataclass(frozen=True)
class LayerChecks:
    """Checks the executor of ``plan``, which has run the whole model, against ``truth``, from the first layer to the
    loss, in the dtype of ``theta [P]`` and ``batch``."""

    truth: Truth
    plan: ExecutionPlan
    program: Program
    batch: Batch
    theta: Tensor
    tolerances: Tolerances

    def run(self) -> Iterator[LayerCheck]:
        """Yields the check of each layer in turn, and then that of the loss."""
        program = self.program
        hows = self.plan.layers()
        for i, (node, how) in enumerate(zip(program.nodes, hows, strict=True)):
            part = program_up_to(program, i)
            kind = getattr(node.layer, "label", node.layer.kind)
            batch = _with_random_targets(part, self.theta, self.batch)
            yield self._check(i, F.mse_loss, part, batch, (node.name, kind, how))
        names = ("loss", program.loss.kind, hows[-1])
        yield self._check(program.output - 1, self.truth.loss, program, self.batch, names)

    def _plan_part(self, program: Program) -> ExecutionPlan | str:
        batch = self.batch
        shapes = TaskBatch(batch.x, batch.y, batch.x, batch.y, batch.mask, batch.mask).shapes
        return self.plan.executor.plan(program, InnerLoop.judged_last(1), shapes)

    def _check(
        self, node: int, loss: Callable[..., Any], part: Program, batch: Batch, names: tuple[str, str, str]
    ) -> LayerCheck:
        name, kind, how = names
        dtype = str(self.theta.dtype).removeprefix("torch.")
        plan = self._plan_part(part)
        if isinstance(plan, str):
            return LayerCheck(name, kind, f"not run by itself: {plan}", dtype, None, None, None, "")
        u = _direction(part)
        wanted = self.truth.derivatives(node, loss, batch, u)
        losses, grad, outputs = plan.executor.loss_and_grad(part, self.theta, batch)
        kept = outputs.flatten(0, 1) if batch.mask is None else outputs[batch.mask]
        found: dict[str, float | None] = {
            "outputs": max(_relative(kept, wanted.outputs), _relative(losses, wanted.losses)),
            "gradient": None,
            "product": None,
        }
        if any(n.params for n in part.nodes):
            found["gradient"] = _worst(part, (losses, grad), (wanted.losses, wanted.grad))
        if float(wanted.product.norm()) > 0:
            product = hvp_by_adapt_vjp(plan.executor, part, self.theta, batch, u.to(self.theta))
            found["product"] = _worst(part, (wanted.losses, product), (wanted.losses, wanted.product))
        return LayerCheck(name, kind, how, dtype, **found, wrong=_wrong(found, self.tolerances, name == "loss"))


def program_up_to(program: Program, last: int) -> Program:
    """Returns node ``last`` and all that it depends on, with a squared error behind it. Parameters keep their
    places."""
    needed = {last}
    for i in range(last, -1, -1):
        if i in needed:
            needed |= {v - 1 for v in program.nodes[i].inputs if v}
    number = {0: 0} | {i + 1: k + 1 for k, i in enumerate(sorted(needed))}
    nodes = [program.nodes[i] for i in sorted(needed)]
    renumbered = tuple(replace(node, inputs=tuple(number[v] for v in node.inputs)) for node in nodes)
    return Program(renumbered, program.parameters, number[last + 1], MSE())


def by_name(program: Program, rows: Tensor) -> dict[str, np.ndarray]:
    """Splits ``rows``, ``[T, P]`` or ``[P]``, into float64 arrays by parameter name."""
    values = rows.detach().double().cpu()
    return {p.name: t.numpy() for p, t in zip(program.parameters, program.unflatten(values), strict=True)}


def _wrong(found: dict[str, float | None], tolerances: Tolerances, is_loss: bool) -> str:
    limits = {"outputs": tolerances.outputs, "gradient": tolerances.parameter, "product": tolerances.parameter}
    rules = {"outputs": "forward", "gradient": "backward", "product": "tangent_backward" if is_loss else
             "tangent_forward or tangent_backward"}  # fmt: skip
    for what, error in found.items():
        if error is not None and not error <= limits[what]:  # an error that is not a number fails
            return rules[what]
    return ""


def _worst(program: Program, found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
    """Returns the relative error of the worst parameter."""
    if float(wanted[1].norm()) == 0:
        return 0.0 if float(found[1].norm()) == 0 else float("inf")
    pairs = [(losses.double().cpu().numpy(), by_name(program, grad)) for losses, grad in (found, wanted)]
    return agreement(*pairs).parameter_error


def _relative(found: Tensor, wanted: Tensor) -> float:
    found = found.detach().double().cpu()
    if found.shape != wanted.shape:
        return float("inf")
    return 0.0 if torch.equal(found, wanted) else float((found - wanted).norm() / wanted.norm())


def _direction(program: Program) -> Tensor:
    """Draws a direction ``[P]`` that is zero but on the adapted parameters."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(program.size, generator=generator, dtype=torch.float64) * program.adapted


def _with_random_targets(part: Program, theta: Tensor, batch: Batch) -> Batch:
    """Returns the same samples with random targets in the shape of what ``part`` puts out."""
    from metafast.executors import ReferenceExecutor

    shape = ReferenceExecutor().predict(part, theta, batch.x, 0, batch.seeds).shape
    targets = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return batch._replace(y=targets.to(theta))
