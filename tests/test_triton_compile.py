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


def compiled(architecture, rows=None):
    """What the assembler says of every kernel; ``rows`` of a product's block in place of the default."""
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
    found = {r["kernel"] for r in compiled(80, rows=1024) if wrong(r, 80)}
    assert "metafast_gather_product" in found


def main(architecture, rows=None):
    import torch
    import triton
    from torch import nn

    from metafast.capture import capture
    import metafast.executors.lowering  # imports the kernels
    from metafast.executors.triton import PRECISIONS, TritonExecutor
    from metafast.kernels import launch as launching
    from metafast.losses import as_loss
    from metafast.tasks import Batch, TaskBatch

    launched = {}

    def record(kernel, grid, *args, warps=4, stages=3, **constants):
        given = dict(zip(kernel.arg_names, args, strict=False)) | constants
        signature, constexprs, attributes = {}, {}, {}
        for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
            value = given[name]
            if parameter.is_constexpr or value is None:
                signature[name], constexprs[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = KINDS[value.dtype]
                if value.storage_offset() * value.element_size() % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        launched.setdefault(
            (kernel.__name__, str(signature), warps, *variant(constexprs)),
            (kernel, signature, constexprs, attributes, warps, stages),
        )

    def step(model, sample, ways, loss, precision="float32"):
        program, executor = capture(model, as_loss(loss)), TritonExecutor(precision)

        def samples(n):
            y = torch.empty(4, n, dtype=torch.int64) if ways else torch.empty(4, n, 8)
            return torch.empty(4, n, *sample, device="meta"), y.to("meta")

        tasks = TaskBatch(*samples(5), *samples(5))
        theta, rate = torch.empty(program.size, device="meta"), torch.empty(1, program.size, device="meta")
        executor.meta_gradient(program, theta, rate, tasks, 1)
        executor.loss_and_grad(program, theta, Batch(*samples(200)))

    KINDS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.int16: "*i16",
             torch.int64: "*i64"}  # fmt: skip
    if rows is not None:
        launching.TILES.rows = rows
    for name, module in list(sys.modules.items()):
        if name.startswith("metafast.kernels.") and hasattr(module, "launch"):
            module.launch = record
    conv4 = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.LeakyReLU(), nn.MaxPool2d(3, 2, 1),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))  # fmt: skip
    for precision in PRECISIONS:
        step(conv4, (3, 84, 84), 5, "cross_entropy", precision)
    mlp = nn.Sequential(nn.Linear(40, 80), nn.LayerNorm(80), nn.GELU(), nn.BatchNorm1d(80), nn.Linear(80, 8), nn.Tanh())
    step(mlp, (40,), 0, "mse")

    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    reports = []
    for kernel, signature, constexprs, attributes, warps, stages in launched.values():
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        source = triton.compiler.ASTSource(kernel, signature, constexprs, attributes)
        compiled = triton.compile(source, target=target, options=options)
        reports.append({"kernel": kernel.__name__, "warps": warps, "shared": compiled.metadata.shared,
                        **resources(compiled.asm["cubin"]), "constants": str(constexprs)})  # fmt: skip
    print(json.dumps(reports))


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
