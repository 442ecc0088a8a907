"""Shows whether a change has altered a single bit of any result:

    python benchmarks/bits.py record A.npz           # before the change
    python benchmarks/bits.py record B.npz           # after it
    python benchmarks/bits.py compare A.npz B.npz

It records losses, outputs, gradients and adapted parameters of every setting that the tests hold to the oracle. The
reference and the CPU executor run in both dtypes with one and two threads, the CUDA executor's twin in each precision,
and the Triton executor under its interpreter. It also records the checkpoints of short trainings by every algorithm.
Both files must come from the same machine and the same build of torch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import numpy as np
import torch
from setups import SETUPS, Setup, make_learner, make_tasks, vectors
from test_cuda_twin import RUNS, TWINS

import metafast as mf
from metafast import executors
from metafast.executors.native.cuda import CudaExecutor
from metafast.executors.triton.executor import TritonExecutor

NamedTensors = Iterator[tuple[str, torch.Tensor]]

ROOT = Path(__file__).parent.parent
IN_TRITON = ("batch norm of the task", "ReLU", "residual", "rate for each layer and step", "custom loss", "ANIL",
             "batch norm frozen", "stride 2, average pool", "multi-step loss, first order")  # fmt: skip
IN_TRITON_PRECISIONS = ("batch norm of the task", "ReLU")
ALGORITHMS = ("maml", "fomaml", "metasgd", "anil", "reptile", "maml++")
REPTILES = {
    "reptile": {"steps": 3}, "reptile, adam": {"steps": 3, "optimizer": "adam"},
    "reptile, batches": {"steps": 3, "batch_size": 2},
}  # fmt: skip


def learner_results(setup: Setup, dtype: torch.dtype, backend: str) -> NamedTensors:
    """Yields everything that a learner with these settings computes."""
    torch.manual_seed(zlib.crc32(setup.name.encode()))
    learner = make_learner(setup, dtype, backend)
    tasks = make_tasks(setup).to(dtype)
    learner.zero_grad()
    out = learner.backward(tasks)
    yield from (("losses", out.losses), ("outputs", out.outputs))
    yield from ((f"grad {name}", p.grad) for name, p in learner.named_parameters() if p.grad is not None)
    if setup.learner is not mf.Reptile:
        learner.zero_grad()
        learner(tasks).loss.backward()
        yield from ((f"autograd {name}", p.grad) for name, p in learner.named_parameters() if p.grad is not None)
    adapted = learner.adapt(tasks.support_x, tasks.support_y, support_mask=tasks.support_mask)
    yield from ((f"adapted {name}", value) for name, value in adapted.state_dict(0).items())
    yield "predicted", adapted(tasks.query_x)


def everything() -> NamedTensors:
    """Yields everything that is recorded except trainings, each tensor under a name of its own."""
    known = list(executors._EXECUTORS)
    reptiles = [vectors(name, learner=mf.Reptile, **options) for name, options in REPTILES.items()]
    for setup in [*SETUPS, *reptiles]:
        for backend, threads in (("reference", 1), ("cpu", 1), ("cpu", 2), ("auto", 2)):
            torch.set_num_threads(threads)
            for dtype in (torch.float64, torch.float32):
                yield from _named(f"{setup} | {backend} x{threads} {dtype}", setup, dtype, backend)
    torch.set_num_threads(1)
    for name, limits in TWINS.items():
        executors._EXECUTORS[:] = [CudaExecutor(limits)]
        for setup in RUNS:
            for dtype in (torch.float64, torch.float32):
                yield from _named(f"{setup} | twin, {name} {dtype}", setup, dtype, "cuda")
            for precision in ("tf32x3", "tf32", "bf16"):
                chosen = replace(setup, support=16, options={**setup.options, "precision": precision})
                yield from _named(f"{setup} | twin, {name} {precision}", chosen, torch.float32, "cuda")
    for setup in SETUPS:
        for precision in ("float32", "tf32", "bf16") if setup.name in IN_TRITON_PRECISIONS else ("float32",):
            if setup.name in IN_TRITON:
                executors._EXECUTORS[:] = [TritonExecutor(interpreted=True)]
                chosen = replace(setup, options={**setup.options, "precision": precision})
                yield from _named(f"{setup} | triton {precision}", chosen, torch.float32, "triton")
    executors._EXECUTORS[:] = known


def _named(key: str, setup: Setup, dtype: torch.dtype, backend: str) -> NamedTensors:
    try:
        yield from ((f"{key} | {name}", value) for name, value in learner_results(setup, dtype, backend))
    except RuntimeError as error:  # it is a result too that an executor refuses a setting
        if "cannot run this model" not in str(error):
            raise
        yield f"{key} | refused", torch.zeros(0)


def trainings(folder: Path) -> NamedTensors:
    """Yields parameters, moments and losses after short trainings by ``metafast train``."""
    from safetensors.torch import load_file

    for recipe, iterations in (("sinusoid", 30), ("glyphs-5w1s", 2)):
        for algorithm in ALGORITHMS:
            out = folder / f"{recipe}-{algorithm}"
            options = ["--algorithm", algorithm, "--iterations", str(iterations), "--test-tasks", "4"]
            options += ["--eval-every", "0"]
            program = [sys.executable, "-m", "metafast.cli.main", "train", recipe, "--out", str(out), *options]
            subprocess.run(program, check=True, cwd=ROOT, capture_output=True)
            for name, value in load_file(out / "checkpoint.safetensors").items():
                yield f"{recipe} {algorithm} | {name}", value


def record(path: Path) -> None:
    """Writes everything into ``path``."""
    arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in (trainings(Path(folder)), everything()):
            for name, value in part:
                arrays[name] = value.detach().numpy()
                if len(arrays) % 2000 == 0:
                    print(f"{len(arrays)} tensors", file=sys.stderr, flush=True)
    numbered = {str(i): array for i, array in enumerate(arrays.values())}
    np.savez_compressed(path, **numbered, names=np.array(list(arrays)))
    print(f"{len(arrays)} tensors in {path}")


def load(path: Path) -> dict[str, np.ndarray]:
    """Reads what ``record`` has written."""
    with np.load(path, allow_pickle=False) as file:
        return {str(name): file[str(i)] for i, name in enumerate(file["names"])}


def compare(before: Path, after: Path) -> int:
    """Prints which tensors differ. Returns 0 if both files hold the same tensors, bit by bit, else 1."""
    old, new = load(before), load(after)
    absent = sorted(set(old) ^ set(new))
    differing = [name for name in old if name in new and not _same(old[name], new[name])]
    for name in absent:
        print(f"only in {before if name in old else after}: {name}")
    for name in differing:
        print(f"differs: {name}")
    print(f"{len(old)} and {len(new)} tensors, {len(absent)} in one file only, {len(differing)} differ")
    return 1 if absent or differing else 0


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="bits.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("record", help="write all results into FILE").add_argument("file", type=Path)
    comparison = commands.add_parser("compare", help="print what differs; exits with 1 if anything does")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "record":
        record(options.file)
        return 0
    return compare(options.before, options.after)


if __name__ == "__main__":
    sys.exit(main())
