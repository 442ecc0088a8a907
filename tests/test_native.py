"""The native executor against the reference one, which test_layers.py and test_meta_gradients.py hold to the oracle."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from loops import Found, adapt, adapt_vjp, loop, meta_gradient, refusal
from test_layers import CASES
from torch import nn

from metafast.executors import CpuExecutor, Executor, ReferenceExecutor
from metafast.kernels.conv2d import Conv2d
from metafast.kernels.cross_entropy import CrossEntropy
from metafast.kernels.linear import Linear
from metafast.kernels.mse import MSE
from metafast.program import Node, Parameter, Program
from metafast.program.capture import capture
from metafast.tasks import TaskBatch

pytestmark = pytest.mark.skipif(not CpuExecutor.isas(), reason="metafast._C is not built")

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
ONE_RATE, A_RATE_A_STEP, A_RATE_A_PARAMETER = "one rate", "a rate a step", "a rate a step and parameter"


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    error = float((found - expected).double().norm())
    assert error <= tolerance * max(float(expected.double().norm()), 1e-3), f"off by {error:.1e}"


def rates(kind, steps, size, dtype):
    shape = {ONE_RATE: (1, 1), A_RATE_A_STEP: (steps, 1), A_RATE_A_PARAMETER: (steps, size)}[kind]
    return 0.02 + 0.05 * torch.rand(shape, dtype=dtype)


def compare(program, params, tasks, steps=2, kind=ONE_RATE, native=None, **options):
    """The meta-gradient of both executors; returns the native one."""
    lr = rates(kind, steps, program.size, params.dtype)
    native = native or CpuExecutor()
    found = meta_gradient(native, program, params, lr, tasks, steps, **options)
    expected = meta_gradient(ReferenceExecutor(), program, params, lr, tasks, steps, **options)
    tolerance = TOLERANCE[params.dtype]
    for part in ("losses", "outputs", "grad", "rates_grad"):
        close(getattr(found, part), getattr(expected, part), tolerance)
    return found


def program_around(case):
    """``case``'s layer behind a layer of parameters, so that its input has a tangent and its adjoint is wanted."""
    parameters, nodes, size = [], [], 0

    def add_parameters(name, shapes):
        nonlocal size
        first = len(parameters)
        for i, shape in enumerate(shapes):
            parameters.append(Parameter(f"{name}.{i}", tuple(shape), size, True))
            size += torch.Size(shape).numel()
        return tuple(range(first, len(parameters)))

    for i, shape in enumerate(case.inputs):
        features = shape[1] if len(shape) > 1 else 1
        layer, kernel = (Conv2d(), (1, 1)) if len(shape) == 4 else (Linear(), ())
        before = add_parameters(f"before{i}", [(features, features, *kernel), (features,)])
        nodes.append(Node(f"before{i}", layer, (0,), before))
    inputs = tuple(range(1, len(nodes) + 1))
    nodes.append(Node("layer", case.layer, inputs, add_parameters("layer", case.params), case.constants))
    return Program(tuple(nodes), tuple(parameters), len(nodes), MSE())


def foreign(case):
    """What it leaves to others: groups, values that are neither vectors nor images, broadcasting."""
    ranks = [len(shape) for shape in case.inputs]
    if (
        any(rank not in (2, 4) for rank in ranks)
        or len(set(case.inputs)) > 1
        or case.layer.kind in ("derived", "dropout")
    ):
        return True
    layer = case.layer
    part = {
        "layer_norm": lambda: layer.axes != ranks[0] - 1,
        "conv2d": lambda: layer.groups != 1,
        "linear": lambda: ranks[0] != 2,
        "flatten": lambda: (layer.start, layer.end) not in ((1, -1), (1, 3)),
    }
    return part.get(layer.kind, lambda: False)()


NATIVE_CASES = [case for case in CASES if not foreign(case)]


def case_tasks(case, dtype, tasks=2):
    sample = case.inputs[0][1:]
    values = tuple(torch.zeros(s) for s in case.inputs)
    output = case.function(tuple(torch.zeros(s) for s in case.params), values).shape[1:]
    n = case.inputs[0][0]
    parts = [torch.randn(tasks, k, *shape) for k in (n, n + 1) for shape in (sample, output)]
    return TaskBatch(*(p.to(dtype) for p in parts))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", NATIVE_CASES, ids=str)
def test_layer(case, dtype):
    program, tasks = program_around(case), case_tasks(case, dtype)
    native, reference = CpuExecutor(), ReferenceExecutor()
    assert refusal(native, program, tasks.support_x) is None
    params = (0.3 * torch.randn(program.size)).to(dtype)
    compare(program, params, tasks)
    tolerance = TOLERANCE[dtype]
    found = native.loss_and_grad(program, params, tasks.query, case.step)
    for a, b in zip(found, reference.loss_and_grad(program, params, tasks.query, case.step), strict=True):
        close(a, b, tolerance)
    outputs = native.predict(program, params, tasks.query_x, case.step)
    assert torch.equal(outputs, found[2])


@pytest.mark.parametrize("case", [case for case in CASES if foreign(case) and len(case.inputs) == 1], ids=str)
def test_foreign_layers_are_refused(case):
    program = program_around(case)
    assert refusal(CpuExecutor(), program, torch.zeros(2, *case.inputs[0]))


class Renamed(Linear):
    """A linear layer that calls its weight otherwise than C++ does."""

    parameter_names = ("matrix",)


def test_a_parameter_that_cpp_has_no_place_for_is_refused():
    program = Program(
        (Node("head", Renamed(bias=False), (0,), (0,)),), (Parameter("head.matrix", (2, 3), 0, True),), 1, MSE()
    )
    reason = refusal(CpuExecutor(), program, torch.zeros(2, 4, 3))
    assert reason == "head: linear has parameters 'matrix'; C++ knows 'weight' and 'bias'"


class Broadcast(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 1), nn.Linear(8, 2)

    def forward(self, x):
        h = self.conv(x)
        return self.head((h + nn.functional.adaptive_avg_pool2d(h, 1)).flatten(1))


def test_broadcasting_is_refused():
    program = capture(Broadcast(), MSE(), torch.zeros(3, 1, 2, 2))
    assert "different shapes" in refusal(CpuExecutor(), program, torch.zeros(2, 3, 1, 2, 2))


def block(inputs, outputs, pool=True, norm=True):
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1)]
    layers += [nn.BatchNorm2d(outputs)] if norm else []
    return [*layers, nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]


def conv_net():
    return nn.Sequential(*block(2, 5), *block(5, 8), nn.Flatten(), nn.Linear(8 * 3 * 2, 3))


def mlp():
    return nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 9), nn.GELU(), nn.Linear(9, 3))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.short = nn.Conv2d(2, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(2, 6, 1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.norm(self.first(x)))
        h = self.second(h) + self.short(x) + h
        return self.head(nn.functional.adaptive_avg_pool2d(h + h, 1).flatten(1))


def panels(layer, *widths):
    """Widths on both sides of a pack and of a panel."""
    return [part for i, o in pairwise(widths) for part in (layer(i, o), nn.Tanh())]


MODELS = {
    "conv": (conv_net, (2, 13, 9)),
    "mlp": (mlp, (3,)),
    "residual": (Residual, (2, 9, 7)),
    "wide vectors": (lambda: nn.Sequential(*panels(nn.Linear, 7, 40, 1, 17, 33), nn.Linear(33, 3)), (7,)),
    "wide images": (
        lambda: nn.Sequential(
            *panels(partial(nn.Conv2d, kernel_size=3, padding=1), 3, 17, 9, 33), nn.MaxPool2d(5), nn.Flatten(),
            nn.Linear(33 * 4, 3),
        ),
        (3, 10, 12),
    ),
}  # fmt: skip


def setup(name, dtype=torch.float64, tasks=3, support=4, query=5, **options):
    torch.manual_seed(1)
    make, sample = MODELS[name]
    model = make()
    program = capture(model, CrossEntropy(), torch.zeros(support, *sample), **options)
    named = {n: p.detach() for n, p in model.named_parameters()}
    if options.get("bn") == "per_step":
        named = {p.name: named[p.name].expand(p.shape) for p in program.parameters}
    params = program.flatten(named)
    params = (params + 0.05 * torch.randn_like(params)).to(dtype)
    x = [torch.randn(tasks, n, *sample).to(dtype) for n in (support, query)]
    y = [torch.randint(0, 3, (tasks, n)) for n in (support, query)]
    return program, params, TaskBatch(x[0], y[0], x[1], y[1])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", [ONE_RATE, A_RATE_A_STEP, A_RATE_A_PARAMETER])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_program(name, first_order, kind, dtype):
    compare(*setup(name, dtype), steps=3, kind=kind, first_order=first_order)


@pytest.mark.parametrize("bn", ["task", "per_step", "frozen", "running"])
@pytest.mark.parametrize("weights", [None, [0.0, 0.2, 0.3, 0.5], [0.3, 0.0, 0.7, 0.0]])
def test_batch_norm_modes_and_step_weights(bn, weights):
    compare(*setup("conv", bn=bn, steps=3), steps=3, step_weights=weights)


@pytest.mark.parametrize(
    "adapt", [["8.weight", "8.bias"], ["0.weight", "4.weight"], ["1.weight"], ["0.weight", "8.bias"]]
)
def test_frozen_parameters(adapt):
    native, program = compare_frozen(adapt)
    assert float(native.grad[~program.adapted].norm()) > 1e-3


def compare_frozen(adapt):
    torch.manual_seed(1)
    net = nn.Sequential(*block(2, 5), *block(5, 8), nn.Flatten(), nn.Linear(8 * 3 * 2, 3))
    names = {"8.weight": "9.weight", "8.bias": "9.bias"}
    program = capture(net, CrossEntropy(), torch.zeros(4, *MODELS["conv"][1]), adapt=[names.get(a, a) for a in adapt])
    params = program.flatten({n: p.detach() for n, p in net.named_parameters()}).double()
    _, _, tasks = setup("conv")
    return compare(program, params, tasks, kind=A_RATE_A_PARAMETER), program


@pytest.mark.parametrize("name", MODELS)
def test_the_four_functions_make_the_fused_one(name):
    """Its own composition of adapt, loss_and_grad and adapt_vjp, and the reference's; each task has its own start."""
    program, params, tasks = setup(name)
    native, reference = CpuExecutor(), ReferenceExecutor()
    lr = rates(A_RATE_A_PARAMETER, 3, program.size, params.dtype)
    weights = [0.1, 0.2, 0.3, 0.4]
    fused = meta_gradient(native, program, params, lr, tasks, 3, step_weights=weights)
    composed = Executor.meta_gradient(native, program, loop(3, weights, learns_rates=True), (params,), lr, tasks)
    composed = Found(composed.losses, composed.outputs, composed.grads[0], composed.rates_grad)
    for part in ("losses", "outputs", "grad", "rates_grad"):
        close(getattr(fused, part), getattr(composed, part), 1e-12)
    starts = params + 0.1 * torch.randn(len(tasks), program.size, dtype=params.dtype)
    trajectory = adapt(native, program, starts, lr, tasks.support, 3)
    close(trajectory, adapt(reference, program, starts, lr, tasks.support, 3), 1e-9)
    for v in (torch.randn_like(trajectory), torch.randn_like(trajectory[0])):
        for first_order in (False, True):
            found = adapt_vjp(native, program, trajectory, lr, tasks.support, v, first_order=first_order)
            expected = adapt_vjp(reference, program, trajectory, lr, tasks.support, v, first_order=first_order)
            close(found[0], expected[0], 1e-9)
            close(found[1], expected[1], 1e-9)


def compare_network(model, sample, samples):
    x = [torch.randn(2, n, *sample, dtype=torch.float64) for n in samples]
    program = capture(model.double(), MSE(), x[0][0])
    y = [torch.randn(*v.shape[:2], 2, dtype=torch.float64) for v in x]
    params = program.flatten({n: p.detach() for n, p in model.named_parameters()})
    compare(program, params, TaskBatch(x[0], y[0], x[1], y[1]))


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_random_vectors(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    torch.manual_seed(draw(0, 1000))
    widths = [draw(1, 70) for _ in range(draw(2, 4))]
    layers = []
    for inputs, outputs in pairwise(widths):
        layers.append(nn.Linear(inputs, outputs, bias=data.draw(st.booleans())))
        layers += [nn.LayerNorm(outputs)] if outputs > 1 and data.draw(st.booleans()) else []
        layers.append(data.draw(st.sampled_from([nn.ReLU(), nn.Tanh(), nn.GELU()])))
    compare_network(nn.Sequential(*layers, nn.Linear(widths[-1], 2)), (widths[0],), [draw(1, 13), draw(1, 13)])


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_random_networks(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    torch.manual_seed(draw(0, 1000))
    channels, size = draw(1, 9), [draw(4, 17), draw(4, 17)]
    sample, layers = (channels, *size), []
    for _ in range(draw(1, 3)):
        outputs, kernel, pad, stride = draw(1, 18), [draw(1, 3), draw(1, 3)], [draw(0, 2), draw(0, 1)], draw(1, 2)
        kernel = [min(k, s + 2 * p) for k, s, p in zip(kernel, size, pad, strict=True)]
        layers.append(nn.Conv2d(channels, outputs, kernel, stride, pad, bias=data.draw(st.booleans())))
        size = [(s + 2 * p - k) // stride + 1 for k, s, p in zip(kernel, size, pad, strict=True)]
        several = size[0] * size[1] > 1  # one sample of one pixel has no variance, and is refused
        layers += [nn.BatchNorm2d(outputs, eps=0.1)] if several and data.draw(st.booleans()) else []
        layers.append(data.draw(st.sampled_from([nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.LeakyReLU(0.2)])))
        if min(size) >= 2 and data.draw(st.booleans()):
            layers.append(data.draw(st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(2)])))
            size = [s // 2 for s in size]
        channels = outputs
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size[0] * size[1], 2))
    compare_network(model, sample, [draw(1, 4), draw(1, 4)])


def bits(program, params, tasks, native=None, threads=1, steps=2):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native = native or CpuExecutor()
        return meta_gradient(native, program, params, torch.full((1, 1), 0.05, dtype=params.dtype), tasks, steps)
    finally:
        torch.set_num_threads(before)


def assert_same_bits(a, b):
    for part in ("losses", "outputs", "grad", "rates_grad"):
        assert torch.equal(getattr(a, part), getattr(b, part)), part


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tasks", [1, 3, 70])
def test_same_bits_for_any_number_of_threads(name, tasks):
    made = setup(name, torch.float32, tasks)
    once = bits(*made)
    for threads in (1, 2, 3):
        assert_same_bits(bits(*made, threads=threads), once)


@pytest.mark.parametrize("name", MODELS)
def test_activations_may_be_kept_or_computed_again(name):
    made = setup(name, torch.float32)
    assert_same_bits(bits(*made, native=CpuExecutor(budget=0)), bits(*made))


@pytest.mark.parametrize("name", MODELS)
def test_old_memory_does_not_matter(name):
    """Working memory is used again from call to call: here it is full of NaN."""
    program, params, tasks = setup(name, torch.float32)
    clean = bits(program, params, tasks)
    spoilt = bits(program, params * torch.nan, tasks)
    assert spoilt.losses.isnan().all()
    assert_same_bits(bits(program, params, tasks), clean)


@pytest.mark.parametrize("isa", CpuExecutor.isas())
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_instruction_set(name, isa, dtype):
    compare(*setup(name, dtype), native=CpuExecutor(isa=isa))


def test_refusals_say_why():
    program, _, tasks = setup("conv")
    native = CpuExecutor()
    assert refusal(native, program, tasks.support_x) is None
    assert "bfloat16" in refusal(native, program, tasks.support_x.bfloat16())
    assert "meta" in refusal(native, program, tasks.support_x.to("meta"))
    assert refusal(native, program, tasks.support_x, ragged=True) is None
    assert "features" in refusal(native, program, tasks.support_x[..., :7])
    assert "no-such" in refusal(CpuExecutor(isa="no-such"), program, tasks.support_x)


def test_labels_out_of_range():
    program, params, tasks = setup("conv")
    tasks.query_y[1, 2] = 3
    with pytest.raises(ValueError, match=r"label 3 of task 1 is outside 0\.\.2"):
        bits(program, params, tasks)


def test_memory_is_kept_within_the_budget():
    program, _, tasks = setup("conv", torch.float32)
    much, little = (native.memory(program, loop(3), tasks.shapes) for native in (CpuExecutor(), CpuExecutor(budget=0)))
    assert much.keep
    assert not little.keep
    assert little.peak < much.peak < 10 << 20
