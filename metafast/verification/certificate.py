"""``metafast verify`` checks metafast on a user's model against plain autograd in float64 and writes a certificate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from metafast.executors import Executor, choose
from metafast.executors.base import hvp_by_adapt_vjp
from metafast.inner.autocast import in_own_dtype
from metafast.inner.rates import Rate
from metafast.learners import MAML
from metafast.learners.batch_norm import BatchNormMode
from metafast.learners.seeds import with_seeds
from metafast.program import Program
from metafast.program.inner_loop import InnerLoop
from metafast.program.losses import LossLike
from metafast.program.rule import Rule
from metafast.tasks import TaskBatch
from metafast.verification.agreement import GRADIENT, LOSSES, PARAMETER, Agreement, agreement
from metafast.verification.layers import LayerCheck, LayerChecks, Tolerances, by_name
from metafast.verification.truth import Truth

__all__ = ["Certificate", "Check", "LayerCheck", "verify"]

FORMAT = 1
TOLERANCES = {
    torch.float64: Tolerances(
        1e-8, 1e-8, 1e-8, "float64 rounding through a few inner steps at a gentle rate stays below 1e-10"
    ),
    torch.float32: Tolerances(LOSSES.value, GRADIENT.value, PARAMETER.value, f"{GRADIENT.reason}; {PARAMETER.reason}"),
}
_DIFFERENCES = (1e-6, 1e-7, 1e-8, 1e-5)  # steps h of finite differences
_SECANT = 1e-3  # a tolerance: a difference of losses keeps about half of float64's digits


@dataclass(frozen=True)
class Check:
    """A check of one property in one dtype, with its relative ``error``."""

    name: str
    dtype: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Tells whether the error is within the tolerance. An error that is not a number is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Certificate:
    """Everything that was checked, with the model, the executor, the settings and the results."""

    model: str
    executor: str
    settings: dict[str, Any]
    checks: tuple[Check, ...]
    layers: tuple[LayerCheck, ...]

    @property
    def passed(self) -> bool:
        """Tells whether everything agreed."""
        return all(check.passed for check in self.checks) and not any(layer.wrong for layer in self.layers)

    @property
    def first_wrong(self) -> LayerCheck | None:
        """Returns the first layer that deviates; it makes the layers after it deviate too."""
        return next((layer for layer in self.layers if layer.wrong), None)

    @property
    def verdict(self) -> str:
        """Says in one line what was found."""
        failed = [f"{check.name} ({check.dtype})" for check in self.checks if not check.passed]
        layer = self.first_wrong
        if self.passed:
            return f"{self.model} on {self.executor}: everything agrees with autograd in float64"
        if layer is not None:
            return (
                f"{self.model} on {self.executor}: wrong from layer {layer.name!r} ({layer.kind}) on, in its rule "
                f"{layer.wrong} ({layer.dtype}); do not trust this executor with this model"
            )
        if all(check.passed for check in self.checks if check.dtype == "float64") and self._has_both:
            return (
                f"{self.model} on {self.executor}: the formulas agree in float64, but float32 rounding grows too large "
                f"in {', '.join(failed)}; use a smaller lr, fewer steps, or float64"
            )
        return f"{self.model} on {self.executor}: every layer agrees, but not {', '.join(failed)}: the inner loop"

    @property
    def _has_both(self) -> bool:
        return len({check.dtype for check in self.checks}) > 1

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values, with machine, versions, date and commit."""
        from metafast.machine import describe

        return {
            "format": FORMAT,
            "passed": self.passed,
            "verdict": self.verdict,
            "first_wrong": None if self.first_wrong is None else self.first_wrong.name,
            "model": self.model,
            "executor": self.executor,
            "settings": self.settings,
            "machine": describe(self.settings["device"], torch.get_num_threads()),
            "checks": [_json_values(check) | {"passed": check.passed} for check in self.checks],
            "layers": [_json_values(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'check':<36} {'dtype':<8} {'error':>8} {'allowed':>8}"]
        lines += [
            f"{check.name:<36} {check.dtype:<8} {check.error:>8.0e} {check.tolerance:>8.0e}  "
            f"{'ok' if check.passed else 'WRONG'}{'  ' * bool(check.note)}{check.note}"
            for check in self.checks
        ]
        lines += ["", f"{'layer':<{width}}  {'kind':<20} {'dtype':<8} {'outputs':>8} {'gradient':>8} {'H u':>8}"]
        lines += [
            f"{layer.name:<{width}}  {layer.kind:<20} {layer.dtype:<8} {_as_text(layer.outputs)} "
            f"{_as_text(layer.gradient)} {_as_text(layer.product)}  {layer.wrong or 'ok'}"
            for layer in self.layers
        ]
        return "\n".join([*lines, "", f"{'PASSED' if self.passed else 'FAILED'}: {self.verdict}"])


@in_own_dtype
def verify(
    model: nn.Module,
    tasks: TaskBatch,
    *,
    loss: LossLike,
    lr: float | Rate,
    query_loss: LossLike | None = None,
    steps: int = 1,
    inner: Rule | None = None,
    adapt: Iterable[str | nn.Module] | str | nn.Module | None = None,
    bn: BatchNormMode = None,
    output: str | int | None = None,
    backend: str | Executor = "auto",
) -> Certificate:
    """Compares what the executor computes for ``model`` on ``tasks`` with the model itself under autograd in float64.

    It compares the losses ``[T]``, the meta-gradient by parameter, ``H u`` of the support loss along a random direction
    ``u``, and the meta-gradient along a direction with a finite difference of losses. It checks that ``u'Hv = v'Hu``
    and that two runs give the same bits. Then it cuts the model off behind each layer in turn and compares outputs,
    gradient and ``H u`` there. All of this happens in the dtype of ``tasks`` and, where the executor runs it, in
    float64, which tells a wrong formula from rounding.

    Args:
        model: the model, which stays untouched. It and ``loss``, ``lr``, ``query_loss``, ``steps``, ``inner``,
            ``adapt``, ``bn``, ``output`` and ``backend`` are as in :class:`MAML`.
        tasks: a few tasks of the shapes that you use.

    Raises:
        ValueError, TypeError, CaptureError: as :class:`MAML` raises them for the model and its first batch.
        RuntimeError: ``backend`` cannot run this model.
    """
    options: dict[str, Any] = {
        "loss": loss, "lr": lr, "query_loss": query_loss, "steps": steps, "bn": bn, "output": output,
        "backend": backend,
    }  # fmt: skip
    options |= {} if inner is None else {"inner": inner}
    options["adapt"] = None if adapt is None else _named(model, adapt)
    learner = MAML(deepcopy(model), **options)
    learner.captures.second_look = False
    learner.backward(tasks)  # raises where the model or the tasks are wrong
    if learner.program.draws and (tasks.support_mask is not None or tasks.query_mask is not None):
        raise ValueError("the model draws random numbers: verify it on tasks of one size, without masks")
    tasks = with_seeds(learner.program, tasks)
    executor = choose(learner.program, learner.loop, tasks.shapes, backend).executor
    truth = Truth(learner)
    checks: list[Check] = []
    layers: list[LayerCheck] = []
    own = next(model.parameters()).dtype
    for dtype in dict.fromkeys((torch.float64, own)):
        converted = MAML(deepcopy(model).to(dtype), **options)
        converted.load_state_dict(learner.state_dict())
        batch = tasks.to(dtype)
        program = converted.captures.of(batch.first_step)
        plan = executor.plan(program, converted.loop, batch.shapes)
        if isinstance(plan, str):
            continue
        theta = _flatten_dense_tensors(converted.parameters_of(program)).detach()
        run = _Run(executor, program, converted.loop, converted.inner_rates(program).detach(), theta)
        checks += _model_checks(truth, run, batch)
        layers += LayerChecks(truth, plan, program, batch.first_step.support, theta, TOLERANCES[dtype]).run()
    settings = {
        "loss": learner.loss.label, "query_loss": learner.program.query.loss.label,
        "lr": truth.rates.tolist() if truth.rates.numel() < 9 and truth.rule is None else str(lr),
        "steps": steps, "inner": repr(learner.inner), "bn": dict(bn) if isinstance(bn, Mapping) else bn,
        "adapted": [p.name for p in learner.program.parameters if p.adapted],
        "tasks": len(tasks), "support_x": list(tasks.support_x.shape), "query_x": list(tasks.query_x.shape),
        "dtype": str(own).removeprefix("torch."), "device": str(tasks.support_x.device),
        "tolerances": {str(d).removeprefix("torch."): asdict(t) for d, t in TOLERANCES.items()},
    }  # fmt: skip
    return Certificate(type(model).__name__, executor.name, settings, tuple(checks), tuple(layers))


def _named(model: nn.Module, adapt: Iterable[str | nn.Module] | str | nn.Module) -> list[str | nn.Module]:
    """Replaces modules of ``model`` by their names, since a copy of the model has other modules."""
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    items = [adapt] if isinstance(adapt, str | nn.Module) else adapt
    return [names.get(item, item) if isinstance(item, nn.Module) else item for item in items]


class _Run(NamedTuple):
    """What is judged: an executor, and what it is given."""

    executor: Executor
    program: Program
    loop: InnerLoop
    rates: Tensor
    theta: Tensor


def _model_checks(truth: Truth, run: _Run, tasks: TaskBatch) -> Iterator[Check]:
    """Yields the checks of the whole model in the dtype of ``tasks``."""
    executor, program, loop, rates, theta = run
    limits, dtype = TOLERANCES[theta.dtype], str(theta.dtype).removeprefix("torch.")
    found, again = (executor.meta_gradient(program, loop, (theta,), rates, tasks) for _ in range(2))
    (grad,), (grad_again,) = found.grads, again.grads
    losses, gradient = truth.meta_gradient(tasks)
    error = _agreement(program, (found.losses, grad), (losses, gradient))
    yield Check("losses", dtype, error.losses, limits.outputs)
    yield Check("meta-gradient", dtype, error.gradient, limits.gradient)
    yield Check("meta-gradient of the worst parameter", dtype, error.parameter_error, limits.parameter, error.parameter)
    yield from _curvature(truth, executor, program, tasks, theta)
    found_gradient = grad.detach().double().cpu()
    # Where something is detached, or a Function has a derivative of its own, no gradient is the slope of the loss.
    if _secant_error(truth, gradient, tasks) <= _SECANT:
        yield Check("meta-gradient by finite differences", dtype, _secant_error(truth, found_gradient, tasks),
                    max(_SECANT, limits.gradient))  # fmt: skip
    same = torch.equal(found.losses, again.losses) and torch.equal(grad, grad_again)
    yield Check("two runs give the same bits", dtype, 0.0 if same else float("inf"), 0.0)


def _curvature(truth: Truth, executor: Executor, program: Program, tasks: TaskBatch, theta: Tensor) -> Iterator[Check]:
    """Yields the checks of ``H u`` and of ``u'Hv = v'Hu``; ``v`` has a large share of ``H u``, so that neither side is
    tiny."""
    limits, dtype = TOLERANCES[theta.dtype], str(theta.dtype).removeprefix("torch.")
    support = tasks.first_step.support
    generator = torch.Generator().manual_seed(2)
    u, noise = (torch.randn(program.size, generator=generator, dtype=torch.float64) * program.adapted for _ in range(2))
    wanted = truth.derivatives(program.output - 1, truth.loss, support, u)
    if float(wanted.product.norm()) == 0:
        return
    product = hvp_by_adapt_vjp(executor, program, theta, support, u.to(theta)).double().cpu()
    error = _agreement(program, (wanted.losses, product), (wanted.losses, wanted.product))
    yield Check("Hessian-vector product", dtype, error.gradient, limits.gradient, error.parameter)
    along = wanted.product.mean(0) * program.adapted
    v = along / along.norm() + noise / noise.norm()
    other = hvp_by_adapt_vjp(executor, program, theta, support, v.to(theta)).double().cpu()
    left, right = product @ v, other @ u
    turned = truth.derivatives(program.output - 1, truth.loss, support, v).product @ u
    if float((wanted.product @ v - turned).norm()) <= _SECANT * float(turned.norm()):
        yield Check("Hessian symmetry", dtype, float((left - right).norm() / left.norm()), limits.gradient)


def _secant_error(truth: Truth, gradient: Tensor, tasks: TaskBatch) -> float:
    """Returns the relative error of the gradient along a direction ``d``, held against a central difference of losses:

    ``(L(theta + h d) - L(theta - h d)) / 2h``

    It is the smallest error over a few ``h``: a kink of the losses between the two points spoils a single difference,
    while a wrong gradient agrees with none.
    """
    noise = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    direction = gradient / gradient.norm() + noise / noise.norm()
    wanted = float(gradient @ direction)
    best = float("inf")
    for h in _DIFFERENCES:
        ahead, behind = (truth.meta_loss(truth.theta + sign * h * direction, tasks) for sign in (1, -1))
        best = min(best, abs((ahead - behind) / (2 * h) - wanted) / abs(wanted))
        if best <= _SECANT:
            break
    return best


def _agreement(program: Program, found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> Agreement:
    return agreement(
        (found[0].detach().double().cpu().numpy(), by_name(program, found[1])),
        (wanted[0].detach().double().cpu().numpy(), by_name(program, wanted[1])),
    )


def _json_values(row: Check | LayerCheck) -> dict[str, Any]:
    """Returns the fields. JSON has no infinity, so an error that is not finite becomes ``null``."""
    values = asdict(row).items()
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values}


def _as_text(error: float | None) -> str:
    return f"{'':>8}" if error is None else f"{error:>8.0e}"
