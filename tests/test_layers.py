"""Every layer and loss on its table of cases: the hand-written rules against torch.autograd, task by task.

The truth uses reverse mode alone: with ``phi(x, w) = <f(x), w>`` a tangent is ``yd = d/dw <d phi/dx, xd>`` and the
tangent of an adjoint is ``gd = d/dx (<d phi(x, g)/dx, xd> + phi(x, gd_y))``. The derived layer walks the same table.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from metafast import kernels
from metafast.kernels.batch_norm import BatchNorm
from metafast.kernels.contract.case import Case, LossCase
from metafast.kernels.contract.layer import RuleContext
from metafast.kernels.derived import Derived
from metafast.kernels.max_pool2d import MaxPool2d

TABLES = [case for cases in kernels.modules("cases") for case in cases.CASES]
CASES = [case for case in TABLES if isinstance(case, Case)]
LOSS_CASES = [case for case in TABLES if isinstance(case, LossCase)]
SMALL = [case for case in CASES if sum(torch.Size(x).numel() for x in case.inputs) < 2000]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_small_case = pytest.mark.parametrize("case", SMALL, ids=str)
every_loss = pytest.mark.parametrize("case", LOSS_CASES, ids=str)


@dataclass
class Point:
    """Values, directions and adjoints at which the four rules are compared, with the tasks in front."""

    params: list[Tensor]
    inputs: list[Tensor]
    d_params: list[Tensor | None]
    d_inputs: list[Tensor | None]
    g: Tensor
    gd: Tensor

    def to(self, dtype):
        def cast(value):
            return [None if v is None else v.to(dtype) for v in value] if isinstance(value, list) else value.to(dtype)

        return Point(*(cast(value) for value in vars(self).values()))


def point(case, tasks=3, dtype=torch.float64):
    # Drawn in float32, so that both precisions see the same values.
    params, d_params = ([torch.randn(tasks, *s) for s in case.params] for _ in range(2))
    inputs, d_inputs = ([torch.randn(tasks, *s) for s in case.inputs] for _ in range(2))
    output = (tasks, *case.function(tuple(p[0] for p in params), tuple(x[0] for x in inputs)).shape)
    return Point(params, inputs, d_params, d_inputs, torch.randn(output), torch.randn(output)).to(dtype)


def point_without_memory(case, tasks):
    """A point of ``tasks`` tasks on tensors that have only shapes."""
    one = point(case, tasks=1, dtype=torch.float32)

    def empty(value):
        return torch.empty(tasks, *value.shape[1:], device="meta")

    return Point(*([empty(v) for v in x] if isinstance(x, list) else empty(x) for x in vars(one).values()))


def truth(function, at):
    """Value, gradients, tangent, tangents of the gradients; each a list of tensors, inputs before parameters."""
    primals = [v.clone().requires_grad_() for v in (*at.inputs, *at.params)]
    count = len(at.inputs)
    outputs = [
        function(tuple(p[t] for p in primals[count:]), tuple(x[t] for x in primals[:count]))
        for t in range(at.g.shape[0])
    ]
    y = torch.stack(outputs)
    w = at.g.clone().requires_grad_()
    grads = torch.autograd.grad((y * w).sum(), primals, create_graph=True, materialize_grads=True)
    directions = [
        torch.zeros_like(v) if d is None else d for d, v in zip((*at.d_inputs, *at.d_params), primals, strict=True)
    ]
    along = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    tangent = torch.autograd.grad(along, w, retain_graph=True, materialize_grads=True)
    of_gradients = torch.autograd.grad(along + (y * at.gd).sum(), primals, materialize_grads=True)
    return [y.detach()], [g.detach() for g in grads], list(tangent), list(of_gradients)


def rules(layer, at, constants=(), step=0, mask=None, needs=None):
    """The same four from a layer's rules."""
    needs = needs or (True,) * (len(at.inputs) + len(at.params))
    ctx = RuleContext(step, mask, needs[: len(at.inputs)], needs[len(at.inputs) :])
    y = layer.forward(ctx, at.params, at.inputs, constants)
    g_x, g_p = layer.backward(ctx, at.params, at.g)
    tangent = layer.tangent_forward(ctx, at.params, at.d_params, at.d_inputs)
    gd_x, gd_p = layer.tangent_backward(ctx, at.params, at.d_params, at.gd)
    return [y], [*g_x, *g_p], [tangent], [*gd_x, *gd_p]


def assert_close(found, expected, tolerance, properties=("value", "gradient", "tangent", "tangent gradient")):
    """Relative error of norms; where the truth nearly vanishes, error against values of unit size."""
    for name, ours, theirs in zip(properties, found, expected, strict=True):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert a.shape == b.shape, f"{name} {i} has shape {a.shape}, not {b.shape}"
            error, size = (a.double() - b.double()).norm().item(), max(b.double().norm().item(), 1.0)
            assert error <= tolerance * size, f"{name} {i} is off by {error / size:.1e}, relatively"


@every_case
def test_rules_agree_with_autograd(case):
    at = point(case)
    expected = truth(case.function, at)
    assert_close(rules(case.layer, at, case.constants, case.step), expected, 1e-9)
    derived = Derived(lambda p, x, constants: case.function(p, x), "truth")
    assert_close(rules(derived, at), expected, 1e-9)
    with torch.no_grad():  # as executors call the rules; derived ones find tangents by forward mode then
        assert_close(rules(case.layer, at, case.constants, case.step), expected, 1e-9)
        assert_close(rules(derived, at), expected, 1e-9)


@every_case
def test_rules_in_float32(case):
    at = point(case)
    found = rules(case.layer, at.to(torch.float32), case.constants, case.step)
    assert all(v.dtype == torch.float32 for part in found for v in part)
    assert_close(found, truth(case.function, at), case.tolerance)


@every_case
def test_one_task(case):
    at = point(case, tasks=1)
    assert_close(rules(case.layer, at, case.constants, case.step), truth(case.function, at), 1e-9)


@every_case
def test_memory_layout_does_not_matter_and_nothing_is_overwritten(case):
    at = point(case)
    expected = rules(case.layer, at, case.constants, case.step)
    spread = {
        name: [_spread(v) for v in value] if isinstance(value, list) else _spread(value)
        for name, value in vars(at).items()
    }
    strided = Point(**spread)
    assert_close(rules(case.layer, strided, case.constants, case.step), expected, 1e-12)
    for name, value in vars(at).items():
        after = getattr(strided, name)
        assert all(torch.equal(a, b) for a, b in zip(value, after, strict=True)), f"{name} was overwritten"


def _spread(v):
    """The same values, stored with gaps and with the axes in reverse order."""
    axes = tuple(reversed(range(v.dim())))
    wide = torch.full((*v.permute(axes).shape, 2), float("nan"), dtype=v.dtype)
    wide[..., 0] = v.permute(axes)
    return wide[..., 0].permute(axes)


@every_small_case
def test_absent_directions_are_zero_directions(case):
    at = point(case, tasks=2)
    count, total = len(at.inputs), len(at.inputs) + len(at.params)
    for present in itertools.product((False, True), repeat=total):
        if any(present) and not all(present):
            at_present = Point(
                at.params, at.inputs,
                [d if keep else None for d, keep in zip(at.d_params, present[count:], strict=True)],
                [d if keep else None for d, keep in zip(at.d_inputs, present[:count], strict=True)],
                at.g, at.gd,
            )  # fmt: skip
            found = rules(case.layer, at_present, case.constants, case.step)
            assert_close(found, truth(case.function, at_present), 1e-9)


@every_small_case
def test_adjoints_that_are_not_wanted_are_none_and_change_nothing(case):
    at = point(case, tasks=2)
    everything = rules(case.layer, at, case.constants, case.step)
    total = len(at.inputs) + len(at.params)
    for needs in itertools.product((False, True), repeat=total):
        found = rules(case.layer, at, case.constants, case.step, needs=needs)
        for part in (1, 3):
            for wanted, ours, full in zip(needs, found[part], everything[part], strict=True):
                assert (ours is not None) == wanted
                assert ours is None or torch.allclose(ours, full, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", [c for c in SMALL if isinstance(c.layer, BatchNorm)], ids=str)
def test_batch_norm_does_not_see_padded_samples(case):
    case_at = point(case, tasks=3)
    mask = torch.ones(3, case.inputs[0][0], dtype=torch.bool)
    mask[1, 1:] = False
    if mask.shape[1] > 2:
        mask[2, 0] = False
    padding = ~mask
    case_at.inputs[0][padding] = 1e3 * torch.randn_like(case_at.inputs[0][padding])
    case_at.g[padding] = 0  # what a loss that skips padding sends back
    case_at.gd[padding] = 0
    found = rules(case.layer, case_at, case.constants, case.step, mask)
    for t in range(3):
        kept = mask[t]
        one = Point(
            [p[t : t + 1] for p in case_at.params], [case_at.inputs[0][t : t + 1, kept]],
            [d[t : t + 1] for d in case_at.d_params], [case_at.d_inputs[0][t : t + 1, kept]],
            case_at.g[t : t + 1, kept], case_at.gd[t : t + 1, kept],
        )  # fmt: skip
        if one.inputs[0].numel() == one.inputs[0].shape[2] and not case.layer.fixed_statistics:
            continue  # one number a channel has no variance, and torch refuses it
        expected = truth(case.function, one)
        ours = [[v[t : t + 1, kept] if v.shape == case_at.g.shape else v[t : t + 1] for v in part] for part in found]
        assert_close(ours, expected, 1e-9)
    for part in (1, 3):
        assert torch.equal(found[part][0][padding], torch.zeros_like(case_at.g[padding]))


def test_max_pool_sends_the_gradient_to_the_first_of_equals():
    x, xd = torch.zeros(1, 1, 1, 2, 4), torch.arange(8.0).reshape(1, 1, 1, 2, 4)
    g, gd = (torch.tensor(pair).reshape(1, 1, 1, 1, 2) for pair in ([3.0, 5.0], [7.0, 9.0]))
    at = Point([], [x], [], [xd], g, gd)
    layer = MaxPool2d((2, 2), (2, 2))
    _, gradient, tangent, of_gradients = rules(layer, at)
    assert gradient[0].flatten().tolist() == [3, 0, 5, 0, 0, 0, 0, 0]
    assert tangent[0].flatten().tolist() == [0, 2]
    assert of_gradients[0].flatten().tolist() == [7, 0, 9, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("case", [c for c in SMALL if c.layer.kind in ("relu", "leaky_relu", "max_pool2d")], ids=str)
def test_kinks_and_ties_are_treated_as_torch_does(case):
    at = point(case)
    at.inputs[0] = torch.randint(-1, 2, at.inputs[0].shape).double()
    assert_close(rules(case.layer, at), truth(case.function, at), 1e-12)


OF_LOSSES = ("value", "gradient", "tangent gradient")


def loss_point(case, tasks=3):
    outputs = case.scale * torch.randn(tasks, *case.outputs)
    targets = torch.randn_like(outputs)
    if case.classes is not None:
        targets = torch.randint(0, case.classes, (*outputs.shape[:2], *outputs.shape[3:]))
    return outputs, case.prepare(targets), torch.randn_like(outputs)


def loss_truth(function, outputs, targets, direction):
    z = outputs.clone().requires_grad_()
    losses = torch.stack([function(z[t], targets[t]) for t in range(z.shape[0])])
    (g,) = torch.autograd.grad(losses.sum(), z, create_graph=True)
    (gd,) = torch.autograd.grad((g * direction).sum(), z, materialize_grads=True)
    return [losses.detach()], [g.detach()], [gd]


def loss_rules(loss, outputs, targets, direction, mask=None):
    ctx = RuleContext(0, mask, (True,), ())
    return [loss.forward(ctx, outputs, targets)], [loss.backward(ctx)], [loss.tangent_backward(ctx, direction)]


def _double(*tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


@every_loss
@pytest.mark.parametrize("tasks", [1, 3])
def test_losses_agree_with_autograd(case, tasks):
    at = loss_point(case, tasks)
    expected = loss_truth(case.function, *_double(*at))
    assert_close(loss_rules(case.loss, *_double(*at)), expected, 1e-9, OF_LOSSES)
    assert_close(loss_rules(case.loss, *at), expected, case.tolerance, OF_LOSSES)
    assert_close(loss_rules(case.loss, *_double(_spread(at[0]), *at[1:])), expected, 1e-9, OF_LOSSES)


@pytest.mark.parametrize("case", [c for c in LOSS_CASES if c.outputs[0] > 1], ids=str)
def test_losses_do_not_see_padded_samples(case):
    outputs, targets, direction = _double(*loss_point(case))
    mask = torch.ones(targets.shape[:2], dtype=torch.bool)
    mask[1, 1:] = False
    mask[2, 0] = False
    outputs[~mask] = 1e3
    found = loss_rules(case.loss, outputs, targets, direction, mask)
    for t in range(3):
        kept = mask[t]
        expected = loss_truth(case.function, *(v[t : t + 1, kept] for v in (outputs, targets, direction)))
        ours = [[found[0][0][t : t + 1]], [found[1][0][t : t + 1, kept]], [found[2][0][t : t + 1, kept]]]
        assert_close(ours, expected, 1e-9, OF_LOSSES)
    for part in found[1:]:
        assert torch.equal(part[0][~mask], torch.zeros_like(outputs[~mask]))
