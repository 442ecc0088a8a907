"""Every Triton kernel compiles for GPUs that are not here, at the blocks it would be launched with, without spills.

The executor runs on tensors without memory; each launch is compiled instead, in processes of their own, since this one
may hold the kernels interpreted.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from loops import meta_gradient

from benchmarks.gpu import counts
from metafast.kernels.primitives import contraction
from metafast.kernels.primitives import launch as launching

KERNELS = Path(__file__).parents[1] / "kernels"
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may have


def kernels_of_the_package():
    names = (re.findall(r"^def (metafast_\w+)", path.read_text(), re.M) for path in KERNELS.rglob("*.py"))
    return sorted(name for found in names for name in found)


def layers_with_kernels(names):
    """The cases of layers that have kernels of these names in their folders, and these layers in Triton."""
    from test_layers import CASES

    from metafast.executors.triton.lowering import triton_layer

    for case in CASES:
        folder = Path(inspect.getfile(type(case.layer))).parent
        text = "".join(path.read_text() for path in folder.glob("*.py"))
        if any(f"def {name}(" in text for name in names):
            yield case, triton_layer(case.layer)


def compiled(architecture, *what):
    """What the assembler says of every kernel, or of ``what`` else ``main`` compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join([*inherited, str(KERNELS.parent)])  # benchmarks/ is not installed
    command = [sys.executable, __file__, str(architecture), *what]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def wrong(report, architecture):
    """Does a kernel keep values outside its registers, or ask for more than there is?"""
    return (
        report["stack"] > 0
        or report["registers"] * 32 * report["warps"] > 65536
        or report["shared"] > SHARED[architecture]
    )


@pytest.mark.parametrize("architecture", SHARED)
def test_kernels_compile_without_spills(architecture):
    reports = compiled(architecture)
    assert sorted({r["kernel"] for r in reports}) == kernels_of_the_package()
    assert [r for r in reports if wrong(r, architecture)] == []


def test_a_block_too_large_is_found():
    assert any(wrong(report, 80) for report in compiled(80, "large"))


def products_a_step(reports):
    """By kernel and block how many matrix instructions each precision takes, as multiples of those of TF32; those of
    bf16 reach twice as far along K."""
    found = {}
    for r in reports:
        found.setdefault((r["kernel"], r["block"]), {})[r["precision"]] = r["ptx_mma"]
    return [{k: n * (2 if k == "bf16" else 1) / of["tf32"] for k, n in of.items()} for of in found.values()]


@pytest.mark.parametrize("architecture", SHARED)
def test_float32_multiplies_three_times_and_other_precisions_once(architecture):
    found = products_a_step(compiled(architecture, "precisions"))
    assert len(found) == 5
    assert all(of == {"float32": 3, "tf32": 1, "bf16": 1} for of in found)


def test_a_product_that_is_left_out_is_found():
    assert all(of["float32"] == 2 for of in products_a_step(compiled(90, "planted")))


@triton.jit
def _two_products(acc, a, b, PRECISION: tl.constexpr):
    """A defect: without ``a_hi b_lo``."""
    if PRECISION == "float32":
        a_hi, a_lo = contraction._split(a)
        part = tl.dot(a_lo, b, input_precision="tf32")
        return acc + tl.dot(a_hi, b, part, input_precision="tf32")
    else:
        return tl.dot(a, b, acc)


def main(architecture, what="everything"):
    """Prints the counts of the kernels that a few programs launch, compiled for a GPU that is not here."""
    launched = {}

    def record(kernel, grid, *args, **given):
        found = counts.describe(kernel, grid, args, given, architecture)
        launched.setdefault((found.name, str(found.source[1]), str(found.options), *variant(found.source[2])), found)

    for module in counts.modules_that_launch():
        module.launch = record
    if what == "planted":
        contraction._multiply = _two_products
    if what == "large":
        launching.TILES.rows = 512
    if what in ("precisions", "planted"):
        precisions(("float32", "tf32", "bf16") if what == "precisions" else ("float32", "tf32"))
        chosen = [launch for launch in launched.values() if "PRECISION" in launch.source[2]]
    else:
        everything()
        if what == "everything":
            by_their_cases(set(kernels_of_the_package()) - {launch.name for launch in launched.values()})
        chosen = list(launched.values())
    if what == "large":
        chosen = [next(launch for launch in chosen if launch.name == "metafast_gather_product")]
    print(json.dumps([report(launch, architecture) for launch in chosen]))


def report(launch, architecture):
    constants = launch.source[2]
    block = [(k, constants.get(k)) for k in ("BM", "BN", "BK")] + [constants.get("a1", constants.get("g1")) is None]
    code = vars(counts.compile_code(launch, architecture))
    return {"kernel": launch.name, "block": str(block), "precision": constants.get("PRECISION"), **code}


def everything():
    """Every kernel, at the blocks it would be launched with: grids that fill the GPU and such that do not."""
    from torch import nn

    conv4 = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.LeakyReLU(), nn.MaxPool2d(3, 2, 1),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))  # fmt: skip
    narrow = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
                           nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(3200, 5)
                           )  # fmt: skip
    mlp = nn.Sequential(nn.Linear(40, 80), nn.LayerNorm(80), nn.GELU(), nn.BatchNorm1d(80), nn.Linear(80, 8), nn.Tanh())
    step(conv4, (3, 84, 84), 5, "cross_entropy")
    step(conv4, (3, 20, 20), 5, "cross_entropy")
    step(conv4, (3, 84, 84), 5, "cross_entropy", "bf16")
    step(narrow, (3, 20, 20), 5, "cross_entropy")
    step(conv4[4:6], (64, 42, 42), 0, "mse", "tf32")
    step(mlp, (40,), 0, "mse")
    every_elementwise_layer()
    every_step()


def every_elementwise_layer():
    """The one kernel of all of them, which is another one for each."""
    from test_layers import point_without_memory, rules

    from metafast.kernels.pointwise import cases, kernel

    for case in cases.CASES:
        layer = kernel.lower(case.layer, "float32")
        if layer is not None:
            rules(layer, point_without_memory(case, 4), case.constants, case.step)


def every_step():
    """Steps by rules and their way back, with hyper-parameters that are learned and such that are not."""
    import torch
    from test_triton_rules import CASES, rows_of, rule_of

    from metafast.executors.triton.rules import lower_rule

    size, tasks = 112_000, 8
    moved = torch.empty(size, dtype=torch.bool, device="meta")
    for case in CASES:
        rule = rule_of(case)
        rows, fused = rows_of(rule, size, case.wide).to("meta"), lower_rule(rule)
        z = torch.empty(tasks, (1 + len(rule.states)) * size, device="meta")
        gradient = torch.empty(tasks, size, device="meta")
        fused.advance(z, gradient, rows, case.count, moved)
        for learns in (True, False)[: 1 + case.wide]:  # what learns nothing has a part of the code alone
            fused.advance_vjp(z, gradient, rows, case.count, moved, z, learns)


def by_their_cases(names):
    """Kernels that none of the networks launches, at the sizes at which their layers are tested."""
    from test_layers import point_without_memory, rules

    for case, layer in layers_with_kernels(names):
        rules(layer, point_without_memory(case, 4), case.constants, case.step)


def precisions(chosen):
    """The products of a convolution and of a linear layer, each way: one, four and eight warps."""
    import torch
    from torch import nn

    from metafast.tasks import Batch

    for precision in chosen:
        for model, sample, tasks in ((nn.Conv2d(64, 64, 3), (64, 84, 84), 4), (nn.Linear(800, 5), (800,), 1)):
            program, executor, y = compose(model, sample, "mse", precision)
            batch = Batch(*(torch.empty(tasks, 5, *shape, device="meta") for shape in (sample, y)))
            executor.loss_and_grad(program, torch.empty(program.size, device="meta"), batch)


def step(model, sample, ways, loss, precision="float32"):
    """A meta-gradient of four tasks and the gradient of a larger batch, without memory."""
    import torch

    from metafast.tasks import Batch, TaskBatch

    program, executor, outputs = compose(model, sample, loss, precision)

    def samples(n):
        y = torch.empty(4, n, dtype=torch.int64) if ways else torch.empty(4, n, *outputs)
        return torch.empty(4, n, *sample, device="meta"), y.to("meta")

    tasks = TaskBatch(*samples(5), *samples(5))
    theta, rate = torch.empty(program.size, device="meta"), torch.empty(1, program.size, device="meta")
    meta_gradient(executor, program, theta, rate, tasks, 1)
    executor.loss_and_grad(program, theta, Batch(*samples(200)))


def compose(model, sample, loss, precision):
    """A program, an executor for it and the shape of a sample's output."""
    import torch

    from metafast.executors.triton.executor import TritonExecutor
    from metafast.program.capture import capture
    from metafast.program.losses import as_loss

    x = torch.zeros(2, *sample)
    return capture(model, as_loss(loss), x), TritonExecutor(precision), model(x).shape[1:]


def variant(constexprs):
    """What changes the shape of the code: blocks and rules; of the sizes only which path they take."""
    for name, value in constexprs.items():
        if isinstance(value, (str, bool)) or name.startswith("B"):
            yield name, value
        elif name in ("NORM", "VALUE", "STATES"):
            yield name, value > 0
        elif name == "S":
            yield getattr(value, "channels", 0) >= 16, getattr(value, "classes_h", 1), getattr(value, "window_h", 1)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
