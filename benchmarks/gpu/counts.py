"""Counts, without a GPU, what the Triton executor would run on one: ``python -m benchmarks.gpu.counts``.

For each workload it counts the launches of each kernel in a meta-step, the torch operators that launch something beside
them, and the bytes of the kernels' tensors. It compiles each contraction and norm kernel with the installed Triton and
shows its grid, instructions, registers, stack and shared memory. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import metafast as mf
from metafast import kernels as layers
from metafast.bench.workloads import Workload, workload
from metafast.executors.triton.executor import TritonExecutor
from metafast.kernels.primitives import launch as launching
from metafast.program.capture import capture
from metafast.program.inner_loop import InnerLoop
from metafast.program.losses import as_loss
from metafast.tasks import TaskBatch

WORKLOADS = ("omni5w1s-1", "omni5w1s-5", "omni20w1s-5", "mini5w1s-5", "torchbench-maml")
HOT = ("metafast_gather_product", "metafast_weight_gradient", "metafast_norm")
PROCESSORS = 132  # the multiprocessors of an H100
BUDGET = 40 << 30  # bytes: half of an H100's memory
TYPES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int8: "*i8",
         torch.int16: "*i16", torch.int64: "*i64"}  # fmt: skip
RULES = {"plain": None, "momentum": mf.SGD(momentum=0.9), "adam": mf.Adam()}


@dataclass
class Launch:
    """A launch of a kernel.

    Args:
        kernel: the kernel.
        grid: the numbers of blocks.
        source: the arguments of ``ASTSource``: kernel, types, constants, alignments.
        options: the options of Triton's compiler.
        bytes: the bytes of all tensors among the arguments.
    """

    kernel: Any
    grid: tuple[int, ...]
    source: tuple[Any, ...]
    options: dict[str, Any]
    bytes: int

    @property
    def name(self) -> str:
        return self.kernel.__name__


@dataclass
class Step:
    """One meta-gradient: its launches in order, and how often each torch operator launches something."""

    launches: list[Launch] = field(default_factory=list)
    operators: Counter = field(default_factory=Counter)


def modules_that_launch() -> list[Any]:
    """Returns the modules of ``kernels`` that hold a name ``launch``, in whose place ``meta_step`` puts a recorder."""
    names = [entry.name for entry in walk_packages(layers.__path__, f"{layers.__name__}.") if not entry.ispkg]
    modules = [import_module(name) for name in names]
    return [module for module in modules if hasattr(module, "launch") and module is not launching]


def meta_step(work: Workload, architecture: int, rule: mf.Rule | None = None) -> Step:
    """Collects what a meta-gradient of the workload launches, on meta tensors, which have no memory.

    Its inner steps are plain, or those of ``rule``.
    """
    drawn = work.draw()
    step, program = Step(), capture(work.network(), as_loss(work.loss), drawn.support_x[0])
    executor = TritonExecutor(budget=BUDGET)
    parts = (drawn.support_x, drawn.support_y, drawn.query_x, drawn.query_y)
    tasks = TaskBatch(*(x.to("meta") for x in parts))
    theta, rates = torch.empty(program.size, device="meta"), torch.empty(1, 1, device="meta")
    if rule is not None:
        rates = torch.empty(len(rule.hyper_names), 1, 1, device="meta", dtype=torch.float64)

    def run() -> None:
        executor.meta_gradient(program, InnerLoop.judged_last(work.steps, rule=rule), (theta,), rates, tasks)

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        step.launches.append(describe(kernel, grid, args, options, architecture))

    run()  # the first run makes the memory plan
    modules = modules_that_launch()
    originals = [module.launch for module in modules]
    try:
        for module in modules:
            module.launch = record
        with Operators(step.operators):
            run()
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.launch = original
    return step


class Operators(TorchDispatchMode):
    """Counts the operators that would launch a kernel: all but those that make a view or empty memory."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        fresh = any(x.untyped_storage()._cdata not in known for x in made)
        name = func.overloadpacket.__name__
        if "empty" not in name and (fresh or func._schema.is_mutable):
            self.counter[name] += 1
        return result


def describe(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], keywords: dict[str, Any], arch: int) -> Launch:
    """Describes a launch on a GPU of architecture ``arch``. ``keywords`` has the options of ``launch`` and the kernel's
    constants."""
    options, constants = launching.options(arch, **keywords)
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    signature, constexprs, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:  # Triton compiles these in
            signature[name], constexprs[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name], place = TYPES[value.dtype], value.storage_offset() * value.element_size()
        else:
            signature[name], place = ("fp32", 1) if isinstance(value, float) else ("i32", value)
        if place % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    moved = sum(x.numel() * x.element_size() for x in args if isinstance(x, Tensor))
    return Launch(kernel, grid, (kernel, signature, constexprs, attributes), options, moved)


@dataclass
class Code:
    """What the compiler and the assembler made of a kernel.

    Args:
        ptx: the PTX instructions.
        ptx_mma: the matrix instructions among them.
        sass: the SASS instructions.
        loop: the SASS instructions of the longest loop that multiplies matrices, or else of the longest loop.
        multiplies: the matrix instructions in that loop.
        registers: the registers of a thread.
        stack: the bytes of local memory of a thread.
        shared: the bytes of shared memory of a block.
        warps: the warps of a block.
    """

    ptx: int
    ptx_mma: int
    sass: int
    loop: int
    multiplies: int
    registers: int
    stack: int
    shared: int
    warps: int


def compile_code(launch: Launch, architecture: int) -> Code:
    """Compiles the kernel for a GPU of that architecture, which this machine need not have."""
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    found = triton.compile(triton.compiler.ASTSource(*launch.source), target=target, options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        used, sass = (_cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
    resources = re.search(r"REG:(\d+) STACK:(\d+)", used)
    assert resources is not None, used
    instructions = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(.*?);", sass, re.M)
    lines = [line.strip() for line in found.asm["ptx"].splitlines()]
    body = _loop(instructions)
    return Code(
        ptx=sum(line.endswith(";") and not line.startswith(".") for line in lines),
        ptx_mma=sum(bool(re.search(r"\b(mma\.sync|wgmma\.mma_async)", line)) for line in lines),
        sass=sum(text != "NOP" for _, text in instructions), loop=len(body), multiplies=_multiplies(body),
        registers=int(resources[1]), stack=int(resources[2]), shared=found.metadata.shared,
        warps=launch.options["num_warps"],
    )  # fmt: skip


def _cuobjdump(flag: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout


def _multiplies(body: list[str]) -> int:
    return sum("HGMMA" in text or "HMMA" in text for text in body)


def _loop(instructions: list[tuple[str, str]]) -> list[str]:
    """Returns the instructions of a loop, from the target of a backward branch to the branch."""
    places = {int(address, 16): i for i, (address, _) in enumerate(instructions)}
    loops = []
    for i, (_, text) in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        start = places.get(int(target[1], 16)) if target else None
        if start is not None and start < i:
            loops.append([body for _, body in instructions[start : i + 1]])
    return max(loops, key=lambda body: (_multiplies(body) > 0, len(body)), default=[])


def kernels(step: Step, architecture: int) -> list[dict[str, Any]]:
    """Returns a row for each kernel in ``HOT`` and each of its grids, in the order of their first launch."""
    grouped: dict[str, list[Launch]] = {}
    for launch in step.launches:
        if launch.name.startswith(HOT):
            key = str((launch.name, launch.grid, launch.source[1:], launch.options))
            grouped.setdefault(key, []).append(launch)
    rows = []
    for alike in grouped.values():
        launch = alike[0]
        constants, code = launch.source[2], compile_code(launch, architecture)
        shape = "x".join(str(constants[k]) for k in ("BM", "BN", "BK", "BR", "BC") if k in constants)
        each = torch.Size(launch.grid).numel() / PROCESSORS
        rows.append({"kernel": launch.name, "launches": len(alike), "block": shape, "grid": list(launch.grid),
                     "blocks_a_processor": each, **asdict(code)})  # fmt: skip
    return rows


def report(work: Workload, architecture: int, rule: mf.Rule | None) -> dict[str, Any]:
    """Returns all counts of one workload."""
    step = meta_step(work, architecture, rule)
    return {"workload": work.name, "launches": len(step.launches), "operators": sum(step.operators.values()),
            "bytes": sum(launch.bytes for launch in step.launches),
            "by_kernel": dict(Counter(launch.name for launch in step.launches).most_common()),
            "by_operator": dict(step.operators.most_common()), "kernels": kernels(step, architecture)}  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """Prints the counts of one workload."""
    print(f"\n{found['workload']}: {found['launches']} launches of kernels, {found['bytes'] / 1e9:.2f} GB, and "
          f"{found['operators']} torch operators that launch something")  # fmt: skip
    print("  " + ", ".join(f"{count} {name.removeprefix('metafast_')}" for name, count in found["by_kernel"].items()))
    print("  " + ", ".join(f"{count} {name}" for name, count in found["by_operator"].items()))
    heads = ("kernel", "times", "block", "warps", "grid", "/132", "PTX", "MMA", "SASS", "loop", "MMA", "regs", "stack",
             "shared")  # fmt: skip
    rows = [(row["kernel"].removeprefix("metafast_"), row["launches"], row["block"], row["warps"],
             "x".join(map(str, row["grid"])), f"{row['blocks_a_processor']:.2f}",
             *(row[k] for k in ("ptx", "ptx_mma", "sass", "loop", "multiplies", "registers", "stack", "shared")))
            for row in found["kernels"]]  # fmt: skip
    widths = [max(len(str(row[i])) for row in (heads, *rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        print("  " + " ".join(str(cell).ljust(w) if i in (0, 2, 4) else str(cell).rjust(w)
                              for i, (cell, w) in enumerate(zip(row, widths, strict=True))))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.counts", description=__doc__)
    parser.add_argument("workloads", nargs="*", default=WORKLOADS, help=f"default: {' '.join(WORKLOADS)}")
    parser.add_argument("--architecture", type=int, default=90, help="80 for an A100, 90 for an H100 (default)")
    parser.add_argument("--inner", choices=RULES, default="plain", help="what an inner step is (default: plain)")
    parser.add_argument("--json", type=Path, help="write the counts to this file too")
    options = parser.parse_args()
    found = []
    print(f"Triton {triton.__version__}, sm_{options.architecture}, inner steps: {options.inner}")
    for name in options.workloads:
        found.append(report(workload(name), options.architecture, RULES[options.inner]))
        show(found[-1])
    if options.json:
        counts = {"triton": triton.__version__, "architecture": options.architecture, "workloads": found}
        options.json.write_text(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
