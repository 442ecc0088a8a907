"""Offsets: batches whose tensors have more elements than 32 bits count, and windows outside of images.

Tensors have no memory in most of these tests. Of each launch only the last program runs, interpreted, with its loads
answered by zeros; Triton's interpreter checks the 32-bit sums and products on the way.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

pytest.importorskip("triton")

import numpy as np
import torch
import triton.language as tl
from loops import meta_gradient
from test_layers import point_without_memory, rules
from test_triton_compile import kernels_of_the_package, layers_with_kernels
from torch import nn
from triton.runtime import interpreter

import metafast as mf
from benchmarks.gpu.counts import modules_that_launch
from metafast.executors.triton import lowering
from metafast.executors.triton.executor import TritonExecutor
from metafast.executors.triton.rules import lower_rule
from metafast.kernels.contract.layer import RuleContext
from metafast.kernels.conv2d import Conv2d
from metafast.kernels.conv2d.kernel import TritonConv2d
from metafast.kernels.max_pool2d import MaxPool2d
from metafast.kernels.primitives.launch import TILES
from metafast.program.capture import capture
from metafast.program.losses import as_loss
from metafast.tasks import TaskBatch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted beside a GPU")
TASKS = 65535
BUILDER = interpreter.interpreter_builder


@pytest.fixture
def launched(monkeypatch):
    """What ran: the kernels' names, and of each its grid and arguments other than tensors."""
    seen = set()

    def last_program(kernel, grid, *args, warps=4, stages=3, registers=None, **constants):
        given = tuple(isinstance(x, torch.Tensor) or x for x in args)
        key = kernel.fn.__name__, grid, given, *constants.values()
        if key in seen:
            return
        seen.add(key)
        grid = (*grid, 1, 1)[:3]
        for name, values in (("program_id", [size - 1 for size in grid]), ("num_programs", grid)):
            monkeypatch.setattr(BUILDER, f"create_get_{name}", lambda axis, values=values: _scalar(values[axis]))
        kernel[(1,)](*(x.new_empty(1, device="cpu") if isinstance(x, torch.Tensor) else x for x in args), **constants)

    for module in modules_that_launch():
        monkeypatch.setattr(module, "launch", last_program)
    monkeypatch.setattr(BUILDER, "create_masked_load", lambda at, mask, *rest: _zeros(at))
    monkeypatch.setattr(BUILDER, "create_masked_store", lambda *rest: None)
    monkeypatch.setattr(BUILDER, "options", replace(BUILDER.options, sanitize_overflow=True, debug=True))
    monkeypatch.setattr(TILES, "depth", 4096)  # fewer steps, each of which is slow here
    return seen


def _scalar(value):
    return interpreter.TensorHandle(np.array([value], dtype=np.int32), tl.int32)


def _zeros(at):
    kind = at.get_element_ty()
    return interpreter.TensorHandle(np.zeros_like(at.data, dtype=interpreter._get_np_dtype(kind)), kind)


def step(model, sample, loss, target=(), kind=torch.float32):
    """A meta-gradient without memory."""
    program = capture(model, as_loss(loss), torch.zeros(2, *sample))
    triton = TritonExecutor(interpreted=True, budget=1 << 60)
    x = torch.empty(TASKS, 5, *sample, device="meta")
    y = torch.empty(TASKS, 5, *target, dtype=kind, device="meta")
    theta, rate = torch.empty(program.size, device="meta"), torch.empty(1, 1, device="meta")
    meta_gradient(triton, program, theta, rate, TaskBatch(x, y, x, y), 1)
    (plan,) = triton.memory_plans.values()
    assert (plan.chunk, plan.keep) == (TASKS, True)


@pytest.mark.parametrize(("outputs", "x"), [(1, (1, 40000, 3, 256, 256)), (64, (1, 1000, 1, 256, 256))])
def test_a_task_beyond_32_bits_is_refused(outputs, x):
    ctx, images = RuleContext(0, None, (True,), (True,)), torch.empty(x, device="meta")
    weight = torch.empty(1, outputs, 1, 1, x[2], device="meta")
    with pytest.raises(ValueError, match=f"{max(outputs, x[2]) * x[1] * 256**2:,} values.*fewer samples"):
        TritonConv2d(Conv2d(bias=False)).forward(ctx, [weight], [images])


def inner_steps(rule):
    """A step by a rule and the way back through it, without memory."""
    lowered, size = lower_rule(rule), 2**31 // TASKS + 100
    z = torch.empty(TASKS, (1 + len(rule.states)) * size, device="meta")
    rows = torch.empty(len(rule.hyper_names), 1, dtype=torch.float64, device="meta")
    given = z, torch.empty(TASKS, size, device="meta"), rows, 1, torch.empty(size, dtype=torch.bool, device="meta")
    with np.errstate(invalid="ignore", divide="ignore"):  # zeros are loaded, eps among them
        lowered.advance(*given)
        lowered.advance_vjp(*given, torch.empty_like(z), True)


def test_offsets_of_the_last_task(launched):
    images = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
                           nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.LeakyReLU(), nn.MaxPool2d(3, 2, 1),
                           nn.AvgPool2d(3), nn.Flatten(), nn.Linear(576, 7000))  # fmt: skip
    step(images, (3, 84, 84), "cross_entropy", kind=torch.int64)
    pools = nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(7), nn.AvgPool2d(12), nn.Flatten())
    step(pools, (1, 84, 84), "mse", (2,))
    features = nn.Sequential(nn.BatchNorm1d(20000), nn.LayerNorm(20000))
    step(features, (20000,), "mse", (20000,))
    for rule in (mf.SGD(momentum=0.9, max_norm=1.0), mf.Adam(max_norm=1.0)):
        inner_steps(rule)
    apart = {"metafast_add_slices"}  # runs where tasks are few
    of_the_package = set(kernels_of_the_package()) - apart
    for case, layer in layers_with_kernels(of_the_package - {name for name, *_ in launched}):
        tasks = 2**31 // math.prod(case.inputs[0]) + 2
        rules(layer, point_without_memory(case, tasks), case.constants, case.step)
    assert {name for name, *_ in launched} == of_the_package


def test_a_window_that_meets_only_padding_reads_nothing():
    layer = lowering.triton_layer(MaxPool2d((2, 2), (1, 1), (1, 1), (3, 3)))  # on four pixels; torch writes outside
    x, ctx = torch.ones(3, 1, 1, 2, 2), RuleContext(0, None, (True,), ())
    assert torch.all(layer.forward(ctx, [], [x]) == -torch.inf)
    assert torch.all(layer.backward(ctx, [], torch.ones(3, 1, 1, 1, 1))[0][0] == 0)
    assert torch.all(layer.tangent_forward(ctx, [], [], [x]) == 0)
