"""The benchmark: what disagrees gets no ratio, what is slow is cut off, files hold what they promise."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from entrants import Absent, Broken, Inexact, Meeting, Sleeper, WrongSign, small, tiny
from torch import nn

from metafast.bench import Outputs, Settings, main_bench, main_compare, oracles, own_failures, read_result
from metafast.bench import run as bench_run
from metafast.bench.compare import compare
from metafast.bench.functional_peers import TorchVmap
from metafast.bench.peers import LEARN2LEARN, Answer, Learn2Learn, Metafast, Peer, TorchLoop
from metafast.bench.run import contenders
from metafast.bench.table import best_ratio, cells, markdown
from metafast.bench.workloads import WORKLOADS, Workload, workload
from metafast.machine import MachineRates, bare_bytes
from metafast.tasks import TaskBatch
from metafast.verification.agreement import agreement


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """One run over everything that can happen to a peer; each has a process of its own."""
    patient = Settings(threads=1, rounds=2, turn=0.01, first_limit=100)
    hasty = Settings(threads=1, rounds=1, turn=0.01, first_limit=1)
    entered = [Metafast(), TorchLoop(), WrongSign(), Inexact(), Broken(), Absent()]
    result = bench_run.measure([tiny()], entered, patient, lambda text: None)
    late = bench_run._Contender(Sleeper())
    bench_run._start(late, tiny(), hasty, 1)
    bench_run._check(late, tiny(), (np.zeros(2), {}), hasty)
    result["workloads"][0]["rows"].append({**late.row, "floor_s": 1.0})
    return json.loads(json.dumps(result, allow_nan=False))


def rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["workloads"][0]["rows"]}


def test_rows_hold_what_is_promised(measured: dict[str, Any]) -> None:
    for name, peer in (("metafast", "torch loop"), ("torch loop", "metafast")):
        row = rows(measured)[name]
        assert row["state"] == "measured"
        assert row["version"]
        assert row["agreement"]["agrees"]
        assert row["agreement"]["losses"] < 1e-6
        assert row["agreement"]["gradient"] < 1e-5
        assert 0 < row["q1_s"] <= row["median_s"] <= row["q3_s"]
        assert row["calls"] >= 2
        assert row["first_call_s"] > 0
        assert 0 < row["peak_bytes"] < 2e9
        assert row["tasks_per_s"] == pytest.approx(2 / row["median_s"])
        assert row["over_floor"] == pytest.approx(row["median_s"] / row["floor_s"])
        assert set(row["speedup_over"]) == {peer}
        other = rows(measured)[peer]
        assert row["speedup_over"][peer] == pytest.approx(other["median_s"] / row["median_s"])


def test_floor_is_flops_or_bytes_over_rates(measured: dict[str, Any]) -> None:
    found = measured["workloads"][0]
    flops = 2 * (2 * (4 * (3 * 24 - 12) + 4 * (6 * 24 - 4 * 12)) + 3 * (3 * 24 - 12))
    assert found["cost"]["flops"] == flops
    assert found["cost"]["parameters"] == 19
    assert found["floors_s"]["flops"] == pytest.approx(flops / found["rates"]["matrix"])
    assert rows(measured)["metafast"]["floor_s"] == max(found["floors_s"].values())


def test_a_wrong_peer_gets_no_time_and_no_ratio(measured: dict[str, Any]) -> None:
    row = rows(measured)["wrong sign"]
    assert row["state"] == "disagrees"
    assert row["agreement"]["parameter"] == "hidden1.bias"
    assert row["agreement"]["parameter_error"] == pytest.approx(2, rel=1e-3)
    assert "hidden1.bias" in row["note"]
    assert not {"median_s", "speedup_over", "tasks_per_s"} & set(row)
    for other in rows(measured).values():
        assert "wrong sign" not in other.get("speedup_over", {})
    assert "wrong sign gives another result than the oracle, so it is not timed" in markdown(measured)


def test_an_error_that_float32_does_not_explain_is_flagged(measured: dict[str, Any]) -> None:
    """It is within the tolerance that pooled networks need, so it is timed; it gets no ratio and nothing is held to
    it."""
    row = rows(measured)["inexact"]
    assert row["state"] == "measured"
    assert row["flag"] == "off by 3.0e-04 where float32 allows 0.0001"
    assert row["median_s"] > 0
    assert "speedup_over" not in row
    assert not any("inexact" in other.get("speedup_over", {}) for other in rows(measured).values())
    assert cells(row, measured["workloads"][0])[-2:] == ["3e-04 !", ""]
    assert "inexact: off by 3.0e-04 where float32 allows 0.0001; it has no part in speed-ups" in markdown(measured)
    assert measured["tolerances"]["exact"]["value"] == 1e-4
    own = rows(measured)["metafast"]
    assert cells(own, measured["workloads"][0])[-2] == f"{own['agreement']['gradient']:.0e}"


def test_a_flag_on_metafast_itself_leaves_no_ratio(measured: dict[str, Any]) -> None:
    wrong = json.loads(json.dumps(measured))
    for row in rows(wrong).values():
        row.pop("speedup_over", None)
    rows(wrong)["metafast"]["flag"] = "off"
    assert best_ratio(wrong["workloads"][0]) is None
    assert cells(rows(wrong)["torch loop"], wrong["workloads"][0])[-1] == ""


@pytest.mark.parametrize("name", ["sin25-5", "wide5w1s-5", "omni5w1s-1", "torchbench-maml"])
def test_networks_that_amplify_rounding_are_told_apart(name: str) -> None:
    assert bench_run.exact_path(workload(name)) == name.startswith(("sin", "wide"))


def test_first_calls_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two is ready only while the other's first call runs; by default they come one after the other."""
    monkeypatch.setattr(bench_run, "rates", lambda device: MachineRates(1e9, 1e9))
    monkeypatch.setattr(bench_run, "bare_bytes", lambda: 0)
    kept = tmp_path / "oracles"
    oracles.save(kept, tiny(), oracles.compute(tiny()))
    tmp_path /= "meeting"
    tmp_path.mkdir()
    peers = [Meeting(tmp_path, number) for number in range(2)]
    together = Settings(threads=1, rounds=1, turn=0.01, first_limit=60, side_by_side=True, oracle=kept)
    found = bench_run.measure([tiny()], peers, together, lambda text: None)
    assert [row["state"] for row in rows(found).values()] == ["measured", "measured"]
    for file in tmp_path.iterdir():
        file.unlink()
    apart = Settings(threads=1, rounds=1, turn=0.01, first_limit=10, oracle=kept)
    found = bench_run.measure([tiny()], peers, apart, lambda text: None)
    assert [row["state"] for row in rows(found).values()] == ["cut off", "measured"]


def test_an_oracle_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the one that is held against, and a file that is missing is found before anything runs."""
    losses, gradient = oracles.compute(tiny())
    oracles.save(tmp_path, tiny(), (losses, {name: 2 * value for name, value in gradient.items()}))
    settings = Settings(threads=1, rounds=1, turn=0.01, oracle=tmp_path)
    found = bench_run.measure([tiny()], [TorchLoop()], settings, lambda text: None)
    assert rows(found)["torch loop"]["state"] == "disagrees"
    assert rows(found)["torch loop"]["agreement"]["gradient"] == pytest.approx(0.5)
    assert found["settings"]["oracle"] == str(tmp_path)
    json.dumps(found)
    monkeypatch.setattr(bench_run, "describe", lambda *_: pytest.fail("it measures"))
    with pytest.raises(FileNotFoundError, match=r"sin25-1.npz is not there.*make gpu-pack writes"):
        bench_run.measure([tiny(), workload("sin25-1")], [], settings, lambda text: None)


def test_others_that_take_no_part_say_why(measured: dict[str, Any]) -> None:
    found = {name: (row["state"], row["note"]) for name, row in rows(measured).items()}
    assert found["broken"] == ("failed", "OverflowError: no such luck")
    assert found["absent"] == ("missing", "absent is not installed")
    assert found["sleeper"] == ("cut off", "its first call takes longer than 1 s")


def test_result_says_where_it_comes_from(measured: dict[str, Any]) -> None:
    machine = measured["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == 1
    assert {"cpu", "cores", "metafast", "commit", "date", "python"} <= set(machine)
    assert measured["tolerances"]["gradient"]["reason"]


def test_files_from_a_saved_result(measured: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(measured))
    files = Outputs(*(tmp_path / name for name in ("again.json", "table.md", "chart.png", "page.html")))
    assert main_bench(saved=saved, outputs=files) == measured
    assert "sleeper: cut off, its first call takes longer than 1 s" in " ".join(capsys.readouterr().out.split())
    assert read_result(files.json) == measured
    assert "| `tiny` |" in files.markdown.read_text()
    assert files.chart.read_bytes().startswith(b"\x89PNG")
    html = files.report.read_text()
    assert "prefers-color-scheme: dark" in html
    assert "wrong sign gives another result" in html
    assert "http" not in html


@pytest.mark.parametrize("width", [None, 80, 45])
def test_numbers_are_whole_on_any_terminal(
    measured: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
    width: int | None,
) -> None:  # fmt: skip
    """A narrow one gets fewer columns; a file (``None``) gets all of them."""
    saved = tmp_path / "saved.json"
    result = json.loads(json.dumps(measured))
    rows(result)["broken"]["note"] = "TypeError: list[int] [bold]"
    saved.write_text(json.dumps(result))
    if width is not None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", str(width))
    main_bench(saved=saved)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= (width or 120)
    for row in measured["workloads"][0]["rows"]:
        line = next(line for line in lines if line.startswith(f"{row['name']}  "))
        wanted = cells(row, measured["workloads"][0])
        kept = wanted if width is None else [wanted[0], wanted[-1]] if width == 45 else [*wanted[:4], wanted[-1]]
        assert all(cell in line for cell in kept)
    assert "list[int] [bold]" in " ".join(lines)


def test_the_table_goes_between_the_marks_of_a_readme(measured: dict[str, Any], tmp_path: Path) -> None:
    saved, readme = tmp_path / "saved.json", tmp_path / "README.md"
    saved.write_text(json.dumps(measured))
    readme.write_text("# Before\n\n<!-- metafast bench -->\nold\n<!-- /metafast bench -->\n\nafter\n")
    for _ in range(2):  # again changes nothing
        main_bench(saved=saved, outputs=Outputs(readme=readme))
        begin, _, rest = readme.read_text().partition("<!-- metafast bench -->\n")
        table, _, end = rest.partition("<!-- /metafast bench -->")
        assert (begin, table, end) == ("# Before\n\n", markdown(measured), "\n\nafter\n")
    assert all(str(measured["machine"][key]) in table for key in ("torch", "metafast", "cpu", "commit", "python"))
    assert measured["machine"]["date"][:10] in table
    readme.write_text("# No marks\n")
    with pytest.raises(ValueError, match="put the lines <!-- metafast bench --> and"):
        main_bench(["sin25-1"], outputs=Outputs(readme=readme))


@pytest.mark.parametrize(
    ("outputs", "error", "text"),
    [
        ({"json": "no/a.json"}, FileNotFoundError, "no folder"),
        ({"markdown": "."}, IsADirectoryError, "name a file in it"),
        ({"chart": "a.html"}, ValueError, "a.html: a chart is one of .*png"),
    ],
)
def test_what_cannot_be_written_is_found_before_measuring(
    tmp_path: Path, outputs: dict[str, str], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        main_bench(["sin25-1"], outputs=Outputs(**{kind: tmp_path / name for kind, name in outputs.items()}))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rounds": 0}, "--rounds 0"), ({"threads": 0}, "--threads 0"), ({"first_limit": -1}, "--first-limit -1"),
        ({"budget": float("nan")}, "--budget nan"),
    ],
)  # fmt: skip
def test_settings_are_checked(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Settings(**settings)


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It comes when metafast has had a turn and the loop has not."""

    def say(text: str) -> None:
        if "round 1 of" in text and "torch loop" in text:
            raise KeyboardInterrupt

    monkeypatch.setattr("metafast.bench._say", say)
    monkeypatch.setattr("metafast.bench.peers", lambda: [TorchLoop()])
    saved, readme = tmp_path / "a.json", tmp_path / "README.md"
    readme.write_text("<!-- metafast bench -->\nold\n<!-- /metafast bench -->\n")
    with pytest.raises(KeyboardInterrupt):
        main_bench(
            own=tiny(), settings=Settings(threads=1, turn=0.2), outputs=Outputs(json=saved, readme=readme),
            backends=["reference"],
        )  # fmt: skip
    found = rows(read_result(saved))
    assert {name: row["state"] for name, row in found.items()} == {
        "metafast (reference)": "measured", "torch loop": "interrupted",
    }  # fmt: skip
    assert found["metafast (reference)"]["median_s"] > 0
    assert "old" in readme.read_text()
    assert "stopped early; measured before: tiny" in capsys.readouterr().err


def test_no_oracle_stops_and_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate at which float64 overflows."""
    wild = Workload("wild", small, "mse", (1,), ways=0, shots=4, queries=3, tasks=2, steps=4, lr=1e200)
    with pytest.raises(bench_run.Stopped) as stop:
        bench_run.measure([tiny(), wild], [], Settings(threads=1), lambda text: None)
    assert [workload["name"] for workload in stop.value.result["workloads"]] == ["tiny"]
    assert "wild: losses or gradient are not finite in float64 either" in str(stop.value.reason)


def test_an_executor_without_a_time_is_told(measured: dict[str, Any]) -> None:
    assert own_failures(measured) == []
    wrong = json.loads(json.dumps(measured))
    rows(wrong)["metafast"]["state"] = "disagrees"
    assert own_failures(wrong) == ["metafast on tiny: disagrees"]


@pytest.mark.parametrize(("factor", "worse"), [(1.09, False), (1.11, True), (0.5, False)])
def test_compare_threshold(measured: dict[str, Any], factor: float, worse: bool) -> None:
    new = json.loads(json.dumps(measured))
    rows(new)["metafast"]["median_s"] *= factor
    rows(new)["torch loop"]["median_s"] *= 3
    comparison = compare(measured, new, threshold=0.1)
    assert [change.name for change in comparison.worse] == (["metafast"] if worse else [])
    ratios = {change.name: change.ratio for change in comparison.changes}
    assert ratios == {"metafast": pytest.approx(factor), "torch loop": pytest.approx(3), "inexact": 1}
    assert comparison.caveats == ()


def test_compare_sees_a_lost_agreement_and_another_machine(measured: dict[str, Any]) -> None:
    new = json.loads(json.dumps(measured))
    del rows(new)["metafast"]["median_s"]
    rows(new)["metafast"].update(state="disagrees", note="losses differ")
    new["machine"]["threads"] = 64
    comparison = compare(measured, new, threshold=0.1)
    assert [change.worse for change in comparison.worse] == ["disagrees: losses differ"]
    assert comparison.caveats == ("threads: 1 before, 64 now",)


def test_compare_reads_only_results(measured: dict[str, Any], tmp_path: Path) -> None:
    good, other, text = tmp_path / "good.json", tmp_path / "other.json", tmp_path / "text.json"
    good.write_text(json.dumps(measured))
    certificate = tmp_path / "certificate.json"
    other.write_text('{"format": 0}')
    certificate.write_text('{"format": 1, "checks": []}')
    text.write_text("not json")
    assert main_compare(good, good).worse == ()
    for bad in (other, text, certificate):
        with pytest.raises(ValueError, match="no result of metafast bench"):
            main_compare(good, bad)
    with pytest.raises(ValueError, match="no workload in common"):
        compare(measured, {**measured, "workloads": []}, 0.1)


@pytest.mark.parametrize("name", [name for name, w in WORKLOADS.items() if not w.each_step])
def test_canonical_sizes(name: str) -> None:
    """Tasks, steps, samples and P as the names say; the same tasks on every draw."""
    w = workload(name)
    tasks, again = w.draw(), w.draw()
    assert torch.equal(tasks.support_x, again.support_x)
    assert not torch.equal(tasks.support_x, w.draw(1).support_x)
    size = sum(p.numel() for p in w.network().parameters())
    bias = 4 * (64 if "omni" in name else 32)  # convolutions in front of batch norm go without
    sizes = {"sin": 1761, "omni5": 112261 - bias, "omni20": 113236 - bias, "mini": 32901 - bias, "torchbench": 75205}
    assert size == next(v for k, v in sizes.items() if name.startswith(k))
    ways = max(w.ways, 1)
    assert tasks.support_x.shape == (w.tasks, ways * w.shots, *w.sample)
    assert tasks.query_x.shape == (w.tasks, ways * w.queries, *w.sample)
    if w.ways:
        assert torch.equal(tasks.query_y.flatten().bincount(), torch.full((w.ways,), w.tasks * w.queries))


def test_second_order_matters() -> None:
    """First order must not pass for exact on a workload, or agreement would say nothing."""
    for name, least in (("sin25-1", 0.1), ("sin25-5", 0.1)):
        w = workload(name)
        tasks = w.draw().to(torch.float64)
        exact = TorchLoop().prepare(w, tasks)()
        half = metafast_first_order(w, tasks)
        assert agreement(arrays(half), arrays(exact)).gradient > least


def metafast_first_order(w: Workload, tasks: TaskBatch) -> Answer:
    from metafast import FOMAML

    model = w.network().double()
    losses = FOMAML(model, loss=w.loss, lr=w.lr, steps=w.steps).backward(tasks).losses
    return losses, {name: p.grad for name, p in model.named_parameters()}


def arrays(answer: Answer) -> Any:
    return np.asarray(answer[0]), {name: value.detach().numpy() for name, value in answer[1].items()}


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)
    )


@pytest.mark.parametrize("peer", [TorchVmap(), Metafast("reference")], ids=lambda peer: peer.name)
def test_peers_agree_in_float64(peer: Peer) -> None:
    """To the last figures, batch norm included: the vmap peer's is written out."""
    w = Workload("conv", convolutional, "cross_entropy", (1, 6, 6), 3, 2, 2, tasks=2, steps=2, lr=0.05)
    tasks = w.draw().to(torch.float64)
    found = agreement(arrays(peer.prepare(w, tasks)()), arrays(TorchLoop().prepare(w, tasks)()))
    assert max(found.losses, found.gradient, found.parameter_error) < 1e-12


def test_learn2learn_from_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    w = tiny()
    monkeypatch.setenv(LEARN2LEARN, str(tmp_path))
    assert "maml.py" in str(Learn2Learn().missing(w, "cpu"))
    monkeypatch.delenv(LEARN2LEARN)
    if importlib.util.find_spec("learn2learn") is None:
        assert LEARN2LEARN in str(Learn2Learn().missing(w, "cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_is_that_of_the_process_alone() -> None:
    """A gigabyte in the parent does not count for its child, as it would in ``ru_maxrss``; one in the child does."""
    gigabyte = torch.ones(1 << 28)
    bare = bare_bytes()
    code = "import torch; from metafast.bench.worker import peak_bytes; a = torch.ones(1 << 28); print(peak_bytes())"
    full = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert bare < gigabyte.nbytes
    assert gigabyte.nbytes < full - bare < 1.2 * gigabyte.nbytes


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="sin25-1"):
        workload("sin25")
    with pytest.raises(ValueError, match="torch loop"):
        contenders(["auto"], ["numpy"], [TorchLoop()])
    with pytest.raises(ValueError, match="backend='quick' is unknown"):
        contenders(["quick"], [], [TorchLoop()])
    with pytest.raises(ValueError, match=r"'torch' is unknown; choose from torch loop, torch.func vmap"):
        contenders(["auto"], ["torch"], [TorchLoop(), TorchVmap()])
    chosen = contenders(["auto", "reference"], ["Torch l", "torch loop"], [TorchLoop(), TorchVmap()])
    assert [peer.name for peer in chosen] == ["metafast", "metafast (reference)", "torch loop"]
