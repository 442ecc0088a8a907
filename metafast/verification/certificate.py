"""Does metafast compute the right thing on *your* model? A certificate, against plain autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metafast.executors import Executor, choose
from metafast.executors.base import hvp_by_adapt_vjp
from metafast.inner.rates import Rate
from metafast.learners import MAML
from metafast.program import Program
from metafast.program.losses import LossLike
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
_DIFFERENCES = (1e-6, 1e-7, 1e-8, 1e-5)
_SECANT = 1e-3  # a difference of losses has about half of float64's figures


@dataclass(frozen=True)
class Check:
    """One property in one dtype. ``error`` is relative; it passed if that is within ``tolerance``."""

    name: str
    dtype: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Is the error within the tolerance? Not a number is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Certificate:
    """What was checked, on which model and tasks, and what came of it."""

    model: str
    executor: str
    settings: dict[str, Any]
    checks: tuple[Check, ...]
    layers: tuple[LayerCheck, ...]

    @property
    def passed(self) -> bool:
        """Did everything agree?"""
        return all(check.passed for check in self.checks) and not any(layer.wrong for layer in self.layers)

    @property
    def first_wrong(self) -> LayerCheck | None:
        """The first layer that deviates; those behind it deviate because of it."""
        return next((layer for layer in self.layers if layer.wrong), None)

    @property
    def verdict(self) -> str:
        """One line."""
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
        """Plain JSON values, with machine, versions, date and commit."""
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
            "checks": [_plain(check) | {"passed": check.passed} for check in self.checks],
            "layers": [_plain(layer) for layer in self.layers],
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
            f"{layer.name:<{width}}  {layer.kind:<20} {layer.dtype:<8} {_figure(layer.outputs)} "
            f"{_figure(layer.gradient)} {_figure(layer.product)}  {layer.wrong or 'ok'}"
            for layer in self.layers
        ]
        return "\n".join([*lines, "", f"{'PASSED' if self.passed else 'FAILED'}: {self.verdict}"])


def verify(
    model: nn.Module,
    tasks: TaskBatch,
    *,
    loss: LossLike,
    lr: float | Rate,
    steps: int = 1,
    adapt: Iterable[str | nn.Module] | str | nn.Module | None = None,
    bn: str = "task",
    backend: str | Executor = "auto",
) -> Certificate:
    """Holds what the executor gives for ``model`` on ``tasks`` against the model itself, in float64, under autograd.

    Of the whole model: losses ``[T]``, the meta-gradient by parameter, ``H u`` of the support loss along a random
    direction ``u``, the meta-gradient along a direction against a finite difference of losses, ``u'Hv = v'Hu``, and two
    runs bit by bit. Of each layer, cut off behind it: outputs, gradient and ``H u``. In the dtype of ``tasks``, and in
    float64 too where the executor runs it: that tells a wrong formula from rounding.

    Args:
        model: as for :class:`MAML`, with ``loss``, ``lr``, ``steps``, ``adapt``, ``bn`` and ``backend``; it stays
            untouched.
        tasks: a few tasks of the shapes that you use.

    Raises:
        ValueError, TypeError, CaptureError: as :class:`MAML` and its first batch.
        RuntimeError: ``backend`` cannot run this model.
    """
    options: dict[str, Any] = {"loss": loss, "lr": lr, "steps": steps, "bn": bn, "backend": backend}
    options["adapt"] = None if adapt is None else _named(model, adapt)
    learner = MAML(deepcopy(model), **options)
    learner.backward(tasks)  # what is wrong with the model or the tasks shows here
    executor = choose(learner.program, learner.loop, tasks.shapes, backend).executor
    truth = Truth(learner)
    checks: list[Check] = []
    layers: list[LayerCheck] = []
    for dtype in dict.fromkeys((torch.float64, tasks.support_x.dtype)):
        twin = MAML(deepcopy(model).to(dtype), **options)
        twin.load_state_dict(learner.state_dict())
        batch = tasks.to(dtype)
        if isinstance(executor.plan(twin.program, twin.loop, batch.shapes), str):
            continue
        theta = twin.flat_parameters().detach()
        checks += _whole(truth, executor, twin, batch, theta)
        layers += LayerChecks(truth, executor, twin.program, batch.support, theta, TOLERANCES[dtype]).run()
    settings = {
        "loss": learner.loss.kind, "lr": truth.rates.tolist() if truth.rates.numel() < 9 else "by parameter",
        "steps": steps, "bn": bn, "adapted": [p.name for p in learner.program.parameters if p.adapted],
        "tasks": len(tasks), "support_x": list(tasks.support_x.shape), "query_x": list(tasks.query_x.shape),
        "dtype": str(tasks.support_x.dtype).removeprefix("torch."), "device": str(tasks.support_x.device),
        "tolerances": {str(d).removeprefix("torch."): asdict(t) for d, t in TOLERANCES.items()},
    }  # fmt: skip
    return Certificate(type(model).__name__, executor.name, settings, tuple(checks), tuple(layers))


def _named(model: nn.Module, adapt: Iterable[str | nn.Module] | str | nn.Module) -> list[str | nn.Module]:
    """Modules to adapt by name: those of ``model`` are not those of its copies."""
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    items = [adapt] if isinstance(adapt, str | nn.Module) else adapt
    return [names.get(item, item) if isinstance(item, nn.Module) else item for item in items]


def _whole(truth: Truth, executor: Executor, learner: MAML, tasks: TaskBatch, theta: Tensor) -> Iterator[Check]:
    """The checks of the whole model in the dtype of ``tasks``."""
    limits, dtype = TOLERANCES[theta.dtype], str(theta.dtype).removeprefix("torch.")
    program, rate = learner.program, learner.rate().detach()
    found, again = (executor.meta_gradient(program, learner.loop, (theta,), rate, tasks) for _ in range(2))
    (grad,), (grad_again,) = found.grads, again.grads
    losses, gradient = truth.meta_gradient(tasks)
    error = _agreement(program, (found.losses, grad), (losses, gradient))
    yield Check("losses", dtype, error.losses, limits.outputs)
    yield Check("meta-gradient", dtype, error.gradient, limits.gradient)
    yield Check("meta-gradient of the worst parameter", dtype, error.parameter_error, limits.parameter, error.parameter)
    yield from _curvature(truth, executor, program, tasks, theta)
    found_gradient = grad.detach().double().cpu()
    yield Check("meta-gradient by finite differences", dtype, _secant_error(truth, found_gradient, tasks),
                max(_SECANT, limits.gradient))  # fmt: skip
    same = torch.equal(found.losses, again.losses) and torch.equal(grad, grad_again)
    yield Check("two runs give the same bits", dtype, 0.0 if same else float("inf"), 0.0)


def _curvature(truth: Truth, executor: Executor, program: Program, tasks: TaskBatch, theta: Tensor) -> Iterator[Check]:
    """``H u``, and its symmetry for ``u`` and a ``v`` that has a large share of ``H u``."""
    limits, dtype = TOLERANCES[theta.dtype], str(theta.dtype).removeprefix("torch.")
    support = tasks.support
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
    yield Check("Hessian symmetry", dtype, float((left - right).norm() / left.norm()), limits.gradient)


def _secant_error(truth: Truth, gradient: Tensor, tasks: TaskBatch) -> float:
    """The gradient along a direction against ``(L(theta + h d) - L(theta - h d)) / 2h``, at the best of a few ``h``: a
    kink of the losses between the two points spoils any one of them, and a wrong gradient agrees with none."""
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


def _plain(row: Check | LayerCheck) -> dict[str, Any]:
    """JSON knows no infinity: an error that is not finite becomes ``null``."""
    values = asdict(row).items()
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values}


def _figure(error: float | None) -> str:
    return f"{'':>8}" if error is None else f"{error:>8.0e}"
