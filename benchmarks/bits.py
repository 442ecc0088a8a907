"""Shows whether a change has altered a single bit of any result:

    python benchmarks/bits.py record A.npz           # before the change
    python benchmarks/bits.py record B.npz           # after it
    python benchmarks/bits.py compare A.npz B.npz

It records losses, outputs, gradients and adapted parameters of the settings that the tests hold to the oracle. The
reference and the CPU executor run in both dtypes with one and two threads, the CUDA executor's twin in each precision,
and some settings run by Triton's interpreter. It also records the checkpoints of short trainings by every algorithm.
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
# The settings that run by Triton's interpreter, which is slow: it needs minutes for these.
IN_TRITON = ("ReLU", "rate for each layer and step", "custom loss", "multi-step loss, first order", "ANIL",
             "batch norm of the task")  # fmt: skip
ALGORITHMS = ("maml", "fomaml", "metasgd", "anil", "reptile", "maml++")
REPTILES = {
    "reptile": {"steps": 3}, "reptile, adam": {"steps": 3, "optimizer": "adam"},
    "reptile, batches": {"steps": 3, "batch_size": 2},
}  # fmt: skip


def learner_results(setup: Setup, dtype: torch.dtype, backend: str, tasks: int = 3) -> NamedTensors:
    """Yields everything that a learner with these settings computes for ``tasks`` tasks."""
    torch.manual_seed(zlib.crc32(setup.name.encode()))
    learner = make_learner(setup, dtype, backend)
    batch = make_tasks(setup, tasks).to(dtype)
    learner.zero_grad()
    out = learner.backward(batch)
    yield from (("losses", out.losses), ("outputs", out.outputs))
    yield from ((f"grad {name}", p.grad) for name, p in learner.named_parameters() if p.grad is not None)
    if setup.learner is not mf.Reptile and backend != "triton":
        learner.zero_grad()
        learner(batch).loss.backward()
        yield from ((f"autograd {name}", p.grad) for name, p in learner.named_parameters() if p.grad is not None)
    adapted = learner.adapt(batch.support_x, batch.support_y, support_mask=batch.support_mask)
    yield from ((f"adapted {name}", value) for name, value in adapted.state_dict(0).items())
    yield "predicted", adapted(batch.query_x)


def of_executors() -> NamedTensors:
    """Yields the results of the reference, of the CPU executor, and of the one that ``auto`` chooses."""
    reptiles = [vectors(name, learner=mf.Reptile, **options) for name, options in REPTILES.items()]
    for setup in [*SETUPS, *reptiles]:
        for backend, threads in (("reference", 1), ("cpu", 1), ("cpu", 2), ("auto", 2)):
            torch.set_num_threads(threads)
            for dtype in (torch.float64, torch.float32):
                yield from _named(f"{setup} | {backend} x{threads} {dtype}", setup, dtype, backend)
    torch.set_num_threads(1)


def of_twin() -> NamedTensors:
    """Yields the results of the CUDA executor's twin, in each precision."""
    for name, limits in TWINS.items():
        executors._EXECUTORS[:] = [CudaExecutor(limits)]
        for setup in RUNS:
            for dtype in (torch.float64, torch.float32):
                yield from _named(f"{setup} | twin, {name} {dtype}", setup, dtype, "cuda")
            for precision in ("tf32x3", "tf32", "bf16"):
                chosen = replace(setup, support=16, options={**setup.options, "precision": precision})
                yield from _named(f"{setup} | twin, {name} {precision}", chosen, torch.float32, "cuda")


def of_triton() -> NamedTensors:
    """Yields the results of the Triton executor under its interpreter, in each precision."""
    executors._EXECUTORS[:] = [TritonExecutor(interpreted=True)]
    for setup in SETUPS:
        if setup.name in IN_TRITON:
            for precision in ("float32", "tf32", "bf16"):
                chosen = replace(setup, support=2, options={**setup.options, "precision": precision})
                yield from _named(f"{setup} | triton {precision}", chosen, torch.float32, "triton", 1)


def _named(key: str, setup: Setup, dtype: torch.dtype, backend: str, tasks: int = 3) -> NamedTensors:
    try:
        yield from ((f"{key} | {name}", value) for name, value in learner_results(setup, dtype, backend, tasks))
    except RuntimeError as error:  # it is a result too that an executor refuses a setting
        if "cannot run this model" not in str(error):
            raise
        yield f"{key} | refused", torch.zeros(0)


def of_trainings() -> NamedTensors:
    """Yields parameters, moments and losses after short trainings by ``metafast train``."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _trainings(Path(folder))


def _trainings(folder: Path) -> NamedTensors:
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


PARTS = {"executors": of_executors, "twin": of_twin, "triton": of_triton, "trainings": of_trainings}


def record(path: Path, parts: list[str]) -> None:
    """Writes the results of ``parts`` into ``path``; each part takes some minutes."""
    arrays = {}
    for part in parts:
        for name, value in PARTS[part]():
            arrays[name] = value.detach().numpy()
        print(f"{part}: {len(arrays)} tensors so far", file=sys.stderr, flush=True)
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
    recording = commands.add_parser("record", help="write results into FILE")
    recording.add_argument("file", type=Path)
    recording.add_argument("--part", choices=PARTS, action="append", help="record only this part; may be repeated")
    comparison = commands.add_parser("compare", help="print what differs; exits with 1 if anything does")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "record":
        record(options.file, options.part or list(PARTS))
        return 0
    return compare(options.before, options.after)


if __name__ == "__main__":
    sys.exit(main())
