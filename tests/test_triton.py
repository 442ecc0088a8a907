"""The Triton kernels on every table of cases, and whole programs through their executor, against the float64 truth.

Without a GPU the kernels run interpreted, with large blocks to save time; small blocks are tested where sizes cross
their edges. Memory that a kernel should write is filled with NaN first.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest

pytest.importorskip("triton")

import torch
import torch.nn.functional as F
from setups import SETUPS, Setup, make_learner, make_tasks, rate
from test_layers import (
    CASES,
    LOSS_CASES,
    Point,
    _spread,
    assert_close,
    loss_point,
    loss_rules,
    loss_truth,
    point,
    rules,
    truth,
)
from test_meta_gradients import check_against_oracle
from torch import nn

from metafast import executors, kernels
from metafast.executors.triton.executor import TritonExecutor
from metafast.executors.triton.lowering import lower, triton_layer, triton_loss
from metafast.kernels.batch_norm import BatchNorm
from metafast.kernels.batch_norm.kernel import TritonBatchNorm
from metafast.kernels.contract.layer import Layer, RuleContext
from metafast.kernels.conv2d import Conv2d
from metafast.kernels.conv2d.kernel import TritonConv2d
from metafast.kernels.conv2d.normalised import NormalisedConv
from metafast.kernels.max_pool2d import MaxPool2d
from metafast.kernels.pointwise.reference import ReLU
from metafast.kernels.primitives import launch, products
from metafast.models import conv4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
LARGE = launch.Tiles(1024, 128, 512, 65536)  # only interpreted: an assembler works on one such block for minutes
USUAL = LARGE if DEVICE == "cpu" else launch.Tiles()
SMALL = launch.Tiles(16, 16, 16, 64)
HAND_WRITTEN = [case for case in CASES if triton_layer(case.layer) is not None]
LOSSES = [case for case in LOSS_CASES if triton_loss(case.loss) is not None]


def test_every_kernel_file_lowers_what_its_folder_has_cases_of():
    lowered = [triton_layer(case.layer) for case in HAND_WRITTEN] + [triton_loss(case.loss) for case in LOSSES]
    of_layers = {m.__name__ for m in kernels.modules("kernel")} - {"metafast.kernels.rules.kernel"}
    assert {type(rules).__module__ for rules in lowered} == of_layers


@pytest.fixture(autouse=True)
def _memory_full_of_nan(monkeypatch):
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _filled(getattr(torch, name)))


def _filled(allocate):
    def filled(*args, **kwargs):
        x = allocate(*args, **kwargs)
        return x.fill_(math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

    return filled


@pytest.fixture(autouse=True)
def _executor(monkeypatch):
    """One that takes the CPU; the registered one does not."""
    monkeypatch.setattr(executors, "_EXECUTORS", [executor(), executors.ReferenceExecutor()])


def executor():
    return TritonExecutor(interpreted=DEVICE == "cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    if DEVICE == "cpu":
        from triton.runtime import interpreter

        _use(LARGE, monkeypatch)
        monkeypatch.setattr(products, "processors", lambda device: 0)  # that large blocks need not fill
        options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


def _use(tiles, monkeypatch):
    for name, value in vars(tiles).items():
        monkeypatch.setattr(launch.TILES, name, value)


class ByTorchsNames(Layer):
    """A layer whose first parameter is a convolution's weight, given in torch's order of axes."""

    def __init__(self, layer):
        self.layer = layer

    def forward(self, ctx, params, inputs, constants=()):
        return self.layer.forward(ctx, _last(params), inputs, constants)

    def backward(self, ctx, params, g_y):
        return _first(self.layer.backward(ctx, _last(params), g_y))

    def tangent_forward(self, ctx, params, d_params, d_inputs):
        return self.layer.tangent_forward(ctx, _last(params), _last(d_params), d_inputs)

    def tangent_backward(self, ctx, params, d_params, gd_y):
        return _first(self.layer.tangent_backward(ctx, _last(params), _last(d_params), gd_y))


def _last(params):
    return [None if params[0] is None else params[0].movedim(2, -1), *params[1:]]


def _first(found):
    into, (weight, *rest) = found
    return into, [None if weight is None else weight.movedim(-1, 2), *rest]


def run(layer, at, case, needs=None):
    """The four rules in float32 on the device, back on the CPU."""
    if isinstance(layer, TritonConv2d | NormalisedConv):
        layer = ByTorchsNames(layer)
    at = Point(**{k: [_there(v) for v in x] if isinstance(x, list) else _there(x) for k, x in vars(at).items()})
    found = rules(layer, at, getattr(case, "constants", ()), getattr(case, "step", 0), needs=needs)
    return [[None if v is None else v.cpu() for v in part] for part in found]


def _there(v):
    return None if v is None else v.to(DEVICE, torch.float32)


@pytest.mark.parametrize("case", HAND_WRITTEN, ids=str)
def test_rules(case):
    at = point(case, tasks=2)
    assert_close(run(triton_layer(case.layer), at, case), truth(case.function, at), case.tolerance)


@pytest.mark.parametrize("case", LOSSES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_losses(case, masked):
    outputs, targets, direction = loss_point(case, 2)
    mask = torch.ones(outputs.shape[:2], dtype=torch.bool)
    if masked and outputs.shape[1] > 1:
        mask[1, 1:] = False
        outputs[1, 1:] = 1e3
    loss = triton_loss(case.loss)
    there = [v.to(DEVICE) for v in (outputs, targets, direction)]
    found = loss_rules(loss, *there, mask.to(DEVICE) if masked else None)
    for t in range(2):
        kept = mask[t]
        cut = [v[t : t + 1, kept] for v in (outputs.double(), targets, direction.double())]
        if targets.is_floating_point():
            cut[1] = cut[1].double()
        ours = [[found[0][0][t : t + 1].cpu()], *([part[0][t : t + 1, kept].cpu()] for part in found[1:])]
        assert_close(ours, loss_truth(case.function, *cut), case.tolerance, ("loss", "gradient", "tangent"))
        assert all(torch.all(part[0][t, ~kept] == 0) for part in found[1:])


CROSSING = ["conv2d: 3x3, padded, odd image", "conv2d: stride 2, even", "conv2d: two groups", "linear: odd sizes",
            "batch_norm: 2d, odd sizes", "layer_norm: two axes", "gelu: image", "max_pool2d: 2x2, one row",
            "avg_pool2d: padding does not count"]  # fmt: skip


@pytest.mark.parametrize("case", [c for c in HAND_WRITTEN if any(str(c).startswith(s) for s in CROSSING)], ids=str)
def test_small_blocks(case, monkeypatch):
    _use(SMALL, monkeypatch)
    at = point(case, tasks=2)
    assert_close(run(triton_layer(case.layer), at, case), truth(case.function, at), case.tolerance)


@pytest.mark.parametrize("case", [c for c in LOSSES if "ways" in c.name or c.loss.kind == "mse"], ids=str)
def test_losses_in_small_blocks(case, monkeypatch):
    _use(SMALL, monkeypatch)
    at = loss_point(case, 2)
    found = loss_rules(triton_loss(case.loss), *(v.to(DEVICE) for v in at))
    expected = loss_truth(case.function, *(v.double() if v.is_floating_point() else v for v in at))
    assert_close([[v.cpu() for v in part] for part in found], expected, case.tolerance, ("loss", "gradient", "tangent"))


def test_cross_entropy_counts_the_samples_that_mask_and_label_keep():
    loss = next(c.loss for c in LOSSES if c.name == "five ways")
    z, d = (torch.randn(3, 7, 5, device=DEVICE) for _ in range(2))
    y, mask = torch.randint(0, 5, (3, 7), device=DEVICE), torch.ones(3, 7, dtype=torch.bool, device=DEVICE)
    y[0, 2:5], y[1], mask[0, 4:], mask[2, 0] = -100, -100, False, False
    found, expected = (loss_rules(rules, z, y, d, mask) for rules in (triton_loss(loss), loss))
    assert torch.isnan(found[0][0]).tolist() == torch.isnan(expected[0][0]).tolist() == [False, True, False]
    for part in (found, expected):
        part[0][0] = part[0][0].nan_to_num(0.0)
    assert_close(found, expected, 2e-6, ("loss", "gradient", "tangent"))


SPREAD = ["conv2d: 3x3, padded", "linear: odd", "batch_norm: 2d", "layer_norm: two axes", "max_pool2d: 3x3, o",
          "avg_pool2d: padding", "gelu: image"]  # fmt: skip


@pytest.mark.parametrize("kind", SPREAD)
def test_memory_layout_does_not_matter(kind):
    case = next(c for c in HAND_WRITTEN if str(c).startswith(kind))
    at = point(case, tasks=2, dtype=torch.float32)  # as the kernels take it, or a cast would close the gaps
    spread = Point(**{k: [_spread(v) for v in x] if isinstance(x, list) else _spread(x) for k, x in vars(at).items()})
    expected = run(triton_layer(case.layer), at, case)
    assert_close(run(triton_layer(case.layer), spread, case), expected, 1e-7)


@pytest.mark.parametrize("case", [LOSSES[0], LOSSES[-1]], ids=str)
def test_memory_layout_does_not_matter_to_losses(case):
    at = [v.to(DEVICE) for v in loss_point(case, 2)]
    spread = [torch.stack([v, v + 1], -1)[..., 0] for v in at]
    found, expected = (loss_rules(triton_loss(case.loss), *values) for values in (spread, at))
    assert_close(found, expected, 0.0, ("loss", "gradient", "tangent"))


@dataclass(frozen=True)
class Fused:
    """A fused layer with the chain of torch functions that it stands for."""

    name: str
    layer: Layer
    function: object
    params: tuple
    inputs: tuple

    def __str__(self):
        return self.name


def _norm(x, gamma=None, beta=None):
    return F.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-3)


BN = BatchNorm("task", 1e-3)
CONV = TritonConv2d(Conv2d((1, 1), (1, 1), bias=False))
AFFINE = ((3,), (3,))
FUSED = [
    Fused("norm, relu", TritonBatchNorm(BN, relu=True), lambda p, i: F.relu(_norm(i[0], *p)), AFFINE, ((3, 3, 5, 4),)),
    Fused("norm, pool", TritonBatchNorm(BN, window=(2, 2)), lambda p, i: F.max_pool2d(_norm(i[0], *p), 2), AFFINE,
          ((3, 3, 5, 4),)),
    Fused("norm, relu, pool", TritonBatchNorm(BN, True, (2, 2)), lambda p, i: F.max_pool2d(F.relu(_norm(i[0], *p)), 2),
          AFFINE, ((2, 3, 7, 5),)),
    Fused("norm, relu, pool 3x2", TritonBatchNorm(BN, True, (3, 2)),
          lambda p, i: F.relu(F.max_pool2d(_norm(i[0], *p), (3, 2))), AFFINE, ((2, 3, 7, 5),)),
    Fused("relu of features", TritonBatchNorm(BatchNorm("task", 1e-3, False, False), True),
          lambda p, i: F.relu(_norm(i[0])), (), ((7, 3),)),
    Fused("conv, norm, relu, pool", NormalisedConv(CONV, TritonBatchNorm(BN, True, (2, 2))),
          lambda p, i: F.max_pool2d(F.relu(_norm(F.conv2d(i[0], p[0], None, 1, 1), p[1], p[2])), 2),
          ((3, 2, 3, 3), *AFFINE), ((2, 2, 5, 6),)),
    Fused("conv, norm", NormalisedConv(CONV, TritonBatchNorm(BN)),
          lambda p, i: _norm(F.conv2d(i[0], p[0], None, 1, 1), p[1], p[2]), ((3, 2, 3, 3), *AFFINE),
          ((2, 2, 5, 6),)),
]  # fmt: skip


WHOLE = [c for c in FUSED if c.name in ("norm, relu, pool", "conv, norm, relu, pool")]


@pytest.mark.parametrize("tiles", [USUAL, SMALL], ids=["usual blocks", "small blocks"])
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_layers(case, tiles, monkeypatch):
    _use(tiles, monkeypatch)
    at = point(case, tasks=2)
    assert_close(run(case.layer, at, case), truth(case.function, at), 1e-5)


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_fused_layers_with_absent_directions(case):
    at = point(case, tasks=2)
    total = len(at.inputs) + len(at.params)
    for present in itertools.product((False, True), repeat=total):
        if any(present) and not all(present):
            chosen = replace(
                at,
                d_inputs=[d if keep else None for d, keep in zip(at.d_inputs, present, strict=False)],
                d_params=[d if keep else None for d, keep in zip(at.d_params, present[len(at.inputs) :], strict=True)],
            )
            if total < 4 or sum(present) in (1, total - 1):
                assert_close(run(case.layer, chosen, case), truth(case.function, chosen), 1e-5)


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_fused_layers_give_only_what_is_wanted(case):
    at = point(case, tasks=2)
    everything = run(case.layer, at, case)
    total = len(at.inputs) + len(at.params)
    for chosen in (0, 1, total - 1):
        for needs in (tuple(i == chosen for i in range(total)), tuple(i != chosen for i in range(total))):
            found = run(case.layer, at, case, needs)
            for part in (1, 3):
                for wanted, ours, full in zip(needs, found[part], everything[part], strict=True):
                    assert (ours is not None) == wanted
                    assert ours is None or torch.equal(ours, full)


def test_ties_and_dead_values_are_treated_as_torch_does():
    case = next(c for c in FUSED if c.name == "norm, relu, pool")
    at = point(case, tasks=2)
    at.inputs[0] = torch.randint(-1, 2, at.inputs[0].shape).double()
    found, expected = run(case.layer, at, case), truth(case.function, at)
    assert_close(found, expected, 1e-5)
    assert torch.equal(found[0][0] == 0, expected[0][0] == 0)


def test_nan_stays_nan():
    x = torch.ones(1, 2, 3, 4, 4, device=DEVICE)
    x[0, 0, 0, 0, 0] = float("nan")
    for layer in (TritonBatchNorm(BN, True, (2, 2)), triton_layer(MaxPool2d((2, 2), (2, 2))), triton_layer(ReLU())):
        ctx_params = [torch.ones(1, 3, device=DEVICE)] * 2 if isinstance(layer, TritonBatchNorm) else []
        y = layer.forward(RuleContext(0, None, (True,), (False, False)), ctx_params, [x])
        assert torch.isnan(y[0, 0, 0]).any()
        assert not torch.isnan(y[0, :, 1:]).any()


class ResNet12(nn.Module):
    """Four blocks of three convolutions with a projected shortcut, each halving the image; narrow."""

    def __init__(self, widths=(3, 4, 5, 6), classes=3):
        super().__init__()
        self.blocks = nn.ModuleList(self._block(a, b) for a, b in itertools.pairwise((2, *widths)))
        self.shortcuts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b))
            for a, b in itertools.pairwise((2, *widths))
        )
        self.head = nn.Linear(widths[-1], classes)

    @staticmethod
    def _block(a, b):
        layers = []
        for i, width in enumerate((a, b, b)):
            layers += [nn.Conv2d(width, b, 3, padding=1, bias=False), nn.BatchNorm2d(b)]
            layers += [nn.LeakyReLU(0.1)] * (i < 2)
        return nn.Sequential(*layers)

    def forward(self, x):
        for block, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            x = F.max_pool2d(F.leaky_relu(block(x) + shortcut(x), 0.1), 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _with_statistics(model):
    """Running statistics for those batch norms that keep none; a batch norm of the task does not look at them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is None:
            module.running_mean, module.running_var = torch.zeros(module.num_features), torch.ones(module.num_features)
    return model


class Normed(nn.Module):
    """Layer norms, GELU, tanh and average pools."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.hidden = nn.Conv2d(2, 4, 3, bias=False), nn.LayerNorm([4, 3, 2]), nn.Linear(24, 7)
        self.wide, self.head = nn.LayerNorm(7), nn.Linear(7, 3)

    def forward(self, x):
        x = F.avg_pool2d(F.gelu(self.conv(x)), 2)
        return self.head(torch.tanh(self.wide(self.hidden(self.norm(x).flatten(1)))))


NETWORKS = [
    Setup("Conv4, max-pool", lambda: _with_statistics(conv4(3, channels=5, image=(1, 19, 16), pool=True)),
          (1, 19, 16), 3, options={"steps": 2}, support=3),
    Setup("Conv4, stride 2", lambda: _with_statistics(conv4(3, channels=5, image=(2, 13, 12))),
          (2, 13, 12), 3, options={"steps": 1, "lr": 0.01}, support=6),
    Setup("ResNet-12", ResNet12, (2, 16, 17), 3, options={"steps": 1, "lr": 0.01}, support=3),
    Setup("norms, rate for each parameter and step", Normed, (2, 8, 7), 3,
          options={"steps": 2, "lr": rate("parameter", "step")}),
]  # fmt: skip
ONE_CALL = ["first order, learned rate", "FOMAML", "Meta-SGD", "multi-step loss, learned rates, none on the last",
            "rate for each layer and step", "ragged regression", "tied weights", "unused parameter",
            "only biases adapted", "SiLU, derived", "batch norm per step", "batch norm not adapted", "residual",
            "functional forms", "ANIL, norm and head", "body adapted, head not", "another loss of query sets",
            "a sum of squares"]  # fmt: skip
IN_PARTS = ["MAML, 3 steps", "first order, learned rate", "batch norm frozen", "ANIL, norm and head"]
SUITE = {s.name: s for s in SETUPS}


def check(setup, one_call):
    torch.manual_seed(1)  # at seed 0 a pool of Conv4 has two values within 1e-7 of each other
    learner = make_learner(setup, torch.float32, "triton", device=DEVICE)
    tasks = make_tasks(setup, tasks=3 if setup.ragged else 2, query=3)
    check_against_oracle(learner, tasks.to(DEVICE), 1e-4, one_call)


@pytest.mark.parametrize("setup", NETWORKS + [SUITE[name] for name in ONE_CALL], ids=str)
def test_whole_programs(setup):
    check(setup, one_call=True)


@pytest.mark.parametrize("name", IN_PARTS)
def test_whole_programs_in_parts(name):
    check(SUITE[name], one_call=False)


def test_what_is_fused():
    learner = make_learner(NETWORKS[0], torch.float32, "reference")
    lowered = lower(learner.program, "float32", torch.device("cpu"))
    assert [n.layer.kind for n in lowered.program.nodes] == ["conv2d+batch_norm"] * 4 + ["flatten", "linear"]
    assert lowered.notes[:4] == ("Triton kernels", "fused into conv1", "fused into conv1", "fused into conv1")
    flat = torch.randn(3, learner.program.size)
    assert torch.equal(lowered.unpack(lowered.pack(flat)), flat)
    assert all(p.offset % 16 == 0 for p in lowered.program.parameters if not p.name.startswith("gap"))
