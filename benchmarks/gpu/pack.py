"""Prepares, without a GPU, what would cost time on the machine that has one: ``make gpu-pack OMNIGLOT=DIR``.

It runs from the repository's root, in an environment with the versions of that machine. It fills one folder of at most
45 MB with the extension, Triton's compiled kernels, float64 oracles of the workloads, Omniglot, and packages that may
be missing there. What the folder already holds for the same sources is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from benchmarks.gpu import pretended, triton_cache
from benchmarks.gpu.subjects import BLOCKS, TRITON, TRITON_TESTS

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 45_000_000  # bytes of the folder
TRAINED = "omniglot-5w1s"  # this recipe runs for a few iterations, with a validation and a test
WHEELS = ("higher", "setuptools>=77,<82")
LEARN2LEARN = ("learn2learn/algorithms/", "learn2learn/utils/", "learn2learn/_version.py", "LICENSE")
ZIPS = ("images_background.zip", "images_evaluation.zip")
ARCHIVE, MANIFEST = "triton-cache.tar.xz", "pack.json"
PRETENDED, PLUGINS = "benchmarks.gpu.pretended", ("pretended", "triton_cache")
NOTHING_COMPILED = ", 0 compiled"  # how the count of a process that found every kernel ends
ORACLE = """
import sys
from pathlib import Path
from metafast.bench import oracles
from metafast.bench.workloads import workload
chosen = workload(sys.argv[1])
oracles.save(Path(sys.argv[2]), chosen, oracles.compute(chosen))
"""
CHECK = """
import torch, metafast
from metafast import MAML, executors
from metafast.bench.workloads import workload
from metafast.executors.native.cuda import BlockLimits, CudaExecutor
chosen, found = workload("sin25-5"), {}
tasks = chosen.draw()
executors._EXECUTORS[0] = CudaExecutor(BlockLimits(232448, 132))
for backend in ("reference", "cpu", "cuda"):
    model = chosen.network()
    MAML(model, loss=chosen.loss, lr=chosen.lr, steps=chosen.steps, backend=backend).backward(tasks)
    found[backend] = torch.cat([p.grad.flatten() for p in model.parameters()])
for backend, gradient in found.items():
    error = float((gradient - found["reference"]).norm() / found["reference"].norm())
    if not error < 1e-4:
        raise SystemExit(f"{backend} is off by {error:.1e} of the reference's gradient")
if not torch.ops.metafast.cuda_built():
    raise SystemExit("the extension is built without its CUDA kernels")
print(f"torch {torch.__version__}: CPU executor and twin agree with the reference")
"""


RUNNING: set[subprocess.Popen[bytes]] = set()
STOPPED = threading.Event()


class Failed(Exception):
    """Something that the folder needs could not be made; the text says what and why."""


@dataclass
class Pack:
    """The pack: the folder ``out`` is filled, and ``work`` keeps what a second run need not make again."""

    out: Path
    work: Path
    extension: Path
    omniglot: Path

    def say(self, text: str) -> None:
        """Prints a line of progress."""
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)

    def done(self, target: str, of: str) -> bool:
        """Tells whether the folder has ``target``, made from the sources with the digest ``of``."""
        stamp = self._stamp(target)
        return (self.out / target).exists() and stamp.is_file() and stamp.read_text() == of

    def made(self, target: str, of: str) -> None:
        """Remembers that ``target`` was made from the sources with the digest ``of``."""
        self._stamp(target).write_text(of)

    def _stamp(self, target: str) -> Path:
        return self.work / f"{Path(target).name}.made-of"


def stop(*_: object) -> None:
    """Kills the processes that this one has started, then ends it."""
    STOPPED.set()
    for process in list(RUNNING):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    raise KeyboardInterrupt


def run(command: list[str], log: Path, cwd: Path = ROOT, **environment: str) -> str:
    """Runs a command, whose output goes into ``log`` as it comes, and returns the output.

    Raises:
        Failed: it does not return 0.
    """
    if STOPPED.is_set():
        raise Failed("stopped")
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment},
            start_new_session=True,
        )  # fmt: skip
        RUNNING.add(process)
        code = process.wait()
        RUNNING.discard(process)
    output = log.read_text(errors="replace")
    if code:
        raise Failed(f"{' '.join(command[:6])} ... ended with {code}; its output is in {log}:\n{output[-1500:]}")
    return output


def digest(*parts: str, files: Iterable[Path] = ()) -> str:
    """Hashes texts, and the names and contents of files."""
    total = hashlib.sha256("\0".join(parts).encode())
    for file in sorted(files):
        total.update(f"\0{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return total.hexdigest()


def sources(*folders: str) -> list[Path]:
    """Returns the Python files in folders of the repository."""
    return [file for folder in folders for file in (ROOT / folder).rglob("*.py")]


def moved(pack: Pack, folder: Path) -> dict[str, str]:
    """Copies the sources and the packed extension to ``folder``. Returns the environment variables to run there."""
    for name in ("metafast", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(pack.out / "_C.abi3.so", folder / "metafast")
    (folder / "metafast" / "kernels").symlink_to(folder / "kernels")
    return {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def extension(pack: Pack) -> None:
    """Packs ``_C.abi3.so``, after a check that it loads here and computes."""
    if not pack.extension.is_file():
        raise Failed(f"there is no {pack.extension}: make .venv-device/installed builds it")
    shutil.copy(pack.extension, pack.out / "_C.abi3.so")
    of = digest(str(pack.extension.stat().st_size), hashlib.sha256(pack.extension.read_bytes()).hexdigest())
    if not pack.done("_C.abi3.so", of):
        with tempfile.TemporaryDirectory() as folder:
            environment = moved(pack, Path(folder))
            printed = run([sys.executable, "-c", CHECK], pack.work / "extension.log", Path(folder), **environment)
        pack.say(printed.strip().splitlines()[-1])
        pack.made("_C.abi3.so", of)


def launches(pack: Pack, cwd: Path, logs: str, **environment: str) -> list[str]:
    """Runs everything that uses Triton on the pretended GPU. Returns the line in which each process counts its
    kernels."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONOPTIMIZE": "1", "PYTHONDONTWRITEBYTECODE": "1", **environment}
    (pack.work / logs).mkdir(parents=True, exist_ok=True)

    def start(name: str, *arguments: str) -> str:
        began, log = time.monotonic(), pack.work / logs / f"{name}.log"
        output = run([sys.executable, "-m", *arguments], log, cwd, **environment)
        lines = [line for line in output.splitlines() if line.startswith("Triton: ") or re.match(r"\d+ .*passed", line)]
        pack.say(f"{name}, {time.monotonic() - began:.0f} s: {'; '.join(lines)}")
        return next((line for line in lines if line.startswith("Triton: ")), f"{name} says nothing of Triton: {log}")

    with tempfile.TemporaryDirectory() as runs, ThreadPoolExecutor(2) as pool:
        options = ["--split", "maml", "--iterations", "4", "--eval-every", "2", "--device", "cuda"]
        options += ["--backend", "triton", "--data", str(pack.omniglot.resolve()), "--out", f"{runs}/run"]
        first = [pool.submit(start, "training", PRETENDED, "train", TRAINED, *options)]
        first += [pool.submit(start, name, PRETENDED, name) for name in (*TRITON, "micro")]
        counts = [future.result() for future in first]
    plugins = [word for name in PLUGINS for word in ("-p", f"benchmarks.gpu.{name}")]
    options = ["--assert=plain", "-p", "no:cacheprovider", "-n", "2", "-W", "default", "--tb=short"]
    return [*counts, start("tests", "pytest", *plugins, *options, "-m", "gpu", *TRITON_TESTS)]


def kernels(pack: Pack) -> None:
    """Packs Triton's kernels. All of them must be found when the same runs are done again in another folder."""
    versions = [metadata.version(name) for name in ("torch", "triton")]
    names = ("pretended.py", "subjects.py", "workers/micro.py")
    files = [*(ROOT / "benchmarks/gpu" / name for name in names), *sources("kernels", "metafast", "tests")]
    of = digest(*versions, files=files)
    if pack.done(ARCHIVE, of):
        return
    cache, notes, archive = pack.work / "triton", pack.work / "notes", pack.work / ARCHIVE
    shutil.rmtree(notes, ignore_errors=True)
    launches(pack, ROOT, "compiling", TRITON_CACHE_DIR=str(cache), **{pretended.NOTES: str(notes)})
    count = triton_cache.pack(archive, cache, pretended.kernels(notes))
    pack.say(f"{count} kernels in {archive.stat().st_size:,} bytes; now from another place")
    with tempfile.TemporaryDirectory() as folder:
        triton_cache.unpack(archive, Path(folder, "cache"))
        environment = {**moved(pack, Path(folder, "tree")), "TRITON_CACHE_DIR": f"{folder}/cache"}
        counts = launches(pack, Path(folder, "tree"), "found again", **environment)
    if missed := [line for line in counts if not line.endswith(NOTHING_COMPILED)]:
        raise Failed("not every kernel is found again: " + "; ".join(missed))
    os.replace(archive, pack.out / ARCHIVE)
    pack.made(ARCHIVE, of)


def oracles(pack: Pack) -> None:
    """Packs the float64 oracles that judge the workloads."""
    names = ("workloads.py", "peers.py", "oracles.py")
    files = [*(ROOT / "metafast/bench" / name for name in names), *sorted((ROOT / "metafast/models").glob("*.py"))]
    files += [ROOT / "metafast/verification" / name for name in ("torch_loop.py", "inner_updates.py")]
    files += [ROOT / "metafast/program/losses.py"]
    of = digest(files=files)

    def make(name: str) -> None:
        began = time.monotonic()
        command = [sys.executable, "-c", ORACLE, name, str(pack.work / "oracles")]
        run(command, pack.work / f"oracle-{name}.log", OMP_NUM_THREADS="1")
        os.replace(pack.work / "oracles" / f"{name}.npz", pack.out / "oracles" / f"{name}.npz")
        pack.made(f"oracles/{name}.npz", of)
        pack.say(f"oracle {name}, {time.monotonic() - began:.0f} s")

    (pack.out / "oracles").mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        missing = [name for name in reversed((*BLOCKS, *TRITON)) if not pack.done(f"oracles/{name}.npz", of)]
        list(pool.map(make, missing))


def omniglot(pack: Pack) -> None:
    """Packs the two zips of Omniglot as they are."""
    (pack.out / "omniglot").mkdir(exist_ok=True)
    for name in ZIPS:
        if not (pack.omniglot / name).is_file():
            raise Failed(
                f"{pack.omniglot / name} is not there: make gpu-pack OMNIGLOT=DIR, the folder of {' and '.join(ZIPS)}"
            )
        shutil.copyfile(pack.omniglot / name, pack.out / "omniglot" / name)


def packages(pack: Pack) -> None:
    """Packs wheels, and the part of learn2learn's source distribution that needs no build."""
    of = digest(*WHEELS, *LEARN2LEARN)
    if pack.done("wheels", of):
        return
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    shutil.rmtree(pack.out / "wheels", ignore_errors=True)
    run([*pip, "--only-binary=:all:", "-d", str(pack.out / "wheels"), *WHEELS], pack.work / "wheels.log")
    options = ["--no-binary=learn2learn", "--no-build-isolation", "-d", str(pack.work)]
    run([*pip, *options, "learn2learn==0.2.0"], pack.work / "learn2learn.log")
    with tarfile.open(pack.work / "learn2learn-0.2.0.tar.gz") as tar:
        for entry in tar:
            name = entry.name.partition("/")[2]
            if entry.isfile() and name.startswith(LEARN2LEARN) and not name.endswith((".c", ".cpp", ".so")):
                target = pack.out / "learn2learn" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(entry).read())  # type: ignore[union-attr]
    pack.made("wheels", of)


def describe(out: Path) -> dict[str, object]:
    """Returns what the folder was made from, and its files with sizes and checksums."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != MANIFEST)
    with tarfile.open(out / ARCHIVE) as tar:
        count = sum(name.endswith(".cubin") for name in tar.getnames())
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    tool = str(metadata.distribution("triton").locate_file("triton/backends/nvidia/bin/cuobjdump"))
    listed = output(tool, "--list-elf", out / "_C.abi3.so")
    release = re.search(r"release ([\d.]+)", output(nvcc, "--version"))
    return {
        "commit": output("git", "rev-parse", "HEAD") + ("+changes" if output("git", "status", "--porcelain") else ""),
        "versions": {name: metadata.version(name) for name in ("torch", "triton", "numpy")},
        "nvcc": release[1] if release else None,
        "archs": sorted(set(re.findall(r"sm_(\w+?)\.", listed))),
        "kernels": count,
        "files": {
            str(path.relative_to(out)): {
                "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in files
        },
    }  # fmt: skip


def output(*command: str | Path) -> str:
    """Returns what a command prints, or an empty text if it is not installed."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def finish(out: Path, limit: int = LIMIT) -> None:
    """Writes the manifest and prints the sizes.

    Raises:
        Failed: the folder is larger than ``limit`` bytes.
    """
    (out / MANIFEST).write_text(json.dumps(describe(out), indent=1) + "\n")
    sizes = {
        entry.name: sum(path.stat().st_size for path in [entry, *entry.rglob("*")] if path.is_file())
        for entry in sorted(out.iterdir())
    }
    total = sum(sizes.values())
    for name, size in [*sizes.items(), ("total", total)]:
        print(f"{size:>12,}  {name}")
    if total > limit:
        largest = max(sizes, key=lambda name: sizes[name])
        raise Failed(f"{out} has {total:,} bytes and may have {limit:,}: the largest is {largest}")


STEPS: tuple[Callable[[Pack], None], ...] = (extension, omniglot, packages, kernels, oracles)


def main() -> int:
    """Fills the folder. Returns 0 if it is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-pack", help="the folder to fill; default: %(default)s")
    parser.add_argument("--work", type=Path, default=ROOT / "build/gpu-pack", help="folder that speeds up a second run")
    parser.add_argument("--extension", type=Path, required=True, help="_C.abi3.so, built for the GPU")
    parser.add_argument("--omniglot", type=Path, required=True, help="folder of the two zips of Omniglot")
    options = parser.parse_args()
    pack = Pack(options.out.resolve(), options.work.resolve(), options.extension, options.omniglot)
    pack.out.mkdir(parents=True, exist_ok=True)
    pack.work.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        for step in STEPS:
            pack.say(step.__name__)
            step(pack)
        finish(pack.out)
    except Failed as error:
        print(f"gpu-pack: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gpu-pack: interrupted; what is done is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
