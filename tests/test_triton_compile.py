"""Every Triton kernel compiles for GPUs that are not here, at the blocks it would be launched with, without spills.

The executor runs on tensors without memory; each launch is compiled instead, in processes of their own, since this one
may hold the kernels interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "kernels"
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may have


def kernels_of_the_package():
    names = (re.findall(r"^def (metafast_\w+)", path.read_text(), re.M) for path in KERNELS.rglob("*.py"))
    return sorted(name for found in names for name in found)


def modules_that_launch():
    from metafast.executors import lowering

    layers = {sys.modules[kind.__module__] for kind in vars(lowering).values() if hasattr(kind, "__module__")}
    shared = [sys.modules[f"metafast.kernels.{name}"] for name in ("products", "sums", "windows")]
    return [module for module in (*layers, *shared) if hasattr(module, "launch")]


def compiled(architecture, rows=None):
    """What the assembler says of every kernel; with ``rows`` of a product alone, in blocks of so many."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(architecture), *([] if rows is None else [str(rows)])]
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
    assert any(wrong(report, 80) for report in compiled(80, rows=512))


def main(architecture, rows=None):
    import torch
    import triton
    from torch import nn

    from metafast.capture import capture
    from metafast.executors.triton import TritonExecutor
    from metafast.kernels import launch as launching
    from metafast.losses import as_loss
    from metafast.tasks import Batch, TaskBatch

    launched = {}

    def record(kernel, grid, *args, warps=4, stages=3, registers=None, **constants):
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        if registers is not None and architecture >= launching.CAPPED:
            options["maxnreg"] = registers
        source = described(kernel, dict(zip(kernel.arg_names, args, strict=False)) | constants)
        launched.setdefault((kernel.__name__, str(source[1]), warps, *variant(source[2])), (source, options))

    def step(model, sample, ways, loss, precision="float32"):
        program, executor = capture(model, as_loss(loss)), TritonExecutor(precision)

        def samples(n):
            y = torch.empty(4, n, dtype=torch.int64) if ways else torch.empty(4, n, 8)
            return torch.empty(4, n, *sample, device="meta"), y.to("meta")

        tasks = TaskBatch(*samples(5), *samples(5))
        theta, rate = torch.empty(program.size, device="meta"), torch.empty(1, program.size, device="meta")
        executor.meta_gradient(program, theta, rate, tasks, 1)
        executor.loss_and_grad(program, theta, Batch(*samples(200)))

    if rows is not None:
        launching.TILES.rows = rows
    for module in modules_that_launch():
        module.launch = record
    conv4 = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.LeakyReLU(), nn.MaxPool2d(3, 2, 1),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))  # fmt: skip
    step(conv4, (3, 84, 84), 5, "cross_entropy")
    step(conv4, (3, 84, 84), 5, "cross_entropy", "bf16")
    step(conv4[4:6], (64, 42, 42), 0, "mse", "tf32")
    mlp = nn.Sequential(nn.Linear(40, 80), nn.LayerNorm(80), nn.GELU(), nn.BatchNorm1d(80), nn.Linear(80, 8), nn.Tanh())
    step(mlp, (40,), 0, "mse")

    if rows is not None:
        launched = dict([next((k, v) for k, v in launched.items() if k[0] == "metafast_gather_product")])

    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    reports = []
    for source, options in launched.values():
        found = triton.compile(triton.compiler.ASTSource(*source), target=target, options=options)
        reports.append({"kernel": source[0].__name__, "warps": options["num_warps"], "shared": found.metadata.shared,
                        **resources(found.asm["cubin"]), "constants": str(source[2])})  # fmt: skip
    print(json.dumps(reports))


def described(kernel, given):
    """The kernel with the types, constants and alignments of its arguments, as a launch would find them."""
    import torch

    kinds = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.int16: "*i16",
             torch.int64: "*i64"}  # fmt: skip
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = given[name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], place = kinds[value.dtype], value.storage_offset() * value.element_size()
        else:
            signature[name], place = ("fp32", 1) if isinstance(value, float) else ("i32", value)
        if place % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return kernel, signature, constants, attributes


def variant(constexprs):
    """What changes the shape of the code: blocks and rules; of the sizes only which path they take."""
    for name, value in constexprs.items():
        if isinstance(value, (str, bool)) or name.startswith("B"):
            yield name, value
        elif name == "S":
            yield getattr(value, "channels", 0) >= 16, getattr(value, "classes_h", 1), getattr(value, "window_h", 1)


def resources(cubin):
    """Registers and bytes of stack of a thread, as the assembler has written them into the binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(found[1]), "stack": int(found[2])}


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
