"""The profile: every rule is told where and how often it ran, FLOPs add up, the trace is one that viewers open."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import meta_gradient
from test_cli import call
from torch import nn

import metafast as mf
from metafast.bench.workloads import Workload
from metafast.executors import CpuExecutor, ReferenceExecutor
from metafast.executors.native.encode import extension
from metafast.machine import MachineRates
from metafast.profile import profile
from metafast.profile.layered import SpanRecorder, TimedExecutor
from metafast.profile.result import NOT_ACCOUNTED, Profile, Row
from metafast.profile.spans import HOST, Span, Timeline, around, undisturbed
from metafast.profile.timeline import write_trace
from metafast.program.capture import capture
from metafast.program.flops import program_cost
from metafast.program.losses import as_loss

needs_native = pytest.mark.skipif(not CpuExecutor.isas(), reason="metafast._C is not built")
BACKENDS = [pytest.param("cpu", marks=needs_native), "reference"]
TASKS, STEPS, ITERATIONS = 3, 2, 2


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 3),
    )  # fmt: skip


def small(**changes: Any) -> Workload:
    sizes = {"ways": 3, "shots": 2, "queries": 2, "tasks": TASKS, "steps": STEPS, "lr": 0.01, **changes}
    return Workload("small", network, "cross_entropy", (1, 12, 12), **sizes)


@pytest.fixture(scope="module")
def profiles() -> dict[str, tuple[Profile, Timeline]]:
    backends = ["reference", *(["cpu"] if CpuExecutor.isas() else [])]
    return {name: profile(small(), backend=name, iterations=2 * ITERATIONS) for name in backends}


@pytest.mark.parametrize("backend", BACKENDS)
def test_phases_are_those_of_the_algorithm(profiles: Any, backend: str) -> None:
    found, timeline = profiles[backend]
    middle = ["inner step 1", "inner step 2", "query", "reverse step 2", "reverse step 1"]
    loads = ["load"] if backend == "cpu" else []
    assert list(found.phases) == ["sample", "prepare", *loads, *middle, "collect", "outer step", NOT_ACCOUNTED]
    assert all(seconds > 0 for seconds in found.phases.values())
    assert sum(found.phases.values()) == pytest.approx(found.wall)
    assert found.accounted == pytest.approx(1 - found.phases[NOT_ACCOUNTED] / found.wall)
    at_once = TASKS if backend == "cpu" else 1
    counts = Counter(span.name for span in timeline.phases)
    assert counts == dict.fromkeys([*loads, *middle], at_once * timeline.iterations)


@needs_native
def test_native_tells_each_rule_of_each_task(profiles: Any) -> None:
    found, timeline = profiles["cpu"]
    passes = {"inner step": STEPS, "query": 1, "reverse step": STEPS}
    layers = ["0", "1", "4", "5", "7", "loss"]  # batch norm, ReLU and pooling are one
    wanted = {}
    for layer in layers:
        for phase in ("inner step", "query"):
            wanted[layer, "forward", phase] = wanted[layer, "backward", phase] = TASKS * passes[phase]
        wanted[layer, "tangent_backward", "reverse step"] = TASKS * STEPS
        if layer != "loss":
            wanted[layer, "tangent_forward", "reverse step"] = TASKS * STEPS
    calls = Counter((span.layer, span.name, span.phase.rstrip(" 0123456789")) for span in timeline.rules)
    assert calls == {key: count * timeline.iterations for key, count in wanted.items()}
    assert {row.layer for row in found.rows} == {"0", "1 + 2 + 3", "4", "5", "7", "loss (cross_entropy)"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_rules_lie_inside_their_phase(profiles: Any, backend: str) -> None:
    _, timeline = profiles[backend]
    by_thread: dict[int, list[Span]] = {}
    for span in timeline.phases:
        by_thread.setdefault(span.thread, []).append(span)
    for rule in timeline.rules:
        around_it = [p for p in by_thread[rule.thread] if p.begin <= rule.begin and rule.end <= p.end]
        assert [p.name for p in around_it] == [rule.phase]


@needs_native
def test_flops_are_those_of_the_whole_meta_gradient(profiles: Any) -> None:
    """What the rules do adds up to what ``metafast.program.flops`` says of the algorithm."""
    found, _ = profiles["cpu"]
    program = capture(network(), as_loss("cross_entropy"), small().draw().support_x[0], steps=STEPS)
    tasks = small().draw()
    cost = program_cost(program, tasks.support_x[0])
    wanted = cost.meta_gradient(TASKS, 6, 6, STEPS).flops
    assert sum(row.flops for row in found.rows) == pytest.approx(wanted)
    by_phase: Counter[str] = Counter()
    for row in found.rows:
        by_phase[row.phase] += row.flops
    assert by_phase["query"] == pytest.approx(TASKS * cost.query(6))
    assert by_phase["reverse step"] == pytest.approx(TASKS * STEPS * cost.hessian(6))


def test_reference_computes_each_step_again_on_the_way_back(profiles: Any) -> None:
    found, _ = profiles["reference"]
    program = capture(network(), as_loss("cross_entropy"), small().draw().support_x[0], steps=STEPS)
    cost = program_cost(program, small().draw().support_x[0])
    forward = sum(row.flops for row in found.rows if (row.rule, row.phase) == ("forward", "reverse step"))
    assert forward == pytest.approx(TASKS * STEPS * 6 * cost.forward)
    row = next(r for r in found.rows if (r.layer, r.rule, r.phase) == ("4", "forward", "query"))
    elements, weights = 8 * 6 * 6, 8 * 8 * 9 + 8
    assert row.bytes == TASKS * 4 * (6 * 2 * elements + weights)
    assert row.flops == TASKS * 6 * 2 * elements * 8 * 9
    assert row.floor == max(row.flops / found.rates.matrix, row.bytes / found.rates.copy)
    assert row.of_roofline == pytest.approx(row.floor / row.seconds)


@needs_native
def test_most_of_the_time_is_accounted_for() -> None:
    found, _ = profile(small(tasks=16, queries=15), backend="cpu", iterations=8)
    assert found.accounted >= 0.95, found.phases


@pytest.mark.parametrize("backend", BACKENDS)
def test_trace_is_one_that_viewers_open(profiles: Any, backend: str, tmp_path: Path) -> None:
    _, timeline = profiles[backend]
    labels, complete = opened(timeline, tmp_path)
    assert labels == {1: "python", 2: "executor thread 0"}
    assert {"sample", "query", "4.tangent_backward", "loss.forward"} <= {event["name"] for event in complete}
    spans = (*timeline.host, *timeline.phases, *timeline.rules)
    began = max(span.begin for span in timeline.host if span.name == "sample")
    wanted = sorted(span.seconds for span in spans if span.begin >= began)
    assert sorted(1e-6 * event["dur"] for event in complete) == pytest.approx(wanted, abs=2e-9)


def opened(timeline: Timeline, folder: Path) -> tuple[dict[int, str], list[dict[str, Any]]]:
    write_trace(timeline, "test", folder / "trace.json")
    return check_trace((folder / "trace.json").read_text())


def check_trace(text: str) -> tuple[dict[int, str], list[dict[str, Any]]]:
    """What importers of Chrome's trace events ask for: finite times in microseconds of whole nanoseconds, named rows,
    and each row's complete events in order, nested or apart. The names of the rows and those events."""
    trace = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert trace["displayTimeUnit"] in ("ms", "ns")
    names: dict[str, dict[int, str]] = {"process_name": {}, "thread_name": {}}
    rows: dict[int, list[dict[str, Any]]] = {}
    for event in trace["traceEvents"]:
        assert event["ph"] in ("X", "M")
        assert type(event["pid"]) is type(event["tid"]) is int
        assert event["pid"] > 0
        assert event["tid"] > 0
        assert type(event["name"]) is str
        assert event["name"]
        if event["ph"] == "M":
            assert event["tid"] not in names[event["name"]]
            assert type(event["args"]["name"]) is str
            names[event["name"]][event["tid"]] = event["args"]["name"]
        else:
            assert all(type(event[key]) in (int, float) and event[key] >= 0 for key in ("ts", "dur"))
            assert type(event["cat"]) is str
            rows.setdefault(event["tid"], []).append(event)
    assert len({event["pid"] for event in trace["traceEvents"]}) == len(names["process_name"]) == 1
    assert set(rows) == set(names["thread_name"])
    for events in rows.values():
        check_nested([(round(1000 * event["ts"]), round(1000 * event["dur"])) for event in events])
    return names["thread_name"], [event for events in rows.values() for event in events]


def check_nested(spans: list[tuple[int, int]]) -> None:
    """Begin and length, in nanoseconds."""
    assert [begin for begin, _ in spans] == sorted(begin for begin, _ in spans)
    open_until: list[int] = []
    for begin, length in spans:
        while open_until and open_until[-1] <= begin:
            open_until.pop()
        assert not open_until or begin + length <= open_until[-1]
        open_until.append(begin + length)


def trace_of(*phases: Span) -> Timeline:
    return Timeline(1, 1.0, (Span("sample", 0.0, 1.0),), phases, (), 1)


@pytest.mark.parametrize(
    "timeline",
    [
        trace_of(Span("query", 0.1, 0.5, 0), Span("wait", 0.4, 0.6, 0)),
        trace_of(Span("query", 0.1, float("nan"), 0)),
        trace_of(Span("query", 0.5, 0.1, 0)),
        trace_of(Span("", 0.1, 0.2, 0)),
        trace_of(Span("query", 0.1, 0.2, -3)),
    ],
    ids=["overlap", "nan", "ends before it begins", "no name", "row below 1"],
)
def test_a_bad_trace_does_not_pass(timeline: Timeline, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, ValueError)):
        opened(timeline, tmp_path)


def test_spans_that_touch_or_last_no_time_are_a_good_trace(tmp_path: Path) -> None:
    third = 1 / 3  # no multiple of a nanosecond
    timeline = trace_of(
        Span("query", 0.1, third, 0), Span("wait", third, 0.9, 0), Span("load", third, third, 1),
    )  # fmt: skip
    labels, complete = opened(timeline, tmp_path)
    assert labels == {1: "python", 2: "executor thread 0", 3: "executor thread 1"}
    assert [(e["ts"], e["dur"]) for e in complete if e["name"] == "wait"] == [(333333.333, 566666.667)]


def test_timed_layers_change_no_bit_and_tell_nothing_unasked() -> None:
    program = capture(network(), as_loss("cross_entropy"), small().draw().support_x[0], steps=STEPS)
    tasks, params = small().draw(), torch.cat([p.detach().flatten() for p in network().parameters()])
    rate = torch.tensor([[0.05]])
    plain, timed = ReferenceExecutor(), TimedExecutor(ReferenceExecutor())
    expected = meta_gradient(plain, program, params, rate, tasks, STEPS)
    for recorder in (None, SpanRecorder(torch.device("cpu"))):
        timed.recorder = recorder
        found = meta_gradient(timed, program, params, rate, tasks, STEPS)
        assert torch.equal(found.grad, expected.grad)
        assert torch.equal(found.rates_grad, expected.rates_grad)
    assert {rule.name for rule in recorder.rules} == {"forward", "backward", "tangent_forward", "tangent_backward"}


@needs_native
def test_native_notes_nothing_unasked_and_recording_changes_no_bit() -> None:
    learner = mf.MAML(network(), loss="cross_entropy", lr=0.01, steps=STEPS, backend="cpu")
    tasks = small().draw()

    def gradient() -> torch.Tensor:
        learner.zero_grad()
        learner.backward(tasks)
        return torch.cat([p.grad.flatten() for p in learner.model.parameters()])

    plain = gradient()
    assert extension.trace(False) == b""
    extension.trace(True)
    assert torch.equal(gradient(), plain)
    assert len(extension.trace(False)) % 32 == 0
    gradient()
    assert extension.trace(False) == b""


def test_disturbed_iterations_are_left_out() -> None:
    moments = [(0.0, 1.0), (1.0, 6.0), (6.0, 7.5)]
    spans = tuple(Span("sample", begin, end) for begin, end in moments)
    kept = undisturbed(Timeline(3, 0.0, spans, spans, (), 1), moments)
    assert (kept.iterations, kept.wall, kept.host) == (2, 2.5, (spans[0], spans[2]))


def test_a_call_has_edges_and_its_threads_wait_for_one_another() -> None:
    inside = [Span("query", 2.0, 3.0, 1), Span("load", 1.0, 1.5, 0), Span("query", 2.5, 4.0, 0)]
    calls = [Span("meta-gradient", 0.5, 4.25, HOST), Span("meta-gradient", 5, 6, HOST)]
    host, waits = around(calls, inside)
    assert host == [Span("prepare", 0.5, 1.0), Span("collect", 4.0, 4.25)]
    assert waits == [Span("wait", 1.0, 2.0, 1), Span("wait", 3.0, 4.0, 1)]


def told(rows: list[Row], phases: dict[str, float], kernels: Any = ()) -> str:
    rates = MachineRates(matrix=1e9, copy=1e9)
    rest = 1 - sum(phases.values())
    return Profile("w", "e", {}, rates, 1.0, 1.0, 1, {**phases, NOT_ACCOUNTED: rest}, tuple(rows), kernels).verdict


def row(kind: str, seconds: float, flops: float, moved: float) -> Row:
    return Row("layer", (kind,), "forward", "query", seconds, 7, flops, moved, max(flops, moved) / 1e9)


@pytest.mark.parametrize(
    ("rows", "phases", "kernels", "verdict"),
    [
        ([row("conv2d", 0.6, 3e8, 1e8)], {"query": 0.9}, (),
         "compute-bound in conv2d: 60% of the time, at 50% of the matrix rate by direct FLOPs"),
        ([row("batch_norm", 0.6, 0, 3e8), row("conv2d", 0.2, 1e8, 0)], {"query": 0.9}, (),
         "memory-bound in batch_norm: 60% of the time, at 50% of the copy rate"),
        ([row("linear", 0.6, 1e6, 6e6)], {"query": 0.9}, (),
         "overhead-bound in linear: 60% of the time, in 7 calls that take 100 times as long as their FLOPs and bytes"),
        ([row("linear", 0.2, 1e8, 0)], {"sample": 0.5, "prepare": 0.1, "query": 0.3}, (),
         "host-bound: 70% of the time is outside the layers, most of it in 'sample'"),
        ([row("linear", 0.9, 8e8, 0)], {"query": 0.9}, ({"name": "k", "seconds": 0.2, "calls": 3},),
         "launch-bound: the GPU is idle 80% of the time"),
    ],
)  # fmt: skip
def test_verdicts(rows: list[Row], phases: dict[str, float], kernels: Any, verdict: str) -> None:
    assert told(rows, phases, kernels) == verdict


def test_the_command_writes_its_files(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "deep" / "profile"
    options = ["--device", "cpu", "--iterations", 2, "--threads", torch.get_num_threads(), "--out", out]
    code, text, _ = call(capsys, "profile", "sin25-1", *options)
    assert code == 0
    assert "verdict: " in text
    assert "inner step 1" in text
    assert {path.name for path in out.iterdir()} == {"profile.json", "trace.json", "roofline.png"}
    written = json.loads((out / "profile.json").read_text())
    assert written["verdict"] in " ".join(text.split())
    assert written["workload"] == "sin25-1"
    assert 0 < written["accounted"] <= 1
    assert sum(written["phases_s"].values()) == pytest.approx(written["wall_s"])
    assert (out / "roofline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ([], 2, "give a workload's name"),
        (["sin25-1", "--model", "x.py:net"], 2, "give a workload's name"),
        (["sin25"], 2, "workload 'sin25' is unknown"),
        (["sin25-1", "--iterations", 0], 2, "--iterations 0"),
        (["sin25-1", "--threads", 0], 2, "--threads 0"),
        (["sin25-1", "--out", __file__], 1, "is a file; name a folder"),
        (["sin25-1", "--backend", "fast"], 2, "backend='fast' is unknown"),
        (["sin25-1", "--backend", "cuda"], 1, "cannot run this model"),
        (["sin25-1", "--device", "gpu"], 2, "--device is 'gpu'"),
    ],
)
def test_command_errors(tmp_path: Path, capsys: Any, options: list[Any], code: int, text: str) -> None:
    found, _, err = call(capsys, "profile", "--out", tmp_path / "p", *(["--device", "cpu"][: 2 * (
        "--device" not in options)]), *options)  # fmt: skip
    assert found == code
    assert text in err
