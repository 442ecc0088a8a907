"""The GPU check on a machine without one, and what becomes of its steps when one goes wrong."""

from __future__ import annotations

import inspect
import json
import sys
import time
from pathlib import Path

import pytest

import metafast.executors
from metafast import bench
from metafast.bench.run import contenders
from metafast.benchmarks import gpu_check
from metafast.benchmarks.peers import peers as known
from metafast.benchmarks.workloads import workload
from metafast.executors import ReferenceExecutor, executors
from metafast.executors.cuda import BlockMachine, NativeCudaExecutor


@pytest.fixture
def report(monkeypatch, tmp_path):
    def run(device, *options, **steps):
        monkeypatch.setattr(gpu_check, "describe", lambda: {"device": device})
        monkeypatch.setattr(gpu_check, "STEPS", steps)
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "out"), *options])
        code = gpu_check.main()
        file = tmp_path / "out" / "gpu_check.json"
        return code, json.loads(file.read_text()) if file.exists() else None

    return run


def broken(job):
    raise OSError("disk full")


def fine(job):
    return {"state": "passed"}


def test_without_a_gpu_it_says_so(report, capsys):
    assert report(None, "--only", "fine", fine=fine) == (2, None)
    assert "There is no GPU here" in capsys.readouterr().out


def test_a_step_that_fails_leaves_the_others(report):
    code, found = report("H200", "--only", "broken,fine", broken=broken, fine=fine)
    assert code == 1
    assert found["steps"]["broken"] == {"state": "failed", "end": "OSError: disk full"}
    assert found["steps"]["fine"] == {"state": "passed"}
    assert report("H200", "--only", "fine", broken=broken, fine=fine)[0] == 0


def test_an_unknown_step_is_named(report, capsys):
    with pytest.raises(SystemExit):
        report("H200", "--only", "fine,spin", fine=fine)
    assert "'spin' is unknown; choose from fine" in capsys.readouterr().err


def test_commands_are_cut_off_and_their_output_kept(tmp_path):
    sleeper = [sys.executable, "-uc", "import time; print('began'); time.sleep(60)"]
    found = gpu_check.run(sleeper, 3, tmp_path / "log")
    assert found["state"] == "cut off"
    assert "began" in found["end"]
    assert found["seconds"] < 30
    writer = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('what was found')"
    found = gpu_check.run([sys.executable, "-uc", writer], 3, tmp_path / "log")
    assert (found["state"], found["end"].strip()) == ("cut off", "what was found")
    failed = gpu_check.run([sys.executable, "-c", "raise SystemExit('no luck')"], 60, tmp_path / "log")
    assert (failed["state"], failed["end"].strip()) == ("failed", "no luck")


def test_what_is_not_there_is_asked_for(report, capsys):
    for options, text in (
        (["--workloads", "sin25-1,moon"], "--workloads: 'moon' is unknown; choose from sin25-1, sin25-5"),
        (["--only", "omniglot5"], "step omniglot5 needs --omniglot: the folder of its two zips"),
    ):
        with pytest.raises(SystemExit):
            report("H200", *options, fine=fine, omniglot5=fine)
        assert text in capsys.readouterr().err


def test_by_default_all_steps_run_for_which_there_are_data(report, tmp_path):
    steps = {"fine": fine, "omniglot5": fine}
    assert list(report("H200", **steps)[1]["steps"]) == ["fine"]
    assert list(report("H200", "--omniglot", str(tmp_path), **steps)[1]["steps"]) == ["fine", "omniglot5"]


WRITES = """
import sys
from pathlib import Path
found = {"half": '{"cut', "whole": '{"ms": 3}'}
if sys.argv[1] in found:
    Path(sys.argv[2]).write_text(found[sys.argv[1]])
"""


def test_each_workload_keeps_its_result(tmp_path):
    job = gpu_check.Job(tmp_path, time.monotonic() + 100, backends="triton")
    (tmp_path / "bench-none.json").write_text('{"of": "an earlier run"}')
    found = gpu_check._each(("half", "whole", "none"), job, "bench", WRITES, 30)
    assert [found["workloads"][n]["result"] for n in ("half", "whole", "none")] == [None, {"ms": 3}, None]
    late = gpu_check._each(("whole",), gpu_check.Job(tmp_path, time.monotonic() + 5, ("whole",)), "bench", WRITES, 30)
    skipped = {"whole": {"state": "skipped", "end": "no time left"}}
    assert late == {"state": "skipped", "workloads": skipped, "end": "whole: no time left"}


def test_a_measurement_is_what_was_asked_for(monkeypatch, tmp_path):
    given, signature = {}, inspect.signature(bench.main_bench)

    def main_bench(*arguments, **options):
        given.update(signature.bind(*arguments, **options).arguments)

    options = {"settings": gpu_check.SETTINGS, "backends": "triton,reference", "peers": ["torch loop"]}
    monkeypatch.setattr(sys, "argv", ["-c", "mini5w1s-5-t32", str(tmp_path / "out.json"), json.dumps(options)])
    with monkeypatch.context() as patch:
        patch.setattr(bench, "main_bench", main_bench)
        exec(gpu_check.BENCH, {})
    assert (given["own"].name, given["own"].tasks, given["own"].steps) == ("mini5w1s-5-t32", 32, 5)
    assert (given["backends"], given["chosen_peers"]) == (["triton", "reference"], ["torch loop"])
    assert (given["settings"].device, given["settings"].limit) == ("cuda", 60)
    assert given["outputs"].json == tmp_path / "out.json"


def test_each_precision_is_timed_and_held_to_the_truth(monkeypatch, tmp_path):
    twin = NativeCudaExecutor(BlockMachine(232448, 132))
    monkeypatch.setattr(metafast.executors, "_EXECUTORS", [twin, ReferenceExecutor()])
    options = {"settings": {"device": "cpu", "budget": 0.1}, "backends": "native-cuda", "peers": []}
    monkeypatch.setattr(sys, "argv", ["-c", "sin25-1-t2", str(tmp_path / "out.json"), json.dumps(options)])
    exec(gpu_check.PRECISION, {})
    found = json.loads((tmp_path / "out.json").read_text())
    errors = [found[precision]["error"] for precision in ("float32", "tf32x3", "tf32", "bf16")]
    assert max(errors[:2]) < 1e-5 < errors[2] < errors[3]
    assert all(entry["ms"] > 0 for entry in found.values())


def test_training_leaves_its_summary(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "SETTINGS", {"device": "cpu"})
    job = gpu_check.Job(tmp_path, time.monotonic() + 300, backends="reference")
    found = gpu_check._train(job, "sinusoid", "native-cuda", 100, "--iterations", "30", "--test-tasks", "2")
    assert found["state"] == "passed", found
    assert found["result"]["training"]["iterations"] == 30
    assert found["result"]["outer_step"] == "kernel by kernel (device cpu has no CUDA graphs)"
    refused = gpu_check._train(job, "omniglot-5w1s", "triton", 100)
    assert (refused["state"], refused["result"]) == ("failed", None)
    assert "needs --data" in refused["end"]


@pytest.mark.parametrize("name", [*gpu_check.WORKLOADS])
def test_workloads_have_an_executor_of_their_own(name):
    assert workload(name.partition("-t")[0]).steps in (1, 5)
    assert gpu_check.WORKLOADS[name] in [e.name for e in executors()]


def test_the_tests_that_it_runs_are_all_that_need_a_gpu():
    marked = {f.name for f in Path(__file__).parent.glob("test_*.py") if "pytest.mark.gpu" in f.read_text()}
    listed = {Path(file) for files in gpu_check.TESTS.values() for file in files.split()}
    assert {file.name for file in listed} == marked - {Path(__file__).name}
    assert all((gpu_check.ROOT / file).exists() for file in listed)


def test_tests_that_fail_run_again_launch_by_launch(monkeypatch, tmp_path):
    seen = []

    def run(command, limit, log, **environment):
        seen.append((command, environment))
        return {"state": "failed" if "tests/test_gpu.py" in command and not environment else "passed", "end": "ouch"}

    monkeypatch.setattr(gpu_check, "run", run)
    found = gpu_check.test(gpu_check.Job(tmp_path, time.monotonic() + 100))
    assert found["state"] == "partly"
    assert found["end"] == "blocks: ouch"
    assert found["files"]["blocks"]["again"]["state"] == "passed"
    assert [(len(e), "--lf" in c) for c, e in seen] == [(0, False), (1, True), (0, False), (0, False)]


def test_code_that_only_a_gpu_can_run_is_at_least_python():
    compile(gpu_check.PROFILE, "profile", "exec")
    assert {*gpu_check.PROFILED, *gpu_check.ROUNDED, *gpu_check.AT_ONCE} <= set(gpu_check.WORKLOADS)
    for peers in gpu_check.AT_ONCE.values():
        assert len(contenders([], peers, known())) == len(peers)
