"""The GPU check without a GPU: its rules of time, the files that it leaves, and what its steps ask of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from metafast.bench.run import contenders
from metafast.benchmarks import oracles
from metafast.benchmarks.gpu import bars, command, plans, process, report, results, subjects
from metafast.benchmarks.gpu.clock import Clock, FakeClock
from metafast.benchmarks.gpu.job import ROOT, Job
from metafast.benchmarks.gpu.report import Report
from metafast.benchmarks.gpu.runner import RESERVE, SPARE, Plan, Step, run_plan
from metafast.benchmarks.gpu.steps import correctness, environment, speed
from metafast.benchmarks.peers import peers as known_peers
from metafast.benchmarks.workloads import workload

PLANS = plans.PLANS.values()
PASSED = {"state": "passed", "end": ""}


@pytest.fixture(autouse=True)
def _signals():
    """As they were, for a plan takes them."""
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def make_job(tmp_path):
    def make(clock=None, **options):
        clock = clock or Clock()
        return Job(Report(tmp_path / "out", "test", clock), clock, **options)

    return make


def written(tmp_path):
    return json.loads((tmp_path / "out" / report.REPORT).read_text())


def states(tmp_path):
    return {name: found["state"] for name, found in written(tmp_path)["steps"].items()}


def without_work(plan):
    return replace(plan, steps=tuple(replace(step, run=lambda job: PASSED) for step in plan.steps))


# Time


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_a_plan_leaves_a_minute(plan, make_job, tmp_path):
    job = make_job(FakeClock())
    assert run_plan(without_work(plan), job)
    assert plan.limit - job.clock.elapsed() >= SPARE
    assert plan.limit == {"first": 260, "second": 540}[plan.name]
    assert set(states(tmp_path).values()) == {"passed"}
    assert all(step.expected < step.limit < plan.limit for step in plan.steps)
    assert len({step.name for step in plan.steps}) == len(plan.steps)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("factor", [3, 100])
def test_a_step_that_takes_longer_does_not_push_its_plan_over(plan, factor, make_job, tmp_path):
    """Each in turn, then all: what is left over is skipped, in words."""
    names = [step.name for step in plan.steps]
    for slow in ([name] for name in names):
        job = make_job(FakeClock(dict.fromkeys(slow, factor)))
        run_plan(without_work(plan), job)
        assert job.clock.elapsed() <= plan.limit - RESERVE
    job = make_job(FakeClock(dict.fromkeys(names, factor)))
    assert not run_plan(without_work(plan), job)
    assert job.clock.elapsed() <= plan.limit - RESERVE
    last = written(tmp_path)["steps"][names[-1]]
    assert last["state"] == "skipped"
    assert "s are left and it is expected to take" in last["end"]


def test_limits_bite_on_processes(make_job, tmp_path, capsys):
    """Real ones on the real clock: the first is cut off at its limit, the second at what is left, the third skipped."""

    def sleep(job):
        deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
        return job.run([sys.executable, "-c", deaf])

    plan = Plan("short", RESERVE + 6, (Step("a", 1, 3, sleep), Step("b", 2, 30, sleep), Step("c", 2, 5, sleep)))
    began = time.monotonic()
    assert not run_plan(plan, make_job())
    assert time.monotonic() - began < plan.limit
    assert states(tmp_path) == {"a": "cut off", "b": "cut off", "c": "skipped"}
    assert "b: at most 3 s, shortened from 30: no more is left" in capsys.readouterr().out


def test_a_process_may_write_what_it_knows_and_is_gone_with_all_that_it_started(tmp_path):
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    writer = f"{child}\ntry: print('began'); time.sleep(60)\nexcept KeyboardInterrupt: print('what was found')"
    log, began, marked = tmp_path / "log", time.monotonic(), {"MARK": str(tmp_path)}
    log.write_text("before\n")
    found = process.run([sys.executable, "-c", writer], 6, log, marked, tmp_path)
    assert (found["state"], found["end"].split()[0]) == ("cut off", "began")
    assert found["end"].endswith("what was found\n")
    assert log.read_text().startswith("before\n")
    assert time.monotonic() - began < 7
    assert_gone(tmp_path)
    failed = process.run([sys.executable, "-c", "raise SystemExit('no luck')"], 60, log, {}, tmp_path)
    assert (failed["state"], failed["end"].strip()) == ("failed", "no luck")


def assert_gone(mark):
    """There is no process whose environment names ``mark``; those that were killed may take a moment."""

    def running():
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.fsencode(mark) in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                    found.append((folder / "cmdline").read_bytes())
        return found

    until = time.monotonic() + 5
    while running() and time.monotonic() < until:
        time.sleep(0.05)
    assert running() == []


# What ends a run, and what does not


def broken(job):
    raise OSError("disk full")


def refused(job):
    return {"state": "failed", "end": "no compiler"}


def test_a_step_that_fails_leaves_the_others(make_job, tmp_path):
    plan = Plan("p", 100, (Step("broken", 1, 2, broken), Step("fine", 1, 2, lambda job: PASSED)))
    assert not run_plan(plan, make_job(FakeClock()))
    assert states(tmp_path) == {"broken": "failed", "fine": "passed"}
    assert written(tmp_path)["steps"]["broken"]["end"] == "OSError: disk full"


def test_without_a_build_nothing_else_runs(make_job, tmp_path):
    plan = Plan("p", 100, (Step("env", 1, 2, refused, vital=True), Step("fine", 1, 2, lambda job: PASSED)))
    assert not run_plan(plan, make_job(FakeClock()))
    assert states(tmp_path) == {"env": "failed"}
    assert written(tmp_path)["end"] == "ended: without env there is nothing to check"
    assert plans.FIRST.steps[0].vital
    assert plans.SECOND.steps[0].vital


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_report_and_logs(tmp_path, number):
    """The command itself, as a process of its own, stopped in the middle of a step."""
    out = tmp_path / "first"
    arguments = ["--rehearse", "--plan", "first", "--only", "env,smoke", "--out", str(tmp_path)]
    check = subprocess.Popen([sys.executable, "benchmarks/gpu_check.py", *arguments], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        until = time.monotonic() + 120
        while not any(line["step"].startswith("smoke") for line in results.read(out / report.NUMBERS)):
            assert check.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        check.send_signal(number)
        printed = check.communicate(timeout=30)[0].decode()
    finally:
        check.kill()
    assert check.returncode == 1
    assert {file.name for file in out.iterdir()} == {report.NUMBERS, report.REPORT, report.LOGS}
    found = json.loads((out / report.REPORT).read_text())
    assert found["end"] == f"stopped by {number.name}"
    assert [step["state"] for step in found["steps"].values()] == ["passed", "stopped"]
    assert found["results"] == results.read(out / report.NUMBERS)
    with tarfile.open(out / report.LOGS) as tar:
        assert {"logs/env.log", "logs/smoke-blocks.log"} <= set(tar.getnames())
    assert f"stopped by {number.name}" in printed
    assert_gone(out)


# Files


def test_numbers_are_in_the_file_when_they_exist(make_job, tmp_path, capsys):
    """Of a process too, while it still runs; half a line is no line."""
    code = (
        "import sys, time; sys.path.insert(0, 'benchmarks'); from gpu.results import Results\n"
        "Results.of_this_process().add('sin25-5', error=1.25e-7, bad=float('nan'))\ntime.sleep(60)"
    )

    def step(job):
        found = job.run([sys.executable, "-c", code])
        with job.results.file.open("a") as file:
            file.write('{"elapsed": 1, "st')
        return found

    assert not run_plan(Plan("p", RESERVE + 5, (Step("smoke:a", 1, 4, step),)), make_job())
    (line,) = written(tmp_path)["results"]
    assert 0 <= line.pop("elapsed") < 3
    assert line == {"step": "smoke:a", "of": "sin25-5", "error": 1.25e-7, "bad": None}
    assert "smoke:a sin25-5: error 1.25e-07, bad None" in capsys.readouterr().out


def test_a_run_leaves_three_files_however_much_is_logged(make_job, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ALL", 1_000_000)

    def step(job):
        (job.report.logs / "long.log").write_bytes(b"begin" + os.urandom(2_000_000) + b"end")
        for number in range(5):
            (job.report.logs / f"{number}.bin").write_bytes(os.urandom(190_000))
        return PASSED

    job = make_job(FakeClock())
    run_plan(Plan("p", 100, (Step("a", 1, 2, step),)), job)
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {report.NUMBERS, report.REPORT, report.LOGS}
    assert (out / report.LOGS).stat().st_size < 1_100_000
    assert not job.report.scratch.exists()
    monkeypatch.setattr(report, "ALL", 10_000_000)
    report.pack_logs(tmp_path, tmp_path / "none.tar.gz")
    with tarfile.open(out / report.LOGS) as tar:
        assert tar.getnames() == [f"logs/{number}.bin" for number in range(5)]


def test_a_long_log_keeps_its_beginning_and_its_end(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "long.log").write_bytes(b"begin" + b"x" * 2_000_000 + b"end")
    report.pack_logs(tmp_path / "logs", tmp_path / "logs.tar.gz")
    with tarfile.open(tmp_path / "logs.tar.gz") as tar:
        content = tar.extractfile("logs/long.log").read()
    assert content.startswith(b"begin")
    assert content.endswith(b"end")
    assert b"1600008 bytes are left out" in content
    assert len(content) < report.LARGEST + 100


# The command line


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "smoke,spin"], "there is no step 'spin' in this plan; choose from env, smoke, tests"),
        (["--plan", "third"], "invalid choice: 'third'"),
        (["--pack", "/nowhere"], "/nowhere is no pack of make gpu-pack"),
    ],
)
def test_what_is_not_there_is_named(arguments, text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path), *arguments])
    assert text in capsys.readouterr().err


def test_steps_are_chosen_by_name_or_group():
    chosen = plans.SECOND.chosen(["peers", "memcheck:blocks"])
    assert [step.name.partition(":")[0] for step in chosen] == ["peers"] * 5 + ["memcheck", "peers"]


def test_it_starts_before_anything_is_installed(tmp_path):
    """By a Python without any other package."""
    code = "import sys; sys.path.insert(0, 'benchmarks'); import gpu.command; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-ISc", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "metafast", "triton"} & set(run.stdout.split())


def test_the_rehearsal_runs_the_steps(tmp_path, capsys):
    """One of each kind: all of them run with ``gpu_check.py --rehearse``."""
    steps = {
        "first": ["smoke:blocks", "tests", "sinusoid", "ncu:omni5w1s-5", "micro"],
        "second": ["peers:sin25-5", "racecheck", "precision"],
    }
    arguments = ["--rehearse", "--only", ",".join(["env", *steps["first"], *steps["second"]]), "--out", str(tmp_path)]
    assert command.main(arguments) == 0, capsys.readouterr().out
    for name, others in steps.items():
        only = ["env", *others]
        found = json.loads((tmp_path / name / report.REPORT).read_text())
        assert {step: of["state"] for step, of in found["steps"].items()} == dict.fromkeys(only, "passed")
        assert {bar["verdict"] for bar in found["bars"]} == {"not measured"}
        assert {line["step"] for line in found["results"]} == set(only)
        assert found["rehearsal"]
    printed = capsys.readouterr().out
    assert len(printed) < 12_000
    assert "s to spare" in printed
    numbers = [line for line in found["results"] if line["step"] == "peers:sin25-5"]
    assert {line.get("contender") for line in numbers} == {"metafast", "torch loop", None}


# Steps


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


def test_the_extension_of_the_pack_is_used_where_it_imports(make_job, packed, monkeypatch, tmp_path):
    job = make_job(pack=packed)
    seen = scripted(job, monkeypatch, [{}, {}, {}, {}])
    assert environment.environment(job)["state"] == "passed"
    wheels, pip, imports, probe = (text for text, _ in seen)
    assert "higher_of_the_pack" in wheels
    assert "setuptools-83" not in wheels
    assert pip.endswith("--no-build-isolation --no-deps -e .")
    assert seen[1][1] == {"METAFAST_CPU": "0"}
    assert "block_built" in imports
    assert "workers.probe" in probe
    assert environment.EXTENSION.read_bytes() == b"of the pack"
    assert job.environment["METAFAST_LEARN2LEARN"] == str(packed / "learn2learn")
    assert job.environment["PYTHONPATH"].split(os.pathsep)[0] == str(job.report.scratch / "site")
    (line,) = (line for line in results.read(job.results.file) if line["of"] == "pack")
    assert (line["commit"], line["kernels"]) == ("abc", "triton-cache.tar.xz is not there")


@pytest.mark.parametrize("with_pack", [True, False])
def test_it_is_built_where_none_imports_and_a_failed_build_fails(make_job, packed, monkeypatch, with_pack):
    monkeypatch.setattr(environment, "_wanted", lambda wheel: False)
    job = make_job(pack=packed if with_pack else None)
    before = [{}, {"state": "failed", "end": "undefined symbol"}] if with_pack else []
    seen = scripted(job, monkeypatch, [*before, {"state": "failed", "end": "nvcc fatal"}])
    found = environment.environment(job)
    assert (found["state"], found["end"]) == ("failed", "the package does not install: nvcc fatal")
    assert seen[-1][1] == {"METAFAST_CPU": "1", "METAFAST_CUDA": "1", "METAFAST_ARCHS": "90"}


def test_without_a_gpu_nothing_is_built(make_job, monkeypatch, tmp_path):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    job = make_job()
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


def test_kernels_that_the_pack_lacks_are_named(make_job, tmp_path):
    job = make_job()
    job.environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    (tmp_path / "cache" / "old").mkdir(parents=True)
    (tmp_path / "cache" / "old" / "metafast_mse.cubin").touch()

    def work(job):
        (tmp_path / "cache" / "new").mkdir()
        (tmp_path / "cache" / "new" / "metafast_windows.cubin").touch()
        return PASSED

    job.do("tests", 10, work)
    (line,) = results.read(job.results.file)
    assert (line["compiled"], line["kernels"]) == (1, ["metafast_windows"])


def test_the_tests_that_it_runs_are_all_that_need_a_gpu():
    marked = {f.name for f in Path(__file__).parent.glob("test_*.py") if "pytest.mark.gpu" in f.read_text()}
    assert {Path(file).name for file in correctness.TESTS} == marked - {Path(__file__).name}
    assert all((ROOT / file).exists() for file in correctness.TESTS)


@pytest.mark.parametrize(("tests", "most"), [(plans._BLOCKS, 12), (plans._TRITON, 30)])
def test_sanitizers_watch_some_tests_and_not_too_many(tests, most):
    """Of so few there is time for all under a tool that makes them a hundred times slower."""
    files, chosen = tests
    command = [sys.executable, "-m", "pytest", "--collect-only", "-n", "0", files, "-k", chosen]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 2 <= listed.count("::") <= most
    assert {step.name for step in plans.SECOND.steps} >= set(bars.SANITIZERS)


def test_the_first_test_that_fails_runs_again_launch_by_launch(make_job, tmp_path):
    """pytest itself, on a file with a test that fails."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_some.py").write_text("def test_fine(): pass\ndef test_bad(): assert 0, 'ouch'\n")
    job = make_job()
    junit = job.report.logs / "tests.xml"
    command = [sys.executable, "-m", "pytest", "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    subprocess.run([*command, f"--junitxml={junit}", "tests"], cwd=tmp_path, capture_output=True, check=False)
    assert correctness.read_junit(junit) == ({"passed": 1, "failed": 1, "skipped": 0}, ["tests/test_some.py::test_bad"])
    seen = []

    def run(command, log=None, environment=None):
        seen.append((command[-1], log, environment))
        return {"state": "failed", "end": "ouch"}

    job.run = run
    found = correctness.tests(job)
    assert (found["state"], found["failed"]) == ("failed", 1)
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


def test_peers_are_those_that_can_be_ready(make_job, monkeypatch):
    for name, tasks, count in (("sin25-5", 25, 6), ("sin1024-5", 1024, 3), ("omni5w1s-1", 32, 5)):
        job = make_job()
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
    from metafast import executors
    from metafast.benchmarks.gpu.workers import setting

    chosen = setting.tiny(workload("sin25-5"))
    oracles.save(tmp_path, chosen, oracles.compute(chosen))
    twin = setting.NativeCudaExecutor(setting.H100)
    monkeypatch.setattr(executors, "_EXECUTORS", [twin, *executors._EXECUTORS])
    return setting.Setting("cpu", True, tmp_path, results.Results(tmp_path / "numbers", time.time(), "smoke:blocks"))


def test_smoke_tells_right_from_wrong(where, tmp_path):
    from metafast.benchmarks.gpu.workers import smoke

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
    from metafast.benchmarks.gpu.workers import smoke

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
    from metafast.benchmarks.gpu.workers import smoke

    a = smoke.answer(where.learner(where.workload("sin25-5")), where.workload("sin25-5").draw())
    losses, gradient = smoke.answer(where.learner(where.workload("sin25-5")), where.workload("sin25-5").draw())
    assert smoke._same(a, (losses, gradient))
    gradient["head.bias"] = gradient["head.bias"] * np.float32(1 + 2**-22)
    assert not smoke._same(a, (losses, gradient))


# Bars


def line(step, of, **values):
    return {"elapsed": 1.0, "step": step, "of": of, **values}


def good_lines():
    smoke = [
        line(f"smoke:{'blocks' if name in subjects.BLOCKS else 'triton'}", name, gradient_error=1e-6, same_bits=True)
        for name in (*subjects.BLOCKS, *subjects.TRITON)
    ]
    clean = [line(step, step.partition(":")[0], state="passed") for step in bars.SANITIZERS]
    fast = {"sin1024-5": 4.5, "omni5w1s-1": 5.5, "omni5w1s-5": 6.0}
    peers = [line(f"peers:{name}", name, speedup=ratio) for name, ratio in fast.items()]
    runs = [
        line("sinusoid", "sinusoid", wall_seconds=15.0, result=0.3),
        line("omniglot", "omniglot-5w1s", wall_seconds=200.0, result=0.99),
    ]
    return [*smoke, *clean, *peers, *runs]


def verdicts(lines):
    return [bar["verdict"] for bar in bars.judge(lines)]


def test_bars_are_reached_by_what_was_measured_alone():
    assert set(verdicts([])) == {"not measured"}
    assert set(verdicts(good_lines())) == {"reached"}
    for place in range(len(good_lines())):  # one number less, and a bar is not measured
        lines = good_lines()
        del lines[place]
        assert "not measured" in verdicts(lines)
        assert "missed" not in verdicts(lines)


@pytest.mark.parametrize(
    ("of", "values", "bar"),
    [
        ("omni5w1s-5", {"gradient_error": 2e-4}, 0), ("sin25-5", {"gradient_error": None}, 0),
        ("sin25-5", {"same_bits": False}, 1), ("racecheck", {"state": "failed"}, 2),
        ("memcheck", {"state": "cut off"}, 2),
        ("sin1024-5", {"speedup": 3.9}, 3), ("omni5w1s-1", {"speedup": None}, 4), ("omni5w1s-5", {"speedup": 4.9}, 5),
        ("sinusoid", {"wall_seconds": 20.5}, 6), ("omniglot-5w1s", {"wall_seconds": 301}, 7),
        ("omniglot-5w1s", {"result": 0.9869}, 8),
    ],
)  # fmt: skip
def test_each_bar_can_be_missed(of, values, bar):
    lines = good_lines()
    for each in lines:
        if each["of"] == of and values.keys() <= each.keys():
            each.update(values)
    found = bars.judge(lines)
    assert [place for place, of in enumerate(found) if of["verdict"] == "missed"] == [bar]
    assert found[bar]["found"]


# The table


@pytest.fixture
def reports(tmp_path):
    """Made up: no GPU has given these numbers."""
    machine = {"gpu": "Imaginary X1", "versions": {"torch": "9.9", "triton": "8.8"}, "commit": "0123456789abcdef"}
    smoke = line("smoke:blocks", "sin25-5", gradient_error=2e-7, eager_ms=0.25, graph_ms=0.125, kernels_ms=0.1)
    adam = {"with_adam_ms": 50.0, "eager_ms": 40.0, "gradient_error": 1e-5, "peak_mb": 1234.4}
    adam = line("smoke:triton", "torchbench-maml", **adam)
    peers = [
        line("peers:sin25-5", "sin25-5", contender="metafast", median_ms=0.3, gradient_error=0.5),
        line("peers:sin25-5", "sin25-5", speedup=12.345, best_peer="JAX jit(vmap)", over_floor=3.0),
    ]
    run = line("sinusoid", "sinusoid", iterations=70000, wall_seconds=12.5, result=0.5, metric="mse")
    files = []
    for plan, lines in (("first", [smoke, adam, run]), ("second", peers)):
        files.append(tmp_path / f"{plan}.json")
        content = {"format": 1, "plan": plan, "rehearsal": False, "date": "2031-01-02T03:04", "machine": machine}
        files[-1].write_text(json.dumps({**content, "results": lines}))
    return files


def test_the_table_has_what_the_reports_have(reports, tmp_path, capsys):
    from metafast.benchmarks.gpu import table

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.MARKS[0]}\nold\n{table.MARKS[1]}\nafter\n")
    table.main([str(file) for file in reports])
    printed = capsys.readouterr().out
    row = "| `sin25-5` | native-cuda | 2e-07 | 250 µs | 125 µs | 100 µs | – | JAX jit(vmap) | **12.3x** |"
    assert row in printed.splitlines()
    assert "| `torchbench-maml` | triton | 1e-05 | 40.0 ms (50.0 ms with Adam) | – | – | 1,234 MB | – | – |" in printed
    assert "Imaginary X1, torch 9.9, Triton 8.8; plan first at 0123456789ab, 2031-01-02; plan second" in printed
    assert "`metafast train sinusoid`: 70,000 iterations and the final test in 12.5 s, mse 0.5." in printed
    assert "- reached: the sinusoid run of the paper under 20 s (sinusoid 12.5)" in printed
    assert "- not measured: sanitizers clean\n" in printed
    assert "sin1024" not in printed.partition("- ")[0]
    for _ in range(2):
        table.main([*map(str, reports), "--readme", str(readme)])
        assert readme.read_text() == f"before\n{table.MARKS[0]}\n{printed}{table.MARKS[1]}\nafter\n"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rehearsal": True}, "it has no figures"), ({"machine": {"gpu": None}}, "it has no figures"),
        ({"format": 0}, "is no report of the GPU check in format 1"),
        ({"machine": {"gpu": "Other", "versions": {}}}, "reports of different GPUs have no common table"),
    ],
)  # fmt: skip
def test_what_is_no_measurement_has_no_table(reports, change, text, capsys):
    from metafast.benchmarks.gpu import table

    reports[0].write_text(json.dumps({**json.loads(reports[0].read_text()), **change}))
    with pytest.raises(SystemExit):
        table.main([str(file) for file in reports])
    assert text in capsys.readouterr().err
