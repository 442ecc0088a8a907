"""The steps of the GPU check: what they ask of processes, and what they make of the answers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gpu_runs import PASSED, make_job, states, written

from benchmarks.gpu import bars, plans, results, subjects
from benchmarks.gpu.job import ROOT
from benchmarks.gpu.runner import run_plan
from benchmarks.gpu.steps import correctness, environment, speed
from benchmarks.gpu.workers import setting, smoke
from metafast import executors
from metafast.bench import oracles
from metafast.bench.peers import peers as known_peers
from metafast.bench.run import contenders
from metafast.bench.workloads import workload


def scripted(job, monkeypatch, answers):
    """``job`` with answers in the place of processes, in their order; returns the commands and their environments."""
    seen = []

    def run(command, log=None, environment=None):
        seen.append((" ".join(map(str, command)), dict(environment or {})))
        return {"state": "passed", "end": "", "seconds": 0.1, **next(answers)}

    answers = iter(answers)
    monkeypatch.setattr(job, "run", run)
    return seen


@pytest.fixture
def packed(tmp_path, monkeypatch):
    pack = tmp_path / "gpu-pack"
    (pack / "wheels").mkdir(parents=True)
    (pack / "learn2learn").mkdir()
    (pack / "pack.json").write_text('{"commit": "abc"}')
    (pack / "_C.abi3.so").write_bytes(b"of the pack")
    (pack / "wheels" / "higher_of_the_pack-0.2.1-py3-none-any.whl").touch()
    (pack / "wheels" / "setuptools-83.0-py3-none-any.whl").touch()
    (tmp_path / "metafast").mkdir()
    monkeypatch.setattr(environment, "EXTENSION", tmp_path / "metafast" / "_C.abi3.so")
    monkeypatch.setattr(environment, "_gpu", lambda job: PASSED)
    return pack


def test_the_extension_of_the_pack_is_used_where_it_imports(packed, monkeypatch, tmp_path):
    job = make_job(tmp_path, pack=packed)
    seen = scripted(job, monkeypatch, [{}, {}, {}, {}])
    assert environment.environment(job)["state"] == "passed"
    wheels, pip, imports, probe = (text for text, _ in seen)
    assert "higher_of_the_pack" in wheels
    assert "setuptools-83" not in wheels
    assert pip.endswith("--no-build-isolation --no-deps -e .")
    assert seen[1][1] == {"METAFAST_CPU": "0"}
    assert "cuda_built" in imports
    assert "workers.probe" in probe
    assert environment.EXTENSION.read_bytes() == b"of the pack"
    assert job.environment["METAFAST_LEARN2LEARN"] == str(packed / "learn2learn")
    assert job.environment["PYTHONPATH"].split(os.pathsep)[0] == str(job.report.scratch / "site")
    (line,) = (line for line in results.read(job.results.file) if line["of"] == "pack")
    assert (line["commit"], line["kernels"]) == ("abc", "triton-cache.tar.xz is not there")


@pytest.mark.parametrize("with_pack", [True, False])
def test_it_is_built_where_none_imports_and_a_failed_build_fails(packed, monkeypatch, with_pack, tmp_path):
    monkeypatch.setattr(environment, "_wanted", lambda wheel: False)
    job = make_job(tmp_path, pack=packed if with_pack else None)
    before = [{}, {"state": "failed", "end": "undefined symbol"}] if with_pack else []
    seen = scripted(job, monkeypatch, [*before, {"state": "failed", "end": "nvcc fatal"}])
    found = environment.environment(job)
    assert (found["state"], found["end"]) == ("failed", "the package does not install: nvcc fatal")
    assert seen[-1][1] == {"METAFAST_CPU": "1", "METAFAST_CUDA": "1", "METAFAST_ARCHS": "90"}


@pytest.mark.parametrize(
    ("given", "told"), [(1114, 1114), (ValueError("of Triton 3.9.0"), "ValueError: of Triton 3.9.0")]
)
def test_kernels_of_the_pack_go_into_the_cache(packed, monkeypatch, tmp_path, given, told):
    """They are not taken for kernels that were compiled here, and an archive that does not fit ends nothing."""

    def unpack(archive, cache):
        if isinstance(given, Exception):
            raise given
        (cache / "some").mkdir(parents=True)
        (cache / "some" / "metafast_mse.cubin").touch()
        return given

    name = "benchmarks.gpu.triton_cache"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(unpack=unpack))
    (packed / "triton-cache.tar.xz").touch()
    job = make_job(tmp_path, pack=packed)
    scripted(job, monkeypatch, [{}, {}, {}, {}])
    assert job.do("env", 10, environment.environment)["state"] == "passed"
    lines = results.read(job.results.file)
    assert [line["kernels"] for line in lines if line["of"] == "pack"] == [told]
    assert not any(line["of"] == "triton" for line in lines)
    assert job.environment["TRITON_CACHE_DIR"].startswith(str(job.report.scratch))


def test_without_a_gpu_nothing_is_built(monkeypatch, tmp_path):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    monkeypatch.setattr(environment, "DEVICES", tmp_path)
    job = make_job(tmp_path)
    seen = scripted(job, monkeypatch, [{"state": "failed"}])
    assert not run_plan(plans.FIRST, job)
    assert [command.rpartition("; ")[2] for command, _ in seen] == ["raise SystemExit(not torch.cuda.is_available())"]
    assert states(tmp_path) == {"env": "failed"}
    assert "there is no GPU here" in written(tmp_path)["steps"]["env"]["end"]


def test_an_older_setuptools_takes_the_wheel(monkeypatch):
    wheel = Path("setuptools-83.0-py3-none-any.whl")
    for version, wanted in (("76.1.0", True), ("77.0", False), ("84.2.1", False)):
        monkeypatch.setattr(environment.metadata, "version", lambda name, version=version: version)
        assert environment._wanted(wheel) == wanted


def test_kernels_that_the_pack_lacks_are_named(tmp_path):
    job = make_job(tmp_path)
    job.environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    (tmp_path / "cache" / "old").mkdir(parents=True)
    (tmp_path / "cache" / "old" / "metafast_mse.cubin").touch()

    def work(job):
        (tmp_path / "cache" / "new").mkdir()
        (tmp_path / "cache" / "new" / "metafast_pool.cubin").touch()
        return PASSED

    job.do("tests", 10, work)
    (line,) = results.read(job.results.file)
    assert (line["compiled"], line["kernels"]) == (1, ["metafast_pool"])


def test_the_tests_that_it_runs_are_all_that_need_a_gpu():
    marked = {f.name for f in Path(__file__).parent.glob("test_*.py") if "pytest.mark.gpu" in f.read_text()}
    assert {Path(file).name for file in subjects.TESTS} == marked - {Path(__file__).name}
    assert all((ROOT / file).exists() for file in subjects.TESTS)


@pytest.mark.parametrize(("tests", "most"), [(plans._BLOCKS, 12), (plans._TRITON, 30)])
def test_sanitizers_watch_some_tests_and_not_too_many(tests, most):
    """Of so few there is time for all under a tool that makes them a hundred times slower."""
    files, chosen = tests
    command = [sys.executable, "-m", "pytest", "--collect-only", "-n", "0", files, "-k", chosen]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 2 <= listed.count("::") <= most
    assert {step.name for step in plans.SECOND.steps} >= set(bars.SANITIZERS)


def test_the_first_test_that_fails_runs_again_launch_by_launch(tmp_path):
    """pytest itself, on a file with a test that fails."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_some.py").write_text(
        "def test_fine(): pass\ndef test_bad(): assert 0, 'ouch'\nclass TestAll:\n    def test_bad(self): assert 0\n"
    )
    job = make_job(tmp_path)
    junit = job.report.logs / "tests.xml"
    command = [sys.executable, "-m", "pytest", "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    subprocess.run([*command, f"--junitxml={junit}", "tests"], cwd=tmp_path, capture_output=True, check=False)
    failures = ["tests/test_some.py::test_bad", "tests/test_some.py::TestAll::test_bad"]
    assert correctness.read_junit(junit) == ({"passed": 1, "failed": 2, "skipped": 0}, failures)
    seen = []

    def run(command, log=None, environment=None):
        seen.append((command[-1], log, environment))
        return {"state": "failed", "end": "ouch"}

    job.run = run
    found = correctness.tests(job)
    assert (found["state"], found["failed"]) == ("failed", 2)
    assert seen[1] == ("tests/test_some.py::test_bad", "tests-again", {"CUDA_LAUNCH_BLOCKING": "1"})
    assert correctness.read_junit(tmp_path / "none.xml") == ({}, [])


def test_counters_are_read_from_what_ncu_prints():
    head = '"ID","Kernel Name","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"'
    rows = [
        '"0","metafast_norm_backward","(8, 1, 1)","Speed","Duration","us","12.5"',
        '"0","metafast_norm_backward","(8, 1, 1)","Speed","Elapsed Cycles","cycle","1,234"',
        '"1","metafast_gather_product","(4, 8, 1)","Launch","Registers Per Thread","register/thread","128"',
    ]
    text = "\n".join(["==PROF== Connected", "some output", head, *rows, "==PROF== Disconnected"])
    assert speed.read_counters(text) == [
        ("metafast_norm_backward (8, 1, 1)", {"Duration": "12.5 us"}),
        ("metafast_gather_product (4, 8, 1)", {"Registers Per Thread": "128 register/thread"}),
    ]
    assert speed.read_counters("==ERROR== no permission") == []


def test_peers_are_those_that_can_be_ready(monkeypatch, tmp_path):
    for name, tasks, count in (("sin25-5", 25, 6), ("sin1024-5", 1024, 3), ("omni5w1s-1", 32, 5)):
        job = make_job(tmp_path)
        seen = scripted(job, monkeypatch, [{}])
        speed.peers(job, name, tasks)
        given = seen[0][0].partition("--peers ")[2]
        for peer in ("torch loop", "torch.func", "torch.compile", "learn2learn", "higher", "JAX"):
            if peer in given:
                contenders([], [peer], known_peers())
                count -= 1
        assert count == 0
        assert workload(name).tasks == tasks
    assert all(workload(name.partition(":")[2]) for name in (s.name for s in plans.SECOND.chosen(["peers"])))


@pytest.mark.parametrize("name", [*subjects.BLOCKS, *subjects.TRITON])
def test_every_workload_is_checked_by_the_executor_that_is_meant_for_it(name):
    workload(name)
    assert (subjects.executor(name) == "triton") == name.startswith(("omni", "mini", "torchbench"))


@pytest.fixture
def where(tmp_path, monkeypatch):

    chosen = setting.tiny(workload("sin25-5"))
    oracles.save(tmp_path, chosen, oracles.compute(chosen))
    twin = setting.CudaExecutor(setting.H100)
    monkeypatch.setattr(executors, "_EXECUTORS", [twin, *executors._EXECUTORS])
    return setting.Setting("cpu", True, tmp_path, results.Results(tmp_path / "numbers", time.time(), "smoke:blocks"))


def test_smoke_tells_right_from_wrong(where, tmp_path):

    assert smoke.check("sin25-5", where)
    (first, bits, *others) = results.read(where.results.file)
    assert first["gradient_error"] < 1e-6
    assert bits["same_bits"] is True
    assert {"eager_ms", "graph_ms", "kernels_ms"} <= {key for line in others for key in line}
    losses, gradient = oracles.load(tmp_path, where.workload("sin25-5"))
    oracles.save(tmp_path, where.workload("sin25-5"), (losses, {n: g * (1 + 2e-4) for n, g in gradient.items()}))
    assert not smoke.check("sin25-5", where)
    with pytest.raises(FileNotFoundError, match="make gpu-pack"):
        smoke.check("sin25-5", replace(where, oracles=None))


@pytest.mark.parametrize(("text", "tried"), [("CUDA error: an illegal memory access", 1), ("no such layer", 2)])
def test_a_group_stops_at_an_illegal_access(where, monkeypatch, text, tried):

    def fail(name, where):
        raise RuntimeError(text)

    monkeypatch.setattr(smoke, "check", fail)
    monkeypatch.setattr(smoke, "setting", lambda options: where)
    monkeypatch.setattr(sys, "argv", ["smoke", "sin25-5", "sin25-1"])
    assert smoke.main() == 1
    lines = results.read(where.results.file)
    assert [line["of"] for line in lines if "error" in line] == ["sin25-5", "sin25-1"][:tried]
    assert any(line.get("stopped_before") == ["sin25-1"] for line in lines) == (tried == 1)


def test_same_bits_means_bits(where):

    a = smoke.answer(where.learner(where.workload("sin25-5")), where.workload("sin25-5").draw())
    losses, gradient = smoke.answer(where.learner(where.workload("sin25-5")), where.workload("sin25-5").draw())
    assert smoke._same(a, (losses, gradient))
    gradient["head.bias"] = gradient["head.bias"] * np.float32(1 + 2**-22)
    assert not smoke._same(a, (losses, gradient))
