"""What is packed for a GPU machine: kernels that are found there, and a folder that is whole and small enough."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import pack, pretended, triton_cache
from benchmarks.gpu.job import ROOT
from benchmarks.gpu.pack import Failed, Pack

KERNELS = """
import triton, triton.language as tl

@triton.jit
def scale(y, x, factor, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, factor * tl.load(x + i, i < n), i < n)

@triton.jit
def shift(y, x, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, i < n) + 1.0, i < n)
"""
# Each line of its output: what it ran, and how many kernels Triton found and compiled.
RUNS = """
import os, sys
from benchmarks.gpu.pretended import pretend
from benchmarks.gpu.triton_cache import count_misses
import triton.runtime.cache as cache
if "OTHER_TRITON" in os.environ:
    cache.triton_key = lambda: os.environ["OTHER_TRITON"]
pretend()
import torch, small, changed
x = torch.empty(65, device="cuda")
runs = {
    "same": lambda: (small.scale[(2,)](x, x, 2.0, 64, B=32), small.shift[(2,)](x, x, 64, B=32)),
    "other constant": lambda: small.shift[(2,)](x, x, 64, B=64),
    "other warps": lambda: small.shift[(2,)](x, x, 64, B=32, num_warps=2),
    "other alignment": lambda: small.shift[(2,)](x[1:], x, 64, B=32),
    "number not divisible": lambda: small.shift[(2,)](x, x, 63, B=32),
    "other source": lambda: changed.shift[(2,)](x, x, 64, B=32),
}
for name in sys.argv[1:]:
    with count_misses() as found:
        runs[name]()
    print(f"{name}: {found.taken} {found.compiled} {' '.join(sorted(found.missed))}".strip())
"""
CHANGED = ["other constant", "other warps", "other alignment", "number not divisible", "other source"]


def launch(folder, names, **environment):
    """What runs in a process of its own, with the kernels in ``folder``, says of each."""
    folder.mkdir(exist_ok=True)
    (folder / "small.py").write_text(KERNELS)
    (folder / "changed.py").write_text(KERNELS.replace("1.0", "1.5"))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), *inherited, str(ROOT)])
    environment = {k: str(v) for k, v in environment.items()}
    command = [sys.executable, "-c", RUNS, *names]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """An archive of the two kernels, compiled."""
    here = tmp_path_factory.mktemp("here")
    places = {"TRITON_CACHE_DIR": here / "cache", pretended.NOTES: here / "notes"}
    assert launch(here / "first", ["same"], **places) == ["same: 0 2 scale shift"]
    asked = pretended.kernels(here / "notes")
    assert triton_cache.pack(here / "kernels.tar.xz", here / "cache", asked) == 2
    return here / "kernels.tar.xz"


def test_packed_kernels_are_found_from_another_place_and_changed_ones_are_not(packed, tmp_path):
    assert triton_cache.unpack(packed, tmp_path / "cache") == 2
    said = launch(tmp_path / "second", ["same", *CHANGED], TRITON_CACHE_DIR=tmp_path / "cache")
    assert said == ["same: 2 0", *(f"{name}: 0 1 shift" for name in CHANGED)]


def test_another_build_of_the_same_triton_finds_them(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(triton_cache, "triton_key", lambda: "3.x of another Python")
    triton_cache.unpack(packed, tmp_path / "cache")
    other = {"TRITON_CACHE_DIR": tmp_path / "cache", "OTHER_TRITON": "3.x of another Python"}
    assert launch(tmp_path / "second", ["same"], **other) == ["same: 2 0"]


def test_another_version_of_triton_is_refused(packed, tmp_path, monkeypatch):
    import triton

    monkeypatch.setattr(triton, "__version__", "2.0")
    with pytest.raises(ValueError, match=r"and here is 2\.0: pack it anew"):
        triton_cache.unpack(packed, tmp_path)


def test_a_kernel_that_was_not_compiled_cannot_be_packed(tmp_path):
    with pytest.raises(FileNotFoundError, match="lacks kernel scale"):
        triton_cache.pack(tmp_path / "a.tar.xz", tmp_path, [triton_cache.Kernel("scale", "key")])


@pytest.fixture
def folder(packed, tmp_path):
    out = tmp_path / "gpu-pack"
    (out / "omniglot").mkdir(parents=True)
    for name in pack.ZIPS:
        (out / "omniglot" / name).write_bytes(b"zip" * 1000)
    (out / pack.ARCHIVE).write_bytes(packed.read_bytes())
    (out / "_C.abi3.so").write_bytes(b"so")
    return out


def test_the_manifest_lists_every_file(folder):
    pack.finish(folder)
    manifest = json.loads((folder / pack.MANIFEST).read_text())
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    del files[pack.MANIFEST]
    assert manifest["files"] == {
        name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for name, path in files.items()
    }
    assert len(files) == 4
    assert manifest["kernels"] == 2


def test_a_folder_too_large_is_an_error_in_words(folder, capsys):
    with pytest.raises(Failed, match=r"bytes and may have 5,000: the largest is omniglot"):
        pack.finish(folder, limit=5000)
    table = capsys.readouterr().out.splitlines()
    assert table[-1].endswith("total")
    assert sum(int(line.split()[0].replace(",", "")) for line in table[:-1]) == int(
        table[-1].split()[0].replace(",", "")
    )


def test_what_is_missing_is_named(tmp_path):
    job = Pack(tmp_path / "out", tmp_path / "work", tmp_path / "_C.abi3.so", tmp_path / "data")
    job.out.mkdir()
    with pytest.raises(Failed, match=r"there is no .*_C\.abi3\.so"):
        pack.extension(job)
    with pytest.raises(Failed, match=r"data/images_background\.zip is not there: make gpu-pack OMNIGLOT=DIR"):
        pack.omniglot(job)


def test_what_is_made_stays_until_its_sources_change(tmp_path):
    job = Pack(tmp_path, tmp_path, tmp_path, tmp_path)
    job.made("thing", "these sources")
    assert not job.done("thing", "these sources")  # it is not there
    (tmp_path / "thing").touch()
    assert job.done("thing", "these sources")
    assert not job.done("thing", "others")
