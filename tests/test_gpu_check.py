"""The GPU check on a machine without one, and what becomes of its steps when one goes wrong."""

from __future__ import annotations

import json
import sys
import time

import pytest

from metafast.benchmarks import gpu_check


@pytest.fixture
def report(monkeypatch, tmp_path):
    def run(device, only, **steps):
        monkeypatch.setattr(gpu_check, "describe", lambda: {"device": device})
        monkeypatch.setattr(gpu_check, "STEPS", steps)
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "out"), "--only", only])
        code = gpu_check.main()
        file = tmp_path / "out" / "gpu_check.json"
        return code, json.loads(file.read_text()) if file.exists() else None

    return run


def broken(job):
    raise OSError("disk full")


def fine(job):
    return {"state": "passed"}


def test_without_a_gpu_it_says_so(report, capsys):
    assert report(None, "fine", fine=fine) == (2, None)
    assert "There is no GPU here" in capsys.readouterr().out


def test_a_step_that_fails_leaves_the_others(report):
    code, found = report("H200", "broken,fine", broken=broken, fine=fine)
    assert code == 1
    assert found["steps"]["broken"] == {"state": "failed", "end": "OSError: disk full"}
    assert found["steps"]["fine"] == {"state": "passed"}
    assert report("H200", "fine", broken=broken, fine=fine)[0] == 0


def test_an_unknown_step_is_named(report, capsys):
    with pytest.raises(SystemExit):
        report("H200", "fine,spin", fine=fine)
    assert "'spin' is unknown; choose from fine" in capsys.readouterr().err


def test_commands_are_cut_off_and_their_output_kept(tmp_path):
    sleeper = [sys.executable, "-uc", "import time; print('began'); time.sleep(60)"]
    found = gpu_check.run(sleeper, 3, tmp_path / "log")
    assert found["state"] == "cut off"
    assert "began" in found["end"]
    assert found["seconds"] < 30
    failed = gpu_check.run([sys.executable, "-c", "raise SystemExit('no luck')"], 60, tmp_path / "log")
    assert (failed["state"], failed["end"].strip()) == ("failed", "no luck")


def test_each_workload_keeps_its_result(tmp_path):
    job = gpu_check.Job(tmp_path, "triton", time.monotonic() + 100)

    def one(name, file):
        if name == "half":
            file.write_text('{"cut')
        elif name == "whole":
            file.write_text('{"ms": 3}')
        return {"state": "passed"}

    found = gpu_check._each(("half", "whole", "none"), job, "bench", one)
    assert [found["workloads"][n]["result"] for n in ("half", "whole", "none")] == [None, {"ms": 3}, None]
