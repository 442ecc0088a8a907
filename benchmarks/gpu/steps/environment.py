"""The first step of every plan: it unpacks the pack, installs the package and describes the machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from ..job import ROOT, Job, read_json

EXTENSION = ROOT / "metafast" / "_C.abi3.so"
DEVICES = Path("/dev")
SETUPTOOLS = 77  # the first version that knows the licence field of pyproject.toml
ARCHS = "90"  # a build on the GPU machine is for an H100 alone: three architectures take three times as long


def environment(job: Job) -> dict[str, Any]:
    """Passes if there is a GPU and metafast imports with its CUDA kernels."""
    job.environment |= {
        "TRITON_CACHE_DIR": str(job.report.scratch / "triton"),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # JAX would take three quarters of a GPU
    }
    if not job.rehearsal and (found := _gpu(job))["state"] != "passed":
        return {**found, "end": "there is no GPU here: torch.cuda.is_available() is false; --rehearse does without"}
    if job.pack is not None:
        _unpack(job, job.pack)
    built = _install(job)
    if built["state"] != "passed":
        return {**built, "end": f"the package does not install: {built['end']}"}
    return _describe(job, built)


def _gpu(job: Job) -> dict[str, Any]:
    """Passes if there is a GPU. Its device files show this at once; without them torch is asked, which takes
    seconds."""
    if any(DEVICES.glob("nvidia*")) or shutil.which("nvidia-smi"):
        return {"state": "passed", "end": ""}
    return job.run([sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"])


def _unpack(job: Job, pack: Path) -> None:
    """Puts Triton's kernels into the cache and missing packages onto the path. A result says what the pack has."""
    about = read_json(pack / "pack.json") or {}
    kernels = _kernels(pack / "triton-cache.tar.xz", Path(job.environment["TRITON_CACHE_DIR"]))
    wheels = [wheel for wheel in sorted((pack / "wheels").glob("*.whl")) if _wanted(wheel)]
    site = job.report.scratch / "site"
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site)]
        job.run([*command, *map(str, wheels)])
        job.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    if (pack / "learn2learn").is_dir():
        job.environment["METAFAST_LEARN2LEARN"] = str(pack / "learn2learn")
    names, tree = [wheel.name.split("-")[0] for wheel in wheels], _commit(None)
    stale = {"stale": f"the tree is at {tree}"} if tree and tree != about.get("commit") else {}
    job.results.add("pack", commit=about.get("commit"), kernels=kernels, wheels=names, **stale)


def _kernels(archive: Path, cache: Path) -> int | str:
    """Returns how many kernels are in the cache now, or why there are none, so that they will be compiled here."""
    if not archive.exists():
        return f"{archive.name} is not there"
    from ..triton_cache import unpack

    try:
        return unpack(archive, cache)
    except Exception as error:  # any error may pass, since a cache only saves time
        return f"{type(error).__name__}: {error}"


def _wanted(wheel: Path) -> bool:
    """Tells whether the wheel's package is missing here, or is a setuptools that is too old."""
    name = wheel.name.split("-")[0]
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return True
    return name == "setuptools" and int(re.match(r"\d*", found)[0] or 0) < SETUPTOOLS  # type: ignore[index]


def _install(job: Job) -> dict[str, Any]:
    """Installs the pack's extension if it imports here, and builds it for one architecture if not."""
    packed = None if job.pack is None else job.pack / EXTENSION.name
    if job.rehearsal:
        found = _pip(job, "--dry-run", METAFAST_CPU="0")
        return {**found, "extension": "the one that is here; pip in a dry run"}
    if packed is not None and packed.exists():
        shutil.copy(packed, EXTENSION)
        found = _pip(job, METAFAST_CPU="0")
        imported = job.run([sys.executable, "-c", "import torch, metafast._C; assert torch.ops.metafast.cuda_built()"])
        if found["state"] == imported["state"] == "passed":
            return {**found, "extension": "from the pack"}
        job.results.add("extension", refused=imported["end"][-300:])
    return {**_pip(job, METAFAST_CPU="1", METAFAST_CUDA="1", METAFAST_ARCHS=ARCHS), "extension": "built here"}


def _pip(job: Job, *options: str, **variables: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", "--no-deps"]
    return job.run([*command, *options, "-e", "."], environment=variables)


def _describe(job: Job, built: dict[str, Any]) -> dict[str, Any]:
    """Describes the machine in the report."""
    file = job.report.scratch / "machine.json"
    found = job.worker("probe", str(file))
    machine = {**(read_json(file) or {}), "commit": _commit(job.pack), "extension": built["extension"]}
    job.report.content["machine"] = machine
    job.results.add("machine", **{key: machine.get(key) for key in ("gpu", "versions", "extension", "commit")})
    return found


def _commit(pack: Path | None) -> str | None:
    """Returns the commit of the checkout, or that of the pack where there is no checkout."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    if head := git("rev-parse", "HEAD"):
        return head + ("+changes" if git("status", "--porcelain") else "")
    packed = pack and (read_json(pack / "pack.json") or {}).get("commit")
    return f"{packed} (the pack's)" if packed else None


def pack_problem(pack: Path) -> str | None:
    """Says why the folder is not a pack; ``None`` means that it is one."""
    try:
        json.loads((pack / "pack.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        return f"{pack} is no pack of make gpu-pack: {error}"
    return None
