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

import pytest
import torch
from gpu_runs import PASSED, make_job, states, written

from benchmarks.gpu import command, plans, process, report, results
from benchmarks.gpu.clock import FakeClock
from benchmarks.gpu.job import ROOT
from benchmarks.gpu.runner import RESERVE, SPARE, Plan, Step, run_plan
from metafast.executors.native.encode import extension

PLANS = plans.PLANS.values()
has_cuda = extension is not None and torch.ops.metafast.cuda_built()
needs_cuda = pytest.mark.skipif(not has_cuda, reason="the first step looks for the extension with its CUDA part")


@pytest.fixture(autouse=True)
def _signals():
    """As they were, for a plan takes them."""
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def without_work(plan):
    return replace(plan, steps=tuple(replace(step, run=lambda job: PASSED) for step in plan.steps))


# Time


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_a_plan_leaves_a_minute(plan, tmp_path):
    job = make_job(tmp_path, FakeClock())
    assert run_plan(without_work(plan), job)
    assert plan.limit - job.clock.elapsed() >= SPARE
    assert plan.limit == {"first": 260, "second": 540}[plan.name]
    assert set(states(tmp_path).values()) == {"passed"}
    assert all(step.expected < step.limit < plan.limit for step in plan.steps)
    assert len({step.name for step in plan.steps}) == len(plan.steps)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("factor", [3, 100])
def test_a_step_that_takes_longer_does_not_push_its_plan_over(plan, factor, tmp_path):
    """Each in turn, then all: what is left over is skipped, in words."""
    names = [step.name for step in plan.steps]
    for slow in ([name] for name in names):
        job = make_job(tmp_path, FakeClock(dict.fromkeys(slow, factor)))
        run_plan(without_work(plan), job)
        assert job.clock.elapsed() <= plan.limit - RESERVE
    job = make_job(tmp_path, FakeClock(dict.fromkeys(names, factor)))
    assert not run_plan(without_work(plan), job)
    assert job.clock.elapsed() <= plan.limit - RESERVE
    last = written(tmp_path)["steps"][names[-1]]
    assert last["state"] == "skipped"
    assert "s are left and it is expected to take" in last["end"]


def test_limits_bite_on_processes(tmp_path, capsys):
    """Real ones on the real clock: the first is cut off at its limit, the second at what is left, the third skipped."""

    def sleep(job):
        deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
        return job.run([sys.executable, "-c", deaf])

    plan = Plan("short", RESERVE + 6, (Step("a", 1, 3, sleep), Step("b", 2, 30, sleep), Step("c", 2, 5, sleep)))
    began = time.monotonic()
    assert not run_plan(plan, make_job(tmp_path))
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


def test_a_step_that_fails_leaves_the_others(tmp_path):
    plan = Plan("p", 100, (Step("broken", 1, 2, broken), Step("fine", 1, 2, lambda job: PASSED)))
    assert not run_plan(plan, make_job(tmp_path, FakeClock()))
    assert states(tmp_path) == {"broken": "failed", "fine": "passed"}
    assert written(tmp_path)["steps"]["broken"]["end"] == "OSError: disk full"


def test_without_a_build_nothing_else_runs(tmp_path):
    plan = Plan("p", 100, (Step("env", 1, 2, refused, vital=True), Step("fine", 1, 2, lambda job: PASSED)))
    assert not run_plan(plan, make_job(tmp_path, FakeClock()))
    assert states(tmp_path) == {"env": "failed"}
    assert written(tmp_path)["end"] == "ended: without env there is nothing to check"
    assert plans.FIRST.steps[0].vital
    assert plans.SECOND.steps[0].vital


@pytest.mark.slow
@needs_cuda
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


def test_numbers_are_in_the_file_when_they_exist(tmp_path, capsys):
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

    assert not run_plan(Plan("p", RESERVE + 5, (Step("smoke:a", 1, 4, step),)), make_job(tmp_path))
    (line,) = written(tmp_path)["results"]
    assert 0 <= line.pop("elapsed") < 3
    assert line == {"step": "smoke:a", "of": "sin25-5", "error": 1.25e-7, "bad": None}
    assert "smoke:a sin25-5: error 1.25e-07, bad None" in capsys.readouterr().out


def test_a_run_leaves_three_files_however_much_is_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ALL", 1_000_000)

    def step(job):
        (job.report.logs / "long.log").write_bytes(b"begin" + os.urandom(2_000_000) + b"end")
        for number in range(5):
            (job.report.logs / f"{number}.bin").write_bytes(os.urandom(190_000))
        return PASSED

    job = make_job(tmp_path, FakeClock())
    run_plan(Plan("p", 100, (Step("a", 1, 2, step),)), job)
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {report.NUMBERS, report.REPORT, report.LOGS}
    assert (out / report.LOGS).stat().st_size < 1_100_000
    assert not job.report.scratch.exists()
    monkeypatch.setattr(report, "ALL", 10_000_000)
    report.pack_logs(tmp_path, tmp_path / "none.tar.gz")
    with tarfile.open(out / report.LOGS) as tar:
        assert tar.getnames() == [f"logs/{number}.bin" for number in range(5)]


def test_nobody_has_to_look_on(tmp_path, monkeypatch):
    """Lines go to a terminal that is gone; the files are there all the same."""

    class Gone:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    job = make_job(tmp_path, FakeClock())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone())
        assert run_plan(without_work(plans.FIRST), job)
    assert written(tmp_path)["end"] == "complete"
    assert (tmp_path / "out" / "logs.tar.gz").exists()
    assert not job.report.scratch.exists()


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


@needs_cuda
@pytest.mark.slow
def test_the_rehearsal_runs_the_steps(tmp_path, capsys):
    """One of each kind: all of them run with ``gpu_check.py --rehearse``."""
    steps = {
        "first": ["smoke:blocks", "tests", "sinusoid", "ncu:triton", "micro"],
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
