"""Bars of the GPU check and the table of its reports, on made-up numbers: no GPU has given them."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu import bars, subjects, table


def line(step, of, **values):
    return {"elapsed": 1.0, "step": step, "of": of, **values}


def good_lines():
    smoke = [
        line(f"smoke:{subjects.executor(name)}", name, gradient_error=1e-6, right=True, same_bits=True)
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
        ("omni5w1s-5", {"right": False}, 1), ("sin25-5", {"same_bits": False}, 2),
        ("racecheck", {"state": "failed"}, 3), ("memcheck", {"state": "cut off"}, 3),
        ("sin1024-5", {"speedup": 3.9}, 4), ("omni5w1s-1", {"speedup": None}, 5), ("omni5w1s-5", {"speedup": 4.9}, 6),
        ("sinusoid", {"wall_seconds": 20.5}, 7), ("omniglot-5w1s", {"wall_seconds": 301}, 8),
        ("omniglot-5w1s", {"result": 0.9869}, 9),
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


def test_a_workload_that_raises_misses_its_bars():
    lines = [each for each in good_lines() if each["of"] != "mini5w1s-5"]
    found = bars.judge([*lines, line("smoke:triton", "mini5w1s-5", error="RuntimeError: out of memory")])
    assert [place for place, of in enumerate(found) if of["verdict"] == "missed"] == [0, 1, 2]
    assert "mini5w1s-5" in found[0]["found"]


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

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.MARKS[0]}\nold\n{table.MARKS[1]}\nafter\n")
    table.main([str(file) for file in reports])
    printed = capsys.readouterr().out
    row = "| `sin25-5` | cuda | 2e-07 | 250 µs | 125 µs | 100 µs | – | JAX jit(vmap) | **12.3x** |"
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

    reports[0].write_text(json.dumps({**json.loads(reports[0].read_text()), **change}))
    with pytest.raises(SystemExit):
        table.main([str(file) for file in reports])
    assert text in capsys.readouterr().err
